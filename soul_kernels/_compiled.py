"""The references of the optimizer's ops under torch.compile: C++ on a CPU, inductor's Triton elsewhere.

A reference updates one block after another by a function of tensors (``step_block``, ``ema_block``). `Compiled` stands in for
such a function. For every *variant*, which is the dtypes of the tensors, which of them are there, and the options, it compiles
the function once, for blocks of any number of rows: whatever differs from call to call comes as a tensor.

A variant is used only after its results have been those of the function itself, bit for bit, on numbers made for the purpose:
compilers may fuse multiply and add, flush subnormal numbers or leave out roundings. If anything fails, nothing of the user's
has been touched; the process then stays with the reference, and says so once.

Safe to change: `BLOCK`, `PAYS`, `OPTIONS`. A new argument of a block function needs a line in `_example`.
"""

import math
import os
import re
import shutil
import sys
import threading
import types
import warnings
from collections.abc import Callable

import torch

from soul_kernels.reference.rounding import GROUP
from soul_kernels.tensors import has_data

BLOCK = 1 << 20  # elements: a call costs 40 us, and what 8-bit states need in between takes 8 bytes an element
SHORTEST = 2 * GROUP  # one row would be a variant of its own: torch.compile makes constants of the sizes 0 and 1
# Elements in an optimizer from which "auto" compiles on a CPU. The first variant takes 15 to 24 s of processor time, 3 to 5 s
# where torch finds it on the disk. On one thread a step then saves 5 ns an element (fp32) to 20 ns (8-bit states), for these
# 0.08 to 0.35 s: the first compilation is repaid in 45 to 300 steps, a later one in 10 to 60.
PAYS = 1 << 24
OPTIONS = {
    "cpp.enable_floating_point_contract_flag": "off",  # these three: the bits of the reference
    "cpp.enable_unsafe_math_opt_flag": False,
    "emulate_precision_casts": True,
    "cpp_cache_precompile_headers": False,  # they take longer than the few variants that there are
    "compile_threads": 1,  # one kernel a variant: a pool of processes would only cost its start
}
# Zeros, subnormal numbers, halves between two bf16 numbers, and what is not finite.
SPECIAL = (0.0, -0.0, 1e-40, -3e-39, 1e-7, 1.00390625, -1.01171875, 3e38, math.inf, -math.inf, math.nan)

_variants: dict[tuple, Callable] = {}
_refusals: list[str] = []  # why nothing is compiled in this process; empty while all is well
_lock = threading.Lock()


def can_compile(backend: str, tensor: torch.Tensor, numel: int) -> bool:
    """Tell whether an op is to be compiled; warn, once in a process, where that is wanted and cannot be.

    Args:
        backend: "compile", or "auto": on a CPU, from `PAYS` elements on.
        tensor: one of the op's tensors; it tells the device.
        numel: elements of all of them.
    """
    on_cpu = tensor.device.type == "cpu"
    if backend == "auto" and not (on_cpu and numel >= PAYS):
        return False
    if not has_data(tensor) or torch.compiler.is_compiling():
        return False
    if not _refusals and on_cpu and shutil.which(cpp_compiler()) is None:
        _refuse(f"there is no C++ compiler {cpp_compiler()!r}", "install one, or name one in CXX")
    return not _refusals


def cpp_compiler() -> str:
    """Return the name of the compiler that torch takes for C++."""
    return os.environ.get("CXX") or {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")


class Compiled:
    """A block function of a reference, compiled for whatever it is called with.

    Args:
        function: positional arguments are tensors, None, or tuples of tensors; keyword arguments are options.
    """

    size = BLOCK

    def __init__(self, function: Callable[..., None]):
        self.function = function

    def __call__(self, *arguments, **options) -> None:
        """Update a block in place, as ``function`` does."""
        lead = arguments[0]
        if lead.numel() < SHORTEST or lead.shape[1] != GROUP:
            return self.function(*arguments, **options)
        signature = tuple(argument if argument is None else getattr(argument, "dtype", None) for argument in arguments)
        key = (self.function, lead.device, signature, *options.items(), _surroundings(lead.device.type))
        variant = _variants.get(key)
        if variant is None and not _refusals:
            with _lock:
                if key not in _variants:
                    _variants[key] = _proven(self.function, arguments, options)
            variant = _variants[key]
        if variant is None or _refusals:
            return self.function(*arguments, **options)
        try:
            variant(*arguments, **options)
        except (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
            # Something else has changed, and torch compiles anew before it computes anything.
            _refuse(_first_line(error), _REMEDY)
            self.function(*arguments, **options)


def _surroundings(device_type: str) -> tuple:
    """Return what torch compiles anew for where it has changed; each has a variant, so that none is compiled unproven."""
    return (
        torch.get_num_threads(),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type),
    )


def _proven(function: Callable[..., None], arguments: tuple, options: dict) -> Callable[..., None]:
    """Return a variant that gives the bits of ``function``; ``function`` itself where there is none."""
    try:
        import torch._dynamo
        import torch._inductor

        if torch._dynamo.config.disable:
            _refuse("torch.compile is switched off", "unset TORCH_COMPILE_DISABLE and TORCHDYNAMO_DISABLE")
            return function
        known = torch._inductor.list_options()
        # torch keeps what it has compiled by code object, and at most 8 of one.
        twin = types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
        twin.__kwdefaults__ = function.__kwdefaults__
        chosen = {name: value for name, value in OPTIONS.items() if name in known}
        variant = torch.compile(twin, dynamic=True, fullgraph=True, options=chosen)
        got, want = _examples(function, arguments), _examples(function, arguments)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "bf16 and fp16 are mixed", UserWarning)  # in our tensors they may be
            variant(*got, **options)
        function(*want, **options)
    except Exception as error:  # of a compiler anything may come
        _refuse(_first_line(error), _REMEDY)
        return function
    if not all(map(_same, got, want)):
        wrong = [name for name, a, b in zip(_names(function), got, want) if not _same(a, b)]
        _refuse(f"compiled, {function.__name__} gives other bits in {', '.join(wrong)}", "try another compiler (CXX)")
        return function
    return variant


def _names(function: Callable[..., None]) -> tuple[str, ...]:
    return function.__code__.co_varnames[: function.__code__.co_argcount]


def _examples(function: Callable[..., None], arguments: tuple) -> list:
    """Return arguments like ``arguments``, the same ones at every call."""
    generator = torch.Generator().manual_seed(0)
    return [_example(name, argument, generator) for name, argument in zip(_names(function), arguments)]


def _example(name: str, argument: torch.Tensor | tuple | None, generator: torch.Generator, rows: int = 5):
    if argument is None:
        return None
    if isinstance(argument, tuple):
        return type(argument)(*(_example(name, entry, generator) for entry in argument))
    if name == "telemetry":
        return torch.zeros_like(argument)
    if name.endswith("_scale"):
        value = 2.0 ** torch.randint(-20, 1, (rows,), generator=generator)
    elif argument.dim() == 0:
        value = torch.rand((), generator=generator) + 0.01
        if not argument.is_floating_point():
            value = torch.randint(2**40, (), generator=generator)  # of an int32 tensor the lower half, whatever its sign
    elif argument.is_floating_point():
        value = torch.randn(rows, GROUP, generator=generator) * 0.1
        special = torch.tensor(
            [0.0, -0.0, 1e-40, -3e-39, 1e-7, 1.00390625, -1.01171875, 3e38, torch.inf, -torch.inf, torch.nan]
        )
        places = torch.randperm(GROUP, generator=generator)[
            : 4 * len(special)
        ]  # in one row: a group of 8-bit values that is NaN
        value[rows // 2, places] = special.repeat(4)
    else:
        low, high = (0, 256) if argument.dtype == torch.uint8 else (-128, 128)
        value = torch.randint(low, high, (rows, GROUP), generator=generator)
    return value.to(argument.device, argument.dtype)


def _same(a: torch.Tensor | tuple | None, b: torch.Tensor | tuple | None) -> bool:
    """Tell whether two results have the same bits; of fp64 sums, whose order is free, nearly."""
    if not isinstance(a, torch.Tensor):
        return True
    if a.dtype == torch.float64:
        return torch.allclose(a, b, rtol=1e-9, atol=0.0, equal_nan=True)
    if not a.is_floating_point():
        return torch.equal(a, b)
    return bool((((a == b) & (a.signbit() == b.signbit())) | (a.isnan() & b.isnan())).all())


_REMEDY = "see docs/running.md, or pass backend='reference'"


def _refuse(reason: str, remedy: str) -> None:
    _refusals.append(reason)
    cost = "in 2 to 4 times the time of compiled ones"
    text = f"backend 'compile': {reason}; steps run in plain PyTorch, with the same results, {cost}: {remedy}"
    warnings.warn(text, RuntimeWarning, stacklevel=2)


def _first_line(error: BaseException) -> str:
    """Return what went wrong, from the long text of a compiler or of torch, in one line."""
    lines = [line.strip() for line in str(getattr(error, "inner_exception", error)).splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"\berror:|Errno|Error:", line)]
    text = (telling or lines or [""])[0]
    return f"{type(getattr(error, 'inner_exception', error)).__name__}: {text}"[:300]

"""References of the optimizer's ops under torch.compile: C++ on a CPU, inductor's Triton elsewhere.

How the file works. A reference updates a tensor block by block, with a function of tensors such as ``step_block`` or
``ema_block``. A `Compiled` object takes the place of that function. It compiles the function once for every *variant*, and
keeps the variants of the process in `_variants`. A variant is the dtypes of the tensors, which of them are None, the options,
and the global settings for which torch compiles anew (`_surroundings`). Blocks may have any number of rows, and everything that
differs from call to call is passed as a tensor: so one variant serves all calls.

`_proven` runs a new variant on example tensors before it is used, and compares the results with those of the function itself
bit for bit: compilers may fuse multiply and add, flush subnormal numbers or leave out roundings. Until then nothing of the
user's has been touched. If anything fails, the process stays with the reference and warns once (`_refuse`).

Safe to change: `BLOCK`, `PAYS`, `FP32_OPTIONS`, and `OPTIONS` beside the three that keep the reference's bits. A new argument
of a block function must get an example in `_example_tensor`. A global setting for which torch compiles anew must be in
`_surroundings`; otherwise torch would compile code that was never compared.
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
from typing import Any

import torch

from soul_kernels.reference.rounding import GROUP
from soul_kernels.tensors import has_data

BLOCK = 1 << 20  # elements: a call costs 40 us, and the temporaries of 8-bit states take 8 bytes an element
SHORTEST = 2 * GROUP  # one row would be a variant of its own: torch.compile makes constants of the sizes 0 and 1
# "auto" compiles on a CPU if an optimizer has at least so many elements. The first variant takes 15 to 24 s of processor time,
# 3 to 5 s if torch has it on the disk. On one thread a step then saves 5 ns (fp32) to 20 ns (8-bit states) an element, which is
# 0.08 to 0.35 s for so many: the first compilation is repaid in 45 to 300 steps, a later one in 10 to 60.
PAYS = 1 << 24
OPTIONS: dict[str, str | int | bool | Callable[..., Any]] = {
    "cpp.enable_floating_point_contract_flag": "off",  # this and the next two keep the bits of the reference
    "cpp.enable_unsafe_math_opt_flag": False,
    "emulate_precision_casts": True,
    "cpp_cache_precompile_headers": False,  # making them takes longer than compiling the few variants
    "compile_threads": 1,  # a variant is one kernel: a pool of processes would only cost its start
}
# One option more where all tensors are stored in fp32. Decay and step then stay in registers for the parameter and for the
# telemetry; otherwise the telemetry's loop reads the parameter that the next loop overwrites, so that there are two loops over
# memory: 2.0 and not 1.5 ns an element. With 16-bit or 8-bit tensors the option costs 0 to 15% of the time.
FP32_OPTIONS = {"realize_reads_threshold": 3}
# Elements of the example tensors for each thread. Inductor takes the example for typical, and does not divide a loop among
# threads if that leaves fewer than 512 elements to one.
EXAMPLE = 512
# Values that the example tensors contain: zeros, subnormal numbers, halves between two bf16 numbers, inf and NaN.
SPECIAL = (0.0, -0.0, 1e-40, -3e-39, 1e-7, 1.00390625, -1.01171875, 3e38, math.inf, -math.inf, math.nan)

Argument = torch.Tensor | tuple[torch.Tensor, ...] | None  # a positional argument of a block function

_variants: dict[tuple, Callable] = {}
_refusals: list[str] = []  # the reasons why this process no longer compiles; empty while compiling works
_lock = threading.Lock()


def can_compile(backend: str, tensor: torch.Tensor, numel: int) -> bool:
    """Tell whether to compile an op. Warn, once per process, if there is no compiler for it.

    Args:
        backend: "compile", or "auto", which compiles on a CPU from `PAYS` elements on.
        tensor: one of the op's tensors, for its device.
        numel: number of elements of all of the op's tensors.
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
    """Return the name of the C++ compiler that torch uses."""
    return os.environ.get("CXX") or {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")


class Compiled:
    """Block function of a reference, compiled for the kinds of arguments that it is called with.

    Args:
        function: block function with tensors, None, or tuples of tensors as positional arguments, and options as keywords.

    Attributes:
        function: the block function.
        size: number of elements of the blocks to call it with.
    """

    size = BLOCK

    def __init__(self, function: Callable[..., None]) -> None:
        self.function = function

    def __call__(self, *arguments: Argument, **options: bool | str) -> None:
        """Update a block in place, as ``function`` does."""
        lead = arguments[0]
        assert isinstance(lead, torch.Tensor)
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
            # A setting that is not in `_surroundings` has changed. torch compiles anew before it computes, so nothing is lost.
            _refuse(_first_line(error), _REMEDY)
            self.function(*arguments, **options)


def _surroundings(device_type: str) -> tuple:
    """Return the global settings for which torch compiles anew. They are part of a variant, so no variant is used unproven."""
    return (
        torch.get_num_threads(),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type),
    )


def _proven(
    function: Callable[..., None], arguments: tuple[Argument, ...], options: dict[str, bool | str]
) -> Callable[..., None]:
    """Return a compiled variant that gives the bits of ``function``, or ``function`` itself if there is none."""
    try:
        import torch._dynamo
        import torch._inductor

        if torch._dynamo.config.disable:
            _refuse("torch.compile is switched off", "unset TORCH_COMPILE_DISABLE and TORCHDYNAMO_DISABLE")
            return function
        known = torch._inductor.list_options()
        # A copy with a code object of its own: torch keeps at most 8 compiled versions of a code object.
        twin = types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
        twin.__kwdefaults__ = function.__kwdefaults__
        options_of_torch = OPTIONS | (FP32_OPTIONS if _in_fp32(arguments) else {})
        chosen = {name: value for name, value in options_of_torch.items() if name in known}
        variant = torch.compile(twin, dynamic=True, fullgraph=True, options=chosen)
        got = _examples(function, arguments)
        want = _examples(function, arguments)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "bf16 and fp16 are mixed", UserWarning)  # our tensors may mix them
            variant(*got, **options)
        function(*want, **options)
    except Exception as error:  # a compiler may raise anything
        _refuse(_first_line(error), _REMEDY)
        return function
    if not all(map(_same, got, want)):
        wrong = [name for name, a, b in zip(_names(function), got, want) if not _same(a, b)]
        _refuse(f"compiled, {function.__name__} gives other bits in {', '.join(wrong)}", "try another compiler (CXX)")
        return function
    return variant


def _in_fp32(arguments: tuple[Argument, ...]) -> bool:
    """Tell whether no tensor has elements of fewer than four bytes."""
    return all(argument.itemsize >= 4 for argument in arguments if isinstance(argument, torch.Tensor))


def _names(function: Callable[..., None]) -> tuple[str, ...]:
    """Return the names of a function's positional arguments."""
    return function.__code__.co_varnames[: function.__code__.co_argcount]


def _examples(function: Callable[..., None], arguments: tuple[Argument, ...]) -> list[Argument]:
    """Return example arguments of the same kinds as ``arguments``, with the same values at every call."""
    generator = torch.Generator().manual_seed(0)
    return [_example(name, argument, generator) for name, argument in zip(_names(function), arguments)]


def _example(name: str, argument: Argument, generator: torch.Generator) -> Argument:
    """Return an example of an argument of a block function."""
    if argument is None:
        return None
    if isinstance(argument, tuple):
        return type(argument)(*(_example_tensor(name, entry, generator) for entry in argument))
    return _example_tensor(name, argument, generator)


def _example_tensor(name: str, argument: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return a tensor like ``argument``, with rows for all threads if that has rows."""
    n_rows = 1 + torch.get_num_threads() * -(-EXAMPLE // GROUP)
    if name == "telemetry":
        return torch.zeros_like(argument)
    if name.endswith("_scale"):
        value = torch.randint(0x6B00, 0x7F00, (n_rows,), generator=generator)  # 2^-20 to 1
    elif argument.dim() == 0:
        value = torch.rand((), generator=generator) + 0.01
        if not argument.is_floating_point():
            value = torch.randint(2**40, (), generator=generator)  # an int32 tensor gets the lower half, whatever its sign
    elif argument.is_floating_point():
        value = torch.randn(n_rows, GROUP, generator=generator) * 0.1
        columns = torch.randperm(GROUP, generator=generator)[: 2 * len(SPECIAL)]
        # All in one row: a group of 8-bit values with a NaN among them is NaN as a whole.
        value[n_rows // 2, columns] = torch.tensor(SPECIAL).repeat(2)
    else:
        low, high = (0, 256) if argument.dtype == torch.uint8 else (-128, 128)
        value = torch.randint(low, high, (n_rows, GROUP), generator=generator)
    return value.to(argument.device, argument.dtype)


def _same(a: Argument, b: Argument) -> bool:
    """Tell whether two results have the same bits; sums in fp64, whose order is free, may differ by roundings."""
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return True  # None, or numbers, which are only read
    if a.dtype == torch.float64:
        return torch.allclose(a, b, rtol=1e-9, atol=0.0, equal_nan=True)
    if not a.is_floating_point():
        return torch.equal(a, b)
    return bool((((a == b) & (a.signbit() == b.signbit())) | (a.isnan() & b.isnan())).all())


_REMEDY = "see docs/running.md, or pass backend='reference'"


def _refuse(reason: str, remedy: str) -> None:
    """Stop compiling in this process, and warn."""
    _refusals.append(reason)
    cost = "in 2 to 4 times the time of compiled ones"
    text = f"backend 'compile': {reason}; steps run in plain PyTorch, with the same results, {cost}: {remedy}"
    warnings.warn(text, RuntimeWarning, stacklevel=2)


def _first_line(error: BaseException) -> str:
    """Return the line that names the error from the long message of a compiler or of torch."""
    lines = [line.strip() for line in str(getattr(error, "inner_exception", error)).splitlines() if line.strip()]
    error_lines = [line for line in lines if re.search(r"\berror:|Errno|Error:", line)]
    text = (error_lines or lines or [""])[0]
    return f"{type(getattr(error, 'inner_exception', error)).__name__}: {text}"[:300]

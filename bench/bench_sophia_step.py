"""One optimizer step: ours in every rounding and state dtype, against the published code, torch.compile, and fused AdamWs."""

import dataclasses
import functools
import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from bench._harness import Case, Errors, check_room, compiled
from bench._optimizers import (
    apex_adamw,
    bitsandbytes_adamw,
    compiled_published,
    compiled_reference,
    dion_adamw,
    exact_adamw,
    flash_adamw,
    foreach_step,
    optimi_adamw,
    published,
    published_step,
    sophia_h,
    torch_adamw,
    torchao_adamw,
    transformer_engine_adamw,
)
from soul import SOUL, SophiaG

Shape = tuple[int, ...]
Optimizer = type[SophiaG]
Options = dict[str, Any]  # of an optimizer
Step = Callable[[], object]
Peers = dict[str, tuple[Callable[[], Callable[[], object]], float]]  # name -> function that makes it, bytes a parameter
STATE_DTYPES: dict[Any, str] = {None: "default", torch.float32: "fp32", torch.bfloat16: "bf16", "8bit": "8-bit"}
ROUNDINGS = ("nearest", "stochastic", "compensated")
HUGE = 2**31 + 2**20  # elements: offsets beyond 32 bits
HUGE_BYTES = 28 * HUGE  # parameters, gradients and the states of all variants of that case; 2 bytes of each 28 to spare


def llama_1b() -> list[Shape]:
    """Return the shapes of Llama-3.2-1B, 1,235.8 M parameters in 146 tensors."""
    layer: list[Shape] = [
        (2048, 2048),
        (512, 2048),
        (512, 2048),
        (2048, 2048),
        (8192, 2048),
        (8192, 2048),
        (2048, 8192),
        (2048,),
        (2048,),
    ]
    return [(128256, 2048), *layer * 16, (2048,)]


def gpt2() -> list[Shape]:
    """Return the shapes of GPT-2, 124.4 M parameters in 148 tensors."""
    layer: list[Shape] = [
        (768,),
        (768,),
        (768, 2304),
        (2304,),
        (768, 768),
        (768,),
        (768,),
        (768,),
        (768, 3072),
        (3072,),
        (3072, 768),
        (768,),
    ]
    return [(50257, 768), (1024, 768), *layer * 12, (768,), (768,)]


def lora() -> list[Shape]:
    """Return the shapes of LoRA of rank 8 on q and v of a 7B model: 128 tensors, 4.2 M parameters."""
    return [(8, 4096), (4096, 8)] * 64


def models() -> list[tuple[str, list[Shape], torch.dtype]]:
    """Return the models of the tables: name, shapes, dtype."""
    return [
        ("Llama-3.2-1B", llama_1b(), torch.bfloat16),
        ("GPT-2 124M", gpt2(), torch.float32),
        ("GPT-2 124M", gpt2(), torch.bfloat16),
        ("LoRA 128 x 32,768", lora(), torch.bfloat16),
    ]


def blocks(millions: int) -> list[Shape]:
    """Return the shapes of tensors of a million parameters each."""
    return [(1000, 1000)] * millions


def tiny(quick: bool) -> list[Shape]:
    """Return the shapes of small tensors for a machine without a GPU."""
    return [(30, 32), (17,)] if quick else [(1000, 256), (256, 256), (256,)]


def make_params(shapes: Sequence[Shape], device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    """Make parameters with gradients, both as large in value as those of real models."""
    params = [torch.randn(s, device=device, dtype=dtype).mul_(0.02).requires_grad_() for s in shapes]
    for p in params:
        p.grad = torch.randn_like(p).mul_(1e-3)
    return params


def ours(optimizer: Optimizer, params: list[torch.Tensor], **options: Any) -> Callable[[], Any]:
    """Return the step of one of our optimizers."""
    opt = optimizer(params, lr=1e-4, **options)
    if optimizer is SophiaG:
        opt.update_hessian()  # a Hessian of zeros would draw less power than a real one
    return opt.step


def bytes_per_param(
    dtype: torch.dtype,
    hessian_in_step: bool,
    *,
    param_rounding: str = "compensated",
    state_dtype: torch.dtype | str | None = None,
) -> float:
    """Return the bytes per parameter that one pass must move.

    p and m are read and written, g and h are read, and h is written where the step updates the Hessian. Low bits of compensated
    parameters are read and written; so is a scale of 2 bytes for 32 values with every 8-bit state.
    """
    widths: dict[Any, tuple[float, float]] = {
        None: (2 if dtype == torch.bfloat16 else 4, 4),
        torch.float32: (4, 4),
        torch.bfloat16: (2, 2),
        "8bit": (1 + 2 / 32, 1 + 2 / 32),
    }
    m, h = widths[state_dtype]
    low = 2 if param_rounding == "compensated" and dtype != torch.float32 else 0
    return 3 * dtype.itemsize + 2 * m + (2 if hessian_in_step else 1) * h + low


def label_of(dtype: torch.dtype, *, param_rounding: str = "compensated", state_dtype: torch.dtype | str | None = None) -> str:
    """Return the name of the variant of ours with these options."""
    rounding = param_rounding if dtype != torch.float32 else "exact"
    return f"ours, {rounding}, {STATE_DTYPES[state_dtype]} states"


def torch_peers(soul: bool, params: list[torch.Tensor], dtype: torch.dtype, quick: bool) -> Peers:
    """Return peers of torch alone: name -> (function that makes the step, bytes per parameter that one pass must move)."""
    size = dtype.itemsize
    same = (7 if soul else 6) * size  # both states in the dtype of the parameter
    label = "SOUL" if soul else "SophiaG"
    return {
        f"published {label}, eager": (lambda: published(published_step, soul, params), same),
        f"foreach {label}, eager": (lambda: published(foreach_step, soul, params), same),
        "torch AdamW, fused": (lambda: torch.optim.AdamW(params, lr=1e-4, fused=True).step, 7 * size),
        "torch AdamW, foreach": (lambda: torch.optim.AdamW(params, lr=1e-4, foreach=True).step, 7 * size),
    }


def compiled_peers(soul: bool, params: list[torch.Tensor], dtype: torch.dtype, quick: bool) -> Peers:
    """Return peers under torch.compile, like `torch_peers`; in their own cases, because 150 tensors compile for a minute."""
    return {
        f"foreach {'SOUL' if soul else 'SophiaG'}, torch.compile": (
            lambda: published(compiled(foreach_step), soul, params),
            (7 if soul else 6) * dtype.itemsize,
        ),
        "our reference, torch.compile": (
            lambda: compiled_reference(soul, params),
            bytes_per_param(dtype, soul, param_rounding="nearest"),
        ),
    }


def cpu_peers(soul: bool, params: list[torch.Tensor], dtype: torch.dtype, quick: bool) -> Peers:
    """Return `torch_peers` and the published step under torch.compile."""
    size = (7 if soul else 6) * dtype.itemsize
    name = f"published {'SOUL' if soul else 'SophiaG'}, torch.compile"
    return torch_peers(soul, params, dtype, quick) | {name: (lambda: compiled_published(soul, params), size)}


# Every one takes parameters and makes a step of AdamW on all of them at once, with `bench._optimizers.ADAMW`.
MULTI_TENSOR: dict[str, Callable[[list[torch.Tensor]], Step]] = {
    "torch AdamW, fused": functools.partial(torch_adamw, fused=True),
    "Transformer Engine AdamW, fp32 states": transformer_engine_adamw,
    "Transformer Engine AdamW, bf16 states": functools.partial(
        transformer_engine_adamw, exp_avg_dtype=torch.bfloat16, exp_avg_sq_dtype=torch.bfloat16
    ),
    "Transformer Engine AdamW, fp32 states, 32-bit weights": functools.partial(
        transformer_engine_adamw, master_weights=True, store_param_remainders=True
    ),
    "apex AdamW, fp32 states": apex_adamw,
    "Dion AdamW": dion_adamw,
}


def multi_tensor_peers(soul: bool, params: list[torch.Tensor], dtype: torch.dtype, quick: bool) -> Peers:
    """Return `MULTI_TENSOR`, like `torch_peers`: libraries that, as ours does, take a step of all tensors in few launches.

    AdamW reads and writes as many tensors as SOUL. Parameters are read and written and gradients are read; so are two states.
    """
    half = dtype != torch.float32
    peers: Peers = {}
    for name, make in MULTI_TENSOR.items():
        if half or not name.endswith(("bf16 states", "32-bit weights")):
            states = 4 if "fp32 states" in name else 2 if "bf16 states" in name else dtype.itemsize
            low = 4 if "32-bit weights" in name else 0
            peers[name] = functools.partial(make, params), 3 * dtype.itemsize + 4 * states + low
    return peers


def errors_of_adamw(names: Sequence[str], device: torch.device, dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """Return the relative error of what two steps change, against AdamW in fp64, of those of `MULTI_TENSOR` that run.

    Most of it comes from the last rounding of the parameters where they are bf16.
    """
    errors = {}
    for name in names:
        torch.manual_seed(0)
        params = make_params([(300, 257), (17,)], device, dtype)
        before = [p.detach().double() for p in params]
        want = exact_adamw(params, steps=2)
        try:
            step = MULTI_TENSOR[name](params)
            step()
            step()
        except Exception:  # it says why when it is to be timed
            continue
        wrong = sum((p.detach().double() - value).square().sum().item() for p, value in zip(params, want))
        right = sum((value - p).square().sum().item() for value, p in zip(want, before))
        errors[name] = {"what it changes": (wrong / right) ** 0.5}
    return errors


def other_peers(soul: bool, params: list[torch.Tensor], dtype: torch.dtype, quick: bool) -> Peers:
    """Return peers of other libraries, like `torch_peers`; in their own cases, because all states together exceed 80 GB."""
    size = dtype.itemsize
    half = dtype != torch.float32
    peers: Peers = {"optimi AdamW": (lambda: optimi_adamw(params, kahan_sum=False), 7 * size)}
    if half:
        peers["optimi AdamW, Kahan"] = (lambda: optimi_adamw(params, kahan_sum=True), 9 * size)
    # Both states in 8 bits with a 16-bit scale for 32, read and written; one byte of low bits below fp32, read and written.
    peers["FlashOptim AdamW, 8-bit"] = (lambda: flash_adamw(params), 3 * size + 4 * (1 + 2 / 32) + 2 * half)
    eight = 3 * size + 4 * (1 + 4 / 256)
    if not quick:  # compiles
        peers["torchao AdamW, 8-bit"] = (lambda: torchao_adamw(params), eight)
    peers["bitsandbytes AdamW, 8-bit"] = (lambda: bitsandbytes_adamw(params), eight)
    # It takes the estimate of h as an argument, and as a peer of SOUL reads it in every step.
    peers["pytorch_optimizer SophiaH"] = (lambda: sophia_h(soul, params), (8 if soul else 6) * size)
    return peers


def check(
    optimizer: Callable[..., SophiaG], variants: Sequence[Options], device: torch.device, dtype: torch.dtype, quick: bool
) -> Errors:
    """Compare two steps of every variant of ours with the reference: parameters and states must be equal bit for bit.

    On a CPU "auto" takes the compiled step for large models only, so "compile" is named, unless ``quick``.
    """
    worst = 0.0
    for options in variants:
        results = []
        for backend in ("compile" if device.type == "cpu" and not quick else "auto", "reference"):
            torch.manual_seed(0)
            params = make_params(tiny(True) if quick else [(300, 257), (17,), ()], device, dtype)
            opt = optimizer(params, lr=1e-2, bs=51200, backend=backend, **options)  # about half of them clipped
            if optimizer is SophiaG:
                opt.update_hessian()
            opt.step()
            opt.step()
            results.append((params, [opt.state[p] for p in params]))
        (got, got_states), (want, want_states) = results
        error = max(((a - b).float().norm() / b.float().norm()).item() for a, b in zip(got, want))
        worst = max(worst, error)
        same = all(torch.equal(a[name], b[name]) for a, b in zip(got_states, want_states) for name in b)
        assert error == 0.0 and same, f"{options}: not the reference's bits; parameters differ by {error}"
    return {"difference from the reference": worst}


def check_far_end(params: list[torch.Tensor]) -> Errors:
    """Take one step: the last elements, beyond 2^31, must be those of the reference, bit for bit."""
    (param,) = params
    end = param.detach()[-4096:].clone().requires_grad_()
    assert param.grad is not None
    end.grad = param.grad[-4096:].clone()
    options: Options = dict(lr=1e-2, bs=51200, param_rounding="nearest")
    big, small = SOUL(params, **options), SOUL([end], backend="reference", **options)
    big.step()
    small.step()
    same = [torch.equal(big.state[param][name][-4096:], small.state[end][name]) for name in ("exp_avg", "hessian")]
    assert torch.equal(param.detach()[-4096:], end.detach()) and all(same), "elements beyond 2^31 are wrong"
    return {"difference from the reference beyond 2^31": 0.0}


def make_case(
    name: str,
    optimizer: Optimizer,
    variants: Sequence[Options],
    shapes: Sequence[Shape],
    device: torch.device,
    dtype: torch.dtype,
    quick: bool,
    *,
    peers: Callable[[bool, list[torch.Tensor], torch.dtype, bool], Peers] | None = None,
) -> Case:
    """Make the case of ours with each of the options in ``variants``, and peers; all share parameters and gradients."""
    soul = optimizer is SOUL
    params = make_params(shapes, device, dtype)
    made: Peers = {}
    for options in variants:
        per_param = bytes_per_param(dtype, soul, **options)
        made[label_of(dtype, **options)] = functools.partial(ours, optimizer, params, **options), per_param
    if peers:
        made |= peers(soul, params, dtype, quick)
    numel = sum(p.numel() for p in params)
    labels = {label: f"{label}, {per_param:.4g} B/param" for label, (_, per_param) in made.items()}

    def check_all() -> Errors:
        errors = check(optimizer, variants, device, dtype, quick)
        compared = (
            [label for label in MULTI_TENSOR if labels.get(label) in case.variants] if peers is multi_tensor_peers else []
        )
        if not compared:
            return errors
        mine = dict.fromkeys((label_of(dtype, **options) for options in variants), errors)
        return {labels[label]: of_one for label, of_one in (mine | errors_of_adamw(compared, device, dtype)).items()}

    case = Case(
        f"{optimizer.__name__}.step, {name}, {str(dtype)[6:]}",
        {labels[label]: make for label, (make, _) in made.items()},
        check_all,
        bytes={labels[label]: per_param * numel for label, (_, per_param) in made.items()},
    )
    return case


def make_huge_case(device: torch.device, quick: bool) -> Case:
    """Make the case of one tensor with more than 2^31 elements, where offsets do not fit into 32 bits."""
    variants = [dict(param_rounding="nearest"), dict(), dict(state_dtype="8bit")]
    case = make_case(f"one tensor of {HUGE:,}", SOUL, variants, [(HUGE,)], device, torch.bfloat16, quick)
    first = next(iter(case.variants.values()))
    assert isinstance(first, functools.partial) and isinstance(case.bytes, dict)
    params = first.args[1]  # shared by all variants
    return dataclasses.replace(
        case,
        variants={**case.variants, "torch AdamW, fused": lambda: torch.optim.AdamW(params, lr=1e-4, fused=True).step},
        bytes=case.bytes | {"torch AdamW, fused": 14 * HUGE},
        check=functools.partial(check_far_end, params),
    )


def fits(nbytes: int, device: torch.device) -> bool:
    """Tell whether a GPU has ``nbytes`` of memory left, and print a line if it does not."""
    gc.collect()
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info(device)[0]
    if free < nbytes:
        print(f"\none tensor of {HUGE:,} left out: it needs {nbytes / 2**30:.0f} GiB, {free / 2**30:.0f} are free")
    return free >= nbytes


def make_sizes_case(device: torch.device) -> Case:
    """Make the case of a step in its defaults on two models, one four times as large: a parameter should cost the same."""
    sizes = (124, 496)
    check_room(sum(sizes) * 1e6 * (2 + 2 + 2 + 4 + 1))  # parameters, gradients, m, h, low bits
    variants, moved = {}, {}
    for millions in sizes:
        case = make_case("over sizes", SOUL, [{}], blocks(millions), device, torch.bfloat16, False)
        assert isinstance(case.bytes, dict)
        for variant, make in case.variants.items():
            name = f"{variant}, {millions} M parameters"
            variants[name] = make
            moved[name] = case.bytes[variant]
    return dataclasses.replace(case, variants=variants, bytes=moved, once=True)


def cpu_cases(device: torch.device) -> Iterator[Callable[[], Case]]:
    """Yield functions that make the cases of a CPU: GPT-2 in every format that ours can store a model in, beside its peers."""
    gpt = functools.partial(make_case, "GPT-2 124M", SOUL, device=device, shapes=gpt2(), quick=False, peers=cpu_peers)
    yield functools.partial(gpt, [dict(), dict(state_dtype="8bit")], dtype=torch.float32)
    half = [dict(param_rounding="nearest", state_dtype=torch.bfloat16), dict(), dict(state_dtype="8bit")]
    yield functools.partial(gpt, half, dtype=torch.bfloat16)
    yield functools.partial(make_sizes_case, device)


def cases(device: torch.device, quick: bool) -> Iterator[Callable[[], Case]]:
    """Yield functions that make the cases."""
    if device.type == "cpu" and not quick:
        yield from cpu_cases(device)
        return
    if device.type == "cpu":
        sizes = [("tiny", tiny(quick), torch.float32), ("tiny", tiny(quick), torch.bfloat16)]
    else:
        sizes = models()
    last = []  # a run that is short of time is interrupted before them
    for name, shapes, dtype in sizes:
        for optimizer in (SophiaG, SOUL):
            main: list[Options] = [dict(), dict(param_rounding="nearest", state_dtype=torch.bfloat16), dict(state_dtype="8bit")]
            if dtype == torch.float32:
                main = [dict(), dict(state_dtype=torch.bfloat16), dict(state_dtype="8bit")]
                groups: list[list[Options]] = []
            else:
                groups = [[dict(param_rounding=r, state_dtype=s) for r in ROUNDINGS] for s in STATE_DTYPES]
            rest = shapes, device, dtype, quick
            yield functools.partial(make_case, name, optimizer, main, *rest, peers=torch_peers)
            others = [main[0], main[-1]]
            yield functools.partial(make_case, f"{name}, other libraries", optimizer, others, *rest, peers=other_peers)
            if optimizer is SOUL:
                title = f"{name}, multi-tensor libraries"
                yield functools.partial(make_case, title, optimizer, main[:1], *rest, peers=multi_tensor_peers)
            for group in groups:
                title = f"{name}, {STATE_DTYPES[group[0]['state_dtype']]} states"
                yield functools.partial(make_case, title, optimizer, group, shapes, device, dtype, quick)
            title = f"{name}, torch.compile"
            last.append(functools.partial(make_case, title, optimizer, main[:2], *rest, peers=compiled_peers))
    if device.type == "cuda" and fits(HUGE_BYTES, device):
        yield functools.partial(make_huge_case, device, quick)
    yield from () if quick else last

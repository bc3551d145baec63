"""The Hessian EMA on its own, as ``SophiaG.update_hessian`` runs it every k steps."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from bench._harness import Case, Errors, compiled
from bench.bench_sophia_step import Shape, gpt2, llama_1b, tiny
from soul_kernels import HessianEma

STATES = {"fp32": (torch.float32, 4), "bf16": (torch.bfloat16, 2), "8-bit": (torch.uint8, 1 + 2 / 32)}


def models() -> list[tuple[str, list[Shape], torch.dtype]]:
    """Return the models of the table: name, shapes, dtype of the gradients."""
    return [("Llama-3.2-1B", llama_1b(), torch.bfloat16), ("GPT-2 124M", gpt2(), torch.float32)]


def eager(hessians: list[torch.Tensor], grads: list[torch.Tensor]) -> None:
    """Update the Hessians as the published code does."""
    for h, g in zip(hessians, grads):
        h.mul_(0.99).addcmul_(g, g, value=0.01)


def ours(grads: list[torch.Tensor], dtype: torch.dtype, **options: Any) -> tuple[Callable[[], None], list[torch.Tensor]]:
    """Return the call, and the Hessians (with scales) that it changes."""
    hessians = [torch.zeros_like(g, dtype=dtype) for g in grads]
    scales = None
    if dtype == torch.uint8:
        scales = [torch.zeros(-(-g.numel() // 32), dtype=torch.int16, device=g.device) for g in grads]
    ema = HessianEma()

    def call() -> None:
        ema.prepare(hessians, grads, beta2=0.99, hessian_scales=scales, **options)()

    return call, hessians + (scales or [])


def check(device: torch.device, dtype: torch.dtype) -> Errors:
    """Compare two updates with the reference: bit for bit."""
    worst = 0.0
    for name, (h_dtype, _) in STATES.items():
        results = []
        for backend in ("auto", "reference"):
            torch.manual_seed(0)
            grads = [torch.randn(s, device=device, dtype=dtype) for s in ((9, 300), (17,), ())]
            call, states = ours(grads, h_dtype, backend=backend)
            call()
            call()
            results.append(states)
        differing = max((a != b).float().mean().item() for a, b in zip(*results))
        worst = max(worst, differing)
        assert differing == 0, f"{name}: {differing:.1e} of the elements are not the reference's"
    return {"elements that are not the reference's": worst}


def make_case(name: str, shapes: list[Shape], device: torch.device, dtype: torch.dtype, quick: bool) -> Case:
    """Make the case of a model: ours with every state dtype, and the published code eager and, unless quick, compiled."""
    grads = [torch.randn(s, device=device, dtype=dtype) for s in shapes]
    variants: dict[str, Callable[[], Callable[[], object]]] = {}
    per_param: dict[str, float] = {}

    def make_ours(h_dtype: torch.dtype) -> Callable[[], None]:
        call, _ = ours(grads, h_dtype)
        return call

    for state, (h_dtype, width) in STATES.items():
        label = f"ours, {state} h, {2 * width + dtype.itemsize:.4g} B/param"
        variants[label] = functools.partial(make_ours, h_dtype)
        per_param[label] = 2 * width + dtype.itemsize
    label = f"published, eager, {3 * dtype.itemsize} B/param"
    variants[label] = lambda: functools.partial(eager, [torch.zeros_like(g) for g in grads], grads)
    per_param[label] = 3 * dtype.itemsize
    if not quick:
        label = f"published, torch.compile, {3 * dtype.itemsize} B/param"
        variants[label] = lambda: functools.partial(compiled(eager), [torch.zeros_like(g) for g in grads], grads)
        per_param[label] = 3 * dtype.itemsize
    numel = sum(g.numel() for g in grads)
    return Case(
        f"update_hessian, {name}, g {str(dtype)[6:]}",
        variants,
        functools.partial(check, device, dtype),
        bytes={label: width * numel for label, width in per_param.items()},
    )


def cases(device: torch.device, quick: bool) -> Iterator[Callable[[], Case]]:
    """Yield functions that make the cases."""
    if device.type == "cpu":
        sizes = [("tiny", tiny(quick), torch.float32)]
    else:
        sizes = models()
    for name, shapes, dtype in sizes:
        yield functools.partial(make_case, name, shapes, device, dtype, quick)

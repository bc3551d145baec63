"""The norm of all gradients: one read of them, against torch's norm and its clipping, which reads and writes them again."""

import functools
from collections.abc import Callable, Iterator

import torch
from torch.nn.utils import clip_grad_norm_, get_total_norm

from bench._harness import Case, Errors
from bench._optimizers import gradients
from bench.bench_sophia_step import Shape, make_params, models, tiny
from soul_kernels import TensorTable, grad_norm


def name_of(name: str, dtype: torch.dtype) -> str:
    """Return the name of the case of a model."""
    return f"{name}, {str(dtype)[6:]}, {dtype.itemsize} B/gradient, to clip 3 times that"


def make_case(name: str, shapes: list[Shape], device: torch.device, dtype: torch.dtype) -> Case:
    """Make the case of a model: our norm of its gradients, torch's norm, and torch's clipping."""
    params = make_params(shapes, device, dtype)
    grads = gradients(params)
    moved = dtype.itemsize * sum(g.numel() for g in grads)

    def check() -> Errors:
        want = torch.stack([g.double().square().sum() for g in grads]).sum().sqrt().item()
        error = abs(grad_norm(grads).item() - want) / want
        assert error < 1e-6, f"relative error {error}"
        return {"relative error": error}

    variants = {
        "ours": lambda: functools.partial(grad_norm, grads, table=TensorTable()),
        "torch get_total_norm": lambda: functools.partial(get_total_norm, grads),
        # Ours leaves the scaling to the step, which reads the gradients anyway.
        "torch clip_grad_norm_ (and scales)": lambda: functools.partial(clip_grad_norm_, params, 1e9),
    }
    rates = dict.fromkeys(variants, moved) | {"torch clip_grad_norm_ (and scales)": 3 * moved}
    return Case(name_of(name, dtype), variants, check, bytes=rates)


def cases(device: torch.device, quick: bool) -> Iterator[Callable[[], Case]]:
    """Yield functions that make the cases."""
    if device.type == "cpu":
        sizes = [("tiny", tiny(quick), torch.float32)]
    else:
        sizes = models()
    for name, shapes, dtype in sizes:
        yield functools.partial(make_case, name, shapes, device, dtype)

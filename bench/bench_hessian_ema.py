"""The Hessian EMA on its own, as ``SophiaG.update_hessian`` runs it every k steps."""

import functools

import torch

from bench._harness import Case
from bench.bench_sophia_step import llama_1b, tiny
from soul_kernels import hessian_ema


def eager(hessians, grads):
    for h, g in zip(hessians, grads):
        h.mul_(0.99).addcmul_(g, g, value=0.01)


def make_case(name, shapes, device, dtype, quick):
    grads = [torch.randn(s, device=device, dtype=dtype) for s in shapes]
    hessians = [torch.zeros(s, device=device) for s in shapes]

    def check():
        got, want = (
            [h[:1].clone() for h in hessians],
            [h[:1].double() * 0.99 + 0.01 * g[:1].double() ** 2 for h, g in zip(hessians, grads)],
        )
        hessian_ema(got, [g[:1] for g in grads], beta2=0.99)
        error = max(((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item() for a, b in zip(got, want))
        assert error < 1e-6, f"relative error {error}"
        return {"relative error": error}

    variants = {"ours": lambda: functools.partial(hessian_ema, hessians, grads, beta2=0.99),
                "published, eager": lambda: functools.partial(eager, hessians, grads)}  # fmt: skip
    if not quick:
        compiled = torch.compile(eager)
        variants["torch.compile"] = lambda: functools.partial(compiled, hessians, grads)
    per_param = 8 + dtype.itemsize
    numel = sum(g.numel() for g in grads)
    return Case(f"{name}, g {str(dtype)[6:]}, h float32, {per_param} B/param", variants, check, bytes=per_param * numel)


def cases(device, quick):
    """Functions that make the cases."""
    if device.type == "cpu":
        yield functools.partial(make_case, "three tensors", tiny(), device, torch.float32, quick)
    else:
        yield functools.partial(make_case, "Llama-3.2-1B", llama_1b(), device, torch.bfloat16, quick)

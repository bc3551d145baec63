"""Loss and gradients from hidden states: ours against eager PyTorch and torch.compile, all with fp32 logits."""

import functools

import torch
import torch.nn.functional as F

from bench._harness import Case
from soul.losses import NPO, GradDiff
from soul_kernels import TokenBatch, linear_objective


def eager_loss(hidden, weight, labels, objective, batch):
    """Logits of the kept tokens in fp32, log-softmax, objective: what a careful user writes."""
    logits = (hidden.flatten(0, 1) @ weight.T).float()
    logps = -F.cross_entropy(logits, labels.flatten(), reduction="none", ignore_index=-100).view(labels.shape)
    return objective(logps, batch)


def train(loss_of, hidden, weight):
    """One forward and backward; gradients are dropped."""
    loss_of(hidden, weight).backward()
    hidden.grad = weight.grad = None


def bare_gemms(hidden, weight, rows, count):
    """The matrix products alone, in chunks of ``rows``: the floor."""
    x = hidden.detach().flatten(0, 1)
    w = weight.detach()
    logits = torch.empty(rows, w.shape[0], device=x.device, dtype=x.dtype)
    dx, dw = torch.empty_like(x), torch.empty_like(w)
    for start in range(0, len(x), rows):
        part = x[start : start + rows]
        z = logits[: len(part)]
        torch.mm(part, w.T, out=z)
        torch.mm(z, w, out=dx[start : start + rows])
        if count == 3:
            torch.mm(z.T, part, out=dw)


def make_case(objective, n, d, n_vocab, frozen, device, quick):
    gpu = device.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    B, T = 8, n // 8
    hidden = torch.randn(B, T, d, device=device, dtype=dtype).requires_grad_()
    weight = (torch.randn(n_vocab, d, device=device, dtype=dtype) * 2 / d**0.5).requires_grad_(not frozen)
    labels = torch.randint(n_vocab, (B, T), device=device)
    is_forget = torch.arange(B, device=device) < B // 2
    ref = torch.full((B,), -5.0 * T, device=device) if objective.needs_reference else None
    batch = TokenBatch.from_labels(labels, is_forget, ref)
    rows = torch.arange(n)  # all tokens are kept: equal work for everybody

    def ours(hidden, weight):
        return linear_objective(hidden, weight, labels, objective, is_forget=is_forget, ref_logps=ref, rows=rows)

    def eager(hidden, weight):
        return eager_loss(hidden, weight, labels, objective, batch)

    def check():
        """Against fp32 eager on fp32 copies of the same inputs, on part of the tokens of each sequence."""
        few = min(T, 1024 // B)
        cut = labels.clone()
        cut[:, few:] = -100
        h32, w32 = (t.detach().float().requires_grad_() for t in (hidden[:, :few], weight))
        want = eager_loss(h32, w32, cut[:, :few], objective, TokenBatch.from_labels(cut[:, :few], is_forget, ref))
        want_grads = torch.autograd.grad(want, [h32] if frozen else [h32, w32])
        got = linear_objective(hidden, weight, cut, objective, is_forget=is_forget, ref_logps=ref)
        got_grads = torch.autograd.grad(got, [hidden] if frozen else [hidden, weight])
        errors = {"loss": abs(got.item() - want.item()) / abs(want.item())}
        for name, a, b in zip(("dX", "dW"), got_grads, want_grads):
            a = a[:, :few] if name == "dX" else a
            errors[name] = ((a.float() - b).norm() / b.norm()).item()
        assert errors["loss"] < 1e-4 and max(errors.get("dX", 0), errors.get("dW", 0)) < 4e-3, errors
        return errors

    variants = {
        "ours": lambda: functools.partial(train, ours, hidden, weight),
        "bare GEMMs, chunk 4096": lambda: functools.partial(bare_gemms, hidden, weight, min(n, 4096), 2 if frozen else 3),
        "eager, fp32 logits": lambda: functools.partial(train, eager, hidden, weight),
    }
    if not quick:
        compiled = torch.compile(eager)
        variants["torch.compile of eager"] = lambda: functools.partial(train, compiled, hidden, weight)
    head = "frozen head" if frozen else "trained head"
    title = f"{type(objective).__name__}, N {n}, D {d}, V {n_vocab}, {str(dtype)[6:]}, {head}"
    return Case(title, variants, check, flops=(2 if frozen else 3) * 2 * n * n_vocab * d)


def cases(device, quick):
    """Functions that make the cases."""
    if device.type == "cpu":
        shape = (64, 64, 2000) if quick else (256, 128, 4000)
        sizes = [(GradDiff(), *shape, False), (NPO(), *shape, True)]
    else:
        sizes = [
            (GradDiff(), 8192, 2048, 128256, False),
            (GradDiff(), 8192, 4096, 32000, False),
            (NPO(), 8192, 2048, 128256, False),
            (GradDiff(), 8192, 2048, 128256, True),
            (GradDiff(), 512, 2048, 128256, False),
        ]
    for size in sizes:
        yield functools.partial(make_case, *size, device, quick)

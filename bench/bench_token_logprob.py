"""The row kernels alone: statistics (one read of the logits) and gradient (one read, one write)."""

import functools

import torch

from bench._harness import Case
from soul_kernels.reference.token_logprob import token_logprob
from soul_kernels.token_logprob import token_gradient, token_statistics


def make_case(kind, n, n_vocab, device, quick):
    logits = torch.randn(n, n_vocab, device=device) * 3
    labels = torch.randint(n_vocab, (n,), device=device)
    statistics, ones = torch.empty(4, n, device=device), torch.ones(n, device=device)
    out = torch.empty(n, n_vocab, device=device, dtype=torch.bfloat16)

    def gradient():
        token_gradient(logits, labels, statistics, ones, out)

    def check():
        token_statistics(logits, labels, statistics)
        gradient()
        leaf = logits[:64].double().requires_grad_()
        logp = token_logprob(leaf, labels[:64])
        (want,) = torch.autograd.grad(logp.sum(), leaf)
        errors = {
            "log p": (statistics[0, :64] - logp).abs().max().item(),
            "gradient": ((out[:64].double() - want).norm() / want.norm()).item(),
        }
        assert errors["log p"] < 2e-5 and errors["gradient"] < 4e-3, errors
        return errors

    if kind == "statistics":
        variants = {"ours": lambda: functools.partial(token_statistics, logits, labels, statistics),
                    "eager logsumexp": lambda: functools.partial(torch.logsumexp, logits, 1)}  # fmt: skip
        moved = logits.nbytes
    else:
        variants = {"ours": lambda: gradient, "eager softmax": lambda: functools.partial(torch.softmax, logits, 1)}
        moved = logits.nbytes + out.nbytes
    return Case(f"{kind}, {n} x {n_vocab}, fp32 logits", variants, check, bytes=moved)


def cases(device, quick):
    """Functions that make the cases; none without a GPU, where there is no row kernel to time."""
    if device.type == "cpu":
        print("row kernels: need a GPU")
        return
    for kind in ("statistics", "gradient"):
        for n_vocab in (128256, 32003):
            yield functools.partial(make_case, kind, 2048, n_vocab, device, quick)

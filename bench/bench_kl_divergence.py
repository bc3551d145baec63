"""The row kernels of the divergence alone: divergences (one read of both logits) and gradient (the same, and one write).

Both kernels take the statistics of the rows, and the gradient takes the divergences too, while eager PyTorch starts from logits
alone. So there is also a variant of ours from logits alone, with all passes that come before.
"""

import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from bench._harness import Case, Errors, compiled
from bench.bench_token_logprob import scratch
from soul_kernels.kl_divergence import divergence_gradient, divergence_statistics
from soul_kernels.reference.kl_divergence import DIVERGENCE, kl_divergence, reference_distribution
from soul_kernels.reference.token_logprob import N_BASIC
from soul_kernels.token_logprob import token_statistics

CHECKED = 64  # rows


def eager_divergence(logits: torch.Tensor, ref_logits: torch.Tensor) -> torch.Tensor:
    """Return the divergence of two log-softmaxes."""
    return F.kl_div(logits.log_softmax(1), ref_logits.log_softmax(1), reduction="none", log_target=True).sum(1)


def eager_gradient(logits: torch.Tensor, ref_logits: torch.Tensor) -> torch.Tensor:
    """Return ``p - q``, the derivative of ``KL(q || p)`` by the logits of p, to be multiplied by coefficients of the rows."""
    return (logits.softmax(1) - ref_logits.softmax(1)).bfloat16()


def make_case(kind: str, n: int, n_vocab: int, device: torch.device, quick: bool) -> Case:
    """Make the case of one kernel on ``n`` rows; ``kind`` is "divergences" or "gradient"."""
    logits = scratch(n, n_vocab, device).normal_(std=3)
    ref_logits = scratch(n, n_vocab, device).copy_(logits + 0.3 * torch.randn_like(logits))
    labels = torch.randint(n_vocab, (n,), device=device)
    statistics, ref_statistics = (torch.empty(N_BASIC, n, device=device) for _ in range(2))
    known = (logits, ref_logits, labels, statistics, ref_statistics)
    divergences = torch.empty(2, n, device=device)
    coefficients, weights = torch.zeros(n, device=device), torch.ones(n, device=device)
    out = scratch(n, n_vocab, device, torch.bfloat16)

    def prepare() -> None:
        token_statistics(logits, labels, statistics)
        token_statistics(ref_logits, labels, ref_statistics)

    def measure() -> None:
        divergence_statistics(*known, divergences)

    def gradient() -> None:
        divergence_gradient(*known, divergences, coefficients, weights, out)

    def measure_anew() -> None:
        prepare()
        measure()

    def gradient_anew() -> None:
        measure_anew()
        gradient()

    def check() -> Errors:
        gradient_anew()
        leaf = logits[:CHECKED].double().requires_grad_()
        values = kl_divergence(leaf, labels[:CHECKED], reference_distribution(ref_logits[:CHECKED].double(), labels[:CHECKED]))
        (want,) = torch.autograd.grad(values.sum(), leaf)
        errors = {
            "KL": ((divergences[DIVERGENCE, :CHECKED] - values).abs() / values).max().item(),
            "gradient": ((out[:CHECKED].double() - want).norm() / want.norm()).item(),
        }
        assert errors["KL"] < 1e-3 and errors["gradient"] < 4e-3, errors
        return errors

    of_kind = {
        "divergences": (measure, measure_anew, eager_divergence),
        "gradient": (gradient, gradient_anew, eager_gradient),
    }
    call, anew, plain = of_kind[kind]
    variants: dict[str, Callable[[], Callable[[], object]]] = {
        "ours": lambda: call,
        "ours, from logits alone": lambda: anew,
        "eager": lambda: functools.partial(plain, logits.contiguous(), ref_logits.contiguous()),
    }
    if not quick:
        variants["torch.compile of eager"] = lambda: functools.partial(
            compiled(plain), logits.contiguous(), ref_logits.contiguous()
        )
    moved = 2 * logits.nbytes + (out.nbytes if kind == "gradient" else 0)
    return Case(f"{kind}, {n} x {n_vocab}, fp32 logits", variants, check, bytes=moved)


def cases(device: torch.device, quick: bool) -> Iterator[Callable[[], Case]]:
    """Yield functions that make the cases; none without a GPU, where there is no row kernel to time."""
    if device.type == "cpu":
        print("row kernels: need a GPU")
        return
    for kind in ("divergences", "gradient"):
        for n_vocab in (128256, 32003):
            yield functools.partial(make_case, kind, 2048, n_vocab, device, quick)

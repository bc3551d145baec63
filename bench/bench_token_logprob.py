"""The row kernels alone: statistics (one read of the logits) and gradient (one read, one write).

The gradient takes the statistics as an argument, where a softmax starts from logits alone; so our two passes together are
timed as well. Our rows lie as in the scratch of the ops on hidden states, padded to a multiple of 16 bytes; the rows of the
others are contiguous.
"""

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench._harness import Case
from soul_kernels.chunks import row_width
from soul_kernels.reference.token_logprob import ENTROPY, LOGP, N_ALL, N_BASIC, ONE_MINUS_P, VARIANCE, token_logprob
from soul_kernels.reference.token_logprob import token_statistics as reference_statistics
from soul_kernels.token_logprob import token_gradient, token_statistics

CHECKED = 64  # rows


def scratch(n: int, n_vocab: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return an uninitialized [n, V] with the layout that a chunk of logits has in the ops on hidden states."""
    return torch.empty(n, row_width(n_vocab), device=device, dtype=dtype)[:, :n_vocab]


def gradient_error(logits: Tensor, labels: Tensor, out: Tensor) -> tuple[Tensor, float]:
    """Return the log-probabilities of the first rows in fp64, and the relative error of their gradient in ``out``."""
    leaf = logits[:CHECKED].double().requires_grad_()
    logp = token_logprob(leaf, labels[:CHECKED])
    (want,) = torch.autograd.grad(logp.sum(), leaf)
    return logp.detach(), ((out[:CHECKED].double() - want).norm() / want.norm()).item()


def memorised_error(logits: Tensor, labels: Tensor) -> float:
    """Return the largest relative error of 1 - p(label) on memorised labels, with 1 - p from 0.1 down to 1e-10."""
    logits = logits[:CHECKED].clone()
    labels = labels[:CHECKED]
    rows = torch.arange(len(labels), device=labels.device)
    rest = logits.double().index_put((rows, labels), torch.tensor(-torch.inf, device=labels.device).double()).logsumexp(1)
    one_minus_p = torch.logspace(-1, -10, len(labels), device=labels.device, dtype=torch.float64)
    logits[rows, labels] = (rest + torch.log1p(-one_minus_p) - one_minus_p.log()).float()
    statistics = torch.empty(N_BASIC, len(labels), device=labels.device)
    token_statistics(logits, labels, statistics)
    exact = torch.sigmoid(rest - logits[rows, labels].double())  # for the logits after rounding
    return ((statistics[ONE_MINUS_P] - exact) / exact).abs().max().item()


def make_case(kind: str, n: int, n_vocab: int, device: torch.device, quick: bool) -> Case:
    """Return the case of "statistics" or "gradient" on [n, V] logits."""
    logits = scratch(n, n_vocab, device).normal_(std=3)
    labels = torch.randint(n_vocab, (n,), device=device)
    basic = torch.empty(N_BASIC, n, device=device)
    everything = torch.empty(N_ALL, n, device=device)
    ones = torch.ones(n, device=device)
    out = scratch(n, n_vocab, device, torch.bfloat16)
    measure = functools.partial(token_statistics, logits, labels, basic)
    measure_all = functools.partial(token_statistics, logits, labels, everything)
    gradient = functools.partial(token_gradient, logits, labels, basic, ones, out)

    def both() -> None:
        measure()
        gradient()

    def check() -> dict[str, float]:
        for call in (measure, measure_all, gradient):
            call()
        errors = {}
        logp, errors["gradient"] = gradient_error(logits, labels, out)
        want = reference_statistics(logits[:CHECKED].double(), labels[:CHECKED])
        compared = {
            "log p": (basic[LOGP], logp),
            "entropy": (everything[ENTROPY], want.entropies),
            "variance": (everything[VARIANCE], want.variances),
        }
        for name, (got, values) in compared.items():
            errors[name] = ((got[:CHECKED] - values).abs() / values.abs().clamp(min=1)).max().item()
        errors["1 - p"] = memorised_error(logits, labels)
        gates = {"1 - p": 1e-3, "log p": 2e-5, "entropy": 1e-4, "variance": 1e-4}
        assert all(value < gates.get(name, 4e-3) for name, value in errors.items()), errors
        return errors

    if kind == "statistics":
        variants = {"ours": lambda: measure, "ours, all statistics": lambda: measure_all,
                    "eager logsumexp": lambda: functools.partial(torch.logsumexp, logits.contiguous(), 1)}  # fmt: skip
        moved = dict.fromkeys(variants, logits.nbytes)
    else:
        variants = {"ours": lambda: gradient, "ours, from logits alone": lambda: both,
                    "eager softmax": lambda: functools.partial(torch.softmax, logits.contiguous(), 1)}  # fmt: skip
        # A softmax in fp32 writes twice as much as ours.
        moved = dict.fromkeys(variants, logits.nbytes + out.nbytes) | {"eager softmax": 2 * logits.nbytes}
    return Case(f"{kind}, {n} x {n_vocab}, fp32 logits", variants, check, bytes=moved)


def cases(device: torch.device, quick: bool) -> Iterator[Callable[[], Case]]:
    """Yield the functions that make the cases; none without a GPU, where there is no row kernel to time."""
    if device.type == "cpu":
        print("row kernels: need a GPU")
        return
    for kind in ("statistics", "gradient"):
        for n_vocab in (128256, 32003):
            yield functools.partial(make_case, kind, 2048, n_vocab, device, quick)

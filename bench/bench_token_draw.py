"""Row kernels that draw a label, against those of given labels, which read and write as much."""

import functools
from collections.abc import Callable, Iterator

import torch

from bench._harness import Case
from bench.bench_token_logprob import CHECKED, gradient_error, scratch
from soul_kernels.reference.token_logprob import LOGP, N_BASIC
from soul_kernels.token_draw import draw_labels, likeliest_statistics
from soul_kernels.token_logprob import token_gradient, token_statistics


def make_case(kind: str, n: int, n_vocab: int, device: torch.device, quick: bool) -> Case:
    """Return the case of "statistics" or "gradient" on [n, V] logits."""
    logits = scratch(n, n_vocab, device).normal_(std=3)
    uniforms = torch.rand(n, device=device)
    labels = torch.randint(n_vocab, (n,), device=device)
    drawn = labels.clone()
    ones = torch.ones(n, device=device)
    basic = torch.empty(N_BASIC, n, device=device)
    likeliest = torch.empty_like(basic)
    out = scratch(n, n_vocab, device, torch.bfloat16)
    measure = functools.partial(token_statistics, logits, labels, basic)
    prepare = functools.partial(likeliest_statistics, logits, drawn, likeliest)
    gradient = functools.partial(token_gradient, logits, labels, basic, ones, out)
    draw = functools.partial(draw_labels, logits, drawn, uniforms, likeliest, ones, out)

    def check() -> dict[str, float]:
        for call in (measure, prepare, draw):
            call()
        logp, error = gradient_error(logits, drawn, out)
        errors = {"log p": (likeliest[LOGP, :CHECKED] - logp).abs().max().item(), "gradient": error}
        assert errors["log p"] < 2e-5 and errors["gradient"] < 4e-3, errors
        return errors

    if kind == "statistics":
        variants = {"ours, for drawing": lambda: prepare, "ours, of given labels": lambda: measure}
        moved = logits.nbytes
    else:
        variants = {"ours, drawing": lambda: draw, "ours, of given labels": lambda: gradient}
        moved = logits.nbytes + out.nbytes
    return Case(f"{kind}, {n} x {n_vocab}, fp32 logits", variants, check, bytes=moved)


def cases(device: torch.device, quick: bool) -> Iterator[Callable[[], Case]]:
    """Yield the functions that make the cases; none without a GPU, where there is no row kernel to time."""
    if device.type == "cpu":
        print("row kernels: need a GPU")
        return
    for kind in ("statistics", "gradient"):
        for n_vocab in (128256, 32003):
            yield functools.partial(make_case, kind, 2048, n_vocab, device, quick)

"""The row kernels in plain PyTorch, for chunks of logits where Triton cannot run: the same names, arguments and results.

Statistics and divergences come from the formulas of this package; the derivatives are written out. A few rows are computed at a
time, so that the temporaries stay in the processor's caches and need little memory beside a chunk.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from soul_kernels.reference import token_draw, token_logprob
from soul_kernels.reference.kl_divergence import DIVERGENCE, MODEL_SIDE, divergence_and_mean_score, entropy, score
from soul_kernels.reference.token_logprob import HIT, LOGP, N_ALL, ONE_MINUS_P, ROW_MAX, TOTAL, transformed
from soul_kernels.tokens import IGNORE_INDEX

BLOCK = 1 << 18  # elements of logits in a block; among 2^16 to 2^22 this was the fastest on one thread, by little
DIVERGENCE_BLOCK = 1 << 16  # the same for a divergence, which makes some fifteen tensors of that size
LOWEST = -1e30  # bound of a row's maximum, which must be finite: -inf - -inf would be NaN


def _blocks(logits: Tensor, size: int) -> Iterator[slice]:
    """Yield the rows of ``logits`` as slices of about ``size`` elements, and of one row at least."""
    n_rows, n_vocab = logits.shape
    step = max(size // n_vocab, 1)
    return (slice(start, start + step) for start in range(0, n_rows, step))


def _valid(labels: Tensor, n_vocab: int) -> tuple[Tensor, Tensor]:
    """Return a mask of the labels in the vocabulary, and the labels with 0 in place of the others."""
    valid = (labels >= 0) & (labels < n_vocab)
    return valid, labels.where(valid, 0)


def _at_least_fp32(logits: Tensor) -> Tensor:
    """Return raw products in fp32, or in fp64 if they are in fp64."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


@contextlib.contextmanager
def _recorded(logits: Tensor) -> Iterator[Tensor]:
    """Yield a copy of raw products as a leaf of autograd, in a context in which autograd records operations.

    It does so within an opaque op and in inference mode as well.
    """
    with torch.inference_mode(False), torch.enable_grad():
        yield _at_least_fp32(logits).clone().requires_grad_()


def token_statistics(
    logits: Tensor, labels: Tensor, statistics: Tensor, *, means: Tensor | None = None, class_weights: Tensor | None = None,
    logit_scale: float = 1.0, softcap: float | None = None,
) -> None:  # fmt: skip
    """Do what `soul_kernels.token_logprob.token_statistics` does."""
    valid, labels_in = _valid(labels, logits.shape[1])
    at_label, others_max, rest = statistics.new_empty(3, len(labels))
    for rows in _blocks(logits, BLOCK):
        z = transformed(_at_least_fp32(logits[rows]), logit_scale, softcap)
        label = labels_in[rows, None]
        if means is not None:
            means[rows] = token_logprob.mean_logit(z, class_weights)
        # The label is taken out of the logits themselves for a moment: a copy would take as long as the exponentials.
        at_label[rows] = torch.gather(z, 1, label)[:, 0]
        torch.amax(z.scatter_(1, label, -torch.inf), 1, out=others_max[rows])
        others_max[rows].clamp_(min=LOWEST)
        torch.sum(torch.sub(z, others_max[rows, None]).exp_(), 1, out=rest[rows])
        z.scatter_(1, label, at_label[rows, None])
        if len(statistics) == N_ALL:
            metrics = token_logprob.token_statistics(z, label[:, 0])
            torch.stack([metrics.hits, metrics.entropies, metrics.variances], out=statistics[HIT:, rows])
    fill_statistics(statistics, labels, valid, at_label, others_max, rest)
    if means is not None:
        means.masked_fill_(~valid, 0.0)


def predictions(logits: Tensor, labels: Tensor, predictions: Tensor, *, rising: bool) -> None:
    """Write the column of each row's largest raw product, or if not ``rising`` of the smallest, into ``predictions`` [n].

    That is the entry with the largest logit, since scale and cap are monotonic. It is -100 where the label is.
    """
    best = logits.argmax(1) if rising else logits.argmin(1)
    predictions.copy_(torch.where(labels == IGNORE_INDEX, IGNORE_INDEX, best))


def fill_statistics(
    statistics: Tensor, labels: Tensor, valid: Tensor, at_label: Tensor, others_max: Tensor, rest: Tensor
) -> None:  # fmt: skip
    """Fill in the first four rows of ``statistics`` [4 or 7, n], with zeros or NaN where a label is not valid.

    Args:
        statistics: the result of `token_statistics`; mutated.
        labels: [n] int64.
        valid: [n] bool, whether a label lies in the vocabulary.
        at_label: [n], the logit of each row's label.
        others_max: [n], the maximum of the row without the label, or of the whole row; finite.
        rest: [n], the sum of exp(z - others_max) over the row without the label.
    """
    row_max = torch.maximum(at_label, others_max)
    rest = rest * (others_max - row_max).exp()
    gap = row_max - at_label
    total = rest + (-gap).exp()
    statistics[LOGP] = -torch.where(gap == 0, rest.log1p(), gap + total.log())
    statistics[ROW_MAX] = row_max
    statistics[TOTAL] = total
    statistics[ONE_MINUS_P] = rest / total
    statistics.masked_fill_(~valid, 0.0)
    statistics[LOGP].masked_fill_(~valid & (labels != IGNORE_INDEX), torch.nan)


def lowered(statistics: Tensor, labels: Tensor, strengths: Tensor | None) -> Tensor:
    """Return the statistics [4, n] of rows whose label's logit is lowered by ``strengths`` [n]; None does not lower it."""
    if strengths is None:
        return statistics
    out = torch.empty_like(statistics)
    row_max, total = statistics[ROW_MAX], statistics[TOTAL]
    at_label = statistics[LOGP] + row_max + total.log() - strengths
    rest = statistics[ONE_MINUS_P] * total
    # A logarithm rounds the rest by some 1e-7, which shows where model and reference are close. Below 1 the label has been the
    # maximum, that of the others is not known, and their logsumexp takes its place.
    is_below = rest < 1.0
    others_max = torch.where(is_below, (row_max + rest.log()).clamp(min=LOWEST), row_max)
    fill_statistics(out, labels, labels != IGNORE_INDEX, at_label, others_max, rest.masked_fill(is_below, 1.0))
    return out


def token_gradient(
    logits: Tensor, labels: Tensor, statistics: Tensor, coefficients: Tensor, out: Tensor, *,
    lse_coefficients: Tensor | None = None, mean_coefficients: Tensor | None = None, class_weights: Tensor | None = None,
    logit_scale: float = 1.0, softcap: float | None = None,
) -> None:  # fmt: skip
    """Do what `soul_kernels.token_logprob.token_gradient` does."""
    n_vocab = logits.shape[1]
    valid, labels_in = _valid(labels, n_vocab)
    columns = labels_in[:, None]
    at_label = (coefficients * statistics[ONE_MINUS_P])[:, None]
    if lse_coefficients is not None:
        at_label += (lse_coefficients * statistics[LOGP].exp())[:, None]
        coefficients = coefficients - lse_coefficients
    scale = (-coefficients / statistics[TOTAL])[:, None]
    shift = statistics[ROW_MAX, :, None]
    weights = logits.new_ones(1, dtype=statistics.dtype) if class_weights is None else class_weights
    for rows in _blocks(logits, BLOCK):
        z = transformed(_at_least_fp32(logits[rows]), logit_scale, softcap)
        in_place = z.data_ptr() == out[rows].data_ptr()
        gradient = torch.sub(z, shift[rows], out=z if in_place else None).exp_().mul_(scale[rows])
        gradient.scatter_(1, columns[rows], at_label[rows])
        if mean_coefficients is not None:
            gradient.addcmul_(mean_coefficients[rows, None], weights, value=1 / n_vocab)
        gradient = _times_slope(gradient, logits[rows], logit_scale, softcap)
        if not in_place:
            out[rows] = gradient
    if not valid.all():
        out[~valid] = 0.0  # whatever the logits hold


def _times_slope(gradient: Tensor, raw: Tensor, logit_scale: float, softcap: float | None) -> Tensor:
    """Return the gradient by the raw products from that by the logits."""
    if logit_scale == 1.0 and softcap is None:
        return gradient
    with _recorded(raw) as leaf:
        return torch.autograd.grad(transformed(leaf, logit_scale, softcap), leaf, gradient)[0]


def statistics_and_gradient(
    logits: Tensor, labels: Tensor, statistics: Tensor, coefficients: Tensor, out: Tensor, *, logit_scale: float = 1.0,
    softcap: float | None = None,
) -> None:  # fmt: skip
    """Do what `soul_kernels.token_logprob.statistics_and_gradient` does."""
    token_statistics(logits, labels, statistics, logit_scale=logit_scale, softcap=softcap)
    token_gradient(logits, labels, statistics, coefficients, out, logit_scale=logit_scale, softcap=softcap)


def divergence_statistics(
    logits: Tensor, ref_logits: Tensor, labels: Tensor, statistics: Tensor, ref_statistics: Tensor, divergences: Tensor, *,
    strengths: Tensor | None = None, kind: str = "kl", beta: float = 0.5, logit_scale: float = 1.0,
    softcap: float | None = None,
) -> None:  # fmt: skip
    """Do what `soul_kernels.kl_divergence.divergence_statistics` does."""
    valid, labels_in = _valid(labels, logits.shape[1])
    ref_statistics = lowered(ref_statistics, labels, strengths)
    for rows in _blocks(logits, DIVERGENCE_BLOCK):
        log_p = _log_probs(logits, labels_in, statistics, rows, logit_scale, softcap)
        log_q = _log_probs(ref_logits, labels_in, ref_statistics, rows, logit_scale, softcap)
        divergence, mean_score = divergence_and_mean_score(log_p, log_q, kind, beta)
        values = [divergence, entropy(log_q), mean_score]
        torch.stack(values[: len(divergences)], out=divergences[:, rows])
    divergences.masked_fill_(~valid, 0.0)


def divergence_gradient(
    logits: Tensor, ref_logits: Tensor, labels: Tensor, statistics: Tensor, ref_statistics: Tensor, divergences: Tensor,
    coefficients: Tensor, weights: Tensor, out: Tensor, *, strengths: Tensor | None = None, kind: str = "kl",
    beta: float = 0.5, logit_scale: float = 1.0, softcap: float | None = None,
) -> None:  # fmt: skip
    """Do what `soul_kernels.kl_divergence.divergence_gradient` does."""
    valid, labels_in = _valid(labels, logits.shape[1])
    ref_statistics = lowered(ref_statistics, labels, strengths)
    mean_scores = divergences[MODEL_SIDE if kind == "jsd" else DIVERGENCE]
    p_rest, q_rest = statistics[ONE_MINUS_P], ref_statistics[ONE_MINUS_P]
    for rows in _blocks(logits, DIVERGENCE_BLOCK):
        column = labels_in[rows, None]
        if kind == "kl":
            p = _probs(logits, labels_in, statistics, rows, logit_scale, softcap)
            gradient = p - _probs(ref_logits, labels_in, ref_statistics, rows, logit_scale, softcap)
            # Where p of the label is close to 1, p - q is (1 - q) - (1 - p): both were summed without the label.
            at_label = torch.where(p_rest[rows] < 0.5, q_rest[rows] - p_rest[rows], gradient.gather(1, column)[:, 0])
            gradient.scatter_(1, column, at_label[:, None])
        else:
            log_p = _log_probs(logits, labels_in, statistics, rows, logit_scale, softcap)
            log_q = _log_probs(ref_logits, labels_in, ref_statistics, rows, logit_scale, softcap)
            p = log_p.exp()
            gradient = p * (score(log_p, log_q, kind, beta) - mean_scores[rows, None])
        by_logp = p.neg_().scatter_(1, column, p_rest[rows, None])  # derivative of log p(label)
        gradient.mul_(weights[rows, None]).addcmul_(by_logp, coefficients[rows, None])
        out[rows] = _times_slope(gradient, logits[rows], logit_scale, softcap)
    if not valid.all():
        out[~valid] = 0.0


def _log_probs(
    logits: Tensor, labels: Tensor, statistics: Tensor, rows: slice, logit_scale: float, softcap: float | None
) -> Tensor:
    """Return the log-probabilities of some rows, in which the label's is accurate even where it is close to 0."""
    z = transformed(_at_least_fp32(logits[rows]), logit_scale, softcap)
    log_p = z - statistics[ROW_MAX, rows, None] - statistics[TOTAL, rows, None].log()
    return log_p.scatter_(1, labels[rows, None], statistics[LOGP, rows, None])


def _probs(
    logits: Tensor, labels: Tensor, statistics: Tensor, rows: slice, logit_scale: float, softcap: float | None
) -> Tensor:
    """Return the probabilities of some rows: where two are close, the exponential of a rounded logarithm would lose digits."""
    z = transformed(_at_least_fp32(logits[rows]), logit_scale, softcap)
    p = (z - statistics[ROW_MAX, rows, None]).exp_().div_(statistics[TOTAL, rows, None])
    return p.scatter_(1, labels[rows, None], statistics[LOGP, rows, None].exp())


def likeliest_statistics(
    logits: Tensor, labels: Tensor, statistics: Tensor, *, logit_scale: float = 1.0, softcap: float | None = None
) -> None:
    """Do nothing: here `draw_labels` needs no statistics beforehand."""


def draw_labels(
    logits: Tensor, labels: Tensor, uniforms: Tensor, statistics: Tensor, coefficients: Tensor, out: Tensor, *,
    logit_scale: float = 1.0, softcap: float | None = None,
) -> None:  # fmt: skip
    """Do what `soul_kernels.token_draw.draw_labels` does."""
    drawn_labels(logits, labels, uniforms, logit_scale=logit_scale, softcap=softcap)
    token_statistics(logits, labels, statistics, logit_scale=logit_scale, softcap=softcap)
    token_gradient(logits, labels, statistics, coefficients, out, logit_scale=logit_scale, softcap=softcap)
    labels.masked_fill_(statistics[LOGP].isnan(), IGNORE_INDEX)


def drawn_labels(
    logits: Tensor, labels: Tensor, uniforms: Tensor, *, logit_scale: float = 1.0, softcap: float | None = None
) -> None:  # fmt: skip
    """Write the label that is drawn from each row into ``labels`` [n], except where it is -100."""
    for rows in _blocks(logits, BLOCK):
        z = transformed(_at_least_fp32(logits[rows]), logit_scale, softcap)
        labels[rows] = token_draw.draw_labels(z, uniforms[rows]).where(labels[rows] != IGNORE_INDEX, IGNORE_INDEX)

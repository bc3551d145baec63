"""The row kernels in plain PyTorch, for chunks of logits where Triton cannot run: the same names, arguments and results.

Statistics and divergences come from the formulas of this package. Autograd differentiates the formula of a divergence; only the
derivative of a log-probability is written out. A few rows are computed at a time, so that the temporaries stay in the
processor's caches and need little memory beside a chunk.
"""

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from soul_kernels.reference import token_draw, token_logprob
from soul_kernels.reference.kl_divergence import entropy, kl_divergence, ref_log_probabilities
from soul_kernels.reference.token_logprob import HIT, LOGP, N_ALL, ONE_MINUS_P, ROW_MAX, TOTAL, transformed
from soul_kernels.tokens import IGNORE_INDEX

BLOCK = 1 << 18  # elements of logits in a block; among 2^16 to 2^22 this was the fastest on one thread, by little
DIVERGENCE_BLOCK = 1 << 16  # the same for a divergence, which makes some fifteen tensors of that size


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
    """Do what `soul_kernels.token_logprob.token_statistics` does, except for two rows of the result.

    The row `ROW_MAX` holds the logsumexp in place of the maximum, and so the row `TOTAL` holds 1.
    """
    valid, labels_in = _valid(labels, logits.shape[1])
    at_label, rest = statistics.new_empty(2, len(labels))
    for rows in _blocks(logits, BLOCK):
        z = transformed(_at_least_fp32(logits[rows]), logit_scale, softcap)
        label = labels_in[rows, None]
        if means is not None:
            means[rows] = token_logprob.mean_logit(z, class_weights)
        # The label is taken out of the logits themselves for a moment: a copy would take as long as the exponentials.
        at_label[rows] = torch.gather(z, 1, label)[:, 0]
        torch.logsumexp(z.scatter_(1, label, -torch.inf), 1, out=rest[rows])
        z.scatter_(1, label, at_label[rows, None])
        if len(statistics) == N_ALL:
            metrics = token_logprob.token_statistics(z, label[:, 0])
            torch.stack([metrics.hits, metrics.entropies, metrics.variances], out=statistics[HIT:, rows])
    statistics[LOGP] = F.logsigmoid(at_label - rest)
    statistics[ROW_MAX] = torch.logaddexp(at_label, rest)
    statistics[TOTAL] = 1.0
    statistics[ONE_MINUS_P] = torch.sigmoid(rest - at_label)
    statistics.masked_fill_(~valid, 0.0)
    if means is not None:
        means.masked_fill_(~valid, 0.0)
    statistics[LOGP].masked_fill_(~valid & (labels != IGNORE_INDEX), torch.nan)


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
        if logit_scale != 1.0 or softcap is not None:
            with _recorded(logits[rows]) as raw:
                (gradient,) = torch.autograd.grad(transformed(raw, logit_scale, softcap), raw, gradient)
        if not in_place:
            out[rows] = gradient
    if not valid.all():
        out[~valid] = 0.0  # whatever the logits hold


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
    """Do what `soul_kernels.kl_divergence.divergence_statistics` does; the statistics are not read."""
    valid, labels_in = _valid(labels, logits.shape[1])
    for rows in _blocks(logits, DIVERGENCE_BLOCK):
        z = transformed(_at_least_fp32(logits[rows]), logit_scale, softcap)
        log_q = _ref_log_probs(ref_logits, labels_in, strengths, rows, logit_scale, softcap)
        torch.stack([kl_divergence(z, labels_in[rows], log_q, kind, beta), entropy(log_q)], out=divergences[:2, rows])
    divergences.masked_fill_(~valid, 0.0)


def divergence_gradient(
    logits: Tensor, ref_logits: Tensor, labels: Tensor, statistics: Tensor, ref_statistics: Tensor, divergences: Tensor,
    coefficients: Tensor, weights: Tensor, out: Tensor, *, strengths: Tensor | None = None, kind: str = "kl",
    beta: float = 0.5, logit_scale: float = 1.0, softcap: float | None = None,
) -> None:  # fmt: skip
    """Do what `soul_kernels.kl_divergence.divergence_gradient` does; the statistics and divergences are not read."""
    valid, labels_in = _valid(labels, logits.shape[1])
    for rows in _blocks(logits, DIVERGENCE_BLOCK):
        log_q = _ref_log_probs(ref_logits, labels_in, strengths, rows, logit_scale, softcap)
        label = labels_in[rows]
        with _recorded(logits[rows]) as raw:
            z = transformed(raw, logit_scale, softcap)
            values = token_logprob.token_logprob(z, label), kl_divergence(z, label, log_q, kind, beta)
            (gradient,) = torch.autograd.grad(values, raw, (coefficients[rows], weights[rows]))
        out[rows] = gradient
    if not valid.all():
        out[~valid] = 0.0


def _ref_log_probs(
    ref_logits: Tensor, labels: Tensor, strengths: Tensor | None, rows: slice, logit_scale: float, softcap: float | None
) -> Tensor:
    """Return log q of some rows of the reference model."""
    z = transformed(_at_least_fp32(ref_logits[rows]), logit_scale, softcap)
    return ref_log_probabilities(z, labels[rows], None if strengths is None else strengths[rows])


def likeliest_statistics(
    logits: Tensor, labels: Tensor, statistics: Tensor, *, logit_scale: float = 1.0, softcap: float | None = None
) -> None:
    """Do nothing: here `draw_labels` needs no statistics beforehand."""


def draw_labels(
    logits: Tensor, labels: Tensor, uniforms: Tensor, statistics: Tensor, coefficients: Tensor, out: Tensor, *,
    logit_scale: float = 1.0, softcap: float | None = None,
) -> None:  # fmt: skip
    """Do what `soul_kernels.token_draw.draw_labels` does."""
    for rows in _blocks(logits, BLOCK):
        z = transformed(_at_least_fp32(logits[rows]), logit_scale, softcap)
        labels[rows] = token_draw.draw_labels(z, uniforms[rows]).where(labels[rows] != IGNORE_INDEX, IGNORE_INDEX)
    token_statistics(logits, labels, statistics, logit_scale=logit_scale, softcap=softcap)
    token_gradient(logits, labels, statistics, coefficients, out, logit_scale=logit_scale, softcap=softcap)
    labels.masked_fill_(statistics[LOGP].isnan(), IGNORE_INDEX)

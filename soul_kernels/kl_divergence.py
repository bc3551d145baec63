"""Row kernels over the logits of a model and of the reference model: divergence of each row, and then its gradient.

Both kernels read the statistics that `token_statistics` has computed for either chunk. The logarithms of the sums are therefore
known, and each term of the divergence can be computed without cancellation. The top of ``token_logprob.py`` explains how row
kernels are built.
"""

from typing import NamedTuple

from torch import Tensor

from soul_kernels._launch import tl, triton
from soul_kernels.reference import kl_divergence as _reference
from soul_kernels.token_logprob import (
    IGNORED,
    LOGP,
    ONE_MINUS_P,
    ROW_MAX,
    TOTAL,
    VECTORS,
    ColumnBlock,
    Transform,
    by_lane,
    is_overlaid,
    launch_rows,
    load_logits,
    log1p,
    log1p_of_small,
    other_block,
    row_of_program,
    statistic,
    store_block,
    store_zeros,
    times_slope,
    zeros_of_lanes,
)

SMALLEST = tl.constexpr(_reference.FLOOR)
DIVERGENCE = tl.constexpr(_reference.DIVERGENCE)  # rows of the divergences of a chunk
REF_ENTROPY = tl.constexpr(_reference.REF_ENTROPY)
MODEL_SIDE = tl.constexpr(_reference.MODEL_SIDE)
FARTHEST = tl.constexpr(_reference.FARTHEST)

# Columns per loop iteration, warps: no spills for any target. Times on a GPU are still to be measured.
DIVERGENCE_CONFIG = {"BLOCK": 2048, "num_warps": 8}
GRADIENT_CONFIG = {"BLOCK": 2048, "num_warps": 8}


class RefRow(NamedTuple):
    """The row of the reference model: q = softmax(z), with the label's logit lowered."""

    logits: tl.tensor  # pointer to its first raw product
    row_max: tl.tensor  # maximum before the label's logit is lowered
    total: tl.tensor  # sum of exp(z - row_max)
    rest: tl.tensor  # 1 - q(label)
    label_log_q: tl.tensor  # log q(label)


class DivergenceFactors(NamedTuple):
    """Numbers of a row from which log p of each column is computed, and log q."""

    row_max: tl.tensor
    log_total: tl.tensor  # logarithm of the sum of exp(z - row_max)
    label_log_p: tl.tensor  # log p(label)
    ref_log_total: tl.tensor  # the logarithm for the reference model
    beta: tl.tensor  # weight of the reference model in the mixture of "jsd"; else 0


class DivergenceSums(NamedTuple):
    """Sums of each lane over the columns that have been read, [LANES]."""

    divergence: tl.tensor
    entropy: tl.tensor  # of the reference model
    model_side: tl.tensor  # of "jsd": what p adds to the divergence; else 0


class GradientFactors(NamedTuple):
    """Numbers of a row from which the gradient of ``coefficient log p(label) + weight divergence`` is computed."""

    coefficient: tl.tensor
    weight: tl.tensor
    mean_score: tl.tensor  # mean of the columns' scores under p: see `_score`
    row_max: tl.tensor
    log_total: tl.tensor  # logarithm of the sum of exp(z - row_max)
    label_log_p: tl.tensor  # log p(label)
    beta: tl.tensor  # weight of the reference model in the mixture of "jsd"; else 0
    scale: tl.tensor  # 1 / sum of exp(z - row_max)
    rest: tl.tensor  # 1 - p(label)
    ref_scale: tl.tensor  # 1 / sum of exp(z - row_max) of the reference model
    ref_log_total: tl.tensor  # logarithm of that sum
    label_difference: tl.tensor  # p(label) - q(label)


@triton.jit
def _ref_row(ref_logits_ptr, ref_row_stride, statistics_ptr, stride, strengths_ptr, row):
    """Return the `RefRow` of a row; ``strengths_ptr`` holds how far the labels' logits are lowered, or is None."""
    log_q = tl.load(statistic(statistics_ptr, stride, row, LOGP))
    row_max = tl.load(statistic(statistics_ptr, stride, row, ROW_MAX))
    total = tl.load(statistic(statistics_ptr, stride, row, TOTAL))
    rest = tl.load(statistic(statistics_ptr, stride, row, ONE_MINUS_P))
    lowered = 0.0
    if strengths_ptr is not None:
        lowered = tl.load(strengths_ptr + row.index)
        if lowered != 0.0:  # the rest was summed without the label; the label's term is multiplied by exp(-lowered)
            unlowered = total
            others = rest * total
            at_label = tl.exp(log_q - lowered) * total
            total = others + at_label
            rest = others / total
            small = log_q - lowered + tl.log(unlowered / total)  # no logarithm of at_label, which may be 0
            log_q = tl.where(others < at_label, -log1p(others / at_label), small)
    logits = ref_logits_ptr + row.index * ref_row_stride
    return RefRow(logits=logits, row_max=row_max, total=total, rest=rest, label_log_q=log_q)


@triton.jit
def _load_both(row, row_max, ref, block, transform):
    """Return the raw products of a block, and z - row_max of both models; the label's logit is not lowered."""
    raw, z = load_logits(row.logits, block, transform)
    ref_raw, ref_z = load_logits(ref.logits, block, transform)
    return raw, z - row_max, ref_z - ref.row_max


@triton.jit
def _surprise(log_q):
    """Return -log(q + 1e-12), accurate for q close to 1 as well: log(q + a) = log q + a / q, up to (a / q)^2."""
    q = tl.exp(log_q)
    return -tl.where(q > 1e-6, log_q + SMALLEST / q, tl.log(q + SMALLEST))


@triton.jit
def _excess(a, b, d):
    """Return a (d + exp(-d) - 1) for d = log a - log b. Near d = 0 a series is used; its next term is below 3e-9 of the sum."""
    series = 1 / 24 - d * (1 / 120 - d * (1 / 720 - d * (1 / 5040 - d * (1 / 40320 - d * (1 / 362880)))))
    near = a * d * d * (0.5 - d * (1 / 6 - d * series))
    far = a * (d - 1.0) + b
    return tl.where(tl.abs(d) < 0.5, near, far)


@triton.jit
def _from_mixture(log_p, log_q, beta):
    """Return log p - log m and log q - log m for the mixture m = beta q + (1 - beta) p, accurate where p and q are close."""
    d = tl.where(tl.exp(log_p) + tl.exp(log_q) > 0.0, log_q - log_p, 0.0)
    d = tl.minimum(tl.maximum(d, -FARTHEST), FARTHEST)
    ratio = tl.exp(-tl.abs(d))
    of_larger = tl.log(tl.where(d > 0.0, beta + (1.0 - beta) * ratio, 1.0 - beta + beta * ratio))  # log m - log of the larger
    # Near d = 0: log1p(beta expm1(d)), with a series of expm1 whose next term is below 2e-8 of the sum.
    expm1 = d * (1.0 + d * (1 / 2 + d * (1 / 6 + d * (1 / 24 + d * (1 / 120 + d * (1 / 720 + d * (1 / 5040)))))))
    near = log1p_of_small(beta * expm1)
    is_near = tl.abs(d) < 0.5
    of_p = tl.where(is_near, -near, -of_larger - tl.maximum(d, 0.0))
    of_q = tl.where(is_near, d - near, -of_larger + tl.minimum(d, 0.0))
    return of_p, of_q


@triton.jit
def _terms(log_p, log_q, beta, KIND: tl.constexpr):
    """Return what each column adds to the divergence, to the entropy of the reference model, and to p's side of "jsd"."""
    p = tl.exp(log_p)
    q = tl.exp(log_q)
    entropy = tl.where(q > 0.0, -q * log_q, 0.0)
    if KIND == "soul_kl":
        return p * _surprise(log_q), entropy, p
    elif KIND == "kl":
        return _excess(q, p, tl.where(q > 0.0, log_q - log_p, 1.0)), entropy, p  # 1 leaves p, where q is 0
    elif KIND == "reverse_kl":
        return _excess(p, q, tl.where(p > 0.0, log_p - log_q, 1.0)), entropy, p
    else:
        of_p, of_q = _from_mixture(log_p, log_q, beta)
        mixture = beta * q + (1.0 - beta) * p
        model_side = (1.0 - beta) * _excess(p, mixture, of_p)
        return beta * _excess(q, mixture, of_q) + model_side, entropy, model_side


@triton.jit
def _score(log_p, log_q, beta, KIND: tl.constexpr):
    """Return the score of each column: the gradient of a divergence by a logit is p (score - mean score under p).

    "kl", whose gradient is p - q, has none.
    """
    if KIND == "soul_kl":
        return _surprise(log_q)
    elif KIND == "reverse_kl":
        return tl.where(tl.exp(log_p) > 0.0, log_p - log_q, 0.0)
    else:
        of_p, of_q = _from_mixture(log_p, log_q, beta)
        return (1.0 - beta) * of_p


@triton.jit
def _add_block(sums, row, ref, block, factors, transform, LABEL: tl.constexpr, KIND: tl.constexpr):
    """Return the `DivergenceSums` with one more block added, which may hold the label if ``LABEL``."""
    raw, gap, ref_gap = _load_both(row, factors.row_max, ref, block, transform)
    log_p = gap - factors.log_total
    log_q = ref_gap - factors.ref_log_total
    if LABEL:  # p(label) may be close to 1, hence the values that were summed without the label
        log_p = tl.where(block.columns == row.label, factors.label_log_p, log_p)
        log_q = tl.where(block.columns == row.label, ref.label_log_q, log_q)
    divergence, entropy, side = _terms(log_p, log_q, factors.beta, KIND)
    model_side = sums.model_side
    if KIND == "jsd":
        model_side += tl.sum(by_lane(side, model_side), 1)
    return DivergenceSums(
        divergence=sums.divergence + tl.sum(by_lane(divergence, sums.divergence), 1),
        entropy=sums.entropy + tl.sum(by_lane(entropy, sums.entropy), 1),
        model_side=model_side,
    )


@triton.jit(**VECTORS)
def divergence_kernel(
    logits_ptr,  # [n, V] raw products, row_stride elements from row to row
    ref_logits_ptr,  # [n, V] the same of the reference model
    labels_ptr,  # [n] int64: -100 is an ignored row
    statistics_ptr,  # [4, n] fp32, from token_statistics
    statistics_stride,
    ref_statistics_ptr,  # [4, n] fp32, the same of the reference model
    ref_statistics_stride,
    strengths_ptr,  # [n] fp32: how far the reference model's logit of the label is lowered; or None
    divergences_ptr,  # [2 or 3, n] fp32: divergence, entropy of the reference model, p's side of "jsd"
    divergences_stride,
    n_vocab,
    row_stride,
    ref_row_stride,
    beta,  # weight of the reference model in the mixture of "jsd"; else None
    logit_scale,  # None: not scaled
    softcap,  # None: not capped
    KIND: tl.constexpr,  # one of soul_kernels.reference.kl_divergence.KINDS
    BLOCK: tl.constexpr,
):
    """Write the divergence of one row, and the entropy of its reference model."""
    row = row_of_program(logits_ptr, row_stride, labels_ptr, n_vocab, BLOCK)
    transform = Transform(logit_scale=logit_scale, softcap=softcap)
    divergence = 0.0
    entropy = 0.0
    model_side = 0.0
    if row.label != IGNORED:
        ref = _ref_row(ref_logits_ptr, ref_row_stride, ref_statistics_ptr, ref_statistics_stride, strengths_ptr, row)
        factors = DivergenceFactors(
            row_max=tl.load(statistic(statistics_ptr, statistics_stride, row, ROW_MAX)),
            log_total=tl.log(tl.load(statistic(statistics_ptr, statistics_stride, row, TOTAL))),
            label_log_p=tl.load(statistic(statistics_ptr, statistics_stride, row, LOGP)),
            ref_log_total=tl.log(ref.total),
            beta=0.0 if beta is None else beta,
        )
        zeros = zeros_of_lanes(row, BLOCK)
        lanes = DivergenceSums(divergence=zeros, entropy=zeros, model_side=zeros)
        columns = tl.arange(0, BLOCK)
        for start in range(0, row.others, BLOCK):
            block = ColumnBlock(other_block(row, start, BLOCK) + columns, None)
            lanes = _add_block(lanes, row, ref, block, factors, transform, False, KIND)
        if row.others < row.tail:
            block = ColumnBlock(row.label_block + columns, None)
            lanes = _add_block(lanes, row, ref, block, factors, transform, True, KIND)
        if row.tail < n_vocab:
            columns += row.tail
            block = ColumnBlock(columns, columns < n_vocab)
            lanes = _add_block(lanes, row, ref, block, factors, transform, True, KIND)
        divergence = tl.sum(lanes.divergence, 0)
        entropy = tl.sum(lanes.entropy, 0)
        if KIND == "jsd":
            model_side = tl.sum(lanes.model_side, 0)
    tl.store(statistic(divergences_ptr, divergences_stride, row, DIVERGENCE), divergence)
    tl.store(statistic(divergences_ptr, divergences_stride, row, REF_ENTROPY), entropy)
    if KIND == "jsd":
        tl.store(statistic(divergences_ptr, divergences_stride, row, MODEL_SIDE), model_side)


@triton.jit
def _divergence_gradient_block(row, ref, out_row, start, block, factors, transform, KIND: tl.constexpr, OVERLAID: tl.constexpr):
    """Write the gradient of a block."""
    raw, gap, ref_gap = _load_both(row, factors.row_max, ref, block, transform)
    p = tl.exp(gap) * factors.scale
    is_label = block.columns == row.label
    gradient = factors.coefficient * tl.where(is_label, factors.rest, -p)
    if KIND == "kl":
        q = tl.exp(ref_gap) * factors.ref_scale
        gradient += factors.weight * tl.where(is_label, factors.label_difference, p - q)
    else:
        log_p = tl.where(is_label, factors.label_log_p, gap - factors.log_total)
        log_q = tl.where(is_label, ref.label_log_q, ref_gap - factors.ref_log_total)
        gradient += factors.weight * p * (_score(log_p, log_q, factors.beta, KIND) - factors.mean_score)
    store_block(out_row, block, times_slope(gradient, raw, transform), start, OVERLAID)


@triton.jit(**VECTORS)
def divergence_gradient_kernel(
    logits_ptr,  # [n, V] raw products, row_stride elements from row to row
    ref_logits_ptr,  # [n, V] the same of the reference model
    labels_ptr,  # [n] int64: -100 is an ignored row
    statistics_ptr,  # [4, n] fp32, from token_statistics
    statistics_stride,
    ref_statistics_ptr,  # [4, n] fp32, the same of the reference model
    ref_statistics_stride,
    strengths_ptr,  # [n] fp32 or None
    mean_scores_ptr,  # [n] fp32, a row of what divergence_kernel has written: see `_score`
    coefficients_ptr,  # [n] fp32, derivative of the objective by log p(label)
    weights_ptr,  # [n] fp32, derivative of the objective by the divergence
    out_ptr,  # [n, V], out_stride elements from row to row: derivative by the raw products; may be logits_ptr
    n_vocab,
    row_stride,
    ref_row_stride,
    out_stride,
    beta,  # as in divergence_kernel
    logit_scale,  # None: not scaled
    softcap,  # None: not capped
    KIND: tl.constexpr,  # one of soul_kernels.reference.kl_divergence.KINDS
    OVERLAID: tl.constexpr,  # as in token_logprob.gradient_kernel
    BLOCK: tl.constexpr,
):
    """Write the gradient of one row's ``coefficient log p(label) + weight divergence``."""
    row = row_of_program(logits_ptr, row_stride, labels_ptr, n_vocab, BLOCK)
    transform = Transform(logit_scale=logit_scale, softcap=softcap)
    out_row = out_ptr + row.index * out_stride
    if row.label != IGNORED:
        total = tl.load(statistic(statistics_ptr, statistics_stride, row, TOTAL))
        rest = tl.load(statistic(statistics_ptr, statistics_stride, row, ONE_MINUS_P))
        ref = _ref_row(ref_logits_ptr, ref_row_stride, ref_statistics_ptr, ref_statistics_stride, strengths_ptr, row)
        # p - q of the label. Where p is close to 1 it is (1 - q) - (1 - p): both were summed without the label. Where p is
        # small, both are close to 1, and their difference would lose the digits that p and q have.
        label_log_p = tl.load(statistic(statistics_ptr, statistics_stride, row, LOGP))
        factors = GradientFactors(
            coefficient=tl.load(coefficients_ptr + row.index),
            weight=tl.load(weights_ptr + row.index),
            mean_score=tl.load(mean_scores_ptr + row.index),
            row_max=tl.load(statistic(statistics_ptr, statistics_stride, row, ROW_MAX)),
            log_total=tl.log(total),
            label_log_p=label_log_p,
            beta=0.0 if beta is None else beta,
            scale=1.0 / total,
            rest=rest,
            ref_scale=1.0 / ref.total,
            ref_log_total=tl.log(ref.total),
            label_difference=tl.where(rest < 0.5, ref.rest - rest, tl.exp(label_log_p) - tl.exp(ref.label_log_q)),
        )
        lanes = tl.arange(0, BLOCK)
        for start in range(0, row.tail, BLOCK):
            block = ColumnBlock(start + lanes, None)
            _divergence_gradient_block(row, ref, out_row, start, block, factors, transform, KIND, OVERLAID)
        if row.tail < n_vocab:
            block = ColumnBlock(row.tail + lanes, row.tail + lanes < n_vocab)
            _divergence_gradient_block(row, ref, out_row, row.tail, block, factors, transform, KIND, OVERLAID)
    else:
        store_zeros(out_row, n_vocab, tl.arange(0, BLOCK))


def divergence_statistics(
    logits: Tensor, ref_logits: Tensor, labels: Tensor, statistics: Tensor, ref_statistics: Tensor, divergences: Tensor, *,
    strengths: Tensor | None = None, kind: str = "kl", beta: float = 0.5, logit_scale: float = 1.0,
    softcap: float | None = None,
) -> None:  # fmt: skip
    """Write each row's divergence from the reference model, and the reference model's entropy, into ``divergences``.

    Args:
        logits: [n, V] fp32, bf16 or fp16, raw products of hidden states and head, rows contiguous.
        ref_logits: [n, V], the same of the reference model.
        labels: [n] int64; -100 gives zeros. The other labels lie in [0, V); their values matter with ``strengths`` only.
        statistics: [4 or 7, n] fp32, from `token_statistics` of the logits with these labels.
        ref_statistics: the same of the reference model.
        divergences: [2 or, for "jsd", 3, n] fp32, rows contiguous; mutated. Its rows are `DIVERGENCE`, `REF_ENTROPY` and
            `MODEL_SIDE`.
        strengths: [n] fp32, how far the reference model's logit of the label is lowered; None: not at all.
        kind: see `soul_kernels.reference.kl_divergence.kl_divergence`.
        beta: the same.
        logit_scale: as in `token_statistics`, for both models.
        softcap: as in `token_statistics`, for both models.
    """
    launch_rows(
        divergence_kernel,
        DIVERGENCE_CONFIG,
        logits,
        statistics,
        transform=(logit_scale, softcap),
        ref_logits_ptr=ref_logits,
        labels_ptr=labels,
        ref_statistics_ptr=ref_statistics,
        ref_statistics_stride=ref_statistics.stride(0),
        strengths_ptr=strengths,
        divergences_ptr=divergences,
        divergences_stride=divergences.stride(0),
        ref_row_stride=ref_logits.stride(0),
        beta=float(beta) if kind == "jsd" else None,
        KIND=kind,
    )


def divergence_gradient(
    logits: Tensor, ref_logits: Tensor, labels: Tensor, statistics: Tensor, ref_statistics: Tensor, divergences: Tensor,
    coefficients: Tensor, weights: Tensor, out: Tensor, *, strengths: Tensor | None = None, kind: str = "kl",
    beta: float = 0.5, logit_scale: float = 1.0, softcap: float | None = None,
) -> None:  # fmt: skip
    """Write the derivative of ``coefficient log p(label) + weight divergence`` by the raw products into ``out``, row by row.

    Args:
        logits: as in `divergence_statistics`.
        ref_logits: as in `divergence_statistics`.
        labels: as in `divergence_statistics`.
        statistics: as in `divergence_statistics`.
        ref_statistics: as in `divergence_statistics`.
        divergences: as `divergence_statistics` has written them.
        coefficients: [n] fp32, derivative of the objective by each log p(label).
        weights: [n] fp32, derivative of the objective by each divergence.
        out: [n, V], fp32, bf16 or fp16, rows contiguous; mutated. ``logits`` itself where the dtype is the same.
        strengths: as in `divergence_statistics`.
        kind: as in `divergence_statistics`.
        beta: as in `divergence_statistics`.
        logit_scale: as in `token_statistics`, for both models.
        softcap: as in `token_statistics`, for both models.
    """
    launch_rows(
        divergence_gradient_kernel,
        GRADIENT_CONFIG,
        logits,
        statistics,
        out=out,
        transform=(logit_scale, softcap),
        ref_logits_ptr=ref_logits,
        labels_ptr=labels,
        ref_statistics_ptr=ref_statistics,
        ref_statistics_stride=ref_statistics.stride(0),
        strengths_ptr=strengths,
        mean_scores_ptr=divergences[_reference.MODEL_SIDE if kind == "jsd" else _reference.DIVERGENCE],
        coefficients_ptr=coefficients,
        weights_ptr=weights,
        ref_row_stride=ref_logits.stride(0),
        beta=float(beta) if kind == "jsd" else None,
        KIND=kind,
        OVERLAID=is_overlaid(logits, out),
    )

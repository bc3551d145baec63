"""Row kernels over a chunk of logits and the chunk of a reference: divergence of each row, then the gradient by its logits.

Both read the statistics that `token_statistics` has taken of either chunk; so the logarithms of the sums are known, and each
term of the divergence can be formed without cancellation.
"""

from soul_kernels._launch import tl, triton
from soul_kernels.reference.kl_divergence import FLOOR
from soul_kernels.token_logprob import (
    VECTORS,
    launch_rows,
    load_raw,
    log1p,
    logits_of,
    store_block,
    store_zeros,
    times_slope,
)
from soul_kernels.tokens import IGNORE_INDEX

IGNORED = tl.constexpr(IGNORE_INDEX)
SMALLEST = tl.constexpr(FLOOR)

# Columns a loop turn, warps: no spills for any target. Times on a GPU are still to be measured.
DIVERGENCE_CONFIG = {"BLOCK": 2048, "num_warps": 8}
GRADIENT_CONFIG = {"BLOCK": 2048, "num_warps": 8}


@triton.jit
def _reference_row(statistics_ptr, stride, strengths_ptr, row, HAS_STRENGTHS: tl.constexpr):
    """Maximum, sum, 1 - q and log q of the label in a reference row whose label was lowered, and by how much it was."""
    log_q = tl.load(statistics_ptr + row)
    row_max = tl.load(statistics_ptr + stride + row)
    total = tl.load(statistics_ptr + 2 * stride + row)
    rest = tl.load(statistics_ptr + 3 * stride + row)
    lowered = 0.0
    if HAS_STRENGTHS:
        lowered = tl.load(strengths_ptr + row)
        if lowered != 0.0:  # the others were summed without the label, which keeps exp(-lowered) of its share
            others = rest * total
            at_label = tl.exp(log_q - lowered) * total
            total = others + at_label
            rest = others / total
            log_q = -tl.where(others < at_label, log1p(others / at_label), tl.log(total) - tl.log(at_label))
    return row_max, total, rest, log_q, lowered


@triton.jit
def _both(
    logits_row, ref_row, columns, label, row_max, ref_max, lowered, n_vocab, logit_scale, softcap,
    SCALED: tl.constexpr, CAPPED: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Raw products of a block, and z - max of both distributions."""
    raw = load_raw(logits_row, columns, n_vocab, WHOLE)
    z = logits_of(raw, columns, n_vocab, logit_scale, softcap, SCALED, CAPPED, WHOLE)
    ref_raw = load_raw(ref_row, columns, n_vocab, WHOLE)
    ref_z = logits_of(ref_raw, columns, n_vocab, logit_scale, softcap, SCALED, CAPPED, WHOLE)
    return raw, z - row_max, tl.where(columns == label, ref_z - lowered, ref_z) - ref_max


@triton.jit
def _surprise(log_q):
    """-log(q + 1e-12), accurate for q close to 1 as well: log(q + a) = log q + a / q, up to (a / q)^2."""
    q = tl.exp(log_q)
    return -tl.where(q > 1e-6, log_q + SMALLEST / q, tl.log(q + SMALLEST))


@triton.jit
def _divergence_block(log_p, log_q, SOUL: tl.constexpr):
    """Sums over a block: of the divergence, and of the entropy of the reference."""
    p = tl.exp(log_p)
    q = tl.exp(log_q)
    entropy = tl.sum(tl.where(q > 0.0, -q * log_q, 0.0), 0)
    if SOUL:
        return tl.sum(p * _surprise(log_q), 0), entropy
    else:
        # q (d + exp(-d) - 1), d = log q - log p. Close to 0 by its series: the next term is below 3e-9 of the sum.
        d = tl.where(q > 0.0, log_q - log_p, 0.0)
        series = 1 / 24 - d * (1 / 120 - d * (1 / 720 - d * (1 / 5040 - d * (1 / 40320 - d / 362880))))
        near = q * d * d * (0.5 - d * (1 / 6 - d * series))
        far = q * (d - 1.0) + p
        return tl.sum(tl.where((tl.abs(d) < 0.5) & (q > 0.0), near, far), 0), entropy


@triton.jit(**VECTORS)
def divergence_kernel(
    logits_ptr,  # [n, V] raw products, row_stride elements from row to row
    ref_logits_ptr,  # [n, V] the same of the reference
    labels_ptr,  # [n] int64: -100 is an ignored row
    statistics_ptr,  # [4, n] fp32, from token_statistics
    statistics_stride,
    ref_statistics_ptr,  # [4, n] fp32, the same of the reference
    ref_statistics_stride,
    strengths_ptr,  # [n] fp32: how far the reference's logit of the label is lowered; or None
    divergences_ptr,  # [2, n] fp32: divergence, entropy of the reference
    divergences_stride,
    n_vocab,
    row_stride,
    ref_row_stride,
    logit_scale,
    softcap,
    SCALED: tl.constexpr,
    CAPPED: tl.constexpr,
    HAS_STRENGTHS: tl.constexpr,
    SOUL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the divergence of one row, and the entropy of its reference."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    divergence = 0.0
    entropy = 0.0
    if label != IGNORED:
        label_log_p = tl.load(statistics_ptr + row)
        row_max = tl.load(statistics_ptr + statistics_stride + row)
        log_total = tl.log(tl.load(statistics_ptr + 2 * statistics_stride + row))
        ref_max, ref_total, ref_rest, label_log_q, lowered = _reference_row(
            ref_statistics_ptr, ref_statistics_stride, strengths_ptr, row, HAS_STRENGTHS
        )
        ref_log_total = tl.log(ref_total)
        logits_row = logits_ptr + row * row_stride
        ref_row = ref_logits_ptr + row * ref_row_stride
        lanes = tl.arange(0, BLOCK)
        tail = (n_vocab // BLOCK) * BLOCK
        for start in range(0, n_vocab, BLOCK):
            columns = start + lanes
            if start < tail:
                raw, gap, ref_gap = _both(
                    logits_row, ref_row, columns, label, row_max, ref_max, lowered, n_vocab, logit_scale, softcap,
                    SCALED, CAPPED, True,
                )  # fmt: skip
            else:
                raw, gap, ref_gap = _both(
                    logits_row, ref_row, columns, label, row_max, ref_max, lowered, n_vocab, logit_scale, softcap,
                    SCALED, CAPPED, False,
                )  # fmt: skip
            # At the label, where p may be close to 1, as it was summed without it.
            log_p = tl.where(columns == label, label_log_p, gap - log_total)
            log_q = tl.where(columns == label, label_log_q, ref_gap - ref_log_total)
            of_divergence, of_entropy = _divergence_block(log_p, log_q, SOUL)
            divergence += of_divergence
            entropy += of_entropy
    tl.store(divergences_ptr + row, divergence)
    tl.store(divergences_ptr + divergences_stride + row, entropy)


@triton.jit
def _divergence_gradient_block(
    logits_row, ref_row, out_row, columns, label, row_max, scale, rest, ref_max, ref_log_total, ref_scale,
    label_difference, label_log_q, lowered, coefficient, weight, divergence, n_vocab, logit_scale, softcap,
    SCALED: tl.constexpr, CAPPED: tl.constexpr, SOUL: tl.constexpr, OUT_DTYPE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    raw, gap, ref_gap = _both(
        logits_row, ref_row, columns, label, row_max, ref_max, lowered, n_vocab, logit_scale, softcap, SCALED, CAPPED, WHOLE
    )  # fmt: skip
    p = tl.exp(gap) * scale
    is_label = columns == label
    gradient = coefficient * tl.where(is_label, rest, -p)
    if SOUL:
        log_q = tl.where(is_label, label_log_q, ref_gap - ref_log_total)
        gradient += weight * p * (_surprise(log_q) - divergence)
    else:
        q = tl.exp(ref_gap) * ref_scale
        gradient += weight * tl.where(is_label, label_difference, p - q)
    gradient = times_slope(gradient, raw, logit_scale, softcap, SCALED, CAPPED)
    store_block(out_row, columns, gradient, n_vocab, OUT_DTYPE, WHOLE)


@triton.jit(**VECTORS)
def divergence_gradient_kernel(
    logits_ptr,  # [n, V] raw products, row_stride elements from row to row
    ref_logits_ptr,  # [n, V] the same of the reference
    labels_ptr,  # [n] int64: -100 is an ignored row
    statistics_ptr,  # [4, n] fp32, from token_statistics
    statistics_stride,
    ref_statistics_ptr,  # [4, n] fp32, the same of the reference
    ref_statistics_stride,
    strengths_ptr,  # [n] fp32 or None
    divergences_ptr,  # [2, n] fp32, from divergence_kernel
    coefficients_ptr,  # [n] fp32, derivative of the objective by log p(label)
    weights_ptr,  # [n] fp32, derivative of the objective by the divergence
    out_ptr,  # [n, V], out_stride elements from row to row: derivative by the raw products; may be logits_ptr
    n_vocab,
    row_stride,
    ref_row_stride,
    out_stride,
    logit_scale,
    softcap,
    SCALED: tl.constexpr,
    CAPPED: tl.constexpr,
    HAS_STRENGTHS: tl.constexpr,
    SOUL: tl.constexpr,
    OUT_DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the gradient of one row's divergence by its logits."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    out_row = out_ptr + row * out_stride
    if label != IGNORED:
        coefficient = tl.load(coefficients_ptr + row)
        weight = tl.load(weights_ptr + row)
        divergence = tl.load(divergences_ptr + row)
        row_max = tl.load(statistics_ptr + statistics_stride + row)
        total = tl.load(statistics_ptr + 2 * statistics_stride + row)
        rest = tl.load(statistics_ptr + 3 * statistics_stride + row)
        ref_max, ref_total, ref_rest, label_log_q, lowered = _reference_row(
            ref_statistics_ptr, ref_statistics_stride, strengths_ptr, row, HAS_STRENGTHS
        )
        # p - q of the label. Where p is close to 1 it is (1 - q) - (1 - p), which were summed without the label; where
        # p is small, these two are close to 1, and their difference would lose the digits that p and q have.
        label_p = tl.exp(tl.load(statistics_ptr + row))
        label_difference = tl.where(rest < 0.5, ref_rest - rest, label_p - tl.exp(label_log_q))
        scale = 1.0 / total
        ref_scale = 1.0 / ref_total
        ref_log_total = tl.log(ref_total)
        logits_row = logits_ptr + row * row_stride
        ref_row = ref_logits_ptr + row * ref_row_stride
        lanes = tl.arange(0, BLOCK)
        tail = (n_vocab // BLOCK) * BLOCK
        for start in range(0, tail, BLOCK):
            _divergence_gradient_block(
                logits_row, ref_row, out_row, start + lanes, label, row_max, scale, rest, ref_max, ref_log_total, ref_scale,
                label_difference, label_log_q, lowered, coefficient, weight, divergence, n_vocab, logit_scale, softcap,
                SCALED, CAPPED, SOUL, OUT_DTYPE, True,
            )  # fmt: skip
        if tail < n_vocab:
            _divergence_gradient_block(
                logits_row, ref_row, out_row, tail + lanes, label, row_max, scale, rest, ref_max, ref_log_total, ref_scale,
                label_difference, label_log_q, lowered, coefficient, weight, divergence, n_vocab, logit_scale, softcap,
                SCALED, CAPPED, SOUL, OUT_DTYPE, False,
            )  # fmt: skip
    else:
        store_zeros(out_row, n_vocab, OUT_DTYPE, BLOCK)


def divergence_statistics(
    logits, ref_logits, labels, statistics, ref_statistics, divergences, *, strengths=None, kind="kl", logit_scale=1.0,
    softcap=None,
):  # fmt: skip
    """Fills ``divergences`` [2, n] with the divergence of each row from the reference and the entropy of the reference.

    Args:
        logits: [n, V] fp32, bf16 or fp16, raw products of hidden states and head, rows contiguous.
        ref_logits: [n, V], the same of the reference.
        labels: [n] int64; -100 gives zeros. Only with ``strengths`` does it matter what else they are.
        statistics: [4 or 7, n] fp32, from `token_statistics` of the logits with these labels.
        ref_statistics: the same of the reference.
        divergences: [2, n] fp32, rows contiguous; mutated.
        strengths: [n] fp32, how far the reference's logit of the label is lowered; None: not.
        kind: "kl" or "soul_kl", as in the reference.
        logit_scale: as in `token_statistics`, of both.
        softcap: as in `token_statistics`, of both.
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
        HAS_STRENGTHS=strengths is not None,
        SOUL=kind == "soul_kl",
    )


def divergence_gradient(
    logits, ref_logits, labels, statistics, ref_statistics, divergences, coefficients, weights, out, *, strengths=None,
    kind="kl", logit_scale=1.0, softcap=None,
):  # fmt: skip
    """Fills ``out`` with the derivative by the raw products: of ``coefficient log p(label) + weight divergence``, row by row.

    Args:
        logits: as in `divergence_statistics`.
        ref_logits: as in `divergence_statistics`.
        labels: as in `divergence_statistics`.
        statistics: as in `divergence_statistics`.
        ref_statistics: as in `divergence_statistics`.
        divergences: [2, n] fp32, from `divergence_statistics`.
        coefficients: [n] fp32, derivative of the objective by each log p(label).
        weights: [n] fp32, derivative of the objective by each divergence.
        out: [n, V], fp32, bf16 or fp16, rows contiguous; mutated. ``logits`` itself where the dtype is the same.
        strengths: as in `divergence_statistics`.
        kind: as in `divergence_statistics`.
        logit_scale: as in `token_statistics`, of both.
        softcap: as in `token_statistics`, of both.
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
        divergences_ptr=divergences,
        coefficients_ptr=coefficients,
        weights_ptr=weights,
        ref_row_stride=ref_logits.stride(0),
        HAS_STRENGTHS=strengths is not None,
        SOUL=kind == "soul_kl",
    )

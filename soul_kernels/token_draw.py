"""Row kernels over a chunk of logits: a label drawn from each row, and the gradient of its log-probability in the same read.

Before, `likeliest_statistics` has summed the row. 1 - p of the drawn label must not be lost where it is the likeliest by far,
and nobody knows yet which label that will be: so the sum is kept without the largest term.
"""

from soul_kernels._launch import tl, triton
from soul_kernels.rounding import round_nearest
from soul_kernels.token_logprob import (
    IGNORED,
    STATISTICS_CONFIG,
    VECTORS,
    launch_rows,
    load_raw,
    log1p,
    logits_of,
    store_block,
    store_zeros,
    times_slope,
    transformed,
)

# Columns a loop turn, warps. With blocks of 4096, as the gradient of given labels has, Triton 3.6 takes 154 registers a thread
# for sm_90: one program a multiprocessor, with which nothing overlaps. With these it is 80, and three.
DRAW_CONFIG = {"BLOCK": 2048, "num_warps": 8}


@triton.jit
def _likeliest_block(z, row_max, rest, count):
    """Adds one block to the maximum, to how many logits are equal to it, and to the sum of exp(z - max) over the others."""
    new_max = tl.maximum(row_max, tl.max(z, 0))
    is_max = z == new_max
    rescale = tl.exp(row_max - new_max)
    old = tl.where(row_max == new_max, 0.0, count)  # a maximum that is none any more belongs to the rest
    rest = rescale * (rest + old) + tl.sum(tl.where(is_max, 0.0, tl.exp(z - new_max)), 0)
    return new_max, rest, count - old + tl.sum(tl.where(is_max, 1.0, 0.0), 0)


@triton.jit(**VECTORS)
def likeliest_kernel(
    logits_ptr,  # [n, V] raw products, row_stride elements from row to row
    labels_ptr,  # [n] int64: -100 is an ignored row, anything else one that counts
    statistics_ptr,  # [4, n] fp32: nothing, maximum, sum of exp(z - max), 1 - p of the likeliest label
    statistics_stride,
    n_vocab,
    row_stride,
    logit_scale,
    softcap,
    SCALED: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the sum of one row without its likeliest token."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * row_stride
    row_max = -1.0e30
    rest = 0.0
    count = 0.0
    if tl.load(labels_ptr + row) != IGNORED:
        lanes = tl.arange(0, BLOCK)
        tail = (n_vocab // BLOCK) * BLOCK
        for start in range(0, tail, BLOCK):
            raw = load_raw(row_ptr, start + lanes, n_vocab, True)
            z = logits_of(raw, start + lanes, n_vocab, logit_scale, softcap, SCALED, CAPPED, True)
            row_max, rest, count = _likeliest_block(z, row_max, rest, count)
        if tail < n_vocab:
            raw = load_raw(row_ptr, tail + lanes, n_vocab, False)
            z = logits_of(raw, tail + lanes, n_vocab, logit_scale, softcap, SCALED, CAPPED, False)
            row_max, rest, count = _likeliest_block(z, row_max, rest, count)
    total = rest + count
    tl.store(statistics_ptr + statistics_stride + row, row_max)
    tl.store(statistics_ptr + 2 * statistics_stride + row, total)
    tl.store(statistics_ptr + 3 * statistics_stride + row, (rest + (count - 1.0)) / total)


@triton.jit
def _of_drawn(z, row_max, total, likeliest_rest):
    """Log p and 1 - p of a drawn label."""
    gap = row_max - z
    logp = -tl.where(gap == 0.0, log1p(likeliest_rest * total), gap + tl.log(total))
    return logp, tl.where(gap == 0.0, likeliest_rest, 1.0 - tl.exp(-gap) / total)


@triton.jit
def _draw_block(
    logits_row, out_row, columns, row_max, total, likeliest_rest, coefficient, scale, target,
    running, chosen, logp, last, last_raw, n_vocab, logit_scale, softcap,
    SCALED: tl.constexpr, CAPPED: tl.constexpr, OUT_DTYPE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    raw = load_raw(logits_row, columns, n_vocab, WHOLE)
    z = logits_of(raw, columns, n_vocab, logit_scale, softcap, SCALED, CAPPED, WHOLE)
    exp = tl.exp(z - row_max)
    gradient = -exp * scale
    before = running
    running = running + tl.sum(exp, 0)
    if chosen < 0:
        if running > target:  # here: the only block that is scanned
            passed = (before + tl.cumsum(exp, 0) > target) & (exp > 0.0)
            found = tl.min(tl.where(passed, columns, n_vocab), 0)
            if found < n_vocab:  # unless the scan, which adds in another order, falls short of the sum
                chosen = found
                z_found = tl.sum(tl.where(columns == found, z, 0.0), 0)
                logp, rest = _of_drawn(z_found, row_max, total, likeliest_rest)
                gradient = tl.where(columns == found, coefficient * rest, gradient)
        if running > 0.999 * total:  # towards the end of the row: the last label that can be drawn
            found = tl.max(tl.where(exp > 0.0, columns, -1), 0)
            if found >= 0:
                last = found
                last_raw = tl.sum(tl.where(columns == found, raw, 0.0), 0)
    gradient = times_slope(gradient, raw, logit_scale, softcap, SCALED, CAPPED)
    store_block(out_row, columns, gradient, n_vocab, OUT_DTYPE, WHOLE)
    return running, chosen, logp, last, last_raw


@triton.jit(**VECTORS)
def draw_kernel(
    logits_ptr,  # [n, V] raw products, row_stride elements from row to row
    labels_ptr,  # [n] int64: -100 is an ignored row; elsewhere the label that was drawn is written
    uniforms_ptr,  # [n] fp32 in [0, 1)
    statistics_ptr,  # [4, n] fp32, from likeliest_kernel; log p of the drawn label is written
    statistics_stride,
    coefficients_ptr,  # [n] fp32, derivative of the loss by log p of the drawn label
    out_ptr,  # [n, V], out_stride elements from row to row: derivative by the raw products; may be logits_ptr
    n_vocab,
    row_stride,
    out_stride,
    logit_scale,
    softcap,
    SCALED: tl.constexpr,
    CAPPED: tl.constexpr,
    OUT_DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Draw the label of one row, and write the gradient of its log-probability."""
    row = tl.program_id(0).to(tl.int64)
    coefficient = tl.load(coefficients_ptr + row)
    row_max = tl.load(statistics_ptr + statistics_stride + row)
    total = tl.load(statistics_ptr + 2 * statistics_stride + row)
    likeliest_rest = tl.load(statistics_ptr + 3 * statistics_stride + row)
    target = tl.load(uniforms_ptr + row) * total
    scale = coefficient / total
    logits_row = logits_ptr + row * row_stride
    out_row = out_ptr + row * out_stride
    lanes = tl.arange(0, BLOCK)
    tail = (n_vocab // BLOCK) * BLOCK
    running = 0.0
    chosen = -1
    logp = 0.0
    last = -1
    last_raw = 0.0
    if tl.load(labels_ptr + row) != IGNORED:
        for start in range(0, tail, BLOCK):
            running, chosen, logp, last, last_raw = _draw_block(
                logits_row, out_row, start + lanes, row_max, total, likeliest_rest, coefficient, scale, target,
                running, chosen, logp, last, last_raw, n_vocab, logit_scale, softcap,
                SCALED, CAPPED, OUT_DTYPE, True,
            )  # fmt: skip
        if tail < n_vocab:
            running, chosen, logp, last, last_raw = _draw_block(
                logits_row, out_row, tail + lanes, row_max, total, likeliest_rest, coefficient, scale, target,
                running, chosen, logp, last, last_raw, n_vocab, logit_scale, softcap,
                SCALED, CAPPED, OUT_DTYPE, False,
            )  # fmt: skip
        if chosen < 0:  # the sums of this kernel, in another order than the total, stay below a target close to it
            chosen = last
            logp = float("nan")  # and so it remains for a row of NaN, which has no last label
            if last >= 0:
                z = transformed(last_raw, logit_scale, softcap, SCALED, CAPPED)
                logp, rest = _of_drawn(z, row_max, total, likeliest_rest)
                gradient = times_slope(coefficient * rest, last_raw, logit_scale, softcap, SCALED, CAPPED)
                tl.debug_barrier()  # other threads have stored the block that holds it, and no value orders two stores
                tl.store(out_row + last, round_nearest(gradient, OUT_DTYPE))
        # All threads have read this label, and one overwrites it, without a barrier. No other can still be waiting for its
        # read: it had to branch on the label before it took part in the row's sums, and what is stored here depends on those
        # sums. One warp needs no more, though its sums are shuffles, which order no memory accesses. In place, a block's stores
        # come after its loads for the same reason: each value is computed from the one that it overwrites.
        tl.store(labels_ptr + row, tl.where(chosen < 0, IGNORED, chosen).to(tl.int64))
    else:
        store_zeros(out_row, n_vocab, OUT_DTYPE, BLOCK)
    tl.store(statistics_ptr + row, logp)


def likeliest_statistics(logits, labels, statistics, *, logit_scale=1.0, softcap=None):
    """What `draw_labels` needs to know of each row: fills ``statistics`` with row maximum, sum of exp(z - max) and 1 - p of the
    likeliest label; its first row is left alone.

    Args:
        logits: as in `token_statistics`.
        labels: [n] int64, -100 where a row is ignored.
        statistics: [4, n] fp32, rows contiguous; mutated.
        logit_scale: as in `token_statistics`.
        softcap: as in `token_statistics`.
    """
    launch_rows(
        likeliest_kernel,
        STATISTICS_CONFIG,
        logits,
        statistics,
        transform=(logit_scale, softcap),
        labels_ptr=labels,
    )


def draw_labels(logits, labels, uniforms, statistics, coefficients, out, *, logit_scale=1.0, softcap=None):
    """Draws a label from each row by inverse CDF and fills ``out`` as `token_gradient` would for it, in one read of the logits.

    Args:
        logits: as in `token_statistics`.
        labels: [n] int64, -100 where a row is ignored; elsewhere the drawn labels are written. Mutated.
        uniforms: [n] fp32 in [0, 1): the label is the first v with ``p_0 + ... + p_v > u`` and ``p_v > 0``.
        statistics: [4, n] fp32, from `likeliest_statistics`; log p of the drawn labels is written to its first row. Mutated.
        coefficients: [n] fp32, derivative of the loss by each log p(label).
        out: as in `token_gradient`; mutated.
        logit_scale: as in `token_statistics`.
        softcap: as in `token_statistics`.
    """
    launch_rows(
        draw_kernel,
        DRAW_CONFIG,
        logits,
        statistics,
        out=out,
        transform=(logit_scale, softcap),
        labels_ptr=labels,
        uniforms_ptr=uniforms,
        coefficients_ptr=coefficients,
    )

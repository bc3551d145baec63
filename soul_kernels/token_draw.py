"""Row kernels over a chunk of logits: a label drawn from each row, and the gradient of its log-probability in the same read.

`likeliest_statistics` must sum the row first. Where the drawn label is the likeliest by far, its 1 - p must not be lost to
cancellation. The label is not known before it is drawn, so a sum is kept without the largest terms. Its lanes add up
independently of each other. A draw by inverse CDF needs the sum of each block in turn, until the label is drawn. The top of
``token_logprob.py`` explains how row kernels are built.
"""

from typing import NamedTuple

from torch import Tensor

from soul_kernels._launch import tl, triton
from soul_kernels.rounding import round_nearest
from soul_kernels.token_logprob import (
    IGNORED,
    LOGP,
    ONE_MINUS_P,
    ROW_MAX,
    STATISTICS_CONFIG,
    TOTAL,
    VECTORS,
    ColumnBlock,
    Transform,
    by_lane,
    is_overlaid,
    launch_rows,
    load_logits,
    log1p,
    row_of_program,
    statistic,
    store_block,
    store_zeros,
    times_slope,
    transformed,
    zeros_of_lanes,
)

# Columns per loop iteration, warps. With blocks of 4096, as in `gradient_kernel`, Triton 3.6 takes 154 registers a thread for
# sm_90: one program fits on a multiprocessor, and nothing overlaps with it. With this choice it takes 80, and three fit.
DRAW_CONFIG = {"BLOCK": 2048, "num_warps": 8}


class LikeliestSums(NamedTuple):
    """Sums of each lane over the columns that have been read, [LANES], with e = exp(z - row_max)."""

    row_max: tl.tensor  # maximum of the lane's logits
    total: tl.tensor  # sum of e
    rest: tl.tensor  # sum of e over the logits below the maximum


class DrawFactors(NamedTuple):
    """Numbers of a row that are known before its label is drawn, with e = exp(z - row_max)."""

    row_max: tl.tensor
    total: tl.tensor  # sum of e
    likeliest_rest: tl.tensor  # 1 - p of the likeliest label
    target: tl.tensor  # the drawn label is the first at which the running sum of e exceeds this
    coefficient: tl.tensor  # derivative of the loss by log p of the drawn label
    scale: tl.tensor  # coefficient / total


class Draw(NamedTuple):
    """State of the draw after the blocks of a row that have been read."""

    running: tl.tensor  # sum of exp(z - row_max) over these blocks, up to the one with the drawn label
    chosen: tl.tensor  # the drawn label; -1: not drawn yet
    logp: tl.tensor  # log-probability of ``chosen``
    last: tl.tensor  # the last label with p > 0, searched for towards the end of the row; -1: none yet
    last_raw: tl.tensor  # raw product of ``last``


@triton.jit
def _add_block(lanes, row, block, transform):
    """Return the `LikeliestSums` of each lane with one more block added."""
    raw, z = load_logits(row.logits, block, transform)
    z = by_lane(z, lanes.rest)
    row_max = tl.maximum(lanes.row_max, tl.max(z, 1))
    rescale = tl.exp(lanes.row_max - row_max)
    rest = tl.where(lanes.row_max == row_max, lanes.rest, lanes.total)  # logits equal to a former maximum belong to the rest
    exp = tl.exp(z - row_max[:, None])
    return LikeliestSums(
        row_max=row_max,
        total=rescale * lanes.total + tl.sum(exp, 1),
        rest=rescale * rest + tl.sum(tl.where(z == row_max[:, None], 0.0, exp), 1),
    )


@triton.jit(**VECTORS)
def likeliest_kernel(
    logits_ptr,  # [n, V] raw products, row_stride elements from row to row
    labels_ptr,  # [n] int64: -100 is an ignored row; other values are not looked at
    statistics_ptr,  # [4, n] fp32: not written, maximum, sum of exp(z - max), 1 - p of the likeliest label
    statistics_stride,
    n_vocab,
    row_stride,
    logit_scale,  # None: not scaled
    softcap,  # None: not capped
    BLOCK: tl.constexpr,
):
    """Write the statistics of one row: see `likeliest_statistics`."""
    row = row_of_program(logits_ptr, row_stride, labels_ptr, n_vocab, BLOCK)
    transform = Transform(logit_scale=logit_scale, softcap=softcap)
    row_max = -1.0e30
    rest = 0.0
    count = 0.0
    if row.label != IGNORED:
        zeros = zeros_of_lanes(row, BLOCK)
        lanes = LikeliestSums(row_max=zeros - 1.0e30, total=zeros, rest=zeros)
        columns = tl.arange(0, BLOCK)
        for start in range(0, row.tail, BLOCK):
            lanes = _add_block(lanes, row, ColumnBlock(start + columns, None), transform)
        if row.tail < n_vocab:
            columns += row.tail
            lanes = _add_block(lanes, row, ColumnBlock(columns, columns < n_vocab), transform)
        row_max = tl.max(lanes.row_max, 0)
        is_max = lanes.row_max == row_max
        rest = tl.sum(tl.where(is_max, lanes.rest, tl.exp(lanes.row_max - row_max) * lanes.total), 0)
        # Each logit that equals the maximum adds exp(0) = 1 to the total of a lane, and nothing to its rest.
        count = tl.sum(tl.where(is_max, tl.floor(lanes.total - lanes.rest + 0.5), 0.0), 0)
    total = rest + count
    tl.store(statistic(statistics_ptr, statistics_stride, row, ROW_MAX), row_max)
    tl.store(statistic(statistics_ptr, statistics_stride, row, TOTAL), total)
    tl.store(statistic(statistics_ptr, statistics_stride, row, ONE_MINUS_P), (rest + (count - 1.0)) / total)


@triton.jit
def _of_drawn(z, factors):
    """Return log p and 1 - p of a drawn label with the logit ``z``."""
    gap = factors.row_max - z
    logp = -tl.where(gap == 0.0, log1p(factors.likeliest_rest * factors.total), gap + tl.log(factors.total))
    return logp, tl.where(gap == 0.0, factors.likeliest_rest, 1.0 - tl.exp(-gap) / factors.total)


@triton.jit
def _draw_block(draw, row, out_row, start, block, factors, transform, OVERLAID: tl.constexpr):
    """Write the gradient of a block; return the `Draw` of the row after that block."""
    raw, z = load_logits(row.logits, block, transform)
    exp = tl.exp(z - factors.row_max)
    gradient = -exp * factors.scale
    running = draw.running
    chosen = draw.chosen
    logp = draw.logp
    last = draw.last
    last_raw = draw.last_raw
    if chosen < 0:  # after the draw there are no sums, for which threads would wait for each other
        running += tl.sum(exp, 0)
        if running > factors.target:  # the label is in this block, the only one that is scanned
            passed = (draw.running + tl.cumsum(exp, 0) > factors.target) & (exp > 0.0)
            column = tl.min(tl.where(passed, block.columns, row.n_vocab), 0)
            if column < row.n_vocab:  # the scan adds in another order and may fall short of the sum
                chosen = column
                z_chosen = tl.sum(tl.where(block.columns == column, z, 0.0), 0)
                logp, rest = _of_drawn(z_chosen, factors)
                gradient = tl.where(block.columns == column, factors.coefficient * rest, gradient)
        if running > 0.999 * factors.total:  # towards the end of the row: look for the last label with p > 0
            column = tl.max(tl.where(exp > 0.0, block.columns, -1), 0)
            if column >= 0:
                last = column
                last_raw = tl.sum(tl.where(block.columns == column, raw, 0.0), 0)
    store_block(out_row, block, times_slope(gradient, raw, transform), start, OVERLAID)
    return Draw(running=running, chosen=chosen, logp=logp, last=last, last_raw=last_raw)


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
    logit_scale,  # None: not scaled
    softcap,  # None: not capped
    OVERLAID: tl.constexpr,  # as in token_logprob.gradient_kernel
    BLOCK: tl.constexpr,
):
    """Draw the label of one row, and write the gradient of its log-probability."""
    row = row_of_program(logits_ptr, row_stride, labels_ptr, n_vocab, BLOCK)
    transform = Transform(logit_scale=logit_scale, softcap=softcap)
    coefficient = tl.load(coefficients_ptr + row.index)
    total = tl.load(statistic(statistics_ptr, statistics_stride, row, TOTAL))
    factors = DrawFactors(
        row_max=tl.load(statistic(statistics_ptr, statistics_stride, row, ROW_MAX)),
        total=total,
        likeliest_rest=tl.load(statistic(statistics_ptr, statistics_stride, row, ONE_MINUS_P)),
        target=tl.load(uniforms_ptr + row.index) * total,
        coefficient=coefficient,
        scale=coefficient / total,
    )
    out_row = out_ptr + row.index * out_stride
    logp = 0.0
    if row.label != IGNORED:
        draw = Draw(running=0.0, chosen=-1, logp=0.0, last=-1, last_raw=0.0)
        lanes = tl.arange(0, BLOCK)
        for start in range(0, row.tail, BLOCK):
            block = ColumnBlock(start + lanes, None)
            draw = _draw_block(draw, row, out_row, start, block, factors, transform, OVERLAID)
        if row.tail < n_vocab:
            block = ColumnBlock(row.tail + lanes, row.tail + lanes < n_vocab)
            draw = _draw_block(draw, row, out_row, row.tail, block, factors, transform, OVERLAID)
        chosen = draw.chosen
        logp = draw.logp
        if chosen < 0:  # this kernel adds in another order than the total was, and may stay below a target close to it
            chosen = draw.last
            logp = float("nan")  # stays NaN for a row of NaN, which has no last label
            if draw.last >= 0:
                logp, rest = _of_drawn(transformed(draw.last_raw, transform), factors)
                gradient = times_slope(coefficient * rest, draw.last_raw, transform)
                tl.debug_barrier()  # other threads have stored the block that holds it, and no value orders two stores
                tl.store(out_row + draw.last, round_nearest(gradient, out_ptr.dtype.element_ty))
        # All threads have read this label, and one overwrites it, without a barrier. No other thread can still be waiting for
        # its read: it had to branch on the label before it took part in the row's sums, and the value stored here depends on
        # those sums. A single warp needs no barrier either, though its sums are shuffles, which order no memory accesses. When
        # the gradient overwrites the logits, a block's stores come after its loads for the same reason: each value is computed
        # from the one that it overwrites; for a narrower dtype see `wait_for_reads`.
        tl.store(labels_ptr + row.index, tl.where(chosen < 0, IGNORED, chosen).to(tl.int64))
    else:
        store_zeros(out_row, n_vocab, tl.arange(0, BLOCK))
    tl.store(statistic(statistics_ptr, statistics_stride, row, LOGP), logp)


def likeliest_statistics(
    logits: Tensor, labels: Tensor, statistics: Tensor, *, logit_scale: float = 1.0, softcap: float | None = None
) -> None:
    """Write the statistics that `draw_labels` needs of each row into ``statistics``.

    They are the row's maximum, the sum of exp(z - max) and 1 - p of the likeliest label, in the rows `ROW_MAX`, `TOTAL` and
    `ONE_MINUS_P`. The first row, `LOGP`, is not written: `draw_labels` fills it.

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


def draw_labels(
    logits: Tensor, labels: Tensor, uniforms: Tensor, statistics: Tensor, coefficients: Tensor, out: Tensor, *,
    logit_scale: float = 1.0, softcap: float | None = None,
) -> None:  # fmt: skip
    """Draw a label from each row by inverse CDF, and write the gradient of its log-probability, in one read of the logits.

    Args:
        logits: as in `token_statistics`.
        labels: [n] int64, -100 where a row is ignored; elsewhere the drawn labels are written. Mutated.
        uniforms: [n] fp32 in [0, 1): the label is the first v with ``p_0 + ... + p_v > u`` and ``p_v > 0``.
        statistics: [4, n] fp32, from `likeliest_statistics`; log p of the drawn labels is written to its first row. Mutated.
        coefficients: [n] fp32, derivative of the loss by each log p(label).
        out: receives the gradient, as in `token_gradient`; mutated.
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
        OVERLAID=is_overlaid(logits, out),
    )

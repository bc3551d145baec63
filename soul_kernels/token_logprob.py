"""Row kernels over a chunk of logits: the statistics of each row, and then the gradient with respect to its logits.

How the file works. A chunk is a matrix [n, V] of raw products of hidden states and a language-model head. One program works on
one row of it, ``BLOCK`` columns at a time. It scales and caps the raw products in registers: logits are never stored.
`statistics_kernel` reads a row once. `gradient_kernel` reads the row again and writes the derivative by the raw products. There
are two kernels because the derivative of the objective by a row's log-probability, which multiplies the row's gradient, may
depend on the log-probabilities of other rows. Where it does not, `statistics_gradient_kernel` does both, by the same device
functions.

Statistics are sums over a row. A block is divided into lanes: a lane is the columns that one 16-byte access loads, and so one
thread has all of them. Each lane keeps a maximum of its own and sums relative to it, in registers. Only at the end of the row
do threads exchange anything: the lanes' sums are made relative to the row's maximum, and added up. Within the loop there is no
barrier and no shuffle, and one exponential a lane beside one a column.

``token_draw.py`` and ``kl_divergence.py`` are built from the same device functions. `row_of_program` begins every row kernel,
`load_logits` reads a block, `by_lane` divides it into lanes, `store_block` writes one, `launch_rows` launches.

Values that are passed on together are NamedTuples. Where a NamedTuple is assigned or returned, Triton 3.6 turns the numbers in
it into tensors, but leaves None alone. So a choice that is made at compile time is either an argument of its own (``ALL``) or a
value that may be None (a mask, a scale, a cap). A device function never returns a tuple that may hold None.

Safe to change: the two configurations. ``make test-compile`` checks registers, spills, barriers and the width of accesses.
These must stay:

* Whole blocks are accessed without a mask. With one, accesses would no longer be 16 bytes wide.
* A lane has no more columns than an access. Otherwise its columns lie in several threads, which then exchange them.
* ``rest`` is summed without the label. Otherwise 1 - p(label) is lost where p(label) is close to 1.
* The initial maximum is finite. Otherwise its difference to a masked entry, -inf, would be NaN.
* The row index has 64 bits. ``n * V`` may exceed 2^31.
* A gradient that overwrites the logits is stored in rising order of columns, after `wait_for_reads`.
"""

from typing import Any, NamedTuple

from torch import Tensor

from soul_kernels._launch import launch, tl, triton
from soul_kernels.reference import token_logprob as _reference
from soul_kernels.rounding import round_nearest
from soul_kernels.tokens import IGNORE_INDEX

# Global numbers that a kernel reads must be constexpr.
IGNORED = tl.constexpr(IGNORE_INDEX)
# Rows of the statistics of a chunk.
LOGP = tl.constexpr(_reference.LOGP)
ROW_MAX = tl.constexpr(_reference.ROW_MAX)
TOTAL = tl.constexpr(_reference.TOTAL)
ONE_MINUS_P = tl.constexpr(_reference.ONE_MINUS_P)
HIT = tl.constexpr(_reference.HIT)
ENTROPY = tl.constexpr(_reference.ENTROPY)
VARIANCE = tl.constexpr(_reference.VARIANCE)

# Columns per loop iteration, warps: no spills with Triton 3.6 and 3.9. The statistics take 24 to 52 registers, so two to four
# programs fit on a multiprocessor. Times on a GPU are still to be measured.
STATISTICS_CONFIG = {"BLOCK": 4096, "num_warps": 16}
GRADIENT_CONFIG = {"BLOCK": 4096, "num_warps": 8}


# Vectors with one number per row. A chunk may begin anywhere in them, and kernels specialized on their alignment would be
# compiled again and again.
VECTORS = {
    "do_not_specialize": ["statistics_stride", "ref_statistics_stride", "divergences_stride"],
    "do_not_specialize_on_alignment": [
        "labels_ptr", "statistics_ptr", "ref_statistics_ptr", "strengths_ptr", "divergences_ptr", "mean_scores_ptr",
        "coefficients_ptr", "weights_ptr", "uniforms_ptr", "means_ptr", "lse_coefficients_ptr", "mean_coefficients_ptr",
    ],
}  # fmt: skip


class Row(NamedTuple):
    """The row that a program works on."""

    index: tl.tensor  # int64
    label: tl.tensor  # int64
    logits: tl.tensor  # pointer to its first raw product
    n_vocab: tl.tensor  # number of its columns
    tail: tl.tensor  # the first column that lies in no whole block
    label_block: tl.tensor  # the first column of the block that holds the label
    others: tl.tensor  # number of columns of the whole blocks, without that block


class ColumnBlock(NamedTuple):
    """Consecutive columns of a row that a program works on at once."""

    columns: tl.tensor  # [BLOCK] or [1, BLOCK] int32
    mask: "tl.tensor | None"  # the same shape, bool, the columns within the vocabulary; None where all are


class Transform(NamedTuple):
    """Scale and cap of the logits, which are ``softcap tanh(logit_scale z / softcap)`` for raw products z."""

    logit_scale: "tl.tensor | None"  # None: not scaled
    softcap: "tl.tensor | None"  # None: not capped


class Addend(NamedTuple):
    """The derivative by the mean logit, which is added to the gradient of every column, the label's included."""

    share: "tl.tensor | None"  # coefficient of the mean / number of columns; None: nothing is added
    class_weights: "tl.tensor | None"  # pointer to the factors of the columns in the mean; None: all are 1


class RowSums(NamedTuple):
    """Sums over columns of a row with e = exp(z - row_max): of each lane, [LANES], or of the whole row, numbers."""

    row_max: tl.tensor  # maximum of the logits of these columns; in `_relative_to` also a higher one
    rest: tl.tensor  # sum of e over the columns, without the label
    sum1: tl.tensor  # sum of e (z - row_max) over them
    sum2: tl.tensor  # sum of e (z - row_max)^2 over them


class RowStatistics(NamedTuple):
    """The statistics of a row, in the order in which they are stored."""

    logp: tl.tensor
    row_max: tl.tensor
    total: tl.tensor
    one_minus_p: tl.tensor
    hit: tl.tensor
    entropy: tl.tensor
    variance: tl.tensor


class GradientFactors(NamedTuple):
    """Numbers of a row from which the gradient of its log-probability is computed."""

    row_max: tl.tensor
    scale: tl.tensor  # coefficient / sum of exp(z - row_max)
    at_label: tl.tensor  # coefficient (1 - p(label)), the derivative by the label's logit


@triton.jit
def row_of_program(logits_ptr, row_stride, labels_ptr, n_vocab, BLOCK: tl.constexpr):
    """Return the `Row` of this program."""
    index = tl.program_id(0).to(tl.int64)  # before it is multiplied by the stride: n * V may exceed 2^31
    label = tl.load(labels_ptr + index)
    logits = logits_ptr + index * row_stride
    tail = (n_vocab // BLOCK) * BLOCK
    label_block = (label // BLOCK * BLOCK).to(tl.int32)
    others = tail - tl.where(label_block < tail, BLOCK, 0)
    return Row(index, label, logits, n_vocab, tail, label_block, others)


@triton.jit
def statistic(statistics_ptr, stride, row, WHICH: tl.constexpr):
    """Return the pointer to one of a row's statistics, which is `LOGP`, `ROW_MAX`, ..."""
    return statistics_ptr + WHICH * stride + row.index


@triton.jit
def log1p_of_small(x):
    """Return log(1 + x) for x between -1/2 and 1."""
    s = x / (2.0 + x)  # log(1 + x) = 2 atanh(s), and |s| <= 1/3: the next term is below 2e-8
    s2 = s * s
    series = 1.0 + s2 * (1 / 3 + s2 * (1 / 5 + s2 * (1 / 7 + s2 * (1 / 9 + s2 * (1 / 11 + s2 * (1 / 13 + s2 / 15))))))
    return 2.0 * s * series


@triton.jit
def log1p(x):
    """Return log(1 + x) of a scalar x >= 0; ``tl.log`` alone loses small x, where p(label) is close to 1."""
    return tl.where(x <= 1.0, log1p_of_small(x), tl.log(1.0 + x))


@triton.jit
def transformed(z, transform):
    """Return the logits of raw products."""
    if transform.logit_scale is not None:
        z = z * transform.logit_scale
    if transform.softcap is not None:
        s = tl.exp(tl.abs(z) * (-2.0 / transform.softcap))
        z = tl.where(z < 0, -transform.softcap, transform.softcap) * (1.0 - s) / (1.0 + s)
    return z


@triton.jit
def times_slope(gradient, raw, transform):
    """Return the gradient by the raw products from that by the logits; 1 - tanh^2 is computed without the subtraction."""
    if transform.softcap is not None:
        z = raw if transform.logit_scale is None else raw * transform.logit_scale
        s = tl.exp(tl.abs(z) * (-2.0 / transform.softcap))
        gradient = gradient * (4.0 * s / ((1.0 + s) * (1.0 + s)))
    if transform.logit_scale is not None:
        gradient = gradient * transform.logit_scale
    return gradient


@triton.jit
def load_logits(row_ptr, block, transform):
    """Return the raw products of a block in fp32, and its logits, which are -inf beyond the vocabulary."""
    if block.mask is None:  # only an unmasked access is 16 bytes wide
        raw = tl.load(row_ptr + block.columns).to(tl.float32)
        return raw, transformed(raw, transform)
    else:
        raw = tl.load(row_ptr + block.columns, mask=block.mask, other=0.0).to(tl.float32)
        z = transformed(raw, transform)
        return raw, tl.where(block.mask, z, -float("inf"))  # masked after the cap, which would turn -inf into -softcap


@triton.jit
def wait_for_reads(start, BLOCK: tl.constexpr):
    """Wait, before the gradient of the block at ``start`` is stored, for the reads of other threads that it would overtake.

    The gradient overwrites the logits, with half the bytes an element: that of column c lies in the bytes of raw product c / 2.
    So the gradient of block k overwrites raw products of blocks k / 2 to (k + 1) / 2. These come before block k, except for k =
    0; but warps run ahead of each other, and a barrier must lie between their loads and the store. One in block b, after its
    loads, serves the stores of all blocks up to 2 b + 1. So it takes one in each of the blocks 0, 2, 6, 14, 30, ..., which are
    those for which k + 2 is a power of two: 5 barriers in a row of 128256.
    """
    number = start // BLOCK + 2
    if (number & (number - 1)) == 0:
        tl.debug_barrier()


@triton.jit
def store_block(out_row, block, values, start, OVERLAID: tl.constexpr):
    """Store the block that begins at column ``start``, rounded to nearest; for ``OVERLAID`` see `wait_for_reads`."""
    rounded = round_nearest(values, out_row.dtype.element_ty)
    if OVERLAID:  # at the last moment: threads that wait earlier hold more values meanwhile, in 10 to 45 registers more
        wait_for_reads(start, block.columns.numel)
    tl.store(out_row + block.columns, rounded, mask=block.mask)


@triton.jit
def store_zeros(out_row, n_vocab, lanes):
    """Store zeros, the gradient of an ignored row, whatever its logits hold; ``lanes`` are the columns of the first block."""
    zeros = tl.zeros(lanes.shape, out_row.dtype.element_ty)
    for start in range(0, n_vocab, lanes.numel):
        tl.store(out_row + start + lanes, zeros, mask=start + lanes < n_vocab)


@triton.jit
def zeros_of_lanes(row, BLOCK: tl.constexpr):
    """Return a zero for each lane, [LANES] fp32."""
    WIDTH: tl.constexpr = 128 // row.logits.dtype.element_ty.primitive_bitwidth  # columns of a 16-byte access
    return tl.zeros([BLOCK // WIDTH], tl.float32)


@triton.jit
def by_lane(x, sums):
    """Return values of a block [BLOCK] by lane, [LANES, BLOCK / LANES], given any sums of the lanes [LANES]."""
    return tl.reshape(x, [sums.shape[0], x.shape[0] // sums.shape[0]])


@triton.jit
def other_block(row, start, BLOCK: tl.constexpr):
    """Return where the block at ``start`` begins: ``start`` counts columns without those of the label's block."""
    return start + tl.where(start < row.label_block, 0, BLOCK)


@triton.jit
def _relative_to(sums, row_max, ALL: tl.constexpr):
    """Return the same sums relative to another maximum, which is not below theirs."""
    shift = tl.maximum(sums.row_max - row_max, -200.0)  # exp(-200) is 0, and squares stay finite
    rescale = tl.exp(shift)
    sum1 = sums.sum1
    sum2 = sums.sum2
    if ALL:
        sum2 = rescale * (sum2 + shift * (2.0 * sum1 + shift * sums.rest))
        sum1 = rescale * (sum1 + shift * sums.rest)
    return RowSums(row_max=row_max, rest=rescale * sums.rest, sum1=sum1, sum2=sum2)


@triton.jit
def _add_block(lanes, row, block, transform, LABEL: tl.constexpr, ALL: tl.constexpr):
    """Return the `RowSums` of each lane with one more block added, which may hold the label if ``LABEL``.

    Without ``ALL`` the last two sums do not change.
    """
    raw, z = load_logits(row.logits, block, transform)
    if LABEL:
        z = tl.where(block.columns == row.label, -float("inf"), z)
    z = by_lane(z, lanes.rest)
    sums = _relative_to(lanes, tl.maximum(lanes.row_max, tl.max(z, 1)), ALL)
    gap = z - sums.row_max[:, None]
    exp = tl.exp(gap)
    sum1 = sums.sum1
    sum2 = sums.sum2
    if ALL:
        gap = tl.maximum(gap, -200.0)  # 0 times -inf is NaN
        sum1 += tl.sum(exp * gap, 1)
        sum2 += tl.sum(exp * gap * gap, 1)
    return RowSums(row_max=sums.row_max, rest=sums.rest + tl.sum(exp, 1), sum1=sum1, sum2=sum2)


@triton.jit
def sums_without_label(row, transform, ALL: tl.constexpr, BLOCK: tl.constexpr):
    """Return the `RowSums` of a row, maximum included, over all columns but the label's; without ``ALL`` the last two are 0.

    The label's block comes after the other whole ones, so that their columns need not be compared with the label.
    """
    zeros = zeros_of_lanes(row, BLOCK)
    # The first maximum is finite: -inf - -inf would be NaN.
    lanes = RowSums(row_max=zeros - 1.0e30, rest=zeros, sum1=zeros, sum2=zeros)
    columns = tl.arange(0, BLOCK)
    for start in range(0, row.others, BLOCK):
        lanes = _add_block(lanes, row, ColumnBlock(other_block(row, start, BLOCK) + columns, None), transform, False, ALL)
    if row.others < row.tail:
        lanes = _add_block(lanes, row, ColumnBlock(row.label_block + columns, None), transform, True, ALL)
    if row.tail < row.n_vocab:
        columns += row.tail
        lanes = _add_block(lanes, row, ColumnBlock(columns, columns < row.n_vocab), transform, True, ALL)
    lanes = _relative_to(lanes, tl.max(lanes.row_max, 0), ALL)
    return RowSums(row_max=lanes.row_max, rest=tl.sum(lanes.rest, 0), sum1=tl.sum(lanes.sum1, 0), sum2=tl.sum(lanes.sum2, 0))


@triton.jit
def _largest_before_label(row, transform, BLOCK: tl.constexpr):
    """Return the largest logit to the left of the label."""
    lanes = tl.arange(0, BLOCK)
    largest = tl.full([BLOCK], -float("inf"), tl.float32)
    for start in range(0, row.label.to(tl.int32), BLOCK):
        columns = start + lanes
        raw, z = load_logits(row.logits, ColumnBlock(columns, columns < row.label), transform)
        largest = tl.maximum(largest, z)
    return tl.max(largest, 0)


@triton.jit
def _row_statistics(row, transform, ALL: tl.constexpr, BLOCK: tl.constexpr):
    """Return the `RowStatistics` of a row, in one read of it; without ``ALL`` the last three are 0."""
    row_max = -1.0e30
    logp = 0.0
    total = 0.0
    one_minus_p = 0.0
    hit = 0.0
    entropy = 0.0
    variance = 0.0
    if (row.label >= 0) & (row.label < row.n_vocab):
        at_label = transformed(tl.load(row.logits + row.label).to(tl.float32), transform)
        others = sums_without_label(row, transform, ALL, BLOCK)
        row_max = tl.maximum(others.row_max, at_label)
        sums = _relative_to(others, row_max, ALL)
        gap = row_max - at_label
        exp_label = tl.exp(-gap)
        total = sums.rest + exp_label
        one_minus_p = sums.rest / total
        # If the label is the likeliest token, log1p of the rest is accurate. If not, another token adds exp(0) = 1 to the rest,
        # and the logarithm of the sum is well conditioned.
        log_total = tl.where(gap == 0.0, log1p(sums.rest), tl.log(total))
        logp = -(gap + log_total)
        if ALL:
            hit = tl.where(gap == 0.0, 1.0, 0.0)
            if others.row_max == at_label:  # the first of equals is the likeliest; these rows are rare
                hit = tl.where(_largest_before_label(row, transform, BLOCK) < at_label, hit, 0.0)
            label_gap = tl.where(exp_label > 0.0, gap, 0.0)
            mean = (sums.sum1 - exp_label * label_gap) / total  # of z - max under p, <= 0
            entropy = log_total - mean
            variance = tl.maximum((sums.sum2 + exp_label * label_gap * label_gap) / total - mean * mean, 0.0)
    elif row.label != IGNORED:
        logp = float("nan")  # outside the vocabulary: nothing is read, and the result must not look valid
    return RowStatistics(
        logp=logp, row_max=row_max, total=total, one_minus_p=one_minus_p, hit=hit, entropy=entropy, variance=variance
    )


@triton.jit
def _add_logits(sums, row, block, transform, class_weights_ptr):
    """Return the sums of each lane with the logits of one more block added, each multiplied by its class weight."""
    raw, z = load_logits(row.logits, block, transform)
    if class_weights_ptr is not None:
        z = z * tl.load(class_weights_ptr + block.columns, mask=block.mask)
    if block.mask is not None:
        z = tl.where(block.mask, z, 0.0)
    return sums + tl.sum(by_lane(z, sums), 1)


@triton.jit
def _mean_logit(row, transform, class_weights_ptr, BLOCK: tl.constexpr):
    """Return the mean of a row's logits, each multiplied by its class weight; 0 for a row without a valid label."""
    mean = 0.0
    if (row.label >= 0) & (row.label < row.n_vocab):
        lanes = zeros_of_lanes(row, BLOCK)
        columns = tl.arange(0, BLOCK)
        for start in range(0, row.tail, BLOCK):
            lanes = _add_logits(lanes, row, ColumnBlock(start + columns, None), transform, class_weights_ptr)
        if row.tail < row.n_vocab:
            columns += row.tail
            lanes = _add_logits(lanes, row, ColumnBlock(columns, columns < row.n_vocab), transform, class_weights_ptr)
        mean = tl.sum(lanes, 0) / row.n_vocab
    return mean


@triton.jit
def _store_statistics(statistics_ptr, stride, row, values, ALL: tl.constexpr):
    """Store the `RowStatistics` of a row; without ``ALL`` the first four."""
    tl.store(statistic(statistics_ptr, stride, row, LOGP), values.logp)
    tl.store(statistic(statistics_ptr, stride, row, ROW_MAX), values.row_max)
    tl.store(statistic(statistics_ptr, stride, row, TOTAL), values.total)
    tl.store(statistic(statistics_ptr, stride, row, ONE_MINUS_P), values.one_minus_p)
    if ALL:
        tl.store(statistic(statistics_ptr, stride, row, HIT), values.hit)
        tl.store(statistic(statistics_ptr, stride, row, ENTROPY), values.entropy)
        tl.store(statistic(statistics_ptr, stride, row, VARIANCE), values.variance)


@triton.jit(**VECTORS)
def statistics_kernel(
    logits_ptr,  # [n, V] raw products, row_stride elements from row to row
    labels_ptr,  # [n] int64
    statistics_ptr,  # [4 or 7, n] fp32: log p(label), maximum, sum of exp(z - max), 1 - p(label); hit, entropy, variance
    statistics_stride,
    means_ptr,  # [n] fp32, the mean logit of each row; or None
    class_weights_ptr,  # [V] fp32, factors of the logits in that mean; or None
    n_vocab,
    row_stride,
    logit_scale,  # None: not scaled
    softcap,  # None: not capped
    ALL: tl.constexpr,  # whether the last three are written as well
    BLOCK: tl.constexpr,
):
    """Write the statistics of one row."""
    row = row_of_program(logits_ptr, row_stride, labels_ptr, n_vocab, BLOCK)
    transform = Transform(logit_scale=logit_scale, softcap=softcap)
    values = _row_statistics(row, transform, ALL, BLOCK)
    _store_statistics(statistics_ptr, statistics_stride, row, values, ALL)
    if means_ptr is not None:  # a second read, from the L2 cache where the rows in flight fit into it
        tl.store(means_ptr + row.index, _mean_logit(row, transform, class_weights_ptr, BLOCK))


@triton.jit
def _gradient_block(row, out_row, start, block, factors, addend, transform, OVERLAID: tl.constexpr):
    """Write the gradient of a block."""
    raw, z = load_logits(row.logits, block, transform)
    gradient = tl.where(block.columns == row.label, factors.at_label, -tl.exp(z - factors.row_max) * factors.scale)
    if addend.class_weights is not None:
        gradient += addend.share * tl.load(addend.class_weights + block.columns, mask=block.mask)
    elif addend.share is not None:
        gradient += addend.share
    store_block(out_row, block, times_slope(gradient, raw, transform), start, OVERLAID)


@triton.jit
def _write_gradient(row, out_row, lanes, factors, addend, transform, OVERLAID: tl.constexpr):
    """Write the gradient of a row, or zeros for a row without a valid label; ``lanes`` are the columns of the first block."""
    if (row.label >= 0) & (row.label < row.n_vocab):
        for start in range(0, row.tail, lanes.numel):
            _gradient_block(row, out_row, start, ColumnBlock(start + lanes, None), factors, addend, transform, OVERLAID)
        if row.tail < row.n_vocab:
            block = ColumnBlock(row.tail + lanes, row.tail + lanes < row.n_vocab)
            _gradient_block(row, out_row, row.tail, block, factors, addend, transform, OVERLAID)
    else:
        store_zeros(out_row, row.n_vocab, lanes)


@triton.jit(**VECTORS)
def gradient_kernel(
    logits_ptr,  # [n, V] raw products, row_stride elements from row to row
    labels_ptr,  # [n] int64
    statistics_ptr,  # [4, n] fp32, from statistics_kernel
    statistics_stride,
    coefficients_ptr,  # [n] fp32, derivative of the objective by log p(label)
    lse_coefficients_ptr,  # [n] fp32, the same by the logsumexp; or None
    mean_coefficients_ptr,  # [n] fp32, the same by the mean logit; or None
    class_weights_ptr,  # [V] fp32, factors of the logits in that mean; or None
    out_ptr,  # [n, V], out_stride elements from row to row: derivative by the raw products; may be logits_ptr
    n_vocab,
    row_stride,
    out_stride,
    logit_scale,  # None: not scaled
    softcap,  # None: not capped
    OVERLAID: tl.constexpr,  # whether out_ptr is logits_ptr, and its elements have half the size
    BLOCK: tl.constexpr,
):
    """Write the gradient of one row by its raw products."""
    row = row_of_program(logits_ptr, row_stride, labels_ptr, n_vocab, BLOCK)
    transform = Transform(logit_scale=logit_scale, softcap=softcap)
    coefficient = tl.load(coefficients_ptr + row.index)
    row_max = tl.load(statistic(statistics_ptr, statistics_stride, row, ROW_MAX))
    total = tl.load(statistic(statistics_ptr, statistics_stride, row, TOTAL))
    at_label = coefficient * tl.load(statistic(statistics_ptr, statistics_stride, row, ONE_MINUS_P))
    if lse_coefficients_ptr is not None:  # whose derivative by a logit is the probability
        lse_coefficient = tl.load(lse_coefficients_ptr + row.index)
        at_label += lse_coefficient * tl.exp(tl.load(statistic(statistics_ptr, statistics_stride, row, LOGP)))
        coefficient -= lse_coefficient
    share = None if mean_coefficients_ptr is None else tl.load(mean_coefficients_ptr + row.index) / n_vocab
    factors = GradientFactors(row_max=row_max, scale=coefficient / total, at_label=at_label)
    out_row = out_ptr + row.index * out_stride
    lanes = tl.arange(0, BLOCK)  # before the branch: within it, a loop iteration in bf16 has 4 more instructions, of 320
    _write_gradient(row, out_row, lanes, factors, Addend(share, class_weights_ptr), transform, OVERLAID)


@triton.jit(**VECTORS)
def statistics_gradient_kernel(
    logits_ptr,  # [n, V] raw products, row_stride elements from row to row
    labels_ptr,  # [n] int64
    statistics_ptr,  # [4, n] fp32: log p(label), maximum, sum of exp(z - max), 1 - p(label)
    statistics_stride,
    coefficients_ptr,  # [n] fp32, derivative of the objective by log p(label)
    out_ptr,  # [n, V], out_stride elements from row to row: derivative by the raw products; may be logits_ptr
    n_vocab,
    row_stride,
    out_stride,
    logit_scale,  # None: not scaled
    softcap,  # None: not capped
    OVERLAID: tl.constexpr,  # as in gradient_kernel
    BLOCK: tl.constexpr,
):
    """Write the statistics of one row, and then its gradient: see `statistics_and_gradient`."""
    row = row_of_program(logits_ptr, row_stride, labels_ptr, n_vocab, BLOCK)
    transform = Transform(logit_scale=logit_scale, softcap=softcap)
    coefficient = tl.load(coefficients_ptr + row.index)
    values = _row_statistics(row, transform, False, BLOCK)
    _store_statistics(statistics_ptr, statistics_stride, row, values, False)
    factors = GradientFactors(
        row_max=values.row_max, scale=coefficient / values.total, at_label=coefficient * values.one_minus_p
    )
    out_row = out_ptr + row.index * out_stride
    # [1, BLOCK]: accesses of one shape share a layout, and that of bf16 stores would add up the statistics in another order.
    columns = tl.arange(0, BLOCK)[None, :]
    _write_gradient(row, out_row, columns, factors, Addend(None, None), transform, OVERLAID)


def launch_rows(
    kernel: Any, config: dict[str, Any], logits: Tensor, statistics: Tensor, *, transform: tuple[float, float | None],
    out: Tensor | None = None, **arguments: Any,
) -> None:  # fmt: skip
    """Launch a row kernel with one program per row.

    Args:
        kernel: the kernel.
        config: ``BLOCK`` and ``num_warps``.
        logits: [n, V] raw products, rows contiguous.
        statistics: [4 or 7, n] fp32, rows contiguous.
        transform: ``logit_scale`` and ``softcap``, as in `token_statistics`.
        out: [n, V], rows contiguous, where the kernel writes a gradient.
        **arguments: further arguments of the kernel.
    """
    n_rows, n_vocab = logits.shape
    logit_scale, softcap = transform
    if out is not None:
        arguments |= {"out_ptr": out, "out_stride": out.stride(0)}
    launch(
        kernel,
        (n_rows,),
        logits.device,
        logits_ptr=logits,
        statistics_ptr=statistics,
        statistics_stride=statistics.stride(0),
        n_vocab=n_vocab,
        row_stride=logits.stride(0),
        logit_scale=None if logit_scale == 1.0 else float(logit_scale),
        softcap=None if softcap is None else float(softcap),
        **arguments,
        **config,
    )


def is_overlaid(logits: Tensor, out: Tensor) -> bool:
    """Tell whether a gradient overwrites the logits with elements that have fewer bytes: see `wait_for_reads`."""
    return out.data_ptr() == logits.data_ptr() and out.element_size() < logits.element_size()


def token_statistics(
    logits: Tensor, labels: Tensor, statistics: Tensor, *, means: Tensor | None = None, class_weights: Tensor | None = None,
    logit_scale: float = 1.0, softcap: float | None = None,
) -> None:  # fmt: skip
    """Write the statistics of each row into ``statistics``.

    The rows of the result are log p(label), the row's maximum, the sum of exp(z - max) and 1 - p(label), in this order: `LOGP`,
    `ROW_MAX`, `TOTAL`, `ONE_MINUS_P`. If there are seven rows, hit, entropy and variance follow: see `TokenStatistics`.

    Args:
        logits: [n, V] fp32, bf16 or fp16, raw products of hidden states and head, rows contiguous.
        labels: [n] int64. -100 gives zeros; any other value outside [0, V) gives NaN, and nothing is read for it.
        statistics: [4 or 7, n] fp32, rows contiguous; mutated.
        means: [n] fp32, mutated: the mean of each row's logits. None: it is not computed, which spares a second read.
        class_weights: [V] fp32, a factor of each logit in that mean; None: 1.
        logit_scale: the raw products are multiplied by it.
        softcap: the scaled products z then become ``softcap tanh(z / softcap)``; None: they are not capped.
    """
    launch_rows(
        statistics_kernel,
        STATISTICS_CONFIG,
        logits,
        statistics,
        transform=(logit_scale, softcap),
        labels_ptr=labels,
        means_ptr=means,
        class_weights_ptr=class_weights,
        ALL=len(statistics) == _reference.N_ALL,
    )


def token_gradient(
    logits: Tensor, labels: Tensor, statistics: Tensor, coefficients: Tensor, out: Tensor, *,
    lse_coefficients: Tensor | None = None, mean_coefficients: Tensor | None = None, class_weights: Tensor | None = None,
    logit_scale: float = 1.0, softcap: float | None = None,
) -> None:  # fmt: skip
    """Write the derivative of ``coefficient log p(label)`` by the raw products into ``out``, row by row.

    Without scale and cap that is ``coefficient (onehot(label) - softmax(logits))``. The logsumexp adds ``lse_coefficient
    softmax(logits)`` and the mean logit ``mean_coefficient class_weights / V``. Rows without a valid label get zeros.

    Args:
        logits: [n, V] fp32, bf16 or fp16, raw products of hidden states and head, rows contiguous.
        labels: [n] int64.
        statistics: [4 or 7, n] fp32, from `token_statistics`.
        coefficients: [n] fp32, derivative of the objective by each log p(label).
        out: [n, V], fp32, bf16 or fp16, rows contiguous; mutated. It may be ``logits`` itself; or, with half the bytes an
            element, a view of its memory, ``memory.view(torch.bfloat16)[:, :V]``, whose rows begin where those of ``logits``
            do.
        lse_coefficients: [n] fp32, derivative of the objective by each logsumexp; None: it does not depend on them.
        mean_coefficients: [n] fp32, the same for the mean logits.
        class_weights: as in `token_statistics`.
        logit_scale: as in `token_statistics`.
        softcap: as in `token_statistics`.
    """
    launch_rows(
        gradient_kernel,
        GRADIENT_CONFIG,
        logits,
        statistics,
        out=out,
        transform=(logit_scale, softcap),
        labels_ptr=labels,
        coefficients_ptr=coefficients,
        lse_coefficients_ptr=lse_coefficients,
        mean_coefficients_ptr=mean_coefficients,
        class_weights_ptr=None if mean_coefficients is None else class_weights,
        OVERLAID=is_overlaid(logits, out),
    )


def statistics_and_gradient(
    logits: Tensor, labels: Tensor, statistics: Tensor, coefficients: Tensor, out: Tensor, *, logit_scale: float = 1.0,
    softcap: float | None = None,
) -> None:  # fmt: skip
    """Do what `token_statistics` and then `token_gradient` do, with the same bits, for coefficients that are known beforehand.

    The second read of a row comes from the L2 cache if the rows that are worked on at a time fit into it. On an H100, whose
    cache has 50 MB, two to four programs a multiprocessor work on 264 to 528 rows: of fp32 logits 34 to 68 MB at V = 32000, but
    135 to 270 MB at V = 128256, where little more than a launch is saved. This is computed, not measured.

    Args:
        logits: as in `token_gradient`.
        labels: as in `token_statistics`.
        statistics: [4, n] fp32, rows contiguous; mutated.
        coefficients: [n] fp32, derivative of the objective by each log p(label).
        out: as in `token_gradient`; mutated.
        logit_scale: as in `token_statistics`.
        softcap: as in `token_statistics`.
    """
    launch_rows(
        statistics_gradient_kernel,
        STATISTICS_CONFIG,
        logits,
        statistics,
        out=out,
        transform=(logit_scale, softcap),
        labels_ptr=labels,
        coefficients_ptr=coefficients,
        OVERLAID=is_overlaid(logits, out),
    )

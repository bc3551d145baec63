"""Row kernels over a chunk of logits: statistics of each row, then the gradient by its logits.

Two kernels, because the factor of a row's gradient (the derivative of the objective by its log-probability) may depend on
the log-probabilities of other rows.
"""

from soul_kernels._launch import launch, tl, triton, triton_dtype
from soul_kernels.reference.token_logprob import IGNORE_INDEX
from soul_kernels.rounding import round_nearest

LOGP, ROW_MAX, TOTAL, ONE_MINUS_P = range(4)  # rows of the statistics
IGNORED = tl.constexpr(IGNORE_INDEX)

# Columns a loop turn, warps: 31 to 74 registers and no spills with Triton 3.4, 3.6 and 3.9. With 8 warps the statistics spill
# 4 bytes on sm_80 under 3.6. Times on a GPU are still to be measured.
STATISTICS_CONFIG = {"BLOCK": 4096, "num_warps": 16}
GRADIENT_CONFIG = {"BLOCK": 4096, "num_warps": 8}


@triton.jit
def _log1p(x):
    """log(1 + x) of a scalar x >= 0; ``tl.log`` alone loses small x, where p(label) is close to 1."""
    s = x / (2.0 + x)  # log(1 + x) = 2 atanh(s), and s <= 1/3 for x <= 1: the next term is below 2e-8
    s2 = s * s
    series = 1.0 + s2 * (1 / 3 + s2 * (1 / 5 + s2 * (1 / 7 + s2 * (1 / 9 + s2 * (1 / 11 + s2 * (1 / 13 + s2 / 15))))))
    return tl.where(x <= 1.0, 2.0 * s * series, tl.log(1.0 + x))


@triton.jit
def _rest_block(z, columns, label, row_max, rest):
    """Adds one block to the running maximum and to the sum of exp(z - max) over all columns but the label's."""
    new_max = tl.maximum(row_max, tl.max(z, 0))
    exp = tl.where(columns == label, 0.0, tl.exp(z - new_max))
    return new_max, rest * tl.exp(row_max - new_max) + tl.sum(exp, 0)


@triton.jit
def _statistics_kernel(
    logits_ptr,  # [n, V], row_stride elements from row to row
    labels_ptr,  # [n] int64
    statistics_ptr,  # [4, n] fp32: log p(label), maximum, sum of exp(z - max), 1 - p(label)
    statistics_stride,
    n_vocab,
    row_stride,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # before it meets the stride: n * V passes 2^31
    label = tl.load(labels_ptr + row)
    row_ptr = logits_ptr + row * row_stride
    logp = 0.0
    row_max = -1.0e30  # finite: -inf - -inf would be NaN
    rest = 0.0
    total = 0.0
    one_minus_p = 0.0
    if (label >= 0) & (label < n_vocab):
        lanes = tl.arange(0, BLOCK)
        tail = (n_vocab // BLOCK) * BLOCK
        for start in range(0, tail, BLOCK):
            z = tl.load(row_ptr + start + lanes).to(tl.float32)
            row_max, rest = _rest_block(z, start + lanes, label, row_max, rest)
        if tail < n_vocab:
            columns = tail + lanes
            z = tl.load(row_ptr + columns, mask=columns < n_vocab, other=-float("inf")).to(tl.float32)
            row_max, rest = _rest_block(z, columns, label, row_max, rest)
        gap = row_max - tl.load(row_ptr + label).to(tl.float32)
        exp_label = tl.exp(-gap)
        total = rest + exp_label
        one_minus_p = rest / total
        # Label likeliest: log1p of the rest. Else another token adds exp(0) = 1 to the sum: its logarithm is well conditioned.
        logp = -tl.where(gap == 0.0, _log1p(rest), gap + tl.log(total))
    elif label != IGNORED:
        logp = float("nan")  # outside the vocabulary: read nothing, and do not let it pass for a number
    tl.store(statistics_ptr + row, logp)
    tl.store(statistics_ptr + statistics_stride + row, row_max)
    tl.store(statistics_ptr + 2 * statistics_stride + row, total)
    tl.store(statistics_ptr + 3 * statistics_stride + row, one_minus_p)


@triton.jit
def _gradient_block(logits_row, out_row, columns, mask, label, row_max, scale, at_label, OUT_DTYPE: tl.constexpr):
    z = tl.load(logits_row + columns, mask=mask).to(tl.float32)
    gradient = tl.where(columns == label, at_label, -tl.exp(z - row_max) * scale)
    tl.store(out_row + columns, round_nearest(gradient, OUT_DTYPE), mask=mask)


@triton.jit
def _gradient_kernel(
    logits_ptr,  # [n, V], row_stride elements from row to row
    labels_ptr,  # [n] int64
    statistics_ptr,  # [4, n] fp32, from _statistics_kernel
    statistics_stride,
    coefficients_ptr,  # [n] fp32, derivative of the objective by log p(label)
    out_ptr,  # [n, V], out_stride elements from row to row: derivative of the objective by the logits; may be logits_ptr
    n_vocab,
    row_stride,
    out_stride,
    OUT_DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    coefficient = tl.load(coefficients_ptr + row)
    row_max = tl.load(statistics_ptr + statistics_stride + row)
    total = tl.load(statistics_ptr + 2 * statistics_stride + row)
    at_label = coefficient * tl.load(statistics_ptr + 3 * statistics_stride + row)
    scale = coefficient / total
    logits_row = logits_ptr + row * row_stride
    out_row = out_ptr + row * out_stride
    lanes = tl.arange(0, BLOCK)
    tail = (n_vocab // BLOCK) * BLOCK
    if (label >= 0) & (label < n_vocab):
        for start in range(0, tail, BLOCK):
            _gradient_block(logits_row, out_row, start + lanes, None, label, row_max, scale, at_label, OUT_DTYPE)
        if tail < n_vocab:
            columns = tail + lanes
            mask = columns < n_vocab
            _gradient_block(logits_row, out_row, columns, mask, label, row_max, scale, at_label, OUT_DTYPE)
    else:  # an ignored row: zeros, whatever its logits hold
        zeros = tl.zeros([BLOCK], OUT_DTYPE)
        for start in range(0, n_vocab, BLOCK):
            tl.store(out_row + start + lanes, zeros, mask=start + lanes < n_vocab)


def token_statistics(logits, labels, statistics):
    """Fills ``statistics`` [4, n] fp32 with log p(label), row maximum, sum of exp(z - max) and 1 - p(label).

    Args:
        logits: [n, V] fp32, bf16 or fp16, rows contiguous.
        labels: [n] int64. -100 gives log p = 0; any other value outside [0, V) gives NaN, and nothing is read for it.
        statistics: [4, n] fp32, rows contiguous; mutated.
    """
    n_rows, n_vocab = logits.shape
    launch(
        _statistics_kernel,
        (n_rows,),
        logits.device,
        logits_ptr=logits,
        labels_ptr=labels,
        statistics_ptr=statistics,
        statistics_stride=statistics.stride(0),
        n_vocab=n_vocab,
        row_stride=logits.stride(0),
        **STATISTICS_CONFIG,
    )


def token_gradient(logits, labels, statistics, coefficients, out):
    """Fills ``out`` with ``coefficient (onehot(label) - softmax(logits))``, zeros in rows without a valid label.

    Args:
        logits: [n, V] fp32, bf16 or fp16, rows contiguous.
        labels: [n] int64.
        statistics: [4, n] fp32, from `token_statistics`.
        coefficients: [n] fp32, derivative of the objective by each log p(label).
        out: [n, V], fp32, bf16 or fp16, rows contiguous; mutated. ``logits`` itself where the dtype is the same.
    """
    n_rows, n_vocab = logits.shape
    launch(
        _gradient_kernel,
        (n_rows,),
        logits.device,
        logits_ptr=logits,
        labels_ptr=labels,
        statistics_ptr=statistics,
        statistics_stride=statistics.stride(0),
        coefficients_ptr=coefficients,
        out_ptr=out,
        n_vocab=n_vocab,
        row_stride=logits.stride(0),
        out_stride=out.stride(0),
        OUT_DTYPE=triton_dtype(out.dtype),
        **GRADIENT_CONFIG,
    )

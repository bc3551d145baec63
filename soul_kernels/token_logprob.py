"""Row kernels over a chunk of logits: statistics of each row, then the gradient by its logits.

They are two kernels, because the factor of a row's gradient (the derivative of the objective by its log-probability) may depend
on the log-probabilities of other rows. They read raw products of hidden states and head: scaling and soft-capping happen in
registers.
"""

from soul_kernels._launch import launch, tl, triton, triton_dtype
from soul_kernels.reference.token_logprob import N_ALL
from soul_kernels.rounding import round_nearest
from soul_kernels.tokens import IGNORE_INDEX

IGNORED = tl.constexpr(IGNORE_INDEX)

# Columns a loop turn, warps: 31 to 74 registers and no spills with Triton 3.4, 3.6 and 3.9. With 8 warps the statistics spill
# 4 bytes on sm_80 under 3.6. Times on a GPU are still to be measured.
STATISTICS_CONFIG = {"BLOCK": 4096, "num_warps": 16}
GRADIENT_CONFIG = {"BLOCK": 4096, "num_warps": 8}


# Vectors of one number a row: a chunk may begin anywhere in them, and alignment would compile every kernel again and again.
VECTORS = {
    "do_not_specialize": ["statistics_stride", "ref_statistics_stride", "divergences_stride"],
    "do_not_specialize_on_alignment": [
        "labels_ptr", "statistics_ptr", "ref_statistics_ptr", "strengths_ptr", "divergences_ptr", "coefficients_ptr",
        "weights_ptr", "uniforms_ptr",
    ],
}  # fmt: skip


@triton.jit
def log1p(x):
    """log(1 + x) of a scalar x >= 0; ``tl.log`` alone loses small x, where p(label) is close to 1."""
    s = x / (2.0 + x)  # log(1 + x) = 2 atanh(s), and s <= 1/3 for x <= 1: the next term is below 2e-8
    s2 = s * s
    series = 1.0 + s2 * (1 / 3 + s2 * (1 / 5 + s2 * (1 / 7 + s2 * (1 / 9 + s2 * (1 / 11 + s2 * (1 / 13 + s2 / 15))))))
    return tl.where(x <= 1.0, 2.0 * s * series, tl.log(1.0 + x))


@triton.jit
def transformed(z, logit_scale, softcap, SCALED: tl.constexpr, CAPPED: tl.constexpr):
    """Raw products -> logits: ``softcap tanh(logit_scale z / softcap)``, or scaled only."""
    if SCALED:
        z = z * logit_scale
    if CAPPED:
        s = tl.exp(tl.abs(z) * (-2.0 / softcap))
        z = tl.where(z < 0, -softcap, softcap) * (1.0 - s) / (1.0 + s)
    return z


@triton.jit
def times_slope(gradient, raw, logit_scale, softcap, SCALED: tl.constexpr, CAPPED: tl.constexpr):
    """Gradient by the logits -> by the raw products; 1 - tanh^2 without the subtraction."""
    if CAPPED:
        z = raw * logit_scale if SCALED else raw
        s = tl.exp(tl.abs(z) * (-2.0 / softcap))
        gradient = gradient * (4.0 * s / ((1.0 + s) * (1.0 + s)))
    if SCALED:
        gradient = gradient * logit_scale
    return gradient


@triton.jit
def load_raw(row_ptr, columns, n_vocab, WHOLE: tl.constexpr):
    """Raw products of a block in fp32. Only a block that lies within the vocabulary is read without a mask, 16 bytes wide."""
    if WHOLE:
        return tl.load(row_ptr + columns).to(tl.float32)
    else:
        return tl.load(row_ptr + columns, mask=columns < n_vocab, other=0.0).to(tl.float32)


@triton.jit
def logits_of(raw, columns, n_vocab, logit_scale, softcap, SCALED: tl.constexpr, CAPPED: tl.constexpr, WHOLE: tl.constexpr):
    """Logits of a block; beyond the vocabulary -inf, put there last: a cap would turn it into -softcap."""
    z = transformed(raw, logit_scale, softcap, SCALED, CAPPED)
    return z if WHOLE else tl.where(columns < n_vocab, z, -float("inf"))


@triton.jit
def store_block(out_row, columns, values, n_vocab, OUT_DTYPE: tl.constexpr, WHOLE: tl.constexpr):
    """Stores a block, rounded to nearest."""
    if WHOLE:
        tl.store(out_row + columns, round_nearest(values, OUT_DTYPE))
    else:
        tl.store(out_row + columns, round_nearest(values, OUT_DTYPE), mask=columns < n_vocab)


@triton.jit
def store_zeros(out_row, n_vocab, OUT_DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """The gradient of an ignored row, whatever its logits hold."""
    lanes = tl.arange(0, BLOCK)
    for start in range(0, n_vocab, BLOCK):
        tl.store(out_row + start + lanes, tl.zeros([BLOCK], OUT_DTYPE), mask=start + lanes < n_vocab)


@triton.jit
def _rest_block(z, columns, label, row_max, rest, sum1, sum2, left_max, ALL: tl.constexpr):
    """Adds one block to what is known of all columns but the label's.

    That is the maximum (of all), rest = sum of e = exp(z - max) and, with ALL, the sums of e (z - max) and e (z - max)^2, and
    the largest logit to the left of the label.
    """
    new_max = tl.maximum(row_max, tl.max(z, 0))
    exp = tl.where(columns == label, 0.0, tl.exp(z - new_max))
    shift = tl.maximum(row_max - new_max, -200.0)  # exp(-200) is 0, and squares stay finite
    rescale = tl.exp(shift)
    if ALL:
        gap = tl.where(exp > 0.0, z - new_max, 0.0)  # 0 times -inf is NaN
        sum2 = rescale * (sum2 + shift * (2.0 * sum1 + shift * rest)) + tl.sum(exp * gap * gap, 0)
        sum1 = rescale * (sum1 + shift * rest) + tl.sum(exp * gap, 0)
        left_max = tl.maximum(left_max, tl.max(tl.where(columns < label, z, -float("inf")), 0))
    return new_max, rescale * rest + tl.sum(exp, 0), sum1, sum2, left_max


@triton.jit(**VECTORS)
def statistics_kernel(
    logits_ptr,  # [n, V] raw products, row_stride elements from row to row
    labels_ptr,  # [n] int64
    statistics_ptr,  # [4 or 7, n] fp32: log p(label), maximum, sum of exp(z - max), 1 - p(label); hit, entropy, variance
    statistics_stride,
    n_vocab,
    row_stride,
    logit_scale,
    softcap,
    SCALED: tl.constexpr,
    CAPPED: tl.constexpr,
    ALL: tl.constexpr,  # the last three as well
    BLOCK: tl.constexpr,
):
    """Write the statistics of one row."""
    row = tl.program_id(0).to(tl.int64)  # before it meets the stride: n * V passes 2^31
    label = tl.load(labels_ptr + row)
    row_ptr = logits_ptr + row * row_stride
    logp = 0.0
    row_max = -1.0e30  # finite: -inf - -inf would be NaN
    rest = 0.0
    total = 0.0
    one_minus_p = 0.0
    sum1 = 0.0
    sum2 = 0.0
    left_max = -float("inf")
    hit = 0.0
    entropy = 0.0
    variance = 0.0
    if (label >= 0) & (label < n_vocab):
        lanes = tl.arange(0, BLOCK)
        tail = (n_vocab // BLOCK) * BLOCK
        for start in range(0, tail, BLOCK):
            raw = load_raw(row_ptr, start + lanes, n_vocab, True)
            z = logits_of(raw, start + lanes, n_vocab, logit_scale, softcap, SCALED, CAPPED, True)
            row_max, rest, sum1, sum2, left_max = _rest_block(z, start + lanes, label, row_max, rest, sum1, sum2, left_max, ALL)
        if tail < n_vocab:
            raw = load_raw(row_ptr, tail + lanes, n_vocab, False)
            z = logits_of(raw, tail + lanes, n_vocab, logit_scale, softcap, SCALED, CAPPED, False)
            row_max, rest, sum1, sum2, left_max = _rest_block(z, tail + lanes, label, row_max, rest, sum1, sum2, left_max, ALL)
        at_label = transformed(tl.load(row_ptr + label).to(tl.float32), logit_scale, softcap, SCALED, CAPPED)
        gap = row_max - at_label
        exp_label = tl.exp(-gap)
        total = rest + exp_label
        one_minus_p = rest / total
        # Label likeliest: log1p of the rest. Else another token adds exp(0) = 1 to the sum: its logarithm is well conditioned.
        log_total = tl.where(gap == 0.0, log1p(rest), tl.log(total))
        logp = -(gap + log_total)
        if ALL:
            hit = tl.where((gap == 0.0) & (left_max < at_label), 1.0, 0.0)
            label_gap = tl.where(exp_label > 0.0, gap, 0.0)
            mean = (sum1 - exp_label * label_gap) / total  # of z - max under p, <= 0
            entropy = log_total - mean
            variance = tl.maximum((sum2 + exp_label * label_gap * label_gap) / total - mean * mean, 0.0)
    elif label != IGNORED:
        logp = float("nan")  # outside the vocabulary: read nothing, and do not let it pass for a number
    tl.store(statistics_ptr + row, logp)
    tl.store(statistics_ptr + statistics_stride + row, row_max)
    tl.store(statistics_ptr + 2 * statistics_stride + row, total)
    tl.store(statistics_ptr + 3 * statistics_stride + row, one_minus_p)
    if ALL:
        tl.store(statistics_ptr + 4 * statistics_stride + row, hit)
        tl.store(statistics_ptr + 5 * statistics_stride + row, entropy)
        tl.store(statistics_ptr + 6 * statistics_stride + row, variance)


@triton.jit
def _gradient_block(
    logits_row, out_row, columns, label, row_max, scale, at_label, n_vocab, logit_scale, softcap,
    SCALED: tl.constexpr, CAPPED: tl.constexpr, OUT_DTYPE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    raw = load_raw(logits_row, columns, n_vocab, WHOLE)
    z = logits_of(raw, columns, n_vocab, logit_scale, softcap, SCALED, CAPPED, WHOLE)
    gradient = tl.where(columns == label, at_label, -tl.exp(z - row_max) * scale)
    gradient = times_slope(gradient, raw, logit_scale, softcap, SCALED, CAPPED)
    store_block(out_row, columns, gradient, n_vocab, OUT_DTYPE, WHOLE)


@triton.jit(**VECTORS)
def gradient_kernel(
    logits_ptr,  # [n, V] raw products, row_stride elements from row to row
    labels_ptr,  # [n] int64
    statistics_ptr,  # [4, n] fp32, from statistics_kernel
    statistics_stride,
    coefficients_ptr,  # [n] fp32, derivative of the objective by log p(label)
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
    """Write the gradient of one row by its logits."""
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
            _gradient_block(
                logits_row, out_row, start + lanes, label, row_max, scale, at_label, n_vocab, logit_scale, softcap,
                SCALED, CAPPED, OUT_DTYPE, True,
            )  # fmt: skip
        if tail < n_vocab:
            _gradient_block(
                logits_row, out_row, tail + lanes, label, row_max, scale, at_label, n_vocab, logit_scale, softcap,
                SCALED, CAPPED, OUT_DTYPE, False,
            )  # fmt: skip
    else:
        store_zeros(out_row, n_vocab, OUT_DTYPE, BLOCK)


def launch_rows(kernel, config, logits, statistics, *, transform, out=None, **arguments):
    """Launches a row kernel: one program a row of ``logits`` [n, V], with what all of them take, and ``arguments``."""
    n_rows, n_vocab = logits.shape
    logit_scale, softcap = transform
    if out is not None:
        arguments |= dict(out_ptr=out, out_stride=out.stride(0), OUT_DTYPE=triton_dtype(out.dtype))
    launch(
        kernel,
        (n_rows,),
        logits.device,
        logits_ptr=logits,
        statistics_ptr=statistics,
        statistics_stride=statistics.stride(0),
        n_vocab=n_vocab,
        row_stride=logits.stride(0),
        logit_scale=float(logit_scale),
        softcap=1.0 if softcap is None else float(softcap),
        SCALED=logit_scale != 1.0,
        CAPPED=softcap is not None,
        **arguments,
        **config,
    )


def token_statistics(logits, labels, statistics, *, logit_scale=1.0, softcap=None):
    """Fills ``statistics`` with log p(label), row maximum, sum of exp(z - max) and 1 - p(label), in this order; if it has seven
    rows also with hit, entropy and variance: see `TokenStatistics`.

    Args:
        logits: [n, V] fp32, bf16 or fp16, raw products of hidden states and head, rows contiguous.
        labels: [n] int64. -100 gives zeros; any other value outside [0, V) gives NaN, and nothing is read for it.
        statistics: [4 or 7, n] fp32, rows contiguous; mutated.
        logit_scale: the raw products are multiplied by it.
        softcap: then capped: ``softcap tanh(z / softcap)``; None: not.
    """
    launch_rows(
        statistics_kernel,
        STATISTICS_CONFIG,
        logits,
        statistics,
        transform=(logit_scale, softcap),
        labels_ptr=labels,
        ALL=len(statistics) == N_ALL,
    )


def token_gradient(logits, labels, statistics, coefficients, out, *, logit_scale=1.0, softcap=None):
    """Fills ``out`` with the derivative by the raw products, without a transform ``coefficient (onehot(label) -
    softmax(logits))``; zeros in rows without a valid label.

    Args:
        logits: [n, V] fp32, bf16 or fp16, raw products of hidden states and head, rows contiguous.
        labels: [n] int64.
        statistics: [4 or 7, n] fp32, from `token_statistics`.
        coefficients: [n] fp32, derivative of the objective by each log p(label).
        out: [n, V], fp32, bf16 or fp16, rows contiguous; mutated. ``logits`` itself where the dtype is the same.
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
    )

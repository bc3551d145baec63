"""What torch.compile sees of the ops on hidden states: one opaque op each, without a graph break.

Nothing is computed here: the ops take their arguments apart into what an op may take, and put them together again. Row
indices must be known when they are traced: without ``rows`` every token is computed, ignored ones for nothing.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from soul_kernels._head_autograd import (
    frozen_head_gradient,
    objective_of,
    per_token_gradients,
    per_token_values,
    scaled_gradients,
)
from soul_kernels._head_checks import wanted
from soul_kernels._head_rows import Head, Options, Reference
from soul_kernels.reference.token_logprob import TokenStatistics


def with_rows(rows, labels):
    """The given rows, or all of them."""
    return torch.arange(labels.numel(), device=labels.device) if rows is None else rows


@torch.library.custom_op("soul_kernels::linear_objective", mutates_args=())
def _objective(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, rows: Tensor, is_forget: Tensor | None,
    ref_logps: Tensor | None, ref_hidden: Tensor | None, ref_weight: Tensor | None, ref_bias: Tensor | None, number: int,
    logit_scale: float, softcap: float | None, compute_dtype: torch.dtype, logits_dtype: torch.dtype, chunk_bytes: int,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss, log-probabilities, and the fp32 gradients of rows, weight and bias; empty where none is wanted."""
    from soul_kernels.linear_loss import sweep  # which imports this module

    with torch.inference_mode(False):  # ops are called below autograd, where the objective's code would record nothing
        loss, (logps,), _, gradients = sweep(
            hidden, Head(weight, bias, logit_scale, softcap), labels, objective_of(number), rows=rows, is_forget=is_forget,
            ref_logps=ref_logps, ref_hidden=ref_hidden, ref_weight=ref_weight, ref_bias=ref_bias,
            options=Options(compute_dtype, logits_dtype, chunk_bytes), needs=_named(needs),
        )  # fmt: skip
    return loss, logps, *_or_empty(gradients, hidden)


@torch.library.custom_op("soul_kernels::linear_gnb", mutates_args=())
def _gnb(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, keep: Tensor, rows: Tensor, uniforms: Tensor, logit_scale: float,
    softcap: float | None, compute_dtype: torch.dtype, logits_dtype: torch.dtype, chunk_bytes: int, needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss, labels, and the gradients as in `_objective`."""
    from soul_kernels.linear_gnb import sweep

    loss, (labels,), _, gradients = sweep(
        hidden, Head(weight, bias, logit_scale, softcap), keep, uniforms, rows=rows,
        options=Options(compute_dtype, logits_dtype, chunk_bytes), needs=_named(needs),
    )  # fmt: skip
    return loss, labels, *_or_empty(gradients, hidden)


def _named(needs):
    return dict(zip(("hidden", "weight", "bias"), needs))


def _or_empty(gradients, hidden):
    found = (None,) * 3 if gradients is None else (gradients.x, gradients.weight, gradients.bias)
    return tuple(hidden.new_empty(0, dtype=torch.float32) if g is None else g for g in found)


def _fake_swept(hidden, weight, bias, tokens, rows, *others):
    needs, (B, T, D), V = others[-1], hidden.shape, weight.shape[0]
    shapes = ((rows.shape[0], D), (V, weight.shape[1]), (V,))
    gradients = [hidden.new_empty(s if need else (0,), dtype=torch.float32) for s, need in zip(shapes, needs)]
    second = hidden.new_empty((B, T), dtype=torch.int64 if tokens.dtype == torch.bool else torch.float32)
    return hidden.new_empty((), dtype=torch.float32), second, *gradients


def _save_swept(ctx, inputs, output):
    hidden, weight, bias, _, rows, *_, needs = inputs
    ctx.set_materialize_grads(False)  # that of dW alone would be V D zeros
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(rows, *output[2:])
    ctx.hidden_shape, ctx.dtypes = hidden.shape, [None if t is None else t.dtype for t in (hidden, weight, bias)]
    ctx.needs, ctx.n_inputs = needs, len(inputs)


def _backward_swept(ctx, scale, *_):
    rows, *gradients = ctx.saved_tensors
    gradients = [g if need else None for g, need in zip(gradients, ctx.needs)]
    rows = rows.to(scale.device, non_blocking=True)
    x, weight, bias = scaled_gradients(rows, gradients, scale, ctx.dtypes, ctx.hidden_shape)
    return x, weight, bias, *(None,) * (ctx.n_inputs - 3)


for _op in (_objective, _gnb):
    _op.register_fake(_fake_swept)
    _op.register_autograd(_backward_swept, setup_context=_save_swept)


def objective(hidden, head, labels, number, *, rows, options, needs, **others):
    """`linear_objective` as an opaque op: the loss and the log-probabilities."""
    names = ("is_forget", "ref_logps", "ref_hidden", "ref_weight", "ref_bias")
    return _objective(
        hidden, head.weight, head.bias, labels, with_rows(rows, labels), *(others[name] for name in names), number,
        float(head.logit_scale), head.softcap, *options, list(needs.values()),
    )[:2]  # fmt: skip


def gnb(hidden, head, keep, uniforms, *, rows, options, needs):
    """`linear_gnb` as an opaque op: the loss and the labels."""
    return _gnb(
        hidden, head.weight, head.bias, keep, with_rows(rows, keep), uniforms, float(head.logit_scale), head.softcap,
        *options, list(needs.values()),
    )[:2]  # fmt: skip


@torch.library.custom_op("soul_kernels::per_token", mutates_args=())
def _per_token(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, rows: Tensor, ref_hidden: Tensor | None,
    ref_weight: Tensor | None, ref_bias: Tensor | None, strengths: Tensor | None, kind: str, logit_scale: float,
    softcap: float | None, compute_dtype: torch.dtype, logits_dtype: torch.dtype, chunk_bytes: int, form_x: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Log-probabilities or, with a reference, divergences: [B, T]; and the fp32 gradient of each row, or an empty tensor."""
    values, x = per_token_values(*_put_together(
        hidden, weight, bias, labels, rows, ref_hidden, ref_weight, ref_bias, strengths, kind, logit_scale, softcap,
        compute_dtype, logits_dtype, chunk_bytes,
    ), form_x)  # fmt: skip
    return values, hidden.new_empty(0, dtype=torch.float32) if x is None else x


@torch.library.custom_op("soul_kernels::per_token_backward", mutates_args=())
def _per_token_backward(
    upstream: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, rows: Tensor,
    ref_hidden: Tensor | None, ref_weight: Tensor | None, ref_bias: Tensor | None, strengths: Tensor | None, kind: str,
    logit_scale: float, softcap: float | None, compute_dtype: torch.dtype, logits_dtype: torch.dtype, chunk_bytes: int,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of hidden, weight and bias, in their dtypes; empty where none is wanted."""
    found = per_token_gradients(*_put_together(
        hidden, weight, bias, labels, rows, ref_hidden, ref_weight, ref_bias, strengths, kind, logit_scale, softcap,
        compute_dtype, logits_dtype, chunk_bytes,
    ), upstream, _named(needs))  # fmt: skip
    return tuple(hidden.new_empty(0) if g is None else g for g in found)


def _put_together(
    hidden, weight, bias, labels, rows, ref_hidden, ref_weight, ref_bias, strengths, kind, logit_scale, softcap, *options
):  # fmt: skip
    reference = None if ref_hidden is None else Reference(ref_hidden, ref_weight, ref_bias, None, kind, strengths)
    return hidden, Head(weight, bias, logit_scale, softcap), labels, rows, Options(*options), reference


@_per_token.register_fake
def _(hidden, weight, bias, labels, rows, *others):
    x_shape = (rows.shape[0], hidden.shape[2]) if others[-1] else (0,)
    return tuple(hidden.new_empty(shape, dtype=torch.float32) for shape in (labels.shape, x_shape))


@_per_token_backward.register_fake
def _(upstream, hidden, weight, bias, *others):
    leaves = zip((hidden, weight, bias), others[-1])
    return tuple(leaf.new_empty(leaf.shape) if need else hidden.new_empty(0) for leaf, need in leaves)  # contiguous


def _save_per_token(ctx, inputs, output):
    hidden, *_, ctx.form_x = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # of the rows there is none
    ctx.hidden_shape, ctx.dtype, ctx.n_inputs = hidden.shape, hidden.dtype, len(inputs)
    ctx.save_for_backward(*((inputs[4], output[1]) if ctx.form_x else inputs[:9]))
    ctx.others = inputs[9:-1]


def _backward_per_token(ctx, upstream, _):
    if upstream is None:
        return (None,) * ctx.n_inputs
    if ctx.form_x:
        rows, x = ctx.saved_tensors
        rows = rows.to(x.device, non_blocking=True)
        return frozen_head_gradient(rows, x, upstream, ctx.dtype, ctx.hidden_shape), *(None,) * (ctx.n_inputs - 1)
    needs = list(ctx.needs_input_grad[:3])
    found = _per_token_backward(upstream, *ctx.saved_tensors, *ctx.others, needs)
    return *(g if need else None for g, need in zip(found, needs)), *(None,) * (ctx.n_inputs - 3)


_per_token.register_autograd(_backward_per_token, setup_context=_save_per_token)


def per_token(hidden, head, labels, rows, options, reference):
    """`linear_logprob`, or `linear_kl` with a reference, as an opaque op."""
    reference = Reference(None, None) if reference is None else reference
    needs = wanted(hidden, head.weight, head.bias)
    return _per_token(
        hidden, head.weight, head.bias, labels, with_rows(rows, labels), reference.hidden, reference.weight, reference.bias,
        reference.strengths, reference.kind, float(head.logit_scale), head.softcap, *options,
        needs["hidden"] and not (needs["weight"] or needs["bias"]),
    )[0]  # fmt: skip


@torch.library.custom_op("soul_kernels::linear_statistics", mutates_args=())
def _statistics(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, rows: Tensor, logit_scale: float,
    softcap: float | None, compute_dtype: torch.dtype, logits_dtype: torch.dtype, chunk_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`TokenStatistics` as a tuple."""
    from soul_kernels.linear_loss import measure

    options = Options(compute_dtype, logits_dtype, chunk_bytes)
    return tuple(measure(hidden, Head(weight, bias, logit_scale, softcap), labels, rows, options))


@_statistics.register_fake
def _(hidden, weight, bias, labels, *others):
    return tuple(hidden.new_empty(labels.shape, dtype=torch.float32) for _ in TokenStatistics._fields)


def statistics(hidden, head, labels, rows, options):
    """`linear_statistics` as an opaque op."""
    return TokenStatistics(*_statistics(
        hidden.detach(), head.weight.detach(), head.bias, labels, with_rows(rows, labels), float(head.logit_scale),
        head.softcap, *options,
    ))  # fmt: skip

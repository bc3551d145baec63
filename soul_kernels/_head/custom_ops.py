"""The ops on hidden states as opaque custom ops, one each, for kernels and reference alike.

torch.compile and torch.export put them into a graph without a break. They also run where tensors hold no values
(FakeTensorMode, the meta device), because the shapes of their results are known beforehand. Nothing is computed here: the
arguments of a call are taken apart into values that a custom op may take, and the op puts them together again for the functions
of `sweeps`.

The shapes of the results depend on the number of token indices. So a call without ``token_indices`` computes every token,
including those that are ignored.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode

from soul_kernels._head.autograd import Context, once_differentiable, reference_gradients, refuse
from soul_kernels._head.checks import LOGPS, Comparison, Needs, RowValues, needed_gradients
from soul_kernels._head.gradients import Gradients, dtypes_of, frozen_head_gradient, scaled_gradients
from soul_kernels._head.registry import exported_number, objective_of, register_objective
from soul_kernels._head.sweeps import (
    NO_GRADIENTS,
    CrossEntropyCall,
    ObjectiveCall,
    per_token_gradients,
    per_token_values,
    reference_cross_entropy,
    reference_gnb,
    reference_objective,
    reference_per_token,
    sweep_cross_entropy,
    sweep_gnb,
    sweep_objective,
    sweep_statistics,
)
from soul_kernels.chunks import ResolvedOptions, result_dtype
from soul_kernels.errors import argument_error
from soul_kernels.tokens import Head, ObjectiveFunction, Reference, TokenStatistics

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def is_opaque(options: ResolvedOptions, hidden: Tensor, weight: Tensor, tokens: Tensor) -> bool:
    """Tell whether a call must be an opaque op.

    It must if it is traced or if a tensor holds no values. Within a torch.func transform it must if it is not computed by the
    reference, or if vmap has batched the labels or mask ``tokens`` [B, T], which decide shapes.
    """
    if torch.compiler.is_compiling():
        return True
    tensors = (hidden, weight, tokens)
    if any(tensor.is_meta for tensor in tensors) or detect_fake_mode(tensors) is not None:
        return True
    return torch._C._are_functorch_transforms_active() and (options.fused or _is_batched(tokens))


def _is_batched(tensor: Tensor) -> bool:
    """Tell whether vmap has batched a tensor, at any level of nested transforms."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False


class _Transformed(torch.autograd.Function):
    """Op that torch.func can differentiate; it does not use the derivative that is registered with a custom op."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        *op_inputs, op = inputs
        return op(*op_inputs)

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *op_inputs, ctx.op = inputs
        save, _ = _FORMULAS[ctx.op]
        save(ctx, op_inputs, output)

    @staticmethod
    def backward(ctx: Context, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        _, backward = _FORMULAS[ctx.op]
        return *backward(ctx, *upstream), None

    @staticmethod
    def jvp(ctx: Context, *_: Tensor) -> None:
        refuse("forward-mode derivatives")


def _apply(op: Callable[..., tuple[Tensor, ...]], *inputs: object) -> tuple[Tensor, ...]:
    """Call an op in the form that the active transforms can differentiate."""
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return _Transformed.apply(*inputs, op)
    return op(*inputs)


def takes(objective: ObjectiveFunction) -> bool:
    """Tell whether an opaque op can take this objective; under torch.compile the objective must have a number, ``key``."""
    if hasattr(objective, "key") or not torch.compiler.is_compiling():
        return True
    if torch.compiler.is_exporting():
        remedy = "subclass soul.losses.Objective, or export linear_logprob"
        raise argument_error("objective", "one that torch.export can refer to", type(objective).__name__, remedy)
    return False


def _indices(token_indices: Tensor | None, tokens: Tensor) -> Tensor:
    """Return the token indices, or those of all tokens [B, T]."""
    return torch.arange(tokens.numel(), device=tokens.device) if token_indices is None else token_indices


@torch.library.custom_op("soul_kernels::linear_objective", mutates_args=())
def _objective(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, token_indices: Tensor, is_forget: Tensor | None,
    ref_logps: Tensor | None, ref_hidden: Tensor | None, ref_weight: Tensor | None, ref_bias: Tensor | None, number: int,
    logit_scale: float, softcap: float | None, compute_dtype: torch.dtype, logits_dtype: torch.dtype, chunk_bytes: int | None,
    backend: str, needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return loss, log-probabilities, fp32 gradients of rows, weight and bias, and the anchor of `once_differentiable`.

    A gradient that is not needed is an empty tensor.
    """
    head = Head(weight, bias, logit_scale, softcap)
    options = ResolvedOptions(compute_dtype, logits_dtype, chunk_bytes, backend)
    reference = None if ref_hidden is None else Reference(ref_hidden, ref_weight, ref_bias)
    call = ObjectiveCall(labels, objective_of(number), token_indices, is_forget, ref_logps, reference)
    if not options.fused:

        def compute(hidden: Tensor, head: Head, options: ResolvedOptions) -> tuple[Tensor, Tensor]:
            return reference_objective(hidden, head, call, options)

        return _by_reference(compute, hidden, head, token_indices, options, Needs(*needs))
    with torch.inference_mode(False):  # a custom op runs below autograd, where the objective would record nothing
        loss, logps, _, gradients = sweep_objective(hidden, head, call, options, Needs(*needs))
    return loss, logps, *_with_anchor(gradients, hidden)


@torch.library.custom_op("soul_kernels::linear_gnb", mutates_args=())
def _gnb(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, keep: Tensor, token_indices: Tensor, uniforms: Tensor,
    logit_scale: float, softcap: float | None, compute_dtype: torch.dtype, logits_dtype: torch.dtype, chunk_bytes: int | None,
    backend: str, needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return loss, labels, and the other outputs of `_objective`."""
    head = Head(weight, bias, logit_scale, softcap)
    options = ResolvedOptions(compute_dtype, logits_dtype, chunk_bytes, backend)
    if not options.fused:

        def compute(hidden: Tensor, head: Head, options: ResolvedOptions) -> tuple[Tensor, Tensor]:
            return reference_gnb(hidden, head, keep, uniforms, token_indices, options)

        return _by_reference(compute, hidden, head, token_indices, options, Needs(*needs))
    loss, labels, _, gradients = sweep_gnb(hidden, head, keep, uniforms, token_indices, options, Needs(*needs))
    return loss, labels, *_with_anchor(gradients, hidden)


@torch.library.custom_op("soul_kernels::linear_cross_entropy", mutates_args=())
def _cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, token_indices: Tensor, class_weights: Tensor | None,
    label_smoothing: float, z_loss: float, reduction: str, predict: bool, logit_scale: float, softcap: float | None,
    compute_dtype: torch.dtype, logits_dtype: torch.dtype, chunk_bytes: int | None, backend: str, needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return loss, predicted labels (an empty tensor without ``predict``), and the other outputs of `_objective`."""
    head = Head(weight, bias, logit_scale, softcap)
    options = ResolvedOptions(compute_dtype, logits_dtype, chunk_bytes, backend)
    call = CrossEntropyCall(labels, token_indices, class_weights, label_smoothing, z_loss, reduction, predict)
    if not options.fused:

        def compute(hidden: Tensor, head: Head, options: ResolvedOptions) -> tuple[Tensor, Tensor]:
            return reference_cross_entropy(hidden, head, call, options)

        return _by_reference(compute, hidden, head, token_indices, options, Needs(*needs))
    loss, predictions, _, gradients = sweep_cross_entropy(hidden, head, call, options, Needs(*needs))
    return loss, predictions, *_with_anchor(gradients, hidden)


@_cross_entropy.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, token_indices: Tensor, *others: Any) -> Outputs:
    _, _, _, _, predict, *_ = others
    loss, _, *gradients = _fake_swept(hidden, weight, bias, labels, token_indices, *others)
    predictions = labels.new_empty(labels.shape if predict else (0,))
    return loss, predictions, *gradients  # type: ignore[return-value]  # a list has no length


def _by_reference(
    compute: Callable[[Tensor, Head, ResolvedOptions], tuple[Tensor, ...]], hidden: Tensor, head: Head, token_indices: Tensor,
    options: ResolvedOptions, needs: Needs,
) -> Outputs:  # fmt: skip
    """Return the outputs of an op, computed by the reference; the gradients are those of the rows, weight and bias."""
    (loss, per_token), (x, weight, bias) = reference_gradients(compute, hidden, head, options, needs)
    if x is not None:
        x = x.reshape(-1, x.shape[-1]).index_select(0, token_indices)
    return loss.to(options.result_dtype), per_token, *_with_anchor((x, weight, bias), hidden)


def _with_anchor(gradients: Gradients, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the three gradients, with an empty tensor in place of None, and the anchor."""
    x, weight, bias = (hidden.new_empty(0, dtype=torch.float32) if g is None else g for g in gradients)
    return x, weight, bias, hidden.new_empty(0, dtype=torch.float32)


def _fake_swept(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, token_indices: Tensor, *others: Any
) -> Outputs:
    *_, compute_dtype, _, _, _, needs = others
    dtype = result_dtype(compute_dtype)
    (B, T, D), V = hidden.shape, weight.shape[0]
    shapes = ((token_indices.shape[0], D), (V, weight.shape[1]), (V,))
    x_gradient, weight_gradient, bias_gradient = (
        hidden.new_empty(shape, dtype=dtype) if need else None for shape, need in zip(shapes, needs)
    )
    per_token = hidden.new_empty((B, T), dtype=torch.int64 if tokens.dtype == torch.bool else dtype)
    return hidden.new_empty((), dtype=dtype), per_token, *_with_anchor((x_gradient, weight_gradient, bias_gradient), hidden)


def _save_swept(ctx: Context, inputs: Sequence[Any], output: Outputs) -> None:
    hidden, weight, bias, _, token_indices, *_, needs = inputs
    ctx.set_materialize_grads(False)  # upstream zeros for dW, which is an output, would take V D memory
    ctx.mark_non_differentiable(*output[1:-1])
    ctx.save_for_backward(token_indices, *output[2:])
    ctx.hidden_shape = hidden.shape
    ctx.dtypes = dtypes_of(hidden, weight, bias)
    ctx.needs = Needs(*needs)
    ctx.n_inputs = len(inputs)


def _backward_swept(ctx: Context, scale: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    for name, need, formed in zip(Needs._fields, ctx.needs_input_grad, ctx.needs):
        if need and not formed:  # the program was exported under no_grad, or with a frozen head
            remedy = "export it with gradients enabled and with every trained tensor unfrozen"
            raise argument_error(name, "a program traced with its gradient", "one without", remedy)
    token_indices, *saved, anchor = ctx.saved_tensors
    x, weight, bias = (gradient if need else None for gradient, need in zip(saved, ctx.needs))
    token_indices = token_indices.to(scale.device, non_blocking=True)
    gradients = scaled_gradients(token_indices, (x, weight, bias), scale, ctx.dtypes, ctx.hidden_shape)
    return *once_differentiable(anchor, gradients), *(None,) * (ctx.n_inputs - 3)


for _op in (_objective, _gnb):
    _op.register_fake(_fake_swept)


def objective(
    hidden: Tensor, head: Head, call: ObjectiveCall, options: ResolvedOptions, needs: Needs
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Call `soul_kernels.linear_objective` as an opaque op; return the loss and the log-probabilities."""
    number = call.objective.key if hasattr(call.objective, "key") else register_objective(call.objective)
    if torch.compiler.is_exporting():
        number = exported_number(number)
    ref_hidden, ref_weight, ref_bias = (None, None, None) if call.reference is None else call.reference
    loss, logps, *_ = _apply(
        _objective, hidden, head.weight, head.bias, call.labels, _indices(call.token_indices, call.labels), call.is_forget,
        call.ref_logps, ref_hidden, ref_weight, ref_bias, number, float(head.logit_scale), head.softcap, *options, [*needs],
    )  # fmt: skip
    return loss, logps


def cross_entropy(
    hidden: Tensor, head: Head, call: CrossEntropyCall, options: ResolvedOptions, needs: Needs
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Call `soul_kernels.linear_cross_entropy` as an opaque op; return the loss and the predicted labels."""
    labels, token_indices, *others = call
    loss, predictions, *_ = _apply(
        _cross_entropy, hidden, head.weight, head.bias, labels, _indices(token_indices, labels), *others,
        float(head.logit_scale), head.softcap, *options, [*needs],
    )  # fmt: skip
    return loss, predictions


def gnb(
    hidden: Tensor, head: Head, keep: Tensor, uniforms: Tensor, token_indices: Tensor | None, options: ResolvedOptions,
    needs: Needs,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Call `soul_kernels.linear_gnb` as an opaque op; return the loss and the labels."""
    loss, labels, *_ = _apply(
        _gnb, hidden, head.weight, head.bias, keep, _indices(token_indices, keep), uniforms, float(head.logit_scale),
        head.softcap, *options, [*needs],
    )  # fmt: skip
    return loss, labels


@torch.library.custom_op("soul_kernels::per_token", mutates_args=())
def _per_token(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, token_indices: Tensor, ref_hidden: Tensor | None,
    ref_weight: Tensor | None, ref_bias: Tensor | None, strengths: Tensor | None, class_weights: Tensor | None, kind: str,
    beta: float, lse: bool, mean: bool, logit_scale: float, softcap: float | None, compute_dtype: torch.dtype,
    logits_dtype: torch.dtype, chunk_bytes: int | None, backend: str, predict: bool, form_x: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return log-probabilities or, with a reference model, divergences [B, T]; predictions; gradients of the rows; the anchor.

    For several values of each token see `sweep_tokens`. Predictions are an empty tensor without ``predict``. The gradients of
    the rows are fp32 [R, D] with ``form_x``, else an empty tensor. For the anchor see `once_differentiable`.
    """
    head = Head(weight, bias, logit_scale, softcap)
    options = ResolvedOptions(compute_dtype, logits_dtype, chunk_bytes, backend)
    comparison = _comparison(head, ref_hidden, ref_weight, ref_bias, strengths, kind, beta)
    row_values = RowValues(lse, mean, class_weights, predict)
    x = None
    if options.fused:
        predictions, values, x = per_token_values(hidden, head, labels, token_indices, options, comparison, row_values, form_x)
    else:
        values, predictions = reference_per_token(hidden, head, labels, token_indices, options, comparison, row_values)
    empty = hidden.new_empty(0, dtype=torch.float32)
    return values, predictions, empty if x is None else x, torch.empty_like(empty)


@torch.library.custom_op("soul_kernels::per_token_backward", mutates_args=())
def _per_token_backward(
    upstream: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, token_indices: Tensor,
    ref_hidden: Tensor | None, ref_weight: Tensor | None, ref_bias: Tensor | None, strengths: Tensor | None,
    class_weights: Tensor | None, kind: str, beta: float, lse: bool, mean: bool, logit_scale: float, softcap: float | None,
    compute_dtype: torch.dtype, logits_dtype: torch.dtype, chunk_bytes: int | None, backend: str, needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of hidden, weight and bias, in their dtypes; one that is not needed is an empty tensor."""
    head = Head(weight, bias, logit_scale, softcap)
    options = ResolvedOptions(compute_dtype, logits_dtype, chunk_bytes, backend)
    comparison = _comparison(head, ref_hidden, ref_weight, ref_bias, strengths, kind, beta)
    row_values = RowValues(lse, mean, class_weights)
    if options.fused:
        gradients = per_token_gradients(
            hidden, head, labels, token_indices, options, comparison, row_values, upstream, Needs(*needs)
        )  # fmt: skip
    else:

        def compute(hidden: Tensor, head: Head, options: ResolvedOptions) -> tuple[Tensor, Tensor]:
            return reference_per_token(hidden, head, labels, token_indices, options, comparison, row_values)

        _, gradients = reference_gradients(compute, hidden, head, options, Needs(*needs), upstream)
    leaves = (hidden, weight, bias)
    hidden_gradient, weight_gradient, bias_gradient = (
        hidden.new_empty(0) if gradient is None or leaf is None else gradient.to(leaf.dtype)
        for gradient, leaf in zip(gradients, leaves)
    )
    return hidden_gradient, weight_gradient, bias_gradient


def _comparison(
    head: Head, ref_hidden: Tensor | None, ref_weight: Tensor | None, ref_bias: Tensor | None, strengths: Tensor | None,
    kind: str, beta: float,
) -> Comparison | None:  # fmt: skip
    """Return the `Comparison` from the arguments of an op; None without a reference model."""
    if ref_hidden is None or ref_weight is None:
        return None
    return Comparison(ref_hidden, head._replace(weight=ref_weight, bias=ref_bias), kind, None, strengths, beta)


@_per_token.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, token_indices: Tensor, *others: Any
) -> tuple[Tensor, ...]:
    *_, lse, mean, _, _, compute_dtype, _, _, _, predict, form_x = others
    dtype = result_dtype(compute_dtype)
    shape = (2 + mean, *labels.shape) if lse else labels.shape
    values = hidden.new_empty(shape, dtype=dtype)
    predictions = labels.new_empty(labels.shape if predict else (0,))
    x_shape = (token_indices.shape[0], hidden.shape[2]) if form_x else (0,)
    x = hidden.new_empty(x_shape, dtype=dtype if form_x else torch.float32)
    return values, predictions, x, hidden.new_empty(0, dtype=torch.float32)


@_per_token_backward.register_fake
def _(upstream: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, *others: Any) -> tuple[Tensor, ...]:
    leaves = zip((hidden, weight, bias), others[-1])
    return tuple(hidden.new_empty(0) if leaf is None or not need else leaf.new_empty(leaf.shape) for leaf, need in leaves)


def _save_per_token(ctx: Context, inputs: Sequence[Any], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    hidden, *_, ctx.form_x = inputs
    _, predictions, x, anchor = output
    ctx.mark_non_differentiable(predictions, x)
    ctx.set_materialize_grads(False)  # the other outputs have no gradient
    ctx.hidden_shape = hidden.shape
    ctx.dtype = hidden.dtype
    ctx.n_inputs = len(inputs)
    ctx.save_for_backward(anchor, *((inputs[4], x) if ctx.form_x else inputs[:10]))
    ctx.others = inputs[10:-2]


def _backward_per_token(ctx: Context, upstream: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if upstream is None:
        return (None,) * ctx.n_inputs
    anchor, *saved = ctx.saved_tensors
    gradients = NO_GRADIENTS
    if ctx.form_x:
        token_indices, x = saved
        token_indices = token_indices.to(x.device, non_blocking=True)
        gradients = (frozen_head_gradient(token_indices, x, upstream, ctx.dtype, ctx.hidden_shape), None, None)
    else:
        needs = list(ctx.needs_input_grad[:3])
        with torch.no_grad():
            outputs = _per_token_backward(upstream, *saved, *ctx.others, needs)
        hidden_gradient, weight_gradient, bias_gradient = (gradient if need else None for gradient, need in zip(outputs, needs))
        gradients = (hidden_gradient, weight_gradient, bias_gradient)
    return *once_differentiable(anchor, gradients), *(None,) * (ctx.n_inputs - 3)


# Op -> the function that saves tensors for backward, and the backward function.
_FORMULAS: dict[Any, tuple[Callable[..., None], Callable[..., tuple[Tensor | None, ...]]]] = {
    _objective: (_save_swept, _backward_swept),
    _gnb: (_save_swept, _backward_swept),
    _cross_entropy: (_save_swept, _backward_swept),
    _per_token: (_save_per_token, _backward_per_token),
}
for _op, (_save, _backward) in _FORMULAS.items():
    _op.register_autograd(_backward, setup_context=_save)


def per_token(
    hidden: Tensor, head: Head, labels: Tensor, token_indices: Tensor | None, options: ResolvedOptions,
    comparison: Comparison | None, row_values: RowValues = LOGPS,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Call `soul_kernels.linear_logprob`, or `soul_kernels.linear_kl` with a reference model, as an opaque op.

    The second result is the predictions; both are those of `reference_per_token`.
    """
    needs = needed_gradients(hidden, head)
    ref_hidden = ref_weight = ref_bias = strengths = None
    kind = "kl"
    beta = 0.5
    if comparison is not None:
        ref_hidden = comparison.hidden
        ref_weight = comparison.head.weight
        ref_bias = comparison.head.bias
        strengths = comparison.strengths
        kind = comparison.kind
        beta = comparison.beta
    values, predictions, *_ = _apply(
        _per_token, hidden, head.weight, head.bias, labels, _indices(token_indices, labels), ref_hidden, ref_weight, ref_bias,
        strengths, row_values.class_weights, kind, beta, row_values.lse, row_values.mean, float(head.logit_scale),
        head.softcap, *options, row_values.predict,
        options.fused and needs.hidden and not (needs.weight or needs.bias or row_values.lse),
    )  # fmt: skip
    return values, predictions


@torch.library.custom_op("soul_kernels::linear_statistics", mutates_args=())
def _statistics(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, token_indices: Tensor, logit_scale: float,
    softcap: float | None, compute_dtype: torch.dtype, logits_dtype: torch.dtype, chunk_bytes: int | None, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return `TokenStatistics` as a plain tuple."""
    options = ResolvedOptions(compute_dtype, logits_dtype, chunk_bytes, backend)
    head = Head(weight, bias, logit_scale, softcap)
    return (*sweep_statistics(hidden, head, labels, token_indices, options),)


@_statistics.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *others: Any) -> tuple[Tensor, ...]:
    *_, compute_dtype, _, _, _ = others
    return tuple(hidden.new_empty(labels.shape, dtype=result_dtype(compute_dtype)) for _ in TokenStatistics._fields)


def statistics(
    hidden: Tensor, head: Head, labels: Tensor, token_indices: Tensor | None, options: ResolvedOptions
) -> TokenStatistics:
    """Call `soul_kernels.linear_statistics` as an opaque op."""
    values = _statistics(
        hidden.detach(), head.weight.detach(), None if head.bias is None else head.bias.detach(), labels,
        _indices(token_indices, labels), float(head.logit_scale), head.softcap, *options,
    )  # fmt: skip
    return TokenStatistics(*values)

"""The ops on hidden states as opaque custom ops, one each, for kernels and reference alike.

They are what torch.compile and torch.export put into a graph without a break, and what runs where tensors hold no values
(FakeTensorMode, the meta device), because the shapes of the results are known beforehand. Nothing is computed here: the ops
take their arguments apart into what an op may take, and put them together again. Row indices must be known when they are
traced: without ``rows`` the kernels compute every token, ignored ones for nothing.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch._guards import detect_fake_mode

from soul_kernels._head.autograd import (
    exported_number,
    frozen_head_gradient,
    objective_of,
    once_differentiable,
    per_token_gradients,
    per_token_values,
    reference_gradients,
    refuse,
    register_objective,
    scaled_gradients,
)
from soul_kernels._head.checks import wanted
from soul_kernels.chunks import Options
from soul_kernels.errors import argument_error
from soul_kernels.tokens import Head, Reference, TokenStatistics


def is_opaque(options: Options, hidden: Tensor, weight: Tensor, tokens: Tensor) -> bool:
    """Tell whether a call must be an opaque op: one that is traced, one whose tensors hold no values, and one within a
    torch.func transform that nothing else goes through: kernels, and tokens [B, T] that vmap has batched, which decide shapes.
    """
    if torch.compiler.is_compiling():
        return True
    tensors = (hidden, weight, tokens)
    if any(tensor.is_meta for tensor in tensors) or detect_fake_mode(tensors) is not None:
        return True
    return torch._C._are_functorch_transforms_active() and (options.fused or _is_batched(tokens))


def _is_batched(tensor: Tensor) -> bool:
    """Tell whether vmap has batched a tensor, below whatever other transforms."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False


class _Transformed(torch.autograd.Function):
    """An op as torch.func differentiates it: a custom op's own formula is out of its reach."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs):
        *inputs, op = inputs
        return op(*inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *inputs, ctx.op = inputs
        _FORMULAS[ctx.op][0](ctx, inputs, output)

    @staticmethod
    def backward(ctx, *upstream):
        return *_FORMULAS[ctx.op][1](ctx, *upstream), None

    @staticmethod
    def jvp(ctx, *_):
        refuse("forward-mode derivatives")


def _apply(op: Callable, *inputs) -> tuple[Tensor, ...]:
    """Call an op, so that whatever transforms are active can differentiate it."""
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return _Transformed.apply(*inputs, op)
    return op(*inputs)


def takes(objective: Callable) -> bool:
    """Tell whether an opaque op can have this objective: under torch.compile it finds it by a number of its own only."""
    if hasattr(objective, "key") or not torch.compiler.is_compiling():
        return True
    if torch.compiler.is_exporting():
        remedy = "subclass soul.losses.Objective, or export linear_logprob"
        raise argument_error("objective", "one that torch.export can refer to", type(objective).__name__, remedy)
    return False


def with_rows(rows, labels):
    """The given rows, or all of them."""
    return torch.arange(labels.numel(), device=labels.device) if rows is None else rows


@torch.library.custom_op("soul_kernels::linear_objective", mutates_args=())
def _objective(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, rows: Tensor, is_forget: Tensor | None,
    ref_logps: Tensor | None, ref_hidden: Tensor | None, ref_weight: Tensor | None, ref_bias: Tensor | None, number: int,
    logit_scale: float, softcap: float | None, compute_dtype: torch.dtype, logits_dtype: torch.dtype, chunk_bytes: int,
    backend: str, needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss, log-probabilities, the fp32 gradients of rows, weight and bias (empty where none is wanted), and the anchor of
    `once_differentiable`.
    """
    from soul_kernels.linear_loss import reference_objective, sweep  # which imports this module

    head, options = Head(weight, bias, logit_scale, softcap), Options(compute_dtype, logits_dtype, chunk_bytes, backend)
    call = dict(rows=rows, is_forget=is_forget, ref_logps=ref_logps)
    call |= dict(ref_hidden=ref_hidden, ref_weight=ref_weight, ref_bias=ref_bias)

    def reference(hidden, head, options):
        return reference_objective(hidden, head, labels, objective_of(number), options=options, **call)

    if not options.fused:
        return _referred(reference, hidden, head, rows, options, needs)
    with torch.inference_mode(False):  # ops are called below autograd, where the objective's code would record nothing
        loss, (logps,), _, gradients = sweep(
            hidden, head, labels, objective_of(number), options=options, needs=_named(needs), **call
        )
    return loss, logps, *_filled(gradients and (gradients.x, gradients.weight, gradients.bias), hidden)


@torch.library.custom_op("soul_kernels::linear_gnb", mutates_args=())
def _gnb(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, keep: Tensor, rows: Tensor, uniforms: Tensor, logit_scale: float,
    softcap: float | None, compute_dtype: torch.dtype, logits_dtype: torch.dtype, chunk_bytes: int, backend: str,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss, labels, and the others as in `_objective`."""
    from soul_kernels.linear_gnb import reference_gnb, sweep

    head, options = Head(weight, bias, logit_scale, softcap), Options(compute_dtype, logits_dtype, chunk_bytes, backend)

    def reference(hidden, head, options):
        return reference_gnb(hidden, head, keep, uniforms, rows=rows, options=options)

    if not options.fused:
        return _referred(reference, hidden, head, rows, options, needs)
    loss, (labels,), _, gradients = sweep(hidden, head, keep, uniforms, rows=rows, options=options, needs=_named(needs))
    return loss, labels, *_filled(gradients and (gradients.x, gradients.weight, gradients.bias), hidden)


def _referred(
    reference: Callable, hidden: Tensor, head: Head, rows: Tensor, options: Options, needs: Sequence[bool]
) -> tuple[Tensor, ...]:
    """What the reference returns, and its gradients as an op that sweeps returns them: of the rows, weight and bias."""
    (loss, second), (x, *others) = reference_gradients(reference, hidden, head, options, _named(needs))
    x = None if x is None else x.reshape(-1, x.shape[-1]).index_select(0, rows)
    return loss.to(options.result_dtype), second, *_filled((x, *others), hidden)


def _named(needs):
    return dict(zip(("hidden", "weight", "bias"), needs))


def _filled(gradients: Sequence[Tensor | None] | None, hidden: Tensor) -> tuple[Tensor, ...]:
    """The three gradients and the anchor; what is None as an empty tensor."""
    return tuple(hidden.new_empty(0, dtype=torch.float32) if g is None else g for g in (*(gradients or (None,) * 3), None))


def _fake_swept(hidden, weight, bias, tokens, rows, *others):
    *_, compute_dtype, _, _, _, needs = others
    dtype = Options(compute_dtype, None, None).result_dtype
    (B, T, D), V = hidden.shape, weight.shape[0]
    shapes = ((rows.shape[0], D), (V, weight.shape[1]), (V,))
    gradients = [hidden.new_empty(shape, dtype=dtype) if need else None for shape, need in zip(shapes, needs)]
    second = hidden.new_empty((B, T), dtype=torch.int64 if tokens.dtype == torch.bool else dtype)
    return hidden.new_empty((), dtype=dtype), second, *_filled(gradients, hidden)


def _save_swept(ctx, inputs, output):
    hidden, weight, bias, _, rows, *_, needs = inputs
    ctx.set_materialize_grads(False)  # that of dW alone would be V D zeros
    ctx.mark_non_differentiable(*output[1:-1])
    ctx.save_for_backward(rows, *output[2:])
    ctx.hidden_shape, ctx.dtypes = hidden.shape, [None if t is None else t.dtype for t in (hidden, weight, bias)]
    ctx.needs, ctx.n_inputs = needs, len(inputs)


def _backward_swept(ctx, scale, *_):
    for name, need, formed in zip(("hidden", "weight", "bias"), ctx.needs_input_grad, ctx.needs):
        if need and not formed:  # in a program that was exported under no_grad, or with a frozen head
            remedy = "export it with gradients enabled, and nothing frozen that is to be trained"
            raise argument_error(name, "a program traced with its gradient", "one without", remedy)
    rows, *gradients, anchor = ctx.saved_tensors
    gradients = [g if need else None for g, need in zip(gradients, ctx.needs)]
    rows = rows.to(scale.device, non_blocking=True)
    gradients = scaled_gradients(rows, gradients, scale, ctx.dtypes, ctx.hidden_shape)
    return *once_differentiable(anchor, gradients), *(None,) * (ctx.n_inputs - 3)


for _op in (_objective, _gnb):
    _op.register_fake(_fake_swept)


def objective(hidden, head, labels, objective, *, rows, options, needs, **others):
    """`linear_objective` as an opaque op: the loss and the log-probabilities."""
    number = objective.key if hasattr(objective, "key") else register_objective(objective)
    if torch.compiler.is_exporting():
        number = exported_number(number)
    names = ("is_forget", "ref_logps", "ref_hidden", "ref_weight", "ref_bias")
    return _apply(
        _objective, hidden, head.weight, head.bias, labels, with_rows(rows, labels), *(others[name] for name in names), number,
        float(head.logit_scale), head.softcap, *options, list(needs.values()),
    )[:2]  # fmt: skip


def gnb(hidden, head, keep, uniforms, *, rows, options, needs):
    """`linear_gnb` as an opaque op: the loss and the labels."""
    return _apply(
        _gnb, hidden, head.weight, head.bias, keep, with_rows(rows, keep), uniforms, float(head.logit_scale), head.softcap,
        *options, list(needs.values()),
    )[:2]  # fmt: skip


@torch.library.custom_op("soul_kernels::per_token", mutates_args=())
def _per_token(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, rows: Tensor, ref_hidden: Tensor | None,
    ref_weight: Tensor | None, ref_bias: Tensor | None, strengths: Tensor | None, kind: str, logit_scale: float,
    softcap: float | None, compute_dtype: torch.dtype, logits_dtype: torch.dtype, chunk_bytes: int, backend: str, form_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Log-probabilities or, with a reference, divergences: [B, T]; the fp32 gradient of each row, or an empty tensor; and the
    anchor of `once_differentiable`.
    """
    call = _put_together(
        hidden, weight, bias, labels, rows, ref_hidden, ref_weight, ref_bias, strengths, kind, logit_scale, softcap,
        compute_dtype, logits_dtype, chunk_bytes, backend,
    )  # fmt: skip
    values, x = per_token_values(*call, form_x) if call[4].fused else (_per_token_reference(*call), None)
    empty = hidden.new_empty(0, dtype=torch.float32)
    return values, empty if x is None else x, torch.empty_like(empty)


@torch.library.custom_op("soul_kernels::per_token_backward", mutates_args=())
def _per_token_backward(
    upstream: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, rows: Tensor,
    ref_hidden: Tensor | None, ref_weight: Tensor | None, ref_bias: Tensor | None, strengths: Tensor | None, kind: str,
    logit_scale: float, softcap: float | None, compute_dtype: torch.dtype, logits_dtype: torch.dtype, chunk_bytes: int,
    backend: str, needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of hidden, weight and bias, in their dtypes; empty where none is wanted."""
    call = _put_together(
        hidden, weight, bias, labels, rows, ref_hidden, ref_weight, ref_bias, strengths, kind, logit_scale, softcap,
        compute_dtype, logits_dtype, chunk_bytes, backend,
    )  # fmt: skip
    _, head, _, _, options, reference = call
    if options.fused:
        gradients = per_token_gradients(*call, upstream, _named(needs))
    else:

        def values(hidden, head, options):
            return (_per_token_reference(hidden, head, labels, rows, options, reference),)

        _, gradients = reference_gradients(values, hidden, head, options, _named(needs), upstream)
        gradients = (g if g is None else g.to(leaf.dtype) for g, leaf in zip(gradients, (hidden, weight, bias)))
    return tuple(hidden.new_empty(0) if g is None else g for g in gradients)


def _per_token_reference(
    hidden: Tensor, head: Head, labels: Tensor, rows: Tensor, options: Options, reference: Reference | None
) -> Tensor:
    from soul_kernels.linear_kl import reference_kl
    from soul_kernels.linear_loss import reference_logprob

    if reference is None:
        return reference_logprob(hidden, head, labels, rows, options)
    return reference_kl(hidden, head, labels, rows, options, reference)


def _put_together(
    hidden, weight, bias, labels, rows, ref_hidden, ref_weight, ref_bias, strengths, kind, logit_scale, softcap, *options
):  # fmt: skip
    reference = None if ref_hidden is None else Reference(ref_hidden, ref_weight, ref_bias, None, kind, strengths)
    return hidden, Head(weight, bias, logit_scale, softcap), labels, rows, Options(*options), reference


@_per_token.register_fake
def _(hidden, weight, bias, labels, rows, *others):
    *_, compute_dtype, _, _, _, form_x = others
    x_shape = (rows.shape[0], hidden.shape[2]) if form_x else (0,)
    dtype = Options(compute_dtype, None, None).result_dtype
    values, x = hidden.new_empty(labels.shape, dtype=dtype), hidden.new_empty(x_shape, dtype=dtype if form_x else torch.float32)
    return values, x, hidden.new_empty(0, dtype=torch.float32)


@_per_token_backward.register_fake
def _(upstream, hidden, weight, bias, *others):
    leaves = zip((hidden, weight, bias), others[-1])
    return tuple(leaf.new_empty(leaf.shape) if need else hidden.new_empty(0) for leaf, need in leaves)  # contiguous


def _save_per_token(ctx, inputs, output):
    hidden, *_, ctx.form_x = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # of the rows there is none
    ctx.hidden_shape, ctx.dtype, ctx.n_inputs = hidden.shape, hidden.dtype, len(inputs)
    ctx.save_for_backward(output[2], *((inputs[4], output[1]) if ctx.form_x else inputs[:9]))
    ctx.others = inputs[9:-1]


def _backward_per_token(ctx, upstream, *_):
    if upstream is None:
        return (None,) * ctx.n_inputs
    anchor, *saved = ctx.saved_tensors
    if ctx.form_x:
        rows, x = saved
        rows = rows.to(x.device, non_blocking=True)
        gradients = (frozen_head_gradient(rows, x, upstream, ctx.dtype, ctx.hidden_shape), None, None)
    else:
        needs = list(ctx.needs_input_grad[:3])
        with torch.no_grad():
            gradients = _per_token_backward(upstream, *saved, *ctx.others, needs)
        gradients = [g if need else None for g, need in zip(gradients, needs)]
    return *once_differentiable(anchor, gradients), *(None,) * (ctx.n_inputs - 3)


_FORMULAS = {
    _objective: (_save_swept, _backward_swept),
    _gnb: (_save_swept, _backward_swept),
    _per_token: (_save_per_token, _backward_per_token),
}
for _op, (_save, _backward) in _FORMULAS.items():
    _op.register_autograd(_backward, setup_context=_save)


def per_token(hidden, head, labels, rows, options, reference):
    """`linear_logprob`, or `linear_kl` with a reference, as an opaque op."""
    reference = Reference(None, None) if reference is None else reference
    needs = wanted(hidden, head.weight, head.bias)
    return _apply(
        _per_token, hidden, head.weight, head.bias, labels, with_rows(rows, labels), reference.hidden, reference.weight,
        reference.bias, reference.strengths, reference.kind, float(head.logit_scale), head.softcap, *options,
        options.fused and needs["hidden"] and not (needs["weight"] or needs["bias"]),
    )[0]  # fmt: skip


@torch.library.custom_op("soul_kernels::linear_statistics", mutates_args=())
def _statistics(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, rows: Tensor, logit_scale: float,
    softcap: float | None, compute_dtype: torch.dtype, logits_dtype: torch.dtype, chunk_bytes: int, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`TokenStatistics` as a tuple."""
    from soul_kernels.linear_loss import measure

    options = Options(compute_dtype, logits_dtype, chunk_bytes, backend)
    return tuple(measure(hidden, Head(weight, bias, logit_scale, softcap), labels, rows, options))


@_statistics.register_fake
def _(hidden, weight, bias, labels, *others):
    *_, compute_dtype, _, _, _ = others
    dtype = Options(compute_dtype, None, None).result_dtype
    return tuple(hidden.new_empty(labels.shape, dtype=dtype) for _ in TokenStatistics._fields)


def statistics(hidden, head, labels, rows, options):
    """`linear_statistics` as an opaque op."""
    return TokenStatistics(*_statistics(
        hidden.detach(), head.weight.detach(), None if head.bias is None else head.bias.detach(), labels,
        with_rows(rows, labels), float(head.logit_scale), head.softcap, *options,
    ))  # fmt: skip

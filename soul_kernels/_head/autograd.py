"""Functions of autograd around the sweeps, which compute the gradients themselves."""

from collections.abc import Callable
from typing import Any, NoReturn, TypeAlias

import torch
from torch import Tensor

from soul_kernels._head.checks import Needs
from soul_kernels._head.gradients import (
    Gradients,
    HeadGradients,
    dtypes_of,
    frozen_head_gradient,
    rounded_gradients,
    scaled_gradients,
)
from soul_kernels._head.rows import HeadRows
from soul_kernels._head.sweeps import SweepResult, add_gradients, sweep_tokens, token_coefficients
from soul_kernels.chunks import ResolvedOptions
from soul_kernels.errors import argument_error
from soul_kernels.tokens import Head

Context: TypeAlias = Any  # torch's context of a function, on which the function may set any attribute


def refuse(derivatives: str) -> NoReturn:
    """Raise for derivatives that do not exist, because the op computes its own gradients."""
    remedy = "pass it, and call the op outside of torch.compile and vmap"
    raise argument_error("backend", f"'reference' for {derivatives}", "an op with gradients of its own", remedy)


class _Once(torch.autograd.Function):
    """Identity on gradients that raises when it is differentiated."""

    generate_vmap_rule = True

    @staticmethod
    def forward(anchor: Tensor, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(g.view_as(g) for g in gradients)

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Context, *_: Tensor) -> NoReturn:
        refuse("second derivatives")

    @staticmethod
    def jvp(ctx: Context, *_: Tensor) -> NoReturn:
        refuse("second derivatives")


def once_differentiable(anchor: Tensor, gradients: Gradients) -> Gradients:
    """Return the gradients of an op, wrapped so that a second derivative raises.

    Second derivatives can be asked for under ``create_graph=True`` and torch.func. Unwrapped gradients would be constants to
    autograd, and would be left out of a second derivative silently.

    Args:
        anchor: an empty output of the op that requires a gradient. No caller gets it, because a caller may change an output in
            place.
        gradients: each may be None.
    """
    if not torch.is_grad_enabled() or not anchor.requires_grad:
        return gradients
    once = iter(_Once.apply(anchor, *(g for g in gradients if g is not None)))
    x, weight, bias = (g if g is None else next(once) for g in gradients)
    return x, weight, bias


class Swept(torch.autograd.Function):
    """Loss with gradients that the forward sweep computes; backward only scales them.

    It returns the loss, the values per token (not differentiable), and the anchor of `once_differentiable`.
    """

    @staticmethod
    def forward(
        ctx: Context, hidden: Tensor, weight: Tensor, bias: Tensor | None, sweep: Callable[[], SweepResult]
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(hidden.device.type, enabled=False):
            loss, per_token, token_indices, gradients = sweep()
        anchor = loss.new_empty(0)
        if any(gradient is not None for gradient in gradients):
            # Saved tensors, unlike attributes of ctx, are freed as soon as backward has used them.
            ctx.save_for_backward(anchor, token_indices, *gradients)
        ctx.hidden_shape = hidden.shape
        ctx.dtypes = dtypes_of(hidden, weight, bias)
        ctx.mark_non_differentiable(per_token)
        ctx.set_materialize_grads(False)
        return loss, per_token, anchor

    @staticmethod
    def backward(ctx: Context, scale: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if scale is None:
            return (None,) * 4
        anchor, token_indices, x, weight, bias = ctx.saved_tensors
        last = not torch._C._autograd._get_current_graph_task_keep_graph()  # with retain_graph, backward may run again
        gradients = scaled_gradients(token_indices, (x, weight, bias), scale, ctx.dtypes, ctx.hidden_shape, last)
        return *once_differentiable(anchor, gradients), None


class PerToken(torch.autograd.Function):
    """Values per token, [B, T] or [K, B, T], for any differentiable use; then predictions; then the anchor.

    The predictions [B, T] have no gradient, and are [0] if they were not asked for. For the anchor see `once_differentiable`.

    With a frozen head, forward computes the gradient of each row for an upstream gradient of 1, and backward multiplies it (2
    GEMMs). With a trained head, dW needs the upstream gradients first, so backward computes the logits again (4 GEMMs). So it
    does for several values of each token, whose gradients would each take as much memory as hidden.
    """

    @staticmethod
    def forward(
        ctx: Context, hidden: Tensor, weight: Tensor, bias: Tensor | None, head_rows: HeadRows, needs: Needs
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.hidden_shape = hidden.shape
        ctx.dtypes = dtypes_of(hidden, weight, bias)
        ctx.needs = needs
        ctx.forms_x = not (needs.weight or needs.bias or head_rows.row_values.lse)
        with torch.autocast(hidden.device.type, enabled=False):
            values, x = sweep_tokens(head_rows, form_x=needs.hidden and ctx.forms_x)
        anchor = values.new_empty(0)
        predictions = head_rows.token_predictions()
        ctx.mark_non_differentiable(predictions)
        if ctx.forms_x:
            head_rows.free_scratch()
            ctx.save_for_backward(anchor, head_rows.indices, x)
            return values, predictions, anchor
        # Saved tensors, unlike attributes of ctx, are freed after backward, and an in-place change of the weight is noticed.
        ctx.save_for_backward(anchor, *head_rows.release_tensors())
        ctx.head_rows = head_rows
        return values, predictions, anchor

    @staticmethod
    def backward(ctx: Context, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        anchor, *saved = ctx.saved_tensors
        with torch.no_grad():
            gradients = PerToken.gradients(ctx, saved, upstream)
        return *once_differentiable(anchor, gradients), None, None

    @staticmethod
    def gradients(ctx: Context, saved: list[Tensor], upstream: Tensor) -> Gradients:
        """Return the gradients of hidden, weight and bias."""
        if ctx.forms_x:
            token_indices, x = saved
            return frozen_head_gradient(token_indices, x, upstream, ctx.dtypes[0], ctx.hidden_shape), None, None
        head_rows = ctx.head_rows.with_tensors(saved)
        gradients = HeadGradients(head_rows, ctx.needs)
        values = head_rows.gather(upstream.to(head_rows.options.result_dtype))
        with torch.autocast(upstream.device.type, enabled=False):
            add_gradients(head_rows, gradients, head_rows.even_chunks(), *token_coefficients(head_rows, values))
        return rounded_gradients(head_rows.indices, gradients.sums(), ctx.dtypes, ctx.hidden_shape)


def reference_gradients(
    compute: Callable[[Tensor, Head, ResolvedOptions], tuple[Tensor, ...]],
    hidden: Tensor,
    head: Head,
    options: ResolvedOptions,
    needs: Needs,
    upstream: Tensor | None = None,
) -> tuple[tuple[Tensor, ...], Gradients]:
    """Return the outputs of ``compute(hidden, head, options)``, an op's reference, and the gradients of the first output.

    The gradients are those by hidden, weight and bias, in fp32 or fp64, not yet rounded to the dtypes of these tensors. They
    are None where ``needs`` is false.
    """
    dtype = options.result_dtype
    rounded = (hidden.to(options.compute_dtype), head.weight.to(options.compute_dtype), head.bias)
    # A custom op runs below autograd, where nothing would be recorded.
    with torch.inference_mode(False), torch.set_grad_enabled(any(needs)):
        x, weight, bias = (
            None if tensor is None else tensor.detach().to(dtype).requires_grad_(need) for tensor, need in zip(rounded, needs)
        )
        assert x is not None and weight is not None
        outputs = compute(x, head._replace(weight=weight, bias=bias), options._replace(compute_dtype=dtype))
        leaves = [leaf for leaf, need in zip((x, weight, bias), needs) if need and leaf is not None]
        derivatives: tuple[Tensor | None, ...] = (None,) * len(leaves)
        if outputs[0].requires_grad:
            derivatives = torch.autograd.grad(outputs[0], leaves, upstream, allow_unused=True)
    filled = iter(leaf.new_zeros(leaf.shape) if g is None else g.contiguous() for leaf, g in zip(leaves, derivatives))
    x_gradient, weight_gradient, bias_gradient = (next(filled) if need else None for need in needs)
    return tuple(output.detach() for output in outputs), (x_gradient, weight_gradient, bias_gradient)

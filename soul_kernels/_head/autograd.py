"""Losses over the rows of a language-model head: one sweep over their chunks, or two, and what autograd sees of it."""

import dataclasses
import itertools
import secrets
import weakref
from collections.abc import Callable, Sequence
from typing import NoReturn

import torch
from torch import Tensor

from soul_kernels._head.checks import check_labels
from soul_kernels._head.gradients import HeadGradients
from soul_kernels._head.rows import HeadRows
from soul_kernels.chunks import Options
from soul_kernels.errors import argument_error, check_choice
from soul_kernels.tensors import check_scalar
from soul_kernels.tokens import Head

TOGETHER = {"sequences": 1, "pairs": 2}  # sequences that no chunk may part, by what an objective is a sum over

_objectives = weakref.WeakValueDictionary()
_numbers = itertools.count(1)
_process = (1 << 62) | (secrets.randbits(29) << 32)  # what tells the numbers in programs that this process has exported


def register_objective(objective):
    """A number for an objective, by which an opaque op finds it under torch.compile, for as long as it lives.

    An objective with this number as its attribute ``key`` is compiled without a graph break: those of ``soul.losses`` are.
    """
    number = next(_numbers)
    _objectives[number] = objective
    return number


def objective_of(number):
    """The objective of a number that `register_objective` or `exported_number` gave."""
    known = number ^ _process if number >> 62 else number
    if known not in _objectives:
        remedy = "keep a reference to it; a program that is to run in another process can return log-probabilities only"
        raise argument_error("objective", "one that is alive in this process", f"number {number}, which is not", remedy)
    return _objectives[known]


def exported_number(number: int) -> int:
    """The number of an objective in a program that is exported: in another process it belongs to none, not to another one."""
    return number ^ _process


def sweep_objective(rows, objective, batch, needs):
    """Runs the objective over all chunks; returns the loss and the gradients (None if none is wanted)."""
    gradients = HeadGradients(rows, **needs) if any(needs.values()) else None
    additive = getattr(objective, "additive", None)
    check_choice("objective.additive", additive, (None, "tokens", *TOGETHER))
    chunks = rows.even_chunks()
    if gradients is None or len(chunks) == 0 or (len(chunks) > 1 and additive is None):
        return _two_sweeps(rows, objective, batch, chunks, gradients)
    if len(chunks) > 1 and additive in TOGETHER:
        sequence_chunks = rows.sequence_chunks(TOGETHER[additive])
        if sequence_chunks is None:
            return _two_sweeps(rows, objective, batch, chunks, gradients)
        chunks = sequence_chunks
    loss = torch.zeros((), dtype=rows.options.result_dtype, device=rows.x.device)
    for chunk in chunks:
        start, stop, first, last = chunk
        rows.load(chunk)
        rows.measure(chunk)
        part = _measured(rows, batch, start, stop).sequences(first, last)
        if len(chunks) > 1 and additive == "tokens":  # sequences are cut: leave the tokens of other chunks out
            part = part.tokens(rows.scatter(torch.ones_like(rows.labels[start:stop]), start, stop).bool())
        value, derivatives = _differentiate(objective, rows.log_probs(start, stop)[first:last], part)
        loss += value
        coefficients = []
        for derivative in derivatives:
            dense = torch.zeros(rows.shape, dtype=derivative.dtype, device=loss.device)
            dense[first:last] = derivative
            coefficients.append(rows.gather(dense, start, stop))
        gradients.add(chunk, *coefficients)
    return loss, gradients


def _two_sweeps(rows, objective, batch, chunks, gradients):
    """All log-probabilities first, then, where gradients are wanted, the logits once more."""
    for chunk in chunks:
        rows.load(chunk)
        rows.measure(chunk)
    loss, derivatives = _differentiate(objective, rows.log_probs(), _measured(rows, batch))
    if gradients is not None:
        add_gradients(rows, gradients, chunks, *map(rows.gather, derivatives))
    return loss, gradients


def add_gradients(rows, gradients, chunks, *coefficients):
    """Computes the logits of measured chunks again and adds up the gradients for given coefficients, [R] each."""
    for chunk in chunks:
        rows.load(chunk)
        gradients.add(chunk, *(values[chunk.part] for values in coefficients))


def _measured(rows, batch, start=0, stop=None):
    """The batch, with what was measured of rows ``start`` to ``stop`` beside their log-probabilities."""
    if rows.reference is not None:
        divergences, entropies = (rows.scatter(values[start:stop], start, stop) for values in rows.divergences)
        batch = dataclasses.replace(batch, divergences=divergences, ref_entropies=entropies)
    if rows.has_all_statistics:
        batch = dataclasses.replace(batch, statistics=rows.token_statistics(start, stop))
    return batch


def _differentiate(objective, logps, batch):
    """Value of the objective and, from its own code, its derivative by every log-probability, and by every divergence if there
    are any.
    """
    with torch.enable_grad():
        leaves = [logps.detach().requires_grad_()]
        if batch.divergences is not None:
            leaves.append(batch.divergences.detach().requires_grad_())
            batch = dataclasses.replace(batch, divergences=leaves[1])
        value = objective(leaves[0], batch)
        check_scalar(value)
        derivatives = [None] * len(leaves)
        if value.requires_grad:  # not if the objective looks at nothing here
            derivatives = torch.autograd.grad(value, leaves, allow_unused=True)
    return value.detach().to(logps.dtype), [torch.zeros_like(x) if d is None else d for x, d in zip(leaves, derivatives)]


def _scaled(gradient, scale, dtype, last):
    """fp32 ``gradient * scale`` rounded once to ``dtype``; out of place unless this is its ``last`` use."""
    if torch._C._are_functorch_transforms_active():  # vmap knows no out=, which spares a copy
        return (gradient * scale).to(dtype)
    on_cpu = gradient.device.type == "cpu"
    if last and (on_cpu or gradient.dtype == dtype):  # on a CPU ``out`` of another dtype would take a copy more
        return (gradient if on_cpu and scale == 1 else gradient.mul_(scale)).to(dtype)
    return torch.mul(gradient, scale, out=torch.empty_like(gradient, dtype=dtype))


def _to_hidden(indices, x_gradient, shape):
    """Gradient of the kept rows -> gradient of hidden [B, T, D], zeros at ignored tokens."""
    full = x_gradient.new_zeros((shape[0] * shape[1], shape[2]))
    return full.index_copy_(0, indices, x_gradient).view(shape)


@torch.no_grad()
def scaled_gradients(indices, gradients, scale, dtypes, hidden_shape, last=False):
    """fp32 gradients of rows, weight and bias (each may be None) times an upstream factor: those of the inputs.

    With ``last`` nobody needs the given ones any more, and they may be those that are returned.
    """
    x, weight, bias = (g if g is None else _scaled(g, scale, dtype, last) for g, dtype in zip(gradients, dtypes))
    return None if x is None else _to_hidden(indices, x, hidden_shape), weight, bias


def refuse(derivatives: str) -> NoReturn:
    """Raise for derivatives that an op which forms its gradients itself does not have."""
    remedy = "pass it, and call the op outside of torch.compile and vmap"
    raise argument_error("backend", f"'reference' for {derivatives}", "an op with gradients of its own", remedy)


class _Once(torch.autograd.Function):
    """Gradients, as they are; to differentiate them is an error."""

    generate_vmap_rule = True

    @staticmethod
    def forward(anchor, *gradients):
        return tuple(g.view_as(g) for g in gradients)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_):
        refuse("second derivatives")

    @staticmethod
    def jvp(ctx, *_):
        refuse("second derivatives")


def once_differentiable(anchor: Tensor, gradients: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """The gradients (each may be None) of an op, so that a second derivative, where it may be asked for (``create_graph=True``,
    torch.func), raises: as constants they would be left out of it without a word.

    ``anchor`` is an output of the op, empty, that nobody else sees: a caller may change any other in place.
    """
    if not torch.is_grad_enabled() or not anchor.requires_grad:
        return gradients
    once = iter(_Once.apply(anchor, *(g for g in gradients if g is not None)))
    return [g if g is None else next(once) for g in gradients]


class Swept(torch.autograd.Function):
    """A loss whose gradients are formed in one forward sweep; backward only scales.

    ``sweep()`` returns the loss, other outputs (not differentiable), the rows, and their `HeadGradients` or None. Loss and
    other outputs are returned, and the anchor of `once_differentiable`.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, sweep):
        with torch.autocast(hidden.device.type, enabled=False):
            loss, others, rows, gradients = sweep()
        anchor = loss.new_empty(0)
        if gradients is not None:  # saved, not kept on ctx: freed as soon as backward has used them
            ctx.save_for_backward(anchor, rows.indices, gradients.x, gradients.weight, gradients.bias)
        ctx.hidden_shape, ctx.dtypes = hidden.shape, [None if t is None else t.dtype for t in (hidden, weight, bias)]
        ctx.mark_non_differentiable(*others)
        ctx.set_materialize_grads(False)
        return loss, *others, anchor

    @staticmethod
    def backward(ctx, scale, *_):
        if scale is None:
            return (None,) * 4
        anchor, indices, *gradients = ctx.saved_tensors
        last = not torch._C._autograd._get_current_graph_task_keep_graph()  # retain_graph: it may be walked once more
        gradients = scaled_gradients(indices, gradients, scale, ctx.dtypes, ctx.hidden_shape, last)
        return *once_differentiable(anchor, gradients), None


def per_token_values(hidden, head, labels, rows, options, reference, form_x):
    """What `PerToken` gives out, and with ``form_x``, for a frozen head, the gradient of each kept row, unscaled; else None."""
    check_labels(hidden, head.weight, labels, rows, fused=True)
    table = HeadRows(hidden, head, labels, rows, options, reference=reference)
    with torch.autocast(hidden.device.type, enabled=False):
        return _values(table, form_x)


def _values(rows, form_x):
    gradients = HeadGradients(rows, hidden=True, weight=False, bias=False) if form_x else None
    for chunk in rows.even_chunks():
        rows.load(chunk)
        rows.measure(chunk)
        if gradients is not None:
            ones = torch.ones_like(rows.statistics[0, chunk.part])
            gradients.add(chunk, *_coefficients_of(rows, ones))
    values = rows.log_probs() if rows.reference is None else rows.scatter(rows.divergences[0])
    return values, None if gradients is None else gradients.x


@torch.no_grad()
def frozen_head_gradient(indices, x, upstream, dtype, shape):
    """Gradient of hidden states from what `per_token_values` has formed, for a gradient of its values."""
    x = x * upstream.to(x.dtype).reshape(-1).index_select(0, indices)[:, None]
    return _to_hidden(indices, x.to(dtype), shape)


def per_token_gradients(hidden, head, labels, rows, options, reference, upstream, needs):
    """Gradients of hidden, weight and bias for a gradient of what `PerToken` gives out, in one sweep of its own."""
    table = HeadRows(hidden, head, labels, rows, options, reference=reference)
    gradients, coefficients = HeadGradients(table, **needs), table.gather(upstream.to(options.result_dtype))
    with torch.autocast(hidden.device.type, enabled=False):
        for chunk in table.even_chunks():
            table.load(chunk)
            table.measure(chunk)
            gradients.add(chunk, *_coefficients_of(table, coefficients[chunk.part]))
    found = zip((gradients.x, gradients.weight, gradients.bias), (hidden, head.weight, head.bias))
    x, weight, bias = (g if g is None else g.to(leaf.dtype) for g, leaf in found)
    return None if x is None else _to_hidden(table.indices, x, hidden.shape), weight, bias


def reference_gradients(
    reference: Callable, hidden: Tensor, head: Head, options: Options, needs: dict[str, bool], upstream: Tensor | None = None
) -> tuple[tuple[Tensor, ...], list[Tensor | None]]:
    """What ``reference(hidden, head, options)`` returns, a tuple, and the gradients of its first tensor by hidden, weight and
    bias: fp32 or fp64, not yet rounded to the dtypes of these; None where none is wanted.
    """
    dtype = options.result_dtype
    rounded = (hidden.to(options.compute_dtype), head.weight.to(options.compute_dtype), head.bias)
    # Ops are called below autograd, where nothing would be recorded.
    with torch.inference_mode(False), torch.set_grad_enabled(any(needs.values())):
        leaves = [t if t is None else t.detach().to(dtype).requires_grad_(need) for t, need in zip(rounded, needs.values())]
        outputs = reference(leaves[0], Head(*leaves[1:], **head.transform()), options._replace(compute_dtype=dtype))
        wanted = [leaf for leaf, need in zip(leaves, needs.values()) if need]
        gradients = [None] * len(wanted)
        if outputs[0].requires_grad:
            gradients = torch.autograd.grad(outputs[0], wanted, upstream, allow_unused=True)
    gradients = iter([leaf.new_zeros(leaf.shape) if g is None else g.contiguous() for leaf, g in zip(wanted, gradients)])
    return tuple(output.detach() for output in outputs), [next(gradients) if need else None for need in needs.values()]


class PerToken(torch.autograd.Function):
    """A number for each token, [B, T], under any function. Frozen head: the gradient rows are formed in forward, unscaled, and
    multiplied in backward (2 GEMMs). Trained head: dW needs the coefficients first, so backward computes the logits again (4
    GEMMs). The second output is the anchor of `once_differentiable`.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, rows, needs):
        ctx.hidden_shape, ctx.dtypes = hidden.shape, [None if t is None else t.dtype for t in (hidden, weight, bias)]
        ctx.needs = needs
        ctx.head_frozen = not (needs["weight"] or needs["bias"])
        with torch.autocast(hidden.device.type, enabled=False):
            values, x = _values(rows, form_x=needs["hidden"] and ctx.head_frozen)
        anchor = values.new_empty(0)
        if ctx.head_frozen:
            rows.free_scratch()
            ctx.save_for_backward(anchor, rows.indices, x)
            return values, anchor
        # The tensors are saved, not kept on ctx: freed after backward, and a change of the weight in place is noticed.
        ctx.save_for_backward(anchor, *rows.give_up_tensors())
        ctx.rows = rows
        return values, anchor

    @staticmethod
    def backward(ctx, upstream, _):
        anchor, *saved = ctx.saved_tensors
        with torch.no_grad():
            gradients = PerToken.gradients(ctx, saved, upstream)
        return *once_differentiable(anchor, gradients), None, None

    @staticmethod
    def gradients(ctx, saved, upstream):
        """Of hidden, weight and bias."""
        if ctx.head_frozen:
            return frozen_head_gradient(*saved, upstream, ctx.dtypes[0], ctx.hidden_shape), None, None
        rows = ctx.rows.with_tensors(saved)
        gradients = HeadGradients(rows, **ctx.needs)
        with torch.autocast(upstream.device.type, enabled=False):
            add_gradients(
                rows,
                gradients,
                rows.even_chunks(),
                *_coefficients_of(rows, rows.gather(upstream.to(rows.options.result_dtype))),
            )
        found = (gradients.x, gradients.weight, gradients.bias)
        x, weight, bias = (g if g is None else g.to(dtype) for g, dtype in zip(found, ctx.dtypes))
        return None if x is None else _to_hidden(rows.indices, x, ctx.hidden_shape), weight, bias


def _coefficients_of(rows, values):
    """Derivatives by log-probability and divergence where only the one that `PerToken` gives out counts."""
    return (values,) if rows.reference is None else (torch.zeros_like(values), values)

"""Sweeps over the chunks of a head's rows, one for each op on hidden states, and the calls of the reference in their place.

Every function here computes the results of an op from tensors that hold values, outside of autograd and of torch.compile.
`autograd` wraps the results for autograd; `custom_ops` runs the same functions within opaque ops.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from soul_kernels._head.checks import (
    LOGPS,
    Comparison,
    Needs,
    RowValues,
    check_indices,
    check_labels,
    check_reference,
    local_comparison,
)
from soul_kernels._head.gradients import Gradients, HeadGradients, dtypes_of, rounded_gradients
from soul_kernels._head.rows import DrawnRows, HeadRows
from soul_kernels.chunks import Chunk, ResolvedOptions
from soul_kernels.errors import argument_error, check_choice
from soul_kernels.reference import linear_cross_entropy as cross_entropy_reference
from soul_kernels.reference import linear_gnb as gnb_reference
from soul_kernels.reference import linear_kl as kl_reference
from soul_kernels.reference import linear_loss as loss_reference
from soul_kernels.reference.token_logprob import LOGP
from soul_kernels.tensors import check_scalar
from soul_kernels.tokens import (
    IGNORE_INDEX,
    Divergence,
    Head,
    ObjectiveFunction,
    Reference,
    TokenBatch,
    TokenStatistics,
)

# `additive` of an objective -> number of sequences in one term of its sum, which must stay in one chunk.
SEQUENCES_PER_TERM = {"sequences": 1, "pairs": 2}


class ObjectiveCall(NamedTuple):
    """Arguments of `soul_kernels.linear_objective` other than hidden states, head and options."""

    labels: Tensor
    objective: ObjectiveFunction
    token_indices: Tensor | None
    is_forget: Tensor | None
    ref_logps: Tensor | None
    reference: Reference | None


class CrossEntropyCall(NamedTuple):
    """Arguments of `soul_kernels.linear_cross_entropy` for a loss that is reduced to one number."""

    labels: Tensor
    token_indices: Tensor | None
    class_weights: Tensor | None
    label_smoothing: float
    z_loss: float
    reduction: str
    predict: bool


class SweepResult(NamedTuple):
    """Results of a sweep that computes the gradients of its loss.

    Attributes:
        loss: [].
        per_token: [B, T], not differentiable: log-probabilities, or drawn or predicted labels.
        token_indices: [R] int64, the tokens of the rows.
        gradients: fp32 gradients of the loss by rows, weight and bias; None for those that are not needed.
    """

    loss: Tensor
    per_token: Tensor
    token_indices: Tensor
    gradients: Gradients


NO_GRADIENTS: Gradients = (None, None, None)


# Objectives


def sweep_objective(hidden: Tensor, head: Head, call: ObjectiveCall, options: ResolvedOptions, needs: Needs) -> SweepResult:
    """Return an objective, its gradients, and the log-probabilities, computed in one or two sweeps."""
    check_labels(hidden, head, call.labels, call.token_indices, fused=True)
    head_rows = HeadRows(
        hidden, head, call.labels, call.token_indices, options,
        comparison=_comparison(hidden, head, call), all_statistics=getattr(call.objective, "needs_statistics", False),
    )  # fmt: skip
    batch = TokenBatch.from_labels(call.labels, call.is_forget, call.ref_logps)
    loss, gradients = _sweep_chunks(head_rows, call.objective, batch, needs)
    return SweepResult(loss, head_rows.log_probs(), head_rows.indices, gradients.sums() if gradients else NO_GRADIENTS)


def reference_objective(hidden: Tensor, head: Head, call: ObjectiveCall, options: ResolvedOptions) -> tuple[Tensor, Tensor]:
    """Return the loss and the log-probabilities, computed by the reference."""
    check_labels(hidden, head, call.labels, call.token_indices, fused=False)
    comparison = _comparison(hidden, head, call)
    reference = None if comparison is None else _ref_model_in_compute_dtype(comparison, options)
    hidden, head = _in_compute_dtype(hidden, head, options)
    loss, logps = loss_reference.linear_objective(
        hidden, head, call.labels, call.objective, is_forget=call.is_forget, ref_logps=call.ref_logps, reference=reference
    )
    check_scalar(loss)
    return loss, logps


def _comparison(hidden: Tensor, head: Head, call: ObjectiveCall) -> Comparison | None:
    """Return the comparison with a reference model that an objective needs, or None."""
    divergence: Divergence | None = getattr(call.objective, "divergence", None)
    if divergence is None:
        return None
    is_forget = call.is_forget
    if is_forget is None:  # on the device of the indices: selecting the rows of the reference model then waits for no device
        device = "cpu" if call.token_indices is None else call.token_indices.device
        is_forget = torch.ones(len(call.labels), dtype=torch.bool, device=device)
    comparison = check_reference(call.reference, hidden, head, divergence.kind, divergence.beta)
    return local_comparison(comparison, call.reference, head)._replace(
        needed=None if divergence.of == "all" else loss_reference.needed_sequences(divergence, is_forget),
        strengths=loss_reference.sequence_strengths(divergence, is_forget),
    )


def _sweep_chunks(
    head_rows: HeadRows, objective: ObjectiveFunction, batch: TokenBatch, needs: Needs
) -> tuple[Tensor, HeadGradients | None]:
    """Run the objective over all chunks; return the loss and the gradients (None if none is needed).

    One sweep is enough where chunks can be evaluated one by one: if there is only one, or if the objective is a sum whose terms
    (tokens, sequences or pairs) the chunks do not cut. It is enough too, with one read of the logits, if the objective is
    linear. Otherwise its derivatives are known only after a first sweep over all rows.
    """
    gradients = HeadGradients(head_rows, needs) if any(needs) else None
    additive = getattr(objective, "additive", None)
    check_choice("objective.additive", additive, (None, "tokens", *SEQUENCES_PER_TERM))
    chunks = head_rows.even_chunks()
    known_beforehand = getattr(objective, "linear", False) and head_rows.kind is None and not head_rows.has_all_statistics
    if known_beforehand and gradients is not None:
        return _linear_sweep(head_rows, objective, batch, chunks, gradients), gradients
    if gradients is None or len(chunks) == 0 or (len(chunks) > 1 and additive is None):
        return _two_sweeps(head_rows, objective, batch, chunks, gradients), gradients
    if len(chunks) > 1 and additive in SEQUENCES_PER_TERM:
        sequence_chunks = head_rows.sequence_chunks(SEQUENCES_PER_TERM[additive])
        if sequence_chunks is None:
            return _two_sweeps(head_rows, objective, batch, chunks, gradients), gradients
        chunks = sequence_chunks
    loss = torch.zeros((), dtype=head_rows.options.result_dtype, device=head_rows.x.device)
    for chunk in chunks:
        start, stop, first, last, _ = chunk
        head_rows.load(chunk)
        head_rows.measure(chunk)
        if first == last:  # of a process that has fewer chunks than others
            gradients.add(chunk, *torch.zeros((1 if head_rows.kind is None else 2, 0), dtype=loss.dtype, device=loss.device))
            continue
        piece = _measured(head_rows, batch, start, stop).sequences(first, last)
        if len(chunks) > 1 and additive == "tokens":  # sequences are cut: leave the tokens of other chunks out
            piece = piece.tokens(head_rows.scatter(torch.ones_like(head_rows.labels[start:stop]), start, stop).bool())
        value, derivatives = _differentiate(objective, head_rows.log_probs(start, stop)[first:last], piece)
        loss += value
        coefficients = []
        for derivative in derivatives:
            dense = torch.zeros(head_rows.shape, dtype=derivative.dtype, device=loss.device)
            dense[first:last] = derivative
            coefficients.append(head_rows.gather(dense, start, stop))
        gradients.add(chunk, *coefficients)
    return loss, gradients


def _linear_sweep(
    head_rows: HeadRows, objective: ObjectiveFunction, batch: TokenBatch, chunks: list[Chunk], gradients: HeadGradients
) -> Tensor:
    """Return the loss of a linear objective, whose coefficients are its derivatives at log-probabilities of 0."""
    zeros = torch.zeros(head_rows.shape, dtype=head_rows.options.result_dtype, device=head_rows.x.device)
    # A derivative that depends on the log-probabilities requires a gradient itself, unless the objective has detached them.
    _, (derivative,) = _differentiate(objective, zeros, batch, create_graph=True)
    if derivative.requires_grad:
        expected = "False for an objective whose derivatives depend on the log-probabilities"
        raise argument_error("objective.linear", expected, True, "leave it out")
    coefficients = head_rows.gather(derivative)
    for chunk in chunks:
        head_rows.load(chunk)
        gradients.measure_and_add(chunk, coefficients[chunk.span])
    with torch.no_grad():
        return objective(head_rows.log_probs(), batch).to(zeros.dtype)


def _two_sweeps(
    head_rows: HeadRows, objective: ObjectiveFunction, batch: TokenBatch, chunks: list[Chunk], gradients: HeadGradients | None
) -> Tensor:
    """Return the loss; the logits are computed once for all log-probabilities, and again if gradients are needed."""
    for chunk in chunks:
        head_rows.load(chunk)
        head_rows.measure(chunk)
    loss, derivatives = _differentiate(objective, head_rows.log_probs(), _measured(head_rows, batch))
    if gradients is not None:
        add_gradients(head_rows, gradients, chunks, *map(head_rows.gather, derivatives))
    return loss


def add_gradients(
    head_rows: HeadRows, gradients: HeadGradients, chunks: list[Chunk], *coefficients: Tensor | None
) -> None:  # fmt: skip
    """Compute the logits of measured chunks again and add up the gradients for given coefficients, [R] each."""
    for chunk in chunks:
        head_rows.load(chunk)
        gradients.add(chunk, *_of_chunk(chunk, coefficients))


def _of_chunk(chunk: Chunk, coefficients: Sequence[Tensor | None]) -> Any:
    """Return the entries of a chunk in coefficients of all rows, [R] each; None stays None."""
    return tuple(None if values is None else values[chunk.span] for values in coefficients)


def _measured(head_rows: HeadRows, batch: TokenBatch, start: int = 0, stop: int | None = None) -> TokenBatch:
    """Return the batch with the divergences and statistics of rows ``start`` to ``stop``."""
    if head_rows.kind is not None:
        values = head_rows.divergences[:2]
        divergences, entropies = (head_rows.scatter(value[start:stop], start, stop) for value in values)
        batch = dataclasses.replace(batch, divergences=divergences, ref_entropies=entropies)
    if head_rows.has_all_statistics:
        batch = dataclasses.replace(batch, statistics=head_rows.token_statistics(start, stop))
    return batch


def _differentiate(
    objective: ObjectiveFunction, logps: Tensor, batch: TokenBatch, create_graph: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """Return the value of the objective and its derivatives, from autograd; with ``create_graph`` those have a graph.

    They are the derivatives by the log-probabilities and, if there are divergences, those by the divergences.
    """
    with torch.enable_grad():
        leaves = [logps.detach().requires_grad_()]
        if batch.divergences is not None:
            leaves.append(batch.divergences.detach().requires_grad_())
            batch = dataclasses.replace(batch, divergences=leaves[1])
        value = objective(leaves[0], batch)
        check_scalar(value)
        derivatives: tuple[Tensor | None, ...] = (None,) * len(leaves)
        if value.requires_grad:  # an objective may ignore all tokens of a chunk
            derivatives = torch.autograd.grad(value, leaves, allow_unused=True, create_graph=create_graph)
    filled = [torch.zeros_like(leaf) if d is None else d for leaf, d in zip(leaves, derivatives)]
    return value.detach().to(logps.dtype), filled


# Cross-entropy


def sweep_cross_entropy(
    hidden: Tensor, head: Head, call: CrossEntropyCall, options: ResolvedOptions, needs: Needs
) -> SweepResult:  # fmt: skip
    """Return a cross-entropy, the predicted labels, and the gradients, computed in one sweep.

    Each row's coefficients depend on its own values only, and without label smoothing and z-loss on none: then one kernel
    computes statistics and gradient.
    """
    check_labels(hidden, head, call.labels, call.token_indices, fused=True)
    formula = cross_entropy_reference.Formula.of(call.labels, *call[2:6])
    is_linear = not formula.needs_mean and formula.z_loss == 0.0
    row_values = RowValues(not is_linear, formula.needs_mean, call.class_weights, call.predict)
    head_rows = HeadRows(hidden, head, call.labels, call.token_indices, options, row_values=row_values)
    gradients = HeadGradients(head_rows, needs) if any(needs) else None
    for chunk in head_rows.even_chunks():
        labels = head_rows.labels[chunk.span]
        head_rows.load(chunk)
        if gradients is None:
            head_rows.measure(chunk)
        elif is_linear:
            (coefficients,) = _derivatives(formula, labels, [torch.zeros_like(head_rows.statistics[LOGP, chunk.span])])
            gradients.measure_and_add(chunk, coefficients)
        else:
            head_rows.measure(chunk)
            derivatives = _derivatives(formula, labels, head_rows.values(chunk.start, chunk.stop))
            gradients.add(chunk, derivatives[0], None, *derivatives[1:])
    loss = formula.losses(head_rows.labels, *head_rows.values()).sum()
    return SweepResult(
        loss, head_rows.token_predictions(), head_rows.indices, gradients.sums() if gradients else NO_GRADIENTS
    )  # fmt: skip


def _derivatives(formula: cross_entropy_reference.Formula, labels: Tensor, values: list[Tensor]) -> tuple[Tensor, ...]:
    """Return the derivatives of a cross-entropy by values of rows, [n] each."""
    with torch.inference_mode(False), torch.enable_grad():  # an opaque op runs below autograd
        leaves = [value.detach().clone().requires_grad_() for value in values]
        return torch.autograd.grad(formula.losses(labels, *leaves).sum(), leaves)


def reference_cross_entropy(
    hidden: Tensor, head: Head, call: CrossEntropyCall, options: ResolvedOptions
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the loss and the predicted labels of `sweep_cross_entropy`, computed by the reference."""
    check_labels(hidden, head, call.labels, call.token_indices, fused=False)
    formula = cross_entropy_reference.Formula.of(call.labels, *call[2:6])
    values, predictions = cross_entropy_reference.token_values(
        *_in_compute_dtype(hidden, head, options), call.labels, call.class_weights
    )
    return formula.losses(call.labels, *values).sum(), _asked(predictions, call.predict)


def _asked(predictions: Tensor, predict: bool) -> Tensor:
    """Return predictions [B, T], or [0] if they were not asked for."""
    return predictions if predict else predictions.new_empty(0)


# Labels that are drawn


def sweep_gnb(
    hidden: Tensor, head: Head, keep: Tensor, uniforms: Tensor, token_indices: Tensor | None, options: ResolvedOptions,
    needs: Needs, n_tokens: Tensor | float | None = None,
) -> SweepResult:  # fmt: skip
    """Return the loss of `soul_kernels.linear_gnb`, the drawn labels, and the gradients, computed in one sweep."""
    check_indices(token_indices, keep, hidden)
    head_rows = DrawnRows(hidden, head, keep, token_indices, options, uniforms)
    gradients = HeadGradients(head_rows, needs) if any(needs) else None
    count = keep.sum().clamp(min=1) if n_tokens is None else torch.as_tensor(n_tokens, device=keep.device)
    share = 1 / count.to(options.result_dtype)
    for chunk in head_rows.even_chunks():
        head_rows.load(chunk)
        head_rows.measure(chunk)
        coefficients = (-share).expand(chunk.stop - chunk.start).contiguous()
        if gradients is None:
            head_rows.gradient(chunk, coefficients)  # draws the labels
        else:
            gradients.add(chunk, coefficients)
    loss = -(head_rows.statistics[LOGP].sum() * share)
    labels = torch.full(head_rows.shape, IGNORE_INDEX, device=keep.device)
    labels.view(-1).index_copy_(0, head_rows.indices, head_rows.labels)
    return SweepResult(loss, labels, head_rows.indices, gradients.sums() if gradients else NO_GRADIENTS)


def reference_gnb(
    hidden: Tensor, head: Head, keep: Tensor, uniforms: Tensor, token_indices: Tensor | None, options: ResolvedOptions
) -> tuple[Tensor, Tensor]:
    """Return the loss and the labels of `soul_kernels.linear_gnb`, computed by the reference."""
    check_indices(token_indices, keep, hidden)
    hidden, head = _in_compute_dtype(hidden, head, options)
    return gnb_reference.linear_gnb(hidden, head, keep, uniforms)


# Values of tokens: log-probabilities, or divergences


def sweep_tokens(head_rows: HeadRows, form_x: bool) -> tuple[Tensor, Tensor | None]:
    """Return the log-probabilities, or with a reference model the divergences, [B, T]; and the gradients of the rows or None.

    These are [R, D], for upstream gradients of 1. They are computed with ``form_x``, for a frozen head. If `RowValues` ask for
    several values, the result is [K, B, T], and ``form_x`` must be false.
    """
    gradients = HeadGradients(head_rows, Needs(hidden=True, weight=False, bias=False)) if form_x else None
    for chunk in head_rows.even_chunks():
        head_rows.load(chunk)
        if gradients is None:
            head_rows.measure(chunk)
        else:
            _measure_and_add(head_rows, gradients, chunk, torch.ones_like(head_rows.statistics[0, chunk.span]))
    values = head_rows.log_probs() if head_rows.kind is None else head_rows.scatter(head_rows.divergences[0])
    if head_rows.row_values.lse:
        values = torch.stack([head_rows.scatter(value) for value in head_rows.values()])
    return values, None if gradients is None else gradients.sums()[0]


def _measure_and_add(head_rows: HeadRows, gradients: HeadGradients, chunk: Chunk, upstream: Tensor) -> None:
    """Measure a loaded chunk, and add its gradients for upstream gradients [n] of what `sweep_tokens` returns."""
    if head_rows.kind is None and not head_rows.row_values.lse:
        gradients.measure_and_add(chunk, upstream)
    else:
        head_rows.measure(chunk)
        gradients.add(chunk, *token_coefficients(head_rows, upstream))


def token_coefficients(head_rows: HeadRows, values: Tensor) -> Any:
    """Return the coefficients of rows for upstream gradients ``values``, [n] or [K, n], of what `sweep_tokens` returns."""
    if head_rows.row_values.lse:
        logps, *others = values.unbind()
        return logps, None, *others
    return (values,) if head_rows.kind is None else (torch.zeros_like(values), values)


def per_token_values(
    hidden: Tensor, head: Head, labels: Tensor, token_indices: Tensor | None, options: ResolvedOptions,
    comparison: Comparison | None, row_values: RowValues, form_x: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Return the predictions, and the results of `sweep_tokens`, for the arguments of an op."""
    check_labels(hidden, head, labels, token_indices, fused=True)
    head_rows = HeadRows(hidden, head, labels, token_indices, options, comparison=comparison, row_values=row_values)
    with torch.autocast(hidden.device.type, enabled=False):
        values, x = sweep_tokens(head_rows, form_x)
    return head_rows.token_predictions(), values, x


def per_token_gradients(
    hidden: Tensor, head: Head, labels: Tensor, token_indices: Tensor | None, options: ResolvedOptions,
    comparison: Comparison | None, row_values: RowValues, upstream: Tensor, needs: Needs,
) -> Gradients:  # fmt: skip
    """Return the gradients of hidden, weight and bias for an upstream gradient of `per_token_values`, in a new sweep."""
    head_rows = HeadRows(hidden, head, labels, token_indices, options, comparison=comparison, row_values=row_values)
    gradients = HeadGradients(head_rows, needs)
    coefficients = head_rows.gather(upstream.to(options.result_dtype))
    with torch.autocast(hidden.device.type, enabled=False):
        for chunk in head_rows.even_chunks():
            head_rows.load(chunk)
            _measure_and_add(head_rows, gradients, chunk, coefficients[..., chunk.span])
    dtypes = dtypes_of(hidden, head.weight, head.bias)
    return rounded_gradients(head_rows.indices, gradients.sums(), dtypes, hidden.shape)


def reference_per_token(
    hidden: Tensor, head: Head, labels: Tensor, token_indices: Tensor | None, options: ResolvedOptions,
    comparison: Comparison | None, row_values: RowValues = LOGPS,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the values of `sweep_tokens` and the predictions, computed by the reference."""
    check_labels(hidden, head, labels, token_indices, fused=False)
    hidden, head = _in_compute_dtype(hidden, head, options)
    if row_values.lse:
        stacked, predictions = cross_entropy_reference.token_values(hidden, head, labels, row_values.class_weights)
        return torch.stack(stacked[: 2 + row_values.mean]), _asked(predictions, row_values.predict)
    nothing = labels.new_empty(0)
    if comparison is None:
        return loss_reference.linear_logprob(hidden, head, labels), nothing
    reference = _ref_model_in_compute_dtype(comparison, options)
    values = kl_reference.linear_kl(
        hidden, head, labels, reference, kind=comparison.kind, strengths=comparison.strengths, beta=comparison.beta
    )
    return values, nothing


# Statistics


@torch.no_grad()
def sweep_statistics(
    hidden: Tensor, head: Head, labels: Tensor, token_indices: Tensor | None, options: ResolvedOptions
) -> TokenStatistics:
    """Return the results of `soul_kernels.linear_statistics`, computed in one sweep or by the reference."""
    check_labels(hidden, head, labels, token_indices, options.fused)
    if not options.fused:
        return loss_reference.linear_statistics(*_in_compute_dtype(hidden, head, options), labels)
    head_rows = HeadRows(hidden, head, labels, token_indices, options, all_statistics=True)
    with torch.autocast(hidden.device.type, enabled=False):
        for chunk in head_rows.even_chunks():
            head_rows.load(chunk)
            head_rows.measure(chunk)
    return head_rows.token_statistics()


def _in_compute_dtype(hidden: Tensor, head: Head, options: ResolvedOptions) -> tuple[Tensor, Head]:
    """Return hidden states and head, rounded to the compute dtype; the reference then computes in fp32."""
    return hidden.to(options.compute_dtype), head._replace(weight=head.weight.to(options.compute_dtype))


def _ref_model_in_compute_dtype(comparison: Comparison, options: ResolvedOptions) -> Reference:
    """Return the reference model of a comparison, rounded to the compute dtype."""
    hidden, head = _in_compute_dtype(comparison.hidden, comparison.head, options)
    return Reference(hidden, head.weight, head.bias)

"""The sweeps that the ops on hidden states run over the chunks of a head's rows, and their counterparts in the reference.

Every function here computes what an op returns, for tensors with values, without a graph around it. `autograd` shows the
results to autograd, `custom_ops` runs the same functions within opaque ops.
"""

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from soul_kernels._head.checks import (
    Comparison,
    Needs,
    check_indices,
    check_labels,
    check_reference,
)
from soul_kernels._head.gradients import Gradients, HeadGradients, rounded_gradients
from soul_kernels._head.rows import DrawnRows, HeadRows
from soul_kernels.chunks import Chunk, ResolvedOptions
from soul_kernels.errors import check_choice
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

TOGETHER = {"sequences": 1, "pairs": 2}  # sequences that stay in one chunk, by what an objective is a sum over


class ObjectiveCall(NamedTuple):
    """The arguments of `soul_kernels.linear_objective` beside hidden states, head and options."""

    labels: Tensor
    objective: ObjectiveFunction
    token_indices: Tensor | None
    is_forget: Tensor | None
    ref_logps: Tensor | None
    reference: Reference | None


class SweepResult(NamedTuple):
    """The results of a sweep that forms its gradients.

    Attributes:
        loss: [].
        per_token: [B, T], not differentiable: log-probabilities, or labels.
        token_indices: [R] int64, the tokens of the rows.
        gradients: of the loss by rows, weight and bias, fp32; None where none is needed.
    """

    loss: Tensor
    per_token: Tensor
    token_indices: Tensor
    gradients: Gradients


NO_GRADIENTS: Gradients = (None, None, None)


# Objectives


def sweep_objective(hidden: Tensor, head: Head, call: ObjectiveCall, options: ResolvedOptions, needs: Needs) -> SweepResult:
    """Compute an objective, the log-probabilities, and the gradients of the objective."""
    check_labels(hidden, head, call.labels, call.token_indices, fused=True)
    head_rows = HeadRows(
        hidden, head, call.labels, call.token_indices, options,
        comparison=_comparison(hidden, head, call), all_statistics=getattr(call.objective, "needs_statistics", False),
    )  # fmt: skip
    batch = TokenBatch.from_labels(call.labels, call.is_forget, call.ref_logps)
    loss, gradients = _sweep_chunks(head_rows, call.objective, batch, needs)
    return SweepResult(loss, head_rows.log_probs(), head_rows.indices, gradients.sums() if gradients else NO_GRADIENTS)


def reference_objective(hidden: Tensor, head: Head, call: ObjectiveCall, options: ResolvedOptions) -> tuple[Tensor, Tensor]:
    """Return loss and log-probabilities of the reference."""
    check_labels(hidden, head, call.labels, call.token_indices, fused=False)
    comparison = _comparison(hidden, head, call)
    reference = None
    if comparison is not None:
        ref_weight = comparison.head.weight.to(options.compute_dtype)
        reference = Reference(comparison.hidden.to(options.compute_dtype), ref_weight, comparison.head.bias)
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
    if is_forget is None:  # where the indices are, so that finding the rows of the reference model waits for no device
        device = "cpu" if call.token_indices is None else call.token_indices.device
        is_forget = torch.ones(len(call.labels), dtype=torch.bool, device=device)
    return check_reference(call.reference, hidden, head, divergence.kind)._replace(
        needed=None if divergence.of == "all" else loss_reference.needed_sequences(divergence, is_forget),
        strengths=loss_reference.sequence_strengths(divergence, is_forget),
    )


def _sweep_chunks(
    head_rows: HeadRows, objective: ObjectiveFunction, batch: TokenBatch, needs: Needs
) -> tuple[Tensor, HeadGradients | None]:
    """Run the objective over all chunks; return the loss and the gradients (None if none is needed).

    One sweep does where chunks can be evaluated one by one: where there is only one, or the objective is a sum over tokens,
    sequences or pairs that chunks do not cut. Otherwise its derivatives are known only after a first sweep over all rows.
    """
    gradients = HeadGradients(head_rows, needs) if any(needs) else None
    additive = getattr(objective, "additive", None)
    check_choice("objective.additive", additive, (None, "tokens", *TOGETHER))
    chunks = head_rows.even_chunks()
    if gradients is None or len(chunks) == 0 or (len(chunks) > 1 and additive is None):
        return _two_sweeps(head_rows, objective, batch, chunks, gradients), gradients
    if len(chunks) > 1 and additive in TOGETHER:
        sequence_chunks = head_rows.sequence_chunks(TOGETHER[additive])
        if sequence_chunks is None:
            return _two_sweeps(head_rows, objective, batch, chunks, gradients), gradients
        chunks = sequence_chunks
    loss = torch.zeros((), dtype=head_rows.options.result_dtype, device=head_rows.x.device)
    for chunk in chunks:
        start, stop, first, last = chunk
        head_rows.load(chunk)
        head_rows.measure(chunk)
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


def _two_sweeps(
    head_rows: HeadRows, objective: ObjectiveFunction, batch: TokenBatch, chunks: list[Chunk], gradients: HeadGradients | None
) -> Tensor:
    """Compute all log-probabilities first, then, where gradients are needed, the logits once more; return the loss."""
    for chunk in chunks:
        head_rows.load(chunk)
        head_rows.measure(chunk)
    loss, derivatives = _differentiate(objective, head_rows.log_probs(), _measured(head_rows, batch))
    if gradients is not None:
        add_gradients(head_rows, gradients, chunks, *map(head_rows.gather, derivatives))
    return loss


def add_gradients(head_rows: HeadRows, gradients: HeadGradients, chunks: list[Chunk], *coefficients: Tensor) -> None:
    """Compute the logits of measured chunks again and add up the gradients for given coefficients, [R] each."""
    for chunk in chunks:
        head_rows.load(chunk)
        gradients.add(chunk, *(values[chunk.span] for values in coefficients))


def _measured(head_rows: HeadRows, batch: TokenBatch, start: int = 0, stop: int | None = None) -> TokenBatch:
    """Return the batch with the divergences and statistics of rows ``start`` to ``stop``."""
    if head_rows.kind is not None:
        divergences, entropies = (head_rows.scatter(values[start:stop], start, stop) for values in head_rows.divergences)
        batch = dataclasses.replace(batch, divergences=divergences, ref_entropies=entropies)
    if head_rows.has_all_statistics:
        batch = dataclasses.replace(batch, statistics=head_rows.token_statistics(start, stop))
    return batch


def _differentiate(objective: ObjectiveFunction, logps: Tensor, batch: TokenBatch) -> tuple[Tensor, list[Tensor]]:
    """Return the value of the objective and, from its own code, its derivatives.

    They are those by every log-probability and, if there are divergences, those by every divergence.
    """
    with torch.enable_grad():
        leaves = [logps.detach().requires_grad_()]
        if batch.divergences is not None:
            leaves.append(batch.divergences.detach().requires_grad_())
            batch = dataclasses.replace(batch, divergences=leaves[1])
        value = objective(leaves[0], batch)
        check_scalar(value)
        derivatives: tuple[Tensor | None, ...] = (None,) * len(leaves)
        if value.requires_grad:  # an objective need not look at any token of this chunk
            derivatives = torch.autograd.grad(value, leaves, allow_unused=True)
    filled = [torch.zeros_like(leaf) if d is None else d for leaf, d in zip(leaves, derivatives)]
    return value.detach().to(logps.dtype), filled


# Labels that are drawn


def sweep_gnb(
    hidden: Tensor, head: Head, keep: Tensor, uniforms: Tensor, token_indices: Tensor | None, options: ResolvedOptions,
    needs: Needs,
) -> SweepResult:  # fmt: skip
    """Compute the loss of `soul_kernels.linear_gnb`, the labels that it draws, and its gradients."""
    check_indices(token_indices, keep, hidden)
    head_rows = DrawnRows(hidden, head, keep, token_indices, options, uniforms)
    gradients = HeadGradients(head_rows, needs) if any(needs) else None
    share = 1 / keep.sum().clamp(min=1).to(options.result_dtype)
    for chunk in head_rows.even_chunks():
        head_rows.load(chunk)
        head_rows.measure(chunk)
        coefficients = (-share).expand(chunk.stop - chunk.start).contiguous()
        if gradients is None:
            head_rows.gradient(chunk, coefficients)  # for its labels
        else:
            gradients.add(chunk, coefficients)
    loss = -(head_rows.statistics[LOGP].sum() * share)
    labels = torch.full(head_rows.shape, IGNORE_INDEX, device=keep.device)
    labels.view(-1).index_copy_(0, head_rows.indices, head_rows.labels)
    return SweepResult(loss, labels, head_rows.indices, gradients.sums() if gradients else NO_GRADIENTS)


def reference_gnb(
    hidden: Tensor, head: Head, keep: Tensor, uniforms: Tensor, token_indices: Tensor | None, options: ResolvedOptions
) -> tuple[Tensor, Tensor]:
    """Return loss and labels of the reference of `soul_kernels.linear_gnb`."""
    check_indices(token_indices, keep, hidden)
    hidden, head = _in_compute_dtype(hidden, head, options)
    return gnb_reference.linear_gnb(hidden, head, keep, uniforms)


# Values of tokens: log-probabilities, or divergences


def sweep_tokens(head_rows: HeadRows, form_x: bool) -> tuple[Tensor, Tensor | None]:
    """Return the log-probabilities [B, T], or with a reference model the divergences.

    With ``form_x``, for a frozen head, also return the gradient of each row for an upstream gradient of 1, [R, D]; else None.
    """
    gradients = HeadGradients(head_rows, Needs(hidden=True, weight=False, bias=False)) if form_x else None
    for chunk in head_rows.even_chunks():
        head_rows.load(chunk)
        head_rows.measure(chunk)
        if gradients is not None:
            ones = torch.ones_like(head_rows.statistics[0, chunk.span])
            gradients.add(chunk, *token_coefficients(head_rows, ones))
    values = head_rows.log_probs() if head_rows.kind is None else head_rows.scatter(head_rows.divergences[0])
    return values, None if gradients is None else gradients.x


def token_coefficients(head_rows: HeadRows, values: Tensor) -> tuple[Tensor, ...]:
    """Return derivatives by log-probability and divergence where only the one that `sweep_tokens` returns counts."""
    return (values,) if head_rows.kind is None else (torch.zeros_like(values), values)


def per_token_values(
    hidden: Tensor, head: Head, labels: Tensor, token_indices: Tensor | None, options: ResolvedOptions,
    comparison: Comparison | None, form_x: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Return the results of `sweep_tokens` for the arguments of an op."""
    check_labels(hidden, head, labels, token_indices, fused=True)
    head_rows = HeadRows(hidden, head, labels, token_indices, options, comparison=comparison)
    with torch.autocast(hidden.device.type, enabled=False):
        return sweep_tokens(head_rows, form_x)


def per_token_gradients(
    hidden: Tensor, head: Head, labels: Tensor, token_indices: Tensor | None, options: ResolvedOptions,
    comparison: Comparison | None, upstream: Tensor, needs: Needs,
) -> Gradients:  # fmt: skip
    """Return gradients of hidden, weight and bias for a gradient of `per_token_values`, in one sweep of its own."""
    head_rows = HeadRows(hidden, head, labels, token_indices, options, comparison=comparison)
    gradients = HeadGradients(head_rows, needs)
    coefficients = head_rows.gather(upstream.to(options.result_dtype))
    with torch.autocast(hidden.device.type, enabled=False):
        for chunk in head_rows.even_chunks():
            head_rows.load(chunk)
            head_rows.measure(chunk)
            gradients.add(chunk, *token_coefficients(head_rows, coefficients[chunk.span]))
    dtypes = (hidden.dtype, head.weight.dtype, None if head.bias is None else head.bias.dtype)
    return rounded_gradients(head_rows.indices, gradients.sums(), dtypes, hidden.shape)


def reference_per_token(
    hidden: Tensor, head: Head, labels: Tensor, token_indices: Tensor | None, options: ResolvedOptions,
    comparison: Comparison | None,
) -> Tensor:  # fmt: skip
    """Return the log-probabilities, or with a reference model the divergences, of the reference."""
    check_labels(hidden, head, labels, token_indices, fused=False)
    hidden, head = _in_compute_dtype(hidden, head, options)
    if comparison is None:
        return loss_reference.linear_logprob(hidden, head, labels)
    ref_weight = comparison.head.weight.to(options.compute_dtype)
    reference = Reference(comparison.hidden.to(options.compute_dtype), ref_weight, comparison.head.bias)
    return kl_reference.linear_kl(hidden, head, labels, reference, kind=comparison.kind, strengths=comparison.strengths)


# Statistics


@torch.no_grad()
def sweep_statistics(
    hidden: Tensor, head: Head, labels: Tensor, token_indices: Tensor | None, options: ResolvedOptions
) -> TokenStatistics:
    """Return the results of `soul_kernels.linear_statistics`, swept or by the reference."""
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
    """Round hidden states and weight, as the reference does before it computes in fp32."""
    return hidden.to(options.compute_dtype), head._replace(weight=head.weight.to(options.compute_dtype))

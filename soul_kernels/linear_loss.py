"""hidden @ weight.T -> per-token log-probabilities -> any objective, without an [N, V] tensor that outlives its chunk.

Only labelled tokens (label != -100) take part. A chunk of their rows is multiplied by the head into fp32 logits (cuBLAS), read
once for statistics, and turned into its gradient, which feeds the two gradient GEMMs at once. GEMM work in units of 2 N V D: 3
for a trained head, 2 for a frozen one, 1 without gradients; one more where the coefficients of a row can be known only after
all chunks have been seen; and one for the tokens whose divergence from a reference model is needed.

Memory beyond inputs and outputs: ``chunk_bytes`` of scratch, R D fp32 for the gradient of the rows, and V D fp32 for that of a
trained head, until backward; an fp32 head gets that one as its gradient. Without kernels also a few MiB for blocks of logits
and of a bf16 or fp16 weight, which is converted to fp32; a CPU with AMX rounds it to bf16 again, in its tiles. The reference
does not use ``chunk_bytes``: it makes divergences and statistics in chunks of 16 MiB of logits, and keeps the fp32 logits of
all labelled tokens for log-probabilities with gradients.

How an op runs: `_head.checks` checks the arguments, then it is an opaque op (`_head.custom_ops`, under torch.compile and where
tensors hold no values), the reference, or a sweep (`_head.sweeps`) that autograd sees as one function (`_head.autograd`).
"""

import functools
from typing import Literal, overload

import torch
from torch import Tensor

from soul_kernels._head import custom_ops
from soul_kernels._head.autograd import PerToken, Swept
from soul_kernels._head.checks import (
    check_head,
    check_labels,
    check_labels_type,
    check_per_sequence,
    check_reference,
    needed_gradients,
)
from soul_kernels._head.rows import HeadRows
from soul_kernels._head.sweeps import (
    ObjectiveCall,
    reference_objective,
    reference_per_token,
    sweep_objective,
    sweep_statistics,
)
from soul_kernels.chunks import DEFAULT_OPTIONS, LinearOptions, ResolvedOptions
from soul_kernels.tokens import Divergence, Head, ObjectiveFunction, Reference, TokenBatch, TokenStatistics

__all__ = ["TokenBatch", "linear_logprob", "linear_objective", "linear_statistics"]


def linear_logprob(
    hidden: Tensor, weight: Tensor | Head, labels: Tensor, *, bias: Tensor | None = None,
    options: LinearOptions = DEFAULT_OPTIONS,
) -> Tensor:  # fmt: skip
    """Return the log-probability of every label under a language-model head, differentiable::

        log_softmax((hidden @ weight.T + bias).float(), -1).gather(-1, labels[..., None])[..., 0]   # 0 where labels == -100

    The logits are fp32, whatever the dtype of the inputs, and exist one chunk at a time.

    Args:
        hidden: [B, T, D] fp32, bf16 or fp16 (without kernels also fp64), final hidden states. Under autocast they are
            converted, and so is the weight.
        weight: [V, D], the same dtype; or a `Head`, which has bias, scale and cap as well.
        labels: [B, T] int64, already shifted: ``labels[b, t]`` is predicted from ``hidden[b, t]``; -100 is ignored.
        bias: [V] or None, beside a weight that is a tensor.
        options: token indices, dtype of the logits, scratch memory, backend: see `LinearOptions`.

    Returns:
        [B, T] fp32 (fp64 for fp64 inputs, which the kernels do not take).

    Raises:
        ArgumentError: an argument does not fit or is a DTensor, or a label lies outside the vocabulary. With ``token_indices``
            on a GPU labels are not checked, to spare the wait; the log-probability of such a label is NaN. Fake and meta
            tensors hold no values to check. From backward: a second derivative is asked for where there is none.
    """
    head, resolved = check_head(hidden, weight, bias, options)
    token_indices = options.token_indices
    if custom_ops.is_opaque(resolved, hidden, head.weight, labels):
        check_labels_type(hidden, labels, token_indices)
        return custom_ops.per_token(hidden, head, labels, token_indices, resolved, None)
    if not resolved.fused:
        return reference_per_token(hidden, head, labels, token_indices, resolved, None)
    check_labels(hidden, head, labels, token_indices, fused=True)
    head_rows = HeadRows(hidden, head, labels, token_indices, resolved)
    return PerToken.apply(hidden, head.weight, head.bias, head_rows, needed_gradients(hidden, head))[0]


def linear_statistics(
    hidden: Tensor, weight: Tensor | Head, labels: Tensor, *, bias: Tensor | None = None,
    options: LinearOptions = DEFAULT_OPTIONS,
) -> TokenStatistics:  # fmt: skip
    """Return the statistics that metrics take of every token, from one read of the logits.

    They are log p(label), logsumexp, whether the label is the argmax, entropy, and variance of log p under the model.

    Args:
        hidden: [B, T, D], as in `linear_logprob`.
        weight: [V, D], or a `Head`.
        labels: [B, T] int64, as in `linear_logprob`.
        bias: [V] or None, beside a weight that is a tensor.
        options: see `LinearOptions`.

    Returns:
        `TokenStatistics` of [B, T] fp32 tensors, without gradient.

    Raises:
        ArgumentError: as `linear_logprob`.
    """
    head, resolved = check_head(hidden, weight, bias, options)
    if custom_ops.is_opaque(resolved, hidden, head.weight, labels):
        check_labels_type(hidden, labels, options.token_indices)
        return custom_ops.statistics(hidden, head, labels, options.token_indices, resolved)
    return sweep_statistics(hidden, head, labels, options.token_indices, resolved)


@overload
def linear_objective(
    hidden: Tensor, weight: Tensor | Head, labels: Tensor, objective: ObjectiveFunction, *, bias: Tensor | None = None,
    is_forget: Tensor | None = None, ref_logps: Tensor | None = None, reference: Reference | None = None,
    return_logps: Literal[False] = False, options: LinearOptions = DEFAULT_OPTIONS,
) -> Tensor: ...  # fmt: skip


@overload
def linear_objective(
    hidden: Tensor, weight: Tensor | Head, labels: Tensor, objective: ObjectiveFunction, *, bias: Tensor | None = None,
    is_forget: Tensor | None = None, ref_logps: Tensor | None = None, reference: Reference | None = None,
    return_logps: Literal[True], options: LinearOptions = DEFAULT_OPTIONS,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def linear_objective(
    hidden: Tensor, weight: Tensor | Head, labels: Tensor, objective: ObjectiveFunction, *, bias: Tensor | None = None,
    is_forget: Tensor | None = None, ref_logps: Tensor | None = None, reference: Reference | None = None,
    return_logps: bool = False, options: LinearOptions = DEFAULT_OPTIONS,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Return an objective of the per-token log-probabilities; its gradients are formed in the forward sweep::

        objective(linear_logprob(hidden, weight, labels, bias=bias), TokenBatch.from_labels(labels, is_forget, ref_logps))

    An objective may ask for more by its attributes: ``divergence`` (a `Divergence` from a reference model's distribution, for
    the forget or the retain sequences) and ``needs_statistics``; the batch then has them as well.

    Args:
        hidden: [B, T, D] fp32, bf16 or fp16 (without kernels also fp64), final hidden states. Under autocast they are
            converted, and so is the weight.
        weight: [V, D], the same dtype; or a `Head`, which has bias, scale and cap as well.
        labels: [B, T] int64, already shifted: ``labels[b, t]`` is predicted from ``hidden[b, t]``; -100 is ignored.
        objective: callable ``(logps [B, T] fp32, TokenBatch) -> [] loss``, differentiated by autograd. Its attribute
            ``additive`` names what it is a plain sum over: "tokens", "sequences", "pairs" of sequences (2i and 2i + 1), or None
            (the default: unknown). Where it is a sum over sequences, one sweep does; else a batch of several chunks takes a
            second one.
        bias: [V] or None, beside a weight that is a tensor.
        is_forget: [B] bool; None: every sequence is to be forgotten. May be on the CPU, like ``token_indices``: then a
            divergence of some sequences is computed for these alone without waiting for the device.
        ref_logps: [B] fp32, summed log-probability of each sequence under the reference model, where the objective needs it.
        reference: the `Reference` model on the same batch, where the objective has a ``divergence``; else it is not looked at.
            Its logits are scaled and capped as the model's.
        return_logps: also return the log-probabilities, [B, T] fp32, detached.
        options: token indices, dtype of the logits, scratch memory, backend: see `LinearOptions`.

    Returns:
        The loss, [] fp32; with ``return_logps`` the pair of loss and log-probabilities. If every label is ignored the loss
        is the objective of nothing (0 for those of ``soul.losses``), with zero gradients, attached to the graph.

    Raises:
        ArgumentError: as `linear_logprob`.
    """
    head, resolved = check_head(hidden, weight, bias, options)
    check_per_sequence("is_forget", is_forget, hidden, dtype=torch.bool, on_cpu=True)
    check_per_sequence("ref_logps", ref_logps, hidden)
    divergence: Divergence | None = getattr(objective, "divergence", None)
    if divergence is None:
        reference = None
    else:
        check_reference(reference, hidden, head, divergence.kind)
    call = ObjectiveCall(labels, objective, options.token_indices, is_forget, ref_logps, reference)
    if custom_ops.is_opaque(resolved, hidden, head.weight, labels) and custom_ops.takes(objective):
        check_labels_type(hidden, labels, options.token_indices)
        loss, logps = custom_ops.objective(hidden, head, call, resolved, needed_gradients(hidden, head))
    else:
        loss, logps = _outside_of_graphs(hidden, head, call, resolved)
    return (loss, logps) if return_logps else loss


@torch._disable_dynamo  # with a plain function as the objective the graph breaks here; `torch.compiler.disable` imports dynamo
def _outside_of_graphs(
    hidden: Tensor, head: Head, call: ObjectiveCall, options: ResolvedOptions
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return loss and log-probabilities, computed outside of an opaque op."""
    if not options.fused:
        return reference_objective(hidden, head, call, options)
    sweep = functools.partial(sweep_objective, hidden, head, call, options, needed_gradients(hidden, head))
    loss, logps, _ = Swept.apply(hidden, head.weight, head.bias, sweep)
    return loss, logps

"""Per-token log-probabilities, statistics and objectives from hidden states and a head, one chunk of logits at a time.

Only labelled tokens (label != -100) take part. A chunk of their rows is multiplied by the head into fp32 logits (cuBLAS). The
logits are read once for statistics and turned into their gradient, which feeds the two gradient GEMMs at once. So no [N, V]
tensor outlives its chunk. GEMM work in units of 2 N V D is 3 for a trained head, 2 for a frozen one and 1 without gradients. It
is one more where the coefficients of a row are known only after all chunks have been seen, and one more for the tokens that
need a divergence from a reference model.

Memory beyond inputs and outputs is ``chunk_bytes`` of scratch, R D fp32 for the gradient of the rows, and V D fp32 for that of
a trained head, until backward; an fp32 head receives that tensor as its gradient. Without kernels there are also a few MiB for
blocks of logits and of a bf16 or fp16 weight, which is converted to fp32; a CPU with AMX rounds it to bf16 again, in its tiles.
The reference does not use ``chunk_bytes``: it computes divergences and statistics in chunks of 16 MiB of logits, and keeps the
fp32 logits of all labelled tokens for log-probabilities with gradients.

A weight that is a DTensor is a head in shards: each process multiplies by its own rows (`_head.shards`).

How an op runs: `_head.checks` checks the arguments. Then one of three computes: an opaque op (`_head.custom_ops`), under
torch.compile and where tensors hold no values; the reference; or a sweep (`_head.sweeps`), which autograd sees as one function
(`_head.autograd`).
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
from soul_kernels._head.flat import takes_flat
from soul_kernels._head.rounds import with_one_scale
from soul_kernels._head.rows import HeadRows
from soul_kernels._head.sweeps import (
    ObjectiveCall,
    reference_objective,
    reference_per_token,
    sweep_objective,
    sweep_statistics,
)
from soul_kernels.chunks import DEFAULT_OPTIONS, LinearOptions, ResolvedOptions
from soul_kernels.tokens import Divergence, Head, ObjectiveFunction, Reference, TokenStatistics


@takes_flat
def linear_logprob(
    hidden: Tensor, weight: Tensor | Head, labels: Tensor, *, bias: Tensor | None = None,
    options: LinearOptions = DEFAULT_OPTIONS,
) -> Tensor:  # fmt: skip
    """Return the log-probability of every label under a language-model head, differentiable::

        log_softmax((hidden @ weight.T + bias).float(), -1).gather(-1, labels[..., None])[..., 0]   # 0 where labels == -100

    The logits are fp32, whatever the dtype of the inputs, and exist one chunk at a time.

    Args:
        hidden: [B, T, D] or [N, D], fp32, bf16 or fp16 (without kernels also fp64), final hidden states. Under autocast they
            are converted, and so is the weight. Beside a weight that is a DTensor: a plain tensor, the same in all processes of
            its mesh; or a DTensor on it, replicated or cut along B or T, whose gradient is cut alike.
        weight: [V, D], the same dtype; or a `Head`, which has bias, scale and cap as well. It may be a DTensor that Shard(0)
            cuts along one dimension of its mesh, with a bias that is cut alike. All processes of the mesh must make the same
            call, each with all labels; each has all results, and its rows of the gradient of the head.
        labels: [B, T] or [N] int64, already shifted: ``labels[b, t]`` is predicted from ``hidden[b, t]``; -100 is ignored.
        bias: [V] or None, beside a weight that is a tensor.
        options: token indices, dtype of the logits, scratch memory, backend: see `LinearOptions`.

    Returns:
        [B, T] or [N] fp32 (fp64 for fp64 inputs, which the kernels do not take).

    Raises:
        ArgumentError: an argument does not fit, or a label lies outside the vocabulary. On a GPU with ``token_indices`` labels
            are not checked, to spare the wait; the log-probability of a label outside the vocabulary is then NaN. Fake and meta
            tensors hold no values to check. Backward raises it where a second derivative is asked for and there is none. A
            DTensor does not fit where it is no head in shards, with the backend "reference", or under torch.compile and
            torch.func.
    """
    hidden, head, resolved = check_head(hidden, weight, bias, options)
    token_indices = options.token_indices
    if custom_ops.is_opaque(resolved, hidden, head.weight, labels):
        check_labels_type(hidden, labels, token_indices)
        return custom_ops.per_token(hidden, head, labels, token_indices, resolved, None)[0]
    if not resolved.fused:
        return reference_per_token(hidden, head, labels, token_indices, resolved, None)[0]
    check_labels(hidden, head, labels, token_indices, fused=True)
    head_rows = HeadRows(hidden, head, labels, token_indices, resolved)
    return PerToken.apply(hidden, head.weight, head.bias, head_rows, needed_gradients(hidden, head))[0]


@takes_flat
def linear_statistics(
    hidden: Tensor, weight: Tensor | Head, labels: Tensor, *, bias: Tensor | None = None,
    options: LinearOptions = DEFAULT_OPTIONS,
) -> TokenStatistics:  # fmt: skip
    """Return the statistics of every token that metrics need, from one read of the logits.

    They are log p(label), logsumexp, whether the label is the argmax, entropy, and variance of log p under the model.

    Args:
        hidden: [B, T, D] or [N, D], as in `linear_logprob`.
        weight: [V, D], or a `Head`.
        labels: [B, T] or [N] int64, as in `linear_logprob`.
        bias: [V] or None, beside a weight that is a tensor.
        options: see `LinearOptions`.

    Returns:
        `TokenStatistics` of [B, T] or [N] fp32 tensors, without gradient.

    Raises:
        ArgumentError: as `linear_logprob`.
    """
    hidden, head, resolved = check_head(hidden, weight, bias, options)
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


@takes_flat
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
        hidden: [B, T, D], or [N, D], which is one sequence; fp32, bf16 or fp16 (without kernels also fp64), final hidden
            states. Under autocast they are converted, and so is the weight. For DTensors see `linear_logprob`.
        weight: [V, D], the same dtype; or a `Head`, which has bias, scale and cap as well. It may be a DTensor as in
            `linear_logprob`, unless the objective needs statistics.
        labels: [B, T] or [N] int64, already shifted: ``labels[b, t]`` is predicted from ``hidden[b, t]``; -100 is ignored.
        objective: callable ``(logps [B, T] fp32, TokenBatch) -> [] loss``, differentiated by autograd. Its attribute
            ``additive`` names the terms that it is a plain sum of: "tokens", "sequences", "pairs" of sequences (2i and 2i + 1),
            or None (the default: unknown). Such a sum takes one sweep; otherwise a batch of several chunks takes two. Its
            attribute ``linear`` says that the derivatives do not depend on the log-probabilities, as those of a cross-entropy:
            they are then taken at log-probabilities of 0, and the logits are read once. The claim is checked, but not where
            log-probabilities are detached.
        bias: [V] or None, beside a weight that is a tensor.
        is_forget: [B] bool; None: every sequence is to be forgotten. If it is on the CPU, like ``token_indices``, a divergence
            of some sequences is computed for these alone without waiting for the device.
        ref_logps: [B] fp32, summed log-probability of each sequence under the reference model, where the objective needs it.
        reference: the `Reference` model on the same batch, where the objective has a ``divergence``; otherwise ignored. Its
            logits are scaled and capped as the model's are.
        return_logps: also return the log-probabilities, [B, T] or [N] fp32, detached.
        options: token indices, dtype of the logits, scratch memory, backend: see `LinearOptions`.

    Returns:
        The loss, [] fp32; with ``return_logps`` the pair of loss and log-probabilities. If every label is ignored, the loss is
        the objective of no tokens (0 for those of ``soul.losses``), with zero gradients, attached to the graph.

    Raises:
        ArgumentError: as `linear_logprob`.
    """
    hidden, head, resolved = check_head(hidden, weight, bias, options)
    check_per_sequence("is_forget", is_forget, hidden, dtype=torch.bool, on_cpu=True)
    check_per_sequence("ref_logps", ref_logps, hidden)
    divergence: Divergence | None = getattr(objective, "divergence", None)
    if divergence is None:
        reference = None
    else:
        check_reference(reference, hidden, head, divergence.kind, divergence.beta)
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
    return with_one_scale(loss, head), logps

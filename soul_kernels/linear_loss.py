"""hidden @ weight.T -> per-token log-probabilities -> any objective, without an [N, V] tensor that outlives its chunk.

Only kept tokens (label != -100) take part. A chunk of their rows is multiplied by the head into fp32 logits (cuBLAS), read
once for statistics, and turned into its gradient, which feeds the two gradient GEMMs at once. GEMM work in units of
2 N V D: 3 for a trained head, 2 for a frozen one, 1 without gradients; one more where the coefficients of a row can be
known only after all chunks have been seen; and one for the tokens whose divergence from a reference is wanted.

Memory beyond inputs and outputs: ``chunk_bytes`` of scratch, R D fp32 for the gradient of the kept rows, and V D fp32 for that
of a trained head, until backward; an fp32 head gets that one as its gradient. Without kernels also a few MiB for blocks of
logits and of a bf16 or fp16 weight, which is converted to fp32; a CPU with AMX rounds it to bf16 again, in its tiles. The
reference does not use ``chunk_bytes``: it makes divergences and statistics in chunks of 16 MiB of logits, and keeps the fp32
logits of all kept rows for log-probabilities with gradients.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from soul_kernels._head import custom_ops
from soul_kernels._head.autograd import PerToken, Swept, sweep_objective
from soul_kernels._head.checks import (
    check_head,
    check_labels,
    check_labels_type,
    check_own_head,
    check_per_sequence,
    check_reference,
    wanted,
)
from soul_kernels._head.rows import HeadRows
from soul_kernels.chunks import Options
from soul_kernels.reference import linear_loss as _reference
from soul_kernels.reference.linear_loss import needed_sequences, sequence_strengths
from soul_kernels.tensors import check_scalar
from soul_kernels.tokens import Head, TokenBatch


def linear_logprob(
    hidden, weight, labels, *, bias=None, logit_scale=1.0, softcap=None, rows=None, logits_dtype=torch.float32,
    chunk_bytes=None, backend="auto",
):  # fmt: skip
    """Log-probability of every label under the language-model head, differentiable::

        log_softmax((hidden @ weight.T + bias).float(), -1).gather(-1, labels[..., None])[..., 0]   # 0 where labels == -100

    The logits are fp32, whatever the dtype of the inputs, and exist one chunk at a time.

    Args:
        hidden: [B, T, D] fp32, bf16 or fp16 (without kernels also fp64), final hidden states. Under autocast they are
            converted, and so is the weight.
        weight: [V, D], the same dtype.
        labels: [B, T] int64, already shifted: ``labels[b, t]`` is predicted from ``hidden[b, t]``; -100 is ignored.
        bias: [V] or None.
        logit_scale: the products are multiplied by it (Cohere's ``logit_scale``; 1 over Granite's ``logits_scaling``).
        softcap: then capped, as ``softcap tanh(z / softcap)`` (Gemma's ``final_logit_softcapping``); None: not.
        rows: [R] int64, rising flat indices ``b * T + t`` of the tokens to compute: every token that carries a label, and any
            ignored ones; the last index may repeat if its token is ignored, to pad R to a fixed size. Given as a CPU tensor
            they spare a wait for the device. None: found from the labels. The reference checks them and needs none.
        logits_dtype: of the logits of a chunk: torch.float32, or the dtype of hidden, which saves 2 to 8% of the time and half
            of the scratch, and costs 7e-3 in log-probability. Without kernels they are always fp32.
        chunk_bytes: scratch memory for one chunk, in bytes. None: 1 GiB, on a CPU 64 MiB.
        backend: "auto" (Triton on a GPU and under the interpreter, else "torch"); "triton"; "torch", the same sweep over chunks
            in plain PyTorch; or "reference", the definition, which keeps all logits. "compile" is "torch". Second derivatives
            and forward-mode ones need "reference", called outside of torch.compile.

    Returns:
        [B, T] fp32 (fp64 for fp64 inputs, which the kernels do not take).

    Raises:
        ValueError: an argument does not fit or is a DTensor, or a label lies outside the vocabulary. With ``rows`` on a GPU
            labels are not checked, to spare the wait; the log-probability of such a label is NaN. Fake and meta tensors hold no
            values to check. From backward: a second derivative is asked for where there is none.
    """
    head, options = check_head(hidden, weight, bias, logit_scale, softcap, logits_dtype, chunk_bytes, backend)
    if custom_ops.is_opaque(options, hidden, weight, labels):
        check_labels_type(hidden, labels, rows)
        return custom_ops.per_token(hidden, head, labels, rows, options, None)
    if not options.fused:
        return reference_logprob(hidden, head, labels, rows, options)
    check_labels(hidden, weight, labels, rows, fused=True)
    table = HeadRows(hidden, head, labels, rows, options)
    return PerToken.apply(hidden, weight, bias, table, wanted(hidden, weight, bias))[0]


def reference_logprob(
    hidden: Tensor, head: Head, labels: Tensor, rows: Tensor | None, options: Options
) -> Tensor:  # fmt: skip
    """What `linear_logprob` returns, of the reference."""
    check_labels(hidden, head.weight, labels, rows, fused=False)
    hidden, weight = (t.to(options.compute_dtype) for t in (hidden, head.weight))
    return _reference.linear_logprob(hidden, weight, labels, bias=head.bias, **head.transform())


def linear_statistics(
    hidden, weight, labels, *, bias=None, logit_scale=1.0, softcap=None, rows=None, logits_dtype=torch.float32,
    chunk_bytes=None, backend="auto",
):  # fmt: skip
    """What metrics need of every token, from one read of the logits: log p(label), logsumexp, whether the label is the argmax,
    entropy, and variance of log p under the model.

    Args:
        hidden: as in `linear_logprob`, and so are the others.
        weight: [V, D].
        labels: [B, T] int64.
        bias: [V] or None.
        logit_scale: as in `linear_logprob`.
        softcap: as in `linear_logprob`.
        rows: as in `linear_logprob`.
        logits_dtype: as in `linear_logprob`.
        chunk_bytes: as in `linear_logprob`.
        backend: as in `linear_logprob`.

    Returns:
        `TokenStatistics` of [B, T] fp32 tensors, without gradient.

    Raises:
        ValueError: as `linear_logprob`.
    """
    head, options = check_head(hidden, weight, bias, logit_scale, softcap, logits_dtype, chunk_bytes, backend)
    if custom_ops.is_opaque(options, hidden, weight, labels):
        check_labels_type(hidden, labels, rows)
        return custom_ops.statistics(hidden, head, labels, rows, options)
    return measure(hidden, head, labels, rows, options)


@torch.no_grad()
def measure(hidden, head, labels, rows, options):
    """What `linear_statistics` returns."""
    check_labels(hidden, head.weight, labels, rows, options.fused)
    if not options.fused:
        hidden, weight = (t.to(options.compute_dtype) for t in (hidden, head.weight))
        return _reference.linear_statistics(hidden, weight, labels, bias=head.bias, **head.transform())
    table = HeadRows(hidden, head, labels, rows, options, all_statistics=True)
    with torch.autocast(hidden.device.type, enabled=False):
        for chunk in table.even_chunks():
            table.load(chunk)
            table.measure(chunk)
    return table.token_statistics()


def linear_objective(
    hidden, weight, labels, objective, *, bias=None, is_forget=None, ref_logps=None, ref_hidden=None, ref_weight=None,
    ref_bias=None, logit_scale=1.0, softcap=None, rows=None, return_logps=False, logits_dtype=torch.float32,
    chunk_bytes=None, backend="auto",
):  # fmt: skip
    """An objective of the per-token log-probabilities; its gradients are formed in the forward sweep::

        objective(linear_logprob(hidden, weight, labels, bias=bias), TokenBatch.from_labels(labels, is_forget, ref_logps))

    An objective may ask for more by its attributes: ``divergence`` (a `Divergence`: from a reference's distribution, for the
    forget or the retain sequences) and ``needs_statistics``; the batch then has them as well.

    Args:
        hidden: [B, T, D] fp32, bf16 or fp16 (without kernels also fp64), final hidden states. Under autocast they are
            converted, and so is the weight.
        weight: [V, D], the same dtype.
        labels: [B, T] int64, already shifted: ``labels[b, t]`` is predicted from ``hidden[b, t]``; -100 is ignored.
        objective: callable ``(logps [B, T] fp32, TokenBatch) -> [] loss``, differentiated by autograd. Its attribute
            ``additive`` says over what it is a plain sum: "tokens", "sequences", "pairs" of sequences (2i and 2i + 1), or None
            (the default: unknown). Where it is a sum over sequences, one sweep does; else a batch of several chunks takes a
            second one.
        bias: [V] or None.
        is_forget: [B] bool; None: every sequence is to be forgotten. May be on the CPU, like ``rows``: then a divergence of
            some sequences is computed for these alone without waiting for the device.
        ref_logps: [B] fp32, summed reference log-probability of each sequence, where the objective needs it.
        ref_hidden: [B, T, D'], hidden states of the reference on the same batch, where the objective has a ``divergence``;
            anything in sequences that it does not need. They get no gradient.
        ref_weight: [V, D'], head of the reference. None: ``weight`` and ``bias``, which must then be frozen.
        ref_bias: [V] or None.
        logit_scale: as in `linear_logprob`, for model and reference.
        softcap: as in `linear_logprob`, for model and reference.
        rows: as in `linear_logprob`.
        return_logps: also return the log-probabilities, [B, T] fp32, detached.
        logits_dtype: as in `linear_logprob`. Of low precision it is far off for a divergence close to 0.
        chunk_bytes: as in `linear_logprob`.
        backend: as in `linear_logprob`.

    Returns:
        The loss, [] fp32; with ``return_logps`` the pair of loss and log-probabilities. If every label is ignored the loss
        is the objective of nothing (0 for those of ``soul.losses``), with zero gradients, attached to the graph.

    Raises:
        ValueError: as `linear_logprob`.
    """
    head, options = check_head(hidden, weight, bias, logit_scale, softcap, logits_dtype, chunk_bytes, backend)
    check_per_sequence("is_forget", is_forget, hidden, dtype=torch.bool, on_cpu=True)
    check_per_sequence("ref_logps", ref_logps, hidden)
    divergence = getattr(objective, "divergence", None)
    if divergence is not None:
        check_own_head(weight, bias, ref_weight, ref_bias)
    call = dict(rows=rows, is_forget=is_forget, ref_logps=ref_logps, options=options)
    call |= dict(ref_hidden=ref_hidden, ref_weight=ref_weight, ref_bias=ref_bias)
    if custom_ops.is_opaque(options, hidden, weight, labels) and custom_ops.takes(objective):
        check_labels_type(hidden, labels, rows)
        if divergence is not None:
            check_reference(hidden, head, ref_hidden, ref_weight, ref_bias, divergence.kind)
        loss, logps = custom_ops.objective(hidden, head, labels, objective, needs=wanted(hidden, weight, bias), **call)
    else:
        loss, logps = _in_the_open(hidden, head, labels, objective, **call)
    return (loss, logps) if return_logps else loss


@torch._disable_dynamo  # with a plain function as the objective the graph breaks here; `torch.compiler.disable` imports dynamo
def _in_the_open(
    hidden: Tensor, head: Head, labels: Tensor, objective: Callable, *, options: Options, **call: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Loss and log-probabilities, outside of an opaque op."""
    if not options.fused:
        return reference_objective(hidden, head, labels, objective, options=options, **call)
    needs = wanted(hidden, head.weight, head.bias)
    run = functools.partial(sweep, hidden, head, labels, objective, options=options, needs=needs, **call)
    return Swept.apply(hidden, head.weight, head.bias, run)[:2]


def reference_objective(
    hidden: Tensor, head: Head, labels: Tensor, objective: Callable, *, rows: Tensor | None, is_forget: Tensor | None,
    ref_logps: Tensor | None, ref_hidden: Tensor | None, ref_weight: Tensor | None, ref_bias: Tensor | None, options: Options,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Loss and log-probabilities, of the reference."""
    check_labels(hidden, head.weight, labels, rows, fused=False)
    reference = _reference_of(objective, hidden, head, labels, rows, is_forget, ref_hidden, ref_weight, ref_bias)
    hidden, weight = (t.to(options.compute_dtype) for t in (hidden, head.weight))
    if reference is not None:
        ref_hidden, ref_weight = (t.to(options.compute_dtype) for t in (reference.hidden, reference.weight))
        ref_bias = reference.bias
    loss, logps = _reference.linear_objective(
        hidden, weight, labels, objective, bias=head.bias, is_forget=is_forget, ref_logps=ref_logps, ref_hidden=ref_hidden,
        ref_weight=ref_weight, ref_bias=ref_bias, **head.transform(),
    )  # fmt: skip
    check_scalar(loss)
    return loss, logps


def sweep(
    hidden, head, labels, objective, *, rows, is_forget, ref_logps, ref_hidden, ref_weight, ref_bias, options, needs
):  # fmt: skip
    """Loss, (log-probabilities,), rows and gradients: what `Swept` runs."""
    check_labels(hidden, head.weight, labels, rows, fused=True)
    reference = _reference_of(objective, hidden, head, labels, rows, is_forget, ref_hidden, ref_weight, ref_bias)
    all_statistics = getattr(objective, "needs_statistics", False)
    table = HeadRows(hidden, head, labels, rows, options, reference=reference, all_statistics=all_statistics)
    batch = TokenBatch.from_labels(labels, is_forget, ref_logps)
    loss, gradients = sweep_objective(table, objective, batch, needs)
    return loss, (table.log_probs(),), table, gradients


def _reference_of(objective, hidden, head, labels, rows, is_forget, ref_hidden, ref_weight, ref_bias):
    """The `Reference` that an objective needs, or None."""
    divergence = getattr(objective, "divergence", None)
    if divergence is None:
        return None
    forget = is_forget
    if forget is None:  # where the rows are, so that finding its rows waits for no device
        forget = torch.ones(len(labels), dtype=torch.bool, device="cpu" if rows is None else rows.device)
    needed = None if divergence.of == "all" else needed_sequences(divergence, forget)
    strengths = sequence_strengths(divergence, forget)
    return check_reference(hidden, head, ref_hidden, ref_weight, ref_bias, divergence.kind, needed, strengths)


__all__ = ["TokenBatch", "linear_logprob", "linear_objective", "linear_statistics"]

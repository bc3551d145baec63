"""Divergence of every token from a reference model, from the hidden states of both, one chunk of logits at a time."""

import torch
from torch import Tensor

from soul_kernels._head import custom_ops
from soul_kernels._head.autograd import PerToken
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
from soul_kernels.reference import linear_kl as _reference
from soul_kernels.tokens import Head, Reference


def linear_kl(
    hidden, weight, labels, ref_hidden, *, ref_weight=None, bias=None, ref_bias=None, kind="kl", strengths=None,
    logit_scale=1.0, softcap=None, rows=None, logits_dtype=torch.float32, chunk_bytes=None, backend="auto",
):  # fmt: skip
    """``KL(reference || model)`` over the vocabulary at every labelled token, differentiable by the model::

        log_p = log_softmax((hidden @ weight.T + bias).float(), -1)
        log_q = log_softmax((ref_hidden @ ref_weight.T + ref_bias).float(), -1)
        (log_q.exp() * (log_q - log_p)).sum(-1)   # 0 where labels == -100

    No value is negative, and where model and reference are equal value and gradient are exactly 0.

    Args:
        hidden: [B, T, D] fp32, bf16 or fp16, final hidden states. Under autocast they are converted, and so are the heads.
        weight: [V, D], the same dtype.
        labels: [B, T] int64, already shifted; -100 is ignored. Which label it is matters with ``strengths`` only.
        ref_hidden: [B, T, D'], hidden states of the reference on the same batch; they get no gradient.
        ref_weight: [V, D'], head of the reference. None: ``weight`` and ``bias``, which must then be frozen.
        bias: [V] or None.
        ref_bias: [V] or None.
        kind: "kl"; or "soul_kl", what SOUL's code calls KL: the cross-entropy ``-(p * (q + 1e-12).log()).sum(-1)``.
        strengths: [B] fp32: in each sequence the reference's logit of the label is lowered by it (UNDIAL's teacher); None: not.
        logit_scale: as in `linear_logprob`, for both.
        softcap: as in `linear_logprob`, for both.
        rows: as in `linear_logprob`.
        logits_dtype: as in `linear_logprob`. Of low precision it is far off for values close to 0: bf16 logits cost more than
            100% of the gradient there.
        chunk_bytes: as in `linear_logprob`.
        backend: as in `linear_logprob`.

    Returns:
        [B, T] fp32 (fp64 for fp64 inputs, which the kernels do not take).

    Raises:
        ValueError: as `linear_logprob`.
    """
    head, options = check_head(hidden, weight, bias, logit_scale, softcap, logits_dtype, chunk_bytes, backend)
    check_per_sequence("strengths", strengths, hidden)
    check_own_head(weight, bias, ref_weight, ref_bias)
    reference = check_reference(hidden, head, ref_hidden, ref_weight, ref_bias, kind, None, strengths)
    if custom_ops.is_opaque(options, hidden, weight, labels):
        check_labels_type(hidden, labels, rows)
        return custom_ops.per_token(hidden, head, labels, rows, options, reference)
    if not options.fused:
        return reference_kl(hidden, head, labels, rows, options, reference)
    check_labels(hidden, weight, labels, rows, fused=True)
    table = HeadRows(hidden, head, labels, rows, options, reference=reference)
    return PerToken.apply(hidden, weight, bias, table, wanted(hidden, weight, bias))[0]


def reference_kl(
    hidden: Tensor, head: Head, labels: Tensor, rows: Tensor | None, options: Options, reference: Reference
) -> Tensor:
    """What `linear_kl` returns, of the reference."""
    check_labels(hidden, head.weight, labels, rows, fused=False)
    hidden, weight, ref_hidden, ref_weight = (
        t.to(options.compute_dtype) for t in (hidden, head.weight, reference.hidden, reference.weight)
    )
    return _reference.linear_kl(
        hidden, weight, labels, ref_hidden, ref_weight=ref_weight, bias=head.bias, ref_bias=reference.bias,
        kind=reference.kind, strengths=reference.strengths, **head.transform(),
    )  # fmt: skip

"""Divergence of every token from a reference model, from the hidden states of both, one chunk of logits at a time."""

from torch import Tensor

from soul_kernels._head import custom_ops
from soul_kernels._head.autograd import PerToken
from soul_kernels._head.checks import (
    check_head,
    check_labels,
    check_labels_type,
    check_per_sequence,
    check_reference,
    local_comparison,
    needed_gradients,
)
from soul_kernels._head.flat import takes_flat
from soul_kernels._head.rows import HeadRows
from soul_kernels._head.sweeps import reference_per_token
from soul_kernels.chunks import DEFAULT_OPTIONS, LinearOptions
from soul_kernels.tokens import Head, Reference


@takes_flat
def linear_kl(
    hidden: Tensor, weight: Tensor | Head, labels: Tensor, reference: Reference, *, bias: Tensor | None = None,
    kind: str = "kl", strengths: Tensor | None = None, beta: float = 0.5, options: LinearOptions = DEFAULT_OPTIONS,
) -> Tensor:  # fmt: skip
    """Return ``KL(reference || model)``, or another divergence, at every labelled token, differentiable by the model::

        log_p = log_softmax((hidden @ weight.T + bias).float(), -1)
        log_q = log_softmax((reference.hidden @ reference.weight.T + reference.bias).float(), -1)
        (log_q.exp() * (log_q - log_p)).sum(-1)   # 0 where labels == -100

    No value is negative. Where model and reference model are equal, value and gradient are exactly 0.

    Args:
        hidden: [B, T, D] or [N, D], fp32, bf16 or fp16, final hidden states. Under autocast they are converted, and so are the
            heads.
        weight: [V, D], the same dtype; or a `Head`, which has bias, scale and cap as well. It may be a DTensor as in
            `linear_logprob`.
        labels: [B, T] or [N] int64, already shifted; -100 is ignored. The other values matter with ``strengths`` only.
        reference: the `Reference` model on the same tokens; it gets no gradient. Its logits are scaled and capped as the
            model's are. Beside a head in shards its own head is whole or cut alike.
        bias: [V] or None, beside a weight that is a tensor.
        kind: "kl"; "reverse_kl", which is ``KL(model || reference)``; "jsd", the generalized Jensen-Shannon divergence ``beta
            KL(q || m) + (1 - beta) KL(p || m)`` with ``m = beta q + (1 - beta) p``; or "soul_kl", which SOUL's code calls KL:
            the cross-entropy ``-(p * (q + 1e-12).log()).sum(-1)``.
        strengths: [B] fp32, how far the reference model's logit of the label is lowered in each sequence (UNDIAL's teacher);
            None: not at all. If it is above 87, the other tokens must have a probability of 1e-37 or more before that.
        beta: weight of the reference model in the mixture of "jsd", between 0 and 1; other kinds ignore it.
        options: see `LinearOptions`. With logits below fp32, values close to 0 have large relative errors.

    Returns:
        [B, T] or [N] fp32 (fp64 for fp64 inputs, which the kernels do not take).

    Raises:
        ArgumentError: as `linear_logprob`.
    """
    hidden, head, resolved = check_head(hidden, weight, bias, options)
    check_per_sequence("strengths", strengths, hidden)
    comparison = check_reference(reference, hidden, head, kind, beta)._replace(strengths=strengths)
    comparison = local_comparison(comparison, reference, head)
    token_indices = options.token_indices
    if custom_ops.is_opaque(resolved, hidden, head.weight, labels):
        check_labels_type(hidden, labels, token_indices)
        return custom_ops.per_token(hidden, head, labels, token_indices, resolved, comparison)[0]
    if not resolved.fused:
        return reference_per_token(hidden, head, labels, token_indices, resolved, comparison)[0]
    check_labels(hidden, head, labels, token_indices, fused=True)
    head_rows = HeadRows(hidden, head, labels, token_indices, resolved, comparison=comparison)
    return PerToken.apply(hidden, head.weight, head.bias, head_rows, needed_gradients(hidden, head))[0]

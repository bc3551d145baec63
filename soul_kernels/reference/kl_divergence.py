"""Divergence of a model's distribution over the vocabulary from that of the reference model, row by row."""

import torch
from torch import Tensor

from soul_kernels.reference.token_logprob import log_probabilities

KINDS = ("kl", "soul_kl")
FLOOR = 1e-12  # SOUL's code adds it to q within the logarithm
DIVERGENCE, REF_ENTROPY = range(2)  # rows of the divergences of a chunk, for the host and for the kernels


def ref_log_probabilities(ref_logits: Tensor, labels: Tensor, strengths: Tensor | None = None) -> Tensor:
    """Return log q [n, V], the logarithm of the reference model's distribution.

    Args:
        ref_logits: [n, V], logits of the reference model.
        labels: [n] int64.
        strengths: [n], how far the logit of the label is lowered before the softmax; None: not at all.
    """
    if strengths is not None:
        ref_logits = ref_logits.scatter_add(1, labels[:, None], -strengths.to(ref_logits.dtype)[:, None])
    return log_probabilities(ref_logits.detach(), labels)


def kl_divergence(logits: Tensor, labels: Tensor, log_q: Tensor, kind: str = "kl") -> Tensor:
    """Return the divergence of p = softmax(logits) from q, differentiable by the logits; q is constant.

    ``"kl"`` is KL(q || p), summed as ``q (d + expm1(-d))`` with ``d = log q - log p``. No term is negative, and where the two
    are equal, the value and its gradient ``p - q`` are exactly 0. Where q is so small against p that expm1(-d) would overflow,
    the term is computed as ``q (d - 1) + p``.

    ``"soul_kl"`` is what SOUL's code calls KL (Jia et al. 2024, src/unlearn/KL.py): the cross-entropy ``-sum_v p_v log(q_v +
    1e-12)``. Its gradient ``p (l - sum p l)``, with l = -log(q + 1e-12), pulls p towards the argmax of q.

    Args:
        logits: [n, V] floating point.
        labels: [n] int64. Results are accurate even where p or q of the label is close to 1.
        log_q: [n, V], from `ref_log_probabilities`.
        kind: one of `KINDS`.

    Returns:
        [n], in the dtype of the logits, >= 0.
    """
    log_p = log_probabilities(logits, labels)
    q = log_q.exp()
    if kind == "soul_kl":  # log(q + a) = log q + a / q, up to (a / q)^2: accurate for q close to 1 as well
        log_floored = torch.where(q > 1e-6, log_q + FLOOR / q.clamp(min=1e-6), torch.log(q + FLOOR))
        return -(log_p.exp() * log_floored).sum(1)
    d = torch.where(q > 0, log_q - log_p, 0.0)
    close = d > -20
    near = q * (d + torch.expm1(-d.clamp(min=-20)))
    far = q * (d - 1) + log_p.exp()
    return torch.where(close & (q > 0), near, far).sum(1)


def entropy(log_q: Tensor) -> Tensor:
    """Return the entropy of each row, ``-sum_v q_v log q_v`` [n]."""
    q = log_q.exp()
    return -(q * torch.where(q > 0, log_q, 0.0)).sum(1)

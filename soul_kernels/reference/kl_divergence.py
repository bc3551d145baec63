"""Divergence of a model's distribution over the vocabulary from that of the reference model, row by row."""

import torch
from torch import Tensor

from soul_kernels.reference.token_logprob import log_probabilities

KINDS = ("kl", "soul_kl", "reverse_kl", "jsd")
FLOOR = 1e-12  # SOUL's code adds it to q within the logarithm
FARTHEST = 1e4  # bound of log q - log p in a mixture, where the smaller of the two has no weight
# Rows of the divergences of a chunk, for the host and for the kernels. Only "jsd" has the third: what is added to it by the
# side of p, ``(1 - beta) KL(p || mixture)``, from which the gradient is computed.
DIVERGENCE, REF_ENTROPY, MODEL_SIDE = range(3)


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


def kl_divergence(logits: Tensor, labels: Tensor, log_q: Tensor, kind: str = "kl", beta: float = 0.5) -> Tensor:
    """Return the divergence of p = softmax(logits) from q, differentiable by the logits; q is constant.

    ``"kl"`` is KL(q || p), summed as ``q (d + expm1(-d))`` with ``d = log q - log p``. No term is negative, and where the two
    are equal, the value and its gradient ``p - q`` are exactly 0. Where q is so small against p that expm1(-d) would overflow,
    the term is computed as ``q (d - 1) + p``.

    ``"reverse_kl"`` is KL(p || q), summed in the same way; its gradient is ``p (log p - log q - KL)``. ``"jsd"`` is the
    generalized Jensen-Shannon divergence ``beta KL(q || m) + (1 - beta) KL(p || m)`` with ``m = beta q + (1 - beta) p``; its
    gradient is ``(1 - beta) p (log p - log m - KL(p || m))``. Where p and q are equal, both are exactly 0 as well.

    ``"soul_kl"`` is what SOUL's code calls KL (Jia et al. 2024, src/unlearn/KL.py): the cross-entropy ``-sum_v p_v log(q_v +
    1e-12)``. Its gradient ``p (l - sum p l)``, with l = -log(q + 1e-12), pulls p towards the argmax of q.

    Args:
        logits: [n, V] floating point.
        labels: [n] int64. Results are accurate even where p or q of the label is close to 1.
        log_q: [n, V], from `ref_log_probabilities`.
        kind: one of `KINDS`.
        beta: weight of q in the mixture of "jsd", between 0 and 1.

    Returns:
        [n], in the dtype of the logits, >= 0.
    """
    return divergence_and_mean_score(log_probabilities(logits, labels), log_q, kind, beta)[0]


def divergence_and_mean_score(log_p: Tensor, log_q: Tensor, kind: str = "kl", beta: float = 0.5) -> tuple[Tensor, Tensor]:
    """Return what some columns of each row, [n, C] of the [n, V], add to its divergence, and to its mean score: see `score`.

    Of "kl", which has no scores, both results are the divergence.
    """
    q = log_q.exp()
    p = log_p.exp()
    if kind == "kl":
        divergence = _excess(q, p, torch.where(q > 0, log_q - log_p, 0.0)).sum(1)
    elif kind == "reverse_kl":
        divergence = _excess(p, q, torch.where(p > 0, log_p - log_q, 0.0)).sum(1)
    elif kind == "soul_kl":
        divergence = (p * _surprise(log_q)).sum(1)
    else:
        of_p, of_q = _from_mixture(log_p, log_q, beta)
        mixture = beta * q + (1 - beta) * p
        model_side = (1 - beta) * _excess(p, mixture, of_p)
        return (beta * _excess(q, mixture, of_q) + model_side).sum(1), model_side.sum(1)
    return divergence, divergence


def score(log_p: Tensor, log_q: Tensor, kind: str, beta: float = 0.5) -> Tensor:
    """Return the scores [n, C] of some columns: the gradient of a divergence by a logit is p (score - mean score under p).

    "kl", whose gradient is p - q, has none.
    """
    if kind == "soul_kl":
        return _surprise(log_q)
    if kind == "reverse_kl":
        return torch.where(log_p.exp() > 0, log_p - log_q, 0.0)
    return (1 - beta) * _from_mixture(log_p, log_q, beta)[0]


def _surprise(log_q: Tensor) -> Tensor:
    """Return -log(q + 1e-12), accurate for q close to 1 as well: log(q + a) = log q + a / q, up to (a / q)^2."""
    q = log_q.exp()
    return -torch.where(q > 1e-6, log_q + FLOOR / q.clamp(min=1e-6), torch.log(q + FLOOR))


def _from_mixture(log_p: Tensor, log_q: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Return log p - log m and log q - log m for the mixture m = beta q + (1 - beta) p, accurate where p and q are close."""
    d = torch.where(log_p.exp() + log_q.exp() > 0, log_q - log_p, 0.0).clamp(-FARTHEST, FARTHEST)
    of_p = torch.log1p(beta * torch.expm1(d.clamp(max=0)))  # log m - log p where p is the larger
    of_q = torch.log1p((1 - beta) * torch.expm1(-d.clamp(min=0)))  # log m - log q where q is
    return torch.where(d > 0, -d - of_q, -of_p), torch.where(d > 0, -of_q, d - of_p)


def _excess(a: Tensor, b: Tensor, d: Tensor) -> Tensor:
    """Return ``a log(a / b) - a + b`` for d = log(a / b), without cancellation: no element is negative."""
    close = d > -20
    near = a * (d + torch.expm1(-d.clamp(min=-20)))
    far = a * (d - 1) + b
    return torch.where(close & (a > 0), near, far)


def entropy(log_q: Tensor) -> Tensor:
    """Return the entropy of each row, ``-sum_v q_v log q_v`` [n]."""
    q = log_q.exp()
    return -(q * torch.where(q > 0, log_q, 0.0)).sum(1)

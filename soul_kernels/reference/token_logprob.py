"""What one row of logits says of its label: log p, accurate where p is close to 1, and the statistics that metrics need."""

import torch
import torch.nn.functional as F

from soul_kernels.tokens import TokenStatistics

# Rows of the statistics of a chunk; those from HIT on are filled on request.
LOGP, ROW_MAX, TOTAL, ONE_MINUS_P, HIT, ENTROPY, VARIANCE = range(7)
N_BASIC, N_ALL = 4, 7


def transformed(logits, logit_scale=1.0, softcap=None):
    """Raw products of hidden states and head -> logits: ``softcap tanh(logit_scale z / softcap)``; without a cap, scaled only.

    Gemma 2 caps at 30; Cohere multiplies by ``logit_scale``; Granite divides by ``logits_scaling``.
    """
    if logit_scale != 1.0:
        logits = logits * logit_scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def token_logprob(logits, labels):
    """Log-probability of each row's label, differentiable::

        log_softmax(logits)[i, labels[i]] = logsigmoid(z_y - logsumexp(z_j, j != y))

    The label stays out of the sum, so 1 - p(y), and with it the gradient, keeps its relative accuracy on memorised tokens,
    where ``softmax - 1`` in fp32 is wrong by 100% from 1 - p = 1e-8 on.

    Args:
        logits: [n, V] floating point.
        labels: [n] int64, each in [0, V).

    Returns:
        [n], dtype of the logits.
    """
    label = labels[:, None]
    if logits.shape[1] == 1:  # nothing beside the label: p = 1, whatever the logit
        return 0.0 * logits[:, 0]
    rest = logits.scatter(1, label, -torch.inf).logsumexp(1)
    return F.logsigmoid(logits.gather(1, label)[:, 0] - rest)


def log_probabilities(logits, labels):
    """log_softmax [n, V] of logits, which is accurate at the label also where p(label) is close to 1."""
    return logits.log_softmax(1).scatter(1, labels[:, None], token_logprob(logits, labels)[:, None])


def token_statistics(logits, labels):
    """`TokenStatistics` of each row, [n] each; no gradient.

    Args:
        logits: [n, V] floating point.
        labels: [n] int64, each in [0, V).
    """
    logits = logits.detach()
    logp = log_probabilities(logits, labels)
    p = logp.exp()
    surprise = torch.where(p > 0, -logp, 0.0)  # a vocabulary entry that is masked out adds nothing
    entropies = (p * surprise).sum(1)
    variances = (p * (surprise - entropies[:, None]) ** 2).sum(1)
    hits = (logits.argmax(1) == labels).to(logits.dtype)
    return TokenStatistics(logp.gather(1, labels[:, None])[:, 0], logits.logsumexp(1), hits, entropies, variances)

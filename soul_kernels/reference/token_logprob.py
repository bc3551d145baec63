"""Log-probability of the label of a row of logits, accurate where it is close to 0, and the statistics that metrics need."""

import torch
import torch.nn.functional as F
from torch import Tensor

from soul_kernels.tokens import TokenStatistics

# Rows of the statistics of a chunk, for the host and for the kernels.
LOGP, ROW_MAX, TOTAL, ONE_MINUS_P, HIT, ENTROPY, VARIANCE = range(7)
N_BASIC = 4  # the first four rows are always computed
N_ALL = 7  # all rows are computed where metrics need them


def transformed(logits: Tensor, logit_scale: float = 1.0, softcap: float | None = None) -> Tensor:
    """Return the logits of raw products z of hidden states and head: ``softcap tanh(logit_scale z / softcap)``.

    Without a cap they are only scaled. Gemma 2 caps at 30; Cohere multiplies by ``logit_scale``; Granite divides by
    ``logits_scaling``.
    """
    if logit_scale != 1.0:
        logits = logits * logit_scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def token_logprob(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the log-probability of each row's label, differentiable::

        log_softmax(logits)[i, labels[i]] = logsigmoid(z_y - logsumexp(z_j, j != y))

    The sum leaves the label out. So 1 - p(y), and with it the gradient, keeps its relative accuracy on memorized tokens. There
    ``softmax - 1`` in fp32 is wrong by 100% where 1 - p is 1e-8 or less.

    Args:
        logits: [n, V] floating point.
        labels: [n] int64, each in [0, V).

    Returns:
        [n], in the dtype of the logits.
    """
    label = labels[:, None]
    if logits.shape[1] == 1:  # the label is the whole vocabulary: p = 1, whatever the logit
        return 0.0 * logits[:, 0]
    rest = logits.scatter(1, label, -torch.inf).logsumexp(1)
    return F.logsigmoid(logits.gather(1, label)[:, 0] - rest)


def mean_logit(logits: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """Return the mean of each row's logits [n], each multiplied by its class weight [V], differentiable."""
    return (logits if class_weights is None else logits * class_weights).mean(1)


def log_probabilities(logits: Tensor, labels: Tensor) -> Tensor:
    """Return log_softmax(logits) [n, V]; the label's entry is accurate even where p(label) is close to 1."""
    return logits.log_softmax(1).scatter(1, labels[:, None], token_logprob(logits, labels)[:, None])


def token_statistics(logits: Tensor, labels: Tensor) -> TokenStatistics:
    """Return the `TokenStatistics` of the rows, [n] each, without gradient.

    Args:
        logits: [n, V] floating point.
        labels: [n] int64, each in [0, V).
    """
    logits = logits.detach()
    logp = log_probabilities(logits, labels)
    p = logp.exp()
    surprise = torch.where(p > 0, -logp, 0.0)  # a masked vocabulary entry adds nothing
    entropies = (p * surprise).sum(1)
    variances = (p * (surprise - entropies[:, None]) ** 2).sum(1)
    hits = (logits.argmax(1) == labels).to(logits.dtype)
    return TokenStatistics(logp.gather(1, labels[:, None])[:, 0], logits.logsumexp(1), hits, entropies, variances)

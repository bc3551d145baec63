"""Per-token statistics from hidden states, and unlearning objectives as functions of them."""

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from soul_kernels.reference.kl_divergence import entropy, kl_divergence, ref_log_probabilities
from soul_kernels.reference.token_logprob import token_logprob, token_statistics, transformed
from soul_kernels.tokens import (
    IGNORE_INDEX,
    Divergence,
    Head,
    ObjectiveFunction,
    Reference,
    TokenBatch,
    TokenStatistics,
    as_head,
)

CHUNK_BYTES = 2**24  # of fp32 logits in a chunk; a divergence and its gradient take about fifteen tensors of that size


def head_logits(hidden: Tensor, head: Head) -> Tensor:
    """Return the logits [n, V] of hidden states [n, D], in fp32 or, for fp64 inputs, in fp64."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        logits = hidden.to(dtype) @ head.weight.to(dtype).T
    if head.bias is not None:
        logits = logits + head.bias.to(dtype)
    return transformed(logits, head.logit_scale, head.softcap)


def scatter(keep: Tensor, values: Tensor) -> Tensor:
    """Return the values of the kept tokens as [B, T], 0 elsewhere."""
    return torch.zeros(keep.shape, dtype=values.dtype, device=values.device).masked_scatter(keep, values)


def by_chunks(function: Callable[..., Sequence[Tensor]], n_vocab: int, *per_token: Tensor) -> tuple[Tensor, ...]:
    """Return ``function(*per_token)``, computed chunk by chunk: the logits of all tokens never exist together.

    Backward computes the logits of a chunk again instead of keeping them. That is one more GEMM, which is worth it where
    ``function`` makes many tensors [n, V]. Transforms of `torch.func` do not allow this; under them all tokens are computed at
    once.

    Args:
        function: takes and returns tensors with one entry a token; no token depends on another.
        n_vocab: V, from which the number of tokens in a chunk follows.
        *per_token: tensors [n, ...].

    Returns:
        A tuple of tensors [n, ...].
    """
    size = max(CHUNK_BYTES // (4 * n_vocab), 1)
    if len(per_token[0]) <= size or torch._C._are_functorch_transforms_active():
        return tuple(function(*per_token))
    chunks = zip(*(tensor.split(size) for tensor in per_token))
    values = [checkpoint(function, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    return tuple(map(torch.cat, zip(*values)))


def linear_logprob(hidden: Tensor, weight: Tensor | Head, labels: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """``soul_kernels.linear_logprob`` in plain PyTorch, with the logits of all kept tokens in memory at once.

    fp64 inputs are computed in fp64: the errors of fp32 results are measured against these.
    """
    keep = labels != IGNORE_INDEX
    return scatter(keep, token_logprob(head_logits(hidden[keep], as_head(weight, bias)), labels[keep]))


def linear_statistics(
    hidden: Tensor, weight: Tensor | Head, labels: Tensor, *, bias: Tensor | None = None
) -> TokenStatistics:  # fmt: skip
    """``soul_kernels.linear_statistics`` in plain PyTorch."""
    head = as_head(weight, bias)
    keep = labels != IGNORE_INDEX

    @torch.no_grad()
    def statistics_of(hidden: Tensor, labels: Tensor) -> TokenStatistics:
        return token_statistics(head_logits(hidden, head), labels)

    statistics = by_chunks(statistics_of, len(head.weight), hidden[keep].detach(), labels[keep])
    return TokenStatistics(*(scatter(keep, values) for values in statistics))


def linear_divergence(
    hidden: Tensor, head: Head, labels: Tensor, reference: Reference, *, kind: str = "kl", strengths: Tensor | None = None,
    beta: float = 0.5,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return three values of each kept token: divergence, entropy of the reference model, log-probability of the label.

    Args:
        hidden: [B, T, D].
        head: the model's head.
        labels: [B, T] int64.
        reference: the reference model.
        kind: see `soul_kernels.linear_kl`.
        strengths: [B], how far the reference model's logit of the label is lowered in each sequence, or None.
        beta: see `soul_kernels.linear_kl`.

    Returns:
        Three tensors [B, T], 0 at ignored tokens; the first and the last are differentiable.
    """
    keep = labels != IGNORE_INDEX
    ref_head = reference.head_beside(head)

    def values_of(
        hidden: Tensor, labels: Tensor, ref_hidden: Tensor, strengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        logits = head_logits(hidden, head)
        with torch.no_grad():
            log_q = ref_log_probabilities(head_logits(ref_hidden, ref_head), labels, strengths)
        return kl_divergence(logits, labels, log_q, kind, beta), entropy(log_q), token_logprob(logits, labels)

    per_token = [hidden[keep], labels[keep], reference.hidden[keep]]
    if strengths is not None:
        per_token.append(strengths[:, None].expand(labels.shape)[keep])
    divergences, entropies, logps = by_chunks(values_of, len(head.weight), *per_token)
    return scatter(keep, divergences), scatter(keep, entropies), scatter(keep, logps)


def linear_objective(
    hidden: Tensor, weight: Tensor | Head, labels: Tensor, objective: ObjectiveFunction, *, bias: Tensor | None = None,
    is_forget: Tensor | None = None, ref_logps: Tensor | None = None, reference: Reference | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``soul_kernels.linear_objective`` in plain PyTorch: the objective of log-probabilities and divergences, under autograd.

    Returns:
        The loss [] and the log-probabilities [B, T], detached.
    """
    head = as_head(weight, bias)
    batch = TokenBatch.from_labels(labels, is_forget, ref_logps)
    if getattr(objective, "needs_statistics", False):
        batch = dataclasses.replace(batch, statistics=linear_statistics(hidden, head, labels))
    divergence: Divergence | None = getattr(objective, "divergence", None)
    if divergence is None:
        logps = linear_logprob(hidden, head, labels)
    else:
        assert reference is not None  # the op has checked it
        needed = needed_sequences(divergence, batch.is_forget)[:, None]
        values, entropies, logps = linear_divergence(
            hidden, head, labels.masked_fill(~needed, IGNORE_INDEX), reference, kind=divergence.kind,
            strengths=sequence_strengths(divergence, batch.is_forget), beta=divergence.beta,
        )  # fmt: skip
        logps = logps + linear_logprob(hidden, head, labels.masked_fill(needed, IGNORE_INDEX))
        batch = dataclasses.replace(batch, divergences=values, ref_entropies=entropies)
    return objective(logps, batch), logps.detach()


def needed_sequences(divergence: Divergence, is_forget: Tensor) -> Tensor:
    """Return [B] bool, the sequences for which an objective needs a divergence."""
    return {"forget": is_forget, "retain": ~is_forget, "all": torch.ones_like(is_forget)}[divergence.of]


def sequence_strengths(divergence: Divergence, is_forget: Tensor) -> Tensor | None:
    """Return [B] fp32, how far the reference model's logit of the label is lowered in each sequence; None if in none."""
    return divergence.strength * is_forget.float() if divergence.strength else None

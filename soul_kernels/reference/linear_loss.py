"""Per-token statistics from hidden states, and unlearning objectives as functions of them."""

import dataclasses

import torch
from torch.utils.checkpoint import checkpoint

from soul_kernels.reference.kl_divergence import entropy, kl_divergence, reference_distribution
from soul_kernels.reference.token_logprob import token_logprob, token_statistics, transformed
from soul_kernels.tokens import IGNORE_INDEX, TokenBatch, TokenStatistics

CHUNK_BYTES = 2**24  # of fp32 logits in a chunk; a divergence and its gradient take about fifteen tensors of that size


def head_logits(hidden, weight, bias=None, logit_scale=1.0, softcap=None):
    """Logits [n, V] of hidden states [n, D], in fp32 or, for fp64 inputs, in fp64."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        logits = hidden.to(dtype) @ weight.to(dtype).T
    if bias is not None:
        logits = logits + bias.to(dtype)
    return transformed(logits, logit_scale, softcap)


def scatter(keep, values):
    """Values of the kept tokens -> [B, T], 0 elsewhere."""
    return torch.zeros(keep.shape, dtype=values.dtype, device=values.device).masked_scatter(keep, values)


def by_chunks(function, n_vocab, *rows):
    """``function(*rows)``, computed for one chunk of tokens at a time, so that the logits of all tokens never exist together.

    Backward computes the logits of a chunk again instead of keeping them: one more GEMM, which is worth it where ``function``
    makes many tensors [n, V]. Under transforms of `torch.func`, which do not allow this, all tokens are computed at once.

    Args:
        function: takes and returns tensors with one row a token; no row depends on another.
        n_vocab: V, from which the number of tokens in a chunk follows.
        *rows: tensors [n, ...].

    Returns:
        A tuple of tensors [n, ...].
    """
    size = max(CHUNK_BYTES // (4 * n_vocab), 1)
    if len(rows[0]) <= size or torch._C._are_functorch_transforms_active():
        return tuple(function(*rows))
    chunks = zip(*(tensor.split(size) for tensor in rows))
    values = [checkpoint(function, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    return tuple(map(torch.cat, zip(*values)))


def linear_logprob(hidden, weight, labels, *, bias=None, logit_scale=1.0, softcap=None):
    """``soul_kernels.linear_logprob`` in plain PyTorch: with gradients, the fp32 logits of the kept tokens exist all at once.

    fp64 inputs are computed in fp64, which makes this the oracle of its own accuracy.
    """
    keep = labels != IGNORE_INDEX
    return scatter(keep, token_logprob(head_logits(hidden[keep], weight, bias, logit_scale, softcap), labels[keep]))


def linear_statistics(hidden, weight, labels, *, bias=None, logit_scale=1.0, softcap=None):
    """``soul_kernels.linear_statistics`` in plain PyTorch."""
    keep = labels != IGNORE_INDEX

    @torch.no_grad()
    def of_rows(hidden, labels):
        return token_statistics(head_logits(hidden, weight, bias, logit_scale, softcap), labels)

    statistics = by_chunks(of_rows, len(weight), hidden[keep].detach(), labels[keep])
    return TokenStatistics(*(scatter(keep, values) for values in statistics))


def linear_divergence(
    hidden, weight, labels, ref_hidden, *, ref_weight=None, bias=None, ref_bias=None, kind="kl", strengths=None,
    logit_scale=1.0, softcap=None,
):  # fmt: skip
    """Divergence of each kept token [B, T], differentiable, the entropy of the reference there, and the log-probability of the
    label, differentiable as well; 0 elsewhere.

    ``strengths`` [B]: how far the reference's logit of the label is lowered in each sequence, or None.
    """
    keep = labels != IGNORE_INDEX
    ref_weight = weight if ref_weight is None else ref_weight

    def of_rows(hidden, labels, ref_hidden, strengths=None):
        logits = head_logits(hidden, weight, bias, logit_scale, softcap)
        with torch.no_grad():
            ref_logits = head_logits(ref_hidden, ref_weight, ref_bias, logit_scale, softcap)
            log_q = reference_distribution(ref_logits, labels, strengths)
        return kl_divergence(logits, labels, log_q, kind), entropy(log_q), token_logprob(logits, labels)

    rows = [hidden[keep], labels[keep], ref_hidden[keep]]
    if strengths is not None:
        rows.append(strengths[:, None].expand(labels.shape)[keep])
    return tuple(scatter(keep, values) for values in by_chunks(of_rows, len(weight), *rows))


def linear_objective(
    hidden, weight, labels, objective, *, bias=None, is_forget=None, ref_logps=None, ref_hidden=None, ref_weight=None,
    ref_bias=None, logit_scale=1.0, softcap=None,
):  # fmt: skip
    """``soul_kernels.linear_objective`` in plain PyTorch: the objective of log-probabilities and divergences, under autograd.

    Returns:
        The loss [] and the log-probabilities [B, T], detached.
    """
    head = dict(bias=bias, logit_scale=logit_scale, softcap=softcap)
    batch = TokenBatch.from_labels(labels, is_forget, ref_logps)
    if getattr(objective, "needs_statistics", False):
        batch = dataclasses.replace(batch, statistics=linear_statistics(hidden, weight, labels, **head))
    divergence = getattr(objective, "divergence", None)
    if divergence is None:
        logps = linear_logprob(hidden, weight, labels, **head)
    else:
        needed = needed_sequences(divergence, batch.is_forget)[:, None]
        values, entropies, logps = linear_divergence(
            hidden, weight, labels.masked_fill(~needed, IGNORE_INDEX), ref_hidden, ref_weight=ref_weight, ref_bias=ref_bias,
            kind=divergence.kind, strengths=sequence_strengths(divergence, batch.is_forget), **head,
        )  # fmt: skip
        logps = logps + linear_logprob(hidden, weight, labels.masked_fill(needed, IGNORE_INDEX), **head)
        batch = dataclasses.replace(batch, divergences=values, ref_entropies=entropies)
    return objective(logps, batch), logps.detach()


def needed_sequences(divergence, is_forget):
    """[B] bool: the sequences whose divergence an objective needs."""
    return {"forget": is_forget, "retain": ~is_forget, "all": torch.ones_like(is_forget)}[divergence.of]


def sequence_strengths(divergence, is_forget):
    """[B] fp32: how far the reference's logit of the label is lowered, or None where it is not."""
    return divergence.strength * is_forget.float() if divergence.strength else None

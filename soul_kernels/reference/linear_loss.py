"""Per-token log-probabilities from hidden states, and unlearning objectives as functions of them."""

import dataclasses

import torch

from soul_kernels.reference.token_logprob import IGNORE_INDEX, token_logprob


@dataclasses.dataclass(frozen=True)
class TokenBatch:
    """What an objective knows of the log-probabilities that it is given.

    The counts are those of the **whole** batch, also where ``mask`` covers a part of it: an objective that divides by them,
    not by sums over ``mask``, can be evaluated part by part and added up.

    Attributes:
        mask: [B, T] bool, the tokens that count.
        is_forget: [B] bool, the sequences to be forgotten; the others are to be retained.
        ref_logps: [B] fp32, summed log-probability of each sequence under the reference model, or None.
        n_forget_tokens: [] fp32, kept tokens of all forget sequences, at least 1.
        n_retain_tokens: [] fp32, kept tokens of all retain sequences, at least 1.
        n_forget_sequences: [] fp32, forget sequences with a kept token, at least 1.
        n_retain_sequences: [] fp32, retain sequences with a kept token, at least 1.
    """

    mask: torch.Tensor
    is_forget: torch.Tensor
    ref_logps: torch.Tensor | None
    n_forget_tokens: torch.Tensor
    n_retain_tokens: torch.Tensor
    n_forget_sequences: torch.Tensor
    n_retain_sequences: torch.Tensor

    @classmethod
    def from_labels(cls, labels, is_forget=None, ref_logps=None):
        """Builds the batch of ``labels`` [B, T]; without ``is_forget`` every sequence is to be forgotten."""
        mask = labels != IGNORE_INDEX
        if is_forget is None:
            is_forget = torch.ones(len(labels), dtype=torch.bool, device=labels.device)
        tokens = mask.sum(1)
        sequences = tokens > 0

        def count(values):
            return values.sum().clamp(min=1).float()

        return cls(
            mask=mask,
            is_forget=is_forget,
            ref_logps=ref_logps,
            n_forget_tokens=count(tokens * is_forget),
            n_retain_tokens=count(tokens * ~is_forget),
            n_forget_sequences=count(sequences & is_forget),
            n_retain_sequences=count(sequences & ~is_forget),
        )

    def sequences(self, start, stop):
        """The part of the batch that holds sequences ``start`` to ``stop``."""
        ref_logps = None if self.ref_logps is None else self.ref_logps[start:stop]
        return dataclasses.replace(self, mask=self.mask[start:stop], is_forget=self.is_forget[start:stop], ref_logps=ref_logps)

    def tokens(self, mask):
        """The part of the batch that holds the tokens of ``mask`` [B, T]."""
        return dataclasses.replace(self, mask=self.mask & mask)


def linear_logprob(hidden, weight, labels, *, bias=None):
    """``soul_kernels.linear_logprob`` in plain PyTorch: the logits of the kept tokens in fp32, all at once.

    fp64 inputs are computed in fp64, which makes this the oracle of its own accuracy.
    """
    keep = labels != IGNORE_INDEX
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        logits = hidden[keep].to(dtype) @ weight.to(dtype).T
    if bias is not None:
        logits = logits + bias.to(dtype)
    zeros = torch.zeros(labels.shape, dtype=dtype, device=hidden.device)
    return zeros.masked_scatter(keep, token_logprob(logits, labels[keep]))


def linear_objective(hidden, weight, labels, objective, *, bias=None, is_forget=None, ref_logps=None):
    """``soul_kernels.linear_objective`` in plain PyTorch: the objective of ``linear_logprob``, under autograd.

    Returns:
        The loss [] and the log-probabilities [B, T], detached.
    """
    logps = linear_logprob(hidden, weight, labels, bias=bias)
    return objective(logps, TokenBatch.from_labels(labels, is_forget, ref_logps)), logps.detach()

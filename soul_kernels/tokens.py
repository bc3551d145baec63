"""What the losses are given and what objectives see: batches of tokens, heads, reference models, divergences, statistics."""

import dataclasses
from typing import NamedTuple

import torch

IGNORE_INDEX = -100


class TokenStatistics(NamedTuple):
    """Statistics of each token under p = softmax(logits), all of one shape, 0 at ignored tokens.

    Attributes:
        logps: log p(label).
        lse: logsumexp of the logits.
        hits: 1.0 where the label is the argmax (the first, among equals), else 0.0: exact memorization, extraction strength.
        entropies: ``-sum_v p_v log p_v``; the mean of log p under the model is its negative.
        variances: ``sum_v p_v (log p_v)^2 - (sum_v p_v log p_v)^2``; Min-K++ is ``(logp + entropy) / sqrt(variance)``.
    """

    logps: torch.Tensor
    lse: torch.Tensor
    hits: torch.Tensor
    entropies: torch.Tensor
    variances: torch.Tensor


class Divergence(NamedTuple):
    """Which divergence an objective needs, and of which sequences.

    Attributes:
        of: "forget", "retain" or "all".
        kind: "kl" or "soul_kl": see `kl_divergence`.
        strength: how far the reference's logit of the label is lowered in forget sequences (UNDIAL's beta).
    """

    of: str
    kind: str = "kl"
    strength: float = 0.0


class Head(NamedTuple):
    """A language-model head: logits are ``softcap tanh(logit_scale (hidden @ weight.T + bias) / softcap)``.

    Attributes:
        weight: [V, D].
        bias: [V] or None.
        logit_scale: a number.
        softcap: a number, or None: not capped.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None

    def transform(self):
        """Keyword arguments of the row kernels."""
        return dict(logit_scale=self.logit_scale, softcap=self.softcap)


class Reference(NamedTuple):
    """A reference model, from which the divergence of some sequences is wanted.

    Attributes:
        hidden: [B, T, D'] its hidden states.
        weight: [V, D'] its head.
        bias: [V] or None.
        needed: [B] bool, the sequences; where it is on the CPU, like ``rows``, the device need not be asked. None: all.
        kind: "kl" or "soul_kl".
        strengths: [B] fp32, how far its logit of the label is lowered, or None.
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None = None
    needed: torch.Tensor | None = None
    kind: str = "kl"
    strengths: torch.Tensor | None = None


@dataclasses.dataclass(frozen=True)
class TokenBatch:
    """What an objective knows of the tokens, beside their log-probabilities.

    The counts are those of the **whole** batch, also where ``mask`` covers a part of it: an objective that divides by them,
    not by sums over ``mask``, can be evaluated part by part and added up.

    Attributes:
        mask: [B, T] bool, the tokens that count.
        is_forget: [B] bool, the sequences to be forgotten; the others are to be retained.
        ref_logps: [B] fp32, summed log-probability of each sequence under the reference model, or None.
        lengths: [B] fp32, kept tokens of each sequence.
        n_forget_tokens: [] fp32, kept tokens of all forget sequences, at least 1.
        n_retain_tokens: [] fp32, kept tokens of all retain sequences, at least 1.
        n_forget_sequences: [] fp32, forget sequences with a kept token, at least 1.
        n_retain_sequences: [] fp32, retain sequences with a kept token, at least 1.
        divergences: [B, T] fp32, from the reference's distribution, differentiable like the log-probabilities; only where the
            objective's attribute ``divergence`` asks for them, 0 at other tokens.
        ref_entropies: [B, T] fp32, entropy of the reference's distribution, where there are divergences.
        statistics: `TokenStatistics` [B, T], without gradient; only where the objective's ``needs_statistics`` is true.
        whole: the batch that this is a part of; itself, where it is whole.
    """

    mask: torch.Tensor
    is_forget: torch.Tensor
    ref_logps: torch.Tensor | None
    lengths: torch.Tensor
    n_forget_tokens: torch.Tensor
    n_retain_tokens: torch.Tensor
    n_forget_sequences: torch.Tensor
    n_retain_sequences: torch.Tensor
    divergences: torch.Tensor | None = None
    ref_entropies: torch.Tensor | None = None
    statistics: TokenStatistics | None = None
    _whole: "TokenBatch | None" = None

    @classmethod
    def from_labels(cls, labels, is_forget=None, ref_logps=None):
        """Builds the batch of ``labels`` [B, T]; without ``is_forget`` every sequence is to be forgotten."""
        mask = labels != IGNORE_INDEX
        if is_forget is None:
            is_forget = torch.ones(len(labels), dtype=torch.bool, device=labels.device)
        is_forget = is_forget.to(labels.device, non_blocking=True)
        tokens = mask.sum(1)
        sequences = tokens > 0

        def count(values):
            return values.sum().clamp(min=1).float()

        return cls(
            mask=mask,
            is_forget=is_forget,
            ref_logps=ref_logps,
            lengths=tokens.float(),
            n_forget_tokens=count(tokens * is_forget),
            n_retain_tokens=count(tokens * ~is_forget),
            n_forget_sequences=count(sequences & is_forget),
            n_retain_sequences=count(sequences & ~is_forget),
        )

    @property
    def whole(self):
        """The batch that this is a part of, or itself."""
        return self if self._whole is None else self._whole

    def sequences(self, start, stop):
        """The part of the batch that holds sequences ``start`` to ``stop``."""

        def cut(values):
            return None if values is None else values[start:stop]

        return dataclasses.replace(
            self,
            **{name: cut(getattr(self, name)) for name in PER_SEQUENCE},
            statistics=self.statistics and TokenStatistics(*map(cut, self.statistics)),
            _whole=self.whole,
        )

    def within(self, whole):
        """The same tokens as a part of a larger batch, ``whole``, whose counts and lengths are then used: objectives of parts
        add up to that of the whole, where they are a sum over sequences.
        """
        counts = {name: getattr(whole, name) for name in COUNTS}
        return dataclasses.replace(self, **counts, _whole=whole)

    def tokens(self, mask):
        """The part of the batch that holds the tokens of ``mask`` [B, T]."""
        return dataclasses.replace(self, mask=self.mask & mask, _whole=self.whole)


COUNTS = ("n_forget_tokens", "n_retain_tokens", "n_forget_sequences", "n_retain_sequences")


PER_SEQUENCE = ("mask", "is_forget", "ref_logps", "lengths", "divergences", "ref_entropies")

"""Types that ops on hidden states and objectives exchange: heads, reference models, batches of tokens, statistics."""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, TypeAlias, TypedDict

import torch

from soul_kernels.errors import argument_error

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

IGNORE_INDEX = -100


class TokenStatistics(NamedTuple):
    """Statistics of each token under p = softmax(logits), all of one shape, 0 at ignored tokens.

    Attributes:
        logps: log p(label).
        lse: logsumexp of the logits.
        hits: 1.0 where the label is the argmax (the first among equals), else 0.0. Exact memorization and extraction strength
            are computed from it.
        entropies: ``-sum_v p_v log p_v``; the mean of log p under the model is its negative.
        variances: ``sum_v p_v (log p_v)^2 - (sum_v p_v log p_v)^2``; Min-K++ is ``(logp + entropy) / sqrt(variance)``.
    """

    logps: torch.Tensor
    lse: torch.Tensor
    hits: torch.Tensor
    entropies: torch.Tensor
    variances: torch.Tensor


class Divergence(NamedTuple):
    """Request of an objective: a kind of divergence from a reference model, and the sequences to compute it for.

    Attributes:
        of: the sequences: "forget", "retain" or "all".
        kind: "kl", "soul_kl", "reverse_kl" or "jsd"; see `soul_kernels.linear_kl`.
        strength: how far the reference model's logit of the label is lowered in forget sequences (UNDIAL's beta).
        beta: weight of the reference model in the mixture of "jsd".
    """

    of: str
    kind: str = "kl"
    strength: float = 0.0
    beta: float = 0.5


class Transform(TypedDict):
    """Keyword arguments that turn raw products into logits, ``softcap tanh(logit_scale x / softcap)``."""

    logit_scale: float
    softcap: float | None


class VocabShard(NamedTuple):
    """The rows of a head that this process holds, of a vocabulary that the processes of a mesh share.

    Attributes:
        mesh: the mesh of processes.
        dim: the dimension of the mesh along which the vocabulary is cut.
        start: the first row that is here.
        n_rows: the number of rows that are here; it may be 0.
        n_vocab: the number of rows of the whole head.
        largest: the largest number of rows of a process.
        partial_hidden: whether the gradient of hidden states is left as the sum over the rows that are here.
        own_tokens: whether each process has tokens of its own.
    """

    mesh: "DeviceMesh"
    dim: int
    start: int
    n_rows: int
    n_vocab: int
    largest: int
    partial_hidden: bool = False
    own_tokens: bool = False


class Head(NamedTuple):
    """A language-model head: logits are ``softcap tanh(logit_scale (hidden @ weight.T + bias) / softcap)``.

    Attributes:
        weight: [V, D].
        bias: [V] or None.
        logit_scale: factor of the raw products, other than 0: Cohere's ``logit_scale``, 1 over Granite's ``logits_scaling``.
        softcap: bound of the logits, > 0: Gemma's ``final_logit_softcapping``; None: no bound.
        shard: leave it None. The ops set it beside the local rows of a weight that is a DTensor.
        own_tokens: beside a weight that is a DTensor: every process of its mesh has other tokens, as where data are divided
            among processes. Hidden states, labels and results are then those of the process, which may have no token at all.
            The gradient of its rows of the head is the sum over the tokens of all processes. So losses must be sums of shares,
            and must have the same upstream gradient in all processes. All processes must make the same calls.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    shard: VocabShard | None = None
    own_tokens: bool = False

    @property
    def n_vocab(self) -> int:
        """The number of rows of the whole head."""
        return self.weight.shape[0] if self.shard is None else self.shard.n_vocab

    def transform(self) -> Transform:
        """Return scale and cap as keyword arguments of the row kernels."""
        return {"logit_scale": self.logit_scale, "softcap": self.softcap}


def as_head(weight: torch.Tensor | Head, bias: torch.Tensor | None = None) -> Head:
    """Return the `Head` of a weight [V, D] and a bias [V]; a `Head` passed as the weight is returned as it is.

    Raises:
        ArgumentError: ``weight`` is neither a tensor nor a `Head`, or a bias was passed with a `Head`, which has its own.
    """
    if isinstance(weight, Head):
        if bias is not None:
            raise argument_error("bias", "None beside a Head, which has its own", "a tensor", "pass Head(weight, bias)")
        return weight
    if not isinstance(weight, torch.Tensor):
        raise argument_error("weight", "a tensor [V, D] or a Head", type(weight).__name__, "pass Head(weight, bias)")
    return Head(weight, bias)


class Reference(NamedTuple):
    """The reference model, which is the model before unlearning: its hidden states on the batch of an op, and its head.

    Its logits are scaled and capped as the model's are.

    Attributes:
        hidden: [B, T, D'], hidden states of a floating-point dtype; they get no gradient. Sequences without a divergence may
            hold anything.
        weight: [V, D'] of the head. None: the model's own weight, which must then be frozen.
        bias: [V] or None. Without a ``weight``, None is the model's own bias, which must then be frozen.
    """

    hidden: torch.Tensor
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    def head_beside(self, head: Head) -> Head:
        """Return the head of the reference model; what it leaves out is taken from ``head``, the model's own."""
        if self.weight is None:
            return head if self.bias is None else head._replace(bias=self.bias)
        return head._replace(weight=self.weight, bias=self.bias)


@dataclasses.dataclass(frozen=True)
class TokenBatch:
    """A batch of tokens as an objective receives it beside their log-probabilities, or a piece of such a batch.

    The counts are those of the **whole** batch, even where ``mask`` covers only some of its tokens. An objective that divides
    by the counts, and not by sums over ``mask``, can be evaluated on pieces of the batch, and the values add up.

    A token is kept if its label is not -100.

    Attributes:
        mask: [B, T] bool, the kept tokens of this piece.
        is_forget: [B] bool, the sequences to be forgotten; the others are to be retained.
        ref_logps: [B] fp32, summed log-probability of each sequence under the reference model, or None.
        lengths: [B] fp32, kept tokens of each sequence.
        n_forget_tokens: [] fp32, kept tokens of all forget sequences, at least 1.
        n_retain_tokens: [] fp32, kept tokens of all retain sequences, at least 1.
        n_forget_sequences: [] fp32, forget sequences with a kept token, at least 1.
        n_retain_sequences: [] fp32, retain sequences with a kept token, at least 1.
        divergences: [B, T] fp32, from the reference model's distribution, differentiable like the log-probabilities; 0 at
            tokens that need none. None unless the objective's attribute ``divergence`` asks for them.
        ref_entropies: [B, T] fp32, entropies of the reference model's distribution; None without ``divergences``.
        statistics: `TokenStatistics` [B, T], without gradient; None unless the objective's ``needs_statistics`` is true.
        add_up: function that adds a number [] up over the pieces of ``whole`` that other processes evaluate at the same time,
            this one included; None if this process has all of it. `total` calls it.
        whole: the batch that this one is a piece of, or this batch itself.
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
    add_up: Callable[[torch.Tensor], torch.Tensor] | None = None
    _whole: "TokenBatch | None" = None

    @classmethod
    def from_labels(
        cls, labels: torch.Tensor, is_forget: torch.Tensor | None = None, ref_logps: torch.Tensor | None = None
    ) -> "TokenBatch":
        """Build the batch of ``labels`` [B, T]; without ``is_forget`` every sequence is to be forgotten."""
        mask = labels != IGNORE_INDEX
        if is_forget is None:
            is_forget = torch.ones(len(labels), dtype=torch.bool, device=labels.device)
        is_forget = is_forget.to(labels.device, non_blocking=True)
        tokens = mask.sum(1)
        sequences = tokens > 0

        def count(values: torch.Tensor) -> torch.Tensor:
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
    def whole(self) -> "TokenBatch":
        """The batch that this one is a piece of, or this batch itself."""
        return self if self._whole is None else self._whole

    def sequences(self, start: int, stop: int) -> "TokenBatch":
        """Return the piece of the batch that holds sequences ``start`` to ``stop``."""

        def cut(values: torch.Tensor | None) -> torch.Tensor | None:
            return None if values is None else values[start:stop]

        statistics = None
        if self.statistics is not None:
            statistics = TokenStatistics(*(values[start:stop] for values in self.statistics))
        pieces = {name: cut(getattr(self, name)) for name in PER_SEQUENCE}
        return dataclasses.replace(self, **pieces, statistics=statistics, _whole=self.whole)  # type: ignore[arg-type]  # by name

    def within(self, whole: "TokenBatch", add_up: Callable[[torch.Tensor], torch.Tensor] | None = None) -> "TokenBatch":
        """Return the same tokens as a piece of the larger batch ``whole``, with the counts of ``whole``.

        An objective that is a sum over sequences then has values on the pieces that add up to its value on the whole batch.
        Any other one must call `total` for what it needs of the whole batch, and needs ``add_up`` for it.
        """
        counts = {name: getattr(whole, name) for name in COUNTS}
        return dataclasses.replace(self, **counts, add_up=add_up, _whole=whole)

    def total(self, value: torch.Tensor) -> torch.Tensor:
        """Return the sum of a number [] over all pieces of ``whole``, in the processes that evaluate them at the same time.

        Its derivative is that of this piece's own summand. A loss of the total therefore has the right gradient in each
        process, for the tokens that the process holds.
        """
        return value if self.add_up is None else self.add_up(value.detach()) + (value - value.detach())

    def tokens(self, mask: torch.Tensor) -> "TokenBatch":
        """Return the piece of the batch that holds the tokens of ``mask`` [B, T]."""
        return dataclasses.replace(self, mask=self.mask & mask, _whole=self.whole)


COUNTS = ("n_forget_tokens", "n_retain_tokens", "n_forget_sequences", "n_retain_sequences")
PER_SEQUENCE = ("mask", "is_forget", "ref_logps", "lengths", "divergences", "ref_entropies")

# A function of log-probabilities [B, T] and their batch that returns a loss []; see `soul_kernels.linear_objective`.
ObjectiveFunction: TypeAlias = Callable[[torch.Tensor, TokenBatch], torch.Tensor]

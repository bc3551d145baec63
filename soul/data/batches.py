"""Padded batches of token sequences, and the order of the examples of a run."""

import collections.abc
import dataclasses
import random
from typing import Any

import torch
from torch import Tensor

from soul.data.examples import Sequence
from soul_kernels.errors import argument_error
from soul_kernels.tokens import IGNORE_INDEX

# For a process that gets no sequence of a micro-batch: it takes part in the gathering of parameters all the same.
NO_SEQUENCE = Sequence([0], [IGNORE_INDEX], 1)


@dataclasses.dataclass(frozen=True)
class Batch:
    """Sequences padded on the right to the longest.

    Attributes:
        input_ids: [B, T] int64.
        attention_mask: [B, T] int64, 0 at padding; None: every position is attended to.
        labels: [B, T] int64, shifted, -100 at prompts and padding.
        token_indices: [R] int64 on the CPU, flat indices of the labelled positions. They are computed before the batch goes to
            the device, which saves a wait for it.
        is_forget: [B] bool, on the CPU like ``token_indices``.
        has_retain: whether there are sequences to retain.
        ref_logps: [B] fp32 log-probabilities under the reference model, 0 for retain sequences; or None.
        ref_hidden: [B, T, D] hidden states of the reference model, or None.
        pads_right: whether ``attention_mask`` is known to be 1 up to some position of each sequence, and 0 from there on.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    labels: Tensor
    token_indices: Tensor
    is_forget: Tensor
    has_retain: bool
    ref_logps: Tensor | None = None
    ref_hidden: Tensor | None = None
    pads_right: bool = False


def collate(
    forget: list[Sequence],
    retain: list[Sequence],
    *,
    device: torch.device | str = "cpu",
    ref_logps: list[float] | None = None,
    ref_hidden: collections.abc.Sequence[Tensor | None] | None = None,
) -> Batch:
    """Return forget and retain sequences as one `Batch`, the forget ones first, padded to the longest.

    Padding is masked, and its token id is 0. The tokenizer's own padding token is not used, because it may have been added
    without a row in the model's embedding.

    Args:
        forget: list of `Sequence`. For `soul.losses.DPO` these are pairs: each answer, and right after it its refusal.
        retain: list of `Sequence`.
        device: device of the batch; ``token_indices`` and ``is_forget`` stay on the CPU.
        ref_logps: log-probabilities of the forget sequences under the reference model, a list of floats, or None.
        ref_hidden: hidden states of the reference model for all sequences at their labelled positions, from
            `soul.reference_hidden`: a list of [n, D] tensors, with None for a sequence whose states are not needed; or None.

    Raises:
        ArgumentError: ``ref_logps`` or ``ref_hidden`` do not fit the sequences.
    """
    sequences = [*forget, *retain]
    longest = max(len(sequence.input_ids) for sequence in sequences)
    input_ids = _padded([sequence.input_ids for sequence in sequences], longest, 0)
    labels = _padded([sequence.labels for sequence in sequences], longest, IGNORE_INDEX)
    attention_mask = _padded([[1] * len(sequence.input_ids) for sequence in sequences], longest, 0)
    all_ref_logps = None
    if ref_logps is not None:
        if len(ref_logps) != len(forget):
            raise argument_error("ref_logps", f"{len(forget)} values", len(ref_logps), "pass one per forget sequence")
        all_ref_logps = torch.tensor([*ref_logps, *[0.0] * len(retain)], dtype=torch.float32, device=device)
    return Batch(
        input_ids=input_ids.to(device),
        attention_mask=attention_mask.to(device),
        labels=labels.to(device),
        token_indices=(labels.view(-1) != IGNORE_INDEX).nonzero()[:, 0],
        is_forget=torch.arange(len(sequences), device="cpu") < len(forget),
        has_retain=bool(retain),
        ref_logps=all_ref_logps,
        ref_hidden=None if ref_hidden is None else _pad_hidden(ref_hidden, labels, device),
        pads_right=True,
    )


def _padded(values: list[list[int]], length: int, filler: int) -> Tensor:
    """Return lists of numbers as one tensor [B, length] int64 on the CPU, padded on the right."""
    return torch.tensor([row + [filler] * (length - len(row)) for row in values], dtype=torch.int64, device="cpu")


def _pad_hidden(states: collections.abc.Sequence[Tensor | None], labels: Tensor, device: torch.device | str) -> Tensor:
    """Return states [n, D] at the labelled positions of each sequence as [B, T, D], 0 elsewhere.

    Only the states themselves are moved to the device, not their padding.
    """
    counts = (labels != IGNORE_INDEX).sum(1).tolist()
    lengths = [None if state is None else len(state) for state in states]
    fits = len(lengths) == len(counts) and all(length in (None, count) for length, count in zip(lengths, counts))
    if not fits or lengths.count(None) == len(lengths):
        expected = f"states at {counts} labelled positions, or None where they are not needed"
        raise argument_error("ref_hidden", expected, lengths, "compute them from the same sequences: soul.reference_hidden")
    packed = torch.cat([state for state in states if state is not None]).to(device)
    needed = torch.tensor([state is not None for state in states], device="cpu")[:, None]
    positions = ((labels != IGNORE_INDEX) & needed).view(-1).nonzero()[:, 0].to(device)
    return packed.new_zeros(labels.numel(), packed.shape[1]).index_copy_(0, positions, packed).view(*labels.shape, -1)


def batches_by_length(sequences: list[Sequence], batch_size: int, rng: random.Random) -> list[list[int]]:
    """Return the batches of one epoch as lists of indices, in random order.

    The sequences of a batch are of similar length, which keeps the padding short.

    Args:
        sequences: list of `Sequence`.
        batch_size: number of indices per batch; one batch may have fewer.
        rng: random generator of the order.
    """
    order = list(range(len(sequences)))
    rng.shuffle(order)
    pool = 8 * batch_size  # sorted within pools only, so that epochs differ
    by_length = []
    for start in range(0, len(order), pool):
        by_length += sorted(order[start : start + pool], key=lambda index: len(sequences[index].labels))
    batches = [by_length[start : start + batch_size] for start in range(0, len(by_length), batch_size)]
    rng.shuffle(batches)
    return batches


class Order:
    """The indices of the examples of each step.

    Every epoch takes the forget set in a new random order. The retain set has a random order of its own, which continues from
    one epoch to the next and is drawn anew when it is used up. Each item is a tuple: the epoch, counted from 1; the indices of
    the step's forget examples, sorted; and the indices of equally many retain examples.

    Args:
        n_forget: number of examples to forget.
        n_retain: number of examples to retain; 0: the steps have none.
        batch_size: number of forget examples per step; the last step of an epoch may have fewer.
        epochs: passes over the forget set.
        seed: seed of both orders.
    """

    def __init__(self, n_forget: int, n_retain: int, batch_size: int, epochs: int, seed: int) -> None:
        self.n_forget = n_forget
        self.n_retain = n_retain
        self.batch_size = batch_size
        self.epochs = epochs
        self.rng = random.Random(seed)
        self.epoch = 0
        self.forget: list[int] = []  # indices that are still to come in this epoch
        self.retain: list[int] = []  # indices that are still to come before the retain set starts anew

    def __len__(self) -> int:
        return self.epochs * -(-self.n_forget // self.batch_size)

    def __iter__(self) -> "Order":
        return self

    def __next__(self) -> tuple[int, list[int], list[int]]:
        if not self.forget:
            if self.epoch == self.epochs:
                raise StopIteration
            self.epoch += 1
            self.forget = self._shuffled(self.n_forget)
        # Sorted: a forget set that is one batch comes in the order in which the reference model was run on it.
        forget = sorted(self.forget[: self.batch_size])
        self.forget = self.forget[self.batch_size :]
        while self.n_retain and len(self.retain) < len(forget):
            self.retain += self._shuffled(self.n_retain)
        retain = self.retain[: len(forget)]
        self.retain = self.retain[len(forget) :]
        return self.epoch, forget, retain

    def _shuffled(self, n: int) -> list[int]:
        order = list(range(n))
        self.rng.shuffle(order)
        return order

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the data, for a checkpoint."""
        return {"epoch": self.epoch, "forget": self.forget, "retain": self.retain, "draw": self.rng.getstate()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue at the position of ``state_dict``."""
        self.epoch = state_dict["epoch"]
        self.forget = state_dict["forget"]
        self.retain = state_dict["retain"]
        self.rng.setstate(state_dict["draw"])

"""Sequences of token ids -> batches, and the order in which they come."""

import dataclasses
import random

import torch

from soul_kernels.errors import argument_error
from soul_kernels.tokens import IGNORE_INDEX


@dataclasses.dataclass(frozen=True)
class Batch:
    """Sequences padded on the right to the longest.

    Attributes:
        input_ids: [B, T] int64.
        attention_mask: [B, T] int64, 0 at padding; or None, where nothing attends to padding.
        labels: [B, T] int64, shifted, -100 at prompts and padding.
        rows: [R] int64 on the CPU, flat indices of the labelled positions: known here, so the device need not be asked.
        is_forget: [B] bool, on the CPU like ``rows``.
        has_retain: whether there are sequences to retain.
        ref_logps: [B] fp32 or None.
        ref_hidden: [B, T, D] or None.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    labels: torch.Tensor
    rows: torch.Tensor
    is_forget: torch.Tensor
    has_retain: bool
    ref_logps: torch.Tensor | None = None
    ref_hidden: torch.Tensor | None = None


def collate(forget, retain, *, device="cpu", ref_logps=None, ref_hidden=None):
    """Puts forget and retain sequences into one `Batch`, the forget ones first, padded to the longest.

    Padding is masked, and its token id is 0: a padding token may have been added to the tokenizer without a row in the model.

    Args:
        forget: list of `Sequence`; for `soul.losses.DPO` of pairs, each refusal right after its answer.
        retain: list of `Sequence`.
        device: where the batch goes; ``rows`` and ``is_forget`` stay on the CPU.
        ref_logps: reference log-probabilities of the forget sequences, list of floats, or None.
        ref_hidden: the reference's hidden states of all sequences at their labelled positions, from `soul.reference_hidden`: a
            list of [n, D] tensors, with None for a sequence whose states are not needed; or None.

    Raises:
        ArgumentError: ``ref_logps`` or ``ref_hidden`` do not fit the sequences.
    """
    sequences = [*forget, *retain]
    shape = (len(sequences), max(len(s.input_ids) for s in sequences))
    padded = [[], [], []]
    for sequence in sequences:
        length, rest = len(sequence.input_ids), shape[1] - len(sequence.input_ids)
        padded[0].append(sequence.input_ids + [0] * rest)
        padded[1].append(sequence.labels + [IGNORE_INDEX] * rest)
        padded[2].append([1] * length + [0] * rest)
    input_ids, labels, attention_mask = (torch.tensor(rows, dtype=torch.int64, device="cpu") for rows in padded)
    if ref_logps is not None:
        if len(ref_logps) != len(forget):
            raise argument_error("ref_logps", f"{len(forget)} values", len(ref_logps), "pass one a forget sequence")
        ref_logps = torch.tensor([*ref_logps, *[0.0] * len(retain)], dtype=torch.float32, device=device)
    return Batch(
        input_ids=input_ids.to(device),
        attention_mask=attention_mask.to(device),
        labels=labels.to(device),
        rows=(labels.view(-1) != IGNORE_INDEX).nonzero()[:, 0],
        is_forget=torch.arange(len(sequences), device="cpu") < len(forget),
        has_retain=bool(retain),
        ref_logps=ref_logps,
        ref_hidden=None if ref_hidden is None else _pad_hidden(ref_hidden, labels, device),
    )


def _pad_hidden(states, labels, device):
    """[n, D] at the labelled positions of each sequence -> [B, T, D], 0 elsewhere; what is moved is not padded."""
    counts = (labels != IGNORE_INDEX).sum(1).tolist()
    got = [None if state is None else len(state) for state in states]
    if len(got) != len(counts) or any(n not in (None, count) for n, count in zip(got, counts)) or got.count(None) == len(got):
        expected = f"states at {counts} labelled positions, or None where they are not needed"
        raise argument_error("ref_hidden", expected, got, "compute them from the same sequences: soul.reference_hidden")
    packed = torch.cat([state for state in states if state is not None]).to(device)
    needed = torch.tensor([state is not None for state in states], device="cpu")[:, None]
    rows = ((labels != IGNORE_INDEX) & needed).view(-1).nonzero()[:, 0].to(device)
    return packed.new_zeros(labels.numel(), packed.shape[1]).index_copy_(0, rows, packed).view(*labels.shape, -1)


def batches_by_length(sequences, batch_size, draw):
    """One epoch of index lists: shuffled, with sequences of like length together, so that little is padded.

    Args:
        sequences: list of `Sequence`.
        batch_size: indices a list; the last may be shorter.
        draw: ``random.Random``.
    """
    order = list(range(len(sequences)))
    draw.shuffle(order)
    pool = 8 * batch_size  # sorted within pools only, so that epochs differ
    order = [i for p in range(0, len(order), pool) for i in sorted(order[p : p + pool], key=lambda i: len(sequences[i].labels))]
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    draw.shuffle(batches)
    return batches


class Order:
    """Which examples make each step: every epoch the forget set in a new random order, beside a random one of the retain set
    that runs on over the epochs. Iterating yields (epoch from 1, indices of forget examples, sorted, indices of retain
    examples, as many).

    Args:
        n_forget: examples to forget.
        n_retain: examples to retain; 0: none go with them.
        batch_size: forget examples a step; the last of an epoch may have fewer.
        epochs: passes over the forget set.
        seed: of both orders.
    """

    def __init__(self, n_forget, n_retain, batch_size, epochs, seed):
        self.n_forget, self.n_retain, self.batch_size, self.epochs = n_forget, n_retain, batch_size, epochs
        self.draw, self.epoch = random.Random(seed), 0
        self.forget, self.retain = [], []  # indices that are still to come: of this epoch, of this round

    def __len__(self):
        return self.epochs * -(-self.n_forget // self.batch_size)

    def __iter__(self):
        return self

    def __next__(self):
        if not self.forget:
            if self.epoch == self.epochs:
                raise StopIteration
            self.epoch += 1
            self.forget = self._shuffled(self.n_forget)
        # The whole set, where it is one batch, in the order in which its reference was computed.
        forget, self.forget = sorted(self.forget[: self.batch_size]), self.forget[self.batch_size :]
        while self.n_retain and len(self.retain) < len(forget):
            self.retain += self._shuffled(self.n_retain)
        retain, self.retain = self.retain[: len(forget)], self.retain[len(forget) :]
        return self.epoch, forget, retain

    def _shuffled(self, n):
        order = list(range(n))
        self.draw.shuffle(order)
        return order

    def state_dict(self):
        """The place in the data, for a checkpoint."""
        return {"epoch": self.epoch, "forget": self.forget, "retain": self.retain, "draw": self.draw.getstate()}

    def load_state_dict(self, state_dict):
        """Goes on where ``state_dict`` was taken."""
        self.epoch, self.forget, self.retain = (state_dict[name] for name in ("epoch", "forget", "retain"))
        self.draw.setstate(state_dict["draw"])

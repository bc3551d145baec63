"""The data of each step: micro-batches of sequences, and what the objective needs of the reference model.

The forget set is counted in examples: for an objective on pairs each has two sequences, otherwise one. The retain set is
counted in sequences.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor

from soul.data.batches import NO_SEQUENCE, Batch, Order, collate
from soul.data.examples import Sequence
from soul.distributed.processes import Processes
from soul.losses import Objective
from soul.models.causal_lm import device_of, has_adapters
from soul.models.ref_model import reference_head, reference_hidden, reference_logps
from soul.run.config import UnlearnConfig
from soul_kernels import TokenBatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Feed:
    """The data of a run. What the objective needs of the reference model is computed here, before the model changes.

    Args:
        model: the model before unlearning. If it is in shards, every process gets its share of every micro-batch.
        tokenizer: its tokenizer, for the key of the cache.
        forget: the forget sequences; those of a pair follow one another.
        retain: the retain sequences.
        objective: a `soul.losses.Objective`.
        config: `UnlearnConfig`.

    Attributes:
        ref_head: weight and bias of the reference model's head if the objective needs hidden states, else (None, None).
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        forget: list[Sequence],
        retain: list[Sequence],
        objective: Objective,
        config: UnlearnConfig,
    ) -> None:
        self._forget = forget
        self._retain = retain
        self._config = config
        self._device = device_of(model)
        self._processes = Processes.of(model)
        self._per_example = sequences_per_example(objective)
        self._ref_logps: list[float] | None = None
        self._ref_hidden: list[Tensor | None] | None = None  # of the forget sequences, then of the retain sequences
        self.ref_head: tuple[Tensor | None, Tensor | None] = (None, None)
        batch_size = config.batch_size * self._per_example
        options = dict(batch_size=batch_size, cache=config.reference_cache, tokenizer=tokenizer)
        if objective.needs_reference:
            self._ref_logps = reference_logps(model, forget, backend=config.backend, **options)
        if objective.divergence is not None and has_adapters(model):
            self.ref_head = reference_head(model)  # hidden states come from a forward pass without adapters in each step
        elif objective.divergence is not None:
            self._ref_hidden, self.ref_head = _reference_states(model, objective.divergence.of, forget, retain, options)

    def order(self) -> Order:
        """Return the `soul.data.batches.Order` of the steps."""
        return order_of(self._forget, self._retain, self._per_example, self._config)

    def step(self, examples: list[int], retained: list[int]) -> tuple[Iterator[Batch], TokenBatch | None]:
        """Return the data of one step.

        Args:
            examples: indices of forget examples.
            retained: indices of retain sequences.

        Returns:
            The micro-batches, made one at a time, since the hidden states of a reference model are large; and the `TokenBatch`
            of all of them in all processes, or None if one process takes the step in one micro-batch.
        """
        size = self._config.batch_size
        whole = None
        if len(examples) > size or self._processes.size > 1:
            batch = collate(*self._sequences(examples, retained), device=self._device)
            whole = TokenBatch.from_labels(batch.labels, batch.is_forget)
        return (self._micro_batch(*indices) for indices in micro_batches(examples, retained, size)), whole

    def retain_batches(self, retained: list[int]) -> list[Batch]:
        """Return batches of retain sequences alone, from which curvature is taken."""
        batches = []
        for indices in _split(retained, self._config.batch_size):
            _, share = self._processes.share([], indices)
            batches.append(collate([self._retain[i] for i in share] or [NO_SEQUENCE], [], device=self._device))
        return batches

    def forget_sequences(self, examples: list[int]) -> list[Sequence]:
        """Return the sequences of some forget examples; of a pair, the answer that is to be forgotten."""
        return [self._forget[i] for i in sequence_indices(examples, self._per_example)[:: self._per_example]]

    def n_tokens(self, examples: list[int], retained: list[int]) -> int:
        """Return the number of tokens of a step in all processes, without padding."""
        return sum(len(s.input_ids) for sequences in self._sequences(examples, retained) for s in sequences)

    def _sequences(self, examples: list[int], retained: list[int]) -> tuple[list[Sequence], list[Sequence]]:
        forget = [self._forget[i] for i in sequence_indices(examples, self._per_example)]
        return forget, [self._retain[i] for i in retained]

    def _micro_batch(self, examples: list[int], retained: list[int]) -> Batch:
        """Return this process's share of a micro-batch."""
        has_retain = bool(retained)
        examples, retained = self._processes.share(examples, retained)
        forget, retain = self._sequences(examples, retained)
        forget_indices = sequence_indices(examples, self._per_example)
        ref_hidden = None
        if self._ref_hidden is not None:
            retain_indices = (len(self._forget) + i for i in retained)
            ref_hidden = [self._ref_hidden[i] for i in (*forget_indices, *retain_indices)]
            if all(states is None for states in ref_hidden):  # `collate` takes no list without any tensor
                existing = next(states for states in self._ref_hidden if states is not None)
                retain = [*retain, NO_SEQUENCE]
                ref_hidden = [*ref_hidden, existing[:0]]
        batch = collate(
            forget,
            retain if forget or retain else [NO_SEQUENCE],
            device=self._device,
            ref_logps=None if self._ref_logps is None else [self._ref_logps[i] for i in forget_indices],
            ref_hidden=ref_hidden,
        )
        return dataclasses.replace(batch, has_retain=has_retain)  # the whole micro-batch decides: all processes log the same


def sequences_per_example(objective: Objective) -> int:
    """Return the number of consecutive forget sequences that make one forget example."""
    return 2 if objective.pairs else 1


def sequence_indices(examples: list[int], per_example: int) -> list[int]:
    """Return the indices of the forget sequences of some examples."""
    return [per_example * i + j for i in examples for j in range(per_example)]


def order_of(forget: list[Sequence], retain: list[Sequence], per_example: int, config: UnlearnConfig) -> Order:
    """Return the `soul.data.batches.Order` of a run's steps."""
    size = config.batch_size * config.accumulate
    return Order(len(forget) // per_example, len(retain), size, config.epochs, config.seed)


def micro_batches(examples: list[int], retained: list[int], size: int) -> Iterator[tuple[list[int], list[int]]]:
    """Return the indices of a step, micro-batch by micro-batch: pairs of lists, one of which may be empty."""
    return itertools.zip_longest(_split(examples, size), _split(retained, size), fillvalue=[])


def _split(indices: list[int], size: int) -> list[list[int]]:
    return [indices[i : i + size] for i in range(0, len(indices), size)]


def _reference_states(
    model: "PreTrainedModel", of: str, forget: list[Sequence], retain: list[Sequence], options: dict[str, Any]
) -> tuple[list[Tensor | None], tuple[Tensor | None, Tensor | None]]:
    """Return the reference model's hidden states and its head.

    Args:
        model: the reference model.
        of: which sequences need hidden states: "forget", "retain" or "all".
        forget: the forget sequences.
        retain: the retain sequences.
        options: of `soul.models.ref_model.reference_hidden`.

    Returns:
        The states of each forget sequence, then of each retain sequence, None for those that need none; weight and bias.
    """
    needed = {"forget": forget, "retain": retain, "all": [*forget, *retain]}[of]
    states = reference_hidden(model, needed, **options)
    before = [None] * len(forget) if of == "retain" else []
    after = [None] * len(retain) if of == "forget" else []
    return [*before, *states.hidden, *after], (states.weight, states.bias)

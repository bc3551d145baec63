"""What goes into each step: micro-batches of sequences, and what the objective needs of the reference."""

import dataclasses
import itertools

from soul.data.batches import Order, collate
from soul.data.examples import Sequence
from soul.distributed.processes import Processes
from soul.models.causal_lm import has_adapters
from soul.models.ref_model import reference_head, reference_hidden, reference_logps
from soul_kernels import TokenBatch
from soul_kernels.tokens import IGNORE_INDEX

NOTHING = Sequence([0], [IGNORE_INDEX], 1)  # for a process without a part in a micro-batch: it takes part in the gathering


class Feed:
    """The data of a run. What the objective needs of the reference is computed here, before the model changes.

    Args:
        model: as it was before unlearning; in shards, every process gets its part of every micro-batch.
        tokenizer: its tokenizer, for the key of the cache.
        forget: list of `soul.data.Sequence`; of pairs, one after the other.
        retain: the same.
        objective: a `soul.losses.Objective`.
        config: `UnlearnConfig`.

    Attributes:
        ref_head: weight and bias of the reference's head, where hidden states of a reference are needed, else (None, None).
    """

    def __init__(self, model, tokenizer, forget, retain, objective, config):
        self._forget, self._retain, self._config = forget, retain, config
        self._device, self._processes = next(model.parameters()).device, Processes.of(model)
        self._together = together(objective)
        self._ref_logps, self._ref_states, self.ref_head = None, None, (None, None)
        options = dict(batch_size=config.batch_size * self._together, cache=config.reference_cache, tokenizer=tokenizer)
        if objective.needs_reference:
            self._ref_logps = reference_logps(model, forget, backend=config.backend, **options)
        if objective.divergence is not None and has_adapters(model):
            self.ref_head = reference_head(model)  # hidden states come from a forward without adapters in each step
        elif objective.divergence is not None:
            self._ref_states, self.ref_head = _states(model, objective.divergence.of, forget, retain, options)

    def order(self):
        """The `soul.data.batches.Order` of the steps."""
        return order_of(self._forget, self._retain, self._together, self._config)

    def step(self, examples, kept):
        """The micro-batches of a step, one at a time, for the states of a reference are large; and the `TokenBatch` of all of
        them in all processes, or None where there is but one.

        Args:
            examples: indices of forget examples.
            kept: indices of retain sequences.
        """
        size, whole = self._config.batch_size, None
        if len(examples) > size or self._processes.size > 1:
            whole = collate(*self._sequences(examples, kept), device=self._device)
            whole = TokenBatch.from_labels(whole.labels, whole.is_forget)
        return (self._micro_batch(*part) for part in micro_batches(examples, kept, size)), whole

    def retained(self, kept):
        """Batches of the retain sequences alone, a list: what curvature is taken from."""
        parts = [self._processes.share([], part)[1] for part in _split(kept, self._config.batch_size)]
        return [collate([self._retain[i] for i in part] or [NOTHING], [], device=self._device) for part in parts]

    def n_tokens(self, examples, kept):
        """Tokens of a step in all processes, without padding."""
        return sum(len(s.input_ids) for part in self._sequences(examples, kept) for s in part)

    def _sequences(self, examples, kept):
        return [self._forget[i] for i in chosen(examples, self._together)], [self._retain[i] for i in kept]

    def _micro_batch(self, examples, kept):
        has_retain = bool(kept)
        examples, kept = self._processes.share(examples, kept)
        (forget, retain), states = self._sequences(examples, kept), None
        own = chosen(examples, self._together)
        if self._ref_states is not None:
            states = [self._ref_states[i] for i in (*own, *(len(self._forget) + i for i in kept))]
        if states is not None and all(state is None for state in states):
            some = next(state for state in self._ref_states if state is not None)
            retain, states = [*retain, NOTHING], [*states, some[:0]]
        batch = collate(
            forget,
            retain if forget or retain else [NOTHING],
            device=self._device,
            ref_logps=None if self._ref_logps is None else [self._ref_logps[i] for i in own],
            ref_hidden=states,
        )
        return dataclasses.replace(batch, has_retain=has_retain)  # all processes log the same


def together(objective):
    """How many forget sequences, one after the other, belong to one example."""
    return 2 if objective.pairs else 1


def chosen(examples, together):
    """Indices of the forget sequences of some examples."""
    return [together * i + j for i in examples for j in range(together)]


def order_of(forget, retain, together, config):
    """The `soul.data.batches.Order` of a run's steps."""
    size = config.batch_size * config.accumulate
    return Order(len(forget) // together, len(retain), size, config.epochs, config.seed)


def micro_batches(examples, kept, size):
    """A step's indices, micro-batch by micro-batch: pairs of lists, of which one may be empty."""
    return itertools.zip_longest(_split(examples, size), _split(kept, size), fillvalue=[])


def _split(indices, size):
    return [indices[i : i + size] for i in range(0, len(indices), size)]


def _states(model, of, forget, retain, options):
    """The reference's hidden states of each forget sequence, then of each retain sequence, None where they are not needed; and
    its head.
    """
    needed = {"forget": forget, "retain": retain, "all": [*forget, *retain]}[of]
    found = reference_hidden(model, needed, **options)
    before, after = [None] * len(forget) if of == "retain" else [], [None] * len(retain) if of == "forget" else []
    return [*before, *found.hidden, *after], (found.weight, found.bias)

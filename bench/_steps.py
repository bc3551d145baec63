"""A step of unlearning as an object to call: in plain PyTorch, or ours; and what its phases take."""

import contextlib
import functools
import time
from unittest import mock

import torch
import torch.nn.functional as F

import soul.optim.gradients
import soul.run.step
from bench._harness import forget_compiled, synchronize
from soul.models.causal_lm import checkpointing, compiled
from soul.optim.release import release_gradients
from soul.run.config import build_optimizer
from soul.run.graph import GraphedStep

PHASES = ("forward", "loss + backward", "clipping", "optimizer")


class Stopwatch:
    """Milliseconds by phase; what is within another phase counts for itself only, what is in none for loss and backward."""

    def __init__(self, device):
        self.ms = dict.fromkeys(PHASES, 0.0)
        self._device, self._stack = device, ["loss + backward"]
        synchronize(device)
        self._then = time.perf_counter()

    def mark(self):
        """Gives the time since the last mark to the phase that is on."""
        synchronize(self._device)
        now = time.perf_counter()
        self.ms[self._stack[-1]] += (now - self._then) * 1e3
        self._then = now

    @contextlib.contextmanager
    def phase(self, name):
        """A phase, while the block runs."""
        self.mark()
        self._stack.append(name)
        try:
            yield
        finally:
            self.mark()
            self._stack.pop()

    def wrap(self, name, function):
        """The function, as a phase."""

        @functools.wraps(function)
        def timed(*args, **options):
            with self.phase(name):
                return function(*args, **options)

        return timed


def no_phases(name):
    """Stands for `Stopwatch.phase` where nobody looks."""
    return contextlib.nullcontext()


class EagerStep:
    """A step in plain PyTorch; a call returns the same values as `soul.run.step.train_step`.

    Args:
        model: is changed in place.
        micro_batches: lists of `soul.data.batches.Batch`: those of a micro-batch have a forward each, and a backward together.
        update: function without arguments, called once all gradients are there.
        all_logits: of every position, as the model itself returns them; or of those that have a label.
        max_grad_norm: or None.
    """

    def __init__(self, model, micro_batches, update, *, all_logits, max_grad_norm=1.0):
        self.model, self.micro_batches, self.update = model, micro_batches, update
        self._all_logits, self._max_grad_norm = all_logits, max_grad_norm
        self._params = list(model.parameters())
        batches = [batch for part in micro_batches for batch in part]
        self.sequences, self.kept = sequences_of(batches), sum(len(batch.token_indices) for batch in batches)
        self._n_forget = sum(int(((b.labels.cpu() != -100) & b.is_forget[:, None]).sum()) for b in batches)
        self._n_retain = self.kept - self._n_forget

    def __call__(self, phase=no_phases):
        """One step; ``phase`` is `Stopwatch.phase` or like it."""
        for p in self._params:
            p.grad = None
        forget_nll = retain_nll = 0.0
        for batches in self.micro_batches:
            with phase("forward"):
                outputs = [self._logits(batch) for batch in batches]
            loss = 0.0
            for logits, labels, is_forget in outputs:
                nll = F.cross_entropy(logits.float(), labels, ignore_index=-100, reduction="none")
                forget, retain = (nll * is_forget).sum() / self._n_forget, (nll * ~is_forget).sum() / self._n_retain
                loss = loss - forget + retain
                forget_nll, retain_nll = forget_nll + forget.detach(), retain_nll + retain.detach()
            loss.backward()
            del outputs, logits, nll  # of the head's size: they would be there yet in the forward of the next one
        values = {"loss": retain_nll - forget_nll, "forget_nll": forget_nll, "retain_nll": retain_nll}
        if self._max_grad_norm is not None:
            with phase("clipping"):
                values["grad_norm"] = torch.nn.utils.clip_grad_norm_(self._params, self._max_grad_norm)
        with phase("optimizer"):
            self.update()
        return values

    def _logits(self, batch):
        """Logits [N, V], labels [N], and which of them are to be forgotten [N]."""
        labels, device = batch.labels.flatten(), batch.labels.device
        is_forget = batch.is_forget.to(device)[:, None].expand_as(batch.labels).flatten()
        if self._all_logits:
            logits = self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
            return logits.flatten(0, 1), labels, is_forget
        hidden = self.model.base_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
        rows = batch.token_indices.to(device)
        return self.model.get_output_embeddings()(hidden.flatten(0, 1)[rows]), labels[rows], is_forget[rows]

    def phases(self):
        """Milliseconds of one step by phase."""
        watch = Stopwatch(self.micro_batches[0][0].labels.device)
        self(watch.phase)
        watch.mark()
        return watch.ms


class OurStep:
    """A step as ``soul unlearn`` takes it, on one batch.

    Args:
        model: is changed in place.
        batch: `soul.data.batches.Batch`, of forget and retain sequences.
        config: `UnlearnConfig`.
    """

    def __init__(self, model, batch, config):
        self.model, self.batch, self._device = model, batch, batch.labels.device
        self._config, self._objective, self._open = config, config.objective(), contextlib.ExitStack()
        self.optimizer = build_optimizer(model, config)
        self._release = release_gradients(model, self.optimizer) if config.gradient_release else None
        if config.compile:
            forget_compiled()
            self._open.enter_context(compiled(model))
        if config.gradient_checkpointing:
            self._open.enter_context(checkpointing(model))
        self._graphed = GraphedStep(self._step, self._device) if config.cuda_graph else None
        self.sequences, self.kept = sequences_of([batch]), len(batch.token_indices)

    def _step(self, batch):
        return soul.run.step.train_step(
            self.model, [batch], self._objective, self.optimizer, self._config, release=self._release
        )

    def __call__(self):
        """One step."""
        return self._step(self.batch) if self._graphed is None else self._graphed(self.batch)

    def phases(self):
        """Milliseconds of one step by phase; none of a graph, which is replayed as a whole."""
        if self._graphed is not None:
            return {}
        name = "step" if self._release is None else "step_parameter"
        watch = Stopwatch(self._device)
        with (
            mock.patch.object(soul.run.step, "hidden_states", watch.wrap("forward", soul.run.step.hidden_states)),
            mock.patch.object(soul.optim.gradients, "grad_norm", watch.wrap("clipping", soul.optim.gradients.grad_norm)),
            mock.patch.object(self.optimizer, name, watch.wrap("optimizer", getattr(self.optimizer, name))),
        ):
            self._step(self.batch)
        watch.mark()
        return watch.ms


def sequences_of(batches):
    """The token ids of all sequences without padding, sorted: what must be the same for all."""
    return sorted(
        tuple(row[mask.bool()].tolist()) for b in batches for row, mask in zip(b.input_ids.cpu(), b.attention_mask.cpu())
    )

"""A step of unlearning as an object to call, in plain PyTorch or ours, and the time of its phases."""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F

import soul.optim.gradients
import soul.run.step
from bench._harness import forget_compiled, synchronize
from soul import SophiaG
from soul.data.batches import Batch
from soul.losses import Objective
from soul.models.causal_lm import checkpointing, compiled
from soul.optim.release import release_gradients
from soul.run.config import UnlearnConfig, build_optimizer
from soul.run.graph import GraphedStep

PHASES = ("forward", "loss + backward", "clipping", "optimizer")
Values = dict[str, torch.Tensor]  # of a step, by name, as `soul.run.step.train_step` returns them


class Stopwatch:
    """Milliseconds by phase. A phase within another counts for itself only; time outside all of them for loss and backward."""

    def __init__(self, device: torch.device) -> None:
        self.ms = dict.fromkeys(PHASES, 0.0)
        self._device = device
        self._stack = ["loss + backward"]
        synchronize(device)
        self._last_mark = time.perf_counter()

    def mark(self) -> None:
        """Add the time since the last mark to the current phase."""
        synchronize(self._device)
        now = time.perf_counter()
        self.ms[self._stack[-1]] += (now - self._last_mark) * 1e3
        self._last_mark = now

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Make ``name`` the current phase while the block runs."""
        self.mark()
        self._stack.append(name)
        try:
            yield
        finally:
            self.mark()
            self._stack.pop()

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function with its calls timed as a phase."""

        @functools.wraps(function)
        def timed(*args: Any, **options: Any) -> Any:
            with self.phase(name):
                return function(*args, **options)

        return timed


def no_phases(name: str) -> AbstractContextManager[None]:
    """Take the place of `Stopwatch.phase` where phases are not timed."""
    return contextlib.nullcontext()


class EagerStep:
    """A step in plain PyTorch; a call returns the same values as `soul.run.step.train_step`.

    Args:
        model: is changed in place.
        micro_batches: lists of batches: every batch of a micro-batch has its own forward, and all have one backward.
        update: function without arguments, called when all gradients are formed.
        all_logits: compute the logits of every position, as the model itself returns them; else of positions with a label.
        max_grad_norm: or None.
        exact_norm: return the norm of the gradients in fp64, for comparison with another step. What clips is torch's own in any
            case: a sum of squares in fp32, which on one thread of a CPU was off by 1.2e-4.

    Attributes:
        sequences: the token ids of all sequences, of `sequences_of`.
        n_labels: how many positions have a label.
        called: for `bench._harness.measure`: the step was taken once already.
        row_fields: for `bench._harness.measure`.
    """

    def __init__(
        self,
        model: Any,
        micro_batches: Sequence[Sequence[Batch]],
        update: Callable[[], object],
        *,
        all_logits: bool,
        max_grad_norm: float | None = 1.0,
        exact_norm: bool = False,
    ) -> None:
        self.model = model
        self.micro_batches = micro_batches
        self.update = update
        self._all_logits = all_logits
        self._max_grad_norm = max_grad_norm
        self._params = list(model.parameters())
        batches = [batch for micro_batch in micro_batches for batch in micro_batch]
        self.sequences = sequences_of(batches)
        self.n_labels = sum(len(batch.token_indices) for batch in batches)
        self._n_forget = sum(int(((b.labels.cpu() != -100) & b.is_forget[:, None]).sum()) for b in batches)
        self._n_retain = self.n_labels - self._n_forget
        self._exact_norm = exact_norm
        self.called = False
        self.row_fields: dict[str, float] = {}

    def __call__(self, phase: Callable[[str], AbstractContextManager[None]] = no_phases) -> Values:
        """Take one step; ``phase`` is `Stopwatch.phase` or a function like it."""
        for p in self._params:
            p.grad = None
        forget_nll: Any = 0.0
        retain_nll: Any = 0.0
        for batches in self.micro_batches:
            with phase("forward"):
                outputs = [self._logits(batch) for batch in batches]
            loss: Any = 0.0
            for logits, labels, is_forget in outputs:
                nll = F.cross_entropy(logits.float(), labels, ignore_index=-100, reduction="none")
                forget = (nll * is_forget).sum() / self._n_forget
                retain = (nll * ~is_forget).sum() / self._n_retain
                loss = loss - forget + retain
                forget_nll = forget_nll + forget.detach()
                retain_nll = retain_nll + retain.detach()
            loss.backward()
            del outputs, logits, nll  # tensors of the head's size, which would outlive the forward of the next micro-batch
        values = {"loss": retain_nll - forget_nll, "forget_nll": forget_nll, "retain_nll": retain_nll}
        if self._max_grad_norm is not None:
            exact_norm = norm_in_fp64(self._params) if self._exact_norm else None
            with phase("clipping"):
                values["grad_norm"] = torch.nn.utils.clip_grad_norm_(self._params, self._max_grad_norm)
            if exact_norm is not None:
                values["grad_norm"] = exact_norm
        with phase("optimizer"):
            self.update()
        return values

    def _logits(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return logits [N, V], labels [N], and which of them are to be forgotten [N]."""
        labels = batch.labels.flatten()
        device = batch.labels.device
        is_forget = batch.is_forget.to(device)[:, None].expand_as(batch.labels).flatten()
        if self._all_logits:
            logits = self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
            return logits.flatten(0, 1), labels, is_forget
        hidden = self.model.base_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
        rows = batch.token_indices.to(device)
        return self.model.get_output_embeddings()(hidden.flatten(0, 1)[rows]), labels[rows], is_forget[rows]

    def phases(self) -> dict[str, float]:
        """Take one step and return its milliseconds by phase."""
        watch = Stopwatch(self.micro_batches[0][0].labels.device)
        self(watch.phase)
        watch.mark()
        return watch.ms


def norm_in_fp64(params: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the norm of all gradients together, [] fp64."""
    return torch.stack([p.grad.double().norm() for p in params if p.grad is not None]).norm()


class OurStep:
    """A step as ``soul unlearn`` takes it, on one batch.

    Args:
        model: is changed in place.
        batch: of forget and retain sequences.
        config: of the run.

    Attributes:
        sequences: the token ids of all sequences, of `sequences_of`.
        n_labels: how many positions have a label.
        called: for `bench._harness.measure`: the step was taken once already.
        row_fields: for `bench._harness.measure`.
    """

    def __init__(self, model: Any, batch: Batch, config: UnlearnConfig) -> None:
        self.model = model
        self.batch = batch
        self._device = batch.labels.device
        self._config = config
        objective = config.objective()
        assert isinstance(objective, Objective)  # no influence, whose steps are others
        self._objective = objective
        self._open = contextlib.ExitStack()
        self.optimizer = build_optimizer(model, config)
        self._release = None
        if config.gradient_release:
            assert isinstance(self.optimizer, SophiaG)
            self._release = release_gradients(model, self.optimizer)
        if config.compile:
            forget_compiled()
            self._open.enter_context(compiled(model))
        if config.gradient_checkpointing:
            self._open.enter_context(checkpointing(model))
        self._graphed = GraphedStep(self._step, self._device) if config.cuda_graph else None
        self.sequences = sequences_of([batch])
        self.n_labels = len(batch.token_indices)
        self.called = False
        self.row_fields: dict[str, float] = {}

    def _step(self, batch: Batch) -> Values:
        return soul.run.step.train_step(
            self.model, [batch], self._objective, self.optimizer, self._config, release=self._release
        )

    def __call__(self) -> Values:
        """Take one step."""
        return self._step(self.batch) if self._graphed is None else self._graphed(self.batch)

    def phases(self) -> dict[str, float]:
        """Take one step and return its milliseconds by phase; a graph has no phases, because it is replayed as a whole."""
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


def sequences_of(batches: Sequence[Batch]) -> list[tuple[int, ...]]:
    """Return the token ids of all sequences without padding, sorted: they must be the same for all variants."""
    return sorted(tuple(row[mask.bool()].tolist()) for b in batches for row, mask in zip(b.input_ids.cpu(), mask_of(b).cpu()))


def mask_of(batch: Batch) -> torch.Tensor:
    """Return the attention mask of a batch of `soul.data.batches.collate`, which always has one."""
    assert batch.attention_mask is not None
    return batch.attention_mask

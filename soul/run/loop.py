"""The unlearning loop: one forward pass over forget and retain sequences, one fused loss and one fused step, repeated.

`unlearn` checks its input and then makes one `UnlearningRun`. The constructor builds everything that the first step needs, and
loads the newest checkpoint of a run that is resumed. `UnlearningRun.take_steps` is the loop. Each other method is one concern:
the step, the log, the progress bar, the evaluation, divergence, checkpoints.

Three rules must hold. What a method needs of the reference model is computed (by `Feed`) before a checkpoint is loaded, since
the checkpoint changes the model. A record is complete, and written to the log, before its numbers are checked, so that the log
shows the step at which a run diverged. And nothing but a step may draw random numbers, or a resumed run would not go on bit for
bit.
"""

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TextIO, cast

import torch

from soul.checkpoint.format import versions
from soul.checkpoint.local import Checkpoints, Stopped, describe, describe_inputs
from soul.data.batches import Batch
from soul.data.examples import Example, Sequence
from soul.distributed.processes import Processes
from soul.losses import Memorize, Objective
from soul.models.causal_lm import checkpointing, compiled, device_of, evaluating
from soul.models.encoding import encode_for
from soul.optim.optimizer import SophiaG
from soul.optim.release import GradientRelease, release_gradients
from soul.output.directory import no_follow
from soul.output.progress import Task, shown, task
from soul.run.config import UnlearnConfig, build_curvature, build_optimizer, build_scheduler
from soul.run.dynamics import Dynamics
from soul.run.feed import Feed
from soul.run.graph import GraphedStep
from soul.run.influence import Influence, unlearn_once
from soul.run.measures import AimData, Measures, split_control, starting_alpha
from soul.run.prepare import prepare
from soul.run.rule import metrics_of
from soul.run.steering import Steering
from soul.run.step import ChunkBytes, curvature_loss, train_step
from soul.run.trackers import Trackers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Record = dict[str, Any]  # a line of the log: numbers by name, and the sentence "stopped"
LogFile = TextIO | str | os.PathLike[str] | None

MUST_BE_FINITE = {"loss": "the loss", "grad_norm": "the norm of the gradient"}  # name in a record -> name in a message


class Diverged(RuntimeError):
    """The loss, its gradient or a weight is no longer finite; the model is worthless."""


def unlearn(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    forget: list[Example],
    retain: list[Example],
    config: UnlearnConfig,
    *,
    log: LogFile = None,
    progress: bool = True,
    checkpoints: Checkpoints | None = None,
    watch: Callable[[int], None] | None = None,
    measures: Measures | None = None,
    trackers: Trackers | None = None,
) -> list[Record]:
    """Make a model unlearn ``forget`` while it keeps ``retain``; the model is changed in place.

    Args:
        model: a Hugging Face causal language model on its device, as it was before unlearning. This holds for a resumed run
            too, since the model is the reference model until the first step. If peft has wrapped it, the adapters are trained,
            and the reference model is the one without them. If `soul.distributed.shard` has put it in shards, every process
            calls this function with the same arguments, and takes its share of every step.
        tokenizer: the model's tokenizer.
        forget: examples to forget.
        retain: examples to retain; may be empty for objectives without a retain term.
        config: `UnlearnConfig`.
        log: an open text file, or the path of one (no symbolic link), which gets one JSON line a step, those before a resume
            included; or None.
        progress: show on stderr how far the run is, as `soul.output.progress.shown` does.
        checkpoints: `soul.checkpoint.local.Checkpoints` in which the run is saved, and from which it may be resumed; or None.
        watch: called with the number of each step after it; it must leave the model and the random generators alone.
        measures: the `Measures` of a run with an aim, made with this model before the call, whose control rows are not among
            ``retain``; it gets the verdict. None: with an aim it is made here, and some retain rows are held out.
        trackers: `soul.run.trackers.Trackers`, which get the log's numbers and are left open; or None.

    Returns:
        The log as a list of dicts: step, epoch, loss and its terms, negative log-likelihoods (nats), grad_norm, lr,
        clip_fraction (SOUL) and rho (with clip_target), tokens_per_s, peak_memory_gib; forget_prob and retain_prob at each
        evaluation; and in the last dict ``stopped``, a sentence, if a criterion has ended the run. With the method "influence"
        the list has one dict, with what `soul.run.influence.unlearn_once` returns. The log file of a run with an aim has other
        lines too, with an ``event`` in each: "pilot", "start", "aim" and "verdict"; that of a run with ``eval_metrics`` or
        ``keep_best`` has "metrics", the numbers before the first step, and "best", the point that the run has kept.

    Raises:
        ArgumentError: the data do not fit the model, the checkpoint is that of another run, another process writes checkpoints
            to the same directory, or the processes of a sharded model were given different tasks; nothing was changed.
        Diverged: the loss, its gradient or a weight is no longer finite.
        Stopped: by SIGTERM, or by ``checkpoints.stop``, after a checkpoint was written.
        OSError: the log or a checkpoint could not be written; earlier checkpoints are unharmed.
    """
    trackers = Trackers() if trackers is None else trackers
    objective = config.objective()
    if config.aims and measures is None:
        retain, control = split_control(forget, retain, None, config.seed)
        measures = Measures(model, tokenizer, forget, AimData(control, [], []), config)
    forget_sequences, retain_sequences = prepare(model, tokenizer, forget, retain, config)
    processes = Processes.of(model)
    if processes.size > 1:
        inputs = describe_inputs(model, forget_sequences, retain_sequences, config.decisive())
        processes.check_alike({**inputs, **versions()})
    if isinstance(objective, Influence):
        with shown(progress and processes.first):
            return _unlearn_by_influence(model, forget_sequences, retain_sequences, objective, config, log, measures, trackers)
    answers: dict[str, list[Sequence]] = {}
    examples: dict[str, list[Example]] = {}
    if (
        config.eval_every or config.until_prob is not None
    ):  # the answers themselves, even if the method trains on refusals in their place
        examples = {"forget": forget, "retain": retain[: len(forget)]}
        answers = {name: encode_for(model, tokenizer, rows, config, name) for name, rows in examples.items() if rows}
    dynamics = Dynamics(model, tokenizer, examples, answers, config) if metrics_of(config) else None
    with shown(progress and processes.first), contextlib.ExitStack() as cleanup:
        run = UnlearningRun(
            model,
            tokenizer,
            forget_sequences,
            retain_sequences,
            objective,
            config,
            checkpoints,
            answers,
            cleanup,
            measures,
            dynamics,
        )
        run.open(log, trackers)
        run.take_steps(watch)
        run.judge()
    run.check_weights()
    return run.records


class UnlearningRun:
    """One run of `unlearn` over many steps.

    Args:
        model: as in `unlearn`.
        tokenizer: as in `unlearn`.
        forget: the forget set as token ids, from `soul.run.prepare.prepare`.
        retain: the retain set.
        objective: that of ``config``.
        config: `UnlearnConfig`.
        checkpoints: as in `unlearn`.
        answers: "forget" and "retain" -> the sequences of an evaluation; {} without evaluations.
        cleanup: gets everything that must be undone when the run ends, however it ends.
        measures: as in `unlearn`; with a retain term they steer the run.
        dynamics: measures the numbers that ``config`` asks for at every evaluation, and keeps the best point; or None.

    Attributes:
        records: the log so far, a dict for every step.

    Raises:
        ArgumentError: the checkpoints are those of another run, or another process writes to their directory; the model was not
            changed.
        OSError: the directory of the checkpoints cannot be written.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        forget: list[Sequence],
        retain: list[Sequence],
        objective: Objective,
        config: UnlearnConfig,
        checkpoints: Checkpoints | None,
        answers: dict[str, list[Sequence]],
        cleanup: contextlib.ExitStack,
        measures: Measures | None = None,
        dynamics: Dynamics | None = None,
    ) -> None:
        self._dynamics = dynamics
        self._model = model
        self._objective = objective
        self._config = config
        self._checkpoints = checkpoints
        self._answers = answers
        self._cleanup = cleanup
        self._measures = measures
        self._processes = Processes.of(model)
        self._identity = self._claim_checkpoints(forget, retain)
        self._feed = Feed(model, tokenizer, forget, retain, objective, config)
        model.train()
        self._order = self._feed.order()
        self._optimizer = build_optimizer(model, config)
        self._scheduler = build_scheduler(self._optimizer, len(self._order), config.warmup_ratio, config.schedule)
        self._curvature = build_curvature(self._optimizer, config)
        self._chunk_bytes = ChunkBytes(model)
        self._steering: Steering | None = None
        if measures is not None and objective.alpha:
            alpha = config.method_options.get("alpha", starting_alpha(objective, forget))
            self._steering = Steering(model, objective, config, measures, self._feed, alpha)
        self.records = self._load_checkpoint()
        self._log: TextIO | None = None
        self._trackers = Trackers()
        self._graphed_step: GraphedStep | None = None
        self._release: GradientRelease | None = None

    def open(self, log: LogFile, trackers: Trackers) -> None:
        """Set up everything that lasts from the first step to the last: graph, hooks, log, signal handler."""
        config = self._config
        if config.cuda_graph:
            self._graphed_step = GraphedStep(self._step_of_batch(), device_of(self._model))
        self._cleanup.callback(lambda: self._optimizer.zero_grad(set_to_none=True))
        if config.gradient_release:
            self._release = release_gradients(self._model, cast(SophiaG, self._optimizer))
            self._cleanup.callback(self._release.remove)
        if config.compile:
            self._cleanup.enter_context(compiled(self._model))
        if self._processes.first:
            self._log = _opened(log, self._cleanup)
            self._trackers = trackers
        if self._checkpoints is not None:
            self._cleanup.enter_context(self._checkpoints.listening())
        if config.gradient_checkpointing:
            self._cleanup.enter_context(checkpointing(self._model))

    def take_steps(self, watch: Callable[[int], None] | None = None) -> None:
        """Take all steps that are left, until the last one or a criterion ends the run; ``watch`` as in `unlearn`.

        Raises:
            Diverged, Stopped, OSError: as in `unlearn`.
        """
        if self._steering is not None and not self.records:
            self._pilot(self._steering)
        if self._dynamics is not None and not self.records:
            self._dynamics.begin(self._measure())
        self._write_log_so_far()
        if self.records and "stopped" in self.records[-1]:  # the checkpoint was written after the last step
            return
        bar = self._cleanup.enter_context(self._progress_bar())
        for epoch, examples, retained in self._order:
            record = self._step(epoch, examples, retained)
            if self._is_evaluation_due(record["step"]):
                record |= self._evaluate()
            event = None
            if self._steering is not None:
                event = self._steering.after_step(record, self._feed.n_tokens(examples, retained))
            self.records.append(record)
            _write_line(self._log, record)
            self._trackers.write(record)
            if event is not None:
                _write_line(self._log, event)
                self._trackers.write(event)
            if self._steering is not None and self._steering.went_back:
                self._renew_optimizer()
            self._show_progress(bar, record)
            self._check_record(record)
            if watch is not None:
                watch(record["step"])
            self._save_if_due()
            if "stopped" in record:
                break

    def judge(self) -> None:
        """Put the best or the nearest point back, and write the verdict of a run with an aim."""
        best = None if self._dynamics is None else self._dynamics.end(len(self.records))
        if best is not None:
            _write_line(self._log, best)
            self._trackers.write(best)
        measures = self._measures
        if measures is None:
            return
        step = len(self.records)
        if self._steering is not None:
            self._steering.end(step)
        else:
            reason = self.records[-1].get("stopped", f"{self._config.epochs} epochs have passed")
            measures.conclude(step, reason, steered=False)
        _write_line(self._log, {"event": "verdict", **measures.verdict})
        self._trackers.write({"event": "verdict", **measures.verdict, "step": step})  # its own step may lie before the last

    def _renew_optimizer(self) -> None:
        """Begin with a new optimizer: what the old one remembers belongs to weights that were given up."""
        config = self._config
        self._optimizer.zero_grad(set_to_none=True)
        if self._release is not None:
            self._release.remove()
        self._optimizer = build_optimizer(self._model, config)
        self._scheduler = build_scheduler(self._optimizer, len(self._order), config.warmup_ratio, config.schedule)
        self._curvature = build_curvature(self._optimizer, config)
        if self._release is not None:
            self._release = release_gradients(self._model, cast(SophiaG, self._optimizer))
            self._cleanup.callback(self._release.remove)

    def _pilot(self, steering: Steering) -> None:
        """Run the pilot; raise `Diverged` if no learning rate is low enough."""
        try:
            steering.begin()
        except FloatingPointError as error:
            raise Diverged(f"{error}; pass a lower --lr to begin with; the model is as it was") from error

    def _write_log_so_far(self) -> None:
        """Write the records of a resumed run and the events among them, in the order in which they came."""
        events = [] if self._steering is None else self._steering.events
        if self._dynamics is not None:
            events = [{"event": "metrics", "step": 0, **self._dynamics.start}, *events]
        lines: list[Record] = []
        for step, record in enumerate([None, *self.records]):
            lines += [] if record is None else [record]
            lines += [event for event in events if event["step"] == step]
        for line in lines:
            _write_line(self._log, line)
        self._trackers.start(lines)

    def check_weights(self) -> None:
        """Raise `Diverged` unless all weights are finite."""
        _check_weights(self._model, self.records, self._objective)

    # Checkpoints

    def _claim_checkpoints(self, forget: list[Sequence], retain: list[Sequence]) -> dict[str, Any]:
        """Check that the run may write its checkpoints, and lock their directory until the end; return what identifies it."""
        checkpoints = self._checkpoints
        if checkpoints is None:
            return {}
        identity = describe(self._model, forget, retain, self._config.decisive())
        if self._processes.size > 1:
            identity["several processes"] = True
        checkpoints.check(identity)
        self._processes.on_first(lambda: self._cleanup.enter_context(checkpoints.locked()))
        checkpoints.prepare()
        return identity

    def _stateful(self) -> dict[str, Any]:
        """Return the objects whose state a checkpoint saves beside the weights, by name."""
        states = {
            "optimizer": self._optimizer,
            "scheduler": self._scheduler,
            "order": self._order,
            "chunk_bytes": self._chunk_bytes,
        }
        if self._curvature is not None:
            states["curvature"] = self._curvature
        if self._steering is not None:
            states["aim"] = self._steering
        if self._dynamics is not None:
            states["dynamics"] = self._dynamics
        return states

    def _load_checkpoint(self) -> list[Record]:
        """Load the newest checkpoint; return the log up to it, [] without a checkpoint."""
        if self._checkpoints is None:
            return []
        return self._checkpoints.load(self._model, self._stateful(), self._identity)

    def _save_if_due(self) -> None:
        """Write a checkpoint if one is due; raise `Stopped` if the run was told to stop before its end."""
        checkpoints = self._checkpoints
        step = len(self.records)
        if checkpoints is None or not checkpoints.due(step):
            return
        self.check_weights()  # a broken checkpoint must not push out a good one
        with task("save a checkpoint"):
            checkpoints.save(step, self._model, self._stateful(), self.records, self._identity)
        checkpoints.restart_clock()
        if checkpoints.stopping and step < len(self._order) and "stopped" not in self.records[-1]:
            raise Stopped(f"stopped after step {step} of {len(self._order)}")

    # The step

    def _step(self, epoch: int, examples: list[int], retained: list[int]) -> Record:
        """Take one step; return its record.

        Args:
            epoch: from 1.
            examples: indices of forget examples.
            retained: indices of retain sequences.
        """
        begun = time.perf_counter()
        batches, whole = self._feed.step(examples, retained)
        self._refresh_curvature(retained)
        if self._steering is not None:
            lr = self._steering.before_step(self._optimizer, len(self.records) + 1)
        else:
            lr = float(self._scheduler.get_last_lr()[0])
        if self._graphed_step is not None:
            values = self._graphed_step(next(batches))
        else:
            values = train_step(
                self._model,
                batches,
                self._objective,
                self._optimizer,
                self._config,
                self._feed.ref_head,
                whole,
                self._release,
                self._chunk_bytes.value,
            )
        self._scheduler.step()
        record = {"step": len(self.records) + 1, "epoch": epoch, "lr": lr, **_numbers(values)}
        record |= self._telemetry()
        record["tokens_per_s"] = _rate(self._feed.n_tokens(examples, retained), time.perf_counter() - begun)
        record["peak_memory_gib"] = peak_memory_gib(device_of(self._model))
        return record

    def _step_of_batch(self) -> Callable[[Batch], dict[str, torch.Tensor]]:
        """Return the function that a `GraphedStep` captures: one step on one batch.

        It does not refer to ``self``: such a cycle would keep the optimizer's states in memory after the run.
        """
        model, objective, optimizer, config = self._model, self._objective, self._optimizer, self._config
        ref_head = self._feed.ref_head
        chunk_bytes = self._chunk_bytes.value
        return lambda batch: train_step(model, [batch], objective, optimizer, config, ref_head, chunk_bytes=chunk_bytes)

    def _refresh_curvature(self, retained: list[int]) -> None:
        """Refresh h from the step's retain sequences, if that is due."""
        curvature = self._curvature
        if curvature is None:
            return
        self._optimizer.zero_grad(set_to_none=True)  # so that two sets of gradients are never held at once
        chunk_bytes = self._chunk_bytes.value
        curvature.step(
            lambda: curvature_loss(self._model, self._feed.retain_batches(retained), curvature, self._config, chunk_bytes)
        )

    # The log

    def _telemetry(self) -> Record:
        """Return the part of the optimizer's telemetry that goes into the log."""
        if not isinstance(self._optimizer, SophiaG):
            return {}
        telemetry = self._optimizer.telemetry()["groups"][0]
        names = ["clip_fraction"] if self._config.clip_target is None else ["clip_fraction", "rho"]
        return {name: telemetry[name] for name in names}

    def _progress_bar(self) -> Task:
        name = "memorize" if isinstance(self._objective, Memorize) else "unlearn"
        return task(f"{name} ({self._config.optimizer})", len(self._order), initial=len(self.records), stays=True)

    def _show_progress(self, bar: Task, record: Record) -> None:
        """Count a step, and show probabilities and the clipped fraction.

        The probability of the forget rows is that of the step's batch, before the step, unless they were evaluated after it;
        those of control and retain rows are the last that were measured.
        """
        name = "answers" if isinstance(self._objective, Memorize) else "forget"
        if "forget_prob" in record:
            probability = record["forget_prob"]
        else:
            name = "refusals" if self._objective.relabels else name  # the batch has these for answers
            probability = record.get("batch_forget_prob", math.exp(min(0.0, -record["forget_nll"])))
        control = None
        if self._steering is not None and self._measures is not None:
            control = self._measures.target.control_start
            control = next((e["control_prob"] for e in reversed(self._steering.events) if "control_prob" in e), control)
        retain = next((r["retain_prob"] for r in reversed(self.records) if "retain_prob" in r), None)
        bar.update(**{name: probability}, control=control, retain=retain, clipped=record.get("clip_fraction"))

    # Evaluation, and early ends of a run

    def _is_evaluation_due(self, step: int) -> bool:
        """Tell whether to evaluate after a step: one of every so many, or the last of an epoch if only ``until_prob`` asks.

        With a rule for the best point the last step is one of these, so that its weights may be chosen.
        """
        every = self._config.eval_every
        if self._config.keep_best is not None and step == len(self._order):
            return True
        return step % every == 0 if every else self._config.until_prob is not None and not self._order.forget

    def _evaluate(self) -> Record:
        """Return the numbers of an evaluation and, if they end the run here, the reason as ``stopped``."""
        record: Record = dict(self._measure())
        if self._dynamics is not None:
            self._dynamics.observe(len(self.records) + 1, record)
        reasons = self._reasons_to_stop(record)
        if reasons:
            record["stopped"] = "; ".join(reasons)
        return record

    def _measure(self) -> dict[str, float]:
        """Return the probabilities of the answers and what else is measured, the same in all processes."""
        from soul.evaluate.model import answer_probability

        config = self._config
        with evaluating(self._model):
            numbers = {
                f"{name}_prob": answer_probability(self._model, sequences, batch_size=config.batch_size, backend=config.backend)
                for name, sequences in self._answers.items()
            }
        if self._dynamics is not None:
            numbers |= self._dynamics.measure()
        return self._processes.broadcast(numbers)  # all processes end in the same step

    def _reasons_to_stop(self, probabilities: Record) -> list[str]:
        """Return the criteria that are met, in words."""
        forget_limit = self._config.stop_forget_prob
        retain_limit = self._config.stop_retain_prob
        answer_limit = self._config.until_prob
        reasons = []
        if forget_limit is not None and probabilities["forget_prob"] <= forget_limit:
            reasons.append(f"forget probability {probabilities['forget_prob']:.4g} has reached {forget_limit:g}")
        if retain_limit is not None and probabilities["retain_prob"] < retain_limit:
            reasons.append(f"retain probability {probabilities['retain_prob']:.4g} has fallen below {retain_limit:g}")
        if answer_limit is not None and probabilities["forget_prob"] >= answer_limit:
            reasons.append(f"answer probability {probabilities['forget_prob']:.4g} has reached {answer_limit:g}")
        return reasons

    def _check_record(self, record: Record) -> None:
        """Raise `Diverged` unless loss and gradient are finite."""
        for name, title in MUST_BE_FINITE.items():
            if not math.isfinite(record.get(name, 0.0)):  # with a norm of inf, clipping has made the step 0
                advice = _advice(self.records, self._objective)
                raise Diverged(f"{title} became {record[name]} at step {record['step']}; {advice}")


def _unlearn_by_influence(
    model: "PreTrainedModel",
    forget: list[Sequence],
    retain: list[Sequence],
    method: Influence,
    config: UnlearnConfig,
    log: LogFile,
    measures: Measures | None,
    trackers: Trackers,
) -> list[Record]:
    """Take one second-order step over all data; return its log, which has one record."""
    begun = time.perf_counter()
    processes = Processes.of(model)
    device = device_of(model)
    generator = torch.Generator(device).manual_seed(config.seed + processes.rank)  # each process has other sequences
    results = unlearn_once(
        model,
        forget,
        retain,
        batch_size=config.batch_size,
        generator=generator,
        backend=config.backend,
        **method.options,
    )
    seconds = time.perf_counter() - begun
    n_tokens = sum(len(sequence.input_ids) for sequence in (*forget, *retain))
    renamed = {"factor" if name == "step" else name: value for name, value in results.items()}
    record: Record = {"step": 1, "epoch": 1, **renamed}
    record["tokens_per_s"] = _rate(n_tokens, seconds)
    record["peak_memory_gib"] = peak_memory_gib(device)
    with contextlib.ExitStack() as cleanup:
        file = _opened(log, cleanup) if processes.first else None
        trackers = trackers if processes.first else Trackers()
        _write_line(file, record)
        trackers.start([])
        trackers.write(record)
        _check_weights(model, [record], method)
        if measures is not None:
            reason = "one step was taken"
            measures.conclude(1, reason, steered=False)
            _write_line(file, {"event": "verdict", **measures.verdict})
            trackers.write({"event": "verdict", **measures.verdict})
    return [record]


def _opened(log: LogFile, cleanup: contextlib.ExitStack) -> TextIO | None:
    """Return the file of a log; one that is opened here is closed by ``cleanup``."""
    if isinstance(log, (str, os.PathLike)):
        return cleanup.enter_context(open(log, "w", encoding="utf-8", opener=no_follow))
    return log


def _write_line(log: TextIO | None, record: Record) -> None:
    if log is not None:
        finite = {n: None if isinstance(value, float) and not math.isfinite(value) else value for n, value in record.items()}
        log.write(json.dumps(finite) + "\n")  # JSON has no NaN
        log.flush()


def _numbers(values: dict[str, torch.Tensor]) -> dict[str, float]:
    """Return tensors [] as numbers; this waits for the device, once for all of them."""
    return dict(zip(values, torch.stack([value.float() for value in values.values()]).tolist()))


def _rate(count: int, seconds: float) -> float:
    """Return the count per second; NaN if the clock has not moved."""
    return count / seconds if seconds > 0 else math.nan


def _check_weights(model: torch.nn.Module, records: list[Record], objective: Objective | Influence) -> None:
    """Raise `Diverged` unless all weights are finite."""
    if not Processes.of(model).all_finite(model.parameters()):
        raise Diverged(f"a weight is not finite after step {len(records)}; {_advice(records, objective)}")


def _advice(records: list[Record], objective: Objective | Influence) -> str:
    """Return advice after a run has diverged, judged by the first record that is not finite.

    Loss and gradient of step 1 are those of the model before unlearning, so the learning rate cannot be the cause. If the
    likelihoods of a step are finite, but the loss or its gradient is not, the cause is a weight of the objective: one of 1e6
    or more is named.
    """
    if isinstance(objective, Influence):
        return "raise the damping"
    broken = next((r for r in records if not all(math.isfinite(r.get(name, 0.0)) for name in MUST_BE_FINITE)), None)
    if broken is None:
        return "lower the learning rate"
    weights = {name: getattr(objective, name) for name in ("gamma", "alpha") if hasattr(objective, name)}
    largest = max(weights, key=lambda name: weights[name], default=None)
    likelihoods = [value for name, value in broken.items() if name.endswith("_nll")]
    if largest is not None and weights[largest] >= 1e6 and all(map(math.isfinite, likelihoods)):
        return f"{largest}={weights[largest]:g} makes the loss or its gradient overflow: lower {largest}"
    if broken["step"] == 1:
        return "no step had been taken, so the learning rate is not the cause: float32 parameters may not overflow (--dtype)"
    return "lower the learning rate"


def peak_memory_gib(device: torch.device) -> float:
    """Return the most memory held so far, in GiB: by torch's allocator on a GPU, by the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30

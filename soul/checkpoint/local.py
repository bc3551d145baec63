"""Checkpoints of a run of `soul.run.loop.unlearn`: whatever stops the run, it can continue from the last one bit for bit.

A checkpoint is a directory ``step-N``, written after N steps::

    model.safetensors      trainable parameters and buffers, by name
    training.safetensors   tensors of the optimizer and of torch's random generators
    training.json          everything else: schedule, data order, log, description of the run, checksums of the other two

How it works: `Checkpoints.save` writes the files into a scratch directory, flushes them to the disk and renames the directory.
Only then does it remove older checkpoints, renaming each one first. So at any moment every directory named ``step-N`` is
complete, and there is one to continue from. `Checkpoints.load` trusts a checkpoint only if its checksums are right, and falls
back to the one before it otherwise. The ``run`` in it describes model, data and options: a run that differs is refused before
anything is changed. When the model of a run has been saved in its output directory, `Checkpoints.end` writes a note beside it
(``ENDED_FILE``), and then removes the checkpoints. With that note the run has ended, whether or not they can be removed.

Safe to change: when a checkpoint is due, and messages. Not safe: the order of flushing, renaming and removing in `save`,
`commit`, `end` and `remove`, on which every guarantee above rests (tests/checkpoint/test_faults.py interrupts them); and the
entries of `describe`, since a run with another description is refused. `soul.checkpoint.sharded` overrides methods of
`Checkpoints` with collective ones. `Checkpoints.end` calls ``Checkpoints.remove(self)`` so as not to call such an override.
"""

import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

from soul.checkpoint.format import (
    FORMAT,
    Damaged,
    State,
    Stateful,
    check_fits,
    check_same,
    checksum,
    environment,
    file_digest,
    load_states,
    mutable_tensors,
    pack_run,
    random_state,
    read_checkpoint,
    read_state,
    separate,
    set_random_state,
    unpack,
    warn_of_environment,
    write_tensors,
)
from soul.checkpoint.saving import MODEL_FILES
from soul.models.ref_model import base_weights, configuration, digest
from soul.output.directory import DATA_FILE, ENDED_FILE, RUN_FILE, lock
from soul.output.files import discard, flush, reason, scratch_path, sweep, sync, write_text
from soul_kernels.errors import ArgumentError, argument_error, check_range

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = re.compile(r"step-(0|[1-9][0-9]*)")
ADAPTER_OPTIONS = ("lora_alpha", "lora_dropout", "use_rslora", "alpha_pattern")  # change results, but no shape of a tensor


class _LabelledTokens(Protocol):
    """What `describe` reads of a `soul.data.Sequence`."""

    @property
    def input_ids(self) -> Sequence[int]: ...

    @property
    def labels(self) -> Sequence[int]: ...


class Stopped(RuntimeError):
    """The run was asked to stop, by SIGTERM for instance, and has stopped after writing a checkpoint."""


class Checkpoints:
    """The checkpoints of one run: where they are, and how often the run is saved.

    Args:
        directory: holds the checkpoints, ``step-N`` each; created if it is missing. Nothing else should be in it.
        every: steps from one checkpoint to the next, >= 0. 0: none by the number of steps.
        minutes: minutes from one checkpoint to the next, >= 0: the run is saved after the first step that ends later than that.
            0: none by time. If both are 0, the run is saved only when it is asked to stop.
        keep: number of newest checkpoints that stay, >= 1. With 2 there is one to go back to if the newest is damaged. The disk
            needs room for one more, since a new one is written before an old one is removed.
        resume: go on from the newest checkpoint, if there is one.

    Attributes:
        stop: False; if a signal handler or a thread sets it to True, the run saves itself after the current step, and raises
            `Stopped`.
        stopping: whether the checkpoint that is due is the last one, since the run was asked to stop; set by `due`.

    Raises:
        ArgumentError: a number is out of range.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        every: int = 0,
        minutes: float = 0,
        keep: int = 2,
        resume: bool = False,
    ) -> None:
        for name, value, low in (("save_every", every, 0), ("keep", keep, 1)):
            if isinstance(value, bool) or not (isinstance(value, int) and value >= low):
                raise argument_error(name, f"a whole number >= {low}", repr(value), "check the options")
        check_range("save_minutes", minutes)
        self.directory = pathlib.Path(directory)
        self.every = every
        self.minutes = minutes
        self.keep = keep
        self.resume = resume
        self.stop = False
        self.stopping = False
        self.restart_clock()

    def due(self, step: int) -> bool:
        """Tell whether a checkpoint is to be written after this step, and set ``stopping``."""
        self.stopping = self.stop_requested()  # asked once: a signal may come at any time
        time_is_up = self.time_is_up()  # asked in any case: with several processes this is collective
        return self.stopping or time_is_up or (self.every > 0 and step % self.every == 0)

    def stop_requested(self) -> bool:
        """Tell whether the run was asked to stop."""
        return self.stop

    def time_is_up(self) -> bool:
        """Tell whether ``minutes`` have passed since the last checkpoint, or since the run began."""
        return self.minutes > 0 and time.monotonic() - self._clock_start >= 60 * self.minutes

    def restart_clock(self) -> None:
        """Count ``minutes`` from now on, since the run begins or a checkpoint has been written."""
        self._clock_start = time.monotonic()

    def steps(self) -> list[int]:
        """Return the steps of all checkpoints, damaged ones included, the newest first."""
        paths = self.directory.iterdir() if self.directory.is_dir() else ()
        matches = (NAME.fullmatch(path.name) for path in paths if path.is_dir())
        return sorted((int(match[1]) for match in matches if match), reverse=True)

    def path(self, step: int) -> pathlib.Path:
        """Return the directory of one checkpoint."""
        return self.directory / f"step-{step}"

    def prepare(self) -> None:
        """Create the directory, and remove what an interrupted write has left in it; checkpoints stay.

        Raises:
            OSError: the directory cannot be written.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        sweep(self.directory)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Create the directory, and lock it for the duration of the block, so that no other run writes in it.

        Raises:
            ArgumentError: another run has locked it.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        if os.name == "nt":  # Windows cannot open directories
            yield
            return
        descriptor = os.open(self.directory, os.O_RDONLY)
        try:
            lock(descriptor, "checkpoints", self.directory)
            yield
        finally:
            os.close(descriptor)

    def save(
        self,
        step: int,
        model: torch.nn.Module,
        components: Mapping[str, Stateful],
        records: list[dict[str, Any]],
        run: Mapping[str, object],
    ) -> None:
        """Write a checkpoint completely or not at all; then remove the oldest ones.

        Args:
            step: number of steps taken.
            model: its trainable parameters and buffers are saved.
            components: objects with a state, by name: optimizer, schedule, order of the data, curvature.
            records: the log so far.
            run: the description of the run that `describe` has returned.

        Raises:
            OSError: it could not be written, with the reason; the earlier checkpoints still exist.
        """
        tensors: dict[str, torch.Tensor] = {}
        state = {"format": FORMAT, **pack_run(step, model, components, records, run, random_state(), tensors)}
        files = {"model": separate(mutable_tensors(model)), "training": separate(tensors)}
        state["checksums"] = {name: file_digest(content) for name, content in files.items()}
        scratch = scratch_path(self.directory)
        try:
            self.prepare()
            scratch.mkdir()
            for name, content in files.items():
                write_tensors(content, scratch / f"{name}.safetensors")
            self.commit(scratch, step, state)
        except OSError as error:
            shutil.rmtree(scratch, ignore_errors=True)
            raise self.save_error(step, error) from error

    def save_error(self, step: int, error: OSError) -> OSError:
        """Return the error to raise if a checkpoint could not be written."""
        return OSError(f"{self.directory}: step {step} could not be saved ({reason(error)})")

    def commit(self, scratch: pathlib.Path, step: int, state: State) -> None:
        """Make a checkpoint of a scratch directory that holds its tensors; then remove the oldest ones.

        Args:
            scratch: the scratch directory.
            step: number of steps taken.
            state: the JSON values, complete.
        """
        (scratch / "training.json").write_text(json.dumps({"checksum": checksum(state), "state": state}), encoding="utf-8")
        flush(scratch)
        target = self.path(step)
        if target.exists():  # one that was found damaged, and has been reached again
            target.rename(scratch_path(self.directory))
        scratch.rename(target)
        sync(self.directory)
        later = [s for s in self.steps() if s > step]  # damaged, or the run would have gone on from them
        for old in [*later, *self.steps()[len(later) + self.keep :]]:
            discard(self.path(old))
        sweep(self.directory)

    def end(self, output: pathlib.Path) -> None:
        """Note in the output directory that the run has ended, and remove the checkpoints.

        The model must have been saved there before. The log is flushed to the disk before the checkpoints, which hold its
        records, are removed. Nothing is raised, since the run has succeeded: if the log cannot be flushed, the checkpoints
        stay, with a warning.

        Args:
            output: the output directory.
        """
        try:
            for path in (output / name for name in ("log.jsonl", DATA_FILE, RUN_FILE)):
                if path.is_file():
                    sync(path)
        except OSError as error:
            text = f"the model is saved; checkpoints are left behind, since log.jsonl may not be whole ({reason(error)})"
            warnings.warn(f"{output}: {text}", stacklevel=2)
            return
        with contextlib.suppress(OSError):  # a full disk; without checkpoints the run has ended too
            write_text(output / ENDED_FILE, "The model of this run is saved here. Its checkpoints are not needed any more.\n")
        Checkpoints.remove(self)  # not a collective override: with several processes the first one alone is here

    def remove(self) -> None:
        """Remove all checkpoints and the directory; warn of what cannot be removed."""
        for step in reversed(self.steps()):
            discard(self.path(step))
        if self.directory.is_dir():
            sweep(self.directory)
        with contextlib.suppress(OSError):  # it is not empty
            self.directory.rmdir()

    def advice(self) -> str:
        """Return how to continue a run that has ended early, in words."""
        steps = self.steps()
        return f"with --resume it goes on after step {steps[0]}" if steps else "there is no checkpoint to go on from"

    def check(self, run: Mapping[str, object]) -> None:
        """Raise unless a run may begin, or go on, in this directory; read no tensors.

        Args:
            run: the description of the run that `describe` has returned.

        Raises:
            ArgumentError: there are checkpoints although the run is not to be resumed, or they are those of another run.
        """
        steps = self.steps()
        if steps and not self.resume:
            got = f"step {steps[0]} in {self.directory}"
            raise argument_error("checkpoints", "a directory without any", got, "resume, or choose another directory")
        for step in steps:
            try:
                state = read_state(self.path(step))
            except Damaged:  # `load` warns of it
                continue
            check_same(state["run"], run)
            return

    def load(
        self, model: torch.nn.Module, components: Mapping[str, Stateful], run: Mapping[str, object]
    ) -> list[dict[str, Any]]:
        """Restore a run from its newest complete checkpoint; pass over a damaged one with a warning.

        The random generators of Python and torch are set as well.

        Args:
            model: its trainable parameters and buffers are changed in place.
            components: the objects that were passed to `save`, by name; changed in place.
            run: the description of the run that `describe` has returned; it must be that of the checkpoint.

        Returns:
            The log up to the checkpoint; [] without a checkpoint.

        Raises:
            ArgumentError: the checkpoint is that of another run (the first difference is named), all are damaged, or there is
                one and ``resume`` is False. The model was not changed.
        """
        self.check(run)
        steps = self.steps()
        for step in steps:
            path = self.path(step)
            try:
                state, files = read_checkpoint(path)
            except Damaged as damage:
                warnings.warn(f"{path}: {damage}; trying the one before it", stacklevel=2)
                continue
            check_same(state["run"], run)
            tensors = mutable_tensors(model)
            check_fits(path.name, tensors, {name: (tuple(t.shape), t.dtype) for name, t in files["model"].items()})
            warn_of_environment(path, state["environment"], environment(model))
            load_states(components, unpack(state["parts"], files["training"]))
            with torch.no_grad():
                for name, tensor in tensors.items():
                    tensor.copy_(files["model"][name])
            set_random_state(unpack(state["random"], files["training"]))
            return state["records"]
        if steps:
            raise self.all_damaged()
        return []

    def all_damaged(self) -> ArgumentError:
        """Return the error to raise if there are checkpoints, and none can be used."""
        expected = f"a whole checkpoint in {self.directory}"
        return argument_error("resume", expected, "damaged ones only", "start again in a new directory")

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Let SIGTERM set ``stop`` for the duration of the block, instead of ending the process; restart the clock.

        In a thread other than the main one signals are left as they are.
        """
        self.restart_clock()
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def request_stop(*_: object) -> None:
            self.stop = True

        before = signal.signal(signal.SIGTERM, request_stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)


def is_saved(directory: pathlib.Path) -> bool:
    """Tell whether the model of a run has been saved in its output directory."""
    return any((directory / name).is_file() for name in MODEL_FILES)


def has_ended(directory: pathlib.Path, checkpoints: Checkpoints) -> bool:
    """Tell whether the run of an output directory has ended.

    A run has ended if its model has been saved, and either the note of `Checkpoints.end` exists or no checkpoint is left.
    """
    return is_saved(directory) and ((directory / ENDED_FILE).is_file() or not checkpoints.steps())


def describe(
    model: "PreTrainedModel",
    forget: Sequence[_LabelledTokens],
    retain: Sequence[_LabelledTokens],
    config: Mapping[str, object],
) -> dict[str, Any]:
    """Return the description of a run, by which it is recognized when it is resumed: JSON values by name.

    Each option and each value of the model's configuration has an entry of its own, so that a difference can be named.

    Args:
        model: before its first step.
        forget: list of `soul.data.Sequence`.
        retain: list of `soul.data.Sequence`.
        config: the options that decide the numbers of the run, from `soul.UnlearnConfig.decisive`.
    """
    return {**describe_inputs(model, forget, retain, config), "content of the model": digest(base_weights(model))}


def describe_inputs(
    model: "PreTrainedModel",
    forget: Sequence[_LabelledTokens],
    retain: Sequence[_LabelledTokens],
    config: Mapping[str, object],
) -> dict[str, Any]:
    """Return the entries of `describe` that need no hash of the weights.

    For a sharded model that hash is collective work of all processes.
    """
    adapters = [
        {name: getattr(options, name, None) for name in ADAPTER_OPTIONS}
        for options in getattr(model, "peft_config", {}).values()
    ]
    return {
        **config,
        **{f"configuration of the model, {name}": value for name, value in configuration(model).items()},
        **({"lora": adapters} if adapters else {}),
        "content of forget": _content(forget),
        "content of retain": _content(retain),
        "trainable parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


def _content(sequences: Sequence[_LabelledTokens]) -> str:
    return checksum([[sequence.input_ids, sequence.labels] for sequence in sequences])

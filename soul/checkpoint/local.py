"""Checkpoints of a run of `soul.run.loop.unlearn`: whatever stops it, it goes on from the last one bit for bit.

A checkpoint is a directory ``step-N``, after N steps::

    model.safetensors      trainable parameters and buffers, by name
    training.safetensors   tensors of the optimizer and of torch's random generators
    training.json          everything else: schedule, data order, log, what run it is, checksums of the other two

It is written under another name, flushed to the disk and renamed, and only then is an older one removed, which is renamed
first. It is trusted only if its checksums are right. Nothing in it is pickled. When the model of a run is in its output
directory, a file there says so (``ENDED_FILE``), and the checkpoints are removed; from that file on the run has ended,
whatever becomes of them.
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

import torch

from soul.checkpoint.format import (
    FORMAT,
    about,
    changing,
    check_fits,
    check_same,
    checksum,
    environment,
    file_digest,
    own,
    random_state,
    read,
    read_state,
    set_random_state,
    unpacked,
    warn_of_environment,
    write_tensors,
)
from soul.distributed.processes import Processes, whole_state
from soul.models.causal_lm import has_adapters
from soul.models.ref_model import base_weights, configuration, digest
from soul.output.directory import DATA_FILE, RUN_FILE, lock
from soul.output.files import discard, flush, reason, scratch_path, sweep, sync, whole, write_text
from soul_kernels.errors import argument_error, check_range

NAME = re.compile(r"step-(0|[1-9][0-9]*)")
ADAPTER_OPTIONS = ("lora_alpha", "lora_dropout", "use_rslora", "alpha_pattern")  # which no shape of a tensor shows
MODEL_FILES = ("config.json", "adapter_config.json")  # of a model, of adapters
ENDED_FILE = "soul_ended.txt"  # in the output directory, once the model is safe there


class Stopped(RuntimeError):
    """The run was told to stop (SIGTERM), and has written a checkpoint before."""


class Checkpoints:
    """Where, and how often, a run is saved.

    Args:
        directory: holds the checkpoints, ``step-N`` each; created where it is missing. Nothing else should be in there.
        every: steps from one checkpoint to the next, >= 0. 0: none by the number of steps.
        minutes: minutes from one checkpoint to the next, >= 0: the run is saved after the first step that ends later. 0: none
            by time. With both 0 the run is saved only when it is told to stop.
        keep: newest checkpoints that stay, >= 1. With 2 there is one to go back to if the newest is damaged. While one is
            written there is room needed for one more.
        resume: go on from the newest checkpoint, where there is one.

    Attributes:
        stop: set it to True, from a signal handler or a thread, and the run saves itself after the step that it is in, and
            raises `Stopped`.

    Raises:
        ArgumentError: a number is not what it may be.
    """

    def __init__(self, directory, *, every=0, minutes=0, keep=2, resume=False):
        for name, value, low in (("save_every", every, 0), ("keep", keep, 1)):
            if isinstance(value, bool) or not (isinstance(value, int) and value >= low):
                raise argument_error(name, f"a whole number >= {low}", repr(value), "check the options")
        check_range("save_minutes", minutes)
        self.directory, self.every, self.keep, self.resume = pathlib.Path(directory), every, keep, resume
        self.minutes, self._since = minutes, time.monotonic()
        self.stop = self.stopping = False

    def due(self, step):
        """Tells whether a checkpoint is to be written after this step; ``stopping`` then says whether it is the last one."""
        self.stopping, late = self.told(), self.late()  # looked at once: a signal may come at any time
        return self.stopping or late or (self.every > 0 and step % self.every == 0)

    def told(self):
        """Tells whether the run has been told to stop."""
        return self.stop

    def late(self):
        """Tell whether ``minutes`` have passed since the last checkpoint, or since the run began."""
        return self.minutes > 0 and time.monotonic() - self._since >= 60 * self.minutes

    def restart_clock(self):
        """Count ``minutes`` from now on: the run begins, or a checkpoint has been written."""
        self._since = time.monotonic()

    def steps(self):
        """Steps of the checkpoints that are there, whole or not, the newest first."""
        found = self.directory.iterdir() if self.directory.is_dir() else ()
        matches = (NAME.fullmatch(path.name) for path in found if path.is_dir())
        return sorted((int(match[1]) for match in matches if match), reverse=True)

    def path(self, step):
        """The directory of one checkpoint."""
        return self.directory / f"step-{step}"

    def clear(self):
        """Makes the directory, and removes what an interrupted write has left there.

        Raises:
            OSError: the directory cannot be written.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        sweep(self.directory)

    @contextlib.contextmanager
    def alone(self):
        """Meanwhile no other run may write here: the directory, which is made, is locked.

        Raises:
            ArgumentError: another one does.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        if os.name == "nt":  # directories cannot be opened there
            yield
            return
        descriptor = os.open(self.directory, os.O_RDONLY)
        try:
            lock(descriptor, "checkpoints", self.directory)
            yield
        finally:
            os.close(descriptor)

    def save(self, step, model, parts, records, run):
        """Writes a checkpoint, all or nothing; then removes the oldest ones.

        Args:
            step: number of steps taken.
            model: whose trainable parameters and buffers are saved.
            parts: name -> object with a ``state_dict()`` of numbers, strings, tensors and containers of these.
            records: the log so far.
            run: what `describe` says of the run.

        Raises:
            OSError: it could not be written, with the reason; the checkpoints that were there still are.
        """
        tensors = {}
        state = {"format": FORMAT, **about(step, model, parts, records, run, random_state(), tensors)}
        files = {"model": own(changing(model)), "training": own(tensors)}
        state["checksums"] = {name: file_digest(content) for name, content in files.items()}
        aside = scratch_path(self.directory)
        try:
            self.clear()
            aside.mkdir()
            for name, content in files.items():
                write_tensors(content, aside / f"{name}.safetensors")
            self.commit(aside, step, state)
        except OSError as error:
            shutil.rmtree(aside, ignore_errors=True)
            raise self.not_saved(step, error) from error

    def not_saved(self, step, error):
        """The OSError to raise."""
        return OSError(f"{self.directory}: step {step} could not be saved ({reason(error)})")

    def commit(self, aside, step, state):
        """Makes a checkpoint of a directory that has its tensors; then removes the oldest ones."""
        (aside / "training.json").write_text(json.dumps({"checksum": checksum(state), "state": state}), encoding="utf-8")
        flush(aside)
        target = self.path(step)
        if target.exists():  # one that was found damaged, and has been reached again
            target.rename(scratch_path(self.directory))
        aside.rename(target)
        sync(self.directory)
        later = [s for s in self.steps() if s > step]  # damaged, or the run would have gone on from there
        for old in [*later, *self.steps()[len(later) + self.keep :]]:
            discard(self.path(old))
        sweep(self.directory)

    def end(self, output):
        """Notes in the output directory that the run has ended, and removes the checkpoints. The model is saved there before;
        the log is flushed to the disk here, before the checkpoints that have its records are removed.

        Nothing is raised, since the run has succeeded. If the log cannot be flushed, the checkpoints stay, with a warning.
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
        Checkpoints.remove(self)

    def remove(self):
        """Removes them all, and the directory: the run has ended, and what it made is safe elsewhere. What cannot be removed
        is warned of.
        """
        for step in reversed(self.steps()):
            discard(self.path(step))
        if self.directory.is_dir():
            sweep(self.directory)
        with contextlib.suppress(OSError):  # there is something else in it
            self.directory.rmdir()

    def advice(self):
        """What the command says after a run has ended early."""
        steps = self.steps()
        return f"with --resume it goes on after step {steps[0]}" if steps else "there is no checkpoint to go on from"

    def check(self, run):
        """Raises unless a run may begin, or go on, here; reads no tensors.

        Raises:
            ArgumentError: there are checkpoints, and the run is not to be resumed, or they are of another run.
        """
        steps = self.steps()
        if steps and not self.resume:
            got, remedy = f"step {steps[0]} in {self.directory}", "resume, or choose another directory"
            raise argument_error("checkpoints", "a directory without any", got, remedy)
        for step in steps:
            state, wrong = read_state(self.path(step))
            if wrong is None:  # a damaged one says nothing; `load` passes it over
                check_same(state["run"], run)
                return

    def load(self, model, parts, run):
        """Brings a run to where its newest whole checkpoint was written; one that is damaged is passed over with a warning.

        Args:
            model: its trainable parameters and buffers are changed in place.
            parts: name -> object with a ``load_state_dict()``, those of `save`.
            run: what `describe` says of the run; it must be that of the checkpoint.

        Returns:
            The log up to there, [] where there is no checkpoint. The random generators of Python and torch are set.

        Raises:
            ArgumentError: the checkpoint is of another run (the first difference is named), all are damaged, or there is one
                and ``resume`` is False. The model was not changed.
        """
        self.check(run)
        steps = self.steps()
        for step in steps:
            path = self.path(step)
            found, wrong = read(path)
            if wrong is not None:
                warnings.warn(f"{path}: {wrong}; trying the one before it", stacklevel=2)
                continue
            state, files = found
            check_same(state["run"], run)
            tensors = changing(model)
            check_fits(path.name, tensors, {name: (tuple(t.shape), t.dtype) for name, t in files["model"].items()})
            warn_of_environment(path, state["environment"], environment(model))
            states = unpacked(state["parts"], files["training"])
            for name, part in parts.items():
                part.load_state_dict(states[name])
            with torch.no_grad():
                for name, tensor in tensors.items():
                    tensor.copy_(files["model"][name])
            set_random_state(unpacked(state["random"], files["training"]))
            return state["records"]
        if steps:
            remedy = "start again in a new directory"
            raise argument_error("resume", f"a whole checkpoint in {self.directory}", "damaged ones only", remedy)
        return []

    @contextlib.contextmanager
    def listening(self):
        """Meanwhile SIGTERM sets ``stop`` instead of ending the process; in the main thread only, elsewhere nothing changes.
        ``minutes`` count from here.
        """
        self.restart_clock()
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def told(*_):
            self.stop = True

        before = signal.signal(signal.SIGTERM, told)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)


def is_saved(directory):
    """Tells whether there is the model of a run in its output directory."""
    return any((directory / name).is_file() for name in MODEL_FILES)


def has_ended(directory, checkpoints):
    """Tells whether the run of an output directory has ended: its model is there, and so is the note of `Checkpoints.end`, or
    nothing that the run could go on from.
    """
    return is_saved(directory) and ((directory / ENDED_FILE).is_file() or not checkpoints.steps())


def describe(model, forget, retain, config):
    """What makes a run the run that it is, for comparison: a dict of JSON values, with an entry for each option and for each
    value of the model's configuration, so that what differs has a name.

    Args:
        model: before its first step.
        forget: list of `soul.data.Sequence`.
        retain: list of `soul.data.Sequence`.
        config: a dict of the options that decide the numbers.
    """
    return {**describe_inputs(model, forget, retain, config), "content of the model": digest(base_weights(model))}


def describe_inputs(model, forget, retain, config):
    """Return the entries of `describe` that need no hash of the weights, which all processes of a sharded model would compute
    together.
    """
    data = {"forget": forget, "retain": retain}
    adapters = getattr(model, "peft_config", {}).values()
    adapters = [{name: getattr(about, name, None) for name in ADAPTER_OPTIONS} for about in adapters]
    return {
        **config,
        **{f"configuration of the model, {name}": value for name, value in configuration(model).items()},
        **({"lora": adapters} if adapters else {}),
        **{f"content of {name}": checksum([[s.input_ids, s.labels] for s in part]) for name, part in data.items()},
        "trainable parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


def save_model(model, tokenizer, directory):
    """Puts model (or adapters) and tokenizer, as Hugging Face's files, into a directory that is there; one of ``MODEL_FILES``
    comes last, so that where it is, the rest is. Of a model in shards every process must call it, and the first one writes.

    Raises:
        OSError: they could not be written; nothing of them is there then.
    """
    processes = Processes.of(model)
    state = {"state_dict": whole_state(model)} if processes.size > 1 else {}
    processes.on_first(lambda: _save_model(model, tokenizer, pathlib.Path(directory), state))


def _save_model(model, tokenizer, directory, state):
    try:
        sweep(directory)
        with whole(directory, last=MODEL_FILES) as aside:
            with _valid_generation_config(model, aside):
                model.save_pretrained(aside, **state)
            tokenizer.save_pretrained(aside)
    except OSError as error:
        raise OSError(f"{directory}: the model could not be saved ({reason(error)})") from error


@contextlib.contextmanager
def _valid_generation_config(model, aside):
    """Meanwhile one that transformers saves; it refuses some that it has loaded, and a run would end without a model."""
    given = None if has_adapters(model) else getattr(model, "generation_config", None)
    try:
        if given is not None:
            given.save_pretrained(aside)
    except ValueError as error:
        lines = str(error).strip().splitlines()
        warnings.warn(f"generation_config.json is a default: the model's is refused ({' '.join(lines[:2])})", stacklevel=2)
        model.generation_config = type(given).from_model_config(model.config)
    try:
        yield
    finally:
        if given is not None:
            model.generation_config = given

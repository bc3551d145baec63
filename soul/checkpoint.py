"""Checkpoints of a run of `soul.unlearn.unlearn`: whatever stops it, it goes on from the last one bit for bit.

A checkpoint is a directory ``step-N``, after N steps::

    model.safetensors      trainable parameters and buffers, by name
    training.safetensors   tensors of the optimizer and of torch's random generators
    training.json          everything else: schedule, data order, log, what run it is, checksums of the other two

It is written under another name, flushed to the disk and renamed, and only then is an older one removed. It is trusted only
if its checksums are right. Nothing in it is pickled.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import random
import re
import shutil
import signal
import threading
import uuid
import warnings

import torch

from soul._extras import require
from soul._plan import is_sharded
from soul.distributed import Processes, whole_state
from soul.reference import base_weights, digest
from soul_kernels._checks import argument_error

FORMAT = 1  # of the files; another number is not read
NAME = re.compile(r"step-(\d+)")
MODEL_FILES = ("config.json", "adapter_config.json")  # of a model, of adapters


class Stopped(RuntimeError):
    """The run was told to stop (SIGTERM), and has written a checkpoint before."""


class Checkpoints:
    """Where, and how often, a run is saved.

    Args:
        directory: holds the checkpoints, ``step-N`` each; created where it is missing. Nothing else should be in there.
        every: steps from one checkpoint to the next, >= 0. 0: only when the run is told to stop.
        keep: newest checkpoints that stay, >= 1. With 2 there is one to go back to if the newest is damaged. While one is
            written there is room needed for one more.
        resume: go on from the newest checkpoint, where there is one.

    Attributes:
        stop: set it to True, from a signal handler or a thread, and the run saves itself after the step that it is in, and
            raises `Stopped`.

    Raises:
        ArgumentError: a number is not what it may be.
    """

    def __init__(self, directory, *, every=0, keep=2, resume=False):
        for name, value, low in (("save_every", every, 0), ("keep", keep, 1)):
            if isinstance(value, bool) or not (isinstance(value, int) and value >= low):
                raise argument_error(name, f"a whole number >= {low}", repr(value), "check the options")
        self.directory, self.every, self.keep, self.resume = pathlib.Path(directory), every, keep, resume
        self.stop = self.stopping = False

    def due(self, step):
        """Tells whether a checkpoint is to be written after this step; ``stopping`` then says whether it is the last one."""
        self.stopping = self.told()  # looked at once: a signal may come at any time
        return self.stopping or (self.every > 0 and step % self.every == 0)

    def told(self):
        """Tells whether the run has been told to stop."""
        return self.stop

    def steps(self):
        """Steps of the checkpoints that are there, whole or not, the newest first."""
        found = self.directory.iterdir() if self.directory.is_dir() else ()
        return sorted((int(match[1]) for path in found if (match := NAME.fullmatch(path.name))), reverse=True)

    def path(self, step):
        """The directory of one checkpoint."""
        return self.directory / f"step-{step}"

    def clear(self):
        """Makes the directory, and removes what an interrupted write has left there.

        Raises:
            OSError: the directory cannot be written.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        _sweep(self.directory)

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
        files = {"model": _own(changing(model)), "training": _own(tensors)}
        state["checksums"] = {name: file_digest(content) for name, content in files.items()}
        aside = self.aside()
        try:
            self.clear()
            aside.mkdir()
            for name, content in files.items():
                write_tensors(content, aside / f"{name}.safetensors")
            self.commit(aside, step, state)
        except OSError as error:
            shutil.rmtree(aside, ignore_errors=True)
            raise self.not_saved(step, error) from error

    def aside(self):
        """The name under which a checkpoint is written, before it is renamed."""
        return self.directory / f".{uuid.uuid4().hex}.tmp"

    def not_saved(self, step, error):
        """The OSError to raise."""
        return OSError(f"{self.directory}: step {step} could not be saved ({_reason(error)})")

    def commit(self, aside, step, state):
        """Makes a checkpoint of a directory that has its tensors; then removes the oldest ones."""
        (aside / "training.json").write_text(json.dumps({"checksum": _checksum(state), "state": state}), encoding="utf-8")
        flush(aside)
        target = self.path(step)
        if target.exists():  # one that was found damaged, and has been reached again
            target.rename(self.aside())
        aside.rename(target)
        _sync(self.directory)
        later = [s for s in self.steps() if s > step]  # damaged, or the run would have gone on from there
        for old in [*later, *self.steps()[len(later) + self.keep :]]:
            shutil.rmtree(self.path(old))
        Checkpoints.clear(self)

    def remove(self):
        """Removes them all, and the directory: the run has ended, and what it made is safe elsewhere."""
        for step in reversed(self.steps()):
            shutil.rmtree(self.path(step))
        _sweep(self.directory)
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
            with contextlib.suppress(Exception):  # a damaged one says nothing; what it was is found out by load
                saved = json.loads((self.path(step) / "training.json").read_text(encoding="utf-8"))["state"]["run"]
                break
        else:
            return
        check_same(saved, run)

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
            own = changing(model)
            check_fits(path.name, own, {name: (tuple(t.shape), t.dtype) for name, t in files["model"].items()})
            warn_of_environment(path, state["environment"], environment(model))
            states = unpacked(state["parts"], files["training"])
            for name, part in parts.items():
                part.load_state_dict(states[name])
            with torch.no_grad():
                for name, tensor in own.items():
                    tensor.copy_(files["model"][name])
            set_random_state(unpacked(state["random"], files["training"]))
            return state["records"]
        if steps:
            remedy = "start again in a new directory"
            raise argument_error("resume", f"a whole checkpoint in {self.directory}", "damaged ones only", remedy)
        return []

    @contextlib.contextmanager
    def listening(self):
        """Meanwhile SIGTERM sets ``stop`` instead of ending the process; in the main thread only, elsewhere nothing changes."""
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


def describe(model, forget, retain, config):
    """What makes a run the run that it is, for comparison: a dict of JSON values.

    Args:
        model: before its first step.
        forget: list of `soul.data.Sequence`.
        retain: list of `soul.data.Sequence`.
        config: a dict of the options that decide the numbers.
    """
    data = {"forget": forget, "retain": retain}
    return {
        **config,
        **{f"content of {name}": _checksum([[s.input_ids, s.labels] for s in part]) for name, part in data.items()},
        "content of the model": digest(base_weights(model)),
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
    aside = directory / f".{uuid.uuid4().hex}.tmp"
    try:
        _sweep(directory)
        aside.mkdir()
        with _safetensors_errors():
            model.save_pretrained(aside, **state)
        tokenizer.save_pretrained(aside)
        flush(aside)
        for path in sorted(aside.iterdir(), key=lambda path: path.name in MODEL_FILES):
            if path.is_dir():  # left by a save that was interrupted here
                shutil.rmtree(directory / path.name, ignore_errors=True)
            os.replace(path, directory / path.name)
        _sync(directory)
    except OSError as error:
        raise OSError(f"{directory}: the model could not be saved ({_reason(error)})") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _sweep(directory):
    for left in directory.glob(".*.tmp"):
        shutil.rmtree(left)


def flush(directory):
    """Waits until all files of a directory, and the directory, are on the disk."""
    for path in directory.iterdir():
        if path.is_dir():
            flush(path)
        else:
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
    _sync(directory)


def _sync(directory):
    if os.name == "nt":  # directories cannot be opened there
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _safetensors_errors():
    """The library says of a full disk what it says of a broken file; here it is an OSError again."""
    try:
        yield
    except require("safetensors", "hf").SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(*((int(number[1]), os.strerror(int(number[1]))) if number else (str(error),))) from error


def write_tensors(tensors, path):
    with _safetensors_errors():
        require("safetensors.torch", "hf").save_file(tensors, path)


def _reason(error):
    return error.strerror or str(error)


def changing(model):
    """What a step may change, by name."""
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return trained | {f"buffer {name}": buffer for name, buffer in model.named_buffers()}


def _own(tensors):
    """Contiguous, each in memory of its own, as the format asks."""
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    return {n: t if t.untyped_storage().nbytes() == t.numel() * t.element_size() else t.clone() for n, t in tensors.items()}


def read(path, number=FORMAT, needed=lambda names: names):
    """State and tensors of a checkpoint, and None; or None and what is wrong with it.

    Args:
        path: of the checkpoint.
        number: the format.
        needed: which of the files with tensors are read.
    """
    try:
        content = json.loads((path / "training.json").read_text(encoding="utf-8"))
        state, checksum = content["state"], content["checksum"]
        if state["format"] != number:
            return None, f"of format {state['format']}, not {number}"
        if checksum != _checksum(state):
            return None, "damaged (checksum of training.json)"
        names = needed(list(state["checksums"]))
        files = {n: require("safetensors.torch", "hf").load_file(path / f"{n}.safetensors") for n in names}
    except Exception as error:  # whatever the libraries say of a truncated or foreign file
        return None, f"not readable ({type(error).__name__}: {error})"
    for name, tensors in files.items():
        if file_digest(tensors) != state["checksums"][name]:
            return None, f"damaged (checksum of {name}.safetensors)"
    return (state, files), None


def about(step, model, parts, records, run, random_states, tensors):
    """Everything of a checkpoint but what the model holds: JSON values; tensors go into the dict ``tensors``, by names that
    are in the values.
    """
    return {
        "step": step,
        "run": run,
        "environment": environment(model),
        "parts": packed({name: part.state_dict() for name, part in parts.items()}, tensors),
        "random": packed(random_states, tensors),
        "records": records,
    }


def check_fits(where, own, got):
    """Raises unless a checkpoint has the tensors that a model has: name -> (shape, dtype) in ``got``."""
    for name in own.keys() | got.keys():
        want = (tuple(own[name].shape), own[name].dtype) if name in own else "no such tensor"
        if got.get(name) != want:
            remedy = "is it the same model, with the same parameters trained?"
            raise argument_error(f"resume, {where}, {name}", want, got.get(name, "no such tensor"), remedy)


def warn_of_environment(path, before, now):
    """Warns where `environment` has changed."""
    for name in now:
        if now[name] != before.get(name):
            text = f"{name} was {before.get(name)} and is {now[name]}: last bits may differ"
            warnings.warn(f"{path}: {text}", stacklevel=3)


def file_digest(tensors):
    """`soul.reference.digest` of what is in a file."""
    return digest(dict(sorted(tensors.items())))  # a file has an order of its own


def _checksum(state):
    return hashlib.blake2b(json.dumps(state, sort_keys=True).encode(), digest_size=32).hexdigest()


def check_same(saved, now):
    now = json.loads(json.dumps(now))  # tuples are lists there
    for name in sorted(saved.keys() | now.keys()):
        if saved.get(name) != now.get(name):
            remedy = "give the options and files of the run that is to go on, or another output directory"
            if name.startswith("content of"):
                raise argument_error(f"resume, {name}", "what the checkpoint was made with", "another one", remedy)
            raise argument_error(f"resume, {name}", f"{saved.get(name)!r} as in the checkpoint", repr(now.get(name)), remedy)


def environment(model):
    """What the last bits of a number may depend on."""
    device = next(model.parameters()).device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    here = {"device": name, "torch": torch.__version__, "threads": torch.get_num_threads()}
    processes = Processes.of(model).size
    return here | ({"processes": processes} if processes > 1 else {})


def random_state():
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"python": random.getstate(), "torch": torch.get_rng_state(), "cuda": devices}


def set_random_state(state):
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def packed(value, tensors):
    """A tree as JSON values; its tensors go into a dict, and their strides, which 8-bit states depend on, into the tree."""
    if isinstance(value, torch.Tensor):
        name = str(len(tensors))
        tensors[name] = value
        return {"tensor": name, "stride": list(value.stride())}
    if isinstance(value, dict):
        return {"dict": [[key, packed(item, tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return {type(value).__name__: [packed(item, tensors) for item in value]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"no place in a checkpoint for a {type(value).__name__}")


def unpacked(value, tensors):
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        tensor = tensors[value["tensor"]]
        if is_sharded(tensor):
            return tensor
        return torch.empty_strided(tensor.shape, value["stride"], dtype=tensor.dtype, device="cpu").copy_(tensor)
    ((kind, items),) = value.items()
    if kind == "dict":
        return {key: unpacked(item, tensors) for key, item in items}
    return {"list": list, "tuple": tuple}[kind](unpacked(item, tensors) for item in items)

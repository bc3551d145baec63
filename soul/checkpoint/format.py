"""What a checkpoint holds beside its place on the disk: a run as JSON values and named tensors, checked when it is read."""

import contextlib
import hashlib
import importlib.metadata
import json
import random
import warnings

import torch

from soul._extras import require
from soul.distributed.processes import Processes
from soul.distributed.shards import is_sharded
from soul.models.ref_model import digest
from soul.output.files import os_errors
from soul_kernels import __version__
from soul_kernels.errors import argument_error

FORMAT = 1  # of the files; another number is not read


def write_tensors(tensors, path):
    """Writes a file of safetensors.

    Raises:
        OSError: it could not be written.
    """
    with os_errors():
        require("safetensors.torch", "hf").save_file(tensors, path)


def changing(model):
    """What a step may change, by name."""
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return trained | {f"buffer {name}": buffer for name, buffer in model.named_buffers()}


def own(tensors):
    """Contiguous, each in memory of its own, as the format asks."""
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    return {n: t if t.untyped_storage().nbytes() == t.numel() * t.element_size() else t.clone() for n, t in tensors.items()}


def read_state(path):
    """Return the state of a checkpoint and None, or None and what is wrong with it. No tensors are read, and nothing in
    ``training.json`` is used before its checksum is found right.
    """
    try:
        content = json.loads((path / "training.json").read_text(encoding="utf-8"))
        state = content["state"]
        intact = content["checksum"] == checksum(state)
    except Exception as error:  # a truncated or foreign file
        return None, f"not readable ({type(error).__name__}: {error})"
    return (state, None) if intact else (None, "damaged (checksum of training.json)")


def read(path, number=FORMAT, needed=lambda names: names):
    """State and tensors of a checkpoint, and None; or None and what is wrong with it.

    Args:
        path: of the checkpoint.
        number: the format.
        needed: which of the files with tensors are read.
    """
    state, wrong = read_state(path)
    if wrong is not None:
        return None, wrong
    try:
        if state["format"] != number:
            return None, f"of format {state['format']}, not {number}"
        names = needed(list(state["checksums"]))
        files = {n: require("safetensors.torch", "hf").load_file(path / f"{n}.safetensors") for n in names}
    except Exception as error:  # whatever the library says of a truncated or foreign file
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
    """`soul.models.ref_model.digest` of what is in a file."""
    return digest(dict(sorted(tensors.items())))  # a file has an order of its own


def checksum(state):
    """blake2b of JSON values, in hexadecimal."""
    return hashlib.blake2b(json.dumps(state, sort_keys=True).encode(), digest_size=32).hexdigest()


def check_same(saved, now, source="the checkpoint"):
    """Raises where what makes a run is not the same; the first difference is named. ``source`` says whose ``saved`` is."""
    now = json.loads(json.dumps(now))  # tuples are lists there
    data = ("content of forget", "content of retain")  # last: it may be an option, the template, why they differ
    for name in sorted(saved.keys() | now.keys(), key=lambda name: (name in data, name)):
        if saved.get(name) != now.get(name):
            remedy = "give the options and files of the run that is to go on, or another output directory"
            if name == "content of the model":
                remedy = "give the model as it was before the run, which changes it in place, or another output directory"
            if name.startswith("content of"):
                raise argument_error(f"resume, {name}", f"that of {source}", "another one", remedy)
            raise argument_error(f"resume, {name}", f"{saved.get(name)!r} as in {source}", repr(now.get(name)), remedy)


def environment(model):
    """What the last bits of a number may depend on."""
    device = next(model.parameters()).device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    here = {"device": name, "torch": torch.__version__, "threads": torch.get_num_threads()}
    processes = Processes.of(model).size
    return here | ({"processes": processes} if processes > 1 else {})


def versions():
    """Return the versions of the libraries that decide what a step computes, by name, as far as they are installed."""
    found = {}
    for name in ("torch", "triton", "transformers", "tokenizers", "peft"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return {"soul": __version__, **found}


def random_state():
    """The states of the generators of Python and torch."""
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"python": random.getstate(), "torch": torch.get_rng_state(), "cuda": devices}


def set_random_state(state):
    """Sets the generators."""
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
    """The tree that `packed` has made JSON values of."""
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

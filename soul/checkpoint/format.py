"""The content of a checkpoint: a run as JSON values and named tensors, and the checks on reading them.

How it works: everything that a run needs to go on is one tree of plain values, `pack_run`. `pack` replaces the tensors in it by
names, so that the tree becomes JSON, and collects the tensors; `unpack` is the inverse. The tree goes into ``training.json``
beside a checksum of itself. It has a checksum of each file of tensors too, so a checkpoint is either what was written, bit for
bit, or `Damaged`. Nothing is pickled: whoever can write into the directory can change the numbers of a run, but run no code.
`soul.checkpoint.local` and `soul.checkpoint.sharded` decide which files there are, and how they get to the disk.

Safe to change: `environment`, whose differences only cause a warning; `versions`, which no checkpoint holds; messages. Not safe
without a new ``FORMAT``, since older checkpoints must either be read correctly or refused: the keys of `pack_run`, the trees of
`pack`, the names in `mutable_tensors`, and how `checksum` and `file_digest` are computed.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import pathlib
import random
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, TypedDict, cast

import torch

from soul._extras import require
from soul.distributed.processes import Processes
from soul.distributed.shards import is_sharded
from soul.models.causal_lm import device_of
from soul.models.ref_model import digest
from soul.output.files import os_errors
from soul_kernels import __version__
from soul_kernels.errors import argument_error

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

FORMAT = 1  # of the files; files with another number are refused
ADDED_LATER = {"chunk_bytes"}  # components of a run that older files of this format lack

State = dict[str, Any]  # JSON values by name


class Stateful(Protocol):
    """A component of a run whose state a checkpoint holds: optimizer, schedule, order of the data, curvature."""

    def state_dict(self) -> dict[str, Any]:
        """Return numbers, strings, tensors and containers of these."""

    def load_state_dict(self, state_dict: dict[str, Any], /) -> object:
        """Set the state to one that `state_dict` has returned."""


class RandomState(TypedDict):
    """The states of the random generators of a process."""

    python: tuple[Any, ...]
    torch: torch.Tensor
    cuda: list[torch.Tensor]  # of every GPU


class Damaged(Exception):
    """A checkpoint cannot be used; the message says why."""


def write_tensors(tensors: dict[str, torch.Tensor], path: pathlib.Path) -> None:
    """Write a file of safetensors.

    Raises:
        OSError: it could not be written.
    """
    with os_errors():
        require("safetensors.torch", "hf").save_file(tensors, path)


def mutable_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the tensors that a step may change, by name: trainable parameters, and buffers with a prefix."""
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return parameters | {f"buffer {name}": buffer for name, buffer in model.named_buffers()}


def separate(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors that are contiguous and share no memory, as safetensors requires; copies are made only where needed."""
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    return {name: tensor if _fills_its_storage(tensor) else tensor.clone() for name, tensor in contiguous.items()}


def _fills_its_storage(tensor: torch.Tensor) -> bool:
    return tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def read_state(path: pathlib.Path) -> State:
    """Return the JSON values of a checkpoint, without reading tensors.

    Nothing in ``training.json`` is used before its checksum has been verified.

    Args:
        path: directory of the checkpoint.

    Raises:
        Damaged: the file is missing, is not a checkpoint's, or has changed since it was written.
    """
    try:
        content = json.loads((path / "training.json").read_text(encoding="utf-8"))
        state = content["state"]
        intact = content["checksum"] == checksum(state)
    except Exception as error:  # a truncated or foreign file
        raise _not_readable(error) from error
    if not intact:
        raise Damaged("damaged (checksum of training.json)")
    return state


def read_checkpoint(
    path: pathlib.Path,
    file_format: int | str = FORMAT,
    select: Callable[[list[str]], Iterable[str]] = lambda names: names,
) -> tuple[State, dict[str, dict[str, torch.Tensor]]]:
    """Return the JSON values of a checkpoint and its tensors: name of a file -> name of a tensor -> tensor.

    Args:
        path: directory of the checkpoint.
        file_format: the format that it must have.
        select: takes the names of all files with tensors; returns those that are to be read and checked.

    Raises:
        Damaged: a file is missing or has changed since it was written, or the format is another one.
    """
    state = read_state(path)
    try:
        actual_format = state["format"]
        files = {}
        if actual_format == file_format:
            load_file = require("safetensors.torch", "hf").load_file
            files = {name: load_file(path / f"{name}.safetensors") for name in select(list(state["checksums"]))}
    except Exception as error:  # whatever the library raises for a truncated or foreign file
        raise _not_readable(error) from error
    if actual_format != file_format:
        raise Damaged(f"of format {actual_format}, not {file_format}")
    for name, tensors in files.items():
        if file_digest(tensors) != state["checksums"][name]:
            raise Damaged(f"damaged (checksum of {name}.safetensors)")
    return state, files


def _not_readable(error: Exception) -> Damaged:
    return Damaged(f"not readable ({type(error).__name__}: {error})")


def pack_run(
    step: int,
    model: torch.nn.Module,
    components: Mapping[str, Stateful],
    records: list[dict[str, Any]],
    run: Mapping[str, object],
    random_states: RandomState | list[RandomState],
    tensors: dict[str, torch.Tensor],
) -> State:
    """Return everything that a checkpoint holds beside the tensors of the model, as JSON values.

    Args:
        step: number of steps taken.
        model: on its device.
        components: objects with a state, by name.
        records: the log so far.
        run: description of the run, by `soul.checkpoint.local.describe`.
        random_states: of this process, or of each process by rank.
        tensors: gets the tensors, by names that the values refer to; changed in place.
    """
    return {
        "step": step,
        "run": run,
        "environment": environment(model),
        "parts": pack({name: component.state_dict() for name, component in components.items()}, tensors),
        "random": pack(random_states, tensors),
        "records": records,
    }


def load_states(components: Mapping[str, Stateful], states: Mapping[str, Any]) -> None:
    """Set the states of the components of a run to those of a checkpoint; what older checkpoints lack stays as it is.

    Args:
        components: objects with a state, by name; changed in place.
        states: name -> state, from the tree of `pack_run`.
    """
    for name, component in components.items():
        if name in states or name not in ADDED_LATER:
            component.load_state_dict(states[name])


def check_fits(
    source: str, tensors: Mapping[str, torch.Tensor], saved: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
) -> None:
    """Raise unless a checkpoint has exactly the tensors of a model.

    Args:
        source: name of the checkpoint, for the error.
        tensors: the `mutable_tensors` of the model.
        saved: name -> (shape, dtype) of each tensor of the checkpoint.

    Raises:
        ArgumentError: the message names a tensor that differs.
    """
    for name in tensors.keys() | saved.keys():
        expected = (tuple(tensors[name].shape), tensors[name].dtype) if name in tensors else None
        if saved.get(name) != expected:
            missing = "no such tensor"
            remedy = "is it the same model, with the same parameters trained?"
            raise argument_error(f"resume, {source}, {name}", str(expected or missing), str(saved.get(name, missing)), remedy)


def warn_of_environment(path: pathlib.Path, before: Mapping[str, object], now: Mapping[str, object]) -> None:
    """Warn of each entry of `environment` that has changed since a checkpoint was written."""
    for name in now:
        if now[name] != before.get(name):
            text = f"{name} was {before.get(name)} and is {now[name]}: last bits may differ"
            warnings.warn(f"{path}: {text}", stacklevel=3)


def file_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the `soul.models.ref_model.digest` of the tensors of a file, in the order of their names."""
    return digest(dict(sorted(tensors.items())))  # a file has an order of its own


def checksum(state: object) -> str:
    """Return the BLAKE2b hash of JSON values, in hexadecimal digits."""
    return hashlib.blake2b(json.dumps(state, sort_keys=True).encode(), digest_size=32).hexdigest()


def check_same(saved: Mapping[str, object], now: Mapping[str, object], source: str = "the checkpoint") -> None:
    """Raise if a run is not the one that is to go on.

    Args:
        saved: the description of the run that was saved.
        now: the description of this run.
        source: where ``saved`` comes from, for the error.

    Raises:
        ArgumentError: the message names the first difference.
    """
    now = json.loads(json.dumps(now))  # tuples become lists, as in ``saved``
    data = ("content of forget", "content of retain")  # last: an option, such as the template, may be why they differ
    for name in sorted(saved.keys() | now.keys(), key=lambda name: (name in data, name)):
        if saved.get(name) != now.get(name):
            remedy = "give the options and files of the run that is to go on, or another output directory"
            if name == "content of the model":
                remedy = "give the model as it was before the run, which changes it in place, or another output directory"
            if name.startswith("content of"):
                raise argument_error(f"resume, {name}", f"that of {source}", "another one", remedy)
            raise argument_error(f"resume, {name}", f"{saved.get(name)!r} as in {source}", repr(now.get(name)), remedy)


def environment(model: torch.nn.Module) -> dict[str, str | int]:
    """Return whatever the last bits of a number may depend on beside the run itself, by name."""
    device = device_of(model)
    entries: dict[str, str | int] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    processes = Processes.of(model)
    if processes.size > 1:
        entries["processes"] = processes.size
        sharded = cast("DTensor", next(model.parameters()))
        if sharded.device_mesh.ndim > 1:
            entries["replicas"] = sharded.device_mesh.size(0)
        if sharded.device.type != device.type:
            entries["parameters"] = "in main memory"
    return entries


def versions() -> dict[str, str]:
    """Return the versions of the installed libraries that decide what a step computes, by name."""
    installed = {"soul": __version__}
    for name in ("torch", "triton", "transformers", "tokenizers", "peft"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[name] = importlib.metadata.version(name)
    return installed


def random_state() -> RandomState:
    """Return the states of the random generators of Python and torch."""
    return {
        "python": random.getstate(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: RandomState) -> None:
    """Set the random generators; those of GPUs only on a machine with as many GPUs."""
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def pack(value: object, tensors: dict[str, torch.Tensor]) -> Any:  # a tree of JSON values
    """Return a tree of dicts, lists, tuples, tensors and plain values as JSON values.

    A tensor is replaced by its name and its strides, which 8-bit states depend on.

    Args:
        value: the tree.
        tensors: gets the tensors by name; changed in place.

    Raises:
        TypeError: the tree has a value of another type.
    """
    if isinstance(value, torch.Tensor):
        name = str(len(tensors))
        tensors[name] = value
        return {"tensor": name, "stride": list(value.stride())}
    if isinstance(value, dict):
        return {"dict": [[key, pack(item, tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return {type(value).__name__: [pack(item, tensors) for item in value]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a checkpoint cannot hold a {type(value).__name__}")


def unpack(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """Return the tree that `pack` has turned into JSON values.

    Whole tensors are copied, since safetensors maps files into memory; shards are returned as they are.
    """
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        tensor = tensors[value["tensor"]]
        if is_sharded(tensor):
            return tensor
        return torch.empty_strided(tensor.shape, value["stride"], dtype=tensor.dtype, device="cpu").copy_(tensor)
    ((kind, items),) = value.items()
    if kind == "dict":
        return {key: unpack(item, tensors) for key, item in items}
    return {"list": list, "tuple": tuple}[kind](unpack(item, tensors) for item in items)

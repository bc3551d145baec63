"""Checkpoints of a run of several processes, by torch.distributed.checkpoint (DCP): every process writes its own shards.

    shard-R.safetensors    the tensors of model and optimizer that process R holds, or its pieces of them
    training.json          everything else, as in `soul.checkpoint.local`; and for each piece of a tensor, its file

How it works: `ShardedCheckpoints` has the methods of `soul.checkpoint.local.Checkpoints`, which every process calls at the same
time. DCP plans which process writes and reads which pieces, so a run can go on with another number of processes. The files are
ours (`_Writer`, `_Reader`), since those of DCP begin with a pickle. `_Layout` is DCP's metadata as JSON values: which pieces a
tensor has, and in which file each of them is. All processes must see the directory.

Safe to change: messages, and the methods of `_Writer` and `_Reader` that do nothing, should DCP need more. Not safe: the names
of pieces (`_key`) and the entries of `_Layout`, without a new ``FORMAT``; and the order of collective calls. `save` and `load`
run in all processes, so work that may fail in one of them alone must be done as `soul.distributed.processes` says.
"""

import dataclasses
import os
import pathlib
import shutil
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor, empty

from soul._extras import require
from soul.checkpoint.format import (
    Damaged,
    State,
    Stateful,
    check_fits,
    check_same,
    environment,
    file_digest,
    load_states,
    mutable_tensors,
    pack_run,
    random_state,
    read_checkpoint,
    separate,
    set_random_state,
    unpack,
    warn_of_environment,
    write_tensors,
)
from soul.checkpoint.local import Checkpoints
from soul.distributed.processes import Processes
from soul.distributed.shards import is_sharded
from soul.output.files import scratch_path, sync

FORMAT = "shards 1"
MODEL_PREFIX = "model "  # of the names of the model's tensors

T = TypeVar("T")
DiskPath = str | os.PathLike[str]


class ShardedCheckpoints(Checkpoints):
    """`soul.checkpoint.local.Checkpoints` of a model in shards.

    Every process makes one, with the same arguments, and calls its methods at the same time as the others. The first process
    renames and removes. ``stop`` may be set in any of them.
    """

    def __init__(self, directory: DiskPath, *, every: int = 0, minutes: float = 0, keep: int = 2, resume: bool = False) -> None:
        super().__init__(directory, every=every, minutes=minutes, keep=keep, resume=resume)
        self.processes = Processes.here()

    def stop_requested(self) -> bool:
        """Tell whether one of the processes was asked to stop."""
        return self.processes.any(self.stop)

    def time_is_up(self) -> bool:
        """As in `Checkpoints`, by the clock of the first process: all must save after the same step."""
        return self.minutes > 0 and self.processes.any(self.processes.first and super().time_is_up())

    def prepare(self) -> None:
        """As in `Checkpoints`."""
        self.processes.on_first(super().prepare)

    def end(self, output: pathlib.Path) -> None:
        """As in `Checkpoints`."""
        self.processes.on_first(lambda: Checkpoints.end(self, output))

    def remove(self) -> None:
        """As in `Checkpoints`."""
        self.processes.on_first(super().remove)

    def check(self, run: Mapping[str, object]) -> None:
        """As in `Checkpoints`."""
        self.processes.together(lambda: Checkpoints.check(self, run))

    def save(
        self,
        step: int,
        model: torch.nn.Module,
        components: Mapping[str, Stateful],
        records: list[dict[str, Any]],
        run: Mapping[str, object],
    ) -> None:
        """As in `Checkpoints`; the random generators of every process are saved."""
        tensors: dict[str, torch.Tensor] = {}
        random_states = self.processes.gather(random_state())
        state = {"format": FORMAT, **pack_run(step, model, components, records, run, random_states, tensors)}
        tensors |= {MODEL_PREFIX + name: tensor for name, tensor in mutable_tensors(model).items()}
        scratch = self.processes.broadcast(scratch_path(self.directory))
        writer = _Writer(scratch)
        try:
            self.prepare()
            self.processes.on_first(scratch.mkdir)
            try:
                dcp.save(tensors, storage_writer=writer)
            except CheckpointException as error:  # the same in all processes
                raise _cause(error) from error
            if self.processes.first:  # DCP finishes the writer of the first process
                sharded = {name: is_sharded(tensor) for name, tensor in tensors.items()}
                state |= {"tensors": writer.layout(sharded).to_json(), "checksums": writer.checksums}
            self.processes.on_first(lambda: self.commit(scratch, step, state))
        except OSError as error:
            if self.processes.first:
                shutil.rmtree(scratch, ignore_errors=True)
            raise self.save_error(step, error) from error

    def load(
        self, model: torch.nn.Module, components: Mapping[str, Stateful], run: Mapping[str, object]
    ) -> list[dict[str, Any]]:
        """As in `Checkpoints`.

        A run may go on with another number of processes, or of copies of its shards. Then last bits differ, and the random
        generators of additional processes stay as they are.
        """
        self.check(run)
        steps = self.processes.broadcast(self.steps())
        for step in steps:
            path = self.path(step)
            state = self._read(path)
            if state is None:
                continue
            check_same(state["run"], run)
            model_tensors = mutable_tensors(model)
            layout = _Layout.from_json(state["tensors"])
            saved = {
                name.removeprefix(MODEL_PREFIX): (tuple(tensor.size), tensor.properties.dtype)
                for name, tensor in layout.tensors.items()
                if name.startswith(MODEL_PREFIX)
            }
            check_fits(path.name, model_tensors, saved)
            if self.processes.first:
                warn_of_environment(path, state["environment"], environment(model))
            owners = _parameters_of_states(state["parts"], components)
            first = next(model.parameters())
            tensors = {MODEL_PREFIX + name: tensor for name, tensor in model_tensors.items()}
            for name, tensor in layout.tensors.items():
                if name in tensors:
                    continue
                dtype = tensor.properties.dtype
                if layout.sharded[name]:
                    cut = cast(DTensor, owners.get(name, first))
                    tensors[name] = empty(tensor.size, dtype=dtype, device_mesh=cut.device_mesh, placements=cut.placements)
                else:
                    tensors[name] = torch.empty(tensor.size, dtype=dtype, device="cpu")
            dcp.load(tensors, storage_reader=_Reader(path, layout))
            load_states(components, unpack(state["parts"], tensors))
            random_states = unpack(state["random"], tensors)
            if self.processes.rank < len(random_states):
                set_random_state(random_states[self.processes.rank])
            return state["records"]
        if steps:
            raise self.all_damaged()
        return []

    def _read(self, path: pathlib.Path) -> State | None:
        """Return the JSON values of a checkpoint; None in all processes, and a warning in the first, if it is damaged.

        The processes divide the work of checking the files with tensors.
        """
        state = None
        damage = None
        try:
            state, _ = read_checkpoint(path, FORMAT, lambda names: names[self.processes.rank :: self.processes.size])
        except Damaged as error:
            damage = str(error)
        damage = next((text for text in self.processes.gather(damage) if text is not None), None)
        if damage is None:
            return state
        if self.processes.first:
            warnings.warn(f"{path}: {damage}; trying the one before it", stacklevel=3)
        return None


def _parameters_of_states(parts: State, components: Mapping[str, Stateful]) -> dict[str, torch.Tensor]:
    """Return the parameters to whose states the tensors of a checkpoint belong, by the name of a tensor.

    A state is cut as its parameter is. Most parameters are cut alike, but not a head that is in shards over all processes.

    Args:
        parts: JSON values of the components, as `soul.checkpoint.format.pack` makes them.
        components: objects with a state, by name; those that are optimizers count.
    """
    owners: dict[str, torch.Tensor] = {}
    for name, content in parts["dict"]:
        component = components.get(name)
        if isinstance(component, torch.optim.Optimizer):
            parameters = [parameter for group in component.param_groups for parameter in group["params"]]
            for number, state in dict(content["dict"])["state"]["dict"]:
                values = (value for _, value in state["dict"] if isinstance(value, dict) and "tensor" in value)
                owners |= {value["tensor"]: parameters[number] for value in values}
    return owners


def _cause(error: CheckpointException) -> Exception:
    """Return the first OSError of a process behind an error of DCP, or else a RuntimeError with its message."""
    causes = (cause for cause, _ in error.failures.values() if isinstance(cause, OSError))
    return next(causes, RuntimeError(str(error)))


def _key(name: str, offsets: Iterable[int] | None) -> str:
    """Return the name in a file of the piece of a tensor that begins at some offsets."""
    return " ".join([name, "at", *map(str, offsets or ())])


def _key_of(index: MetadataIndex) -> str:
    """Return the `_key` of a piece that DCP has planned."""
    return _key(index.fqn, index.offset)


class _Layout(NamedTuple):
    """The pieces of the tensors of a checkpoint, and the files that hold them.

    In JSON: name -> dtype, size, whether the tensor is in shards, and its pieces as [offsets, sizes, file].
    """

    tensors: dict[str, TensorStorageMetadata]
    files: dict[str, str]  # `_key` of a piece -> name of the file, without ending
    sharded: dict[str, bool]  # name of a tensor -> whether it is in shards

    def to_json(self) -> dict[str, dict[str, Any]]:
        """Return JSON values from which `from_json` restores the layout."""
        values = {}
        for name, tensor in self.tensors.items():
            values[name] = {
                "dtype": str(tensor.properties.dtype).removeprefix("torch."),
                "size": list(tensor.size),
                "sharded": self.sharded[name],
                "parts": [
                    (list(chunk.offsets), list(chunk.sizes), self.files[_key(name, chunk.offsets)]) for chunk in tensor.chunks
                ],
            }
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Mapping[str, Any]]) -> "_Layout":
        """Return the layout that `to_json` has turned into JSON values."""
        layout = cls({}, {}, {})
        for name, tensor in values.items():
            layout.sharded[name] = tensor["sharded"]
            layout.tensors[name] = TensorStorageMetadata(
                TensorProperties(dtype=getattr(torch, tensor["dtype"])),
                torch.Size(tensor["size"]),
                [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes, _ in tensor["parts"]],
            )
            for offsets, _, file in tensor["parts"]:
                layout.files[_key(name, offsets)] = file
        return layout


def _done(value: T) -> torch.futures.Future[T]:
    future: torch.futures.Future[T] = torch.futures.Future()
    future.set_result(value)
    return future


class _Writer(dcp.StorageWriter):
    """Writes one file of safetensors for each process.

    Attributes:
        checksums: file -> `file_digest`; filled by `finish`, in the first process.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        self.checksums: dict[str, str] = {}
        self._tensors: dict[str, TensorStorageMetadata] = {}
        self._files: dict[str, str] = {}

    def reset(self, checkpoint_id: DiskPath | None = None) -> None:
        pass

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: DiskPath) -> bool:
        return False

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [dataclasses.replace(plan, storage_data=f"shard-{rank}") for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list[WriteResult]]:
        planned = {_key_of(item.index): cast(torch.Tensor, planner.resolve_data(item)) for item in plan.items}
        pieces = separate({key: tensor.detach().cpu() for key, tensor in planned.items()})
        path = self.path / f"{plan.storage_data}.safetensors"
        write_tensors(pieces, path)
        sync(path)  # by the process that has written it
        storage_data = (plan.storage_data, file_digest(pieces))
        return _done([WriteResult(item.index, pieces[_key_of(item.index)].nbytes, storage_data) for item in plan.items])

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        self._tensors = cast(dict[str, TensorStorageMetadata], metadata.state_dict_metadata)  # of tensors only
        for results_of_process in results:
            for result in results_of_process:
                file, digest = result.storage_data
                self.checksums[file] = digest
                self._files[_key_of(result.index)] = file

    def layout(self, sharded: dict[str, bool]) -> _Layout:
        """Return the layout of what was written, after `finish`.

        Args:
            sharded: name of a tensor -> whether it is in shards.
        """
        return _Layout(self._tensors, self._files, sharded)


class _Reader(dcp.StorageReader):
    """Reads what `_Writer` has written: slices of safetensors, and no pickle."""

    def __init__(self, path: pathlib.Path, layout: _Layout) -> None:
        self.path = path
        self._layout = layout

    def reset(self, checkpoint_id: DiskPath | None = None) -> None:
        pass

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: DiskPath) -> bool:
        return False

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return Metadata({**self._layout.tensors})

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> torch.futures.Future[None]:
        by_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            key = _key_of(item.storage_index)
            by_file.setdefault(self._layout.files[key], []).append(item)
        for name, items in by_file.items():
            with require("safetensors", "hf").safe_open(self.path / f"{name}.safetensors", framework="pt") as file:
                for item in items:
                    key = _key_of(item.storage_index)
                    slices = tuple(slice(start, start + n) for start, n in zip(item.storage_offsets, item.lengths))
                    tensor = file.get_slice(key)[slices] if slices else file.get_tensor(key)
                    target = planner.resolve_tensor(item).detach()
                    planner.commit_tensor(item, target.copy_(tensor))
        return _done(None)

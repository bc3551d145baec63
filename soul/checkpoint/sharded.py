"""Checkpoints of a run of several processes, by torch.distributed.checkpoint (DCP): every process writes its own shards.

    shard-R.safetensors    what process R holds of the model's and the optimizer's tensors
    training.json          everything else, as in `soul.checkpoint.local`; and which part of which tensor lies in which file

DCP plans who writes and who reads what, so another number of processes can go on; the files are ours, since those of DCP
begin with a pickle. All processes must see the directory.
"""

import dataclasses
import shutil
import warnings

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import Shard, empty

from soul._extras import require
from soul.checkpoint import format as run_state
from soul.checkpoint.local import Checkpoints
from soul.distributed.processes import Processes
from soul.distributed.shards import is_sharded
from soul.output.files import scratch_path, sync
from soul_kernels.errors import argument_error

FORMAT = "shards 1"
MODEL = "model "  # before the names of the model's tensors


class ShardedCheckpoints(Checkpoints):
    """`soul.checkpoint.local.Checkpoints` of a model in shards. Every process makes one, with the same arguments, and calls its
    methods at the same time as the others; one of them renames and removes. ``stop`` may be set in any of them.
    """

    def __init__(self, directory, **options):
        super().__init__(directory, **options)
        self.processes = Processes.here()

    def told(self):
        """Tells whether one of the processes has been told to stop."""
        return self.processes.any(self.stop)

    def late(self):
        """As in `Checkpoints`, by the clock of the first process: all must save at the same step."""
        return self.minutes > 0 and self.processes.any(self.processes.first and super().late())

    def clear(self):
        """As in `Checkpoints`."""
        self.processes.on_first(super().clear)

    def end(self, output):
        """As in `Checkpoints`."""
        self.processes.on_first(lambda: Checkpoints.end(self, output))

    def remove(self):
        """As in `Checkpoints`."""
        self.processes.on_first(super().remove)

    def check(self, run):
        """As in `Checkpoints`."""
        self.processes.together(lambda: Checkpoints.check(self, run))

    def save(self, step, model, parts, records, run):
        """As in `Checkpoints`; the random generators of every process are saved."""
        tensors, first = {}, self.processes.on_first
        states = self.processes.gather(run_state.random_state())
        state = {"format": FORMAT, **run_state.about(step, model, parts, records, run, states, tensors)}
        tensors |= {MODEL + name: tensor for name, tensor in run_state.changing(model).items()}
        aside = self.processes.broadcast(scratch_path(self.directory))
        writer = _Writer(aside)
        try:
            self.clear()
            first(aside.mkdir)
            try:
                dcp.save(tensors, storage_writer=writer)
            except CheckpointException as error:  # the same in all processes
                raise next(
                    (e for e, _ in error.failures.values() if isinstance(e, OSError)), RuntimeError(str(error))
                ) from error
            if self.processes.first:
                kinds = {name: is_sharded(tensor) for name, tensor in tensors.items()}
                state |= {"tensors": writer.tensors(kinds), "checksums": writer.checksums}
            first(lambda: self.commit(aside, step, state))
        except OSError as error:
            if self.processes.first:
                shutil.rmtree(aside, ignore_errors=True)
            raise self.not_saved(step, error) from error

    def load(self, model, parts, run):
        """As in `Checkpoints`. With another number of processes the run goes on too, but for last bits and for the random
        generators of processes that were not there.
        """
        self.check(run)
        steps = self.processes.broadcast(self.steps())
        for step in steps:
            path = self.path(step)
            found, wrong = run_state.read(path, FORMAT, lambda names: names[self.processes.rank :: self.processes.size])
            wrong = next((text for text in self.processes.gather(wrong) if text), None)
            if wrong is not None:
                if self.processes.first:
                    warnings.warn(f"{path}: {wrong}; trying the one before it", stacklevel=2)
                continue
            state, _ = found
            run_state.check_same(state["run"], run)
            own = run_state.changing(model)
            metadata, places, kinds = _known(state["tensors"])
            got = {name: (tuple(t.size), t.properties.dtype) for name, t in metadata.items() if name.startswith(MODEL)}
            run_state.check_fits(path.name, own, {name.removeprefix(MODEL): value for name, value in got.items()})
            if self.processes.first:
                run_state.warn_of_environment(path, state["environment"], run_state.environment(model))
            mesh = next(model.parameters()).device_mesh
            tensors = {MODEL + name: tensor for name, tensor in own.items()}
            for name, about in metadata.items():
                if name not in tensors:
                    options = dict(device_mesh=mesh, placements=[Shard(0)]) if kinds[name] else dict(device="cpu")
                    tensors[name] = (empty if kinds[name] else torch.empty)(about.size, dtype=about.properties.dtype, **options)
            dcp.load(tensors, storage_reader=_Reader(path, metadata, places))
            states = run_state.unpacked(state["parts"], tensors)
            for name, part in parts.items():
                part.load_state_dict(states[name])
            random_states = run_state.unpacked(state["random"], tensors)
            if self.processes.rank < len(random_states):
                run_state.set_random_state(random_states[self.processes.rank])
            return state["records"]
        if steps:
            remedy = "start again in a new directory"
            raise argument_error("resume", f"a whole checkpoint in {self.directory}", "damaged ones only", remedy)
        return []


def _key(index):
    """The name of a part of a tensor in a file."""
    return " ".join([index.fqn, "at", *map(str, index.offset or ())])


def _done(value):
    future = torch.futures.Future()
    future.set_result(value)
    return future


class _Writer(dcp.StorageWriter):
    """One file of safetensors a process."""

    def __init__(self, path):
        self.path = path
        self.checksums, self._metadata, self._places = {}, {}, {}

    def reset(self, checkpoint_id=None):
        pass

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id):
        return False

    def set_up_storage_writer(self, is_coordinator, *args, **kwargs):
        pass

    def prepare_local_plan(self, plan):
        return plan

    def prepare_global_plan(self, plans):
        return [dataclasses.replace(plan, storage_data=f"shard-{rank}") for rank, plan in enumerate(plans)]

    def write_data(self, plan, planner):
        tensors = run_state.own({_key(item.index): planner.resolve_data(item).detach().cpu() for item in plan.items})
        path = self.path / f"{plan.storage_data}.safetensors"
        run_state.write_tensors(tensors, path)
        sync(path)  # by the process that has written it
        place = (plan.storage_data, run_state.file_digest(tensors))
        return _done([WriteResult(item.index, tensors[_key(item.index)].nbytes, place) for item in plan.items])

    def finish(self, metadata, results):
        self._metadata = metadata.state_dict_metadata
        for result in (result for part in results for result in part):
            file, checksum = result.storage_data
            self.checksums[file] = checksum
            self._places[_key(result.index)] = file

    def tensors(self, sharded):
        """Name -> dtype, size, whether in shards, and its parts: offsets, sizes, file of each; JSON values."""
        found = {}
        for name, about in self._metadata.items():
            chunks = [(list(chunk.offsets), list(chunk.sizes)) for chunk in about.chunks]
            parts = [(*chunk, self._places[" ".join([name, "at", *map(str, chunk[0])])]) for chunk in chunks]
            dtype = str(about.properties.dtype).removeprefix("torch.")
            found[name] = {"dtype": dtype, "size": list(about.size), "sharded": sharded[name], "parts": parts}
        return found


def _known(tensors):
    """What `_Writer.tensors` has said: DCP's metadata by name, the file of every part, and what is in shards."""
    metadata = {
        name: TensorStorageMetadata(
            TensorProperties(dtype=getattr(torch, about["dtype"])),
            torch.Size(about["size"]),
            [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes, _ in about["parts"]],
        )
        for name, about in tensors.items()
    }
    places = {" ".join([name, "at", *map(str, offsets)]): file
              for name, about in tensors.items() for offsets, _, file in about["parts"]}  # fmt: skip
    return metadata, places, {name: about["sharded"] for name, about in tensors.items()}


class _Reader(dcp.StorageReader):
    """Reads what `_Writer` has written: slices of safetensors, and no pickle."""

    def __init__(self, path, metadata, places):
        self.path, self._metadata, self._places = path, metadata, places

    def reset(self, checkpoint_id=None):
        pass

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id):
        return False

    def read_metadata(self, *args, **kwargs):
        return Metadata(self._metadata)

    def set_up_storage_reader(self, metadata, is_coordinator, *args, **kwargs):
        pass

    def prepare_local_plan(self, plan):
        return plan

    def prepare_global_plan(self, plans):
        return plans

    def read_data(self, plan, planner):
        by_file = {}
        for item in plan.items:
            by_file.setdefault(self._places[_key(item.storage_index)], []).append(item)
        for name, items in by_file.items():
            with require("safetensors", "hf").safe_open(self.path / f"{name}.safetensors", framework="pt") as file:
                for item in items:
                    part = file.get_slice(_key(item.storage_index))
                    slices = tuple(slice(at, at + n) for at, n in zip(item.storage_offsets, item.lengths))
                    tensor = part[slices] if slices else file.get_tensor(_key(item.storage_index))
                    target = planner.resolve_tensor(item).detach()
                    planner.commit_tensor(item, target.copy_(tensor))
        return _done(None)

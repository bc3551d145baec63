"""Several processes, started by torchrun: one model in shards (FSDP2), and the sequences of every step divided among them.

How it works: `started` joins the processes of torchrun into a group. `shard` cuts a model in place, and gives it a method named
`COMPUTE`, by which the rest of the library recognizes a sharded model. `Processes.of` says which processes share a model (one,
if it is whole), `gathered` runs a computation that needs its head, and the methods of `Processes` exchange numbers and Python
objects.

Every process runs the same program in the same order. A forward pass of a sharded model, `full` and the methods of
`Processes` that exchange something are collective: if one process skips such a call, or raises before it, the others wait for
it. So work that may fail in one process alone, such as writing a file, goes through `Processes.together` or
`Processes.on_first`, which raise its error in all processes. A decision that depends on something local, such as a signal, a
clock or a file, goes through `Processes.any` or `Processes.broadcast`.

Losses are sums over sequences, divided by counts of the **whole** step. So gradients are added up over the processes, not
averaged. They equal those of one process up to rounding.

Safe to change: what is checked and how it is reported; new methods of `Processes`. With care: which process gets which
sequences (`Processes.share`), since an older run would not go on bit for bit. Not safe: a collective call under a condition
that may differ between processes; the sums in `shard`; and the ``reshard`` in `gathered`.
"""

import contextlib
import dataclasses
import datetime
import json
import math
import os
import re
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

import torch
import torch.distributed as dist

from soul.distributed.shards import is_in_codes, is_sharded, local
from soul.distributed.vocabulary import cut_vocabulary
from soul.distributed.watch import key, watched
from soul.output.console import safe_stream
from soul_kernels.errors import ArgumentError, argument_error

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor
    from transformers import PreTrainedModel

START_REMEDY = "start all processes with torchrun, or unset WORLD_SIZE to run one process"
JOIN_SECONDS = 300  # how long the processes wait for each other at the start
COMPUTE = "compute_whole"  # name of the method that `shard` gives to a model; a model without it is whole

T = TypeVar("T")


class _Objective(Protocol):
    """What `check_supported` reads of a `soul.losses.Objective`."""

    @property
    def additive(self) -> str | None: ...

    @property
    def shares_batches(self) -> bool: ...


class _RunOptions(Protocol):
    """What `check_supported` and `check_layout` read of a `soul.run.config.UnlearnConfig`."""

    cuda_graph: bool
    replicas: int
    cpu_offload: bool

    def objective(self) -> _Objective: ...


def launched() -> int:
    """Return the number of processes that torchrun has started, this one included; 1 without torchrun.

    Raises:
        ArgumentError: WORLD_SIZE is not a positive whole number; or it is above 1, and another variable of torchrun is missing
            or out of range.
    """
    if "WORLD_SIZE" not in os.environ:
        return 1
    size = _environment_number("WORLD_SIZE", 1)
    if size == 1:
        return 1
    _environment_number("RANK", 0, size - 1)
    _environment_number("LOCAL_RANK", 0, size - 1)
    _environment_number("MASTER_PORT", 1, 65535)
    if not os.environ.get("MASTER_ADDR", "").strip():
        raise argument_error("MASTER_ADDR", f"a host name with WORLD_SIZE={size}", "none", START_REMEDY)
    return size


def _environment_number(name: str, low: int, high: int | None = None) -> int:
    """Return the whole number in an environment variable, which must be within [low, high]."""
    text = os.environ.get(name)
    if text is None or not re.fullmatch(r"\s*\d{1,18}\s*", text) or not low <= int(text) <= (high or math.inf):
        within = f">= {low}" if high is None else f"from {low} to {high}"
        size = "" if name == "WORLD_SIZE" else f" with WORLD_SIZE={os.environ['WORLD_SIZE']}"
        got = "none" if text is None else repr(text)
        raise argument_error(name, f"a whole number {within}{size}", got, START_REMEDY)
    return int(text)


@contextlib.contextmanager
def started(device: torch.device) -> Iterator[None]:
    """Join the processes that torchrun has started into a process group for the duration of the block.

    The backend is gloo for tensors on CPUs, and NCCL beside it on GPUs, one GPU for each process. Without torchrun, or if a
    process group exists already, nothing happens. If another process is silent for 20 seconds within the block, because it was
    stopped or its machine is gone, this process ends with exit status 1 (`soul.distributed.watch`).

    Args:
        device: type "cpu" or "cuda".

    Raises:
        ArgumentError: this machine has fewer GPUs than processes; the other processes do not join within ``JOIN_SECONDS``; or
            as in `launched`.
    """
    if dist.is_initialized() or launched() == 1:
        yield
        return
    backend = "gloo"
    if device.type == "cuda":
        local_rank = int(os.environ["LOCAL_RANK"])
        n_gpus = torch.cuda.device_count()
        if local_rank >= n_gpus:
            expected = f"at most {n_gpus}, the number of GPUs of this machine"
            remedy = "start fewer processes with --nproc-per-node, or pass --device cpu"
            raise argument_error("nproc-per-node", expected, f"process {local_rank + 1}", remedy)
        torch.cuda.set_device(local_rank)
        backend = "cpu:gloo,cuda:nccl"
    store, rank, size = _join()
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    try:
        with watched(store, rank, size):
            yield
    finally:
        dist.destroy_process_group()


def exit_process(status: int) -> None:
    """End this process at once with an exit status, without finalizing the interpreter.

    This is the last line of a program that has used `started`. Gloo's threads outlive ``destroy_process_group``: torch keeps
    the group, in its caches of sharding decisions and as a default argument of the functions in ``torch.distributed.nn``. Such
    a thread drops the tensors of a collective some time after the collective is over, and takes the GIL to do so. CPython
    before 3.14 ends a thread that asks for the GIL during finalization; in a C++ destructor that is ``std::terminate``. So a
    process whose run was complete aborted now and then on a busy machine ("terminate called without an active exception",
    SIGABRT). Seen with torch 2.13; https://github.com/pytorch/pytorch/issues/190489.

    Args:
        status: the exit status.
    """
    for stream in (sys.stdout, sys.stderr):
        safe_stream(stream).flush()
    os._exit(status)


def _join() -> tuple["dist.Store", int, int]:
    """Wait until all processes have joined; return the store that connects them, this process's rank, and their number."""
    from torch.distributed.rendezvous import rendezvous

    try:
        store, rank, size = next(rendezvous("env://", timeout=datetime.timedelta(seconds=JOIN_SECONDS)))
        store.set_timeout(datetime.timedelta(seconds=JOIN_SECONDS))
        store.set(key(rank), "here")
        store.wait([key(other) for other in range(size)])
    except (OSError, RuntimeError, ValueError) as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        expected = f"{os.environ['WORLD_SIZE']} processes that meet at {address} within {JOIN_SECONDS} seconds"
        raise argument_error("WORLD_SIZE", expected, reason, START_REMEDY) from error
    store.set_timeout(dist.default_pg_timeout)
    return store, rank, size


def check_layout(config: _RunOptions, size: int) -> None:
    """Raise if a model cannot lie in so many processes as a run asks for, or in one.

    Args:
        config: a `soul.run.config.UnlearnConfig`.
        size: number of processes.

    Raises:
        ArgumentError: the message names the first option that does not fit.
    """
    if size % config.replicas:
        remedy = "each copy is cut into as many shards: start another number of processes, or leave the option out"
        raise argument_error("replicas", f"a divisor of {size}, the number of processes", config.replicas, remedy)
    if size == 1 and config.cpu_offload:
        remedy = "FSDP2 offloads shards: start several processes with torchrun, or use state_offload"
        raise argument_error("cpu_offload", "False with one process", True, remedy)


def check_supported(config: _RunOptions) -> None:
    """Raise if a run asks for something that several processes cannot do.

    Args:
        config: a `soul.run.config.UnlearnConfig`.

    Raises:
        ArgumentError: the message names the first such option.
    """
    if config.cuda_graph:
        remedy = "a graph repeats addresses, and FSDP2 gathers each layer into memory that changes: leave the option out"
        raise argument_error("cuda_graph", "False with several processes", "True", remedy)
    objective = config.objective()
    if objective.additive is None and not objective.shares_batches:
        remedy = "its loss is not a sum over sequences, so these cannot be divided among processes: run one process"
        raise argument_error("processes", f"1 with {objective}", "several", remedy)


def shard(
    model: "PreTrainedModel",
    device: torch.device,
    *,
    replicas: int = 1,
    cpu_offload: bool = False,
    head_in_shards: bool = False,
) -> "PreTrainedModel":
    """Cut a model into shards over all processes of the group, on their devices, in place.

    With ``replicas``, the processes form as many rows, each of which holds the whole model in shards (HSDP): layers are
    gathered within a row, and gradients are added up over all of them.

    The parameters of each transformer layer form a unit that is gathered and freed on its own; the remaining parameters form
    another one. Gradients are added up over the processes in fp32. The module objects and their names stay the same; the
    parameters become DTensors.

    Args:
        model: a Hugging Face model, the same in every process. Peft may have wrapped it: the frozen weights are cut like the
            adapters. Weights in 4 bits, whose codes cannot be cut, stay whole in each process, where they are.
        device: type "cpu" or "cuda".
        replicas: number of copies of the shards, a divisor of the number of processes. Head and embeddings that are never
            gathered have one copy.
        cpu_offload: keep shards of parameters and gradients in main memory, where the optimizer then steps them; layers are
            gathered on the device.
        head_in_shards: never gather the head, nor the embeddings. Both are cut along the vocabulary, each process computes with
            its own rows for the tokens of all processes, and has the gradient of these rows alone
            (`soul.distributed.vocabulary`). Embeddings that are not tied to the head, and not torch's own layer, are gathered.

    Returns:
        The model.

    Raises:
        ArgumentError: ``head_in_shards``, and the head, or embeddings that are tied to it, are no plain layers of torch.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        FSDPModule,
        MixedPrecisionPolicy,
        OffloadPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    size = dist.get_world_size()
    mesh = all_processes = init_device_mesh(device.type, (size,))
    if replicas > 1:
        mesh = init_device_mesh(device.type, (replicas, size // replicas), mesh_dim_names=("replicate", "shard"))
    how: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32),
        "offload_policy": CPUOffloadPolicy(pin_memory=device.type != "cpu") if cpu_offload else OffloadPolicy(),
    }
    root = model.get_base_model() if hasattr(model, "get_base_model") else model  # it stays where adapters are merged into it
    ignored = cut_vocabulary(root, all_processes) if head_in_shards else set()
    ignored |= {parameter for parameter in root.parameters() if is_in_codes(parameter)}
    layer_classes = set(root._no_split_modules or ())  # names of classes
    for module in [module for module in root.modules() if type(module).__name__ in layer_classes]:
        fully_shard(module, **how, ignored_params=ignored)
    fully_shard(root, **how, ignored_params=ignored)
    for module in root.modules():
        if isinstance(module, FSDPModule):  # the sum of the gradients, not their mean
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    setattr(root, COMPUTE, types.MethodType(lambda _, compute: compute(), root))
    register_fsdp_forward_method(root, COMPUTE)
    return model


def is_sharded_by_others(model: torch.nn.Module) -> bool:
    """Tell whether FSDP2 has cut a model, but not `shard`: only a forward pass of the whole model then gathers its layers."""
    if hasattr(model, COMPUTE) or not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules())


def sharded_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the layers of a model that `shard` has cut, each of which is gathered on its own; [] for a whole model."""
    if not hasattr(model, COMPUTE):
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule) and not hasattr(module, COMPUTE)]


def check_shards(model: torch.nn.Module) -> None:
    """Raise if a model was sharded by other means than `shard`: nothing would gather its head.

    Raises:
        ArgumentError: its parameters are DTensors, and `shard` has not made them.
    """
    if not hasattr(model, COMPUTE) and any(is_sharded(parameter) for parameter in model.parameters()):
        remedy = "nothing would gather its head: put it in shards with soul.distributed.shard"
        raise argument_error("model", "a whole model", "one in shards", remedy)


def gathered(model: torch.nn.Module, compute: Callable[[], T]) -> T:
    """Return ``compute()``; for a sharded model, run it with embeddings, head and last norm gathered into whole tensors.

    A head and embeddings that `shard` keeps in shards stay DTensors.

    The fused loss takes hidden states from the body of the model, and the head itself. So the model's own forward pass, in
    which FSDP2 would gather these tensors, is never called. Instead ``compute`` runs as a forward pass of the root module; the
    gradients of these tensors are added up too.

    Args:
        model: sharded or not.
        compute: returns tensors. All tensors with a graph must be among them, so that FSDP2 gathers the parameters again for
            the backward pass.
    """
    compute_in_root = getattr(model, COMPUTE, None)
    if compute_in_root is None:
        return compute()
    result = compute_in_root(compute)
    if not torch.is_grad_enabled():
        reshard(model)
    return result


def reshard(model: torch.nn.Module) -> None:
    """Cut the root's parameters of a sharded model again, which FSDP2 keeps whole for a backward pass, after a forward pass."""
    cast("FSDPModule", model).reshard()


def is_finite(tensor: torch.Tensor) -> bool:
    """Tell whether all elements of a tensor are finite; of a DTensor, those that this process holds.

    The minimum and the maximum decide, since both are NaN if an element is: so no mask of the size of the tensor is made. A
    tensor on the meta device counts as finite.
    """
    values = local(tensor.detach())
    if values.is_floating_point() and values.itemsize == 1:  # torch compares no fp8 values
        values = values.float()
    return values.is_meta or values.numel() == 0 or all(bound.isfinite() for bound in values.aminmax())


def full(tensor: torch.Tensor) -> torch.Tensor:
    """Return the whole tensor of a DTensor, a call that all processes must make; any other tensor as it is."""
    return cast("DTensor", tensor).full_tensor() if is_sharded(tensor) else tensor


@dataclasses.dataclass(frozen=True)
class Processes:
    """The processes that share a model. If there is only one, every method acts on its own argument, and nothing waits.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def here(cls) -> "Processes":
        """Return the processes of the process group; one process without a group."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    @classmethod
    def of(cls, model: torch.nn.Module) -> "Processes":
        """Return the processes among which `shard` has divided a model; one process if the model is whole."""
        return cls.here() if hasattr(model, COMPUTE) else cls()

    @property
    def first(self) -> bool:
        """Whether this is the first process, the one that writes files."""
        return self.rank == 0

    def share(self, forget: list[T], retain: list[T]) -> tuple[list[T], list[T]]:
        """Return this process's share of the two lists of a micro-batch; either may be empty.

        If the lists cannot be divided evenly, a process with one forget example more has one retain sequence less.
        """
        return forget[self.rank :: self.size], retain[self.size - 1 - self.rank :: self.size]

    def check_alike(self, description: Mapping[str, object]) -> None:
        """Raise in every process unless all pass the same description, as the function `check_alike` does for a list."""
        if self.size > 1:
            check_alike(self.gather(description))

    def totals(self, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return sums over the processes, added up in fp64.

        Args:
            values: name -> tensor, all of one shape, with the same names in all processes.
        """
        if self.size == 1 or not values:
            return values
        summed = torch.stack([value.double() for value in values.values()])
        dist.all_reduce(summed)
        return {name: total.to(value.dtype) for (name, value), total in zip(values.items(), summed)}

    def add_up(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum of a tensor over the processes, added up in fp64."""
        return self.totals({"": values})[""]

    def total(self, number: int) -> int:
        """Return the sum of a whole number over the processes."""
        return int(self.add_up(torch.tensor(number, device="cpu")))

    def any(self, flag: bool) -> bool:
        """Tell whether the flag is set in at least one process."""
        return self.total(int(flag)) > 0 if self.size > 1 else bool(flag)

    def broadcast(self, value: T) -> T:
        """Return the first process's value in every process."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, by rank, in every process."""
        if self.size == 1:
            return [value]
        values: list[T | None] = [None] * self.size
        dist.all_gather_object(values, value)
        return cast("list[T]", values)

    def together(self, call: Callable[[], T]) -> T:
        """Return ``call()`` in every process, once all have finished it; if it fails in one, raise its error in all.

        Raises:
            OSError, ArgumentError, RuntimeError: a process whose own call failed raises that error. The others raise that of
                the first process that failed, as the closest of these types.
        """
        error: Exception | None = None
        try:
            value = call()
        except Exception as caught:
            error = caught
        failures = [failure for failure in self.gather(_failure(error)) if failure is not None]
        if error is not None:
            raise error
        if failures:
            kind, message = failures[0]
            raise SHARED_ERRORS[kind](message)
        return value

    def on_first(self, call: Callable[[], T]) -> T | None:
        """Return ``call()`` in the first process, and None in the others, which wait for it and fail with it."""
        return self.together(call if self.first else lambda: None)

    def all_finite(self, tensors: Iterable[torch.Tensor]) -> bool:
        """Tell whether all elements of some tensors are finite, in the shards of all processes."""
        return not self.any(not all(map(is_finite, tensors)))


# The types as which an error of one process is raised in the others, the most specific first.
SHARED_ERRORS: dict[str, type[Exception]] = {"OSError": OSError, "ArgumentError": ArgumentError, "RuntimeError": RuntimeError}


def _failure(error: Exception | None) -> tuple[str, str] | None:
    """Return an error as a key of `SHARED_ERRORS` and its message; None without an error."""
    if error is None:
        return None
    kinds = (name for name, kind in SHARED_ERRORS.items() if isinstance(error, kind))
    return next(kinds, "RuntimeError"), str(error)


def check_alike(descriptions: Sequence[Mapping[str, object]]) -> None:
    """Raise unless all processes are about to do the same work.

    Args:
        descriptions: for each process, by rank, a dict of names and JSON values.

    Raises:
        ArgumentError: the message names the first entry that differs, its values and the processes that have them. Contents of
            data and model come last, since a differing option may be why they differ.
    """
    names = {name: None for description in descriptions for name in description}
    for name in sorted(names, key=lambda name: (name.startswith("content of"), name)):
        values: dict[str | None, str] = {}  # JSON of a value, or None if it is missing -> the value in words
        ranks: dict[str | None, list[str]] = {}  # the same -> the processes that have it
        for rank, description in enumerate(descriptions):
            key = json.dumps(description[name], sort_keys=True, default=repr) if name in description else None
            values.setdefault(key, "nothing" if key is None else repr(description[name]))
            ranks.setdefault(key, []).append(str(rank))
        if len(ranks) > 1:
            got = ", ".join(
                f"{values[key]} in {'process' if len(holders) == 1 else 'processes'} {' '.join(holders)}"
                for key, holders in ranks.items()
            )
            remedy = "give every process the same options, files and library versions"
            raise argument_error(name, f"the same in all {len(descriptions)} processes", got, remedy)

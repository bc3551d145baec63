"""Several processes, started by torchrun: one model in shards (FSDP2), and the sequences of every step divided among them.

`started` makes the process group, `shard` cuts a model, and from there on everything follows from the model: `gathered` runs
what needs its head, and `Processes.of` says who does what. Every process runs the same program in the same order, since
every forward pass of a sharded model is one of all of them.

Losses are sums over sequences, divided by counts of the **whole** step. So gradients are added up over processes, not
averaged, and are those of one process.
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

import torch
import torch.distributed as dist

from soul.distributed.shards import is_sharded, local
from soul.output.console import safe_stream
from soul_kernels.errors import ArgumentError, argument_error

ALONE = "start all processes with torchrun; or unset WORLD_SIZE, and one process runs"
JOIN_SECONDS = 300  # that the processes wait for each other at the start
COMPUTE = "compute_whole"  # the method that makes a model a sharded one


def launched():
    """Return the number of processes that torchrun has started, this one included; 1 without it.

    Raises:
        ArgumentError: WORLD_SIZE is no number; or it is above 1, and another variable of torchrun is missing or does not fit.
    """
    if "WORLD_SIZE" not in os.environ:
        return 1
    size = _variable("WORLD_SIZE", 1)
    if size == 1:
        return 1
    _variable("RANK", 0, size - 1)
    _variable("LOCAL_RANK", 0, size - 1)
    _variable("MASTER_PORT", 1, 65535)
    if not os.environ.get("MASTER_ADDR", "").strip():
        raise argument_error("MASTER_ADDR", f"a host name with WORLD_SIZE={size}", "none", ALONE)
    return size


def _variable(name, low, high=None):
    """The whole number in a variable of the environment."""
    text = os.environ.get(name)
    if text is None or not re.fullmatch(r"\s*\d{1,18}\s*", text) or not low <= int(text) <= (high or math.inf):
        within = f">= {low}" if high is None else f"from {low} to {high}"
        size = "" if name == "WORLD_SIZE" else f" with WORLD_SIZE={os.environ['WORLD_SIZE']}"
        raise argument_error(name, f"a whole number {within}{size}", "none" if text is None else repr(text), ALONE)
    return int(text)


@contextlib.contextmanager
def started(device):
    """Meanwhile the processes that torchrun has started form a group: gloo on CPUs, NCCL beside it on GPUs, one GPU each.
    Without torchrun, or within a group that is there, nothing happens.

    Args:
        device: ``torch.device``, "cpu" or "cuda".

    Raises:
        ArgumentError: there are fewer GPUs than processes on this machine; the other processes do not come within
            ``JOIN_SECONDS``; or as in `launched`.
    """
    if dist.is_initialized() or launched() == 1:
        yield
        return
    if device.type == "cuda":
        own, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if own >= there:
            remedy = "start fewer with --nproc-per-node, or pass --device cpu"
            raise argument_error("nproc-per-node", f"at most {there}, the GPUs here", f"process {own + 1}", remedy)
        torch.cuda.set_device(own)
    store, rank, size = _joined()
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def exit_process(status):
    """End this process with an exit status at once: the interpreter is not finalized. The last line of a program that has used
    `started`.

    Gloo's threads outlive ``destroy_process_group``: torch keeps the group, in its caches of sharding decisions and as a
    default argument of the functions in ``torch.distributed.nn``. Such a thread drops the tensors of a collective some time
    after the collective is over, and takes the GIL to do so. CPython before 3.14 ends a thread that asks for the GIL during
    finalization; in a C++ destructor that is ``std::terminate``. So a process whose run was complete aborted now and then on
    a busy machine ("terminate called without an active exception", SIGABRT). Seen with torch 2.13;
    https://github.com/pytorch/pytorch/issues/190489.

    Args:
        status: the exit status, an int.
    """
    for stream in (sys.stdout, sys.stderr):
        safe_stream(stream).flush()
    os._exit(status)


def _joined():
    """The store through which all processes have found each other, and rank and number of processes."""
    from torch.distributed.rendezvous import rendezvous

    try:
        store, rank, size = next(rendezvous("env://", timeout=datetime.timedelta(seconds=JOIN_SECONDS)))
        store.set_timeout(datetime.timedelta(seconds=JOIN_SECONDS))
        store.set(f"soul {rank}", "here")
        store.wait([f"soul {other}" for other in range(size)])
    except (OSError, RuntimeError, ValueError) as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        expected = f"{os.environ['WORLD_SIZE']} processes that meet at {place} within {JOIN_SECONDS} seconds"
        raise argument_error("WORLD_SIZE", expected, reason, ALONE) from error
    store.set_timeout(dist.default_pg_timeout)
    return store, rank, size


def check_supported(config, adapters=None):
    """Raises for what several processes cannot do.

    Args:
        config: a `soul.run.config.UnlearnConfig`.
        adapters: what `soul.Unlearner` takes.

    Raises:
        ArgumentError: naming the first such option.
    """
    for name, remedy in (
        ("compile", "it does not go through the gathering of shards"),
        ("cuda_graph", "what processes send each other is not captured"),
        ("gradient_release", "gradients are in shards as it is"),
    ):
        if getattr(config, name):
            raise argument_error(name, "False with several processes", True, f"{remedy}; leave it out")
    if config.state_dtype == "8bit":
        remedy = "its blocks do not fit shards; use bfloat16"
        raise argument_error("state_dtype", "float32 or bfloat16 with several processes", "'8bit'", remedy)
    if adapters:
        remedy = "a frozen model is not sharded: run one process"
        raise argument_error("lora_rank", "None with several processes", adapters.get("rank"), remedy)
    if config.method == "influence":
        raise argument_error("method", "another one than 'influence' with several processes", "it", "run one process")
    objective = config.objective()
    if objective.additive is None:
        remedy = "its loss is not a sum over sequences, which are divided among processes"
        raise argument_error("processes", f"1 with {objective}", "several", remedy)


def shard(model, device):
    """Puts a model in shards over all processes of the group, on their devices, in place: the parameters of every transformer
    layer, which are gathered and freed one layer at a time, and those of the rest.

    Gradients are added up over the processes in fp32. The same module objects and names stay; the parameters are DTensors.

    Args:
        model: a Hugging Face model, the same in every process.
        device: ``torch.device``, "cpu" or "cuda".

    Returns:
        The model.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    options = dict(
        mesh=init_device_mesh(device.type, (dist.get_world_size(),)),
        mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32),
    )
    layers = set(model._no_split_modules or ())  # names of the classes
    for module in [module for module in model.modules() if type(module).__name__ in layers]:
        fully_shard(module, **options)
    fully_shard(model, **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):  # the sum of the gradients, not their mean
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    setattr(model, COMPUTE, types.MethodType(lambda _, compute: compute(), model))
    register_fsdp_forward_method(model, COMPUTE)
    return model


def check_shards(model):
    """Raises where somebody else has put the model in shards, whose head nobody would gather.

    Raises:
        ArgumentError: its parameters are DTensors, and `shard` has not made them.
    """
    if not hasattr(model, COMPUTE) and any(is_sharded(parameter) for parameter in model.parameters()):
        raise argument_error("model", "a whole model", "one in shards", "put it in shards with soul.distributed.shard")


def gathered(model, compute):
    """``compute()``; of a sharded model within a forward pass of its root, so that embeddings, head and the last norm are
    whole tensors, and their gradients are added up. The fused loss takes hidden states from the body and the head itself:
    the model's own forward pass, in which FSDP2 would do so, is never called.

    Args:
        model: sharded or not.
        compute: returns tensors; those with a graph must be outputs, so that backward finds the parameters whole again.
    """
    within = getattr(model, COMPUTE, None)
    if within is None:
        return compute()
    found = within(compute)
    if not torch.is_grad_enabled():  # FSDP2 keeps the root's parameters whole for a backward pass
        model.reshard()
    return found


def whole_state(model):
    """``model.state_dict()`` of whole tensors, on the CPU, in the first process; {} in the others. Names of one tied parameter
    share one tensor. Every process must call it.
    """
    first, known, state = Processes.of(model).first, {}, {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in known:  # one tensor at a time is whole
            whole = full(tensor.detach())
            known[id(tensor)] = whole.cpu() if first else None
        state[name] = known[id(tensor)]
    return state if first else {}


def is_finite(tensor):
    """Tell whether all elements of a tensor are finite; of a DTensor, those that this process holds.

    By its bounds, which are NaN where an element is: no mask of the size of the tensor is made. On the meta device there are no
    elements.
    """
    own = local(tensor.detach())
    if own.is_floating_point() and own.itemsize == 1:  # torch compares no fp8 values
        own = own.float()
    return own.is_meta or own.numel() == 0 or all(bound.isfinite() for bound in own.aminmax())


def full(tensor):
    """The whole tensor of a DTensor, which all processes must ask for; any other tensor as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


@dataclasses.dataclass(frozen=True)
class Processes:
    """The processes that share a model. With one, all methods do the plain thing, and nothing waits.

    Attributes:
        rank: number of this one, from 0.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def here(cls):
        """Those of the process group; one without it."""
        there = dist.is_available() and dist.is_initialized()
        return cls(dist.get_rank(), dist.get_world_size()) if there else cls()

    @classmethod
    def of(cls, model):
        """Those among which `shard` has divided the model; one, where it has not."""
        return cls.here() if hasattr(model, COMPUTE) else cls()

    @property
    def first(self):
        """Whether this one writes."""
        return self.rank == 0

    def part(self, forget, retain):
        """This one's part of a micro-batch, two lists; either may be empty. Who has one forget example more has one retain
        sequence less.
        """
        return forget[self.rank :: self.size], retain[self.size - 1 - self.rank :: self.size]

    def check_alike(self, description):
        """Raise in every process unless all have the same ``description``, a dict: see `check_alike`. With one, nothing."""
        if self.size > 1:
            check_alike(self.gather(description))

    def totals(self, values):
        """Sums over the processes, in fp64, of a dict of tensors [] that has the same names in all of them."""
        if self.size == 1 or not values:
            return values
        summed = torch.stack([value.double() for value in values.values()])
        dist.all_reduce(summed)
        return {name: total.to(value.dtype) for (name, value), total in zip(values.items(), summed)}

    def total(self, number):
        """Sum of a whole number over the processes."""
        return int(self.totals({"": torch.tensor(number, device="cpu")})[""])

    def any(self, flag):
        """Whether it is so in one of them."""
        return self.total(int(flag)) > 0 if self.size > 1 else bool(flag)

    def of_first(self, value):
        """What the first process has, for all."""
        found = [value]
        if self.size > 1:
            dist.broadcast_object_list(found, src=0)
        return found[0]

    def gather(self, value):
        """List of what each process has."""
        if self.size == 1:
            return [value]
        found = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def together(self, call):
        """``call()`` in every process; what fails in one is raised in all, so that none waits for another. All wait for all.

        Raises:
            OSError, ArgumentError, RuntimeError: of the first process that failed.
        """
        value, error = None, None
        try:
            value = call()
        except Exception as caught:
            error = caught
        kind = next((k for k in (OSError, ArgumentError) if isinstance(error, k)), RuntimeError)
        told = [text for text in self.gather(error and (kind.__name__, str(error))) if text]
        if error is not None:
            raise error
        if told:
            name, text = told[0]
            raise {"OSError": OSError, "ArgumentError": ArgumentError}.get(name, RuntimeError)(text)
        return value

    def on_first(self, call):
        """``call()`` in the first process alone; all wait for it, and fail with it."""
        return self.together(call if self.first else lambda: None)

    def all_finite(self, tensors):
        """Whether all parameters, in shards, are finite."""
        return not self.any(not all(map(is_finite, tensors)))


def check_alike(descriptions):
    """Raise unless all processes are to do the same.

    Args:
        descriptions: for each process, by rank, a dict of names and JSON values.

    Raises:
        ArgumentError: naming the first entry that differs, its values and the processes that have them. Contents of data and
            model come last: an option may be why they differ.
    """
    names = {name: None for description in descriptions for name in description}
    for name in sorted(names, key=lambda name: (name.startswith("content of"), name)):
        values, ranks = {}, {}
        for rank, description in enumerate(descriptions):
            key = json.dumps(description[name], sort_keys=True, default=repr) if name in description else None
            values.setdefault(key, "nothing" if key is None else repr(description[name]))
            ranks.setdefault(key, []).append(str(rank))
        if len(ranks) > 1:
            got = ", ".join(f"{values[key]} in process{'es' * (len(of) > 1)} {' '.join(of)}" for key, of in ranks.items())
            remedy = "give every process the same options, files and library versions"
            raise argument_error(name, f"the same in all {len(descriptions)} processes", got, remedy)

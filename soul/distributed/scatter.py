"""A model that the first process alone has read, cut into the shards of all processes.

How it works: the first process holds the model, and every other one a model of the same modules on the meta device, which takes
no memory (`soul.models.loading.load` with ``weights=False``). `shard_from_first` puts the first one on the meta device too,
cuts all of them, and then sends the tensors, one at a time: of each parameter a process gets its own shard and nothing else. So
the processes of a machine together hold one whole model, in the first of them, beside the shards; it shrinks as they grow.

Buffers are sent whole. That includes those that no file has, such as the frequencies of rotary embeddings, which a model on the
meta device cannot compute.

Safe to change: messages. Not safe: an order of tensors that differs between processes, which would mix them up.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

import torch
import torch.distributed as dist

from soul.distributed.processes import Processes, shard
from soul.distributed.shards import is_sharded
from soul.distributed.vocabulary import vocabulary_layers
from soul.output.progress import track
from soul_kernels.errors import argument_error

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from transformers import PreTrainedModel

Box = tuple[slice, ...]  # the part of a tensor that one process holds


def shard_from_first(
    model: "PreTrainedModel",
    device: torch.device,
    *,
    replicas: int = 1,
    cpu_offload: bool = False,
    head_in_shards: bool = False,
) -> "PreTrainedModel":
    """Cut the first process's model into shards over all processes of the group, in place, as `shard` does.

    Shapes, dtypes, weights and buffers are those of the first process, bit for bit. Every process must call this.

    Args:
        model: in the first process a Hugging Face model on the CPU, which peft may have wrapped. In the others one of the same
            modules, whose values are not used: it may be on the meta device.
        device: type "cpu" or "cuda", of the shards and buffers.
        replicas: as `shard` takes it.
        cpu_offload: the same.
        head_in_shards: the same.

    Returns:
        The model.

    Raises:
        ArgumentError: a process has a model with other parameters or buffers, or with other ones tied; or as `shard`.
    """
    processes = Processes.here()
    whole = _tensors(model)
    first = processes.broadcast({name: (tensor.shape, tensor.dtype) for name, tensor in whole.items()})
    processes.together(lambda: _check_names(list(whole), list(first)))
    empty = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in first.items()}
    _replace(model, {id(tensor): empty[name] for name, tensor in whole.items()})
    shard(model, device, replicas=replicas, cpu_offload=cpu_offload, head_in_shards=head_in_shards)
    parts = _tensors(model)
    boxes = processes.gather({name: _box(part) for name, part in parts.items()})
    values = {}
    layers = vocabulary_layers(model) if head_in_shards else []  # these compute with their shards, which stay on the device
    on_device = {id(part) for layer in layers for part in layer.parameters()}
    for name, part in track(parts.items(), "sharing weights"):
        own = _own_part(whole.pop(name), part, [boxes_of_process[name] for boxes_of_process in boxes], processes)
        value = _like(part, own.to(device))
        values[id(part)] = value.cpu() if cpu_offload and is_sharded(part) and id(part) not in on_device else value
    _replace(model, values)
    return model


def _tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the parameters and buffers of a model by name; a tied one once, under the first of its names."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _check_names(names: list[str], first: list[str]) -> None:
    """Raise unless a model has the parameters and buffers of the first process's model, in the same order."""
    if names != first:
        odd = sorted({*names} ^ {*first}) or ["another order"]
        remedy = "give every process the same files and library versions"
        raise argument_error("model", "the parameters and buffers of the first process", odd[0], remedy)


def _replace(model: torch.nn.Module, values: Mapping[int, torch.Tensor]) -> None:
    """Put other tensors into the place of all parameters and buffers of a model; what is tied stays tied.

    Args:
        model: is changed in place.
        values: id of a parameter or buffer -> the tensor that takes its place.
    """
    made: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in [*module.named_parameters(recurse=False, remove_duplicate=False)]:
            if id(parameter) not in made:
                made[id(parameter)] = torch.nn.Parameter(values[id(parameter)], requires_grad=parameter.requires_grad)
            module.register_parameter(name, made[id(parameter)])
        for name, buffer in [*module.named_buffers(recurse=False, remove_duplicate=False)]:
            setattr(module, name, values[id(buffer)])  # which stays out of state_dict if it was


def _box(part: torch.Tensor) -> Box:
    """Return the part of the whole tensor that this process holds of a DTensor; of any other tensor, all."""
    if not is_sharded(part):
        return tuple(slice(0, size) for size in part.shape)
    (chunk,) = cast("DTensor", part).__create_chunk_list__()  # as distributed checkpoints ask for it
    return tuple(slice(offset, offset + size) for offset, size in zip(chunk.offsets, chunk.sizes))


def _own_part(whole: torch.Tensor, part: torch.Tensor, boxes: Sequence[Box], processes: Processes) -> torch.Tensor:
    """Return this process's part of a tensor of the first process, on the CPU, in memory of its own.

    Args:
        whole: the tensor; its values count in the first process only.
        part: the same as this process has it after the cut, on the meta device: a DTensor, or a whole tensor.
        boxes: by rank, the part of each process.
        processes: all processes.
    """
    if processes.first:
        for rank, box in enumerate(boxes[1:], start=1):
            _send(whole.detach()[box], rank)
        return whole.detach()[boxes[0]].cpu().clone(memory_format=torch.contiguous_format)
    shape = [extent.stop - extent.start for extent in boxes[processes.rank]]
    own = torch.empty(shape, dtype=part.dtype, device="cpu")
    if own.numel():
        dist.recv(own.view(-1).view(torch.uint8), src=0)
    return own


def _send(part: torch.Tensor, rank: int) -> None:
    """Send the bytes of a tensor to a process; nothing if it has no element."""
    if part.numel():
        dist.send(part.cpu().contiguous().view(-1).view(torch.uint8), dst=rank)


def _like(part: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return values as a DTensor with the sharding of ``part``; as they are, if that is no DTensor."""
    if not is_sharded(part):
        return values
    from torch.distributed.tensor import DTensor

    sharded = cast("DTensor", part)
    mesh, placements = sharded.device_mesh, sharded.placements
    return DTensor.from_local(values, mesh, placements, run_check=False, shape=sharded.shape, stride=sharded.stride())

"""The scales of 8-bit states: which parameters have such states, and the way between codes and values.

A scale belongs to a group of 32 values that are neighbours in memory. A tensor that is sharded by rows (its slices along
dimension 0) must not have a group that lies in two shards. So 8-bit states are for tensors whose rows consist of whole groups:
their scales are a matrix with as many rows, which is sharded as the codes are. `scales_shape` is this rule, and the only place
where it stands. All other parameters keep fp32 states: vectors, and the few matrices with rows of another length.

A scale is an int16, but its two bytes are stored as uint8: neither NCCL nor gloo sends int16, so torch could not gather it. The
order of the scales in memory is that of the groups, which is all that the ops need.
"""

import math
from typing import TYPE_CHECKING, Any, cast

import torch

from soul.distributed.shards import is_sharded, local, splits
from soul_kernels.errors import argument_error
from soul_kernels.reference.rounding import GROUP, encode, in_memory_order, load_state

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

BYTES = 2  # of a scale
FLAT_PIECE = 1 << 20  # elements from which on a vector is a piece of many parameters; no bias is as long


def scales_shape(param: torch.Tensor) -> tuple[int, ...] | None:
    """Return the shape of the scales of a parameter's 8-bit state, or None if the parameter keeps fp32 states instead.

    A vector of `FLAT_PIECE` elements or more is no parameter of a model but a piece of many, as DeepSpeed's ZeRO and FSDP1 make
    them: its groups are counted from its first element. Nothing shards it once more.

    Returns:
        ``(rows, bytes of the scales of a row)``; ``(bytes of all scales,)`` for a flat piece; None for other vectors and
        scalars, for tensors whose rows are no multiple of 32 elements, and for those whose rows do not lie one after the other
        in memory.
    """
    if param.dim() < 2:
        is_piece = param.numel() >= FLAT_PIECE and not is_sharded(param)
        return (-(-param.numel() // GROUP) * BYTES,) if is_piece else None
    row_length = math.prod(param.shape[1:])
    inner = [stride for stride, size in zip(param.stride()[1:], param.shape[1:]) if size > 1]
    by_rows = len(param) <= 1 or param.stride(0) >= max(inner, default=0)
    return (len(param), row_length // GROUP * BYTES) if by_rows and row_length % GROUP == 0 else None


def check_groups_whole(name: str, param: torch.Tensor) -> None:
    """Raise if a parameter with 8-bit states is sharded so that groups would lie in two shards.

    Shards of rows never cut a group, uneven and empty ones included. Shards of the columns of a matrix cut none if each has a
    multiple of 32 columns.

    Args:
        name: name of the parameter for the message.
        param: the parameter.

    Raises:
        ArgumentError: a group would be cut.
    """
    if not is_sharded(param) or scales_shape(param) is None:
        return
    sharded = cast("DTensor", param)
    placements: tuple[Any, ...] = sharded.placements  # torch's base class of placements has no ``dim``
    cuts = [
        sharded.device_mesh.size(mesh_dim)
        for mesh_dim, placement in enumerate(placements)
        if splits(placement) and placement.dim != 0 and sharded.device_mesh.size(mesh_dim) > 1
    ]
    if cuts and (param.dim() != 2 or len(cuts) > 1 or -(-param.shape[1] // cuts[0]) % GROUP):
        expected = f"fp32 or bf16 where shards do not have a multiple of {GROUP} columns"
        got = f"'8bit' for {name}, {tuple(param.shape)} with {sharded.placements}"
        raise argument_error("state_dtype", expected, got, "shard by rows, or use bf16 states")


def new_scales(param: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Return scales of zero for a parameter, uint8; for a DTensor, sharded as the parameter is.

    Args:
        param: the parameter, or one of its states.
        shape: its `scales_shape`.
    """
    if not is_sharded(param):
        return torch.zeros(shape, dtype=torch.uint8, device=param.device)
    from torch.distributed.tensor import DTensor

    sharded = cast("DTensor", param)
    shard = local(param)
    local_scales = torch.zeros(len(shard), math.prod(shard.shape[1:]) // GROUP * BYTES, dtype=torch.uint8, device=shard.device)
    strides = (shape[1], 1)
    return DTensor.from_local(local_scales, sharded.device_mesh, sharded.placements, shape=torch.Size(shape), stride=strides)


def decoded(state: dict[str, Any], name: str) -> torch.Tensor:
    """Return a copy of ``exp_avg`` or ``hessian`` with values in place of codes: fp32 for codes, else as it is stored.

    Args:
        state: the state of a parameter.
        name: "exp_avg" or "hessian".
    """
    value = state[name].detach()
    if value.dtype != torch.uint8:
        return value.clone()
    values = torch.empty_like(value, dtype=torch.float32)
    local(values).copy_(load_state(local(value), local(state[f"{name}_scale"]).to(local(value).device), name))
    return values


def encoded(values: torch.Tensor, shape: tuple[int, ...], name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the codes and the scales of fp32 values, rounded to nearest; those of a DTensor are DTensors.

    Args:
        values: fp32, dense, laid out as the parameter.
        shape: the parameter's `scales_shape`.
        name: "exp_avg" or "hessian".
    """
    codes = torch.empty_like(values, dtype=torch.uint8)
    scales = new_scales(values, shape)
    code, scale = encode(in_memory_order(local(values)), None, name)
    in_memory_order(local(codes)).copy_(code)
    local(scales).view(-1).copy_(scale.view(torch.uint8))
    return codes, scales

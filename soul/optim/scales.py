"""The scales of 8-bit states: which parameters have such states, and the way between codes and values.

A scale belongs to a group of 32 values that are neighbours in memory. A tensor that is sharded by rows (its slices along
dimension 0) must not have a group that lies in two shards. So 8-bit states are for tensors whose rows consist of whole groups:
their scales are a matrix with as many rows, which is sharded as the codes are. All other parameters keep fp32 states: vectors,
and the few matrices with rows of another length.

Shards that would cut such groups, as those of columns do, have groups of their own, counted from the first element of each
shard; the last group of a shard may be shorter. Their scales have one dimension more than the parameter: its first ones say
into how many shards each dimension of the parameter is cut (`grid`), and the last one holds the bytes of one shard's scales,
filled up to those of the largest shard. So they are sharded as the codes are, and a checkpoint says where its groups begin.

`scales_shape` is this rule, and the only place where it stands.

A scale is an int16, but its two bytes are stored as uint8: neither NCCL nor gloo sends int16, so torch could not gather it. The
order of the scales in memory is that of the groups, which is all that the ops need.
"""

import itertools
import math
from collections.abc import Iterator
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
        ``(rows, bytes of the scales of a row)``; ``(bytes of all scales,)`` for a flat piece; ``(*grid, bytes of the scales of
        the largest shard)`` for shards that would cut the groups of a row; None for other vectors and scalars, for tensors
        whose rows are no multiple of 32 elements, and for those whose rows do not lie one after the other in memory.
    """
    if param.dim() < 2:
        is_piece = param.numel() >= FLAT_PIECE and not is_sharded(param)
        return (_bytes(param.numel()),) if is_piece else None
    row_length = math.prod(param.shape[1:])
    inner = [stride for stride, size in zip(param.stride()[1:], param.shape[1:]) if size > 1]
    by_rows = len(param) <= 1 or param.stride(0) >= max(inner, default=0)
    if not by_rows or row_length % GROUP:
        return None
    counts = grid(param)
    cuts_groups = math.prod(counts[1:]) > 1 and (param.dim() != 2 or -(-row_length // counts[1]) % GROUP > 0)
    if cuts_groups:
        return (*counts, _bytes(math.prod(-(-size // count) for size, count in zip(param.shape, counts))))
    return len(param), _bytes(row_length)


def _bytes(numel: int) -> int:
    """Return the bytes of the scales of so many neighbours in memory."""
    return -(-numel // GROUP) * BYTES


def grid(param: torch.Tensor) -> tuple[int, ...]:
    """Return into how many shards each dimension of a parameter is cut."""
    counts = [1] * param.dim()
    for mesh_dim, placement in enumerate(cast("DTensor", param).placements if is_sharded(param) else ()):
        if splits(placement):
            counts[cast(Any, placement).dim] *= cast("DTensor", param).device_mesh.size(mesh_dim)
    return tuple(counts)


def check_state_shards(name: str, param: torch.Tensor) -> None:
    """Raise if a parameter is sharded so that its 8-bit states could not be told apart in a checkpoint.

    Args:
        name: name of the parameter for the message.
        param: the parameter.

    Raises:
        ArgumentError: its columns are sharded, and one of its dimensions is cut by several dimensions of the mesh, or a shard
            is not contiguous.
    """
    if not is_sharded(param) or scales_shape(param) is None or math.prod(grid(param)[1:]) == 1:
        return
    sharded = cast("DTensor", param)
    cuts = [
        cast(Any, placement).dim
        for mesh_dim, placement in enumerate(sharded.placements)
        if splits(placement) and sharded.device_mesh.size(mesh_dim) > 1
    ]
    got = f"'8bit' for {name}, {tuple(param.shape)} with {sharded.placements}"
    if len(cuts) > len(set(cuts)):
        expected = "fp32 or bf16 where columns are sharded, and one dimension by several dimensions of the mesh"
        remedy = "a checkpoint could not tell the scales of such shards apart: shard by rows, or use bf16 states"
        raise argument_error("state_dtype", expected, got, remedy)
    if not local(param).is_contiguous():
        remedy = "a scale belongs to neighbours in memory: make the shards contiguous"
        raise argument_error("state_dtype", "fp32 or bf16 where shards of columns have gaps", got, remedy)


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
    has_grid = len(shape) == param.dim() + 1
    own = (*[1] * param.dim(), shape[-1]) if has_grid else (len(shard), _bytes(math.prod(shard.shape[1:])))
    local_scales = torch.zeros(own, dtype=torch.uint8, device=shard.device)
    strides = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local_scales, sharded.device_mesh, sharded.placements, shape=torch.Size(shape), stride=strides)


def own_scales(scales: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Return the scales of the codes that this process holds, a vector of bytes, without what fills them up; a view.

    Args:
        scales: as `new_scales` makes them.
        codes: the codes, of the same sharding.
    """
    return local(scales).view(-1)[: _bytes(local(codes).numel())]


def same_groups(scales: torch.Tensor, shape: tuple[int, ...], dim: int) -> bool:
    """Tell whether saved scales belong to the groups of scales of this shape.

    Args:
        scales: of a parameter of the same shape and memory layout, their number has been checked.
        shape: `scales_shape` of the parameter.
        dim: number of dimensions of the parameter.
    """
    has_grid = scales.dim() == dim + 1
    return tuple(scales.shape) == shape if has_grid else len(shape) != dim + 1


def n_bytes(scales: torch.Tensor, codes: torch.Tensor) -> int:
    """Return how many bytes saved scales must have to belong to these codes."""
    if scales.dim() != codes.dim() + 1:
        return _bytes(codes.numel())
    counts = [max(count, 1) for count in scales.shape[:-1]]  # a damaged file may have any shape
    return math.prod(counts) * _bytes(math.prod(-(-size // count) for size, count in zip(codes.shape, counts)))


def _in_shards(tensor: torch.Tensor, scales: torch.Tensor) -> Iterator[tuple[tuple[slice, ...], torch.Tensor]]:
    """Yield the parts of a tensor whose groups are counted from their own first element, each with its scales, bytes [n].

    Args:
        tensor: codes, no DTensor.
        scales: their scales, of a `grid` or not.
    """
    if scales.dim() != tensor.dim() + 1:
        yield (), scales.reshape(-1)
        return
    counts = scales.shape[:-1]
    steps = [-(-size // count) for size, count in zip(tensor.shape, counts)]
    for index in itertools.product(*map(range, counts)):
        part = tuple(slice(number * step, (number + 1) * step) for number, step in zip(index, steps))
        yield part, scales[index][: _bytes(tensor[part].numel())]


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
    codes = local(value)
    for part, scales in _in_shards(codes, local(state[f"{name}_scale"]).to(codes.device)):
        own = codes[part].contiguous() if part else codes
        local(values)[part].copy_(load_state(own, scales, name))
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
    own_scales(scales, codes).copy_(scale.view(torch.uint8))
    return codes, scales

"""The share of a parameter that this process holds: all of it, a shard of a DTensor (FSDP2, tensor parallelism), or a piece
that looks like a whole tensor (DeepSpeed's ZeRO, FSDP1).
"""

import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

import torch

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Placement

NUMBER_SPACING = 1 << 40  # between the first numbers of shards that have numbers of their own; no shard has more elements


def is_sharded(tensor: torch.Tensor) -> bool:
    """Tell whether this is a DTensor, without importing DTensor."""
    return hasattr(tensor, "device_mesh")


def is_in_codes(tensor: torch.Tensor) -> bool:
    """Tell whether these are codes of bitsandbytes, of 4 bits, which have no gradient and cannot be cut into rows."""
    return hasattr(tensor, "quant_state")


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return the shard of a DTensor that this process holds; any other tensor as it is."""
    return cast("DTensor", tensor).to_local() if is_sharded(tensor) else tensor


def laid_out_as(target: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """Return a whole tensor, which every process has, in the shards of a DTensor; without one of both, the tensor as it is.

    Nothing is sent.

    Args:
        target: a DTensor of the same shape; or any other tensor.
        whole: values.
    """
    if not is_sharded(target) or is_sharded(whole):
        return whole
    from torch.distributed.tensor import distribute_tensor

    sharded = cast("DTensor", target)
    return distribute_tensor(whole, sharded.device_mesh, sharded.placements, src_data_rank=None)


def wait_for_offload(param: torch.Tensor) -> None:
    """Wait, in a hook that FSDP2 calls, until the gradient of a parameter in main memory has arrived there.

    With a `CPUOffloadPolicy` the gradients of shards are copied from the device to pinned memory, on the current stream. Older
    versions of torch call the hooks before such a copy is complete.
    """
    if is_sharded(param) and local(param).device.type != cast("DTensor", param).device_mesh.device_type:
        torch.accelerator.current_stream().synchronize()


def splits(placement: "Placement") -> bool:
    """Tell whether processes hold different parts of a tensor: Shard, and the _StridedShard of FSDP over tensor parallelism."""
    return not placement.is_replicate() and not placement.is_partial()


def is_cut(param: torch.Tensor) -> bool:
    """Tell whether other processes hold other parts of this parameter."""
    return is_sharded(param) and any(map(splits, cast("DTensor", param).placements))


class _Cut(NamedTuple):
    """The division of a tensor along one dimension of the mesh of processes."""

    placement: "Placement"
    size: int  # number of processes
    rank: int  # of this process among them


def n_copies(param: torch.Tensor) -> int:
    """Return how many processes of its mesh hold the same elements of a parameter; 1 for a tensor that is no DTensor."""
    if not is_sharded(param):
        return 1
    sharded = cast("DTensor", param)
    sizes = (sharded.device_mesh.size(dim) for dim, placement in enumerate(sharded.placements) if not splits(placement))
    return math.prod(sizes)


def first_number(param: torch.Tensor) -> int:
    """Return the number of the first element that this process holds, from which the noise of the parameter is drawn.

    Elements are numbered in the order of memory. In shards of rows they have the same numbers as in the whole parameter, so all
    processes together draw what one process draws. FSDP2 makes such shards, with or without tensor parallelism by rows below
    it. Any other shard has numbers of its own, which its replicas share.
    """
    if not is_cut(param) or not param.numel():
        return 0
    sharded = cast("DTensor", param)
    mesh = sharded.device_mesh
    cuts = [
        _Cut(placement, mesh.size(dim), mesh.get_local_rank(dim))
        for dim, placement in enumerate(sharded.placements)
        if splits(placement)
    ]
    dense = torch.empty_like(local(param), device="meta")
    row_length = param.numel() // len(param)
    by_rows = all(getattr(cut.placement, "dim", None) == 0 for cut in cuts)
    if by_rows and (not len(dense) or dense.stride(0) == row_length):
        first_row = 0
        n_rows = len(param)
        for cut in sorted(cuts, key=_is_strided):  # _StridedShard cuts shards
            step = -(-n_rows // cut.size)
            skipped = min(cut.rank * step, n_rows)
            first_row += skipped
            n_rows = min(step, n_rows - skipped)
        return first_row * row_length
    shard_index = 0
    for cut in cuts:
        shard_index = shard_index * cut.size + cut.rank
    return (1 + shard_index) * NUMBER_SPACING


def _is_strided(cut: _Cut) -> bool:
    return hasattr(cut.placement, "split_factor")


def device_and_sharding(
    param: torch.Tensor,
) -> "tuple[torch.device, DeviceMesh | None, tuple[Placement, ...]]":
    """Return the device of a parameter, its mesh of processes (None if it is whole), and its placements on that mesh.

    Parameters for which all three are equal are stepped together.
    """
    if not is_sharded(param):
        return param.device, None, ()
    sharded = cast("DTensor", param)
    return sharded.to_local().device, sharded.device_mesh, sharded.placements


def hidden_sharding(params: Sequence[torch.Tensor]) -> str | None:
    """Return the library that has cut parameters into pieces that look whole: "DeepSpeed", "FSDP1" or None.

    DeepSpeed's ZeRO replaces the parameters of a group by one flat piece of all of them, a plain tensor; with stage 3 it steps
    one piece after the other. FSDP1 marks the parameters that it has flattened, and the flat ones.

    Args:
        params: the parameters of one group.
    """
    if any(getattr(param, "_fsdp_flattened", False) for param in params) and torch.distributed.is_initialized():
        return "FSDP1" if torch.distributed.get_world_size() > 1 else None
    alone = "deepspeed" in sys.modules and len(params) == 1
    return "DeepSpeed" if alone and type(params[0]) is torch.Tensor and params[0].dim() == 1 else None

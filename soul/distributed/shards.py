"""What of a parameter this process holds: all of it, a shard of a DTensor (FSDP2, tensor parallelism), or a piece that does
not say of what it is one (DeepSpeed's ZeRO, FSDP1).
"""

import sys

import torch

APART = 1 << 40  # between the numbers of shards that do not follow one another: more than any has elements


def is_sharded(tensor):
    """Tells whether this is a DTensor, without importing it."""
    return hasattr(tensor, "device_mesh")


def local(tensor):
    """The tensor, or the shard of a DTensor that this process holds."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def splits(placement):
    """Tells whether processes hold different parts (Shard, and the _StridedShard of FSDP over tensor parallelism)."""
    return not placement.is_replicate() and not placement.is_partial()


def is_cut(param):
    """Tells whether other processes hold other parts of this parameter."""
    return is_sharded(param) and any(map(splits, param.placements))


def first_number(param):
    """The number of the first element that this process holds, for the noise of the parameter.

    Elements are numbered in the order of memory. Shards of rows, which FSDP2 makes, with or without tensor parallelism by rows
    below it, have the numbers that they have in the whole parameter: all processes together draw what one process draws.
    Other shards have numbers of their own, and replicas of one the same.
    """
    if not is_cut(param) or not param.numel():
        return 0
    mesh = param.device_mesh
    cuts = [(p, mesh.size(dim), mesh.get_local_rank(dim)) for dim, p in enumerate(param.placements) if splits(p)]
    dense = torch.empty_like(local(param), device="meta")
    length = param.numel() // len(param)  # of a row
    if all(placement.dim == 0 for placement, _, _ in cuts) and (not len(dense) or dense.stride(0) == length):
        first, rows = 0, len(param)
        for _, size, rank in sorted(cuts, key=lambda cut: hasattr(cut[0], "split_factor")):  # _StridedShard cuts shards
            step = -(-rows // size)
            skipped = min(rank * step, rows)
            first, rows = first + skipped, min(step, rows - skipped)
        return first * length
    shard = 0
    for _, size, rank in cuts:
        shard = shard * size + rank
    return (1 + shard) * APART


def place(param):
    """Where a parameter lies: its device, and how it is sharded. Parameters of one place are stepped together."""
    return (local(param).device, param.device_mesh, param.placements) if is_sharded(param) else (param.device, None, ())


def hidden_sharding(params):
    """Return who has cut parameters into pieces that do not say so: "DeepSpeed", "FSDP1", or None for nobody.

    DeepSpeed's ZeRO replaces the parameters of a group by one flat piece of all of them, a plain tensor; with stage 3 it steps
    one piece after the other. FSDP1 marks the parameters that it has flattened, and the flat ones.

    Args:
        params: the parameters of one group.
    """
    if any(getattr(param, "_fsdp_flattened", False) for param in params) and torch.distributed.is_initialized():
        return "FSDP1" if torch.distributed.get_world_size() > 1 else None
    alone = "deepspeed" in sys.modules and len(params) == 1
    return "DeepSpeed" if alone and type(params[0]) is torch.Tensor and params[0].dim() == 1 else None

"""What of a parameter this process holds: all of it, or a shard of a DTensor (FSDP2, tensor parallelism)."""


def is_sharded(tensor):
    """Tells whether this is a DTensor, without importing it."""
    return hasattr(tensor, "device_mesh")


def local(tensor):
    """The tensor, or the shard of a DTensor that this process holds."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def splits(placement):
    """Tells whether processes hold different parts (Shard, and the _StridedShard of FSDP over tensor parallelism)."""
    return not placement.is_replicate() and not placement.is_partial()


def place(param):
    """Where a parameter lies: its device, and how it is sharded. Parameters of one place are stepped together."""
    return (local(param).device, param.device_mesh, param.placements) if is_sharded(param) else (param.device, None, ())

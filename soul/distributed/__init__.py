"""Several processes: the group that torchrun starts (`processes`), the piece of a tensor that each one holds (`shards`), head
and embeddings that stay in shards (`vocabulary`), and a model that one of them has read, cut into the shards of all
(`scatter`), or that one of them writes (`gather`).

May import: output.
Start reading with `processes`.
"""

from soul.distributed.processes import Processes, check_supported, exit_process, launched, shard, started

__all__ = ["Processes", "check_supported", "exit_process", "launched", "shard", "started"]

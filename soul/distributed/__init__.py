"""Several processes: the group that torchrun starts (`processes`), and the piece of a tensor that each one holds (`shards`).

May import: output.
Start reading with `processes`.
"""

from soul.distributed.processes import Processes, check_supported, exit_process, launched, shard, started

__all__ = ["Processes", "check_supported", "exit_process", "launched", "shard", "started"]

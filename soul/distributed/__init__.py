"""Several processes: the group that torchrun starts (`processes`), and the share that each holds of a tensor (`shards`).

May import: output. Start with `processes`.
"""

from soul.distributed.processes import Processes, check_supported, exit_process, launched, shard, started

__all__ = ["Processes", "check_supported", "exit_process", "launched", "shard", "started"]

"""Checkpoints from which a run goes on bit for bit: of one process (`local`), of several (`sharded`), and their `format`. The
final model, as Hugging Face's files (`saving`).

May import: _extras, distributed, models, output.
Start reading with `local`.
"""

from soul.checkpoint.local import Checkpoints, Stopped, describe, has_ended
from soul.checkpoint.saving import save_model

__all__ = ["Checkpoints", "Stopped", "describe", "has_ended", "save_model"]

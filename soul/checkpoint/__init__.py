"""Checkpoints: whatever stops a run, it can continue from its last checkpoint bit for bit.

`local` has those of one process, `sharded` those of several, `format` the content that both write. May import: models,
distributed, output, and below. Start with `local`.
"""

from soul.checkpoint.local import Checkpoints, Stopped, describe, has_ended, save_model

__all__ = ["Checkpoints", "Stopped", "describe", "has_ended", "save_model"]

"""Whether forgetting lasts: a model is attacked, and asked again (`run`); what the attacks do (`attacks`); rows (`rows`).

May import: _extras, data, evaluate, models, run.
Start reading with `run`.
"""

from soul.durability.run import ATTACKS, DurabilityConfig, Outcome, durability

__all__ = ["ATTACKS", "DurabilityConfig", "Outcome", "durability"]

"""Memory and time of a run, computed before it starts::

    plan = soul.plan.plan("llama-2-7b", soul.UnlearnConfig(state_dtype="8bit"), length=512, card="h100")
    print(plan.table())
    plan.peak_bytes, plan.peak_phase, plan.step_seconds

Everything is computed from shapes and options, and nothing measured here; tests compare the bytes with those that a small model
takes. What the CUDA context, workspaces of libraries and fragments of the allocator take is not counted.
"""

from soul.plan._case import Case, Tokens
from soul.plan._plan import Plan, plan
from soul.plan.cards import CARDS, Card, card_of
from soul.plan.shapes import PRESETS, Shape, shape_of

__all__ = ["CARDS", "PRESETS", "Card", "Case", "Plan", "Shape", "Tokens", "card_of", "plan", "shape_of"]

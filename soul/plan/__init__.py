"""Memory and time of a run, computed before it starts::

    plan = soul.plan.plan("llama-2-7b", soul.UnlearnConfig(state_dtype="8bit"), length=512, card="h100")
    print(plan.table())
    plan.peak_bytes, plan.peak_phase, plan.step_seconds

Everything is computed from shapes and options; nothing is measured here. Tests compare the planned bytes with those that a
small model takes. The CUDA context, workspaces of libraries and the allocator's fragmentation are not counted.

Start reading at `planner`. `case` holds the checked input, `shapes` and `cards` the models and GPUs, `memory` and `activations`
count bytes, `time` counts seconds, `run` plans a run on its own data, and `scaling` writes docs/scaling.md. The wing may
import data, models, optimizers and runs, but nothing of the study.
"""

from soul.plan.cards import CARDS, Card, card_of
from soul.plan.case import Case, Tokens
from soul.plan.planner import Plan, plan
from soul.plan.shapes import PRESETS, Shape, shape_of

__all__ = ["CARDS", "PRESETS", "Card", "Case", "Plan", "Shape", "Tokens", "card_of", "plan", "shape_of"]

"""Memory and time of a run, computed from shapes and options before it starts; nothing is measured.

May import: _connection, _extras, data, distributed, losses, models, optim, output, run.
Start reading with `planner`, then `memory` and `activations` for bytes and `time` for seconds; `ways` plans many options.
"""

from soul.plan.cards import CARDS, Card, card_of
from soul.plan.case import Case, Tokens
from soul.plan.planner import Plan, plan
from soul.plan.shapes import PRESETS, Shape, shape_of
from soul.plan.ways import Way, Ways, ways

__all__ = ["CARDS", "PRESETS", "Card", "Case", "Plan", "Shape", "Tokens", "Way", "Ways", "card_of", "plan", "shape_of", "ways"]

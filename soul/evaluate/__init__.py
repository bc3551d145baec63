"""Evaluation of what a model still knows: the runs of models (`model`), the formulas (`metrics`), TOFU's log files (`logs`).

May import: _connection, _extras, data, models, output.
Start reading with `model`.
"""

from soul.evaluate.model import EvaluateConfig, answer_probability

__all__ = ["EvaluateConfig", "answer_probability"]

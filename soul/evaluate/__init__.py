"""Evaluation: what a model still knows. `metrics` has the formulas, `model` runs models, `logs` reads and writes TOFU's files.

May import: models, data, output, and what those may import. Start reading with `model`.
"""

from soul.evaluate.model import EvaluateConfig, answer_probability

__all__ = ["EvaluateConfig", "answer_probability"]

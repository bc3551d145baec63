"""Data: names and files -> rows -> examples -> token ids -> batches.

Start with `examples`; `sources` reads benchmarks, hub data sets and files, `templates` puts question and answer together,
`batches` pads and orders. May import: nothing of ``soul`` but ``_extras`` and ``_limits``.
"""

from soul.data.examples import Counts, Example, Question, Sequence, encode, pair_refusals, refuse
from soul.data.templates import Template

__all__ = ["Counts", "Example", "Question", "Sequence", "Template", "encode", "pair_refusals", "refuse"]

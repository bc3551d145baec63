"""Data: names and files -> rows -> examples -> token ids -> batches.

`rows` reads files, and `sources` reads benchmarks and hub data sets as well. `templates` puts question and answer together,
`examples` turns texts into token ids, and `batches` pads and orders them. Start with `examples`.
May import: nothing of ``soul`` but ``_extras`` and ``_limits``.
"""

from soul.data.batches import Batch, collate
from soul.data.examples import (
    REFUSALS,
    TEMPLATE,
    Counts,
    Example,
    Question,
    Sequence,
    encode,
    pair_refusals,
    read_refusals,
    refuse,
)
from soul.data.templates import Template

__all__ = [
    "REFUSALS",
    "TEMPLATE",
    "Batch",
    "Counts",
    "Example",
    "Question",
    "Sequence",
    "Template",
    "collate",
    "encode",
    "pair_refusals",
    "read_refusals",
    "refuse",
]

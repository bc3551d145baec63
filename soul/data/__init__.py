"""Data: names and files (`sources`, `rows`) -> questions and answers (`templates`) -> token ids (`examples`) -> `batches`.

May import: _connection, _extras, _limits.
Start reading with `examples`.
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

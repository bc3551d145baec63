"""Hugging Face causal language models: loading them, their body and head, adapters, and the reference model (`ref_model`).

May import: _connection, _extras, data, distributed, output.
Start reading with `causal_lm`, which takes a model apart, then `head_call`, which runs one whole with a function as its head.
"""

from soul.models.adapters import add_adapters
from soul.models.causal_lm import (
    as_reference,
    check_linear_head,
    checkpointing,
    compiled,
    evaluating,
    gnb_loss,
    has_adapters,
    head,
    hidden_states,
    token_logps,
    token_statistics,
    trained,
    transform,
)
from soul.models.encoding import encode_for
from soul.models.loading import load, pick_device
from soul.models.ref_model import ReferenceStates, reference_head, reference_hidden, reference_logps

__all__ = [
    "ReferenceStates",
    "add_adapters",
    "as_reference",
    "check_linear_head",
    "checkpointing",
    "compiled",
    "encode_for",
    "evaluating",
    "gnb_loss",
    "has_adapters",
    "head",
    "hidden_states",
    "load",
    "pick_device",
    "reference_head",
    "reference_hidden",
    "reference_logps",
    "token_logps",
    "token_statistics",
    "trained",
    "transform",
]

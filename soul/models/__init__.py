"""Hugging Face causal language models: a body that yields hidden states, a head, adapters, and the reference model.

`loading` and `adapters` make a model, and `files` checks a model's files before they are read. `causal_lm` takes a model apart
into body and head; `head_call` runs it whole, with a function in the place of the head. `ref_model` computes log-probabilities
and hidden states of the model before unlearning, and `encoding` makes token ids that fit a model. Start with `causal_lm`.
May import: data, distributed, output, and what those may import.
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

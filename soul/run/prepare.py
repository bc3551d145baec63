"""Preparation of a run: checks that model, data and options fit together, and the encoding of examples as token ids."""

import warnings
from typing import TYPE_CHECKING

import torch

from soul.data.examples import Counts, Example, Sequence, pair_refusals, refuse
from soul.distributed.processes import Processes, check_shards, check_supported
from soul.distributed.shards import is_sharded
from soul.losses import Objective
from soul.models.causal_lm import check_checkpointing, check_weights, head, trained
from soul.models.encoding import encode_for
from soul.models.ref_model import check_cache
from soul.run.config import MEMORIZE, UnlearnConfig
from soul.run.influence import Influence
from soul_kernels.backends import resolve_backend
from soul_kernels.errors import argument_error

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def prepare(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    forget: list[Example],
    retain: list[Example],
    config: UnlearnConfig,
    counts: dict[str, Counts] | None = None,
) -> tuple[list[Sequence], list[Sequence]]:
    """Check that everything fits together, and encode both sets.

    Args:
        model: a Hugging Face causal language model.
        tokenizer: its tokenizer.
        forget: examples to forget.
        retain: examples to retain; may be empty for objectives without a retain term.
        config: `UnlearnConfig`.
        counts: "forget" and, with a retain set, "retain" -> the `soul.data.Counts` that get the numbers of truncated and split
            texts; or None. If refusals replace the answers, the refusals are counted; in pairs, the answers are.

    Returns:
        The sequences to forget, answered by refusals or paired with them if the objective asks for it, and those to retain.

    Raises:
        ArgumentError: the data do not fit the model or the objective, a weight of the model is not finite, no weight requires a
            gradient, the backend does not fit the model's device, or ``reference_cache`` cannot be written.
    """
    objective = config.objective()
    counts = counts or {}
    _check_fit(model, forget, retain, config, objective)
    if objective.pairs:
        paired = pair_refusals(forget, config.refusal_texts(), config.seed)
        answers = encode_for(model, tokenizer, paired[0::2], config, "forget", counts.get("forget"))
        refusals = encode_for(model, tokenizer, paired[1::2], config, "forget")
        encoded = [sequence for pair in zip(answers, refusals) for sequence in pair]
    else:
        if objective.relabels:
            forget = refuse(forget, config.refusal_texts(), config.seed)
        name = "data" if config.method == MEMORIZE else "forget"
        encoded = encode_for(model, tokenizer, forget, config, name, counts.get("forget"))
    return encoded, encode_for(model, tokenizer, retain, config, "retain", counts.get("retain"))


def _check_fit(
    model: "PreTrainedModel",
    forget: list[Example],
    retain: list[Example],
    config: UnlearnConfig,
    objective: Objective | Influence,
) -> None:
    """Raise unless model, data and options fit together, as far as this can be seen before anything is encoded."""
    check_shards(model)
    check_weights(model)
    if Processes.of(model).size > 1:
        check_supported(config)
    if getattr(objective, "alpha", 0) and not retain:
        remedy = "give a retain set" if config.method == "influence" else "give a retain set, or set alpha to 0"
        raise argument_error("retain", f"examples for {objective}", "none", remedy)
    if config.accumulate > 1 and objective.additive is None:
        remedy = "its loss is not a sum over sequences: raise --batch-size instead"
        raise argument_error("accumulate", f"1 with {objective}", config.accumulate, remedy)
    if config.curvature != "unlearn" and not retain:
        remedy = "give a retain set, or choose the curvature 'unlearn'"
        raise argument_error("retain", f"examples for the curvature {config.curvature!r}", "none", remedy)
    if config.stop_retain_prob is not None and not retain:
        raise argument_error("stop_retain_prob", "None without a retain set", config.stop_retain_prob, "give a retain set")
    if not forget:
        raise argument_error("forget", "at least one example", "none", "there is nothing to unlearn")
    trained(model)
    if config.gradient_checkpointing:
        check_checkpointing(model)
    _check_device(config, head(model)[0])
    check_cache(config.reference_cache, "reference_cache")
    check_no_overlap(forget, retain)


def check_no_overlap(forget: list[Example], retain: list[Example]) -> None:
    """Raise if both sets have the same rows; warn if they share some, since no row can be kept and forgotten at once."""
    shared = set(forget) & set(retain)
    if shared and len(shared) == len(set(forget)) == len(set(retain)):
        remedy = "no row can be kept and forgotten at once: check the files"
        raise argument_error("retain", "other rows than forget", f"the same {len(shared)}", remedy)
    if shared:
        warnings.warn(f"retain: {len(shared)} of the {len(set(forget))} rows to forget are in it too", stacklevel=1)


def _check_device(config: UnlearnConfig, weight: torch.Tensor) -> None:
    """Raise unless the options can run on the device of the model."""
    if config.cuda_graph and not weight.is_cuda:
        remedy = "no other device has such graphs: leave it out"
        raise argument_error("cuda_graph", "a model on a GPU", str(weight.device), remedy)
    if config.state_offload and weight.device.type == "cpu":
        warnings.warn(
            "state_offload: on a CPU the states are in main memory anyway; leave it out, it only adds copies", stacklevel=1
        )
    if config.head_in_shards and not is_sharded(weight):
        warnings.warn("head_in_shards: one process has the whole head; leave it out, it changes nothing", stacklevel=1)
    resolve_backend(config.backend, weight)

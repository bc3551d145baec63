"""What a run needs of its data before it starts: encoded sequences, and that everything fits together."""

import warnings

from soul.data.examples import pair_refusals, refuse
from soul.distributed.processes import Processes, check_shards, check_supported
from soul.models.causal_lm import check_checkpointing, check_weights, head, trained
from soul.models.encoding import encode_for
from soul.models.ref_model import check_cache
from soul_kernels.backends import resolve_backend
from soul_kernels.errors import argument_error


def prepare(model, tokenizer, forget, retain, config, counts=None):
    """Encodes both sets for a config: the forget set answered by refusals, or paired with them, as the objective asks.

    ``counts``, where given, has a `soul.data.Counts` for "forget" and one for "retain", which get what was cut (the answers of
    pairs are counted, and refusals in their place are).

    Raises:
        ArgumentError: the data do not fit the model or the objective, a weight of the model is not finite, none requires a
            gradient, the backend does not fit the model's device, or there can be no cache in the config's directory.
    """
    objective, counts = config.objective(), counts or {}
    check_shards(model)
    check_weights(model)
    if Processes.of(model).size > 1:
        check_supported(config)
    if getattr(objective, "alpha", 0) and not retain:
        remedy = "give a retain set" + ", or set alpha to 0" * (config.method != "influence")
        raise argument_error("retain", f"examples for {objective}", "none", remedy)
    if config.accumulate > 1 and objective.additive is None:
        expected, remedy = f"1 with {objective}", "its loss is not a sum over sequences: raise --batch-size instead"
        raise argument_error("accumulate", expected, config.accumulate, remedy)
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
    _check_place(config, head(model)[0])
    check_cache(config.reference_cache, "reference_cache")
    _check_differ(forget, retain)
    if objective.pairs:
        paired = pair_refusals(forget, config.refusal_texts(), config.seed)
        answers = encode_for(model, tokenizer, paired[0::2], config, "forget", counts.get("forget"))
        refusals = encode_for(model, tokenizer, paired[1::2], config, "forget")
        encoded = [sequence for pair in zip(answers, refusals) for sequence in pair]
    else:
        if objective.relabels:
            forget = refuse(forget, config.refusal_texts(), config.seed)
        encoded = encode_for(model, tokenizer, forget, config, "forget", counts.get("forget"))
    return encoded, encode_for(model, tokenizer, retain, config, "retain", counts.get("retain"))


def _check_differ(forget, retain):
    """Raise if both sets have the same rows; warn if they share some: these are to be kept and forgotten at once."""
    shared = set(forget) & set(retain)
    if shared and len(shared) == len(set(forget)) == len(set(retain)):
        remedy = "nothing can be kept and forgotten at once: check the files"
        raise argument_error("retain", "other rows than forget", f"the same {len(shared)}", remedy)
    if shared:
        warnings.warn(f"retain: {len(shared)} of the {len(set(forget))} rows to forget are in it too", stacklevel=1)


def _check_place(config, weight):
    if config.cuda_graph and not weight.is_cuda:
        raise argument_error("cuda_graph", "a model on a GPU", str(weight.device), "leave it out")
    resolve_backend(config.backend, weight)

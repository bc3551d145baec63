"""The plan of a run of ``soul unlearn``: from the model's configuration and the files themselves; no weight is read."""

import dataclasses

from soul._extras import require
from soul.plan._case import Tokens, check_plannable
from soul.plan._plan import plan
from soul.plan.shapes import PRESETS, SHORT, empty_model, read_config, shape_of
from soul.run.feed import micro_batches, order_of, sequence_indices, sequences_per_example
from soul.run.prepare import prepare
from soul.run.unlearner import Unlearner
from soul_kernels.errors import argument_error


def plan_run(model, forget, retain, config, **options):
    """Plans a run with the token counts of its data: the memory is that of its largest micro-batch, the time that of all steps.

    Args:
        model: directory or hub name; configuration and tokenizer are read, weights are not.
        forget: as `soul.Unlearner` takes it.
        retain: the same, or None.
        config: `UnlearnConfig`.
        **options: those of `soul.plan.plan`, without ``tokens``, ``length`` and ``steps``.

    Returns:
        `Plan`; the time of the whole run only on one GPU.

    Raises:
        ArgumentError: what would keep the run itself from starting, as far as it can be seen without weights and GPU.
    """
    check_plannable(config)
    if str(model) in (*PRESETS, *SHORT):
        remedy = "pass a directory or a hub name, or use: soul plan"
        raise argument_error("model", "a model with a tokenizer", f"the preset {model!r}", remedy)
    empty = empty_model(read_config(model))
    try:
        tokenizer = require("transformers", "hf").AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except Exception as error:  # whatever the libraries below say of a broken tokenizer
        raise argument_error("model", "a model with a tokenizer", f"{model} ({type(error).__name__})", "check it") from error
    anywhere = dataclasses.replace(config, backend="reference", cuda_graph=False)  # the run's own machine is another one
    run = Unlearner(empty, forget, retain, anywhere, tokenizer=tokenizer)  # which checks all that can be checked
    data = prepare(empty, tokenizer, *run.examples, anywhere)
    steps = list(_steps(config, *data))
    micro = [tokens for batches in steps for tokens in batches]
    largest = {max(micro, key=lambda t: (t.n, t.n_labelled)), max(micro, key=lambda t: (t.n_labelled, t.n))}
    shape = dataclasses.replace(shape_of(empty), name=str(model))
    whole = steps if options.get("gpus", 1) == 1 else None
    plans = [plan(shape, config, tokens, steps=whole, **options) for tokens in largest]
    return max(plans, key=lambda found: found.peak_bytes)


def _steps(config, forget, retain):
    """Yields the micro-batches of each step as `Tokens`, in the order in which `soul.run.loop.unlearn` takes them."""
    objective = config.objective()
    n, of = sequences_per_example(objective), None if objective.divergence is None else objective.divergence.of
    for _, examples, kept in order_of(forget, retain, n, config):
        yield [
            _tokens([forget[i] for i in sequence_indices(part, n)], [retain[i] for i in others], of)
            for part, others in micro_batches(examples, kept, config.batch_size)
        ]


def _tokens(forget, retain, of):
    lengths = [len(sequence.input_ids) for sequence in (*forget, *retain)]
    labelled = [sum(sequence.n_labels for sequence in part) for part in (forget, retain)]
    compared = {None: 0, "forget": labelled[0], "retain": labelled[1], "all": sum(labelled)}[of]
    return Tokens(len(lengths), max(lengths), sum(labelled), compared, padded=min(lengths) < max(lengths))

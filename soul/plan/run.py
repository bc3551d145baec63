"""The plan of a run of ``soul unlearn``, from the model's configuration and the data files; no weight is read."""

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from soul._extras import require
from soul.data.examples import Sequence as TokenSequence
from soul.plan.case import Tokens, objective_of
from soul.plan.planner import Plan, plan
from soul.plan.shapes import PRESETS, SHORT_NAMES, empty_model, read_config, shape_of
from soul.run.config import UnlearnConfig
from soul.run.feed import micro_batches, order_of, sequence_indices, sequences_per_example
from soul.run.prepare import prepare
from soul.run.unlearner import Unlearner
from soul_kernels.errors import argument_error


def plan_run(
    model: str | os.PathLike[str],
    forget: str | os.PathLike[str] | Iterable[Mapping[str, Any]],
    retain: str | os.PathLike[str] | Iterable[Mapping[str, Any]] | None,
    config: UnlearnConfig,
    **options: Any,
) -> Plan:
    """Plan a run with the token counts of its data: the memory of its largest micro-batch, and the time of all its steps.

    Args:
        model: directory or hub name; configuration and tokenizer are read, weights are not.
        forget: the forget set, as `soul.Unlearner` takes it.
        retain: the retain set, or None.
        config: `UnlearnConfig`.
        **options: those of `soul.plan.plan`, without ``tokens``, ``length`` and ``steps``.

    Returns:
        `Plan`; with the time of the whole run only on one GPU.

    Raises:
        ArgumentError: the run itself would not start, as far as this can be seen without weights and a GPU.
    """
    objective_of(config)  # checks that the run can be planned
    if str(model) in (*PRESETS, *SHORT_NAMES):
        remedy = "pass a directory or a hub name, or use: soul plan"
        raise argument_error("model", "a model with a tokenizer", f"the preset {model!r}", remedy)
    empty = empty_model(read_config(model))
    try:
        tokenizer = require("transformers", "hf").AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except Exception as error:  # the libraries raise many kinds for a broken tokenizer
        raise argument_error("model", "a model with a tokenizer", f"{model} ({type(error).__name__})", "check it") from error
    portable = dataclasses.replace(config, backend="reference", cuda_graph=False)  # the run may be meant for another machine
    run = Unlearner(empty, forget, retain, portable, tokenizer=tokenizer)  # checks all that can be checked here
    sequences = prepare(empty, tokenizer, *run.examples, portable)
    steps = list(_steps(config, *sequences))
    sizes = [tokens for batches in steps for tokens in batches]
    largest = {max(sizes, key=lambda t: (t.n, t.n_labelled)), max(sizes, key=lambda t: (t.n_labelled, t.n))}
    shape = dataclasses.replace(shape_of(empty), name=str(model))
    timed_steps = steps if options.get("gpus", 1) == 1 else None
    plans = [plan(shape, config, tokens, steps=timed_steps, **options) for tokens in largest]
    return max(plans, key=lambda candidate: candidate.peak_bytes)


def _steps(config: UnlearnConfig, forget: list[TokenSequence], retain: list[TokenSequence]) -> Iterator[list[Tokens]]:
    """Yield the `Tokens` of the micro-batches of each step, in the order in which `soul.run.loop.unlearn` takes them."""
    objective = objective_of(config)
    per_example = sequences_per_example(objective)
    compared_set = None if objective.divergence is None else objective.divergence.of
    for _, forget_examples, retain_indices in order_of(forget, retain, per_example, config):
        yield [
            _tokens([forget[i] for i in sequence_indices(of_forget, per_example)], [retain[i] for i in of_retain], compared_set)
            for of_forget, of_retain in micro_batches(forget_examples, retain_indices, config.batch_size)
        ]


def _tokens(forget: Sequence[TokenSequence], retain: Sequence[TokenSequence], compared_set: str | None) -> Tokens:
    """Return the size of a micro-batch; ``compared_set`` names the set on which the divergence is computed."""
    lengths = [len(sequence.input_ids) for sequence in (*forget, *retain)]
    n_forget = sum(sequence.n_labels for sequence in forget)
    n_retain = sum(sequence.n_labels for sequence in retain)
    n_labelled = n_forget + n_retain
    compared = {None: 0, "forget": n_forget, "retain": n_retain, "all": n_labelled}[compared_set]
    return Tokens(len(lengths), max(lengths), n_labelled, compared, padded=min(lengths) < max(lengths))

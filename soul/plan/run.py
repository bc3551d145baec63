"""The plan of a run of ``soul unlearn``, from the model's configuration and the data files; no weight is read."""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from soul._connection import hub_asked_once
from soul._extras import MissingExtra, require
from soul.data.examples import Counts
from soul.data.examples import Sequence as TokenSequence
from soul.data.sources import Source
from soul.plan.case import Tokens, objective_of
from soul.plan.planner import Plan, plan
from soul.plan.shapes import PRESETS, SHORT_NAMES, Shape, empty_model, read_config, shape_of
from soul.run.config import UnlearnConfig
from soul.run.feed import micro_batches, order_of, sequence_indices, sequences_per_example
from soul.run.prepare import prepare
from soul.run.unlearner import Unlearner
from soul_kernels.errors import argument_error

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class RunInputs(NamedTuple):
    """What a plan needs of a run, read once; the configs that it is planned with may differ in memory and batch size.

    Attributes:
        shape: the model's `Shape`.
        forget: the forget sequences, in pairs if the objective asks for them.
        retain: the retain sequences.
        counts: "forget" and "retain" -> the `soul.data.Counts` of their rows.
    """

    shape: Shape
    forget: list[TokenSequence]
    retain: list[TokenSequence]
    counts: dict[str, Counts]


def plan_run(
    model: str | os.PathLike[str],
    forget: Source,
    retain: Source | None,
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
    return plan_inputs(read_inputs(model, forget, retain, config), config, **options)


def read_inputs(
    model: str | os.PathLike[str],
    forget: Source,
    retain: Source | None,
    config: UnlearnConfig,
) -> RunInputs:
    """Return what a plan needs of a run; arguments and errors as those of `plan_run`."""
    tokenizer = read_tokenizer(model)
    empty = empty_model(read_config(model))
    portable = dataclasses.replace(config, backend="reference", cuda_graph=False)  # the run may be meant for another machine
    run = Unlearner(empty, forget, retain, portable, tokenizer=tokenizer)  # checks all that can be checked here
    sequences = prepare(empty, tokenizer, *run.examples, portable)
    return RunInputs(dataclasses.replace(shape_of(empty), name=str(model)), *sequences, run.counts)


def read_tokenizer(model: str | os.PathLike[str]) -> "PreTrainedTokenizerBase":
    """Return the tokenizer of a directory or a hub name.

    Raises:
        ArgumentError: there is no such model, or it has no tokenizer, or a broken one.
    """
    if str(model) in (*PRESETS, *SHORT_NAMES):
        remedy = "pass a directory or a hub name, or use: soul plan"
        raise argument_error("model", "a model with a tokenizer", f"the preset {model!r}", remedy)
    read_config(model)  # a wrong path is named before the tokenizer is missed
    try:
        transformers = require("transformers", "hf")
        with hub_asked_once("model", model):
            return transformers.AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except MissingExtra:
        raise
    except Exception as error:  # the libraries raise many kinds for a broken tokenizer
        raise argument_error("model", "a model with a tokenizer", f"{model} ({type(error).__name__})", "check it") from error


def plan_inputs(inputs: RunInputs, config: UnlearnConfig, **options: Any) -> Plan:
    """Plan a run whose model and data have been read; ``options`` and errors as those of `plan_run`."""
    steps = list(_steps(config, inputs.forget, inputs.retain))
    sizes = [tokens for batches in steps for tokens in batches]
    largest = {max(sizes, key=lambda t: (t.n, t.n_labelled)), max(sizes, key=lambda t: (t.n_labelled, t.n))}
    timed_steps = steps if options.get("gpus", 1) == 1 else None
    plans = [plan(inputs.shape, config, tokens, steps=timed_steps, **options) for tokens in largest]
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
    return Tokens(len(lengths), max(lengths), n_labelled, compared)

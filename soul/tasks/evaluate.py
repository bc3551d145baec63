"""The numbers of a model on a task: rows are read and checked, then the model runs over them.

`prepare_task` does all that needs no model, so that a wrong column or a missing package is named before weights are loaded;
`evaluate_task` runs a model over what it has prepared, once or for several models.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from soul._extras import require
from soul.data import sources
from soul.data.examples import REFUSALS, Example, Sequence, encode, read_refusals
from soul.data.instructions import instruct, instruct_template
from soul.data.rows import Row, check_text
from soul.data.templates import CHAT, Template
from soul.evaluate import metrics
from soul.evaluate.model import EvaluateConfig, answer_columns, generate
from soul.models.encoding import encode_for
from soul.tasks.measures import MEASURES, NEED_NO_ANSWER, Scorer, SetOutputs, direction_of
from soul.tasks.task import Task, TaskSet
from soul_kernels.errors import argument_error, check_whole

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

NO_ANSWER = "-"  # stands for the answer of a row that is only a prompt
PRIVACY = "privacy_min_k_auc"


class _Lengths(NamedTuple):
    """How long rows are encoded, for `soul.models.encoding.encode_for`."""

    max_length: int
    long_texts: str


class PreparedTask(NamedTuple):
    """A task whose rows have been read.

    Attributes:
        task: the task.
        rows: set -> its rows.
        with_answers: names of the sets whose rows have answers.
        refusals: texts that count as a refusal.
    """

    task: Task
    rows: Mapping[str, list[Row]]
    with_answers: Collection[str]
    refusals: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """What `evaluate_task` returns.

    Attributes:
        numbers: ``{set}_{suffix}`` -> number.
        rows: set -> measure -> a number for every row.
        texts: set -> triples of prompt, what the model says, and the answer of the row; of the sets on which it was asked.
    """

    numbers: dict[str, float]
    rows: dict[str, dict[str, list[float]]]
    texts: dict[str, list[tuple[str, str, str]]]


def roles_of(task: Task) -> dict[str, str]:
    """Return set -> role, longer names first, so that the set of a number is found by its name."""
    return {name: task.sets[name].role for name in sorted(task.sets, key=len, reverse=True)}


def directions(task: Task, numbers: Collection[str]) -> dict[str, str]:
    """Return name of a number -> "higher", "lower" or "neither": which values are better."""
    roles = roles_of(task)
    return {name: direction_of(name, roles) for name in numbers}


def prepare_task(task: Task, *, most_rows: int | None = None) -> PreparedTask:
    """Read the rows of all sets of a task, and check that its measures can be computed.

    Args:
        task: the task.
        most_rows: rows of a set, at most, the first ones; None: all.

    Raises:
        ArgumentError: a source or the file of refusals cannot be read, or rows lack a column that a measure needs.
        MissingExtra: the package of a measure is not installed.
    """
    if most_rows is not None:
        check_whole("rows", most_rows, "leave it out to take all")
    for of_set in task.sets.values():
        for measure in of_set.measures:
            for module, extra in MEASURES[measure].packages:
                require(module, extra)
    if task.privacy is not None:
        require("sklearn.metrics", "eval")
    refusals = read_refusals(task.refusals) if task.refusals else REFUSALS
    rows = {}
    with_answers = []
    for name, of_set in task.sets.items():
        if _asks_only(of_set):
            rows[name] = _prompts(of_set.source)
        else:
            rows[name] = sources.rows(of_set.source, name, drop=True)
            with_answers.append(name)
            has_prompt = any(column in rows[name][0][1] for column in ("question", "prompt", "messages"))
            if _generates(of_set) and not has_prompt:
                expected = f"rows with a prompt, for {', '.join(of_set.measures)}"
                raise argument_error(f"{task.name}, {name}", expected, "texts alone", "take another source")
        rows[name] = rows[name][:most_rows]
    return PreparedTask(task, rows, with_answers, refusals)


def evaluate_task(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prepared: PreparedTask,
    config: EvaluateConfig,
    *,
    instruction: str | None = None,
    scorer: Scorer | None = None,
    progress: Callable[[str], object] = print,
) -> TaskResult:
    """Return the numbers of a model on a task. The model's weights are unchanged.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        prepared: from `prepare_task`.
        config: how it is asked.
        instruction: a text that stands before everything it is asked; or None.
        scorer: of toxicity, from `soul.tasks.toxicity.scorer_of`, for a task that measures it.
        progress: called with a line of text for every set.

    Raises:
        ArgumentError: as `check_task`, or a row does not fit the model; or the task needs a scorer, and there is none.
    """
    task = prepared.task
    if needs_scorer(task) and scorer is None:
        raise argument_error("scorer", f"a scorer of toxicity for the task {task.name}", "None", "see soul.tasks.scorer_of")
    examples = _examples(prepared, tokenizer, config, instruction)
    # Everything is encoded before anything runs, since a run may take hours.
    sequences = {}
    for name, made in examples.items():
        sequences[name] = encode_for(model, tokenizer, made, _lengths(task.sets[name], config), name)
        _check_room(name, task.sets[name], sequences[name], model.config, config)
    result = TaskResult({}, {}, {})
    for name, of_set in task.sets.items():
        progress(f"{name}: {len(sequences[name])} rows")
        has_answers = name in prepared.with_answers
        truths = [example.content if has_answers else "" for example in examples[name]]
        columns: Mapping[str, Any] = {}
        if any(not MEASURES[measure].generates for measure in of_set.measures):
            columns = answer_columns(model, tokenizer, sequences[name], config)
        texts: list[str] = []
        if _generates(of_set):
            # Text beyond the longest answer could only blur the comparison with the answers.
            longest = max(sequence.n_labels for sequence in sequences[name]) if has_answers else config.max_new_tokens
            longest = min(longest, config.max_new_tokens)
            texts = generate(model, tokenizer, sequences[name], batch_size=config.batch_size, max_new_tokens=longest)
            prompts = [example.prompt for example in examples[name]]
            result.texts[name] = list(zip(prompts, texts, truths))
        outputs = SetOutputs(truths, texts, columns, scorer, prepared.refusals)
        for measure in of_set.measures:
            score = MEASURES[measure].compute(outputs)
            result.rows.setdefault(name, {})[measure] = score.rows
            result.numbers.update({f"{name}_{suffix}": value for suffix, value in score.numbers.items()})
    if task.privacy is not None:
        learned, unseen = (torch.tensor(result.rows[name]["min_k"], dtype=torch.float64) for name in task.privacy)
        result.numbers[PRIVACY] = metrics.membership_auc(learned, unseen)
        if task.retrained is not None:
            result.numbers["privacy_leakage"] = metrics.privleak(result.numbers[PRIVACY], task.retrained)
    return result


def check_task(
    prepared: PreparedTask,
    tokenizer: "PreTrainedTokenizerBase",
    model_config: "PretrainedConfig",
    config: EvaluateConfig,
    *,
    instruction: str | None = None,
) -> None:
    """Raise for what `evaluate_task` would refuse, as far as tokenizer and configuration of a model show it.

    Raises:
        ArgumentError: there is no chat template, or a prompt with the answer to be generated has no room in the model.
    """
    for name, made in _examples(prepared, tokenizer, config, instruction).items():
        lengths = _lengths(prepared.task.sets[name], config)
        vocabulary = model_config.get_text_config().vocab_size
        split = lengths.long_texts == "split"
        sequences = encode(made, tokenizer, vocab_size=vocabulary, max_length=lengths.max_length, split=split, name=name)
        _check_room(name, prepared.task.sets[name], sequences, model_config, config)


def _examples(
    prepared: PreparedTask, tokenizer: "PreTrainedTokenizerBase", config: EvaluateConfig, instruction: str | None
) -> dict[str, list[Example]]:
    """Return set -> its rows as examples, with the instruction before their prompts."""
    template, system = config.template, config.system
    if instruction is not None:
        template, system = instruct_template(instruction, template, system)
    maker = Template(template, tokenizer, system)
    examples = {}
    for name, rows in prepared.rows.items():
        examples[name] = sources.examples(rows, maker)
        if instruction is not None:
            pairs = zip(examples[name], rows)
            examples[name] = [_instructed(instruction, example, row, template) for example, (_, row) in pairs]
    return examples


def _lengths(of_set: TaskSet, config: EvaluateConfig) -> _Lengths:
    """Return how the rows of a set are encoded: for perplexity in pieces, so that all of a text counts; otherwise cut."""
    return _Lengths(config.max_length, "split" if set(of_set.measures) == {"perplexity"} else config.long_texts)


def _generates(of_set: TaskSet) -> bool:
    return any(MEASURES[measure].generates for measure in of_set.measures)


def _check_room(
    name: str, of_set: TaskSet, sequences: list[Sequence], model_config: "PretrainedConfig", config: EvaluateConfig
) -> None:
    """Raise unless the model has positions for the longest prompt of a set and the answer to be generated."""
    positions = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    longest = max(sequence.prompt_length for sequence in sequences)
    if positions and _generates(of_set) and longest + config.max_new_tokens > positions:
        got = f"{config.max_new_tokens} after a prompt of {longest} tokens"
        remedy = f"pass --max-new-tokens {max(1, positions - longest)}, or take shorter prompts"
        raise argument_error(f"max_new_tokens, {name}", f"at most the {positions} positions of the model", got, remedy)


def needs_scorer(task: Task) -> bool:
    """Tell whether a task measures toxicity."""
    return any("toxicity" in of_set.measures for of_set in task.sets.values())


def _asks_only(of_set: TaskSet) -> bool:
    """Tell whether the rows of a set need no answers."""
    return set(of_set.measures) <= NEED_NO_ANSWER


def _instructed(instruction: str, example: Example, row: Mapping[str, Any], template: str) -> Example:
    """Return an example with the instruction before its prompt, unless its template has put it there."""
    is_templated = "question" in row or (example.frame is not None and template == CHAT)
    return example if is_templated else instruct(instruction, example)


def _prompts(source: str) -> list[Row]:
    """Return the prompts of a source as rows with a question or a prompt, and no answer of their own.

    A prompt is a column ``question``, a column ``prompt`` or, as in RealToxicityPrompts, the ``text`` within ``prompt``. A
    question goes through the template; a prompt is continued as it is.
    """
    rows: list[Row] = []
    for where, row in sources.read(source, "rows", _prompt_column):
        name = "question" if "question" in row else "prompt"
        value = row.get(name)
        text = value.get("text") if isinstance(value, Mapping) else value
        check_text(where, {**row, name: text}, name)
        answer = "answer" if name == "question" else "response"
        rows.append((where, {name: text, answer: NO_ANSWER}))
    return rows


def _prompt_column(where: str, names: Collection[str]) -> Collection[str]:
    for name in ("question", "prompt"):
        if name in names:
            return (name,)
    raise argument_error(where, "a column question or prompt", "/".join(names) or "none", "rename the columns")

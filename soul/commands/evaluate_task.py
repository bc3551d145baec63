"""``soul evaluate --task`` and ``--lm-eval``: the numbers of a model on a task or in the harness, and of another beside it.

Everything is checked before weights are read: the rows and their columns, packages, scorer, templates and lengths. The models
are loaded one after the other, so that one at a time is in memory.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import sys
from collections.abc import Collection
from typing import Any, NamedTuple

from soul.commands.lists import names_of
from soul.commands.task_options import given_options, task_from
from soul.data.instructions import IGNORANCE, instruct_template, read_instruction
from soul.data.templates import CHAT
from soul.evaluate.logs import check_new_file, is_reserved, write_json
from soul.evaluate.model import EvaluateConfig
from soul.models.loading import check_name, load, pick_device
from soul.output.console import print_result
from soul.output.directory import check_output, check_writable
from soul.output.files import write_text
from soul.plan.run import read_tokenizer
from soul.plan.shapes import read_config
from soul.report.task import task_page
from soul.report.write import attempt, write_page
from soul.tasks import Task, TaskResult, evaluate_task, prepare_task, scorer_of
from soul.tasks.evaluate import PreparedTask, check_task, directions, needs_scorer
from soul.tasks.harness import Harness, find_harness, harness_numbers
from soul.tasks.published import default_scorer
from soul.tasks.toxicity import check_scorer
from soul_kernels.errors import argument_error

NUMBERS_FILE, ROWS_FILE, TEXTS_FILE = "task.json", "task_rows.json", "task_texts.jsonl"


class Work(NamedTuple):
    """What an evaluation is to do, checked.

    Attributes:
        task: the task, or None.
        prepared: its rows, or None.
        harness: tasks of the harness, or None.
        config: how a model is asked.
        instruction: what stands before everything that ``--model`` is asked, or None.
    """

    task: Task | None
    prepared: PreparedTask | None
    harness: Harness | None
    config: EvaluateConfig
    instruction: str | None


class Measured(NamedTuple):
    """The numbers of one model, their directions, and what it has said."""

    numbers: dict[str, float]
    directions: dict[str, str]
    result: TaskResult


def add_evaluate_task(group: argparse._ActionsContainer) -> None:
    """Declare the options of ``soul evaluate`` that are about tasks, beside ``--task`` itself."""
    add = group.add_argument
    add("--against", metavar="DIR_OR_NAME", help="with --task, --lm-eval or --durability: another model, such as the one "
        "before unlearning, measured beside the first")  # fmt: skip
    add("--scorer", metavar="NAME", help="of the task detox: unitary/toxic-bert, profanity-check (offline), or a classifier, a "
        "directory or a hub name, :LABEL behind it (default: the first; with --task-option data=... the second)")  # fmt: skip
    add("--lm-eval", metavar="A,B", help="tasks of EleutherAI's harness, or FOLDER/NAME of your own; extra lmeval")
    add("--system-prompt", metavar="default|FILE", help="input-based baseline: an instruction to pretend ignorance, before "
        "everything that --model is asked; nothing is trained")  # fmt: skip


def settle(args: argparse.Namespace) -> bool:
    """Tell whether `run` is to evaluate; otherwise the options are those of TOFU's metrics, and are filled in for these.

    Raises:
        ArgumentError: options that do not go together.
    """
    if args.from_logs is not None:
        check_none(args, "--from-logs")
    task = task_from(args)
    if (task is None or task.tofu is None) and (task is not None or args.lm_eval is not None):
        return True
    for name in ("against", "scorer", "lm_eval"):
        if getattr(args, name) is not None:
            remedy = "leave it out; --retain-model is what TOFU's metrics compare with"
            raise argument_error(name, "nothing with TOFU's metrics", getattr(args, name), remedy)
    if task is not None:
        if args.data not in (None, task.tofu):
            raise argument_error("data", f"nothing with --task {task.name}", args.data, "pass --task-option data=DIR")
        args.data, args.split = task.tofu, task.split
    if args.system_prompt is not None:
        instruction = read_instruction(args.system_prompt)
        args.template, args.system = instruct_template(instruction, args.template, args.system)
    return False


def check_none(args: argparse.Namespace, other: str, but: Collection[str] = ()) -> None:
    """Raise if there is an option about tasks beside another one, which measures something else and takes only ``but``."""
    for name in ("task", "text", "against", "scorer", "lm_eval", "system_prompt"):
        if name not in but and getattr(args, name) is not None:
            raise argument_error(name, f"nothing with {other}", getattr(args, name), "measure the two in commands of their own")


def run(args: argparse.Namespace) -> None:
    """Evaluate, write the numbers, rows, texts and the report into ``--output``, and print a table."""
    others = (
        "data",
        "retain_logs",
        "retain_model",
        "holdout",
        "format",
        "membership_attacks",
        "reference_model",
        "soul_metrics",
    )
    for name in others:
        if getattr(args, name) is not None:
            raise argument_error(name, "nothing with this task or with --lm-eval", getattr(args, name), "leave it out")
    if args.output is None:
        raise argument_error("output", "a directory", "none", "pass --output")
    work = _work(args)
    output = check_output(args.output)
    json_path = None if args.json is None else check_new_file(args.json, "json")
    if json_path is not None:
        check_writable("json", json_path)
        if is_reserved(json_path, (output,)) or json_path.absolute() in _files(output):
            raise argument_error("json", "another file than those of --output", str(json_path), "choose another name")
    columns = _titles(args)
    scorer = None
    if work.task is not None and needs_scorer(work.task):
        scorer = scorer_of(args.scorer, device=pick_device(args.device))
    measured: dict[str, Measured] = {}
    for title, name in columns.items():
        model, tokenizer = load(name, dtype=args.dtype, device=pick_device(args.device), load_in_4bit=args.load_in_4bit)
        instruction = work.instruction if title == next(iter(columns)) else None
        measured[title] = _measure(model, tokenizer, work, instruction, scorer, args.rows)
        del model, tokenizer  # before the next one is loaded
    lines = _table({title: of_model.numbers for title, of_model in measured.items()})
    try:
        _write(args, output, json_path, work, measured)
    except BaseException:  # a full disk must not cost the numbers
        print(*lines, sep="\n")
        raise
    print_result(*lines)


def _work(args: argparse.Namespace) -> Work:
    """Return what is to be done; rows are read, and all that needs no weights is checked."""
    task = task_from(args)
    config = EvaluateConfig(**{field.name: getattr(args, field.name) for field in dataclasses.fields(EvaluateConfig)})
    instruction = None
    if args.system_prompt is not None:
        instruction = read_instruction(args.system_prompt, IGNORANCE if task is None else task.instruction)
    names = [*(task.harness if task is not None else ()), *(names_of(args.lm_eval) if args.lm_eval is not None else ())]
    harness = find_harness(names) if names else None
    prepared = None if task is None else prepare_task(task, most_rows=args.rows)
    if task is not None and needs_scorer(task):
        args.scorer = args.scorer or default_scorer(given_options(args))
        check_scorer(args.scorer)
    elif args.scorer is not None:
        raise argument_error("scorer", "nothing unless the task measures toxicity", args.scorer, "leave it out")
    for index, name in enumerate([args.model] if args.against is None else [args.model, args.against]):
        check_name(name)
        if prepared is not None and not (pathlib.Path(name) / "adapter_config.json").is_file():
            of_model = instruction if index == 0 else None
            check_task(prepared, read_tokenizer(name), read_config(name), config, instruction=of_model)
    return Work(task, prepared, harness, config, instruction)


def _titles(args: argparse.Namespace) -> dict[str, str]:
    """Return title of a column -> model."""
    prompt = "" if args.system_prompt is None else ", prompt"
    titles = {f"{args.model}{prompt}": args.model}
    if args.against is not None:
        if args.against in titles:
            raise argument_error("against", "another model", args.against, "--system-prompt compares a model with itself")
        titles[args.against] = args.against
    return titles


def _measure(model: Any, tokenizer: Any, work: Work, instruction: str | None, scorer: Any, most_rows: int | None) -> Measured:
    result = TaskResult({}, {}, {})
    better: dict[str, str] = {}
    if work.prepared is not None:
        progress = functools.partial(print, file=sys.stderr)
        options = {"instruction": instruction, "scorer": scorer, "progress": progress}
        result = evaluate_task(model, tokenizer, work.prepared, work.config, **options)
        better = directions(work.prepared.task, list(result.numbers))
    numbers = dict(result.numbers)
    if work.harness is not None:
        of_harness = harness_numbers(
            model,
            tokenizer,
            work.harness,
            batch_size=work.config.batch_size,
            most_rows=most_rows,
            instruction=instruction,
            chat=work.config.template == CHAT,
        )
        numbers |= of_harness.numbers
        better |= of_harness.directions
    return Measured(numbers, better, result)


def _files(output: pathlib.Path) -> list[pathlib.Path]:
    return [(output / name).absolute() for name in (NUMBERS_FILE, ROWS_FILE, TEXTS_FILE)]


def _write(
    args: argparse.Namespace, output: pathlib.Path, json_path: pathlib.Path | None, work: Work, measured: dict[str, Measured]
) -> None:
    """Write the files of an evaluation. The first model is the one that it is about."""
    (title, first), *others = measured.items()
    content: dict[str, Any] = {
        "task": None if work.task is None else work.task.name,
        "model": args.model,
        "system_prompt": work.instruction,
        "scorer": args.scorer,
        "numbers": _finite(first.numbers),
        "better": first.directions,
    }
    if others:
        content |= {"against": args.against, "numbers_against": _finite(others[0][1].numbers)}
    write_json(output / NUMBERS_FILE, content)
    if work.prepared is not None:
        write_json(output / ROWS_FILE, {name: of_model.result.rows for name, of_model in measured.items()})
        lines = [
            json.dumps({"model": name, "set": of_set, "prompt": prompt, "text": text, "answer": truth}, ensure_ascii=False)
            for name, of_model in measured.items()
            for of_set, triples in of_model.result.texts.items()
            for prompt, text, truth in triples
        ]
        write_text(output / TEXTS_FILE, "".join(f"{line}\n" for line in lines))
    if json_path is not None:
        write_json(json_path, _finite(first.numbers))
    options = {name: value for name, value in vars(args).items() if name not in ("command", "config", "run")}
    name = "of lm-eval" if work.task is None else work.task.name
    numbers = {of_title: of_model.numbers for of_title, of_model in measured.items()}
    texts = {of_title: of_model.result.texts for of_title, of_model in measured.items()}
    page = functools.partial(task_page, name, numbers, first.directions, texts, options)
    print(attempt(lambda: write_page(output, page())), file=sys.stderr)


def _finite(numbers: dict[str, float]) -> dict[str, float | None]:
    """Return numbers as JSON has them: null for a perplexity beyond the range of a float."""
    return {name: value if abs(value) < float("inf") else None for name, value in numbers.items()}


def _table(columns: dict[str, dict[str, float]]) -> list[str]:
    """Return the numbers of the models side by side, as lines of text."""
    titles = list(columns)
    names = list(columns[titles[0]])
    width = max(len(name) for name in names)
    head = [f"{'':{width}} {'  '.join(f'{title[-24:]:>24}' for title in titles)}"]
    return head + [f"{name:{width}} {'  '.join(f'{columns[title][name]:>24.6g}' for title in titles)}" for name in names]

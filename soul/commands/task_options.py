"""The options of commands that take a task: ``--task``, and what it fills in.

``soul unlearn`` and ``soul memorize`` take their data and the defaults of a run from a task (`fill_unlearn`, `fill_memorize`);
``soul evaluate`` its measurements (`soul.commands.evaluate_task`). Options on the command line always win.
"""

import argparse
import os
from collections.abc import Mapping
from typing import Any

from soul.plan.shapes import shape_of
from soul.tasks import TASKS, Task, task_of
from soul_kernels.errors import ArgumentError, argument_error

REFUSING = ("po", "dpo")  # methods that teach refusals


def add_task(parser: argparse._ActionsContainer, what: str) -> None:
    """Declare ``--task``, ``--task-option`` and ``--text``.

    Args:
        parser: a parser, or a group of one.
        what: what the task gives the command, for its help.
    """
    names = ", ".join(TASKS)
    parser.add_argument("--task", metavar="NAME", help=f"{names}, or a YAML file: {what} (docs/tasks.md)")
    parser.add_argument("--text", metavar="DATA", help="of the task copyright: a text file, or a source with a column text")
    parser.add_argument(
        "--task-option", action="append", default=[], metavar="NAME=VALUE", help="any other option of the task; may be repeated"
    )


def task_from(args: argparse.Namespace) -> Task | None:
    """Return the task that the options name, or None without ``--task``.

    Raises:
        ArgumentError: as `soul.tasks.task_of`; or there are options of a task, and no task.
    """
    options = given_options(args)
    if args.task is None:
        if options:
            raise argument_error("task", "a name with the option of a task", f"none, and {next(iter(options))}", "pass --task")
        return None
    return task_of(args.task, options, model=args.model)


def given_options(args: argparse.Namespace) -> dict[str, str]:
    """Return the options of the task by name, from ``--task-option`` and ``--text``."""
    options: dict[str, str] = {} if args.text is None else {"text": args.text}
    for assignment in args.task_option:
        name, equals, value = assignment.partition("=")
        name = name.replace("-", "_")
        if not equals or not value or name in options:
            raise argument_error("task_option", "NAME=VALUE, each name once", assignment, "check the options")
        options[name] = value
    return options


def fill_memorize(args: argparse.Namespace) -> None:
    """Fill in ``--data`` of ``soul memorize`` from the task, and print a line that says so."""
    task = task_from(args)
    if task is None:
        if not args.data:
            raise argument_error("data", "rows to be learned", "none", "pass --data, or --task with a task that has them")
        return
    if args.data and args.data != list(task.learn):  # the record of a run has both
        raise argument_error("data", "nothing with --task", args.data[0], "the task says what is learned")
    if not task.learn:
        raise argument_error("task", "one that says what is learned", task.name, "pass --data")
    args.data = list(task.learn)
    _print(f"task {task.name}: --data {' --data '.join(args.data)}")


def fill_unlearn(args: argparse.Namespace) -> None:
    """Fill in data, refusals and the published options of ``soul unlearn`` from the task, and print a line that says so.

    The published options are those of the model nearest in size, within a factor of 4, by the same method and optimizer. They
    are taken if neither a learning rate nor an aim is given: they are a recipe with a learning rate of its own.
    """
    task = task_from(args)
    filled: dict[str, Any] = {}
    if task is not None:
        filled = {name: value for name, value in _task_values(task).items() if getattr(args, name) is None}
        filled |= _published_values(args, task)
        if filled.get("method", args.method) not in REFUSING:
            filled.pop("refusals", None)
        for name, value in filled.items():
            setattr(args, name, value)
    if args.forget is None:
        raise argument_error("forget", "rows to forget", "none", "pass --forget, or --task with a task that has them")
    if task is not None and args.retain is None:
        options = TASKS[task.name].options if task.name in TASKS else {}
        if "retain" in options:
            raise argument_error("retain", "rows to keep", "none", f"the task {task.name} leaves them to you: pass --retain")
    if task is not None:
        shown = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in filled.items())
        _print(f"task {task.name}: {shown or 'nothing to fill in'}")


def _print(line: str) -> None:
    """Print a line, in the first process of several."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(line)


def _task_values(task: Task) -> Mapping[str, Any]:
    values = {"forget": task.forget, "retain": task.retain, "refusals": task.refusals}
    return {name: value for name, value in values.items() if value is not None}


def _published_values(args: argparse.Namespace, task: Task) -> Mapping[str, Any]:
    """Return the options of the nearest published run that the command line leaves open."""
    if not task.published or any(getattr(args, name) is not None for name in ("lr", "aim", "keep_retain", "control", "unseen")):
        return {}
    try:
        parameters = shape_of(args.model).numel
    except ArgumentError:  # adapters, say; the run itself names what is wrong
        return {}
    run = task.nearest(parameters, args.method, args.optimizer)
    if run is None:
        return {}
    values = {"method": run.method, **run.options}
    return {name: value for name, value in values.items() if getattr(args, name) is None}

"""EleutherAI's harness, ``lm-eval``, as one more set of numbers of a model: general ability, and WMDP's multiple choice.

A task is one of the harness, by name, or one of the user's own: ``FOLDER/NAME``, where FOLDER has the harness's YAML files. A
file may name Python functions, which the harness runs: take one only from people whose code you would run.
"""

import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from soul._extras import require
from soul_kernels.errors import argument_error

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EXTRA = "lmeval"


class Harness(NamedTuple):
    """Tasks of the harness that have been found.

    Attributes:
        names: their names.
        manager: the harness's own index of tasks.
    """

    names: list[str]
    manager: Any


class HarnessResult(NamedTuple):
    """What the harness says of a model.

    Attributes:
        numbers: ``{task}_{metric}`` -> number.
        directions: the same names -> "higher", "lower" or "neither": which values are better.
    """

    numbers: dict[str, float]
    directions: dict[str, str]


def find_harness(names: Sequence[str]) -> Harness:
    """Return the tasks of these names; nothing is downloaded.

    Args:
        names: names of the harness, or ``FOLDER/NAME``.

    Raises:
        ArgumentError: there is no such task.
        MissingExtra: ``lm-eval`` is not installed.
    """
    tasks = require("lm_eval.tasks", EXTRA)
    folders = []
    plain = []
    for name in names:
        folder, slash, own = name.rpartition("/")
        is_own = bool(slash) and pathlib.Path(folder).is_dir()
        folders += [folder] * is_own
        plain.append(own if is_own else name)
    manager = tasks.TaskManager(include_path=sorted(set(folders)) or None)
    for name, short in zip(names, plain):
        if short not in manager.task_index:
            remedy = "lm-eval ls tasks lists them; one of your own is FOLDER/NAME"
            raise argument_error("lm_eval", "tasks of the harness", name or "nothing", remedy)
    return Harness(plain, manager)


def harness_numbers(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    harness: Harness,
    *,
    batch_size: int,
    most_rows: int | None = None,
    instruction: str | None = None,
    chat: bool = False,
) -> HarnessResult:
    """Return the numbers of a model on tasks of the harness, as `lm_eval.simple_evaluate` computes them.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        harness: from `find_harness`.
        batch_size: sequences per batch.
        most_rows: rows of a task, at most; None: all.
        instruction: the system message of every request; or None.
        chat: whether requests go through the tokenizer's chat template.
    """
    wrapped = require("lm_eval.models.huggingface", EXTRA).HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    results = require("lm_eval.evaluator", EXTRA).simple_evaluate(
        model=wrapped,
        tasks=list(harness.names),
        task_manager=harness.manager,
        limit=most_rows,
        bootstrap_iters=0,
        log_samples=False,
        system_instruction=instruction,
        apply_chat_template=chat,
    )
    numbers: dict[str, float] = {}
    directions: dict[str, str] = {}
    for task, values in results["results"].items():
        better = results.get("higher_is_better", {}).get(task, {})
        for key, value in values.items():
            metric, _, filtered = key.partition(",")
            if isinstance(value, bool) or not isinstance(value, (int, float)) or metric.endswith("_stderr"):
                continue
            if metric in ("sample_len", "sample_count"):
                continue
            name = f"{task}_{metric}" + (f"_{filtered}" if filtered not in ("", "none") else "")
            numbers[name] = float(value)
            directions[name] = {True: "higher", False: "lower"}.get(better.get(metric), "neither")
    return HarnessResult(numbers, directions)

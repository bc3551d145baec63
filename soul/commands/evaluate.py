"""``soul evaluate``: TOFU's metrics, of a model or of evaluation logs.

Both ways end in the same columns of numbers (`Evaluation`), from which `soul.evaluate.metrics.summarize` computes the result.
All options, paths and packages are checked before a model runs, since a run may take hours.
"""

import argparse
import dataclasses
import functools
import pathlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from soul._extras import require
from soul.commands import durability, evaluate_task
from soul.commands.device_options import add_device
from soul.commands.task_options import add_task
from soul.commands.template_options import add_template
from soul.data.examples import Counts, Question
from soul.data.sources import examples, perturbed, read_questions, rows
from soul.data.templates import Template
from soul.evaluate.logs import (
    RATIO,
    check_logs,
    check_new_file,
    columns,
    is_reserved,
    read_logs,
    read_retain_log,
    write_json,
    write_logs,
)
from soul.evaluate.metrics import MIN_K, summarize
from soul.evaluate.model import EvaluateConfig, Log, retain_log, tofu_logs
from soul.models.loading import load, pick_device
from soul.output.console import print_result
from soul.output.directory import DATA_FILE, check_output, check_writable
from soul.report.evaluation import evaluation_page
from soul.report.write import attempt, write_page
from soul_kernels.errors import argument_error

SHOWN = 4  # answers of each set in the report

HELP = "TOFU's metrics, of a model or of evaluation logs"


class Evaluation(NamedTuple):
    """The numbers of an evaluation, and the files that are still to be written.

    Attributes:
        columns: set -> column -> tensor, from the model's logs.
        retain: column -> tensor, from the retain model's log of the forget set; None: there is no such log.
        logs: directory -> set -> log, to be written.
        counts: file -> numbers of rows read, left out and cut, to be written.
    """

    columns: dict[str, dict[str, torch.Tensor]]
    retain: dict[str, torch.Tensor] | None
    logs: dict[pathlib.Path, dict[str, Log]]
    counts: dict[pathlib.Path, dict[str, Any]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    what = parser.add_argument_group("what")
    either = what.add_mutually_exclusive_group(required=True)
    either.add_argument("--from-logs", metavar="DIR", help="logs in TOFU's layout; no model, no GPU")
    either.add_argument(
        "--model", metavar="DIR_OR_NAME", help="directory or hub name of a causal LM; needs --data and --output"
    )
    what.add_argument("--retain-logs", metavar="DIR", help="logs of a model that never saw the forget set: for forget quality")
    what.add_argument("--json", metavar="FILE", help="new file for the numbers")
    how = parser.add_argument_group("with --model")
    add_task(how, "its measures in place of TOFU's")
    evaluate_task.add_evaluate_task(how)
    how.add_argument("--data", metavar="DIR", help="directory with TOFU's *_perturbed.jsonl, or the word tofu for the hub's")
    how.add_argument("--output", metavar="DIR", help="new or empty directory for the logs, which --from-logs reads")
    how.add_argument("--retain-model", metavar="DIR_OR_NAME", help="in place of --retain-logs; its log goes to OUTPUT/retain")
    how.add_argument("--holdout", metavar="DATA", help="path or name of rows that the model never saw, as --forget "
                     "of soul unlearn: for the AUC of Min-K and Min-K++")  # fmt: skip
    how.add_argument("--split", default="forget10", metavar="NAME", help="TOFU's name of the forget set (default: %(default)s)")
    how.add_argument("--rows", type=int, metavar="N", help="take the first N of each file (default: all; TOFU's own logs: 300)")
    add_template(how)
    how.add_argument("--min-k", type=float, default=MIN_K, metavar="X", help="fraction of an answer's tokens that Min-K and "
                     "Min-K++ look at (default: %(default)s)")  # fmt: skip
    how.add_argument(
        "--max-new-tokens", type=int, default=200, metavar="N", help="most tokens of a generated answer (default: %(default)s)"
    )
    how.add_argument("--max-length", type=int, default=512, metavar="N", help="tokens of a sequence (default: %(default)s)")
    how.add_argument("--batch-size", type=int, default=32, metavar="N", help="sequences per batch (default: %(default)s)")
    how.add_argument("--dtype", default="float32", metavar="NAME", help="dtype of the parameters (default: %(default)s)")
    add_device(how)
    durability.add_durability(parser)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    if args.durability:
        evaluate_task.check_none(args, "--durability")
        durability.run(args)
        return
    if evaluate_task.settle(args):
        evaluate_task.run(args)
        return
    for name in ("scipy.stats", *(("sklearn.metrics",) if args.holdout else ())):
        require(name, "eval")
    json_path = None if args.json is None else check_new_file(args.json, "json")
    if json_path is not None:
        check_writable("json", json_path)
    if args.from_logs is not None:
        evaluation = _read_logs(args)
    else:
        evaluation = _run_models(args, json_path)
    summary = summarize(evaluation.columns, evaluation.retain)
    lines = [f"{name:36} {value:.6g}" for name, value in summary.items()]
    if evaluation.retain is None:
        lines.append("no forget quality: it needs a retain model's logs (--retain-logs)")
    try:
        for directory, logs in evaluation.logs.items():
            write_logs(directory, logs)
        for path, counts in evaluation.counts.items():
            write_json(path, counts)
        if json_path is not None:
            write_json(json_path, summary)
        if args.output is not None:
            print(attempt(lambda: _report(args, summary, evaluation.logs)), file=sys.stderr)
    except BaseException:  # a full disk must not cost the numbers
        print(*lines, sep="\n")
        raise
    if json_path is None:
        print_result(*lines)
    else:  # the numbers are in the file
        print(*lines, sep="\n")


def _read_logs(args: argparse.Namespace) -> Evaluation:
    """Return the `Evaluation` of the logs in ``--from-logs`` and ``--retain-logs``."""
    for name in ("data", "output", "retain_model", "holdout"):
        if getattr(args, name) is not None:
            raise argument_error(name, "nothing with --from-logs", getattr(args, name), "it goes with --model")
    logs = read_logs(args.from_logs)
    retain = None
    if args.retain_logs is not None:
        retain = read_retain_log(args.retain_logs, len(logs["forget"]["avg_gt_loss"]))
    return Evaluation(logs, retain, logs={}, counts={})


def _run_models(args: argparse.Namespace, json_path: pathlib.Path | None) -> Evaluation:
    """Run the model and, with ``--retain-model``, the retain model over TOFU's sets, and return their `Evaluation`."""
    for name in ("data", "output"):
        if getattr(args, name) is None:
            raise argument_error(name, "a directory with --model", "none", f"pass --{name}")
    if args.retain_logs is not None and args.retain_model is not None:
        raise argument_error("retain_model", "either it or --retain-logs", "both", "pass one")
    if args.rows is not None and args.rows < 1:
        raise argument_error("rows", "a positive whole number", args.rows, "leave it out to take all")
    config = EvaluateConfig(**{field.name: getattr(args, field.name) for field in dataclasses.fields(EvaluateConfig)})
    output = check_output(args.output)
    if json_path is not None and is_reserved(json_path, (output, output / "retain")):
        raise argument_error("json", "another file than the logs", str(json_path), "choose another name")
    require("rouge_score", "eval")
    files = {"forget": args.split, "retain": "retain", "real_authors": "real_authors", "world_facts": "world_facts"}
    sets = {name: read_questions(perturbed(args.data, file))[: args.rows] for name, file in files.items()}
    holdout_rows = rows(args.holdout) if args.holdout else []
    retain = None
    if args.retain_logs is not None:
        retain = read_retain_log(args.retain_logs, len(sets["forget"]))
    load_model = functools.partial(load, dtype=args.dtype, device=pick_device(args.device))
    retain_logs: dict[pathlib.Path, dict[str, Log]] = {}
    if args.retain_model is not None:
        log = _run_retain_model(load_model, args.retain_model, sets["forget"], config)
        retain = columns(log, "retain model, forget", RATIO)
        retain_logs[output / "retain"] = {"forget": log}
    model, tokenizer = load_model(args.model)
    holdout = examples(holdout_rows, Template(config.template, tokenizer, config.system)) if holdout_rows else []
    counts: dict[str, Counts] = {}
    progress = functools.partial(print, file=sys.stderr)
    logs = tofu_logs(model, tokenizer, sets, config, holdout=holdout, progress=progress, counts=counts)
    checked = check_logs(logs, {name: f"model, {name}" for name in logs})
    counts_as_dicts = {name: dataclasses.asdict(count) for name, count in counts.items()}
    return Evaluation(checked, retain, logs={output: logs, **retain_logs}, counts={output / DATA_FILE: counts_as_dicts})


def _run_retain_model(load_model: Callable[[str], tuple], name: str, questions: list[Question], config: EvaluateConfig) -> Log:
    """Return the retain model's log. The model goes out of scope here, so that its memory is free for the next one."""
    model, tokenizer = load_model(name)
    return retain_log(model, tokenizer, questions, config)


def _report(args: argparse.Namespace, summary: dict[str, float], logs: dict[pathlib.Path, dict[str, Log]]) -> pathlib.Path:
    """Write the report of a model's evaluation, and return its path."""
    output = pathlib.Path(args.output)
    answers = {name: list(logs[output][name]["generated_text"].values()) for name in ("forget", "retain")}
    texts = {name: rows[:: -(-len(rows) // SHOWN)] for name, rows in answers.items()}
    options = {name: value for name, value in vars(args).items() if name not in ("command", "config", "run")}
    return write_page(output, evaluation_page(args.model, summary, texts, options))

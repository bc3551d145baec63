"""``soul evaluate``: TOFU's metrics and others, of a model or of evaluation logs.

Both ways end in the same columns of numbers, from which `soul.evaluate.metrics.summarize` computes the result or, in
open-unlearning's layout, `soul.evaluate.open_unlearning.aggregate`. All options, paths and packages are checked before a model
runs, since a run may take hours.
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
from soul.commands.device_options import add_device, add_loading
from soul.commands.lists import names_of
from soul.commands.task_options import add_task
from soul.commands.template_options import add_template
from soul.data.examples import Counts, Example, Question
from soul.data.rows import Row
from soul.data.sources import examples, perturbed, read_questions, rows
from soul.data.templates import Template
from soul.evaluate import open_unlearning
from soul.evaluate.attacks import CostlyAttacks, parse_attacks
from soul.evaluate.logs import (
    EVAL,
    FILES,
    RATIO,
    check_logs,
    check_new_file,
    columns,
    is_reserved,
    read_files,
    read_retain_logs,
    write_json,
    write_logs,
)
from soul.evaluate.metrics import FREE_ATTACKS, MEMBERSHIP, MIN_K, summarize
from soul.evaluate.model import EvaluateConfig, Log, answer_losses, by_row, retain_logs, tofu_logs
from soul.evaluate.soul_metrics import ENCODER, SentenceEncoder, encode_soul, soul_columns
from soul.models.loading import load, pick_device
from soul.output.console import print_result
from soul.output.directory import DATA_FILE, check_output, check_writable
from soul.report.evaluation import evaluation_page
from soul.report.write import attempt, write_page
from soul_kernels.errors import argument_error, check_choice

SHOWN = 4  # answers of each set in the report
TOFU = "tofu"
OPEN_UNLEARNING = "open-unlearning"
LAYOUTS = (TOFU, OPEN_UNLEARNING)
WITH_MODEL = ("data", "retain_model", "reference_model", "holdout", "membership_attacks", "soul_metrics", "sentence_model")

HELP = "TOFU's metrics, of a model or of evaluation logs"
Columns = dict[str, dict[str, torch.Tensor]]  # set -> column -> tensor
Logs = dict[str, Log]  # set -> log


class Evaluation(NamedTuple):
    """The numbers of an evaluation, and the files that are still to be written.

    Attributes:
        summary: the result, name -> number.
        writes: functions that write one or several files each.
    """

    summary: dict[str, float]
    writes: list[Callable[[], object]]


class Models(NamedTuple):
    """What the models of an evaluation gave.

    Attributes:
        logs: the model's logs.
        columns: the same, checked.
        retain_logs: the retain model's logs; None: it did not run.
        retain: the columns of its logs; None: there is no retain model.
        counts: set and kind of answer -> numbers of rows read, left out and cut.
    """

    logs: Logs
    columns: Columns
    retain_logs: Logs | None
    retain: Columns | None
    counts: dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    what = parser.add_argument_group("what")
    either = what.add_mutually_exclusive_group(required=True)
    either.add_argument("--from-logs", metavar="DIR", help="logs in TOFU's or open-unlearning's layout; no model, no GPU")
    either.add_argument(
        "--model",
        metavar="DIR_OR_NAME",
        help="directory or hub name of a causal LM; needs --output, and --data, --task or --durability",
    )
    what.add_argument("--retain-logs", metavar="DIR", help="logs of a model that never saw the forget set, in either layout: "
                      "for forget quality and privacy leakage")  # fmt: skip
    what.add_argument("--format", metavar="NAME", help="tofu or open-unlearning: layout of the logs in --output, whose names "
                      "and definitions the numbers have (default: that of the logs, else tofu)")  # fmt: skip
    what.add_argument("--output", metavar="DIR", help="new or empty directory for the logs, which --from-logs reads; with "
                      "--from-logs only for --format open-unlearning")  # fmt: skip
    what.add_argument("--json", metavar="FILE", help="new file for the numbers")
    how = parser.add_argument_group("with --model")
    add_task(how, "its measures in place of TOFU's")
    evaluate_task.add_evaluate_task(how)
    how.add_argument("--data", metavar="DIR", help="directory with TOFU's *_perturbed.jsonl, or the word tofu for the hub's")
    how.add_argument("--retain-model", metavar="DIR_OR_NAME", help="in place of --retain-logs; its log goes to OUTPUT/retain")
    how.add_argument("--split", default="forget10", metavar="NAME", help="TOFU's name of the forget set (default: %(default)s)")
    how.add_argument("--rows", type=int, metavar="N", help="take the first N of each file (default: all; TOFU's own logs: 300)")
    add_template(how)
    how.add_argument(
        "--max-new-tokens", type=int, default=200, metavar="N", help="most tokens of a generated answer (default: %(default)s)"
    )
    how.add_argument("--max-length", type=int, default=512, metavar="N", help="tokens of a sequence (default: %(default)s)")
    how.add_argument("--batch-size", type=int, default=32, metavar="N", help="sequences per batch (default: %(default)s)")
    add_loading(how)
    add_device(how)
    _add_attacks(parser)
    durability.add_durability(parser)


def _add_attacks(parser: argparse.ArgumentParser) -> None:
    """Declare the options of membership attacks, and of SOUL's own metrics."""
    attacks = parser.add_argument_group("membership attacks and SOUL's own metrics, with --model")
    attacks.add_argument("--holdout", metavar="DATA", help="path or name of rows that the model never saw, as --forget of soul "
                         f"unlearn: for the AUC of {', '.join(FREE_ATTACKS)}")  # fmt: skip
    attacks.add_argument("--membership-attacks", metavar="A,B", help="more attacks, or all: reference needs a second "
                         "model, gradnorm a backward pass for every row")  # fmt: skip
    attacks.add_argument("--reference-model", metavar="DIR_OR_NAME", help="of the attack reference (default: the retain model)")
    attacks.add_argument("--min-k", type=float, default=MIN_K, metavar="X", help="fraction of an answer's tokens that Min-K "
                         "and Min-K++ look at (default: %(default)s)")  # fmt: skip
    attacks.add_argument("--soul-metrics", action="store_true", default=None, help="also SOUL's own: forget quality "
                         "of one model, membership attack, accuracy by sentence similarity")  # fmt: skip
    attacks.add_argument("--sentence-model", metavar="DIR_OR_NAME", help=f"encoder of --soul-metrics (default: {ENCODER})")


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    if args.durability:
        evaluate_task.check_none(args, "--durability", but=("against",))
        durability.run(args)
        return
    if evaluate_task.settle(args):
        evaluate_task.run(args)
        return
    for name in ("scipy.stats", *(("sklearn.metrics",) if args.holdout or args.soul_metrics else ())):
        require(name, "eval")
    if args.format is not None:
        check_choice("format", args.format, LAYOUTS)
    json_path = None if args.json is None else check_new_file(args.json, "json")
    if json_path is not None:
        check_writable("json", json_path)
    output = None if args.output is None else check_output(args.output)
    if output is not None and json_path is not None and is_reserved(json_path, (output, output / "retain")):
        raise argument_error("json", "another file than the logs", str(json_path), "choose another name")
    evaluation = _of_logs(args, output) if args.from_logs is not None else _of_models(args, output)
    summary = evaluation.summary
    lines = [f"{name:36} {value:.6g}" for name, value in summary.items()]
    if "forget_quality" not in summary:
        lines.append("no forget quality: it needs a retain model's logs (--retain-logs)")
    try:
        for write in evaluation.writes:
            write()
        if json_path is not None:
            write_json(json_path, summary)
    except BaseException:  # a full disk must not cost the numbers
        print(*lines, sep="\n")
        raise
    if json_path is None:
        print_result(*lines)
    else:  # the numbers are in the file
        print(*lines, sep="\n")


def _of_logs(args: argparse.Namespace, output: pathlib.Path | None) -> Evaluation:
    """Return the `Evaluation` of the logs in ``--from-logs`` and ``--retain-logs``, each in its layout."""
    for name in WITH_MODEL:
        if getattr(args, name):
            raise argument_error(name, "nothing with --from-logs", getattr(args, name), "it goes with --model")
    if output is not None and args.format != OPEN_UNLEARNING:
        remedy = f"pass --format {OPEN_UNLEARNING}, or leave it out"
        raise argument_error("output", f"nothing with --from-logs but for --format {OPEN_UNLEARNING}", args.output, remedy)
    path = open_unlearning.find(args.from_logs)
    if path is not None:
        if args.format == TOFU:
            raise argument_error("format", OPEN_UNLEARNING, TOFU, f"{path.name} cannot be put into TOFU's layout")
        return _theirs(open_unlearning.read(path), path, *_their_retain_log(args), output)
    logs, origins = read_files(args.from_logs)
    checked = check_logs(logs, origins)
    if args.format == OPEN_UNLEARNING:
        return _theirs(open_unlearning.from_tofu(checked, logs), origins["forget"], *_their_retain_log(args), output)
    return Evaluation(summarize(checked, _retain_columns(args, len(checked["forget"][RATIO[0]]))), writes=[])


def _theirs(
    log: open_unlearning.Log,
    path: pathlib.Path,
    retain_log: open_unlearning.Log | None,
    retain_path: pathlib.Path | None,
    output: pathlib.Path | None,
) -> Evaluation:
    """Return the `Evaluation` of a log in open-unlearning's layout, by its names and definitions."""
    numbers = open_unlearning.aggregate(log, path, retain_log, retain_path)
    writes: list[Callable[[], object]] = []
    if output is not None:
        benchmark = path.name.removesuffix(EVAL) if path.name.endswith(EVAL) else "TOFU"
        writes.append(functools.partial(open_unlearning.write, output, log, numbers, benchmark))
    return Evaluation(numbers, writes)


def _their_retain_log(args: argparse.Namespace) -> tuple[open_unlearning.Log | None, pathlib.Path | None]:
    """Return the log in ``--retain-logs`` in open-unlearning's layout, whatever layout it has, and its path."""
    if args.retain_logs is None:
        return None, None
    path = open_unlearning.find(args.retain_logs)
    if path is not None:
        return open_unlearning.read(path), path
    return open_unlearning.from_tofu(read_retain_logs(args.retain_logs)), pathlib.Path(args.retain_logs) / FILES["forget"]


def _retain_columns(args: argparse.Namespace, n_rows: int) -> Columns | None:
    """Return the columns of the logs in ``--retain-logs``, whatever layout they have."""
    if args.retain_logs is None:
        return None
    path = open_unlearning.find(args.retain_logs)
    if path is not None:
        return open_unlearning.retain_columns(open_unlearning.read(path), path, n_rows)
    return read_retain_logs(args.retain_logs, n_rows)


def _of_models(args: argparse.Namespace, output: pathlib.Path | None) -> Evaluation:
    """Return the `Evaluation` of ``--model``."""
    if args.data is None:
        raise argument_error("data", "a directory with --model", "none", "pass --data")
    if output is None:
        raise argument_error("output", "a directory with --model", "none", "pass --output")
    models = _run_models(args)
    summary = summarize(models.columns, models.retain)
    writes: list[Callable[[], object]] = [
        functools.partial(write_json, output / DATA_FILE, models.counts),
        lambda: print(attempt(lambda: _report(args, summary, models.logs)), file=sys.stderr),
    ]
    if args.format != OPEN_UNLEARNING:
        all_logs = {output: models.logs, **({output / "retain": models.retain_logs} if models.retain_logs else {})}
        return Evaluation(summary, [functools.partial(write_logs, *pair) for pair in all_logs.items()] + writes)
    log = open_unlearning.from_tofu(models.columns, models.logs)
    retain_log = None if models.retain is None else open_unlearning.from_tofu(models.retain, models.retain_logs)
    theirs = _theirs(log, output, retain_log, output / "retain", output)
    if models.retain_logs and retain_log is not None:
        writes += _theirs(retain_log, output / "retain", None, None, output / "retain").writes
    return Evaluation(theirs.summary, theirs.writes + writes)


def _run_models(args: argparse.Namespace) -> Models:
    """Run the model and, where options name them, the retain model and the reference model over TOFU's sets."""
    _check_models(args)
    config = EvaluateConfig(**{field.name: getattr(args, field.name) for field in dataclasses.fields(EvaluateConfig)})
    require("rouge_score", "eval")
    files = {"forget": args.split, "retain": "retain", "real_authors": "real_authors", "world_facts": "world_facts"}
    sets = {name: read_questions(perturbed(args.data, file))[: args.rows] for name, file in files.items()}
    holdout_rows = rows(args.holdout) if args.holdout else []
    retain = _retain_columns(args, len(sets["forget"]))
    device = pick_device(args.device)
    load_model = functools.partial(load, dtype=args.dtype, device=device, load_in_4bit=args.load_in_4bit)
    encoder = SentenceEncoder(args.sentence_model or ENCODER, device, config.batch_size) if args.soul_metrics else None
    logs_of_retain = None
    if args.retain_model is not None:
        logs_of_retain = _run_retain_model(load_model, args.retain_model, sets["forget"], holdout_rows, config)
        retain = _checked_retain(logs_of_retain)
    attacks = _costly_attacks(args, load_model, retain, sets["forget"], holdout_rows, config)
    model, tokenizer = load_model(args.model)
    counts: dict[str, Counts] = {}
    progress = functools.partial(print, file=sys.stderr)
    encoded = {}
    if encoder is not None:
        encoded = {name: encode_soul(model, tokenizer, name, questions, config) for name, questions in sets.items()}
    logs = tofu_logs(
        model,
        tokenizer,
        sets,
        config,
        holdout=_holdout(holdout_rows, tokenizer, config),
        attacks=attacks,
        progress=progress,
        counts=counts,
    )
    if encoder is not None:
        for name, questions in encoded.items():
            progress(f"{name}: SOUL's own metrics")
            texts = [text for _, text, _ in logs[name]["generated_text"].values()]
            logs[name] |= by_row(soul_columns(model, tokenizer, questions, texts, config, encoder))
    checked = check_logs(logs, {name: f"model, {name}" for name in logs})
    return Models(logs, checked, logs_of_retain, retain, {name: dataclasses.asdict(count) for name, count in counts.items()})


def _check_models(args: argparse.Namespace) -> None:
    """Raise for options of models that do not fit together."""
    if args.retain_logs is not None and args.retain_model is not None:
        raise argument_error("retain_model", "either it or --retain-logs", "both", "pass one")
    if args.rows is not None and args.rows < 1:
        raise argument_error("rows", "a positive whole number", args.rows, "leave it out to take all")
    attacks = parse_attacks(names_of(args.membership_attacks)) if args.membership_attacks else ()
    if args.membership_attacks and not args.holdout:
        raise argument_error("holdout", "rows that the model never saw, with --membership-attacks", "none", "pass --holdout")
    if "reference" in attacks and not (args.reference_model or args.retain_model):
        remedy = "pass --reference-model, or leave the attack out"
        raise argument_error("reference_model", "a model, with the attack reference", "none", remedy)
    if args.reference_model and "reference" not in attacks:
        remedy = "pass --membership-attacks reference"
        raise argument_error("membership_attacks", "reference, with --reference-model", args.membership_attacks, remedy)
    if args.sentence_model and not args.soul_metrics:
        raise argument_error("sentence_model", "nothing without --soul-metrics", args.sentence_model, "pass --soul-metrics")


def _holdout(holdout_rows: list[Row], tokenizer: Any, config: EvaluateConfig) -> list[Example]:
    return examples(holdout_rows, Template(config.template, tokenizer, config.system)) if holdout_rows else []


def _run_retain_model(
    load_model: Callable[[str], tuple],
    name: str,
    questions: list[Question],
    holdout_rows: list[Row],
    config: EvaluateConfig,
) -> Logs:
    """Return the retain model's logs. The model goes out of scope here, so that its memory is free for the next one."""
    model, tokenizer = load_model(name)
    return retain_logs(model, tokenizer, questions, config, _holdout(holdout_rows, tokenizer, config))


def _checked_retain(logs: Logs) -> Columns:
    """Return the columns of a retain model's logs."""
    optional = ("avg_gt_loss", *MEMBERSHIP)
    checked = {"forget": columns(logs["forget"], "retain model, forget", RATIO, optional)}
    if "holdout" in logs:
        checked["holdout"] = columns(logs["holdout"], "retain model, holdout", optional)
    return checked


def _costly_attacks(
    args: argparse.Namespace,
    load_model: Callable[[str], tuple],
    retain: Columns | None,
    questions: list[Question],
    holdout_rows: list[Row],
    config: EvaluateConfig,
) -> CostlyAttacks:
    """Return the attacks that need another pass, and run the reference model where one of them needs it."""
    names = parse_attacks(names_of(args.membership_attacks)) if args.membership_attacks else ()
    if "reference" not in names:
        return CostlyAttacks(names)
    if args.reference_model is None and retain is not None:
        return CostlyAttacks(names, {name: log["avg_gt_loss"] for name, log in retain.items()})
    model, tokenizer = load_model(args.reference_model)
    template = Template(config.template, tokenizer, config.system)
    sets = {
        "forget": [template.ask(q.question, q.answer, f"forget, row {row}") for row, q in enumerate(questions)],
        "holdout": _holdout(holdout_rows, tokenizer, config),
    }
    return CostlyAttacks(names, {name: answer_losses(model, tokenizer, rows, config, name) for name, rows in sets.items()})


def _report(args: argparse.Namespace, summary: dict[str, float], logs: Logs) -> pathlib.Path:
    """Write the report of a model's evaluation, and return its path."""
    answers = {name: list(logs[name]["generated_text"].values()) for name in ("forget", "retain")}
    texts = {name: rows[:: -(-len(rows) // SHOWN)] for name, rows in answers.items()}
    options = {name: value for name, value in vars(args).items() if name not in ("command", "config", "run")}
    return write_page(pathlib.Path(args.output), evaluation_page(args.model, summary, texts, options))

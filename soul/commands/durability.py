"""``soul evaluate --durability``: attacks on a model that has forgotten, and what it says afterwards."""

import argparse
import dataclasses
import functools
import sys
from typing import Any

from soul.commands.lists import names_of
from soul.data.sources import perturbed
from soul.durability.rows import Row, read_rows
from soul.durability.run import ATTACKS, DurabilityConfig, Outcome, ask_other, check_rows, durability
from soul.evaluate.logs import write_json
from soul.models.loading import load, pick_device
from soul.output.console import print_result
from soul.output.directory import check_output
from soul.report.durability import durability_page, returned, table
from soul.report.write import attempt, write_page
from soul_kernels.errors import argument_error

RESULT_FILE = "durability.json"
OTHERS = {"before": "against", "retrained": "retain_model"}  # name of an outcome -> the option that names its model
UNUSED = (
    "from_logs",
    "retain_logs",
    "holdout",
    "json",
    "format",
    "membership_attacks",
    "reference_model",
    "soul_metrics",
    "sentence_model",
)


def add_durability(parser: argparse.ArgumentParser) -> None:
    """Declare the options, which stand beside those of ``soul evaluate``."""
    defaults = DurabilityConfig()
    group = parser.add_argument_group("with --durability (its questions: --forget and --retain, or --data)")
    add = group.add_argument
    add("--durability", action="store_true", help="attack the model, and ask it again what it has forgotten")
    add("--forget", metavar="DATA", help="rows that were forgotten: question and answer, or prompt and completion")
    add("--retain", metavar="DATA", help="rows that should still be known")
    add("--attacks", type=names_of, metavar="NAME,...", help=f"from {', '.join(ATTACKS)} (default: all)")
    add("--relearn-rows", type=int, default=defaults.relearn_rows, metavar="N",
        help="rows that are learned again (default: %(default)s)")  # fmt: skip
    add("--relearn-epochs", type=int, default=defaults.relearn_epochs, metavar="N",
        help="passes over these rows (default: %(default)s)")  # fmt: skip
    add("--relearn-lr", type=float, default=defaults.relearn_lr, metavar="X", help="AdamW's rate (default: %(default)s)")
    add("--tries", type=int, default=defaults.tries, metavar="N", help="drawn answers to a question (default: %(default)s)")
    add("--seed", type=int, default=defaults.seed, metavar="N", help="of rows, order and draws (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    for name in UNUSED:
        if getattr(args, name) is not None:
            remedy = f"leave out --{name.replace('_', '-')}"
            raise argument_error(name, "nothing with --durability", getattr(args, name), remedy)
    fields = {field.name: getattr(args, field.name) for field in dataclasses.fields(DurabilityConfig)}
    config = DurabilityConfig(**{**fields, "attacks": tuple(args.attacks or ATTACKS)})
    if args.output is None:
        raise argument_error("output", "a new or an empty directory", "none", "pass --output")
    if args.load_in_4bit:
        remedy = "it trains and rounds all weights: leave it out"
        raise argument_error("load_in_4bit", "nothing with --durability", True, remedy)
    output = check_output(args.output)
    forget, retain = (_rows(args, name) for name in ("forget", "retain"))
    check_rows(forget, retain, config)
    load_model = functools.partial(load, dtype=args.dtype, device=pick_device(args.device))
    progress = functools.partial(print, file=sys.stderr)
    outcomes = durability(*load_model(args.model), forget, retain, config, progress=progress)
    for name, option in OTHERS.items():
        if getattr(args, option) is not None:
            progress(f"ask the model {name}")
            outcomes.append(ask_other(name, *load_model(getattr(args, option)), forget, retain, config))
    results = with_shares(outcomes)
    write_json(output / RESULT_FILE, {"outcomes": results, "options": dataclasses.asdict(config)})
    options = {name: value for name, value in vars(args).items() if name not in ("command", "config", "run")}
    print(attempt(lambda: write_page(output, durability_page(args.model, results, options))), file=sys.stderr)
    print_result(*_lines(results))


def with_shares(outcomes: list[Outcome]) -> list[dict[str, Any]]:
    """Return outcomes as dicts, each with ``returned``, the share of what was forgotten that the attack brought back."""
    results: list[dict[str, Any]] = [dataclasses.asdict(outcome) for outcome in outcomes]
    before: dict[str, float] = next((result["forget"] for result in results if result["name"] == "before"), {})
    for result in results:
        is_attack = result["name"] in ATTACKS
        result["returned"] = returned(result, before) if is_attack else None
    return results


def _rows(args: argparse.Namespace, name: str) -> list[Row]:
    """Return the rows of ``--forget`` or ``--retain``, or those of TOFU's files in ``--data``."""
    source = getattr(args, name)
    if source is None and args.data is not None:
        source = perturbed(args.data, args.split if name == "forget" else name)
    if source is None:
        raise argument_error(name, "rows with --durability", "none", f"pass --{name}, or --data with TOFU's files")
    return read_rows(source, name)[: args.rows]


def _lines(results: list[dict[str, Any]]) -> list[str]:
    """Return the table of the page as aligned lines."""
    shown = table(results)
    cells = [shown.head, *shown.rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in cells]

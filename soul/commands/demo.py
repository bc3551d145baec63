"""``soul demo``: a small study on fictitious authors, and then ``soul unlearn`` led to its aim on the model of that study."""

import argparse
import dataclasses
import pathlib
from typing import Any

from soul.commands import unlearn
from soul.commands.device_options import add_device
from soul.commands.study import show

HELP = "train, unlearn and compare in minutes on a CPU, without a download"
TITLE = "Second order against first order on fictitious authors"
OPTIMIZERS = ("adamw", "soul")  # of the runs with an aim


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--output", default="out/demo", metavar="DIR", help="new directory, or that of a demo to continue")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of everything random (default: %(default)s)")
    add_device(parser)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    from soul.study.config import PRESETS
    from soul.study.data import demo_data, write_rows
    from soul.study.run import check_ready, run_study

    config = dataclasses.replace(PRESETS["demo"], seeds=(args.seed,), device=args.device, backend=args.backend)
    output = check_ready(args.output, config)
    data = demo_data(config)
    results = run_study(output, data, config)
    write_rows(output, data)  # for `soul unlearn`
    results["aimed"] = [_run_with_aim(output, args, optimizer) for optimizer in OPTIMIZERS]
    show(output, data, config, results, TITLE)


def _run_with_aim(output: pathlib.Path, args: argparse.Namespace, optimizer: str) -> dict[str, Any]:
    """Run ``soul unlearn`` with its defaults on the demo's model, or go on where it stopped; return what came of it."""
    from soul.report.records import Run

    directory = pathlib.Path("unlearned") / optimizer
    options = {
        "model": output / f"seed{args.seed}" / "full",
        "forget": output / "forget.jsonl",
        "retain": output / "retain.jsonl",
        "output": output / directory,
        "optimizer": optimizer,
        "seed": args.seed,
        "device": args.device,
        "backend": args.backend,
    }
    parser = argparse.ArgumentParser()
    unlearn.add_arguments(parser)
    print(f"\nsoul unlearn --optimizer {optimizer}", flush=True)
    unlearn.run(
        parser.parse_args([*(word for name, value in options.items() for word in (f"--{name}", str(value))), "--resume"])
    )
    run_files = Run(output / directory)
    return {
        "optimizer": optimizer,
        "directory": str(directory),
        "steps": len(run_files.steps),
        "seconds": run_files.notes.get("seconds"),
        **run_files.verdict,
    }

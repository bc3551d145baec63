"""``soul demo``: a small study on fictitious authors."""

import argparse
import dataclasses

from soul.commands.device_options import add_device
from soul.commands.study import run_and_report

HELP = "train, unlearn and compare in minutes on a CPU, without a download"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--output", default="out/demo", metavar="DIR", help="new directory, or that of a demo to continue")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of everything random (default: %(default)s)")
    add_device(parser)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    from soul.study.config import PRESETS
    from soul.study.data import demo_data, write_rows
    from soul.study.run import check_ready

    config = dataclasses.replace(PRESETS["demo"], seeds=(args.seed,), device=args.device, backend=args.backend)
    output = check_ready(args.output, config)
    data = demo_data(config)
    run_and_report(output, data, config, "Second order against first order on fictitious authors")
    write_rows(output, data)  # for `soul unlearn`

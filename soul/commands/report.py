"""``soul report``: the report of a run, made again of the files in its output directory."""

import argparse
import pathlib

from soul.output.console import print_result
from soul.output.directory import LOG_FILE, RUN_FILE, check_writable
from soul.report.records import Run
from soul.report.run import run_page
from soul.report.write import write_page
from soul_kernels.errors import argument_error

HELP = "make the report of a run again, also of one that was interrupted or is still going on"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("output", metavar="OUTPUT", help="output directory of a run of soul unlearn")


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    directory = pathlib.Path(args.output)
    if not any((directory / name).is_file() for name in (RUN_FILE, LOG_FILE)):
        expected = f"the output directory of a run, with {RUN_FILE} or {LOG_FILE}"
        raise argument_error("OUTPUT", expected, f"{directory} without them", "check the path")
    check_writable("OUTPUT", directory)
    print_result(str(write_page(directory, run_page(Run(directory)))))

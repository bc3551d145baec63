"""``soul study``: first order against second order on TOFU, on passages of a text, or on unsafe answers."""

import argparse
import dataclasses
import pathlib
from typing import TYPE_CHECKING, Any

from soul.commands.device_options import add_device
from soul.commands.lists import names_of, numbers_of

if TYPE_CHECKING:
    from soul.study.config import StudyConfig
    from soul.study.data import StudyData

TITLES = {"tofu": "TOFU", "copyright": "passages of a text", "detox": "unsafe answers"}
OBJECTIVES = {"copyright": ("graddiff", "npo"), "detox": ("po", "npo")}  # of SOUL's paper on these tasks
HELP = "AdamW against SOUL, over objectives, grids and seeds, with small models trained from scratch"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--task", default="tofu", metavar="NAME", help=f"{', '.join(TITLES)} (default: %(default)s)")
    parser.add_argument("--data", required=True, metavar="PATH", help="directory with TOFU's files; for copyright a text file; "
                        "for detox files with PKU-SafeRLHF's columns")  # fmt: skip
    parser.add_argument("--preset", default="laptop", metavar="NAME", help="laptop or tofu (default: %(default)s)")
    parser.add_argument("--output", default="out/study", metavar="DIR", help="new directory, or that of a study to continue")
    parser.add_argument("--seeds", type=numbers_of, metavar="N,N,...", help="seeds of the runs (default: the preset's)")
    parser.add_argument("--objectives", type=names_of, metavar="NAME,...", help="from graddiff, po, npo, simnpo (default: all; "
                        "for copyright graddiff and npo, for detox po and npo)")  # fmt: skip
    add_device(parser)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    from soul.study.config import PRESETS
    from soul.study.data import copyright_data, detox_data, tofu_data
    from soul.study.run import check_ready, run_study
    from soul_kernels.errors import check_choice

    check_choice("preset", args.preset, ("laptop", "tofu"))
    check_choice("task", args.task, tuple(TITLES))
    lists = {"seeds": args.seeds, "objectives": args.objectives}
    if args.objectives is None and args.task in OBJECTIVES:
        lists["objectives"] = OBJECTIVES[args.task]
    changes: dict[str, Any] = {name: tuple(values) for name, values in lists.items() if values is not None}
    config = dataclasses.replace(PRESETS[args.preset], device=args.device, backend=args.backend, **changes)
    output = check_ready(args.output, config)
    data = {"tofu": tofu_data, "copyright": copyright_data, "detox": detox_data}[args.task](args.data, config)
    title = f"Second order against first order on {TITLES[args.task]}"
    show(output, data, config, run_study(output, data, config), title)


def show(output: pathlib.Path, data: "StudyData", config: "StudyConfig", results: dict[str, Any], title: str) -> None:
    """Write the report of a study, and print a summary.

    Args:
        output: directory of the study.
        data: rows of the study.
        config: sizes, grids and seeds of the study.
        results: the return value of `soul.study.run.run_study`, and what `soul.study.report.report` takes beside it.
        title: title of the report.
    """
    from soul.report.write import attempt
    from soul.study.report import summary, table, write_html_report, write_report
    from soul.study.results import Results
    from soul.study.run import Study

    path = write_report(Study(output, data, config), results, title=title)
    by_run = Results(results)
    print(f"\n{table(by_run)}\n\n{summary(by_run)}\n\n{attempt(lambda: write_html_report(output, results, title=title))}")
    print(f"text:     {path}")
    print("pictures: " + ", ".join(str(picture) for picture in sorted(output.glob("*.png"))))

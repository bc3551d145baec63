"""``soul study``: first order against second order on TOFU."""

import dataclasses

from soul.commands._place import add_place

HELP = "AdamW against SOUL on TOFU, over objectives, grids and seeds, with small models trained from scratch"


def add_arguments(parser):
    """Declares the options."""
    parser.add_argument("--data", required=True, metavar="DIR", help="directory with TOFU's files")
    parser.add_argument("--preset", default="laptop", metavar="NAME", help="laptop or tofu (default: %(default)s)")
    parser.add_argument("--output", default="out/study", metavar="DIR", help="new directory, or that of a study to go on with")
    parser.add_argument("--seeds", type=numbers, metavar="N,N,...", help="(default: those of the preset)")
    parser.add_argument("--objectives", type=words, metavar="NAME,...", help="of graddiff, po, npo, simnpo (default: all)")
    add_place(parser)


def words(text):
    """A list, from a text with commas."""
    return tuple(part.strip() for part in text.split(","))


def numbers(text):
    """A list of whole numbers, from a text with commas."""
    return tuple(int(part) for part in words(text))


def run(args):
    """Runs the command."""
    from soul.study.config import PRESETS
    from soul.study.data import tofu_data
    from soul.study.run import check_ready
    from soul_kernels.errors import check_choice

    check_choice("preset", args.preset, ("laptop", "tofu"))
    given = {name: getattr(args, name) for name in ("seeds", "objectives") if getattr(args, name) is not None}
    config = dataclasses.replace(PRESETS[args.preset], device=args.device, backend=args.backend, **given)
    output = check_ready(args.output, config)
    tell(output, tofu_data(args.data, config), config, "Second order against first order on TOFU")


def tell(output, data, config, title):
    """Runs a study, writes its report, and prints what it says."""
    from soul.study.report import summary, table, write_report
    from soul.study.results import Results
    from soul.study.run import Study, run_study

    results = run_study(output, data, config)
    path, found = write_report(Study(output, data, config), results, title=title), Results(results)
    print(f"\n{table(found)}\n\n{summary(found)}\n\nreport:   {path}")
    print("pictures: " + ", ".join(str(picture) for picture in sorted(output.glob("*.png"))))

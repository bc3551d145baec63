"""``soul demo``: a small study on people made up."""

import dataclasses

from soul.commands._place import add_place
from soul.commands.study import tell

HELP = "the whole story in minutes on a CPU, without a download"


def add_arguments(parser):
    """Declares the options."""
    parser.add_argument("--output", default="out/demo", metavar="DIR", help="new directory, or that of a demo to go on with")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of everything random (default: %(default)s)")
    add_place(parser)


def run(args):
    """Runs the command."""
    from soul.study.config import PRESETS
    from soul.study.data import demo_data, write_rows
    from soul.study.run import check_ready

    config = dataclasses.replace(PRESETS["demo"], seeds=(args.seed,), device=args.device, backend=args.backend)
    output = check_ready(args.output, config)
    data = demo_data(config)
    tell(output, data, config, "Second order against first order on fictitious authors")
    write_rows(output, data)  # for `soul unlearn`

"""``soul demo``: a small study on people made up."""

import dataclasses

from soul.commands._place import add_place
from soul.commands.study import report

HELP = "the whole story in minutes on a CPU, without a download"


def add_arguments(parser):
    """Declares the options."""
    parser.add_argument("--output", default="out/demo", metavar="DIR", help="new or empty directory (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of everything random (default: %(default)s)")
    add_place(parser)


def run(args):
    """Runs the command."""
    from soul.data import read_jsonl
    from soul.study import DEMO, check_ready, demo_data, run_study

    config = dataclasses.replace(DEMO, seed=args.seed, device=args.device, backend=args.backend)
    output = check_ready(args.output, config)
    output.mkdir(parents=True, exist_ok=True)
    forget, retain = (read_jsonl(path) for path in demo_data(output, seed=args.seed))
    note = f"Fictitious authors made up from seed {args.seed}: {len(forget)} rows to forget, {len(retain)} to retain."
    report(*run_study(forget, retain, output, config, title="Unlearning fictitious authors", data_note=note))

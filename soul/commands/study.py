"""``soul study``: first order against second order on TOFU."""

from soul.commands._place import add_place

HELP = "AdamW against SOUL on TOFU, with a small model trained from scratch"


def add_arguments(parser):
    """Declares the options."""
    parser.add_argument("--data", required=True, metavar="DIR", help="directory with TOFU's forget10.jsonl and retain90.jsonl")
    parser.add_argument(
        "--authors", type=int, default=40, metavar="N", help="of TOFU's 200, one in ten to forget (default: %(default)s)"
    )
    parser.add_argument("--output", default="out/study", metavar="DIR", help="new or empty directory (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of everything random (default: %(default)s)")
    add_place(parser)


def run(args):
    """Runs the command."""
    from soul.study import StudyConfig, check_ready, run_study, tofu_data

    config = StudyConfig(seed=args.seed, device=args.device, backend=args.backend)
    output = check_ready(args.output, config)
    forget, retain = tofu_data(args.data, args.authors)
    note = f"TOFU, {args.authors} of its 200 authors: {len(forget)} rows to forget, {len(retain)} to retain."
    report(*run_study(forget, retain, output, config, title="Unlearning TOFU", data_note=note))


def report(rows, path):
    """Prints the table of a study, and where the rest is."""
    from soul.study import table

    print(f"\n{table(rows)}\n\nreport:   {path}")
    print(f"pictures: {path.parent / 'tradeoff.png'}, {path.parent / 'curves.png'}")

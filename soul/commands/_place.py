"""Where a command computes."""


def add_place(group):
    """Declares ``--device`` and ``--backend``."""
    group.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu or cuda (default: %(default)s)")
    group.add_argument(
        "--backend", default="auto", metavar="NAME", help="auto, triton, compile, torch or reference (default: %(default)s)"
    )

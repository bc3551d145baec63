"""The options of a command that choose device and backend."""

import argparse


def add_device(group: argparse._ActionsContainer) -> None:
    """Declare ``--device`` and ``--backend`` on a parser or on a group of one."""
    group.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu or cuda (default: %(default)s)")
    group.add_argument(
        "--backend", default="auto", metavar="NAME", help="auto, triton, compile, torch or reference (default: %(default)s)"
    )

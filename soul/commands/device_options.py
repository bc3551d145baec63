"""The options of a command that choose device, backend, and how models are loaded."""

import argparse


def add_device(group: argparse._ActionsContainer) -> None:
    """Declare ``--device`` and ``--backend`` on a parser or on a group of one."""
    group.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu or cuda (default: %(default)s)")
    group.add_argument(
        "--backend", default="auto", metavar="NAME", help="auto, triton, compile, torch or reference (default: %(default)s)"
    )


def add_loading(group: argparse._ActionsContainer) -> None:
    """Declare ``--dtype`` and ``--load-in-4bit`` of a command that only asks its models."""
    group.add_argument("--dtype", default="float32", metavar="NAME", help="dtype of the parameters (default: %(default)s)")
    group.add_argument("--load-in-4bit", action="store_true", help="load models, or those below adapters, in 4 bits (nf4)")

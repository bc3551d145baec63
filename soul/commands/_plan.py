"""Options of the commands that plan."""

from soul.plan.cards import CARDS, NETWORK, card_of
from soul.plan.case import check_where


def add_card(group, hint=""):
    """Declares ``--card``, ``--gpus`` and ``--network``."""
    group.add_argument("--card", default="h100", metavar="NAME", help=f"{hint}{', '.join(CARDS)}, or GB:GB/s:TFLOP/s "
                       "(default: %(default)s)")  # fmt: skip
    group.add_argument("--gpus", type=int, default=1, metavar="N", help=f"{hint}FSDP2 over so many (default: %(default)s)")
    group.add_argument("--network", type=float, default=NETWORK / 1e9, metavar="GB/S", help=f"{hint}into each GPU "
                       "(default: %(default)s)")  # fmt: skip
    group.add_argument("--attention", default="sdpa", metavar="NAME", help=f"{hint}sdpa or eager (default: %(default)s)")


def names_of(text):
    """A list of names, from a text with commas."""
    return [name.strip() for name in text.split(",")]


def card_options(args):
    """Return those options as keyword arguments of `soul.plan.plan`.

    Raises:
        ArgumentError: one of them is not what it may be.
    """
    options = dict(gpus=args.gpus, network=args.network * 1e9, attention=args.attention)
    check_where(**options)
    return options | {"card": card_of(args.card)}

"""The options of a command that choose the cards of a plan."""

import argparse
from typing import Any

from soul.plan.cards import CARDS, NETWORK, card_of
from soul.plan.case import check_hardware


def add_card(group: argparse._ActionsContainer, hint: str = "") -> None:
    """Declare ``--card``, ``--gpus``, ``--network``, ``--host-bandwidth`` and ``--attention`` on a parser or a group of one.

    Args:
        group: parser or group that gets the options.
        hint: text before the help text of each option.
    """
    group.add_argument("--card", default="h100", metavar="NAME", help=f"{hint}{', '.join(CARDS)}, or GB:GB/s:TFLOP/s "
                       "(default: %(default)s)")  # fmt: skip
    group.add_argument("--gpus", type=int, default=1, metavar="N", help=f"{hint}GPUs that FSDP2 shards over (default: "
                       "%(default)s)")  # fmt: skip
    group.add_argument("--network", type=float, default=NETWORK / 1e9, metavar="GB/S", help=f"{hint}bandwidth into each GPU "
                       "from other machines (default: %(default)s)")  # fmt: skip
    group.add_argument("--host-bandwidth", type=float, metavar="GB/S", help=f"{hint}bandwidth between main memory and each "
                       "GPU, in each direction, for --state-offload (default: the card's)")  # fmt: skip
    group.add_argument("--attention", default="sdpa", metavar="NAME", help=f"{hint}sdpa or eager (default: %(default)s)")


def card_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the values of the options of `add_card` as keyword arguments of `soul.plan.plan`.

    Raises:
        ArgumentError: an option has a value that is not allowed.
    """
    host = None if args.host_bandwidth is None else args.host_bandwidth * 1e9
    options: dict[str, Any] = dict(gpus=args.gpus, network=args.network * 1e9, host_bandwidth=host, attention=args.attention)
    check_hardware(**options)
    return options | {"card": card_of(args.card)}

"""``python -m bench plan --model 70b --gpus 64``: time and memory of a step on many cards, an estimate on paper.

`soul.plan` on the ceilings of this machine's GPU, measured now; without a GPU, or with ``--card``, on those of that card. The
bandwidth of the network is what ``--network`` says, and never measured. Options: those of ``soul plan``.
"""

import argparse

import torch

from bench._harness import ceilings
from soul.commands import plan as command
from soul.plan import Card, card_of


def measured_card(device: torch.device) -> Card:
    """Return this machine's GPU with its measured ceilings."""
    limits = ceilings(device)
    properties = torch.cuda.get_device_properties(device)
    return Card(
        properties.name,
        properties.total_memory,
        limits["copy_bytes_per_s"],
        limits["gemm_flop_per_s"],
        "copy and GEMM measured in this run",
    )


def main(argv: list[str]) -> int:
    """Print the plan and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench plan", description="An estimate on paper of a step under FSDP2.")
    command.add_arguments(parser)
    parser.set_defaults(card=None)
    args = parser.parse_args(argv)
    try:
        if args.card is None and torch.cuda.is_available():
            args.card = measured_card(torch.device("cuda"))
        else:
            args.card = card_of(args.card or "h100")
        print(f"An estimate on paper, not a measurement: {args.card.name}, rates: {args.card.source}; network as given\n")
        command.run(args)
    except ValueError as error:
        parser.error(str(error))
    return 0

"""``python -m bench plan --model 70b --gpus 64``: time and memory of a step on many cards, an estimate on paper.

`soul.plan` on the ceilings of the GPU that is here, measured now; without one, or for another ``--card``, on that card's. The
bandwidth of the network is what is given, and never measured. Options: those of ``soul plan``.
"""

import argparse

import torch

from bench._harness import ceilings
from soul.commands import plan as command
from soul.plan import Card, card_of


def measured_card(device):
    """The GPU that is here as a `soul.plan.Card`, its ceilings measured."""
    limits, properties = ceilings(device), torch.cuda.get_device_properties(device)
    return Card(
        properties.name,
        properties.total_memory,
        limits["copy_bytes_per_s"],
        limits["gemm_flop_per_s"],
        "copy and GEMM measured in this run",
    )


def main(argv):
    """Prints the plan; returns the exit status."""
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

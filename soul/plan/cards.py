"""What a card can do: by its datasheet and, where that is known, as measured."""

import math
from typing import NamedTuple

from soul_kernels.errors import argument_error

NETWORK = 50e9  # bytes a second into and out of each GPU, where nothing is said: one 400 Gbit/s link a GPU


class Card(NamedTuple):
    """One GPU.

    Attributes:
        name: of the card.
        memory: bytes.
        bandwidth: of its memory, bytes a second.
        flops: dense bf16 GEMMs with fp32 sums, FLOP/s.
        source: where the two rates are from.
        multiprocessors: how many; 0 where that is not needed: only `bench.model` asks.
        clock: cycles a second, the highest.
    """

    name: str
    memory: float
    bandwidth: float
    flops: float
    source: str = "as given"
    multiprocessors: int = 0
    clock: float = 0.0


# Datasheets of NVIDIA: H100 SXM5 80 GB, H200 SXM, A100 SXM 80 GB, and the whitepaper of the Ada architecture. Dense rates: half
# of those that are stated with sparsity. Clocks are those of the fp32 rate, 67 TFLOP/s: 2 FLOPs by 128 lanes a multiprocessor.
DATASHEETS = {
    card.name: card
    for card in (
        Card("h100", 80e9, 3350e9, 989e12, "datasheet", 132, 1.98e9),
        Card("h200", 141e9, 4800e9, 989e12, "datasheet", 132, 1.98e9),
        Card("a100-80gb", 80e9, 2039e9, 312e12, "datasheet"),
        Card("rtx-4090", 24e9, 1008e9, 165e12, "datasheet"),
    )
}
# On an H100 80GB HBM3, torch 2.11, 2026-11-23: a copy of 1 GiB, bytes read and written; a bf16 GEMM of 8192^3, random data.
CEILINGS = {"h100": DATASHEETS["h100"]._replace(bandwidth=3000e9, flops=723e12, source="measured copy and GEMM ceilings")}
CARDS = DATASHEETS | CEILINGS  # a measured ceiling, where there is one


def card_of(card):
    """A `Card`, from one, from a name in ``CARDS``, or from "GB:GB/s:TFLOP/s".

    Raises:
        ArgumentError: neither.
    """
    if isinstance(card, Card):
        return card
    if card in CARDS:
        return CARDS[card]
    try:
        memory, bandwidth, flops = (float(number) for number in str(card).split(":"))
    except ValueError:
        memory = bandwidth = flops = 0.0
    if not all(0 < number < math.inf for number in (memory * 1e9, bandwidth * 1e9, flops * 1e12)):
        expected, remedy = f"one of {', '.join(CARDS)}, or GB:GB/s:TFLOP/s", "for instance 48:864:181"
        raise argument_error("card", expected, repr(card), remedy)
    return Card(str(card), memory * 1e9, bandwidth * 1e9, flops * 1e12)

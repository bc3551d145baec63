"""Memory and rates of GPUs, measured where a measurement is known, otherwise from their datasheets."""

import math
from typing import NamedTuple

from soul_kernels.errors import argument_error

NETWORK = 50e9  # bytes a second into and out of each GPU, the default: one 400 Gbit/s link for each GPU
MAIN_MEMORY = 300e9  # bytes a second of a machine, which its GPUs share: eight channels of DDR5-4800
NODE = 8  # GPUs of a machine


class Card(NamedTuple):
    """One GPU.

    Attributes:
        name: name of the card.
        memory: bytes.
        bandwidth: rate of its memory, bytes a second.
        flops: rate of dense bf16 matrix products with fp32 sums, FLOP/s.
        source: origin of the two rates.
        multiprocessors: number of multiprocessors, which only `bench.model` uses; 0: unknown.
        clock: highest clock, cycles a second; 0: unknown.
        host_bandwidth: rate of its link to main memory, bytes a second in each direction.
        peer_bandwidth: rate of its links to the other GPUs of a machine, bytes a second in each direction; 0: that of the
            network.
    """

    name: str
    memory: float
    bandwidth: float
    flops: float
    source: str = "as given"
    multiprocessors: int = 0
    clock: float = 0.0
    host_bandwidth: float = 32e9
    peer_bandwidth: float = 0.0


# NVIDIA's datasheets of H100 SXM5 80 GB, H200 SXM and A100 SXM 80 GB, and its whitepaper of the Ada architecture. Dense rates
# are half of those stated with sparsity. Clocks follow from the fp32 rate, 67 TFLOP/s: 2 FLOPs in each of 128 lanes of a
# multiprocessor. Links have 16 lanes of PCI Express 5.0 (64 GB/s in each direction) or 4.0 (32 GB/s); those between GPUs are
# NVLink (900 GB/s of an h100 and 600 GB/s of an a100, both directions together), of the rtx-4090 PCI Express.
DATASHEETS = {
    card.name: card
    for card in (
        Card("h100", 80e9, 3350e9, 989e12, "datasheet", 132, 1.98e9, 64e9, 450e9),
        Card("h200", 141e9, 4800e9, 989e12, "datasheet", 132, 1.98e9, 64e9, 450e9),
        Card("a100-80gb", 80e9, 2039e9, 312e12, "datasheet", peer_bandwidth=300e9),
        Card("rtx-4090", 24e9, 1008e9, 165e12, "datasheet", peer_bandwidth=32e9),
    )
}
# Measured on an H100 80GB HBM3, torch 2.11, 2026-11-23: a copy of 1 GiB, bytes read and written; a bf16 GEMM of 8192^3, random
# data.
CEILINGS = {"h100": DATASHEETS["h100"]._replace(bandwidth=3000e9, flops=723e12, source="measured copy and GEMM ceilings")}
CARDS = DATASHEETS | CEILINGS  # a measured ceiling replaces the datasheet


def card_of(card: Card | str) -> Card:
    """Return the `Card` for a card, a name in ``CARDS``, or a text "GB:GB/s:TFLOP/s".

    Raises:
        ArgumentError: the name is unknown, or the text does not have three positive numbers.
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
        expected = f"one of {', '.join(CARDS)}, or GB:GB/s:TFLOP/s"
        raise argument_error("card", expected, repr(card), "for instance 48:864:181")
    return Card(str(card), memory * 1e9, bandwidth * 1e9, flops * 1e12)

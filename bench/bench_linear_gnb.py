"""Cross-entropy with drawn labels: ours against our plain cross-entropy of the same size, and against torch.multinomial.

These are the cases of GNB in the tables of the losses at two other sizes: the few tokens of a batch of short answers, and a
small vocabulary. The cost of drawing is the time of ours over that of our plain cross-entropy, and should be at most 1.03.
"""

import functools
from collections.abc import Callable, Iterator

import torch

from bench._harness import Case
from bench._heads import QUICK, SHAPES, SMALL, functions_of, make_case


def cases(device: torch.device, quick: bool) -> Iterator[Callable[[], Case]]:
    """Yield functions that make the cases; without a GPU at a small size, by our references."""
    if device.type == "cpu":
        sizes = [QUICK if quick else SMALL]
    else:
        sizes = [(512, *SHAPES[0]), (4096, *SHAPES[1])]
    functions = functions_of("GNB", device, quick)
    for size in sizes:
        for frozen in (False, True):
            yield functools.partial(make_case, "GNB", *size, frozen, functions, device, op="linear_gnb")

"""Divergence of each token from a reference model, forward and backward of its mean: ours, eager PyTorch and torch.compile.

The divergences may go into any function, so with a trained head backward computes all logits again: 6 products in place of the
4 of the floor. An objective of the divergences, which is the variant beside it, does not need that.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from bench._harness import Case
from bench._heads import QUICK, SHAPES, SMALL, Function, Inputs, Output, functions_of, make_case, ours
from soul_kernels import linear_kl


def per_token(**options: Any) -> Function:
    """Return the mean of ``linear_kl`` as a function of `Inputs`."""

    def loss(inputs: Inputs) -> Output:
        assert inputs.ref_hidden is not None
        values = linear_kl(
            inputs.hidden, inputs.weight, inputs.labels, inputs.ref_hidden, ref_weight=inputs.ref_weight, rows=inputs.rows,
            **options,
        )  # fmt: skip
        return values.mean(), values.detach()

    return loss


def cases(device: torch.device, quick: bool) -> Iterator[Callable[[], Case]]:
    """Yield functions that make the cases; without a GPU at a small size, by our references."""
    functions = functions_of("KL", device, quick) | {"ours": per_token}
    if "ours, chunks of 4 GiB" in functions:
        functions["ours, chunks of 4 GiB"] = lambda: per_token(chunk_bytes=2**32)
    functions["ours, as an objective"] = lambda: ours("KL")
    if device.type == "cpu":
        sizes = [QUICK if quick else SMALL]
    else:
        sizes = [(4096, *SHAPES[0]), (512, *SHAPES[0])]
    for size in sizes:
        for frozen in (False, True):
            yield functools.partial(make_case, "KL", *size, frozen, functions, device, op="linear_kl, mean")

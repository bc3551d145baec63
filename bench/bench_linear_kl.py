"""Divergence of each token from a reference model: ours, eager PyTorch and torch.compile, forward and backward of its mean.

As a number for each token it may go into any function. So with a trained head backward computes all logits again: 6 products in
place of the 4 of the floor. An objective of the divergences (the variant beside it) does not need that.
"""

import functools
from collections.abc import Callable, Iterator

import torch

from bench._harness import Case
from bench._heads import QUICK, SHAPES, SMALL, Function, Inputs, Output, functions_of, make_case, ours
from soul_kernels import LinearOptions, linear_kl


def per_token(chunk_bytes: int | None = None) -> Function:
    """Return a function of `Inputs`: the mean of ``linear_kl``, and its values."""

    def loss(inputs: Inputs) -> Output:
        options = LinearOptions(token_indices=inputs.token_indices, chunk_bytes=chunk_bytes)
        values = linear_kl(inputs.hidden, inputs.weight, inputs.labels, inputs.reference, options=options)
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

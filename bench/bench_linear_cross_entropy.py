"""Cross-entropy by the op of that name: ours in three ways, eager PyTorch and torch.compile, forward and backward of its mean.

"ours" and "ours, as an objective" do the same work: 3 products of a trained head, with one read of the logits. "ours, with the
logsumexp" returns it for any function on top, so that backward computes all logits again: 4 products. "ours, with predictions"
reads the logits once more. The table of `bench_linear_loss` compares the same loss with other libraries.
"""

import functools
from collections.abc import Callable, Iterator

import torch

from bench._harness import Case
from bench._heads import QUICK, SHAPES, SMALL, Function, Inputs, Output, functions_of, make_case, ours
from soul_kernels import LinearOptions, linear_cross_entropy


def cross_entropy(chunk_bytes: int | None = None, return_lse: bool = False, return_predictions: bool = False) -> Function:
    """Return a function of `Inputs`: the mean cross-entropy, by the op with some of its results."""

    def loss(inputs: Inputs) -> Output:
        options = LinearOptions(token_indices=inputs.token_indices, chunk_bytes=chunk_bytes)
        arguments = inputs.hidden, inputs.weight, inputs.labels
        if return_lse:
            return linear_cross_entropy(*arguments, return_lse=True, options=options)[0]
        if return_predictions:
            return linear_cross_entropy(*arguments, return_predictions=True, options=options)[0]
        return linear_cross_entropy(*arguments, options=options)

    return loss


def cases(device: torch.device, quick: bool) -> Iterator[Callable[[], Case]]:
    """Yield functions that make the cases; without a GPU at a small size."""
    functions = functions_of("CE", device, quick) | {"ours": cross_entropy}
    if "ours, chunks of 4 GiB" in functions:
        functions["ours, chunks of 4 GiB"] = lambda: cross_entropy(chunk_bytes=2**32)
    functions["ours, with the logsumexp"] = lambda: cross_entropy(return_lse=True)
    functions["ours, with predictions"] = lambda: cross_entropy(return_predictions=True)
    functions["ours, as an objective"] = lambda: ours("CE")
    if device.type == "cpu":
        sizes = [QUICK if quick else SMALL]
    else:
        sizes = [(4096, *SHAPES[0]), (512, *SHAPES[0])]
    for size in sizes:
        for frozen in (False, True):
            yield functools.partial(make_case, "CE", *size, frozen, functions, device, op="linear_cross_entropy")

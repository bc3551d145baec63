"""The inverse of the empirical Fisher matrix times a vector, with a few gradients in memory at a time.

`soul.run.influence.WoodFisher` stores a product of the parameters' size for every gradient. Here gradients are computed again
instead. With the n gradients as the columns of G, the Woodbury identity gives the same vector::

    F = damping I + (1/n) G G^T
    F^-1 v = (v - G c) / damping        (n damping I + G^T G) c = G^T v

G^T G has n x n numbers. Its entries are dot products of two gradients: some gradients are held, and meet all later ones in one
pass; then the next ones are held.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

Gradients = Callable[[int], Iterator[Sequence[Tensor]]]  # index of the first gradient -> that one and all later ones, in order
BESIDE = 5  # further tensors of the parameters' size: v, the result, a gradient in two dtypes, and the weights that are moved


def most_held(memory_gb: float, n_elements: int) -> int:
    """Return how many gradients may be held at once, 1 at least.

    Args:
        memory_gb: bound on all tensors of the parameters' size together, in 1e9 bytes.
        n_elements: number of trained parameters; each tensor of their size takes 4 bytes an element.
    """
    return max(1, int(memory_gb * 1e9 / (4 * n_elements)) - BESIDE)


def solve_streamed(
    gradients: Gradients,
    n: int,
    vectors: Sequence[Tensor],
    *,
    damping: float,
    held: int,
    blockwise: bool = False,
    add_up: Callable[[Tensor], Tensor] | None = None,
    shares: Sequence[float] | None = None,
) -> list[Tensor]:
    """Return ``F^-1 v``, a list of fp32 tensors.

    Sums over elements are fp32, those over tensors and the system of n equations fp64. It takes about ``n (n / held + 3) / 2``
    gradients, and holds ``held`` of them.

    Args:
        gradients: called several times with the index of a gradient; yields that one and all later ones, the same each time. A
            gradient is a tensor for each parameter.
        n: number of gradients.
        vectors: v, a list of tensors of the gradients' shapes; not changed.
        damping: > 0, in units of F.
        held: number of gradients in memory, >= 1.
        blockwise: treat each tensor as a block of its own, as `soul.run.influence.WoodFisher` does.
        add_up: adds a tensor up over the processes that hold shards of the gradients; None: this process has all of them.
        shares: for each tensor, the part of its products that this process adds; None: all of them.
    """
    vectors = [v.detach().float() for v in vectors]
    blocks = len(vectors) if blockwise else 1
    gram = torch.zeros(blocks, n, n, dtype=torch.float64, device="cpu")
    projections = torch.zeros(blocks, n, dtype=torch.float64, device="cpu")
    for begin in range(0, n, held):
        kept: list[list[Tensor]] = []
        for index, gradient in enumerate(gradients(begin), begin):
            wide = [tensor.detach().float() for tensor in gradient]
            if len(kept) < held:
                kept.append(wide)
            if begin == 0:
                projections[:, index] = _dots(wide, vectors, blockwise, shares)
            for other, one in enumerate(kept, begin):
                gram[:, other, index] = gram[:, index, other] = _dots(one, wide, blockwise, shares)
    if add_up is not None:
        gram, projections = add_up(gram), add_up(projections)
    system = gram + n * damping * torch.eye(n, dtype=torch.float64, device="cpu")
    coefficients = torch.linalg.solve(system, projections.unsqueeze(2)).squeeze(2)  # [blocks, n]
    results = [v / damping for v in vectors]
    for index, gradient in enumerate(gradients(0)):
        factors = (-coefficients[:, index] / damping).tolist() * (1 if blockwise else len(results))
        for result, tensor, factor in zip(results, gradient, factors):
            result.add_(tensor.detach().float(), alpha=factor)
    return results


def _dots(a: Sequence[Tensor], b: Sequence[Tensor], blockwise: bool, shares: Sequence[float] | None) -> Tensor:
    """Return the dot product of two gradients, [1] fp64, or of each of their tensors, [number of tensors]."""
    dots = torch.stack([torch.dot(x.flatten(), y.flatten()).double() for x, y in zip(a, b)]).cpu()
    if shares is not None:
        dots = dots * dots.new_tensor(shares)
    return dots if blockwise else dots.sum(0, keepdim=True)

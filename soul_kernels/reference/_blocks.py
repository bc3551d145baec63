"""Long tensors in blocks, so that the temporaries of a formula stay in the processor's caches.

The reference of an optimizer's op makes some forty operations. Over whole tensors each of them would go through memory once,
and make a temporary of the tensor's size. All of them are elementwise, and a block consists of whole groups: the values that
share the scale of an 8-bit state. Each group is a row of the block. So the results are the same bit for bit, whatever `BLOCK`
is.
"""

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from soul_kernels.reference.rounding import GROUP, in_memory_order

# Elements of a block, a multiple of GROUP. Among 2^13 to 2^18 this was the fastest on one thread with 2 MiB of second-level
# cache; 2^17 takes up to half as long again.
BLOCK = 1 << 16
SPAN = 1 << 32  # elements that share a key of the noise


def blocks(
    written: Sequence[Tensor | None], read: Sequence[Tensor | None], scales: Sequence[Tensor | None] = (),
    size: int | None = None, first: int = 0,
) -> Iterator[tuple]:  # fmt: skip
    """Yield tensors of one shape block by block, in the order in which the written ones lie in memory.

    Args:
        written: dense tensors of one layout; entries but the first may be None.
        read: tensors in any layout, or None. A tensor of another layout than the written ones is copied.
        scales: ceil(numel / GROUP) int16 each, or their bytes, in any shape: the scales of 8-bit states; or None.
        size: elements of a block, a power of two and a multiple of GROUP; None: `BLOCK`.
        first: index of the first element in the whole tensor: 0 unless the tensors are shards.

    Yields:
        The index of the block's first element in the whole tensor; then a view of every tensor, [rows, GROUP], or [1, fewer
        than GROUP] for the elements at the end that fill no group; then the scales [rows]. None stays None. No block reaches
        beyond a multiple of 2^32.
    """
    like = written[0]
    assert like is not None
    # Detached: a view of a parameter would need a gradient, and torch.compile would specialize on the parameter's shape.
    vectors = [tensor if tensor is None else in_memory_order(tensor.detach()) for tensor in written]
    vectors += [tensor if tensor is None else in_memory_order(_laid_out(tensor.detach(), like)) for tensor in read]
    scales = [scale if scale is None else scale.view(-1).view(torch.int16) for scale in scales]
    size = BLOCK if size is None else size
    borders = [0, *range(SPAN - first % SPAN, like.numel(), SPAN), like.numel()]
    for low, high in itertools.pairwise(borders):
        whole = high - (high - low) % GROUP
        for start, stop in itertools.pairwise([*range(low, whole, size), whole, *([high] if high > whole else ())]):
            shape = (-1, GROUP) if stop <= whole else (1, -1)
            views = (vector if vector is None else vector[start:stop].view(shape) for vector in vectors)
            groups = slice(start // GROUP, -(-stop // GROUP))
            yield first + start, *views, *(scale if scale is None else scale[groups] for scale in scales)


def entry(tensors: Sequence[Tensor | None] | None, index: int) -> Tensor | None:
    """Return one tensor of a list, or None if there is no list."""
    return tensors[index] if tensors else None


def _laid_out(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a tensor with the strides of ``like``: a copy, unless it has them already."""
    return tensor if tensor.stride() == like.stride() else torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)

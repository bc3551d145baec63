"""Long tensors in blocks, so that what a formula needs in between stays in the processor's caches.

Over whole tensors the references of the optimizer's ops would go through memory once for each of some forty operations, and
hold as many temporaries of a tensor's size. All these operations are elementwise, and 8-bit states share a scale within groups
that no block divides, so the results are the same bit for bit, whatever `BLOCK` is.
"""

from collections.abc import Iterator, Sequence

import torch

from soul_kernels.reference.rounding import GROUP, in_memory_order

# Elements, a multiple of GROUP. Of 2^13 to 2^18 this was the fastest; 2^15 takes a fifth more (AMD EPYC, one thread).
BLOCK = 1 << 17


def blocks(written: Sequence, read: Sequence, scales: Sequence = ()) -> Iterator[tuple]:
    """Yield tensors of one shape block by block, in the order in which the written ones lie in memory.

    Args:
        written: dense tensors that lie alike, or None.
        read: tensors in any layout, or None. One that lies otherwise is copied first.
        scales: fp32 [ceil(numel / GROUP)] tensors of the scales of 8-bit states, or None.

    Yields:
        The index of the block's first element; then a view [n <= BLOCK] of every tensor, and the scales of its groups. What was
        None stays None.
    """
    like = written[0]
    vectors = [tensor if tensor is None else in_memory_order(tensor) for tensor in written]
    vectors += [tensor if tensor is None else in_memory_order(_laid_out(tensor, like)) for tensor in read]
    for start in range(0, like.numel(), BLOCK):
        stop = min(start + BLOCK, like.numel())
        views = (vector if vector is None else vector[start:stop] for vector in vectors)
        groups = slice(start // GROUP, -(-stop // GROUP))
        yield start, *views, *(scale if scale is None else scale[groups] for scale in scales)


def _laid_out(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return a tensor with the strides of another one, a copy where it has others."""
    return tensor if tensor.stride() == like.stride() else torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)

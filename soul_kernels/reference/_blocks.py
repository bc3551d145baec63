"""Long tensors in blocks, so that what a formula needs in between stays in the processor's caches.

Over whole tensors the references of the optimizer's ops would go through memory once for each of some forty operations, and
hold as many temporaries of a tensor's size. All these operations are elementwise, and 8-bit states share a scale within groups
that no block divides, so the results are the same bit for bit, whatever `BLOCK` is. A block has the groups for its rows.
"""

import itertools
from collections.abc import Iterator, Sequence

import torch

from soul_kernels.reference.rounding import GROUP, in_memory_order

# Elements, a multiple of GROUP. Of 2^13 to 2^18 this was the fastest (2 MiB of second-level cache, one thread); 2^17 takes up
# to half more.
BLOCK = 1 << 16
SPAN = 1 << 32  # elements that share a key of noise


def blocks(
    written: Sequence, read: Sequence, scales: Sequence = (), size: int | None = None, first: int = 0
) -> Iterator[tuple]:
    """Yield tensors of one shape block by block, in the order in which the written ones lie in memory.

    Args:
        written: dense tensors that lie alike, or None.
        read: tensors in any layout, or None. One that lies otherwise is copied first.
        scales: fp32 [ceil(numel / GROUP)] tensors of the scales of 8-bit states, or None.
        size: elements of a block, a power of two and multiple of GROUP; None: `BLOCK`.
        first: number of the first element in the tensor that these are a piece of.

    Yields:
        The number of the block's first element in the whole tensor; then a view of every tensor, [rows, GROUP] or, of what is
        left at the end, [1, less than GROUP]; then the scales [rows]. What was None stays None. No block reaches beyond a
        multiple of 2^32.
    """
    like = written[0]
    # Detached: views of a parameter would need gradients, and have the parameter's shape for torch.compile to remember.
    vectors = [tensor if tensor is None else in_memory_order(tensor.detach()) for tensor in written]
    vectors += [tensor if tensor is None else in_memory_order(_laid_out(tensor.detach(), like)) for tensor in read]
    size = BLOCK if size is None else size
    borders = [0, *range(SPAN - first % SPAN, like.numel(), SPAN), like.numel()]
    for low, high in itertools.pairwise(borders):
        whole = high - (high - low) % GROUP
        for start, stop in itertools.pairwise([*range(low, whole, size), whole, *([high] if high > whole else ())]):
            shape = (-1, GROUP) if stop <= whole else (1, -1)
            views = (vector if vector is None else vector[start:stop].view(shape) for vector in vectors)
            groups = slice(start // GROUP, -(-stop // GROUP))
            yield first + start, *views, *(scale if scale is None else scale[groups] for scale in scales)


def _laid_out(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return a tensor with the strides of another one, a copy where it has others."""
    return tensor if tensor.stride() == like.stride() else torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)

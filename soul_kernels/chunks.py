"""How the rows of a head are cut into chunks, and what a chunk needs in memory."""

from typing import NamedTuple

import torch

CHUNK_BYTES = 2**30  # scratch for one chunk: fp32 logits and their gradient in the dtype of the inputs
CPU_CHUNK_BYTES = 2**26  # on a CPU, whose GEMMs gain nothing from more
ROW_ALIGNMENT = 64  # elements; odd vocabularies (50257) would lose 16-byte accesses and the fast GEMMs
TILE = 128  # rows; height of a GEMM tile


class Options(NamedTuple):
    """How to compute.

    Attributes:
        compute_dtype: to which hidden states and weights are rounded.
        logits_dtype: fp32, or the compute dtype.
        chunk_bytes: scratch memory of a chunk.
        backend: "triton" or "torch", whose row functions read the logits of a chunk; or "reference", which is no sweep.
    """

    compute_dtype: torch.dtype
    logits_dtype: torch.dtype
    chunk_bytes: int
    backend: str = "triton"

    @property
    def fused(self) -> bool:
        """Whether chunks of logits are swept, and gradients formed on the way; else the reference computes, under autograd."""
        return self.backend != "reference"

    @property
    def factor_dtype(self) -> torch.dtype:
        """Of hidden states and gradients of logits as factors of the GEMMs. The weight stays in the compute dtype.

        Without kernels the gradient always takes the place of the logits; `torch.mm` has no GEMM from bf16 to fp32 on a CPU.
        """
        return self.compute_dtype if self.backend == "triton" else self.logits_dtype

    @property
    def result_dtype(self) -> torch.dtype:
        """Of losses, log-probabilities and sums of gradients: fp32, or fp64 where that is computed in."""
        return torch.promote_types(self.compute_dtype, torch.float32)


class Chunk(NamedTuple):
    """Rows ``start`` to ``stop``, which belong to sequences ``first`` to ``last`` (exclusive, both)."""

    start: int
    stop: int
    first: int
    last: int

    @property
    def part(self):
        """Its rows, as a slice."""
        return slice(self.start, self.stop)


def row_width(n_vocab):
    """Elements from one row of scratch memory to the next."""
    return -(-n_vocab // ROW_ALIGNMENT) * ROW_ALIGNMENT


def row_bytes(n_vocab, options, has_reference):
    """Scratch memory of a row: logits, those of the reference, and the gradient where it cannot take the logits' place."""
    factor, logits = options.factor_dtype, options.logits_dtype
    element = logits.itemsize * (2 if has_reference else 1) + (0 if logits == factor else factor.itemsize)
    return row_width(n_vocab) * element


def chunk_rows(n_vocab, options, has_reference):
    """Rows of a chunk: what the budget allows, in whole tiles where it allows one."""
    limit = max(1, options.chunk_bytes // row_bytes(n_vocab, options, has_reference))
    return limit // TILE * TILE or limit

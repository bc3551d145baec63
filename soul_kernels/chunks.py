"""Options of the ops on hidden states, and how the rows of a head are cut into chunks that fit into a memory budget.

A row is one token that takes part: its logits, [V], are a row of the matrix that an op computes one chunk at a time.
"""

from typing import NamedTuple

import torch

from soul_kernels.errors import argument_error

CHUNK_BYTES = 2**30  # scratch for one chunk: fp32 logits and their gradient in the dtype of the inputs
CPU_CHUNK_BYTES = 2**26  # on a CPU, whose GEMMs gain nothing from more
ROW_ALIGNMENT = 64  # elements; odd vocabularies (50257) would lose 16-byte accesses and the fast GEMMs
TILE = 128  # rows; height of a GEMM tile


class LinearOptions(NamedTuple):
    """Options that all ops ``linear_*`` share. None of them changes what is computed, but for rounding.

    Attributes:
        token_indices: [R] int64, rising flat indices ``b * T + t`` of the tokens to compute: every token that carries a label
            (for `linear_gnb`, every token that is kept), and any ignored ones. The last index may repeat if its token is
            ignored, to pad R to a fixed size. As a CPU tensor they spare a wait for the device. None: taken from the labels.
            The reference checks them and does without.
        logits_dtype: dtype of the logits of a chunk: torch.float32, or the dtype of hidden, which saves 2 to 8% of the time and
            half of the scratch, and costs 7e-3 in log-probability. For a divergence close to 0 it costs more than 100% of the
            gradient. Without kernels the logits are always fp32.
        chunk_bytes: scratch memory for one chunk, in bytes. None: 1 GiB, on a CPU 64 MiB.
        backend: "auto" (Triton on a GPU and under the interpreter, else "torch"); "triton"; "torch", the same sweep over chunks
            in plain PyTorch; or "reference", the definition, which keeps all logits. "compile" is "torch". Second derivatives
            and forward-mode ones need "reference", called outside of torch.compile.
    """

    token_indices: torch.Tensor | None = None
    logits_dtype: torch.dtype = torch.float32
    chunk_bytes: int | None = None
    backend: str = "auto"


DEFAULT_OPTIONS = LinearOptions()


class ResolvedOptions(NamedTuple):
    """How a call computes: what `LinearOptions` come to with its tensors, its device and autocast.

    Attributes:
        compute_dtype: dtype to which hidden states and weights are rounded.
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
        """Dtype of hidden states and gradients of logits as factors of the GEMMs. The weight stays in the compute dtype.

        Without kernels the gradient always takes the place of the logits; `torch.mm` has no GEMM from bf16 to fp32 on a CPU.
        """
        return self.compute_dtype if self.backend == "triton" else self.logits_dtype

    @property
    def result_dtype(self) -> torch.dtype:
        """Dtype of losses, log-probabilities and sums of gradients."""
        return result_dtype(self.compute_dtype)


def result_dtype(compute_dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of results: fp32, or fp64 where that is computed in."""
    return torch.promote_types(compute_dtype, torch.float32)


class Chunk(NamedTuple):
    """Rows ``start`` to ``stop``, which belong to sequences ``first`` to ``last`` (exclusive, both)."""

    start: int
    stop: int
    first: int
    last: int

    @property
    def span(self) -> slice:
        """The rows, as a slice."""
        return slice(self.start, self.stop)


def row_width(n_vocab: int) -> int:
    """Return the number of elements from one row of scratch memory to the next."""
    return -(-n_vocab // ROW_ALIGNMENT) * ROW_ALIGNMENT


def row_bytes(n_vocab: int, options: ResolvedOptions, has_reference: bool) -> int:
    """Return the scratch memory of a row, in bytes.

    It holds the logits, those of a reference model, and the gradient where it cannot take the logits' place.
    """
    factor, logits = options.factor_dtype, options.logits_dtype
    element = logits.itemsize * (2 if has_reference else 1) + (0 if logits == factor else factor.itemsize)
    return row_width(n_vocab) * element


def chunk_rows(n_vocab: int, options: ResolvedOptions, has_reference: bool) -> int:
    """Return the number of rows of a chunk that the budget allows, in whole tiles where it allows one."""
    limit = max(1, options.chunk_bytes // row_bytes(n_vocab, options, has_reference))
    return limit // TILE * TILE or limit


def check_options(options: LinearOptions) -> None:
    """Raise unless ``options`` are `LinearOptions`."""
    if not isinstance(options, LinearOptions):
        remedy = "pass for instance LinearOptions(backend='reference')"
        raise argument_error("options", "soul_kernels.LinearOptions", type(options).__name__, remedy)

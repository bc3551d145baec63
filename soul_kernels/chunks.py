"""Options of the ops on hidden states, and the sizes of the chunks that their rows are cut into.

A row is one token that takes part: its logits [V] are a row of the matrix that an op computes one chunk at a time. A chunk is
as many rows as fit into a memory budget.
"""

from typing import NamedTuple

import torch

from soul_kernels.errors import argument_error

CHUNK_BYTES = 2**30  # scratch for one chunk: fp32 logits and their gradient in the dtype of the inputs
CPU_CHUNK_BYTES = 2**26  # the same on a CPU; larger chunks do not make its GEMMs faster
ROW_ALIGNMENT = 64  # elements; odd vocabularies (50257) would lose 16-byte accesses and the fast GEMMs
TILE = 128  # rows; height of a GEMM tile


class LinearOptions(NamedTuple):
    """Options of all ``linear_*`` ops. None of them changes the results, except by rounding.

    Attributes:
        token_indices: [R] int64, rising flat indices ``b * T + t`` of the tokens to compute: every token that carries a label
            (for `linear_gnb`, every token that is kept), and any ignored ones. The last index may repeat if its token is
            ignored, to pad R to a fixed size. A CPU tensor spares a wait for the device. None: taken from the labels. The
            reference only checks them.
        logits_dtype: dtype of the logits of a chunk: torch.float32, or the dtype of hidden, which saves 2 to 8% of the time and
            half of the scratch. It causes errors of 7e-3 in log-probabilities, and of more than 100% in the gradient of a
            divergence close to 0. Without kernels the logits are always fp32.
        chunk_bytes: scratch memory for one chunk, in bytes. None: 1 GiB, on a CPU 64 MiB.
        backend: "auto" (Triton on a GPU and under the interpreter, else "torch"); "triton"; "torch", the same sweep over chunks
            in plain PyTorch; or "reference", the definition, which keeps all logits. "compile" means "torch". Second and
            forward-mode derivatives need "reference", called outside of torch.compile.
    """

    token_indices: torch.Tensor | None = None
    logits_dtype: torch.dtype = torch.float32
    chunk_bytes: int | None = None
    backend: str = "auto"


DEFAULT_OPTIONS = LinearOptions()


class ResolvedOptions(NamedTuple):
    """`LinearOptions` with all defaults filled in, for the tensors, the device and the autocast of one call.

    Attributes:
        compute_dtype: dtype to which hidden states and weights are rounded.
        logits_dtype: fp32 (fp64 for fp64 inputs), or the compute dtype.
        chunk_bytes: scratch memory for one chunk, in bytes.
        backend: "triton" or "torch", which sweep over chunks of logits; or "reference", which does not.
    """

    compute_dtype: torch.dtype
    logits_dtype: torch.dtype
    chunk_bytes: int
    backend: str = "triton"

    @property
    def fused(self) -> bool:
        """Whether a sweep over chunks of logits computes results and gradients; else the reference does, under autograd."""
        return self.backend != "reference"

    @property
    def factor_dtype(self) -> torch.dtype:
        """Dtype of hidden states and of gradients of logits as factors of the GEMMs. The weight stays in the compute dtype.

        Without kernels it is the dtype of the logits: the gradient always overwrites them, and on a CPU `torch.mm` has no GEMM
        from bf16 to fp32.
        """
        return self.compute_dtype if self.backend == "triton" else self.logits_dtype

    @property
    def result_dtype(self) -> torch.dtype:
        """Dtype of losses, log-probabilities and sums of gradients."""
        return result_dtype(self.compute_dtype)


def result_dtype(compute_dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of results: fp64 if the compute dtype is fp64, else fp32."""
    return torch.promote_types(compute_dtype, torch.float32)


class Chunk(NamedTuple):
    """Rows ``start`` to ``stop`` of sequences ``first`` to ``last``; ``stop`` and ``last`` are exclusive."""

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


def row_bytes(n_vocab: int, options: ResolvedOptions, has_ref_model: bool) -> int:
    """Return the scratch memory of a row, in bytes.

    It holds the logits, those of a reference model, and the gradient unless that overwrites the logits.
    """
    factor = options.factor_dtype
    logits = options.logits_dtype
    element = logits.itemsize * (2 if has_ref_model else 1) + (0 if logits == factor else factor.itemsize)
    return row_width(n_vocab) * element


def chunk_rows(n_vocab: int, options: ResolvedOptions, has_ref_model: bool) -> int:
    """Return the number of rows of a chunk that the budget allows, rounded down to whole tiles if it allows one."""
    limit = max(1, options.chunk_bytes // row_bytes(n_vocab, options, has_ref_model))
    return limit // TILE * TILE or limit


def check_options(options: LinearOptions) -> None:
    """Raise unless ``options`` are `LinearOptions`."""
    if not isinstance(options, LinearOptions):
        remedy = "pass for instance LinearOptions(backend='reference')"
        raise argument_error("options", "soul_kernels.LinearOptions", type(options).__name__, remedy)

"""Options of the ops on hidden states, and the sizes of the chunks that their rows are cut into.

A row is one token that takes part: its logits [V] are a row of the matrix that an op computes one chunk at a time. A chunk is
as many rows as fit into a memory budget.
"""

import math
from typing import NamedTuple

import torch

from soul_kernels.errors import argument_error

# Default memory for the logits of a chunk: 1/32 of the total memory of a GPU; 64 MiB on a CPU, whose GEMMs gain nothing from
# more. Every chunk but the first reads and writes the fp32 gradient of the head: 8 V D bytes beside 6 r V D FLOPs for r rows.
# On an H100, with 240 FLOPs a byte, that adds 321 / r to the time of the GEMMs. At V = 128256 a row of fp32 logits has 513 KB.
# So 8192 rows take two chunks of 4096 on 80 GB, which adds 4%. A chunk has at most 5120 rows there (6%), 1536 on 24 GB, 1024 on
# 16 GB and 512 on 8 GB, where most heads are frozen, and nothing is added. The total decides, not what is free, so that a card
# always gives the same bits. It is rounded up to whole GiB, because drivers reserve a varying part of the last one.
SHARE = 32
CPU_CHUNK_BYTES = 2**26
GIB = 2**30
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
        chunk_bytes: scratch memory for one chunk, in bytes. None: 1/32 of the GPU's memory, on a CPU 64 MiB: see
            `default_chunk_bytes`.
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
    """`LinearOptions` with the defaults filled in, for the tensors, the device and the autocast of one call.

    Attributes:
        compute_dtype: dtype to which hidden states and weights are rounded.
        logits_dtype: fp32 (fp64 for fp64 inputs), or the compute dtype.
        chunk_bytes: scratch memory for one chunk, in bytes. None: `default_chunk_bytes`, which is looked up where the rows are
            cut, and so on the device that the op runs on: while torch.compile traces a call, no device can be asked.
        backend: "triton" or "torch", which sweep over chunks of logits; or "reference", which does not.
    """

    compute_dtype: torch.dtype
    logits_dtype: torch.dtype
    chunk_bytes: int | None
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
    """Rows ``start`` to ``stop`` of sequences ``first`` to ``last``; ``stop`` and ``last`` are exclusive.

    Where processes compute their rows together (`soul_kernels._head.rounds`), ``size`` is the largest number of rows that a
    process has in this round.
    """

    start: int
    stop: int
    first: int
    last: int
    size: int = 0

    @property
    def span(self) -> slice:
        """The rows, as a slice."""
        return slice(self.start, self.stop)


def row_width(n_vocab: int) -> int:
    """Return the number of elements from one row of scratch memory to the next."""
    return -(-n_vocab // ROW_ALIGNMENT) * ROW_ALIGNMENT


def memory_share(memory: float) -> int:
    """Return the default ``chunk_bytes`` of a GPU with this much memory in all, in bytes."""
    return math.ceil(memory / GIB) * (GIB // SHARE)


def default_chunk_bytes(device: torch.device) -> int:
    """Return the default ``chunk_bytes`` of a device: a fixed share of a GPU's total memory, 64 MiB on anything else."""
    if device.type != "cuda":
        return CPU_CHUNK_BYTES
    return memory_share(torch.cuda.get_device_properties(device).total_memory)


def row_bytes(n_vocab: int, options: ResolvedOptions, has_ref_model: bool) -> int:
    """Return the scratch memory of a row, in bytes: its logits, which the gradient overwrites; with a reference model, two."""
    return row_width(n_vocab) * options.logits_dtype.itemsize * (2 if has_ref_model else 1)


def chunk_rows(n_vocab: int, options: ResolvedOptions, has_ref_model: bool, chunk_bytes: int) -> int:
    """Return the number of rows of a chunk that the budget allows, rounded down to whole tiles if it allows one."""
    limit = max(1, chunk_bytes // row_bytes(n_vocab, options, has_ref_model))
    return limit // TILE * TILE or limit


def round_rows(
    n_vocab: int, width: int, options: ResolvedOptions, has_ref_model: bool, chunk_bytes: int, n_processes: int
) -> int:  # fmt: skip
    """Return the number of rows that each process puts into a round, in which processes compute their rows together.

    The budget is that of the logits of a round. Its hidden states and their gradient take as much again at most: with many
    processes, each of which has few columns, these would otherwise be the larger part.

    Args:
        n_vocab: columns that a process has, of all rows.
        width: of the hidden states.
        options: `ResolvedOptions`.
        has_ref_model: whether there are logits of a reference model too.
        chunk_bytes: the budget.
        n_processes: number of processes.
    """
    limit = chunk_rows(n_vocab, options, has_ref_model, chunk_bytes)
    bytes_of_row = width * (options.factor_dtype.itemsize + options.result_dtype.itemsize)
    return max(1, min(limit, chunk_bytes // bytes_of_row) // n_processes)


def check_options(options: LinearOptions) -> None:
    """Raise unless ``options`` are `LinearOptions`."""
    if not isinstance(options, LinearOptions):
        remedy = "pass for instance LinearOptions(backend='reference')"
        raise argument_error("options", "soul_kernels.LinearOptions", type(options).__name__, remedy)

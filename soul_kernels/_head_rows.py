"""The kept tokens of a batch against a language-model head, chunk by chunk: logits, statistics, gradients.

What `linear_loss` is made of; nothing here knows of objectives or autograd.
"""

from typing import NamedTuple

import torch

from soul_kernels.reference.token_logprob import IGNORE_INDEX
from soul_kernels.token_logprob import LOGP, token_gradient, token_statistics

ROW_ALIGNMENT = 64  # elements; odd vocabularies (50257) would lose 16-byte accesses and the fast GEMMs
TILE = 128  # rows; height of a GEMM tile
# Since torch 2.10 addmm takes an fp32 summand beside low-precision factors (pytorch/pytorch#167931).
ADDMM_TAKES_FP32 = torch.__version__ >= (2, 10)


class Chunk(NamedTuple):
    """Rows ``start`` to ``stop``, which belong to sequences ``first`` to ``last`` (exclusive, both)."""

    start: int
    stop: int
    first: int
    last: int


class HeadRows:
    """The kept tokens of one call.

    Attributes:
        x: [R, D] their hidden states, in the dtype of the GEMMs.
        weight: [V, D] the head, in that dtype.
        labels: [R] int64.
        indices: [R] int64, flat positions ``b * T + t``.
        statistics: [4, R] fp32, filled chunk by chunk: see `soul_kernels.token_logprob.token_statistics`.
    """

    def __init__(self, hidden, weight, bias, labels, rows, compute_dtype, chunk_bytes):
        device = hidden.device
        self.shape = labels.shape
        self.host_indices = rows if rows is not None and rows.device.type == "cpu" else None
        if rows is None:  # waits for the device; a collator that passes `rows` spares that
            rows = (labels.reshape(-1) != IGNORE_INDEX).nonzero()[:, 0]
        elif rows.device != device:
            rows = rows.pin_memory().to(device, non_blocking=True)
        self.indices = rows
        self.labels = labels.reshape(-1).index_select(0, rows)
        self.x = hidden.detach().reshape(-1, hidden.shape[-1]).index_select(0, rows).to(compute_dtype)
        self.weight = weight.detach().to(compute_dtype)
        self.bias = None if bias is None else bias.detach().float()
        self.statistics = torch.empty((4, len(rows)), dtype=torch.float32, device=device)
        self.n_vocab = weight.shape[0]
        self.row_width = -(-self.n_vocab // ROW_ALIGNMENT) * ROW_ALIGNMENT
        row_bytes = self.row_width * (4 if compute_dtype == torch.float32 else 4 + compute_dtype.itemsize)
        limit = max(1, chunk_bytes // row_bytes)
        self.limit = limit // TILE * TILE or limit
        self._logits = self._gradient = None

    def __len__(self):
        return len(self.indices)

    def even_chunks(self):
        """Cuts the rows into equal chunks within the budget, wherever that falls."""
        n = len(self)
        count = -(-n // self.limit)
        size = min(-(-n // max(count, 1) // TILE) * TILE if n > TILE else n, self.limit)
        return [Chunk(start, min(start + size, n), 0, self.shape[0]) for start in range(0, n, max(size, 1))]

    def sequence_chunks(self):
        """Cuts the rows between sequences, or returns None if a sequence is longer than a chunk may be."""
        indices = self.host_indices if self.host_indices is not None else self.indices.cpu()
        counts = torch.bincount(indices // max(self.shape[1], 1), minlength=self.shape[0]).tolist()
        chunks, start, stop, first = [], 0, 0, 0
        for sequence, count in enumerate(counts):
            if count > self.limit:
                return None
            if stop + count - start > self.limit:
                chunks.append(Chunk(start, stop, first, sequence))
                start, first = stop, sequence
            stop += count
        return [*chunks, Chunk(start, stop, first, len(counts))]

    def logits(self, chunk):
        """fp32 logits [n, V] of a chunk, in scratch memory that the next chunk overwrites."""
        if self._logits is None:
            self._logits = self.x.new_empty((min(self.limit, len(self)), self.row_width), dtype=torch.float32)
        logits = self._logits[: chunk.stop - chunk.start, : self.n_vocab]
        _mm_fp32(self.x[chunk.start : chunk.stop], self.weight.T, logits)
        return logits if self.bias is None else logits.add_(self.bias)

    def measure(self, chunk, logits):
        """Fills the chunk's part of the statistics."""
        part = slice(chunk.start, chunk.stop)
        token_statistics(logits, self.labels[part], self.statistics[:, part])

    def gradient(self, chunk, logits, coefficients):
        """Gradient [n, V] by a chunk's logits, in the dtype of the GEMMs; in place of ``logits`` where that is fp32.

        Args:
            chunk: measured before.
            logits: of the chunk.
            coefficients: [n] fp32, derivative of the objective by each log-probability.
        """
        if self.x.dtype == torch.float32:
            out = logits
        else:
            if self._gradient is None:
                self._gradient = torch.empty(self._logits.shape, dtype=self.x.dtype, device=logits.device)
            out = self._gradient[: chunk.stop - chunk.start, : self.n_vocab]
        part = slice(chunk.start, chunk.stop)
        token_gradient(logits, self.labels[part], self.statistics[:, part], coefficients, out)
        return out

    def log_probs(self, start=0, stop=None):
        """Log-probabilities of the rows measured between ``start`` and ``stop``: [B, T] fp32, 0 at all other tokens."""
        return self.scatter(self.statistics[LOGP, start:stop], start, stop)

    def scatter(self, values, start=0, stop=None):
        """Puts the values of rows ``start`` to ``stop`` into a [B, T] tensor, 0 elsewhere."""
        dense = torch.zeros(self.shape, dtype=values.dtype, device=values.device)
        dense.view(-1).index_copy_(0, self.indices[start:stop], values)
        return dense

    def gather(self, dense, start=0, stop=None):
        """The values of rows ``start`` to ``stop`` in a [B, T] tensor."""
        return dense.reshape(-1).index_select(0, self.indices[start:stop])

    def free_scratch(self):
        """Gives the scratch memory of the chunks back; it is made anew when needed."""
        self._logits = self._gradient = None


class HeadGradients:
    """Sums what the chunks contribute to the gradients that are wanted; the others are None. All are fp32, to be rounded once.

    Attributes:
        x: [R, D] gradient of the rows.
        weight: [V, D].
        bias: [V].
    """

    def __init__(self, rows, *, hidden, weight, bias):
        self.rows = rows
        options = dict(dtype=torch.float32, device=rows.x.device)
        # The first chunk overwrites dW; but in fp16 every chunk is added, and without rows there is none.
        self.fp16 = rows.x.dtype == torch.float16
        new = torch.zeros if self.fp16 or not len(rows) else torch.empty
        self.x = torch.empty(rows.x.shape, **options) if hidden else None
        self.weight = new(rows.weight.shape, **options) if weight else None
        self.bias = torch.zeros(rows.n_vocab, **options) if bias else None

    def add(self, chunk, logits, coefficients):
        """Takes in a measured chunk; chunks come in order. Overwrites ``logits`` in fp32.

        Args:
            chunk: its place.
            logits: [n, V] of the chunk.
            coefficients: [n] fp32, derivative of the objective by each log-probability.
        """
        part = slice(chunk.start, chunk.stop)
        if self.fp16:
            # coefficient (about 1 / R) times p (about 1 / V) underflows in fp16; a power of two brings the largest
            # coefficient to between 32 and 64 and is divided out of the fp32 sums.
            scale = torch.exp2(6 - torch.frexp(coefficients.abs().max()).exponent)
            coefficients = coefficients * scale
        dlogits = self.rows.gradient(chunk, logits, coefficients)
        if self.x is not None:
            _mm_fp32(dlogits, self.rows.weight, self.x[part])
        if self.weight is not None and not self.fp16:
            _accumulate_fp32(self.weight, dlogits.T, self.rows.x[part], first=chunk.start == 0)
        bias = None if self.bias is None else dlogits.sum(0, dtype=torch.float32)
        if self.fp16:
            if self.x is not None:
                self.x[part] /= scale
            if self.weight is not None:
                weight = torch.empty_like(self.weight)
                _mm_fp32(dlogits.T, self.rows.x[part], weight)
                self.weight += weight.div_(scale)
            bias = None if bias is None else bias / scale
        if bias is not None:
            self.bias += bias


def _mm_fp32(a, b, out):
    """``out = a @ b`` with fp32 accumulation and fp32 output."""
    if a.dtype == torch.float32:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    else:
        torch.mm(a.float(), b.float(), out=out)


def _accumulate_fp32(total, a, b, first):
    """``total = a @ b`` for the first chunk, ``total += a @ b`` after it; fp32 all the way."""
    if first:
        _mm_fp32(a, b, total)
    elif a.dtype == torch.float32:
        total.addmm_(a, b)
    elif a.is_cuda and ADDMM_TAKES_FP32:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    elif a.is_cuda:
        total += torch.mm(a, b, out_dtype=torch.float32)
    else:
        total.addmm_(a.float(), b.float())

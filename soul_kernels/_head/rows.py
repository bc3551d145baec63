"""The kept tokens of a batch against a language-model head, chunk by chunk: logits, statistics, gradients.

What the ops on hidden states are made of; nothing here knows of objectives or autograd.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from soul_kernels.backends import multiplies_bf16
from soul_kernels.chunks import TILE, Chunk, chunk_rows, row_width
from soul_kernels.kl_divergence import divergence_gradient, divergence_statistics
from soul_kernels.reference import _rows
from soul_kernels.reference.token_logprob import ENTROPY, HIT, LOGP, N_ALL, N_BASIC, ONE_MINUS_P, ROW_MAX, TOTAL, VARIANCE
from soul_kernels.token_draw import draw_labels, likeliest_statistics
from soul_kernels.token_logprob import token_gradient, token_statistics
from soul_kernels.tokens import IGNORE_INDEX, Reference, TokenStatistics

WEIGHT_BLOCK = 1 << 20  # elements of a weight that are converted at a time, where a GEMM cannot take its dtype


class RowFunctions(NamedTuple):
    """What reads the rows of a chunk: the kernels, or the functions of the same names in PyTorch."""

    token_statistics: Callable
    token_gradient: Callable
    divergence_statistics: Callable
    divergence_gradient: Callable
    likeliest_statistics: Callable
    draw_labels: Callable


def row_functions(backend: str) -> RowFunctions | ModuleType:
    """Return the functions of a backend, "triton" or "torch"."""
    if backend == "torch":
        return _rows
    return RowFunctions(
        token_statistics, token_gradient, divergence_statistics, divergence_gradient, likeliest_statistics, draw_labels
    )


class HeadRows:
    """The kept tokens of one call.

    Attributes:
        x: [R, D] their hidden states, as factors of the GEMMs: see `Options`.
        head: the `Head`, in the compute dtype, its bias in that of the results.
        labels: [R] int64.
        indices: [R] int64, flat positions ``b * T + t``.
        statistics: [4 or 7, R] fp32 or, in fp64, fp64; filled chunk by chunk: see
            `soul_kernels.token_logprob.token_statistics`.
        divergences: [2, R], the same dtype, with a reference: see `soul_kernels.kl_divergence.divergence_statistics`.
    """

    def __init__(self, hidden, head, labels, rows, options, *, reference=None, all_statistics=False):
        device = hidden.device
        self.shape, self.options = labels.shape, options
        self.functions = row_functions(options.backend)
        self.host_indices = rows if rows is not None and rows.device.type == "cpu" else None
        found = rows is None
        if found:  # waits for the device; a collator that passes `rows` spares that
            rows = (labels.reshape(-1) != IGNORE_INDEX).nonzero()[:, 0]
        elif rows.device != device:
            rows = rows.pin_memory().to(device, non_blocking=True)
        self.indices = rows
        self.labels = labels.reshape(-1).index_select(0, rows)
        self.x = self._rows_of(hidden, rows)
        if not found:  # rows of padding may hold anything, NaN as well, which 0 times a gradient would bring into dW
            self.x.masked_fill_((self.labels == IGNORE_INDEX)[:, None], 0.0)
        self.head = self._converted(head)
        self.n_vocab = head.weight.shape[0]
        self.row_width = row_width(self.n_vocab)
        self.statistics = self._new(N_ALL if all_statistics else N_BASIC, len(rows))
        self.limit = chunk_rows(self.n_vocab, options, reference is not None)
        self._logits = self._ref_logits = self._gradient = None
        self.reference = None
        self._runs = [(0, len(rows), None)]
        if reference is not None:
            self._take_reference(reference, found)

    def _rows_of(self, hidden, rows):
        x = hidden.detach().reshape(-1, hidden.shape[-1]).index_select(0, rows)
        return x.to(self.options.compute_dtype).to(self.options.factor_dtype)

    def _new(self, *shape: int) -> Tensor:
        """Memory for numbers of each row."""
        return torch.empty(shape, dtype=self.options.result_dtype, device=self.x.device)

    def _converted(self, head):
        bias = None if head.bias is None else head.bias.detach().to(self.options.result_dtype)
        return head._replace(weight=head.weight.detach().to(self.options.compute_dtype), bias=bias)

    def _take_reference(self, reference, found):
        """Packs the rows of the reference, and cuts all rows into runs with and without one.

        The two products of a run have the same shape, so that they are equal, bit for bit, where model and reference are.
        """
        rows, n = self.indices, len(self.indices)
        sequences = rows // max(self.shape[1], 1)
        self.reference = reference
        if reference.needed is not None and (found or self.host_indices is not None):
            host = rows.cpu() if self.host_indices is None else self.host_indices
            mask = reference.needed.cpu()[host // max(self.shape[1], 1)]
            counts = torch.unique_consecutive(mask, return_counts=True)
            self._runs, start, packed = [], 0, 0
            for has, count in zip(*(part.tolist() for part in counts)):
                self._runs.append((start, start + count, packed if has else None))
                start, packed = start + count, packed + count * has
            picked = mask.nonzero()[:, 0].to(rows.device, non_blocking=True)
            rows, sequences = rows.index_select(0, picked), sequences.index_select(0, picked)
        elif n:  # of rows that only the device knows all get a reference; the objective leaves out what it does not need
            self._runs = [(0, n, 0)]
        self.ref_x = self._rows_of(reference.hidden, rows)
        if reference.needed is not None and len(rows) == n:  # and what that holds must not matter
            unneeded = ~reference.needed.to(rows.device, non_blocking=True).index_select(0, sequences)
            self.ref_x.masked_fill_(unneeded[:, None], 0.0)
        self.ref_head = self._converted(self.head._replace(weight=reference.weight, bias=reference.bias))
        self.strengths = None
        if reference.strengths is not None:
            self.strengths = reference.strengths.to(rows.device, torch.float32, non_blocking=True).index_select(0, sequences)
        self.ref_statistics = self._new(N_BASIC, len(rows))
        self.divergences = self._new(2, n).zero_()

    def __len__(self):
        return len(self.indices)

    @property
    def has_all_statistics(self):
        """Tells whether hits, entropies and variances are measured as well."""
        return len(self.statistics) == N_ALL

    def even_chunks(self):
        """Cuts the rows into equal chunks within the budget, wherever that falls."""
        n = len(self)
        count = -(-n // self.limit)
        size = min(-(-n // max(count, 1) // TILE) * TILE if n > TILE else n, self.limit)
        return [Chunk(start, min(start + size, n), 0, self.shape[0]) for start in range(0, n, max(size, 1))]

    def sequence_chunks(self, together=1):
        """Cuts the rows between sequences, ``together`` of which must not be parted; None if these are longer than a chunk, or
        if the device, which alone knows the rows, cannot be asked because a graph is being captured.
        """
        if self.host_indices is None and self.indices.is_cuda and torch.cuda.is_current_stream_capturing():
            return None
        indices = self.host_indices if self.host_indices is not None else self.indices.cpu()
        counts = torch.bincount(indices // max(self.shape[1], 1), minlength=self.shape[0]).tolist()
        chunks, start, stop, first = [], 0, 0, 0
        for sequence in range(0, len(counts), together):
            count = sum(counts[sequence : sequence + together])
            if count > self.limit:
                return None
            if stop + count - start > self.limit:
                chunks.append(Chunk(start, stop, first, sequence))
                start, first = stop, sequence
            stop += count
        return [*chunks, Chunk(start, stop, first, len(counts))]

    def load(self, chunk):
        """Computes the raw products of a chunk, and of its reference rows, in scratch memory that the next chunk overwrites."""
        if self._logits is None:
            self._logits = self._scratch(len(self), self.options.logits_dtype)
            if self.reference is not None:
                self._ref_logits = self._scratch(len(self.ref_x), self.options.logits_dtype)
        self._loaded = self._logits[: chunk.stop - chunk.start, : self.n_vocab]
        for start, stop, ref in self._runs_of(chunk):
            local = slice(start - chunk.start, stop - chunk.start)
            _product(self.x[start:stop], self.head, self._loaded[local])
            if ref is not None:
                _product(self.ref_x[ref], self.ref_head, self._of_reference(chunk, ref))

    def _scratch(self, n_rows, dtype):
        return self.x.new_empty((min(self.limit, n_rows), self.row_width), dtype=dtype)

    def _runs_of(self, chunk):
        """The runs of a chunk: first and last row, and the rows of the reference as a slice, or None."""
        for start, stop, ref in self._runs:
            begin, end = max(start, chunk.start), min(stop, chunk.stop)
            if begin < end:
                yield begin, end, None if ref is None else slice(ref + begin - start, ref + end - start)

    def _of_reference(self, chunk, ref):
        """The loaded raw products of some rows of the reference."""
        first = next(ref.start for _, _, ref in self._runs_of(chunk) if ref is not None)
        return self._ref_logits[ref.start - first : ref.stop - first, : self.n_vocab]

    def measure(self, chunk):
        """Fills the loaded chunk's part of the statistics and divergences."""
        self.functions.token_statistics(
            self._loaded, self.labels[chunk.part], self.statistics[:, chunk.part], **self.head.transform()
        )
        for start, stop, ref in self._runs_of(chunk):
            if ref is not None:
                logits, labels = self._of_reference(chunk, ref), self.labels[start:stop]
                self.functions.token_statistics(logits, labels, self.ref_statistics[:, ref], **self.head.transform())
                self.functions.divergence_statistics(
                    self._loaded[start - chunk.start : stop - chunk.start], logits, labels, self.statistics[:, start:stop],
                    self.ref_statistics[:, ref], self.divergences[:, start:stop], **self._divergence_options(ref),
                )  # fmt: skip

    def gradient(self, chunk, coefficients, weights=None):
        """Gradient [n, V] by the raw products of a loaded and measured chunk, as a factor of the GEMMs.

        It overwrites the raw products where these have the same dtype.

        Args:
            chunk: its place.
            coefficients: [n] fp32, derivative of the objective by each log-probability.
            weights: [n] fp32, derivative of the objective by each divergence; with a reference only.
        """
        out = self._out()
        for start, stop, ref in self._runs_of(chunk):
            local = slice(start - chunk.start, stop - chunk.start)
            labels, statistics = self.labels[start:stop], self.statistics[:, start:stop]
            if ref is None:
                self.functions.token_gradient(
                    self._loaded[local], labels, statistics, coefficients[local], out[local], **self.head.transform()
                )
            else:
                self.functions.divergence_gradient(
                    self._loaded[local], self._of_reference(chunk, ref), labels, statistics, self.ref_statistics[:, ref],
                    self.divergences[:, start:stop], coefficients[local], weights[local], out[local],
                    **self._divergence_options(ref),
                )  # fmt: skip
        return out

    def bounds(self, chunk, coefficients, weights=None):
        """What no element of each row of `gradient` exceeds by much, [n]: ``|c| (1 - p)``, plus the weight of a divergence."""
        bounds = (coefficients * self.statistics[ONE_MINUS_P, chunk.part]).abs()
        return (bounds if weights is None else bounds + weights.abs()) * abs(self.head.logit_scale)

    def _out(self):
        """Where the gradient of the loaded chunk goes."""
        if self.options.logits_dtype == self.options.factor_dtype:
            return self._loaded
        if self._gradient is None:
            self._gradient = self._scratch(len(self), self.options.factor_dtype)
        return self._gradient[: len(self._loaded), : self.n_vocab]

    def _divergence_options(self, ref):
        strengths = None if self.strengths is None else self.strengths[ref]
        return dict(strengths=strengths, kind=self.reference.kind, **self.head.transform())

    def log_probs(self, start=0, stop=None):
        """Log-probabilities of the rows measured between ``start`` and ``stop``: [B, T] fp32, 0 at all other tokens."""
        return self.scatter(self.statistics[LOGP, start:stop], start, stop)

    def token_statistics(self, start=0, stop=None):
        """`TokenStatistics` [B, T] of the rows measured between ``start`` and ``stop``."""
        rows = self.statistics[:, start:stop]
        kept = self.labels[start:stop] != IGNORE_INDEX
        lse = torch.where(kept, rows[ROW_MAX] + rows[TOTAL].log(), 0.0)
        values = (rows[LOGP], lse, rows[HIT], rows[ENTROPY], rows[VARIANCE])
        return TokenStatistics(*(self.scatter(value, start, stop) for value in values))

    def scatter(self, values, start=0, stop=None):
        """Puts the values of rows ``start`` to ``stop`` into a [B, T] tensor, 0 elsewhere."""
        dense = torch.zeros(self.shape, dtype=values.dtype, device=values.device)
        dense.view(-1).index_copy_(0, self.indices[start:stop], values)
        return dense

    def gather(self, dense, start=0, stop=None):
        """The values of rows ``start`` to ``stop`` in a [B, T] tensor."""
        return dense.reshape(-1).index_select(0, self.indices[start:stop])

    def give_up_tensors(self):
        """Hands out what a second sweep needs beside this object, for ``save_for_backward``; scratch memory is freed."""
        self.free_scratch()
        heads = [self.head] if self.reference is None else [self.head, self.ref_head]
        tensors = [self.x, self.statistics] + [tensor for head in heads for tensor in (head.weight, head.bias)]
        self.x = self.statistics = None
        self.head = self.head._replace(weight=None, bias=None)
        if self.reference is not None:
            tensors += [self.ref_x, self.ref_statistics, self.divergences, self.strengths]
            self.ref_x = self.ref_statistics = self.divergences = self.strengths = None
            self.ref_head = self.ref_head._replace(weight=None, bias=None)
            self.reference = Reference(None, None, kind=self.reference.kind)
        return tensors

    def with_tensors(self, tensors):
        """A copy that has what `give_up_tensors` handed out."""
        rows = copy.copy(self)
        rows.x, rows.statistics, weight, bias, *tensors = tensors
        rows.head = rows.head._replace(weight=weight, bias=bias)
        if rows.reference is not None:
            weight, bias, rows.ref_x, rows.ref_statistics, rows.divergences, rows.strengths = tensors
            rows.ref_head = rows.ref_head._replace(weight=weight, bias=bias)
        return rows

    def free_scratch(self):
        """Gives the scratch memory of the chunks back; it is made anew when needed."""
        self._logits = self._ref_logits = self._gradient = self._loaded = None


class DrawnRows(HeadRows):
    """Kept tokens whose labels are drawn from the model, from one uniform number each."""

    def __init__(self, hidden, head, keep, rows, options, uniforms):
        labels = torch.where(keep, 0, IGNORE_INDEX)  # of those that are kept no label is known yet
        super().__init__(hidden, head, labels, rows, options)
        self.uniforms = self.gather(uniforms)

    def measure(self, chunk):
        """Fills what `gradient` needs to know for drawing."""
        statistics = self.statistics[:, chunk.part]
        self.functions.likeliest_statistics(self._loaded, self.labels[chunk.part], statistics, **self.head.transform())

    def gradient(self, chunk, coefficients, weights=None):
        """Draws the labels, fills in their log-probabilities, and returns the gradient."""
        out = self._out()
        self.functions.draw_labels(
            self._loaded, self.labels[chunk.part], self.uniforms[chunk.part], self.statistics[:, chunk.part], coefficients,
            out, **self.head.transform(),
        )  # fmt: skip
        return out

    def bounds(self, chunk, coefficients, weights=None):
        """As in `HeadRows`; no label is known yet, and 1 - p may be anything up to 1."""
        return coefficients.abs() * abs(self.head.logit_scale)


def _product(x, head, out):
    """``out = x @ weight.T + bias``, in the dtype of ``out``: fp32, or that of the factors."""
    if x.dtype != head.weight.dtype:
        with products_in(head.weight.dtype, x):  # exact: x has been rounded to it
            for part, weight in _converted_blocks(head.weight, x.dtype):
                torch.mm(x, weight.T, out=out[:, part])
    elif out.dtype == torch.float32:
        mm_fp32(x, head.weight.T, out)
    else:
        torch.mm(x, head.weight.T, out=out)
    if head.bias is not None:
        out.add_(head.bias)


def product_with_weight(dlogits: Tensor, weight: Tensor, out: Tensor) -> None:
    """``out = dlogits @ weight`` in fp32 (fp64 in fp64), whatever the dtype of the weight.

    Gradients of logits in fp32 are rounded to a weight's bf16, as the kernels round them, where `products_in` says so.
    """
    if dlogits.dtype == weight.dtype:
        mm_fp32(dlogits, weight, out)
        return
    with products_in(weight.dtype, dlogits):
        for part, block in _converted_blocks(weight, dlogits.dtype):
            out.addmm_(dlogits[:, part], block, beta=0 if part.start == 0 else 1)


@contextlib.contextmanager
def products_in(dtype: torch.dtype, factor: Tensor) -> Iterator[None]:
    """Meanwhile a CPU rounds factors of fp32 products to bf16 on their way into its tiles, if it has tiles; sums and results
    stay fp32. Products of numbers that are bf16 already, in fp32 tensors, lose nothing.

    It is the only way to such a product that torch has on a CPU. The switch belongs to the whole process: fp32 products that
    other threads begin meanwhile are rounded as well.

    Args:
        dtype: what is computed in; any but bf16 changes nothing.
        factor: one of the factors; any but fp32 on a CPU changes nothing.
    """
    widened = dtype == torch.bfloat16 and factor.dtype == torch.float32 and factor.device.type == "cpu"
    if not (widened and multiplies_bf16()):
        yield
        return
    switch = torch.backends.mkldnn.matmul
    before, switch.fp32_precision = switch.fp32_precision, "bf16"
    try:
        yield
    finally:
        switch.fp32_precision = before


def _converted_blocks(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yield blocks of rows of a weight in another dtype, in which it never exists as a whole, and where they stand.

    They share one block of memory: new memory for each would take longer than the conversion.
    """
    size = min(max(WEIGHT_BLOCK // max(weight.shape[1], 1), 1), len(weight))
    memory = weight.new_empty((size, weight.shape[1]), dtype=dtype)
    for start in range(0, len(weight), size):
        part = weight[start : start + size]
        yield slice(start, start + len(part)), memory[: len(part)].copy_(part)


def mm_fp32(a, b, out):
    """``out = a @ b`` with fp32 accumulation and fp32 output; of fp64 factors all is fp64."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    else:
        torch.mm(a.float(), b.float(), out=out)

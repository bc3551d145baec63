"""The kept tokens of a batch against a language-model head, chunk by chunk: logits, statistics, gradients.

How a sweep works. Every token that takes part is a row: its hidden state is a row of ``x`` [R, D], its logits are a row of a
matrix [R, V] that never exists as a whole. The rows are cut into chunks (`HeadRows.even_chunks`, `HeadRows.sequence_chunks`),
and a sweep does the following for each chunk in turn::

    head_rows.load(chunk)                    # GEMM: raw products of the chunk, into scratch memory
    head_rows.measure(chunk)                 # one read of them: statistics (and divergences) of each row
    head_rows.gradient(chunk, coefficients)  # one read, one write: gradient by the raw products, often in their place

`load` overwrites what the last chunk left in the scratch memory, so a chunk is used up before the next one is loaded.
`gradient` may overwrite the raw products, so `measure` comes before it, and a second gradient needs another `load`. Statistics
and divergences are kept for all rows: a second sweep needs no second `measure`.

With a reference model a chunk has a second matrix of raw products. Where only some sequences need a divergence, the rows of the
reference model are packed, and a chunk is cut into runs of rows that have one and rows that have none (`_runs`). A run's two
products have one shape and go through the same GEMM, so that they are equal, bit for bit, where the two models are. Do not
merge runs or change the shape of one product only.

Safe to change: how rows are cut into chunks (results differ by rounding), what is measured (statistics are rows of one tensor,
whose indices `soul_kernels.reference.token_logprob` defines), and the row functions, as long as kernels and PyTorch agree. Not
safe: reading values of tensors on a GPU. Nothing here waits for the device but where a comment says so, or a step could not be
captured in a CUDA graph.

Nothing in this module knows of objectives or autograd.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor

from soul_kernels._head.checks import Comparison
from soul_kernels.backends import multiplies_bf16
from soul_kernels.chunks import TILE, Chunk, ResolvedOptions, chunk_rows, row_width
from soul_kernels.kl_divergence import divergence_gradient, divergence_statistics
from soul_kernels.reference import _rows
from soul_kernels.reference.token_logprob import ENTROPY, HIT, LOGP, N_ALL, N_BASIC, ONE_MINUS_P, ROW_MAX, TOTAL, VARIANCE
from soul_kernels.token_draw import draw_labels, likeliest_statistics
from soul_kernels.token_logprob import token_gradient, token_statistics
from soul_kernels.tokens import IGNORE_INDEX, Head, TokenStatistics

WEIGHT_BLOCK = 1 << 20  # elements of a weight that are converted at a time, where a GEMM cannot take its dtype


class RowFunctions(NamedTuple):
    """The functions that read the rows of a chunk: the kernels, or the functions of the same names in PyTorch."""

    token_statistics: Callable[..., None]
    token_gradient: Callable[..., None]
    divergence_statistics: Callable[..., None]
    divergence_gradient: Callable[..., None]
    likeliest_statistics: Callable[..., None]
    draw_labels: Callable[..., None]


def row_functions(backend: str) -> RowFunctions | ModuleType:
    """Return the functions of a backend, "triton" or "torch"."""
    if backend == "torch":
        return _rows
    return RowFunctions(
        token_statistics, token_gradient, divergence_statistics, divergence_gradient, likeliest_statistics, draw_labels
    )


class Run(NamedTuple):
    """Consecutive rows that all have a row of the reference model, or all have none.

    Attributes:
        start: first row.
        stop: the row after the last one.
        ref_start: row of the reference model that belongs to the first row, or None.
    """

    start: int
    stop: int
    ref_start: int | None


class DivergenceOptions(TypedDict):
    """Keyword arguments of the row functions that compute divergences."""

    strengths: Tensor | None
    kind: str
    logit_scale: float
    softcap: float | None


class HeadRows:
    """The kept tokens of one call.

    Attributes:
        x: [R, D], hidden states of the rows, as factors of the GEMMs: see `ResolvedOptions`.
        head: the `Head`, in the compute dtype, its bias in that of the results.
        labels: [R] int64.
        indices: [R] int64, flat positions ``b * T + t``.
        host_indices: the same on the CPU, where the caller has passed them there, or None.
        statistics: [4 or 7, R] fp32 or, in fp64, fp64; filled chunk by chunk: see
            `soul_kernels.token_logprob.token_statistics`.
        kind: kind of divergence, or None without a reference model. The attributes below exist with one only.
        ref_x: [R', D'], hidden states of the reference model, for the R' rows that have some.
        ref_head: its `Head`.
        ref_statistics: [4, R'], as ``statistics``.
        strengths: [R'] fp32, how far its logit of the label is lowered, or None.
        divergences: [2, R], the dtype of ``statistics``: see `soul_kernels.kl_divergence.divergence_statistics`.
    """

    _logits: Tensor | None  # scratch memory of a chunk: raw products, those of the reference model, and gradient
    _ref_logits: Tensor | None
    _gradient: Tensor | None
    _loaded: Tensor  # the rows of _logits that belong to the chunk that is loaded

    def __init__(
        self, hidden: Tensor, head: Head, labels: Tensor, token_indices: Tensor | None, options: ResolvedOptions, *,
        comparison: Comparison | None = None, all_statistics: bool = False,
    ) -> None:  # fmt: skip
        device = hidden.device
        self.shape = labels.shape
        self.options = options
        self.functions = row_functions(options.backend)
        self.host_indices = token_indices if token_indices is not None and token_indices.device.type == "cpu" else None
        from_labels = token_indices is None
        if token_indices is None:  # waits for the device; a collator that passes `token_indices` spares that
            token_indices = (labels.reshape(-1) != IGNORE_INDEX).nonzero()[:, 0]
        elif token_indices.device != device:
            token_indices = token_indices.pin_memory().to(device, non_blocking=True)
        self.indices = token_indices
        self.labels = labels.reshape(-1).index_select(0, self.indices)
        self.x = self._select(hidden, self.indices)
        if not from_labels:  # rows of padding may hold anything, NaN as well, which 0 times a gradient would bring into dW
            self.x.masked_fill_((self.labels == IGNORE_INDEX)[:, None], 0.0)
        self.head = self._converted(head)
        self.n_vocab = head.weight.shape[0]
        self.row_width = row_width(self.n_vocab)
        self.statistics = self._new(N_ALL if all_statistics else N_BASIC, len(self.indices))
        self.limit = chunk_rows(self.n_vocab, options, comparison is not None)
        self.free_scratch()
        self.kind: str | None = None
        self._runs = [Run(0, len(self.indices), None)]
        if comparison is not None:
            self._take_reference(comparison, from_labels)

    def _select(self, hidden: Tensor, indices: Tensor) -> Tensor:
        """Return the hidden states of some tokens as factors of the GEMMs."""
        x = hidden.detach().reshape(-1, hidden.shape[-1]).index_select(0, indices)
        return x.to(self.options.compute_dtype).to(self.options.factor_dtype)

    def _new(self, *shape: int) -> Tensor:
        """Return memory for numbers of each row."""
        return torch.empty(shape, dtype=self.options.result_dtype, device=self.x.device)

    def _converted(self, head: Head) -> Head:
        bias = None if head.bias is None else head.bias.detach().to(self.options.result_dtype)
        return head._replace(weight=head.weight.detach().to(self.options.compute_dtype), bias=bias)

    def _take_reference(self, comparison: Comparison, from_labels: bool) -> None:
        """Pack the rows of the reference model, and cut all rows into runs with and without one."""
        indices = self.indices
        n_rows = len(indices)
        sequences = indices // max(self.shape[1], 1)
        self.kind = comparison.kind
        if comparison.needed is not None and (from_labels or self.host_indices is not None):
            host_indices = indices.cpu() if self.host_indices is None else self.host_indices
            mask = comparison.needed.cpu()[host_indices // max(self.shape[1], 1)]
            self._runs = _runs_of_mask(mask)
            picked = mask.nonzero()[:, 0].to(indices.device, non_blocking=True)
            indices = indices.index_select(0, picked)
            sequences = sequences.index_select(0, picked)
        elif n_rows:  # rows that only the device knows all get a reference; the objective leaves out what it does not need
            self._runs = [Run(0, n_rows, 0)]
        self.ref_x = self._select(comparison.hidden, indices)
        if comparison.needed is not None and len(indices) == n_rows:  # those of the others may hold anything, NaN as well
            unneeded = ~comparison.needed.to(indices.device, non_blocking=True).index_select(0, sequences)
            self.ref_x.masked_fill_(unneeded[:, None], 0.0)
        self.ref_head = self._converted(comparison.head)
        self.strengths = None
        if comparison.strengths is not None:
            strengths = comparison.strengths.to(indices.device, torch.float32, non_blocking=True)
            self.strengths = strengths.index_select(0, sequences)
        self.ref_statistics = self._new(N_BASIC, len(indices))
        self.divergences = self._new(2, n_rows).zero_()

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def has_all_statistics(self) -> bool:
        """Whether hits, entropies and variances are measured as well."""
        return len(self.statistics) == N_ALL

    def even_chunks(self) -> list[Chunk]:
        """Cut the rows into equal chunks within the budget, wherever that falls."""
        n_rows = len(self)
        count = -(-n_rows // self.limit)
        size = min(-(-n_rows // max(count, 1) // TILE) * TILE if n_rows > TILE else n_rows, self.limit)
        return [Chunk(start, min(start + size, n_rows), 0, self.shape[0]) for start in range(0, n_rows, max(size, 1))]

    def sequence_chunks(self, together: int = 1) -> list[Chunk] | None:
        """Cut the rows between sequences, ``together`` of which stay in one chunk.

        None if these are longer than a chunk, or if the device, which alone knows the rows, cannot be asked because a graph is
        being captured. Waits for the device where the indices are on it.
        """
        if self.host_indices is None and self.indices.is_cuda and torch.cuda.is_current_stream_capturing():
            return None
        indices = self.host_indices if self.host_indices is not None else self.indices.cpu()
        counts = torch.bincount(indices // max(self.shape[1], 1), minlength=self.shape[0]).tolist()
        chunks = []
        start = stop = first = 0
        for sequence in range(0, len(counts), together):
            count = sum(counts[sequence : sequence + together])
            if count > self.limit:
                return None
            if stop + count - start > self.limit:
                chunks.append(Chunk(start, stop, first, sequence))
                start = stop
                first = sequence
            stop += count
        return [*chunks, Chunk(start, stop, first, len(counts))]

    def load(self, chunk: Chunk) -> None:
        """Compute the raw products of a chunk, and of its reference rows, in scratch memory that the next chunk overwrites."""
        if self._logits is None:
            self._logits = self._scratch(len(self), self.options.logits_dtype)
            if self.kind is not None:
                self._ref_logits = self._scratch(len(self.ref_x), self.options.logits_dtype)
        self._loaded = self._logits[: chunk.stop - chunk.start, : self.n_vocab]
        for start, stop, ref in self._runs_of(chunk):
            local = slice(start - chunk.start, stop - chunk.start)
            _product(self.x[start:stop], self.head, self._loaded[local])
            if ref is not None:
                _product(self.ref_x[ref], self.ref_head, self._of_reference(chunk, ref))

    def _scratch(self, n_rows: int, dtype: torch.dtype) -> Tensor:
        return self.x.new_empty((min(self.limit, n_rows), self.row_width), dtype=dtype)

    def _runs_of(self, chunk: Chunk) -> Iterator[tuple[int, int, slice | None]]:
        """Yield the runs of a chunk: first row, the row after the last one, and the rows of the reference model or None."""
        for run in self._runs:
            start = max(run.start, chunk.start)
            stop = min(run.stop, chunk.stop)
            if start < stop:
                offset = None if run.ref_start is None else run.ref_start - run.start
                yield start, stop, None if offset is None else slice(start + offset, stop + offset)

    def _of_reference(self, chunk: Chunk, ref: slice) -> Tensor:
        """Return the loaded raw products of some rows of the reference model."""
        assert self._ref_logits is not None, "load() comes first"
        first = next(rows.start for _, _, rows in self._runs_of(chunk) if rows is not None)
        return self._ref_logits[ref.start - first : ref.stop - first, : self.n_vocab]

    def measure(self, chunk: Chunk) -> None:
        """Fill in the statistics and divergences of the loaded chunk."""
        transform = self.head.transform()
        self.functions.token_statistics(
            self._loaded, self.labels[chunk.span], self.statistics[:, chunk.span], **transform
        )  # fmt: skip
        for start, stop, ref in self._runs_of(chunk):
            if ref is not None:
                ref_logits = self._of_reference(chunk, ref)
                labels = self.labels[start:stop]
                self.functions.token_statistics(ref_logits, labels, self.ref_statistics[:, ref], **transform)
                self.functions.divergence_statistics(
                    self._loaded[start - chunk.start : stop - chunk.start], ref_logits, labels, self.statistics[:, start:stop],
                    self.ref_statistics[:, ref], self.divergences[:, start:stop], **self._divergence_options(ref),
                )  # fmt: skip

    def gradient(self, chunk: Chunk, coefficients: Tensor, weights: Tensor | None = None) -> Tensor:
        """Return the gradient [n, V] by the raw products of a loaded and measured chunk, as a factor of the GEMMs.

        It overwrites the raw products where these have the same dtype.

        Args:
            chunk: the chunk that is loaded.
            coefficients: [n] fp32, derivative of the objective by each log-probability.
            weights: [n] fp32, derivative of the objective by each divergence; with a reference model only.
        """
        out = self._out()
        for start, stop, ref in self._runs_of(chunk):
            local = slice(start - chunk.start, stop - chunk.start)
            labels = self.labels[start:stop]
            statistics = self.statistics[:, start:stop]
            if ref is None:
                self.functions.token_gradient(
                    self._loaded[local], labels, statistics, coefficients[local], out[local], **self.head.transform()
                )
            else:
                assert weights is not None, "rows of a reference model have derivatives by their divergences"
                self.functions.divergence_gradient(
                    self._loaded[local], self._of_reference(chunk, ref), labels, statistics, self.ref_statistics[:, ref],
                    self.divergences[:, start:stop], coefficients[local], weights[local], out[local],
                    **self._divergence_options(ref),
                )  # fmt: skip
        return out

    def bounds(self, chunk: Chunk, coefficients: Tensor, weights: Tensor | None = None) -> Tensor:
        """Return approximate upper bounds [n] of the elements of each row of `gradient`, in absolute value.

        That is ``|c| (1 - p)``, plus the weight of a divergence, times the scale of the logits.
        """
        bounds = (coefficients * self.statistics[ONE_MINUS_P, chunk.span]).abs()
        return (bounds if weights is None else bounds + weights.abs()) * abs(self.head.logit_scale)

    def _out(self) -> Tensor:
        """Return memory for the gradient of the loaded chunk."""
        if self.options.logits_dtype == self.options.factor_dtype:
            return self._loaded
        if self._gradient is None:
            self._gradient = self._scratch(len(self), self.options.factor_dtype)
        return self._gradient[: len(self._loaded), : self.n_vocab]

    def _divergence_options(self, ref: slice) -> DivergenceOptions:
        assert self.kind is not None
        strengths = None if self.strengths is None else self.strengths[ref]
        return {"strengths": strengths, "kind": self.kind, **self.head.transform()}

    def log_probs(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Return the log-probabilities of the rows measured between ``start`` and ``stop``: [B, T] fp32, 0 elsewhere."""
        return self.scatter(self.statistics[LOGP, start:stop], start, stop)

    def token_statistics(self, start: int = 0, stop: int | None = None) -> TokenStatistics:
        """Return `TokenStatistics` [B, T] of the rows measured between ``start`` and ``stop``."""
        statistics = self.statistics[:, start:stop]
        labelled = self.labels[start:stop] != IGNORE_INDEX
        lse = torch.where(labelled, statistics[ROW_MAX] + statistics[TOTAL].log(), 0.0)
        values = (statistics[LOGP], lse, statistics[HIT], statistics[ENTROPY], statistics[VARIANCE])
        return TokenStatistics(*(self.scatter(value, start, stop) for value in values))

    def scatter(self, values: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Return the values of rows ``start`` to ``stop`` as a [B, T] tensor, 0 elsewhere."""
        dense = torch.zeros(self.shape, dtype=values.dtype, device=values.device)
        dense.view(-1).index_copy_(0, self.indices[start:stop], values)
        return dense

    def gather(self, dense: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Return the values of rows ``start`` to ``stop`` in a [B, T] tensor."""
        return dense.reshape(-1).index_select(0, self.indices[start:stop])

    def give_up_tensors(self) -> list[Tensor | None]:
        """Hand out the tensors that a second sweep needs, for ``save_for_backward``; scratch memory is freed.

        This object keeps none of them, or they would live on after backward. It is of no use before `with_tensors`.
        """
        self.free_scratch()
        tensors: list[Tensor | None] = [self.x, self.statistics, self.head.weight, self.head.bias]
        self._transform = self.head.transform()
        del self.x, self.statistics, self.head
        if self.kind is not None:
            tensors += [self.ref_x, self.ref_statistics, self.divergences, self.strengths]
            tensors += [self.ref_head.weight, self.ref_head.bias]
            del self.ref_x, self.ref_statistics, self.divergences, self.strengths, self.ref_head
        return tensors

    def with_tensors(self, tensors: list[Tensor]) -> "HeadRows":
        """Return a copy that has the tensors which `give_up_tensors` handed out."""
        copied = copy.copy(self)
        copied.x, copied.statistics, weight, bias, *ref_tensors = tensors
        copied.head = Head(weight, bias, **self._transform)
        if self.kind is not None:
            copied.ref_x, copied.ref_statistics, copied.divergences, copied.strengths, weight, bias = ref_tensors
            copied.ref_head = Head(weight, bias, **self._transform)
        return copied

    def free_scratch(self) -> None:
        """Free the scratch memory of the chunks; `load` makes it anew."""
        self._logits = self._ref_logits = self._gradient = None
        self._loaded = self.x.new_empty(0)


def _runs_of_mask(mask: Tensor) -> list[Run]:
    """Return the runs of rows of which a [R] bool mask on the CPU says whether they have a row of the reference model."""
    values, counts = torch.unique_consecutive(mask, return_counts=True)
    runs = []
    start = ref_start = 0
    for has_reference, count in zip(values.tolist(), counts.tolist()):
        runs.append(Run(start, start + count, ref_start if has_reference else None))
        start += count
        ref_start += count * has_reference
    return runs


class DrawnRows(HeadRows):
    """Kept tokens whose labels are drawn from the model, from one uniform number each."""

    def __init__(
        self, hidden: Tensor, head: Head, keep: Tensor, token_indices: Tensor | None, options: ResolvedOptions, uniforms: Tensor
    ) -> None:
        labels = torch.where(keep, 0, IGNORE_INDEX)  # 0 stands for labels that are not drawn yet
        super().__init__(hidden, head, labels, token_indices, options)
        self.uniforms = self.gather(uniforms)

    def measure(self, chunk: Chunk) -> None:
        """Fill in the statistics that `gradient` draws labels with."""
        statistics = self.statistics[:, chunk.span]
        self.functions.likeliest_statistics(self._loaded, self.labels[chunk.span], statistics, **self.head.transform())

    def gradient(self, chunk: Chunk, coefficients: Tensor, weights: Tensor | None = None) -> Tensor:
        """Draw the labels, fill in their log-probabilities, and return the gradient."""
        out = self._out()
        self.functions.draw_labels(
            self._loaded, self.labels[chunk.span], self.uniforms[chunk.span], self.statistics[:, chunk.span], coefficients,
            out, **self.head.transform(),
        )  # fmt: skip
        return out

    def bounds(self, chunk: Chunk, coefficients: Tensor, weights: Tensor | None = None) -> Tensor:
        """Return bounds as `HeadRows.bounds`, with 1 in the place of 1 - p: no label is drawn yet."""
        return coefficients.abs() * abs(self.head.logit_scale)


def _product(x: Tensor, head: Head, out: Tensor) -> None:
    """Compute ``out = x @ weight.T + bias``, in the dtype of ``out``: fp32, or that of the factors."""
    if x.dtype != head.weight.dtype:
        with products_in(head.weight.dtype, x):  # exact: x has been rounded to it
            for columns, block in _converted_blocks(head.weight, x.dtype):
                torch.mm(x, block.T, out=out[:, columns])
    elif out.dtype == torch.float32:
        mm_fp32(x, head.weight.T, out)
    else:
        torch.mm(x, head.weight.T, out=out)
    if head.bias is not None:
        out.add_(head.bias)


def product_with_weight(dlogits: Tensor, weight: Tensor, out: Tensor) -> None:
    """Compute ``out = dlogits @ weight`` in fp32 (fp64 in fp64), whatever the dtype of the weight.

    Gradients of logits in fp32 are rounded to a weight's bf16, as the kernels round them, where `products_in` says so.
    """
    if dlogits.dtype == weight.dtype:
        mm_fp32(dlogits, weight, out)
        return
    with products_in(weight.dtype, dlogits):
        for columns, block in _converted_blocks(weight, dlogits.dtype):
            out.addmm_(dlogits[:, columns], block, beta=0 if columns.start == 0 else 1)


@contextlib.contextmanager
def products_in(dtype: torch.dtype, factor: Tensor) -> Iterator[None]:
    """Let a CPU with tiles (AMX) round the factors of fp32 products to bf16 on their way into the tiles, within this context.

    Sums and results stay fp32, and products of fp32 tensors whose numbers are bf16 already lose nothing. Torch has no other way
    to such a product on a CPU. The switch belongs to the whole process: fp32 products that other threads begin in the meantime
    are rounded as well.

    Args:
        dtype: the compute dtype; any but bf16 changes nothing.
        factor: one of the factors; any but fp32 on a CPU changes nothing.
    """
    widened = dtype == torch.bfloat16 and factor.dtype == torch.float32 and factor.device.type == "cpu"
    if not (widened and multiplies_bf16()):
        yield
        return
    switch = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # torch makes it when it is imported
    before = switch.fp32_precision
    switch.fp32_precision = "bf16"
    try:
        yield
    finally:
        switch.fp32_precision = before


def _converted_blocks(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yield the rows of a weight block by block in another dtype, in which it never exists as a whole.

    Each block comes after the slice of its rows. The blocks share one block of memory: new memory for each would take longer
    than the conversion.
    """
    size = min(max(WEIGHT_BLOCK // max(weight.shape[1], 1), 1), len(weight))
    memory = weight.new_empty((size, weight.shape[1]), dtype=dtype)
    for start in range(0, len(weight), size):
        block = weight[start : start + size]
        yield slice(start, start + len(block)), memory[: len(block)].copy_(block)


def mm_fp32(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Compute ``out = a @ b`` with fp32 accumulation and fp32 output; with fp64 factors everything is fp64."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    else:
        torch.mm(a.float(), b.float(), out=out)

"""Logits, statistics and gradients of the kept tokens of a batch, one chunk at a time.

How a sweep works. Every token that takes part is a row: its hidden state is a row of ``x`` [R, D], its logits are a row of a
matrix [R, V] that never exists as a whole. The rows are cut into chunks (`HeadRows.even_chunks`, `HeadRows.sequence_chunks`),
and a sweep does the following for each chunk in turn::

    head_rows.load(chunk)                    # GEMM: raw products of the chunk, into scratch memory
    head_rows.measure(chunk)                 # one read of them: statistics (and divergences) of each row
    head_rows.gradient(chunk, coefficients)  # one read, one write: gradient by the raw products, in their place

Where the coefficients are known beforehand, `measured_gradient` does the last two at once.

`load` overwrites the scratch memory of the last chunk, so a chunk must be finished before the next one is loaded. `gradient`
overwrites the raw products, so `measure` comes before it, and a second gradient needs another `load`. A gradient of a narrower
dtype fills the first half of the bytes of each row. Statistics and divergences are kept for all rows: a second sweep needs no
second `measure`.

With a reference model a chunk has a second matrix of raw products. Where only some sequences need a divergence, the rows of the
reference model are packed, and a chunk is cut into runs of rows that have one and rows that have none (`_runs`). A run's two
products have one shape and go through the same GEMM, so that they are equal, bit for bit, where the two models are. Do not
merge runs or change the shape of one product only.

Safe to change: how rows are cut into chunks (results differ by rounding), which statistics are measured (they are rows of one
tensor; `soul_kernels.reference.token_logprob` defines the indices), and the row functions, as long as kernels and PyTorch
agree. Not safe: reading values of tensors on a GPU. Nothing here waits for the device except where a comment says so; otherwise
a step could not be captured in a CUDA graph.

Nothing in this module knows of objectives or autograd.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from soul_kernels._head.checks import LOGPS, Comparison, RowValues
from soul_kernels._head.rounds import RoundFunctions, Rounds
from soul_kernels._head.shards import ShardFunctions
from soul_kernels.backends import multiplies_bf16
from soul_kernels.chunks import TILE, Chunk, ResolvedOptions, chunk_rows, default_chunk_bytes, round_rows, row_width
from soul_kernels.kl_divergence import divergence_gradient, divergence_statistics
from soul_kernels.reference import _rows
from soul_kernels.reference.token_logprob import ENTROPY, HIT, LOGP, N_ALL, N_BASIC, ONE_MINUS_P, ROW_MAX, TOTAL, VARIANCE
from soul_kernels.token_draw import draw_labels, likeliest_statistics
from soul_kernels.token_logprob import statistics_and_gradient, token_gradient, token_statistics
from soul_kernels.tokens import IGNORE_INDEX, Head, TokenStatistics

WEIGHT_BLOCK = 1 << 20  # elements of a weight that are converted at a time, where a GEMM cannot take its dtype


class RowFunctions(NamedTuple):
    """The functions that read the rows of a chunk: the kernels, or the functions of the same names in PyTorch."""

    token_statistics: Callable[..., None]
    token_gradient: Callable[..., None]
    statistics_and_gradient: Callable[..., None]
    divergence_statistics: Callable[..., None]
    divergence_gradient: Callable[..., None]
    likeliest_statistics: Callable[..., None]
    draw_labels: Callable[..., None]
    predictions: Callable[..., None]


def row_functions(backend: str) -> RowFunctions | ModuleType:
    """Return the functions of a backend, "triton" or "torch"."""
    if backend == "torch":
        return _rows
    return RowFunctions(
        token_statistics, token_gradient, statistics_and_gradient, divergence_statistics, divergence_gradient,
        likeliest_statistics, draw_labels, _rows.predictions,
    )  # fmt: skip


class Run(NamedTuple):
    """Consecutive rows that all have a row of the reference model, or all have none.

    Attributes:
        start: first row of the run.
        stop: first row after the run.
        ref_start: the reference model's row for ``start``, or None.
    """

    start: int
    stop: int
    ref_start: int | None


class DivergenceOptions(TypedDict):
    """Keyword arguments of the row functions that compute divergences."""

    strengths: Tensor | None
    kind: str
    beta: float
    logit_scale: float
    softcap: float | None


class HeadRows:
    """The rows of one call: its kept tokens, their statistics, and scratch memory for one chunk of logits.

    Attributes:
        shape: (B, T).
        options: the `ResolvedOptions` of the call.
        functions: the row functions of its backend; for a head in shards, around them `ShardFunctions`.
        rounds: the `Rounds` of processes with tokens of their own and a head in shards; None in all other cases.
        n_vocab: the number of columns of logits: V, or the rows of a head in shards that are here.
        limit: the largest number of rows in a chunk.
        most_rows: R; in rounds, the largest R of a process.
        loaded_x: the hidden states of the loaded chunk; in rounds, those of all processes.
        x: [R, D], hidden states of the rows, in the factor dtype of `ResolvedOptions`.
        head: the `Head`; its weight is in the compute dtype, its bias in the dtype of results.
        labels: [R] int64.
        indices: [R] int64, flat positions ``b * T + t``.
        host_indices: ``indices`` on the CPU if the caller passed them there, else None.
        statistics: [4 or 7, R] fp32 or, in fp64, fp64; filled chunk by chunk: see
            `soul_kernels.token_logprob.token_statistics`.
        row_values: which values of each row are computed.
        means: [R], the dtype of ``statistics``: the mean logit of each row; None unless ``row_values`` ask for it.
        predictions: [R] int64, the vocabulary entry with the largest logit; None unless ``row_values`` ask for it.
        kind: kind of divergence, or None without a reference model. The attributes below exist only with a reference model.
        ref_x: [R', D'], hidden states of the reference model, for the R' rows that need a divergence.
        ref_head: the reference model's `Head`.
        ref_statistics: [4, R'], as ``statistics``.
        strengths: [R'] fp32, how far the reference model's logit of the label is lowered, or None.
        beta: weight of the reference model in the mixture of "jsd".
        divergences: [2 or 3, R], the dtype of ``statistics``: see `soul_kernels.kl_divergence.divergence_statistics`.
    """

    # Scratch memory of a chunk: raw products, those of the reference model, and the gradient.
    _logits: Tensor | None
    _ref_logits: Tensor | None
    _loaded: Tensor  # the rows of _logits that the loaded chunk uses

    def __init__(
        self, hidden: Tensor, head: Head, labels: Tensor, token_indices: Tensor | None, options: ResolvedOptions, *,
        comparison: Comparison | None = None, all_statistics: bool = False, row_values: RowValues = LOGPS,
    ) -> None:  # fmt: skip
        device = hidden.device
        self.shape = labels.shape
        self.options = options
        self.functions: Any = row_functions(options.backend)
        self.rounds: Rounds | None = None
        if head.shard is not None:
            self.functions = ShardFunctions(self.functions, head.shard)
            if head.shard.own_tokens:
                self.rounds = Rounds(head.shard)
                self.functions = RoundFunctions(self.functions, self.rounds)
        self.host_indices = token_indices if token_indices is not None and token_indices.device.type == "cpu" else None
        from_labels = token_indices is None
        if token_indices is None:  # waits for the device; to avoid that, pass `token_indices`
            token_indices = (labels.reshape(-1) != IGNORE_INDEX).nonzero()[:, 0]
        elif token_indices.device != device:
            token_indices = token_indices.pin_memory().to(device, non_blocking=True)
        self.indices = token_indices
        self.labels = labels.reshape(-1).index_select(0, self.indices)
        self.x = self._select(hidden, self.indices)
        if not from_labels:  # padding may hold anything: a gradient of 0 times NaN would put NaN into dW
            self.x.masked_fill_((self.labels == IGNORE_INDEX)[:, None], 0.0)
        self.head = self._converted(head)
        self.n_vocab = head.weight.shape[0]
        largest = self.n_vocab if head.shard is None else head.shard.largest  # all processes cut the rows into the same chunks
        self.row_width = row_width(largest)
        self.statistics = self._new(N_ALL if all_statistics else N_BASIC, len(self.indices))
        self.row_values = row_values
        self.means = self._new(len(self.indices)) if row_values.mean else None
        self.predictions = torch.empty_like(self.labels) if row_values.predict else None
        chunk_bytes = default_chunk_bytes(device) if options.chunk_bytes is None else options.chunk_bytes
        has_ref_model = comparison is not None
        self.limit = chunk_rows(largest, options, has_ref_model, chunk_bytes)
        self.most_rows = len(self)
        if self.rounds is not None:
            n_processes = self.rounds.n_processes
            self.limit = round_rows(largest, self.x.shape[1], options, has_ref_model, chunk_bytes, n_processes)
            (self.most_rows,) = self.rounds.largest(len(self))
        self.free_scratch()
        self.kind: str | None = None
        self._runs = [Run(0, len(self.indices), None)]
        if comparison is not None:
            self._add_ref_model(comparison, from_labels)

    def _select(self, hidden: Tensor, indices: Tensor) -> Tensor:
        """Return the hidden states of some tokens in the factor dtype, rounded to the compute dtype."""
        x = hidden.detach().reshape(-1, hidden.shape[-1]).index_select(0, indices)
        return x.to(self.options.compute_dtype).to(self.options.factor_dtype)

    def _new(self, *shape: int) -> Tensor:
        """Return uninitialized memory in the dtype of results."""
        return torch.empty(shape, dtype=self.options.result_dtype, device=self.x.device)

    def _converted(self, head: Head) -> Head:
        """Return a head with the weight in the compute dtype and the bias in the dtype of results."""
        bias = None if head.bias is None else head.bias.detach().to(self.options.result_dtype)
        return head._replace(weight=head.weight.detach().to(self.options.compute_dtype), bias=bias)

    def _add_ref_model(self, comparison: Comparison, from_labels: bool) -> None:
        """Pack the rows of the reference model, and cut all rows into runs with and without one."""
        indices = self.indices
        n_rows = len(indices)
        sequences = indices // max(self.shape[1], 1)
        self.kind = comparison.kind
        self.beta = comparison.beta
        packs = self.rounds is None and (from_labels or self.host_indices is not None)
        if comparison.needed is not None and packs:
            host_indices = indices.cpu() if self.host_indices is None else self.host_indices
            mask = comparison.needed.cpu()[host_indices // max(self.shape[1], 1)]
            self._runs = _runs_of_mask(mask)
            picked = mask.nonzero()[:, 0].to(indices.device, non_blocking=True)
            indices = indices.index_select(0, picked)
            sequences = sequences.index_select(0, picked)
        elif n_rows:  # every row gets one of the reference model, and the objective ignores some
            self._runs = [Run(0, n_rows, 0)]
        self.ref_x = self._select(comparison.hidden, indices)
        if comparison.needed is not None and len(indices) == n_rows:  # hidden states of the others may be NaN
            unneeded = ~comparison.needed.to(indices.device, non_blocking=True).index_select(0, sequences)
            self.ref_x.masked_fill_(unneeded[:, None], 0.0)
        self.ref_head = self._converted(comparison.head)
        self.strengths = None
        if comparison.strengths is not None:
            strengths = comparison.strengths.to(indices.device, torch.float32, non_blocking=True)
            self.strengths = strengths.index_select(0, sequences)
        self.ref_statistics = self._new(N_BASIC, len(indices))
        self.divergences = self._new(3 if self.kind == "jsd" else 2, n_rows).zero_()

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def has_all_statistics(self) -> bool:
        """Whether hits, entropies and variances are measured too."""
        return len(self.statistics) == N_ALL

    def even_chunks(self) -> list[Chunk]:
        """Cut the rows into equal chunks within the budget; a cut may divide a sequence."""
        n_rows = self.most_rows
        count = -(-n_rows // self.limit)
        size = min(-(-n_rows // max(count, 1) // TILE) * TILE if n_rows > TILE else n_rows, self.limit, n_rows)
        own = len(self)
        return [
            Chunk(min(start, own), min(start + size, own), 0, self.shape[0], size) for start in range(0, n_rows, max(size, 1))
        ]

    def sequence_chunks(self, together: int = 1) -> list[Chunk] | None:
        """Cut the rows between sequences so that ``together`` consecutive ones stay in one chunk.

        The result is None if so many sequences are longer than a chunk. It is None as well during the capture of a CUDA graph
        if the indices are on the device only, since reading them waits for the device.
        """
        if self.host_indices is None and self.indices.is_cuda and torch.cuda.is_current_stream_capturing():
            return None
        chunks = self._own_sequence_chunks(together)
        return chunks if self.rounds is None else self.rounds.aligned(chunks, len(self), self.shape[0])

    def _own_sequence_chunks(self, together: int) -> list[Chunk] | None:
        """Return the chunks of `sequence_chunks` without regard to other processes, or None."""
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
        """Compute the raw products of a chunk, also for the reference model, in memory that the next chunk overwrites."""
        if self._logits is None:
            self._logits = self._scratch(len(self), self.options.logits_dtype)
            if self.kind is not None:
                self._ref_logits = self._scratch(len(self.ref_x), self.options.logits_dtype)
        self.loaded_x = self._of_round(self.x[chunk.span], chunk)
        self._loaded = self._logits[: len(self.loaded_x), : self.n_vocab]
        for start, stop, ref in self._runs_of(chunk):
            local = self._local(chunk, start, stop)
            _product(self.loaded_x[local], self.head, self._loaded[local])
            if ref is not None:
                _product(self._of_round(self.ref_x[ref], chunk), self.ref_head, self._loaded_ref_logits(chunk, ref))

    def _of_round(self, x: Tensor, chunk: Chunk) -> Tensor:
        """Return the hidden states of a chunk; in rounds, those of the chunks of all processes."""
        return x if self.rounds is None else self.rounds.all_rows(x, chunk.size)

    def _local(self, chunk: Chunk, start: int, stop: int) -> slice:
        """Return the place of rows ``start`` to ``stop`` among those of a loaded chunk; in rounds all rows are one run."""
        return slice(start - chunk.start, stop - chunk.start) if self.rounds is None else slice(None)

    def _scratch(self, n_rows: int, dtype: torch.dtype) -> Tensor:
        """Return scratch memory for at most ``n_rows`` rows of a chunk."""
        if self.rounds is not None:
            n_rows = min(self.limit, self.most_rows) * self.rounds.n_processes
        else:
            n_rows = min(self.limit, n_rows)
        return self.x.new_empty((n_rows, self.row_width), dtype=dtype)

    def _runs_of(self, chunk: Chunk) -> Iterator[tuple[int, int, slice | None]]:
        """Yield each run of a chunk as its first row, the first row after it, and its rows of the reference model or None."""
        if self.rounds is not None:
            yield chunk.start, chunk.stop, None if self.kind is None else chunk.span
            return
        for run in self._runs:
            start = max(run.start, chunk.start)
            stop = min(run.stop, chunk.stop)
            if start < stop:
                offset = None if run.ref_start is None else run.ref_start - run.start
                yield start, stop, None if offset is None else slice(start + offset, stop + offset)

    def _loaded_ref_logits(self, chunk: Chunk, ref: slice) -> Tensor:
        """Return the loaded raw products of some rows of the reference model."""
        assert self._ref_logits is not None, "load() comes first"
        if self.rounds is not None:
            return self._ref_logits[: len(self._loaded), : self.n_vocab]
        first = next(rows.start for _, _, rows in self._runs_of(chunk) if rows is not None)
        return self._ref_logits[ref.start - first : ref.stop - first, : self.n_vocab]

    def measure(self, chunk: Chunk) -> None:
        """Fill in the statistics and divergences of the loaded chunk."""
        transform = self.head.transform()
        means: dict[str, Tensor | None] = {}
        if self.means is not None:
            means = {"means": self.means[chunk.span], "class_weights": self.row_values.class_weights}
        self.functions.token_statistics(
            self._loaded, self.labels[chunk.span], self.statistics[:, chunk.span], **means, **transform
        )  # fmt: skip
        self._predict(chunk)
        for start, stop, ref in self._runs_of(chunk):
            if ref is not None:
                ref_logits = self._loaded_ref_logits(chunk, ref)
                labels = self.labels[start:stop]
                self.functions.token_statistics(ref_logits, labels, self.ref_statistics[:, ref], **transform)
                self.functions.divergence_statistics(
                    self._loaded[self._local(chunk, start, stop)], ref_logits, labels, self.statistics[:, start:stop],
                    self.ref_statistics[:, ref], self.divergences[:, start:stop], **self._divergence_options(ref),
                )  # fmt: skip

    def _predict(self, chunk: Chunk) -> None:
        """Fill in the predictions of the loaded chunk, in one more read of it, if they are asked for."""
        if self.predictions is not None:
            labels, rising = self.labels[chunk.span], self.head.logit_scale > 0
            self.functions.predictions(self._loaded, labels, self.predictions[chunk.span], rising=rising)

    def gradient(
        self, chunk: Chunk, coefficients: Tensor, divergence_coefficients: Tensor | None = None,
        lse_coefficients: Tensor | None = None, mean_coefficients: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Return the gradient [n, V] by the raw products of a loaded and measured chunk, as a factor of the GEMMs.

        It overwrites the raw products.

        Args:
            chunk: the chunk that is loaded.
            coefficients: [n] fp32, derivative of the objective by each log-probability.
            divergence_coefficients: [n] fp32, derivative of the objective by each divergence; with a reference model only.
            lse_coefficients: [n] fp32, derivative of the objective by each logsumexp, or None; without a reference model only.
            mean_coefficients: [n] fp32, the same by each mean logit.
        """
        out = self._out()
        others: dict[str, Tensor | None] = {}
        if lse_coefficients is not None:
            others["lse_coefficients"] = lse_coefficients
        if mean_coefficients is not None:
            others |= {"mean_coefficients": mean_coefficients, "class_weights": self.row_values.class_weights}
        for start, stop, ref in self._runs_of(chunk):
            local = self._local(chunk, start, stop)
            labels = self.labels[start:stop]
            statistics = self.statistics[:, start:stop]
            if ref is None:
                self.functions.token_gradient(
                    self._loaded[local], labels, statistics, coefficients[local], out[local], **others, **self.head.transform()
                )
            else:
                assert divergence_coefficients is not None, "rows of a reference model need divergence_coefficients"
                self.functions.divergence_gradient(
                    self._loaded[local], self._loaded_ref_logits(chunk, ref), labels, statistics, self.ref_statistics[:, ref],
                    self.divergences[:, start:stop], coefficients[local], divergence_coefficients[local], out[local],
                    **self._divergence_options(ref),
                )  # fmt: skip
        return out

    def measured_gradient(self, chunk: Chunk, coefficients: Tensor) -> Tensor:
        """Do what `measure` and then `gradient` do, in one kernel; not with a reference model, nor for more statistics.

        Args:
            chunk: the chunk that is loaded.
            coefficients: [n] fp32, derivative of the objective by each log-probability.
        """
        assert self.kind is None and not self.has_all_statistics and self.means is None
        out = self._out()
        self._predict(chunk)
        self.functions.statistics_and_gradient(
            self._loaded, self.labels[chunk.span], self.statistics[:, chunk.span], coefficients, out, **self.head.transform()
        )
        return out

    def bounds(
        self, chunk: Chunk, coefficients: Tensor, divergence_coefficients: Tensor | None = None,
        lse_coefficients: Tensor | None = None, mean_coefficients: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Return approximate upper bounds [n] of the elements of each row of `gradient`, in absolute value.

        A bound is ``|coefficient| (1 - p)``, plus ``|divergence_coefficient|``, ``|lse_coefficient|`` and ``|mean_coefficient|
        max |class_weights| / V``, times the scale of the logits.
        """
        bounds = (coefficients * self.statistics[ONE_MINUS_P, chunk.span]).abs()
        for others in (divergence_coefficients, lse_coefficients):
            if others is not None:
                bounds = bounds + others.abs()
        if mean_coefficients is not None:
            class_weights = self.row_values.class_weights
            largest = 1.0 if class_weights is None else class_weights.abs().max()
            bounds = bounds + mean_coefficients.abs() * largest / self.head.n_vocab
        return bounds * abs(self.head.logit_scale)

    def _out(self) -> Tensor:
        """Return the memory of the loaded raw products, which their gradient overwrites.

        A gradient of a narrower dtype begins where the raw products of its row begin; the rest of the row's bytes is unused.
        """
        if self.options.logits_dtype == self.options.factor_dtype:
            return self._loaded
        assert self._logits is not None, "load() comes first"
        return self._logits.view(self.options.factor_dtype)[: len(self._loaded), : self.n_vocab]

    def _divergence_options(self, ref: slice) -> DivergenceOptions:
        """Return the options of the row functions for some rows of the reference model."""
        assert self.kind is not None
        strengths = None if self.strengths is None else self.strengths[ref]
        return {"strengths": strengths, "kind": self.kind, "beta": self.beta, **self.head.transform()}

    def log_probs(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Return the log-probabilities of the rows measured between ``start`` and ``stop``: [B, T] fp32, 0 elsewhere."""
        return self.scatter(self.statistics[LOGP, start:stop], start, stop)

    def token_statistics(self, start: int = 0, stop: int | None = None) -> TokenStatistics:
        """Return `TokenStatistics` [B, T] of the rows measured between ``start`` and ``stop``."""
        statistics = self.statistics[:, start:stop]
        values = (statistics[LOGP], self.lse(start, stop), statistics[HIT], statistics[ENTROPY], statistics[VARIANCE])
        return TokenStatistics(*(self.scatter(value, start, stop) for value in values))

    def lse(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Return the logsumexp of the logits of rows ``start`` to ``stop``, [n]; 0 for ignored rows."""
        statistics = self.statistics[:, start:stop]
        labelled = self.labels[start:stop] != IGNORE_INDEX
        return torch.where(labelled, statistics[ROW_MAX] + statistics[TOTAL].log(), 0.0)

    def values(self, start: int = 0, stop: int | None = None) -> list[Tensor]:
        """Return the values of rows ``start`` to ``stop`` that `row_values` ask for, [n] each; log-probabilities come first."""
        values = [self.statistics[LOGP, start:stop]]
        if self.row_values.lse:
            values.append(self.lse(start, stop))
        if self.means is not None:
            values.append(self.means[start:stop])
        return values

    def token_predictions(self) -> Tensor:
        """Return the predictions as [B, T] int64, -100 at ignored tokens; [0] if they were not asked for."""
        if self.predictions is None:
            return self.labels.new_empty(0)
        dense = torch.full(self.shape, IGNORE_INDEX, device=self.predictions.device)
        dense.view(-1).index_copy_(0, self.indices, self.predictions)
        return dense

    def scatter(self, values: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Return the values of rows ``start`` to ``stop`` as a [B, T] tensor, 0 elsewhere."""
        dense = torch.zeros(self.shape, dtype=values.dtype, device=values.device)
        dense.view(-1).index_copy_(0, self.indices[start:stop], values)
        return dense

    def gather(self, dense: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Return the values of rows ``start`` to ``stop`` in a [..., B, T] tensor, [..., n]."""
        return dense.flatten(-2).index_select(-1, self.indices[start:stop])

    def release_tensors(self) -> list[Tensor | None]:
        """Return the tensors that a second sweep needs, for ``save_for_backward``, and free the scratch memory.

        This object keeps none of them; otherwise they would live on after backward. `with_tensors` makes a usable copy of it.
        """
        self.free_scratch()
        tensors: list[Tensor | None] = [self.x, self.statistics, self.head.weight, self.head.bias]
        self._head = self.head._replace(weight=self.x.new_empty(0), bias=None)  # scale, cap and shard
        del self.x, self.statistics, self.head
        if self.kind is not None:
            tensors += [self.ref_x, self.ref_statistics, self.divergences, self.strengths]
            tensors += [self.ref_head.weight, self.ref_head.bias]
            del self.ref_x, self.ref_statistics, self.divergences, self.strengths, self.ref_head
        return tensors

    def with_tensors(self, tensors: list[Tensor]) -> "HeadRows":
        """Return a copy with the tensors from `release_tensors`."""
        copied = copy.copy(self)
        copied.x, copied.statistics, weight, bias, *ref_tensors = tensors
        copied.head = self._head._replace(weight=weight, bias=bias)
        if self.kind is not None:
            copied.ref_x, copied.ref_statistics, copied.divergences, copied.strengths, weight, bias = ref_tensors
            copied.ref_head = self._head._replace(weight=weight, bias=bias)
        return copied

    def free_scratch(self) -> None:
        """Free the scratch memory of the chunks; `load` allocates it again."""
        self._logits = self._ref_logits = None
        self._loaded = self.loaded_x = self.x.new_empty(0)


def _runs_of_mask(mask: Tensor) -> list[Run]:
    """Return the runs of a [R] bool mask on the CPU, which is true for rows with a row of the reference model."""
    values, counts = torch.unique_consecutive(mask, return_counts=True)
    runs = []
    start = ref_start = 0
    for has_ref_row, count in zip(values.tolist(), counts.tolist()):
        runs.append(Run(start, start + count, ref_start if has_ref_row else None))
        start += count
        ref_start += count * has_ref_row
    return runs


class DrawnRows(HeadRows):
    """Rows with labels drawn from the model, from one uniform number each."""

    def __init__(
        self, hidden: Tensor, head: Head, keep: Tensor, token_indices: Tensor | None, options: ResolvedOptions, uniforms: Tensor
    ) -> None:
        labels = torch.where(keep, 0, IGNORE_INDEX)  # 0 stands for labels that are not drawn yet
        super().__init__(hidden, head, labels, token_indices, options)
        self.uniforms = self.gather(uniforms)

    def measure(self, chunk: Chunk) -> None:
        """Fill in the statistics that `gradient` needs to draw labels."""
        statistics = self.statistics[:, chunk.span]
        self.functions.likeliest_statistics(self._loaded, self.labels[chunk.span], statistics, **self.head.transform())

    def gradient(self, chunk: Chunk, coefficients: Tensor, *_: Tensor | None, **__: Tensor | None) -> Tensor:
        """Draw the labels, fill in their log-probabilities, and return the gradient."""
        out = self._out()
        self.functions.draw_labels(
            self._loaded, self.labels[chunk.span], self.uniforms[chunk.span], self.statistics[:, chunk.span], coefficients,
            out, **self.head.transform(),
        )  # fmt: skip
        return out

    def bounds(self, chunk: Chunk, coefficients: Tensor, *_: Tensor | None, **__: Tensor | None) -> Tensor:
        """Return the bounds of `HeadRows.bounds` with 1 in place of 1 - p, because no label is drawn yet."""
        return coefficients.abs() * abs(self.head.logit_scale)


def _product(x: Tensor, head: Head, out: Tensor) -> None:
    """Compute ``out = x @ weight.T + bias``; ``out`` is fp32, or in the dtype of the factors."""
    if x.dtype != head.weight.dtype:
        with products_in(head.weight.dtype, x):  # exact: x has been rounded to that dtype
            for columns, block in _converted_blocks(head.weight, x.dtype):
                torch.mm(x, block.T, out=out[:, columns])
    elif out.dtype == torch.float32:
        mm_fp32(x, head.weight.T, out)
    else:
        torch.mm(x, head.weight.T, out=out)
    if head.bias is not None:
        out.add_(head.bias)


def product_with_weight(dlogits: Tensor, weight: Tensor, out: Tensor) -> None:
    """Compute ``out = dlogits @ weight`` in fp32 (fp64 for fp64 factors), whatever the dtype of the weight.

    With a bf16 weight, fp32 gradients of logits are rounded to bf16 where `products_in` does so, as the kernels round them.
    """
    if dlogits.dtype == weight.dtype:
        mm_fp32(dlogits, weight, out)
        return
    if not len(weight):  # an empty shard of a head
        out.zero_()
    with products_in(weight.dtype, dlogits):
        for columns, block in _converted_blocks(weight, dlogits.dtype):
            out.addmm_(dlogits[:, columns], block, beta=0 if columns.start == 0 else 1)


@contextlib.contextmanager
def products_in(dtype: torch.dtype, factor: Tensor) -> Iterator[None]:
    """Return a context in which a CPU with tiles (AMX) rounds the factors of fp32 products to bf16 as it loads the tiles.

    Sums and results stay fp32, and fp32 tensors that hold bf16 numbers lose nothing. Torch has no other way to compute such a
    product on a CPU. The switch belongs to the whole process: fp32 products that other threads begin in the meantime are
    rounded as well.

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
    """Yield a weight block by block, converted to another dtype: the slice of a block's rows, and the block.

    The blocks share one block of memory, because new memory for each would take longer than the conversion.
    """
    size = max(min(WEIGHT_BLOCK // max(weight.shape[1], 1), len(weight)), 1)
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

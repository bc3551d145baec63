"""The whole step, loss and optimizer included, as one CUDA graph: a small model spends more time on launches than on work.

A graph repeats what was captured, on the same memory. So batches are padded to few shapes, and each shape has its own graph.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from soul.data.batches import Batch
from soul_kernels.tokens import IGNORE_INDEX

TOKENS = 32  # the length of a batch is padded to a multiple of it
ROWS = 128  # the number of labelled tokens is padded to a multiple of it
TENSORS = ("input_ids", "labels", "token_indices", "is_forget", "ref_logps", "ref_hidden")

Step = Callable[[Batch], dict[str, Tensor]]


def pad(batch: Batch, tokens: int = TOKENS, rows: int = ROWS) -> Batch:
    """Return a batch padded to one of few shapes, all of it on the device.

    Padding on the right of causal attention needs no mask, and the fast attention kernels take none. Token indices are filled
    up with the last position, which never has a label.

    Args:
        batch: a `soul.data.batches.Batch` [B, T] with R labelled tokens.
        tokens: T becomes a multiple of this number.
        rows: R becomes a multiple of this number.
    """
    device = batch.labels.device
    n_sequences, length = batch.labels.shape
    n_padding = -length % tokens

    def wider(values: Tensor, filling: int = 0) -> Tensor:
        return torch.nn.functional.pad(values, (0, n_padding), value=filling)

    # Flat indices b T + t of the wider batch.
    indices = batch.token_indices + batch.token_indices // length * n_padding
    last = n_sequences * (length + n_padding) - 1
    indices = torch.nn.functional.pad(indices, (0, -len(indices) % rows), value=last)
    ref_hidden = batch.ref_hidden
    if ref_hidden is not None:
        ref_hidden = torch.nn.functional.pad(ref_hidden, (0, 0, 0, n_padding))
    return dataclasses.replace(
        batch,
        input_ids=wider(batch.input_ids),
        attention_mask=None,
        labels=wider(batch.labels, IGNORE_INDEX),
        token_indices=indices.to(device, non_blocking=True),
        is_forget=batch.is_forget.to(device, non_blocking=True),
        ref_hidden=ref_hidden,
    )


class GraphedStep:
    """A step that is captured for each shape of batch, and replayed for later batches of that shape.

    The first batch of a shape is stepped eagerly, which compiles kernels and makes the optimizer's states. Then the step is
    captured, which changes nothing. Later batches are copied into the memory of the captured one.

    Args:
        step: takes a padded `soul.data.batches.Batch`; returns a dict of tensors. Everything that it reads and changes must be
            the same memory at every call: use an optimizer with ``capturable=True``.
        device: the GPU.
    """

    def __init__(self, step: Step, device: torch.device) -> None:
        self._step = step
        self._graphs: dict[tuple, tuple[Batch, torch.cuda.CUDAGraph, dict[str, Tensor]]] = {}  # by shape
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """Take one step on a batch; return what ``step`` returned, in memory that the next call overwrites."""
        current = torch.cuda.current_stream(batch.labels.device)
        self._stream.wait_stream(current)
        # All on one stream, so that autograd's nodes and the optimizer's tables belong to the stream that is captured.
        with torch.cuda.stream(self._stream):
            values = self._on_stream(pad(batch))
        current.wait_stream(self._stream)
        return values

    def _on_stream(self, batch: Batch) -> dict[str, Tensor]:
        shape = (*((name, tuple(tensor.shape)) for name, tensor in _tensors(batch).items()), batch.has_retain)
        if shape not in self._graphs:
            values = {name: value.clone() for name, value in self._step(batch).items()}
            self._graphs[shape] = self._capture(batch)
            return values
        static, graph, values = self._graphs[shape]
        for name, tensor in _tensors(static).items():
            tensor.copy_(getattr(batch, name), non_blocking=True)
        graph.replay()
        return values

    def _capture(self, batch: Batch) -> tuple[Batch, torch.cuda.CUDAGraph, dict[str, Tensor]]:
        """Capture a step; return the batch whose memory it reads, the graph, and the tensors that it writes."""
        copies: dict[str, Any] = {name: tensor.clone() for name, tensor in _tensors(batch).items()}
        static = dataclasses.replace(batch, **copies)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            values = self._step(static)
        return static, graph, values


def _tensors(batch: Batch) -> dict[str, Tensor]:
    return {name: tensor for name in TENSORS if (tensor := getattr(batch, name)) is not None}

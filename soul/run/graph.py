"""The whole step, loss and optimizer included, as one CUDA graph: what a small model waits for is the launches.

A graph repeats what was captured, on the same memory. So shapes are made few by padding, and there is a graph for each.
"""

import dataclasses

import torch

TOKENS = 32  # the length of a batch is padded to a multiple
ROWS = 128  # and so is the number of its labelled tokens
TENSORS = ("input_ids", "labels", "token_indices", "is_forget", "ref_logps", "ref_hidden")


def pad(batch, tokens=TOKENS, rows=ROWS):
    """The same batch in one of few shapes, all of it on the device.

    Padding on the right of causal attention needs no mask, and the fast attention kernels take none. Token indices are filled
    up with the last position, which never has a label.

    Args:
        batch: a `soul.data.batches.Batch` [B, T] with R labelled tokens.
        tokens: T becomes a multiple of it.
        rows: R becomes a multiple of it.
    """
    device, (n_sequences, length) = batch.labels.device, batch.labels.shape
    more = -length % tokens

    def wider(values, filling=0):
        return torch.nn.functional.pad(values, (0, more), value=filling)

    # Flat indices b T + t of the wider batch.
    indices = batch.token_indices + batch.token_indices // length * more
    last = n_sequences * (length + more) - 1
    indices = torch.nn.functional.pad(indices, (0, -len(indices) % rows), value=last)
    hidden = batch.ref_hidden
    return dataclasses.replace(
        batch,
        input_ids=wider(batch.input_ids),
        attention_mask=None,
        labels=wider(batch.labels, -100),
        token_indices=indices.to(device, non_blocking=True),
        is_forget=batch.is_forget.to(device, non_blocking=True),
        ref_hidden=None if hidden is None else torch.nn.functional.pad(hidden, (0, 0, 0, more)),
    )


class GraphedStep:
    """Replays a step for every shape that it has seen.

    The first batch of a shape is stepped eagerly, which compiles kernels and makes states, and then captured, which changes
    nothing. Later ones are copied to where the captured one lies.

    Args:
        step: takes a padded `soul.data.batches.Batch`; returns a dict of tensors. Everything that it reads and changes must be
            the same memory at every call: an optimizer with ``capturable=True``.
        device: the GPU.
    """

    def __init__(self, step, device):
        self._step, self._graphs = step, {}
        self._stream, self._pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def __call__(self, batch):
        """One step on a batch; returns what the step returned, in memory that the next call overwrites."""
        current = torch.cuda.current_stream(batch.labels.device)
        self._stream.wait_stream(current)
        # All on one stream, so that autograd's nodes and the optimizer's tables are of the stream that is captured.
        with torch.cuda.stream(self._stream):
            values = self._on_stream(pad(batch))
        current.wait_stream(self._stream)
        return values

    def _on_stream(self, batch):
        shape = tuple((n, tuple(t.shape)) for n, t in _tensors(batch).items()) + (batch.has_retain,)
        if shape not in self._graphs:
            values = {name: value.clone() for name, value in self._step(batch).items()}
            self._graphs[shape] = self._capture(batch)
            return values
        static, graph, values = self._graphs[shape]
        for name, tensor in _tensors(static).items():
            tensor.copy_(getattr(batch, name), non_blocking=True)
        graph.replay()
        return values

    def _capture(self, batch):
        static = dataclasses.replace(batch, **{name: tensor.clone() for name, tensor in _tensors(batch).items()})
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            values = self._step(static)
        return static, graph, values


def _tensors(batch):
    return {name: tensor for name in TENSORS if (tensor := getattr(batch, name)) is not None}

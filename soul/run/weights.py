"""Copies of the tensors that a step may change, to put them back exactly."""

import contextlib
from collections.abc import Iterator

import torch

from soul.checkpoint.format import mutable_tensors
from soul.distributed.shards import is_sharded

Tensors = dict[str, torch.Tensor]


def snapshot(model: torch.nn.Module) -> Tensors:
    """Return copies of the tensors that a step may change: on the CPU or, of a sharded model, in its shards."""
    tensors = mutable_tensors(model)
    return {name: t.clone() if is_sharded(t) else t.to("cpu", copy=True) for name, t in tensors.items()}


def restore(model: torch.nn.Module, tensors: Tensors) -> None:
    """Put copies of `snapshot` back."""
    with torch.no_grad():
        for name, tensor in mutable_tensors(model).items():
            tensor.copy_(tensors[name])


@contextlib.contextmanager
def exchanged(model: torch.nn.Module, tensors: Tensors) -> Iterator[None]:
    """Give a model the tensors of a `snapshot` within the block, and its own again after it."""
    own = snapshot(model)
    restore(model, tensors)
    try:
        yield
    finally:
        restore(model, own)

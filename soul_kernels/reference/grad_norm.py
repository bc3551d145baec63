"""Euclidean norm of a list of gradients."""

from collections.abc import Sequence

import torch
from torch import Tensor

from soul_kernels.reference import _blocks


def grad_norm(grads: Sequence[Tensor]) -> Tensor:
    """Return ``soul_kernels.grad_norm`` in plain PyTorch: squares in fp32, as the kernel forms them, summed in fp64."""
    pieces = [piece for grad in grads for piece in grad.reshape(-1).split(_blocks.BLOCK)]
    squares = [piece.float().square().sum(dtype=torch.float64).to(grads[0].device) for piece in pieces]
    return torch.stack(squares).sum().sqrt().float()

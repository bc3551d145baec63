"""The Euclidean norm of all gradients together."""

import torch


def grad_norm(grads):
    """``soul_kernels.grad_norm`` in plain PyTorch: summed in fp64, on the device of the first tensor."""
    squares = [grad.double().square().sum().to(grads[0].device) for grad in grads]
    return torch.stack(squares).sum().sqrt().float()

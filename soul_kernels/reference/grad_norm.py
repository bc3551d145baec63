"""The Euclidean norm of all gradients together."""

import torch


def grad_norm(grads):
    """``soul_kernels.grad_norm`` in plain PyTorch: squares in fp32, as the kernel forms them, summed in fp64."""
    squares = [grad.float().square().sum(dtype=torch.float64).to(grads[0].device) for grad in grads]
    return torch.stack(squares).sum().sqrt().float()

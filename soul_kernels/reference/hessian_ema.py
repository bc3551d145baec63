"""The moving average of squared gradients that stands for the diagonal of the Hessian."""

from soul_kernels.reference.rounding import store_nearest


def ema_of_squares(h, g, *, beta2, scale):
    """``beta2 h + (1 - beta2) scale g^2`` of two fp32 tensors."""
    return beta2 * h + ((1 - beta2) * scale) * (g * g)


def hessian_ema(hessians, grads, *, beta2, scale):
    """``soul_kernels.hessian_ema`` in plain PyTorch; mutates ``hessians``."""
    for hessian, grad in zip(hessians, grads):
        store_nearest(hessian, ema_of_squares(hessian.float(), grad.float(), beta2=beta2, scale=scale))

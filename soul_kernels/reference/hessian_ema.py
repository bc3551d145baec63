"""The moving average of squared gradients that stands for the diagonal of the Hessian."""

import torch

from soul_kernels.reference.rounding import load_state, noise, store_state


def ema(h, products, *, beta2, scale):
    """``beta2 h + (1 - beta2) scale products`` of two fp32 tensors."""
    return beta2 * h + ((1 - beta2) * scale) * products


def hessian_ema(hessians, grads, *, beta2, scale, probes, hessian_scales, salts, steps, grad_factor, skip):
    """``soul_kernels.hessian_ema`` in plain PyTorch; mutates ``hessians`` and ``hessian_scales``."""
    if skip is not None and skip.item():
        return
    for i, (hessian, grad) in enumerate(zip(hessians, grads)):
        h_scale = hessian_scales and hessian_scales[i]
        word = None
        if hessian.dtype != torch.float32:
            word = noise(salts[i], 0 if steps is None else steps[i], hessian.numel(), hessian.device)
            word = word.as_strided(hessian.shape, hessian.stride())
        g = grad.float() if grad_factor is None else grad.float() * grad_factor
        products = g * (g if probes is None else probes[i].float())
        h = ema(load_state(hessian, h_scale, "hessian"), products, beta2=beta2, scale=scale)
        store_state(hessian, h_scale, h, word, "hessian")

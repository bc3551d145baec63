"""The moving average of squared gradients that stands for the diagonal of the Hessian."""

import torch

from soul_kernels.reference._blocks import blocks
from soul_kernels.reference.rounding import load_state, noise, store_state


def ema(h, products, *, beta2, scale):
    """``beta2 h + (1 - beta2) scale products`` of two fp32 tensors."""
    return beta2 * h + ((1 - beta2) * scale) * products


def hessian_ema(hessians, grads, *, beta2, scale, probes, hessian_scales, salts, steps, grad_factor, skip):
    """``soul_kernels.hessian_ema`` in plain PyTorch; mutates ``hessians`` and ``hessian_scales``."""
    if skip is not None and skip.item():
        return
    for i, whole in enumerate(hessians):
        read, scales = (grads[i], probes and probes[i]), (hessian_scales and hessian_scales[i],)
        step = 0 if steps is None else steps[i]
        for start, hessian, grad, probe, h_scale in blocks([whole], read, scales):
            word = None if hessian.dtype == torch.float32 else noise(salts[i], step, len(hessian), hessian.device, start)
            g = grad.float() if grad_factor is None else grad.float() * grad_factor
            products = g * (g if probe is None else probe.float())
            h = ema(load_state(hessian, h_scale, "hessian"), products, beta2=beta2, scale=scale)
            store_state(hessian, h_scale, h, word, "hessian")

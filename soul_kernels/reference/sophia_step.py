"""The Sophia update with optional Hessian EMA, for each tensor of a list."""

import torch

from soul_kernels.reference.hessian_ema import ema
from soul_kernels.reference.rounding import join, load_state, noise, split, store_nearest, store_state, store_stochastic


def sophia_step(
    params, grads, exp_avgs, hessians, *, lr, beta1, rho, bs, eps, weight_decay, beta2, maximize, eps_mode, param_rounding,
    low_bits, exp_avg_scales, hessian_scales, corrections, salts, steps, grad_factor, skip, telemetry,
):  # fmt: skip
    """``soul_kernels.sophia_step`` in plain PyTorch: fp32 inside, one rounding on the way out; mutates all but grads."""
    if skip is not None and skip.item():
        return
    lr, weight_decay, rho, bs = (
        x.reshape(()) if isinstance(x, torch.Tensor) else torch.tensor(x, dtype=torch.float32, device="cpu")
        for x in (lr, weight_decay, rho, bs)
    )
    for i, (param, grad, exp_avg, hessian) in enumerate(zip(params, grads, exp_avgs, hessians)):
        low = low_bits and low_bits[i]
        m_scale, h_scale = exp_avg_scales and exp_avg_scales[i], hessian_scales and hessian_scales[i]
        word = None
        if param_rounding != "nearest" or exp_avg.dtype == torch.uint8 or hessian.dtype != torch.float32:
            word = noise(salts[i], 0 if steps is None else steps[i], param.numel(), param.device).as_strided(
                param.shape, param.stride()
            )
        p = param.float() if low is None else join(param, low)
        g = grad.float() if grad_factor is None else grad.float() * grad_factor
        if maximize:
            g = -g
        m = beta1 * load_state(exp_avg, m_scale, "exp_avg") + (1 - beta1) * g
        h = load_state(hessian, h_scale, "hessian")
        if beta2 is not None:
            h = ema(h, g * g, beta2=beta2, scale=1.0)
            store_state(hessian, h_scale, h, word, "hessian")
        weight = rho * bs if corrections is None else rho * bs / corrections[i]
        curvature = weight * h.clamp(min=0)
        denominator = curvature + eps if eps_mode == "add" else curvature.clamp(min=eps)
        ratio = m / denominator
        update = ratio.clamp(-1, 1)  # NaN stays NaN
        store_state(exp_avg, m_scale, m, word, "exp_avg")
        change = lr * (weight_decay * p + update)
        before = param.clone()
        if param.dtype == torch.float32 or param_rounding == "nearest":
            store_nearest(param, p - change)
        elif param_rounding == "stochastic":
            store_stochastic(param, p - change, word)
        else:
            high, new_low = split(p - change, word, param.dtype)
            param.copy_(high)
            low.copy_(new_low)
        if telemetry is not None:
            rounded = param_rounding == "nearest" and param.dtype != torch.float32
            lost = (param == before) & (change != 0) & rounded
            clipped = (ratio.abs() >= 1).sum()
            telemetry += torch.stack([clipped.double(), lost.sum().double(), (change * change).sum(dtype=torch.float64)])

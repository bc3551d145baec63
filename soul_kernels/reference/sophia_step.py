"""The Sophia update with optional Hessian EMA, for each tensor of a list."""

import torch

from soul_kernels.reference._blocks import blocks
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
    for i, whole in enumerate(params):
        written = (whole, exp_avgs[i], hessians[i], low_bits and low_bits[i])
        scales = (exp_avg_scales and exp_avg_scales[i], hessian_scales and hessian_scales[i])
        rounds = param_rounding != "nearest" and whole.dtype != torch.float32
        draws = rounds or exp_avgs[i].dtype == torch.uint8 or (beta2 is not None and hessians[i].dtype != torch.float32)
        step = 0 if steps is None else steps[i]
        for start, param, exp_avg, hessian, low, grad, m_scale, h_scale in blocks(written, [grads[i]], scales):
            word = noise(salts[i], step, len(param), param.device, start) if draws else None
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

"""The Sophia update with optional Hessian EMA, for each tensor of a list."""

from soul_kernels.reference.hessian_ema import ema_of_squares
from soul_kernels.reference.rounding import store_nearest


def sophia_step(params, grads, exp_avgs, hessians, *, lr, beta1, rho, bs, eps, weight_decay, beta2, maximize, clip_count):
    """``soul_kernels.sophia_step`` in plain PyTorch: fp32 inside, one rounding on the way out; mutates all but grads."""
    for param, grad, exp_avg, hessian in zip(params, grads, exp_avgs, hessians):
        p, g, h = param.float(), grad.float(), hessian.float()
        if maximize:
            g = -g
        m = beta1 * exp_avg.float() + (1 - beta1) * g
        if beta2 is not None:
            h = ema_of_squares(h, g, beta2=beta2, scale=1.0)
            store_nearest(hessian, h)
        denominator = (rho * bs) * h + eps
        update = (m / denominator).clamp(-1, 1)  # NaN stays NaN
        if clip_count is not None:
            clip_count += (m.abs() >= denominator).sum()
        store_nearest(exp_avg, m)
        store_nearest(param, p - lr * (weight_decay * p + update))

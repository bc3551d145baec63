"""The Sophia update with optional Hessian EMA, for each tensor of a list."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from soul_kernels.reference._blocks import blocks
from soul_kernels.reference.hessian_ema import ema
from soul_kernels.reference.rounding import (
    join,
    load_block,
    noise_key,
    noise_words,
    round_stochastic,
    scalar,
    split,
    store_block,
)


class Numbers(NamedTuple):
    """What all elements of a tensor share: fp32 tensors of shape (). Differences from 1 are formed in double precision."""

    lr: torch.Tensor
    weight_decay: torch.Tensor
    h_weight: torch.Tensor  # rho bs, divided by the tensor's bias correction
    beta1: torch.Tensor
    beta1_rest: torch.Tensor  # 1 - beta1, or its negative to maximize
    beta2: torch.Tensor
    beta2_rest: torch.Tensor
    eps: torch.Tensor


def step_block(
    param, exp_avg, hessian, low, grad, m_scale, h_scale, key, start, numbers, factor, telemetry,
    *, hessian_in_step, eps_mode, param_rounding,
):  # fmt: skip
    """Update one block in place: fp32 inside, one rounding on the way out.

    Args:
        param: [rows, n] in fp32, bf16 or fp16; mutated.
        exp_avg: [rows, n] in any storage of states; mutated.
        hessian: the same; mutated with ``hessian_in_step`` only.
        low: int8 [rows, n], the next 8 bits of a 24-bit weight; mutated. None elsewhere.
        grad: [rows, n] in fp32, bf16 or fp16.
        m_scale: fp32 [rows], the scales of an 8-bit momentum; mutated. None elsewhere.
        h_scale: the same of an 8-bit Hessian.
        key: the block's `noise_key`; None where nothing is rounded by chance.
        start: int64 [], number of the first element in the whole tensor.
        numbers: the tensor's `Numbers`.
        factor: fp32 [] that the gradients are multiplied by, or None.
        telemetry: fp64 [3] that the counts of `soul_kernels.sophia_step` are added to, or None.
        hessian_in_step: whether h is refreshed from the same gradient.
        eps_mode: "add" or "max".
        param_rounding: "nearest", "stochastic" or "compensated"; of fp32 parameters "nearest".
    """
    word = None if key is None else noise_words(key, start, param.shape)
    p = param.float() if low is None else join(param, low)
    g = grad.float() if factor is None else grad.float() * factor
    m = numbers.beta1 * load_block(exp_avg, m_scale, "exp_avg") + numbers.beta1_rest * g
    h = load_block(hessian, h_scale, "hessian")
    if hessian_in_step:
        h = ema(h, g * g, numbers.beta2, numbers.beta2_rest)
    curvature = numbers.h_weight * h.clamp(min=0)
    denominator = curvature + numbers.eps if eps_mode == "add" else torch.maximum(curvature, numbers.eps)
    ratio = m / denominator
    change = numbers.lr * (numbers.weight_decay * p + ratio.clamp(-1, 1))  # NaN stays NaN
    if param_rounding == "nearest":
        new = (p - change).to(param.dtype)
    elif param_rounding == "stochastic":
        new = round_stochastic(p - change, word, param.dtype)
    else:
        new, new_low = split(p - change, word, param.dtype)
        low.copy_(new_low)
    if telemetry is not None:
        counts = (ratio.abs() >= 1).long()  # of an element: clipped + 2^32 lost, so that both are one sum
        if param_rounding == "nearest" and param.dtype != torch.float32:
            counts = counts + (((new.float() == p) & (change != 0)).long() << 32)
        counts = counts.sum()
        telemetry += torch.stack([counts & 0xFFFFFFFF, counts >> 32, (change * change).sum(dtype=torch.float64)])
    param.copy_(new)
    store_block(exp_avg, m_scale, m, word, "exp_avg")
    if hessian_in_step:
        store_block(hessian, h_scale, h, word, "hessian")


def sophia_step(
    params, grads, exp_avgs, hessians, *, lr, beta1, rho, bs, eps, weight_decay, beta2, maximize, eps_mode, param_rounding,
    low_bits, exp_avg_scales, hessian_scales, corrections, salts, offsets, steps, grad_factor, skip, telemetry,
    run: Callable[..., None] = step_block,
):  # fmt: skip
    """``soul_kernels.sophia_step`` in plain PyTorch; mutates all but grads.

    ``run`` is what updates a block: `step_block`, or what has been compiled from it.
    """
    if skip is not None and skip.item():
        return
    h_weight = scalar(rho) * scalar(bs)
    factor = None if grad_factor is None else scalar(grad_factor)
    numbers = Numbers(
        lr=scalar(lr),
        weight_decay=scalar(weight_decay),
        h_weight=h_weight,
        beta1=scalar(beta1),
        beta1_rest=scalar(beta1 - 1 if maximize else 1 - beta1),
        beta2=scalar(0.0 if beta2 is None else beta2),
        beta2_rest=scalar(0.0 if beta2 is None else 1 - beta2),
        eps=scalar(eps),
    )
    for i, whole in enumerate(params):
        written = (whole, exp_avgs[i], hessians[i], low_bits and low_bits[i])
        scales = (exp_avg_scales and exp_avg_scales[i], hessian_scales and hessian_scales[i])
        stored = "nearest" if whole.dtype == torch.float32 else param_rounding
        draws = stored != "nearest" or exp_avgs[i].dtype == torch.uint8
        draws = draws or (beta2 is not None and hessians[i].dtype != torch.float32)
        step = 0 if steps is None else steps[i]
        if corrections is not None:
            numbers = numbers._replace(h_weight=h_weight / corrections[i])
        for start, *tensors in blocks(written, [grads[i]], scales, size=getattr(run, "size", None), first=offsets[i]):
            key = noise_key(salts[i], step, start, whole.device) if draws else None
            run(
                *tensors, key, torch.tensor(start, device="cpu"), numbers, factor, telemetry,
                hessian_in_step=beta2 is not None, eps_mode=eps_mode, param_rounding=stored,
            )  # fmt: skip

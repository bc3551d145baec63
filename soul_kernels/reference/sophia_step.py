"""The Sophia update with an optional moving average (EMA) of the Hessian, for each tensor of a list.

`step_block` is the formula; `sophia_step` walks the tensors of a list in blocks that fit the processor's caches.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from soul_kernels.reference._blocks import blocks, entry
from soul_kernels.reference.hessian_ema import ema
from soul_kernels.reference.rounding import (
    draws_codes,
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
    """Numbers that all elements of a tensor share, as fp32 tensors of shape (). 1 - beta is computed in double precision."""

    lr: Tensor
    weight_decay: Tensor
    h_weight: Tensor  # rho bs, divided by the tensor's bias correction
    beta1: Tensor
    beta1_rest: Tensor  # 1 - beta1, or its negative to maximize
    beta2: Tensor
    beta2_rest: Tensor  # 1 - beta2
    eps: Tensor


def step_block(
    param: Tensor, exp_avg: Tensor, hessian: Tensor, low: Tensor | None, grad: Tensor, m_scale: Tensor | None,
    h_scale: Tensor | None, key: Tensor | None, start: Tensor, numbers: Numbers, factor: Tensor | None,
    telemetry: Tensor | None, *, hessian_in_step: bool, eps_mode: str, param_rounding: str, stochastic_codes: bool,
) -> None:  # fmt: skip
    """Update one block in place: everything is computed in fp32 and rounded once, where it is stored.

    Args:
        param: [rows, n] in fp32, bf16 or fp16; mutated.
        exp_avg: [rows, n] in fp32 or bf16, or 8-bit codes in uint8; mutated.
        hessian: [rows, n] in the same dtypes; mutated with ``hessian_in_step`` only.
        low: int8 [rows, n], the next 8 bits of a 24-bit weight; mutated. None for fp32 parameters and for other roundings.
        grad: [rows, n] in fp32, bf16 or fp16.
        m_scale: int16 [rows], the scales of an 8-bit momentum; mutated. None for other dtypes.
        h_scale: int16 [rows], the scales of an 8-bit Hessian; mutated with ``hessian_in_step`` only. None for other dtypes.
        key: the block's `noise_key`; None where nothing is rounded stochastically.
        start: int64 [], index of the block's first element in the whole tensor.
        numbers: the tensor's `Numbers`.
        factor: fp32 [] that the gradients are multiplied by, or None.
        telemetry: fp64 [3], to which the counts of `soul_kernels.sophia_step` are added, or None.
        hessian_in_step: whether h is refreshed from the same gradient.
        eps_mode: "add" or "max".
        param_rounding: "nearest", "stochastic" or "compensated"; "nearest" for fp32 parameters.
        stochastic_codes: whether an 8-bit Hessian is rounded stochastically.
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
        assert word is not None
        new = round_stochastic(p - change, word, param.dtype)
    else:
        assert low is not None and word is not None
        new, new_low = split(p - change, word, param.dtype)
        low.copy_(new_low)
    if telemetry is not None:
        clipped = (ratio.abs() >= 1).sum(dtype=torch.int32)
        lost = torch.zeros_like(clipped)
        if param_rounding == "nearest" and param.dtype != torch.float32:
            lost = ((new.float() == p) & (change != 0)).sum(dtype=torch.int32)
        # Where the ratio is NaN the change is too. Reading it here lets torch.compile form both sums in one loop.
        squares = torch.where(ratio == ratio, change * change, change)
        telemetry += torch.stack([clipped, lost, squares.sum(dtype=torch.float64)])
    param.copy_(new)
    store_block(exp_avg, m_scale, m, None, "exp_avg")
    if hessian_in_step:
        store_block(hessian, h_scale, h, word if stochastic_codes or hessian.dtype != torch.uint8 else None, "hessian")


def sophia_step(
    params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor], hessians: Sequence[Tensor], *,
    lr: float | Tensor, beta1: float, rho: float | Tensor, bs: float | Tensor, eps: float, weight_decay: float | Tensor,
    beta2: float | None, maximize: bool, eps_mode: str, param_rounding: str, low_bits: Sequence[Tensor | None] | None,
    exp_avg_scales: Sequence[Tensor | None] | None, hessian_scales: Sequence[Tensor | None] | None,
    corrections: Sequence[float] | Tensor | None, salts: Sequence[int], offsets: Sequence[int],
    steps: Tensor | None, grad_factor: Tensor | None, skip: Tensor | None, telemetry: Tensor | None,
    run: Callable[..., None] = step_block,
) -> None:  # fmt: skip
    """Run ``soul_kernels.sophia_step`` in plain PyTorch; the states and parameters are mutated, ``grads`` are not.

    ``salts`` has one number for each tensor, from `soul_kernels.reference.rounding.salt`. ``offsets`` has the index of each
    tensor's first element in the whole tensor: 0 unless the tensor is a shard. ``run`` updates a block: it is `step_block`, or
    `step_block` compiled. The other arguments are those of the op.
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
        written = (whole, exp_avgs[i], hessians[i], entry(low_bits, i))
        scales = (entry(exp_avg_scales, i), entry(hessian_scales, i))
        rounding = "nearest" if whole.dtype == torch.float32 else param_rounding
        stochastic_codes = hessians[i].dtype == torch.uint8 and draws_codes(beta2)
        draws = rounding != "nearest" or stochastic_codes or (beta2 is not None and hessians[i].dtype == torch.bfloat16)
        step = 0 if steps is None else steps[i]
        if corrections is not None:
            numbers = numbers._replace(h_weight=h_weight / corrections[i])
        for start, *tensors in blocks(written, [grads[i]], scales, size=getattr(run, "size", None), first=offsets[i]):
            key = noise_key(salts[i], step, start, whole.device) if draws else None
            run(
                *tensors, key, torch.tensor(start, device="cpu"), numbers, factor, telemetry,
                hessian_in_step=beta2 is not None, eps_mode=eps_mode, param_rounding=rounding,
                stochastic_codes=stochastic_codes,
            )  # fmt: skip

"""Peers of the optimizer's step: the published formulas written out, torch's optimizers, and those of other libraries.

Each function makes an optimizer and returns its step. Where the package is missing, it raises ModuleNotFoundError. The
interfaces of the multi-tensor libraries were read in Transformer Engine 2.20.2, apex at 004da4e (states of bf16 parameters are
fp32), and Dion at db3595d and later (there a Triton kernel over all tensors, later ``torch._fused_adamw_`` on all tensors).
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch

from bench._harness import compiled
from soul_kernels.reference.sophia_step import sophia_step as reference_step

# Of AdamW, where results are compared.
ADAMW: dict[str, Any] = dict(lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)

Tensors = list[torch.Tensor]
Params = list[torch.Tensor]  # with gradients


def published_step(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    hessians: Tensors,
    *,
    soul: bool,
    lr: float = 1e-4,
    b1: float = 0.965,
    b2: float = 0.99,
    rho: float = 0.04,
    bs: int = 5120,
    wd: float = 0.1,
) -> None:
    """Take the published SophiaG.step, or SOUL's, operation for operation."""
    for p, g, m, h in zip(params, grads, exp_avgs, hessians):
        if soul:
            h.mul_(b2).addcmul_(g, g, value=1 - b2)
            m.mul_(b1).add_(g, alpha=1 - b1)
        p.mul_(1 - lr * wd)
        m.mul_(b1).add_(g, alpha=1 - b1)
        ratio = (m.abs() / (rho * bs * h + 1e-15)).clamp(None, 1)
        p.addcmul_(m.sign(), ratio, value=-lr)


def foreach_step(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    hessians: Tensors,
    *,
    soul: bool,
    lr: float = 1e-4,
    b1: float = 0.965,
    b2: float = 0.99,
    rho: float = 0.04,
    bs: int = 5120,
    wd: float = 0.1,
) -> None:
    """Take the published step with torch's foreach functions."""
    if soul:
        torch._foreach_mul_(hessians, b2)
        torch._foreach_addcmul_(hessians, grads, grads, value=1 - b2)
    torch._foreach_mul_(exp_avgs, b1)
    torch._foreach_add_(exp_avgs, grads, alpha=1 - b1)
    torch._foreach_mul_(params, 1 - lr * wd)
    denominators = torch._foreach_mul(hessians, rho * bs)
    torch._foreach_add_(denominators, 1e-15)
    ratios = torch._foreach_abs(exp_avgs)
    torch._foreach_div_(ratios, denominators)
    torch._foreach_clamp_max_(ratios, 1)
    torch._foreach_addcmul_(params, torch._foreach_sign(exp_avgs), ratios, value=-lr)


def gradients(params: Params) -> Tensors:
    """Return the gradients of all parameters, of which each must have one."""
    return [p.grad for p in params if p.grad is not None]


def published(step: Callable[..., None], soul: bool, params: Params) -> Callable[[], None]:
    """Return ``step`` on states in the dtype of the parameters."""
    grads = gradients(params)
    exp_avgs = [torch.zeros_like(g) for g in grads]
    hessians = [g * g for g in grads]
    return functools.partial(step, [p.detach() for p in params], grads, exp_avgs, hessians, soul=soul)


def compiled_published(soul: bool, params: Params) -> Callable[[], None]:
    """Return the published step under torch.compile, as one tries it: one tensor at a time, any length, compiled once."""
    step = torch.compile(published_step, dynamic=True)
    grads = [g.view(-1) for g in gradients(params)]
    states = [(torch.zeros_like(g), g * g) for g in grads]
    tensors = [([p.detach().view(-1)], [g], [m], [h]) for p, g, (m, h) in zip(params, grads, states)]

    def call() -> None:
        for p, g, m, h in tensors:
            step(p, g, m, h, soul=soul)

    return call


def compiled_reference(soul: bool, params: Params) -> Callable[[], None]:
    """Return the reference under torch.compile, with states in the dtypes that ours has."""
    grads = gradients(params)
    exp_avgs = [torch.zeros_like(g) for g in grads]
    hessians = [g.float() ** 2 for g in grads]
    options = dict(
        lr=1e-4, beta1=0.965, rho=0.04, bs=5120, eps=1e-15, weight_decay=0.1, maximize=False, eps_mode="add",
        param_rounding="nearest", low_bits=None, exp_avg_scales=None, hessian_scales=None, corrections=None,
        salts=[0] * len(params), offsets=[0] * len(params), steps=None, grad_factor=None, skip=None, telemetry=None,
    )  # fmt: skip
    values = [p.detach() for p in params]
    step = compiled(reference_step)
    return lambda: step(values, grads, exp_avgs, hessians, beta2=0.99 if soul else None, **options)


def optimi_adamw(params: Params, **options: Any) -> Callable[[], Any]:
    """Return the step of optimi's AdamW, with its Triton kernel on a GPU and foreach elsewhere."""
    import optimi

    kind = "triton" if params[0].is_cuda else "foreach"
    return optimi.AdamW(params, lr=1e-4, **{kind: True}, **options).step


def flash_adamw(params: Params) -> Callable[[], Any]:
    """Return the step of FlashOptim's AdamW, with 24-bit weights where parameters are below fp32."""
    import flashoptim

    bits = None if params[0].dtype == torch.float32 else 24
    return flashoptim.FlashAdamW(params, lr=1e-4, master_weight_bits=bits).step


def torchao_adamw(params: Params) -> Callable[[], Any]:
    """Return the step of torchao's AdamW: both states in 8 bits, blocks of 256; it compiles itself."""
    from torchao.optim import AdamW8bit

    return AdamW8bit(params, lr=1e-4).step


def bitsandbytes_adamw(params: Params) -> Callable[[], Any]:
    """Return the step of bitsandbytes' AdamW: both states in 8 bits, blocks of 256; one launch for each tensor.

    States of tensors below 4096 elements are fp32.
    """
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(params, lr=1e-4).step


def torch_adamw(params: Params, **options: Any) -> Callable[[], Any]:
    """Return the step of torch's AdamW."""
    return torch.optim.AdamW(params, **ADAMW, **options).step


def transformer_engine_adamw(params: Params, **options: Any) -> Callable[[], Any]:
    """Return the step of Transformer Engine's FusedAdam in its AdamW mode.

    States are fp32 by default. With ``master_weights`` and ``store_param_remainders`` bf16 parameters have 16 more bits each,
    as in compensated rounding here.
    """
    from transformer_engine.pytorch.optimizers import FusedAdam

    return FusedAdam(params, **ADAMW, **options).step


def apex_adamw(params: Params) -> Callable[[], Any]:
    """Return the step of apex's FusedAdam in its AdamW mode; states are fp32."""
    from apex.optimizers import FusedAdam

    return FusedAdam(params, **ADAMW).step


def dion_adamw(params: Params) -> Callable[[], Any]:
    """Return Dion's AdamW on all tensors at once, as its optimizers call it for what is no matrix; states as the parameters."""
    from dion.scalar_opts import adamw_update_foreach

    grads = gradients(params)
    values = [p.detach() for p in params]
    exp_avgs = [torch.zeros_like(p) for p in values]
    squares = [torch.zeros_like(p) for p in values]
    beta1, beta2 = ADAMW["betas"]
    steps = itertools.count(1)

    def call() -> None:
        adamw_update_foreach(
            values, grads, exp_avgs, squares, lr=ADAMW["lr"], beta1=beta1, beta2=beta2, weight_decay=ADAMW["weight_decay"],
            step=next(steps), epsilon=ADAMW["eps"],
        )  # fmt: skip

    return call


@torch.no_grad()
def exact_adamw(params: Params, steps: int) -> Tensors:
    """Return what parameters are after some steps of AdamW with equal gradients, in fp64; nothing is changed."""
    beta1, beta2 = ADAMW["betas"]
    results = []
    for p, grad in zip(params, gradients(params)):
        value, g = p.double(), grad.double()
        m, v = torch.zeros_like(g), torch.zeros_like(g)
        for step in range(1, steps + 1):
            m = beta1 * m + (1 - beta1) * g
            v = beta2 * v + (1 - beta2) * g * g
            value = value * (1 - ADAMW["lr"] * ADAMW["weight_decay"])
            value = value - ADAMW["lr"] * (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + ADAMW["eps"])
        results.append(value)
    return results


def sophia_h(soul: bool, params: Params) -> Callable[[], Any]:
    """Return the step of pytorch_optimizer's SophiaH with squared gradients made before: in every step as in SOUL, or once."""
    from pytorch_optimizer import SophiaH

    opt = SophiaH(params, lr=1e-4, update_period=2**62)
    squares = [g**2 for g in gradients(params)]
    opt.step(hessian=squares)
    return functools.partial(opt.step, hessian=squares) if soul else opt.step

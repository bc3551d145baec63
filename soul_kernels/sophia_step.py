"""Momentum, Hessian EMA, decay, clipped update and rounding of many tensors in one pass over memory."""

import torch

from soul_kernels._checks import (
    PARAM_DTYPES,
    STATE_DTYPES,
    argument_error,
    check_choice,
    check_range,
    check_state_layout,
    check_tensor_lists,
)
from soul_kernels._launch import chunk_of_program, chunk_pointer, launch_over_tensors, resolve_backend, tl, triton
from soul_kernels.hessian_ema import ema_of_squares, match_layout
from soul_kernels.reference.sophia_step import sophia_step as _reference_sophia_step
from soul_kernels.rounding import ROUNDINGS, round_nearest, round_param

# Elements a program, elements a loop turn, warps. Sane choices differ by 1 to 2% (measured on an H100).
CONFIG = {"chunk": 16384, "BLOCK": 2048, "num_warps": 8}


@triton.jit
def _step_block(
    p_ptr,
    g_ptr,
    m_ptr,
    h_ptr,
    offsets,  # [BLOCK] int32, from the start of the chunk
    mask,  # [BLOCK] bool, or None in a full block: an unmasked access is what becomes a 16-byte one
    lr,
    beta1,
    beta1_rest,
    beta2,
    beta2_rest,
    h_weight,
    eps,
    weight_decay,
    P_DTYPE: tl.constexpr,
    M_DTYPE: tl.constexpr,
    H_DTYPE: tl.constexpr,
    HESSIAN_IN_STEP: tl.constexpr,
    ROUNDING: tl.constexpr,
):
    """Updates one block; returns which of its coordinates were clipped, [BLOCK] bool."""
    p = tl.load(p_ptr + offsets, mask=mask).to(tl.float32)
    g = tl.load(g_ptr + offsets, mask=mask).to(tl.float32)
    m = tl.load(m_ptr + offsets, mask=mask).to(tl.float32)
    h = tl.load(h_ptr + offsets, mask=mask).to(tl.float32)
    m = beta1 * m + beta1_rest * g
    if HESSIAN_IN_STEP:
        h = ema_of_squares(h, g, beta2, beta2_rest)
        tl.store(h_ptr + offsets, round_nearest(h, H_DTYPE), mask=mask)
    denominator = h_weight * h + eps
    update = tl.div_rn(m, denominator)
    # Comparisons, not tl.minimum: NaN must come through.
    update = tl.where(update > 1.0, 1.0, update)
    update = tl.where(update < -1.0, -1.0, update)
    tl.store(m_ptr + offsets, round_nearest(m, M_DTYPE), mask=mask)
    # Decay and step in one fp32 expression: (1 - lr wd) in fp32 would be off by 5% at lr wd = 5e-7.
    p = p - lr * (weight_decay * p + update)
    tl.store(p_ptr + offsets, round_param(p, P_DTYPE, ROUNDING), mask=mask)
    return tl.abs(m) >= denominator


@triton.jit
def _sophia_step_kernel(
    table_ptr,  # [5, n_tensors] int64: addresses of p, g, m, h; element counts
    chunk_tensor_ptr,  # [programs] int32: the tensor of this program
    chunk_piece_ptr,  # [programs] int32: which piece of CHUNK elements of it
    clip_count_ptr,  # [] int64: clipped coordinates are added here; None: not counted
    n_tensors,
    lr,
    beta1,
    beta1_rest,  # 1 - beta1, or its negative to maximize; formed in double precision on the host
    beta2,
    beta2_rest,
    h_weight,  # rho * bs
    eps,
    weight_decay,
    P_DTYPE: tl.constexpr,
    G_DTYPE: tl.constexpr,
    M_DTYPE: tl.constexpr,
    H_DTYPE: tl.constexpr,
    HESSIAN_IN_STEP: tl.constexpr,
    ROUNDING: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tensor, start, count = chunk_of_program(table_ptr, chunk_tensor_ptr, chunk_piece_ptr, n_tensors, 4, CHUNK)
    p_ptr = chunk_pointer(table_ptr, tensor, start, P_DTYPE, ALIGNED)
    g_ptr = chunk_pointer(table_ptr, n_tensors + tensor, start, G_DTYPE, ALIGNED)
    m_ptr = chunk_pointer(table_ptr, 2 * n_tensors + tensor, start, M_DTYPE, ALIGNED)
    h_ptr = chunk_pointer(table_ptr, 3 * n_tensors + tensor, start, H_DTYPE, ALIGNED)
    lanes = tl.arange(0, BLOCK)
    clipped = tl.zeros([BLOCK], tl.int32)  # kept per lane: one reduction a program, not one a block
    full = count // BLOCK
    for block in range(full):
        hits = _step_block(
            p_ptr, g_ptr, m_ptr, h_ptr, block * BLOCK + lanes, None, lr, beta1, beta1_rest, beta2, beta2_rest, h_weight,
            eps, weight_decay, P_DTYPE, M_DTYPE, H_DTYPE, HESSIAN_IN_STEP, ROUNDING,
        )  # fmt: skip
        clipped += hits.to(tl.int32)
    if full * BLOCK < count:
        offsets = full * BLOCK + lanes
        inside = offsets < count
        hits = _step_block(
            p_ptr, g_ptr, m_ptr, h_ptr, offsets, inside, lr, beta1, beta1_rest, beta2, beta2_rest, h_weight,
            eps, weight_decay, P_DTYPE, M_DTYPE, H_DTYPE, HESSIAN_IN_STEP, ROUNDING,
        )  # fmt: skip
        clipped += (hits & inside).to(tl.int32)
    if clip_count_ptr is not None:
        tl.atomic_add(clip_count_ptr, tl.sum(clipped, 0).to(tl.int64))  # integers: the order does not matter


@torch.no_grad()
def sophia_step(
    params,
    grads,
    exp_avgs,
    hessians,
    *,
    lr,
    beta1,
    rho,
    bs,
    eps=1e-15,
    weight_decay=0.0,
    beta2=None,
    maximize=False,
    param_rounding="nearest",
    clip_count=None,
    backend="auto",
):
    """One Sophia step in place. Per element, in fp32, rounded once to the dtype of each tensor::

        m = beta1 * m + (1 - beta1) * g
        h = beta2 * h + (1 - beta2) * g * g                      # only with beta2: SOUL, the Hessian in the same pass
        p = p - lr * (weight_decay * p + clamp(m / (rho * bs * h + eps), -1, 1))

    Without ``beta2`` this is ``SophiaG.step`` of the published class (Liu et al. 2023, arXiv 2305.14342, algorithm 3): its
    ``sign(m) min(|m| / (rho bs h + eps), 1)`` is the clamp. NaN and inf in a gradient propagate as they do in PyTorch.

    Args:
        params: list of dense tensors, any shapes, fp32, bf16 or fp16; mutated.
        grads: list of tensors of the same shapes, fp32, bf16 or fp16; not changed.
        exp_avgs: list of momenta m, fp32 or bf16, laid out as the parameters; mutated.
        hessians: list of diagonal Hessian estimates h, fp32 or bf16, laid out as the parameters; mutated with ``beta2`` only.
        lr: learning rate, >= 0.
        beta1: decay of the momentum, in [0, 1).
        rho: scale of the clipping threshold, >= 0 (the paper's gamma).
        bs: number of predictions in the batch that produced h, > 0.
        eps: added to the denominator, >= 0.
        weight_decay: decoupled weight decay, >= 0.
        beta2: decay of the Hessian estimate, in [0, 1); None leaves it as it is.
        maximize: ascend instead of descend.
        param_rounding: "nearest".
        clip_count: int64 tensor of one element on the parameters' device; the number of clipped coordinates (those with
            ``|m| >= rho bs h + eps``, which move by the full lr) is added to it. None: not counted.
        backend: "auto" (Triton on a GPU and under the interpreter, else the reference), "triton" or "reference".

    Raises:
        ValueError: an argument does not fit; nothing was changed.
    """
    for name, value in (("lr", lr), ("rho", rho), ("eps", eps), ("weight_decay", weight_decay)):
        check_range(name, value)
    for name, value in (("beta1", beta1), ("beta2", 0.0 if beta2 is None else beta2)):
        check_range(name, value, high=1.0)
    if not bs > 0:
        raise argument_error("bs", "a positive number", bs, "pass the number of predictions in the batch behind h")
    check_choice("param_rounding", param_rounding, ROUNDINGS)
    check_tensor_lists(
        {"params": PARAM_DTYPES, "grads": PARAM_DTYPES, "exp_avgs": STATE_DTYPES, "hessians": STATE_DTYPES},
        params=params,
        grads=grads,
        exp_avgs=exp_avgs,
        hessians=hessians,
    )
    check_state_layout("exp_avgs", exp_avgs, params)
    check_state_layout("hessians", hessians, params)
    if not params:
        return
    _check_clip_count(clip_count, params)
    if resolve_backend(backend, params[0]) == "reference":
        _reference_sophia_step(
            params, grads, exp_avgs, hessians, lr=lr, beta1=beta1, rho=rho, bs=bs, eps=eps, weight_decay=weight_decay,
            beta2=beta2, maximize=maximize, clip_count=clip_count,
        )  # fmt: skip
        return
    launch_over_tensors(
        _sophia_step_kernel,
        {"p": params, "g": match_layout(grads, params), "m": exp_avgs, "h": hessians},
        clip_count_ptr=clip_count,
        lr=float(lr),
        beta1=float(beta1),
        beta1_rest=float(beta1 - 1 if maximize else 1 - beta1),
        beta2=0.0 if beta2 is None else float(beta2),
        beta2_rest=0.0 if beta2 is None else float(1 - beta2),
        h_weight=float(rho * bs),
        eps=float(eps),
        weight_decay=float(weight_decay),
        HESSIAN_IN_STEP=beta2 is not None,
        ROUNDING=param_rounding,
        **CONFIG,
    )


def _check_clip_count(clip_count, params):
    if clip_count is None:
        return
    if clip_count.dtype != torch.int64 or clip_count.numel() != 1:
        got = f"{tuple(clip_count.shape)} of {clip_count.dtype}"
        raise argument_error("clip_count", "one int64 element", got, "pass torch.zeros((), dtype=torch.int64)")
    for index, param in enumerate(params):
        if param.device != clip_count.device:
            remedy = "call once for each device"
            raise argument_error("clip_count", f"device {param.device} (params[{index}])", clip_count.device, remedy)

"""``h <- beta2 h + (1 - beta2) scale g^2`` over many tensors in one launch."""

import torch

from soul_kernels._checks import PARAM_DTYPES, STATE_DTYPES, check_range, check_tensor_lists, same_layout
from soul_kernels._launch import chunk_of_program, chunk_pointer, launch_over_tensors, resolve_backend, tl, triton
from soul_kernels.reference.hessian_ema import hessian_ema as _reference_hessian_ema
from soul_kernels.rounding import round_nearest

CONFIG = {"chunk": 16384, "BLOCK": 2048, "num_warps": 8}


@triton.jit
def ema_of_squares(h, g, beta2, g2_weight):
    """``beta2 h + g2_weight g^2``; ``g2_weight`` is ``(1 - beta2) scale``, formed in double precision on the host."""
    return beta2 * h + g2_weight * (g * g)


@triton.jit
def _ema_block(h_ptr, g_ptr, offsets, mask, beta2, g2_weight, H_DTYPE: tl.constexpr):
    h = tl.load(h_ptr + offsets, mask=mask).to(tl.float32)
    g = tl.load(g_ptr + offsets, mask=mask).to(tl.float32)
    tl.store(h_ptr + offsets, round_nearest(ema_of_squares(h, g, beta2, g2_weight), H_DTYPE), mask=mask)


@triton.jit
def _hessian_ema_kernel(
    table_ptr,  # [3, n_tensors] int64: addresses of h, g; element counts
    chunk_tensor_ptr,  # [programs] int32: the tensor of this program
    chunk_piece_ptr,  # [programs] int32: which piece of CHUNK elements of it
    n_tensors,
    beta2,
    g2_weight,  # (1 - beta2) * scale
    H_DTYPE: tl.constexpr,
    G_DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tensor, start, count = chunk_of_program(table_ptr, chunk_tensor_ptr, chunk_piece_ptr, n_tensors, 2, CHUNK)
    h_ptr = chunk_pointer(table_ptr, tensor, start, H_DTYPE, ALIGNED)
    g_ptr = chunk_pointer(table_ptr, n_tensors + tensor, start, G_DTYPE, ALIGNED)
    lanes = tl.arange(0, BLOCK)
    full = count // BLOCK
    for block in range(full):
        _ema_block(h_ptr, g_ptr, block * BLOCK + lanes, None, beta2, g2_weight, H_DTYPE)
    if full * BLOCK < count:
        offsets = full * BLOCK + lanes
        _ema_block(h_ptr, g_ptr, offsets, offsets < count, beta2, g2_weight, H_DTYPE)


@torch.no_grad()
def hessian_ema(hessians, grads, *, beta2, scale=1.0, backend="auto"):
    """Updates the diagonal Hessian estimate in place: ``h = beta2 * h + (1 - beta2) * scale * g * g``.

    Computed in fp32 and rounded once to the dtype of ``h``. Sophia, Liu et al. 2023 (arXiv 2305.14342), algorithm 3 with the
    Gauss-Newton-Bartlett estimate, as coded in ``update_hessian()`` of the published class: the batch size enters later, in
    the step.

    Args:
        hessians: list of dense tensors, any shapes, fp32 or bf16; mutated.
        grads: list of tensors of the same shapes and devices, fp32, bf16 or fp16; not changed.
        beta2: decay of the average, in [0, 1).
        scale: factor of the squared gradient, >= 0.
        backend: "auto" (Triton on a GPU and under the interpreter, else the reference), "triton" or "reference".

    Raises:
        ValueError: an argument does not fit; nothing was changed.
    """
    check_range("beta2", beta2, high=1.0)
    check_range("scale", scale)
    check_tensor_lists({"hessians": STATE_DTYPES, "grads": PARAM_DTYPES}, hessians=hessians, grads=grads)
    if not hessians:
        return
    if resolve_backend(backend, hessians[0]) == "reference":
        _reference_hessian_ema(hessians, grads, beta2=beta2, scale=scale)
        return
    launch_over_tensors(
        _hessian_ema_kernel,
        {"h": hessians, "g": match_layout(grads, hessians)},
        beta2=float(beta2),
        g2_weight=float((1 - beta2) * scale),
        **CONFIG,
    )


def match_layout(grads, leaders):
    """The gradients, copied where a gradient's strides differ from its leader's."""
    return [g if same_layout(g, lead) else torch.empty_like(lead, dtype=g.dtype).copy_(g) for g, lead in zip(grads, leaders)]

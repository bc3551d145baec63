"""``h <- beta2 h + (1 - beta2) scale g^2`` over many tensors in one launch."""

import torch

from soul_kernels._compiled import Compiled
from soul_kernels._launch import chunk_of_program, chunk_pointer, tl, triton
from soul_kernels._table import TensorTable, noise_offsets, noise_salts
from soul_kernels.backends import resolve_backend
from soul_kernels.errors import check_range
from soul_kernels.reference.hessian_ema import ema_block
from soul_kernels.reference.hessian_ema import hessian_ema as _reference_hessian_ema
from soul_kernels.rounding import GROUP, load, load_state, noise_key, noise_words, store_state
from soul_kernels.tensors import (
    PARAM_DTYPES,
    STATE_DTYPES,
    check_on_device,
    check_scales,
    check_tensor_lists,
    has_data,
    same_layout,
)

# Elements a program, elements a loop turn, warps; 8-bit states need more registers an element.
CONFIG = {"chunk": 16384, "BLOCK": 2048, "num_warps": 8}
CONFIG_8BIT = {"chunk": 16384, "BLOCK": 1024, "num_warps": 4, "enable_fp_fusion": True}
SIDE = ("h_scale", "step")  # rows of the table that are not walked element by element


@triton.jit
def ema(h, products, beta2, weight):
    """``beta2 h + weight products``; ``weight`` is ``(1 - beta2) scale``, formed in double precision on the host."""
    return beta2 * h + weight * products


@triton.jit
def _ema_block(
    h_ptr,
    h_scale_ptr,
    g_ptr,
    u_ptr,
    offsets,  # [BLOCK] int32, from the start of the chunk
    mask,  # [BLOCK] bool, or None in a full block
    group,  # the block's first group of 8-bit values, from the start of the chunk
    groups,  # how many groups the chunk has
    key,
    first,  # number of the chunk's first element, for the noise
    beta2,
    weight,
    factor,
    H_DTYPE: tl.constexpr,
    U_DTYPE: tl.constexpr,
    CROSSES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    h = load_state(h_ptr, h_scale_ptr, offsets, mask, group, groups, H_DTYPE, True, BLOCK)
    g = load(g_ptr, offsets, mask).to(tl.float32)
    if factor is not None:
        g = g * factor
    if U_DTYPE is None:
        products = g * g
    else:
        products = g * load(u_ptr, offsets, mask).to(tl.float32)
    noise = 0
    if key is not None:
        noise = noise_words(key, first, offsets, CROSSES)
    h = ema(h, products, beta2, weight)
    store_state(h_ptr, h_scale_ptr, h, noise, offsets, mask, group, groups, H_DTYPE, True, BLOCK)


@triton.jit(do_not_specialize=["n_tensors"])
def hessian_ema_kernel(
    table_ptr,  # [8, n_tensors] int64: addresses of h, g, probe u, scale of h, step; element counts; salts; offsets
    chunk_tensor_ptr,  # [programs] int32: the tensor of this program
    chunk_piece_ptr,  # [programs] int32: which piece of CHUNK elements of it
    factor_ptr,  # [] fp32: the gradients are multiplied by it; None: 1
    skip_ptr,  # [] fp32: anything but 0 leaves all as it is; None: 0
    n_tensors,
    beta2,
    weight,  # (1 - beta2) * scale
    H_DTYPE: tl.constexpr,
    G_DTYPE: tl.constexpr,
    U_DTYPE: tl.constexpr,  # None: g takes the place of u
    STEPS: tl.constexpr,  # the noise depends on a step of each tensor
    CROSSES: tl.constexpr,  # a chunk may lie on both sides of element 2^32 of its tensor
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Update one chunk of one Hessian."""
    if skip_ptr is not None:
        if tl.load(skip_ptr) != 0.0:
            return
    tensor, start, count = chunk_of_program(table_ptr, chunk_tensor_ptr, chunk_piece_ptr, n_tensors, 5, CHUNK)
    h_ptr = chunk_pointer(table_ptr, tensor, start, H_DTYPE, ALIGNED)
    g_ptr = chunk_pointer(table_ptr, n_tensors + tensor, start, G_DTYPE, ALIGNED)
    u_ptr = chunk_pointer(table_ptr, 2 * n_tensors + tensor, start, U_DTYPE, ALIGNED)
    EIGHT_BITS: tl.constexpr = tl.float32 if H_DTYPE == tl.uint8 else None
    h_scale_ptr = chunk_pointer(table_ptr, 3 * n_tensors + tensor, start // GROUP, EIGHT_BITS, False)
    key = None
    first = None
    if H_DTYPE != tl.float32:
        step = 0.0
        if STEPS:
            step = tl.load(tl.load(table_ptr + 4 * n_tensors + tensor).to(tl.pointer_type(tl.float32)))
        key = noise_key(tl.load(table_ptr + 6 * n_tensors + tensor), step)
        first = tl.load(table_ptr + 7 * n_tensors + tensor) + start
    factor = None
    if factor_ptr is not None:
        factor = tl.load(factor_ptr)
    lanes = tl.arange(0, BLOCK)
    groups = tl.cdiv(count, GROUP)
    full = count // BLOCK
    for block in range(full):
        _ema_block(
            h_ptr, h_scale_ptr, g_ptr, u_ptr, block * BLOCK + lanes, None, block * (BLOCK // GROUP), groups, key, first,
            beta2, weight, factor, H_DTYPE, U_DTYPE, CROSSES, BLOCK,
        )  # fmt: skip
    if full * BLOCK < count:
        offsets = full * BLOCK + lanes
        _ema_block(
            h_ptr, h_scale_ptr, g_ptr, u_ptr, offsets, offsets < count, full * (BLOCK // GROUP), groups, key, first,
            beta2, weight, factor, H_DTYPE, U_DTYPE, CROSSES, BLOCK,
        )  # fmt: skip


@torch.no_grad()
def hessian_ema(
    hessians,
    grads,
    *,
    beta2,
    scale=1.0,
    probes=None,
    hessian_scales=None,
    seed=0,
    tensor_ids=None,
    tensor_offsets=None,
    steps=None,
    grad_factor=None,
    skip=None,
    table=None,
    check_only=False,
    backend="auto",
):
    """Updates the diagonal Hessian estimate in place: ``h = beta2 * h + (1 - beta2) * scale * g * g``.

    Computed in fp32 and rounded once to the dtype of ``h``: fp32 to nearest; bf16 and 8-bit stochastically, because nearest
        would
    lose the small changes of a slow average. Sophia, Liu et al. 2023 (arXiv 2305.14342), algorithm 3 with the
    Gauss-Newton-Bartlett estimate, as coded in ``update_hessian()`` of the published class: the batch size enters later, in
    the step. With ``probes`` u and gradients H u, ``h = beta2 * h + (1 - beta2) * scale * u * Hu``: Hutchinson's estimate.

    Args:
        hessians: list of dense tensors, any shapes, fp32 or bf16, or uint8 codes of 8-bit states; mutated.
        grads: list of tensors of the same shapes and devices, fp32, bf16 or fp16; not changed.
        beta2: decay of the average, in [0, 1).
        scale: factor of the squared gradient, >= 0.
        probes: list of tensors as ``grads``, for Hutchinson's estimate; None: the gradients themselves.
        hessian_scales: list of fp32 [ceil(numel / 256)], the scales of 8-bit states; None elsewhere. Mutated.
        seed: of the noise of stochastic rounding. Where ``steps`` is not given, pass another one at every call.
        tensor_ids: one int a tensor, its number in the noise; None: its position.
        tensor_offsets: one int a tensor, the number of its first element in the tensor that it is a piece of, as in
            `sophia_step`. None: 0.
        steps: fp32 [number of tensors] on the device: what distinguishes the noise of this call from that of others.
        grad_factor: fp32 tensor of one element on the device: the gradients are multiplied by it.
        skip: fp32 tensor of one element on the device: unless it is 0, nothing is changed.
        table: a `TensorTable` that the caller keeps for calls with the same tensors, which makes them cheaper.
        check_only: check all arguments and prepare the ``table``, and change nothing.
        backend: "auto" (Triton on a GPU and under the interpreter; on a CPU "compile" where that pays; else the reference),
            "triton", "compile" or "reference". "compile" is the reference under torch.compile, with the same bits.

    Raises:
        ValueError: an argument does not fit; nothing was changed.
    """
    check_range("beta2", beta2, high=1.0)
    check_range("scale", scale)
    if not hessians and not grads:
        return
    roles = {"h": hessians, "g": grads, "u": probes, "h_scale": hessian_scales, "step": None if steps is None else [steps]}
    key = (seed, tensor_ids, tensor_offsets)
    table = TensorTable() if table is None else table
    token = (*map(id, (hessians, grads, probes, hessian_scales, steps)), key)
    if not table.unchanged(roles, key, token):
        table.forget()
        lists = {"hessians": hessians, "grads": grads} | ({} if probes is None else {"probes": probes})
        dtypes = {"hessians": STATE_DTYPES, "grads": PARAM_DTYPES, "probes": PARAM_DTYPES}
        check_tensor_lists(dtypes, written=("hessians",), **lists)
        check_scales("hessian_scales", hessian_scales, "hessians", hessians)
        roles |= {"g": match_layout(grads, hessians), "u": probes and match_layout(probes, hessians)}
        salts = noise_salts(seed, tensor_ids, hessians)
        offsets = noise_offsets(tensor_offsets, hessians)
        table.rebuild(roles, key, read_only="g", salts=salts, offsets=offsets, side=SIDE)
    check_on_device("grad_factor", grad_factor, table.devices)
    check_on_device("skip", skip, table.devices)
    check_on_device("steps", steps, table.devices, numel=len(hessians))
    backend = resolve_backend(backend, hessians[0], compiled=table.numel)
    if check_only:
        if roles["g"] is grads and roles["u"] is probes:  # copies do not outlive this call
            table.confirm(token)
        return
    if backend != "triton":
        run = Compiled(ema_block) if backend == "compile" else ema_block
        _reference_hessian_ema(
            hessians, grads, beta2=beta2, scale=scale, probes=probes, hessian_scales=hessian_scales,
            salts=table.salts, offsets=table.offsets, steps=steps, grad_factor=grad_factor,
            skip=skip if has_data(hessians[0]) else None, run=run,
        )  # fmt: skip
        return
    table.launch(
        hessian_ema_kernel,
        factor_ptr=grad_factor,
        skip_ptr=skip,
        beta2=float(beta2),
        weight=float((1 - beta2) * scale),
        STEPS=steps is not None,
        **(CONFIG if hessian_scales is None else CONFIG_8BIT),
    )


def match_layout(grads, leaders):
    """The gradients, copied where a gradient's strides differ from its leader's; the same list where none does."""
    if all(map(same_layout, grads, leaders)):
        return grads
    return [g if same_layout(g, lead) else torch.empty_like(lead, dtype=g.dtype).copy_(g) for g, lead in zip(grads, leaders)]

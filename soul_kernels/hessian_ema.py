"""``h <- beta2 h + (1 - beta2) scale g^2`` over many tensors in one launch."""

import functools
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from soul_kernels._compiled import Compiled
from soul_kernels._foreach import (
    DEFAULT_NOISE,
    NO_GUARDS,
    Guards,
    Noise,
    PreparedCall,
    check_all_taken,
    nothing_to_do,
    rebuild_table,
    with_fields,
)
from soul_kernels._launch import chunk_of_program, chunk_pointer, tl, triton
from soul_kernels._table import TensorTable
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
)

# Elements a program, elements a loop turn, warps; 8-bit states need more registers an element.
CONFIG = {"chunk": 16384, "BLOCK": 2048, "num_warps": 8}
CONFIG_8BIT = {"chunk": 16384, "BLOCK": 1024, "num_warps": 4, "enable_fp_fusion": True}
ROLES = ("h", "g", "u", "h_scale", "step")  # rows of the table, in this order
SIDE = ("h_scale", "step")  # rows that are not walked element by element


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


class HessianEma:
    """Updates of Hessians that a caller keeps: `hessian_ema`, prepared.

    As `soul_kernels.SophiaStep`: what does not change between calls is checked once and noticed when it does.
    """

    def __init__(self) -> None:
        self._table = TensorTable()

    def prepare(
        self,
        hessians: Sequence[Tensor],
        grads: Sequence[Tensor],
        *,
        beta2: float,
        scale: float = 1.0,
        probes: Sequence[Tensor] | None = None,
        hessian_scales: Sequence[Tensor | None] | None = None,
        noise: Noise = DEFAULT_NOISE,
        guards: Guards = NO_GUARDS,
        backend: str = "auto",
    ) -> PreparedCall:
        """Check all arguments, which are those of `hessian_ema`, and change nothing.

        Returns:
            The update, to be called once; see `PreparedCall`.

        Raises:
            ValueError: an argument does not fit.
        """
        check_range("beta2", beta2, high=1.0)
        check_range("scale", scale)
        table = self._table
        if not hessians and not grads:
            return PreparedCall(table, nothing_to_do)
        steps = None if noise.steps is None else [noise.steps]
        roles = dict(zip(ROLES, (hessians, grads, probes, hessian_scales, steps)))
        key = (noise.seed, noise.tensor_ids, noise.tensor_offsets)
        copy = None
        if not table.unchanged(roles, key):
            table.forget()
            lists = {"hessians": hessians, "grads": grads} | ({} if probes is None else {"probes": probes})
            dtypes = {"hessians": STATE_DTYPES, "grads": PARAM_DTYPES, "probes": PARAM_DTYPES}
            check_tensor_lists(dtypes, written=("hessians",), **lists)
            check_scales("hessian_scales", hessian_scales, "hessians", hessians)
            salts = noise.salts(hessians)
            offsets = noise.offsets(hessians)
            copy = rebuild_table(table, roles, key, read=("g", "u"), salts=salts, offsets=offsets, side=SIDE)
        guards.check(table.devices)
        check_on_device("steps", noise.steps, table.devices, numel=len(hessians))
        backend = resolve_backend(backend, hessians[0], compiled=table.numel)
        if backend == "triton":
            launch = functools.partial(
                table.launch,
                hessian_ema_kernel,
                factor_ptr=guards.grad_factor,
                skip_ptr=guards.skip,
                beta2=float(beta2),
                weight=float((1 - beta2) * scale),
                STEPS=steps is not None,
                **(CONFIG if hessian_scales is None else CONFIG_8BIT),
            )
            return PreparedCall(table, launch, copy)
        run = functools.partial(
            _reference_hessian_ema, hessians, grads, beta2=beta2, scale=scale, probes=probes, hessian_scales=hessian_scales,
            salts=table.salts, offsets=table.offsets, steps=noise.steps, grad_factor=guards.grad_factor,
            skip=guards.skip if has_data(hessians[0]) else None, run=Compiled(ema_block) if backend == "compile" else ema_block,
        )  # fmt: skip
        return PreparedCall(table, run)


def hessian_ema(
    hessians: Sequence[Tensor],
    grads: Sequence[Tensor],
    *,
    beta2: float,
    scale: float = 1.0,
    probes: Sequence[Tensor] | None = None,
    hessian_scales: Sequence[Tensor | None] | None = None,
    noise: Noise = DEFAULT_NOISE,
    guards: Guards = NO_GUARDS,
    backend: str = "auto",
    **fields: Any,
) -> None:
    """Update diagonal Hessian estimates in place: ``h = beta2 * h + (1 - beta2) * scale * g * g``.

    Computed in fp32 and rounded once to the dtype of ``h``: fp32 to nearest; bf16 and 8-bit stochastically, because nearest
    would lose the small changes of a slow average. Sophia, Liu et al. 2023 (arXiv 2305.14342), algorithm 3 with the
    Gauss-Newton-Bartlett estimate, as coded in ``update_hessian()`` of the published class: the batch size enters later, in
    the step. With ``probes`` u and gradients H u, ``h = beta2 * h + (1 - beta2) * scale * u * Hu``: Hutchinson's estimate.

    Who calls it again and again with the same tensors keeps a `HessianEma`.

    Args:
        hessians: list of dense tensors, any shapes, fp32 or bf16, or uint8 codes of 8-bit states; mutated.
        grads: list of tensors of the same shapes and devices, fp32, bf16 or fp16; not changed.
        beta2: decay of the average, in [0, 1).
        scale: factor of the squared gradient, >= 0.
        probes: list of tensors as ``grads``, for Hutchinson's estimate; None: the gradients themselves.
        hessian_scales: list of fp32 [ceil(numel / 256)], the scales of 8-bit states; None elsewhere. Mutated.
        noise: where the noise of stochastic rounding comes from.
        guards: a factor of the gradients, and whether to skip the update; both on the device.
        backend: "auto" (Triton on a GPU and under the interpreter; on a CPU "compile" where that pays; else the reference),
            "triton", "compile" or "reference". "compile" is the reference under torch.compile, with the same bits.
        **fields: the fields of ``noise`` and ``guards`` by their own names: ``seed``, ``tensor_ids``, ``tensor_offsets``,
            ``steps``, ``grad_factor``, ``skip``. They take the place of the bundle's.

    Raises:
        ValueError: an argument does not fit; nothing was changed.
    """
    noise = with_fields(noise, fields)
    guards = with_fields(guards, fields)
    check_all_taken("hessian_ema", fields)
    update = HessianEma().prepare(
        hessians, grads, beta2=beta2, scale=scale, probes=probes, hessian_scales=hessian_scales, noise=noise, guards=guards,
        backend=backend,
    )  # fmt: skip
    update()

"""Moving average of squared gradients, ``h <- beta2 h + (1 - beta2) scale g^2``, over many tensors in one launch.

The file is built like ``sophia_step.py``; the top of that file explains how. The kernels of both call `ema`.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Unpack

from soul_kernels._compiled import Compiled
from soul_kernels._foreach import (
    ChunkNoise,
    PreparedCall,
    chunk_of_program,
    chunk_pointer,
    noise_of_chunk,
    nothing_to_do,
    rebuild_table,
    scale_pointer,
)
from soul_kernels._launch import tl, triton
from soul_kernels._table import TensorTable
from soul_kernels.backends import resolve_backend
from soul_kernels.bundles import (
    DEFAULT_NOISE,
    NO_GUARDS,
    Guards,
    LooseFields,
    Noise,
    refuse_unknown_keywords,
    with_fields,
)
from soul_kernels.errors import check_range
from soul_kernels.reference.hessian_ema import ema_block
from soul_kernels.reference.hessian_ema import hessian_ema as _reference_hessian_ema
from soul_kernels.reference.rounding import draws_codes
from soul_kernels.rounding import GROUP, Block, load, load_state, noise_words, store_state
from soul_kernels.tensors import (
    PARAM_DTYPES,
    STATE_DTYPES,
    check_on_device,
    check_scales,
    check_tensor_lists,
    has_data,
)

# Elements per program, elements per loop iteration, warps; 8-bit states need more registers per element.
CONFIG = {"chunk": 16384, "BLOCK": 2048, "num_warps": 8}
CONFIG_8BIT = {"chunk": 16384, "BLOCK": 1024, "num_warps": 4}
# The first rows of the table, in this order; the kernel knows them by index. Element counts, salts and offsets follow.
ROLES = ("h", "g", "u", "h_scale", "step")
AUXILIARY = ("h_scale", "step")  # roles that are not walked element by element
H_ROW, G_ROW, U_ROW, H_SCALE_ROW, STEP_ROW = map(tl.constexpr, range(len(ROLES)))
N_ROLES = tl.constexpr(len(ROLES))


@triton.jit
def ema(h, products, beta2, weight):
    """Return ``beta2 h + weight products``; ``weight`` is ``(1 - beta2) scale``, computed in double precision on the host."""
    return beta2 * h + weight * products


class Pointers(NamedTuple):
    """Pointers to the first element of a chunk in the tensor of each role, within the kernel."""

    h: Any
    h_scale: Any
    g: Any
    u: Any


class Numbers(NamedTuple):
    """Numbers that all elements share, in fp32, within the kernel."""

    beta2: Any
    weight: Any  # (1 - beta2) * scale
    factor: Any  # of the gradients, or None


@triton.jit
def _ema_block(
    pointers,  # `Pointers`
    block,  # `Block`
    noise,  # `ChunkNoise`
    numbers,  # `Numbers`
    H_DTYPE: tl.constexpr,
    U_DTYPE: tl.constexpr,
    STOCHASTIC_CODES: tl.constexpr,
    CROSSES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Update one block."""
    h = load_state(pointers.h, pointers.h_scale, block, H_DTYPE, True, BLOCK)
    g = load(pointers.g, block.offsets, block.mask).to(tl.float32)
    if numbers.factor is not None:
        g = g * numbers.factor
    if U_DTYPE is None:
        products = g * g
    else:
        products = g * load(pointers.u, block.offsets, block.mask).to(tl.float32)
    words = 0
    if noise.key is not None:
        words = noise_words(noise.key, noise.first, block.offsets, CROSSES)
    h = ema(h, products, numbers.beta2, numbers.weight)
    store_state(pointers.h, pointers.h_scale, h, words, block, H_DTYPE, True, STOCHASTIC_CODES, BLOCK)


@triton.jit(do_not_specialize=["n_tensors"])
def hessian_ema_kernel(
    table_ptr,  # [8, n_tensors] int64: addresses of h, g, probe u, scale of h, step; element counts; salts; offsets
    chunk_tensor_ptr,  # [programs] int32: the tensor of this program
    chunk_piece_ptr,  # [programs] int32: index of this program's piece, of CHUNK elements, in that tensor
    factor_ptr,  # [] fp32: the gradients are multiplied by it; None: 1
    skip_ptr,  # [] fp32: unless it is 0, nothing is changed; None: 0
    n_tensors,
    beta2,
    weight,  # (1 - beta2) * scale
    H_DTYPE: tl.constexpr,
    G_DTYPE: tl.constexpr,
    U_DTYPE: tl.constexpr,  # None: g takes the place of u
    STOCHASTIC_CODES: tl.constexpr,  # whether an 8-bit h is rounded stochastically
    STEPS: tl.constexpr,  # whether the noise depends on a step of each tensor
    CROSSES: tl.constexpr,  # whether a chunk may lie on both sides of a multiple of 2^32 in its noise
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Update one chunk of one Hessian."""
    if skip_ptr is not None:
        if tl.load(skip_ptr) != 0.0:
            return
    chunk = chunk_of_program(table_ptr, chunk_tensor_ptr, chunk_piece_ptr, n_tensors, N_ROLES, CHUNK)
    pointers = Pointers(
        h=chunk_pointer(chunk, H_ROW, H_DTYPE, ALIGNED),
        h_scale=scale_pointer(chunk, H_SCALE_ROW, H_DTYPE),
        g=chunk_pointer(chunk, G_ROW, G_DTYPE, ALIGNED),
        u=chunk_pointer(chunk, U_ROW, U_DTYPE, ALIGNED),
    )
    noise = ChunkNoise(None, None)
    if H_DTYPE == tl.bfloat16 or STOCHASTIC_CODES:
        noise = noise_of_chunk(chunk, N_ROLES, STEP_ROW, STEPS)
    factor = None
    if factor_ptr is not None:
        factor = tl.load(factor_ptr)
    numbers = Numbers(beta2, weight, factor)
    lanes = tl.arange(0, BLOCK)
    groups = tl.cdiv(chunk.count, GROUP)
    full = chunk.count // BLOCK
    for index in range(full):
        block = Block(index * BLOCK + lanes, None, index * (BLOCK // GROUP), groups)
        _ema_block(pointers, block, noise, numbers, H_DTYPE, U_DTYPE, STOCHASTIC_CODES, CROSSES, BLOCK)
    if full * BLOCK < chunk.count:
        offsets = full * BLOCK + lanes
        block = Block(offsets, offsets < chunk.count, full * (BLOCK // GROUP), groups)
        _ema_block(pointers, block, noise, numbers, H_DTYPE, U_DTYPE, STOCHASTIC_CODES, CROSSES, BLOCK)


class HessianEma:
    """Repeated updates of the same Hessians: `hessian_ema` in two parts, `prepare` and the call that it returns.

    It works like `soul_kernels.SophiaStep`: tensors are checked once, and again if one has changed.
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
            copy = rebuild_table(table, roles, key, read=("g", "u"), salts=salts, offsets=offsets, auxiliary=AUXILIARY)
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
                STOCHASTIC_CODES=hessian_scales is not None and draws_codes(beta2),
                STEPS=steps is not None,
                **(CONFIG if hessian_scales is None else CONFIG_8BIT),
            )
            return PreparedCall(table, launch, copy)
        run = functools.partial(
            _reference_hessian_ema, hessians, grads, beta2=beta2, scale=scale, probes=probes, hessian_scales=hessian_scales,
            salts=table.salts, offsets=table.offsets, steps=noise.steps, grad_factor=guards.grad_factor,
            skip=guards.skip if has_data(hessians[0]) else None, run=Compiled(ema_block) if backend == "compile" else ema_block,
        )  # fmt: skip
        return PreparedCall(table, torch.no_grad()(run))  # kernels know nothing of autograd


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
    **fields: Unpack[LooseFields],
) -> None:
    """Update diagonal Hessian estimates in place: ``h = beta2 * h + (1 - beta2) * scale * g * g``.

    The average is computed in fp32. bf16 Hessians, and with ``beta2`` above 0.99 8-bit ones, are then rounded stochastically,
    because rounding to nearest would lose the small changes of a slow average. Source: Sophia, Liu et al. 2023 (arXiv
    2305.14342), algorithm 3 with the Gauss-Newton-Bartlett estimate, as coded in ``update_hessian()`` of the published class:
    the batch size enters later, in the step. With ``probes`` u and gradients H u, ``h = beta2 * h + (1 - beta2) * scale * u *
    Hu``: Hutchinson's estimate.

    To update the same tensors again and again, keep a `HessianEma`: it takes less time on the host.

    Args:
        hessians: list of dense tensors, any shapes, fp32 or bf16, or uint8 codes of 8-bit states; mutated.
        grads: list of tensors of the same shapes and devices, fp32, bf16 or fp16; not changed.
        beta2: decay of the average, in [0, 1).
        scale: factor of the squared gradient, >= 0.
        probes: list of tensors like ``grads``, for Hutchinson's estimate; None: the gradients themselves.
        hessian_scales: the scales of 8-bit states, ceil(numel / 32) int16 each, or their bytes, in any shape; an entry is None
            for other dtypes. Mutated.
        noise: where the noise of stochastic rounding comes from.
        guards: a factor of the gradients, and a flag to skip the update; both on the device.
        backend: "auto" (Triton on a GPU and under the interpreter; on a CPU "compile" where that pays; else the reference),
            "triton", "compile" or "reference". "compile" is the reference under torch.compile, with the same bits.
        **fields: the fields of `Noise` (``seed``, ``tensor_ids``, ``tensor_offsets``, ``steps``) and `Guards`
            (``grad_factor``, ``skip``), which override those of ``noise`` and ``guards``.

    Raises:
        ValueError: an argument does not fit; nothing was changed.
    """
    keywords: dict[str, Any] = {**fields}
    noise = with_fields(noise, keywords)
    guards = with_fields(guards, keywords)
    refuse_unknown_keywords("hessian_ema", keywords)
    update = HessianEma().prepare(
        hessians, grads, beta2=beta2, scale=scale, probes=probes, hessian_scales=hessian_scales, noise=noise, guards=guards,
        backend=backend,
    )  # fmt: skip
    update()

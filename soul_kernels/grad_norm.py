"""The global L2 norm of many gradients: one launch reads them once, and a second one, of one program, adds up.

Safe to change: the two configurations. The order in which squares are added up is part of the result.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from soul_kernels._foreach import chunk_of_program, chunk_pointer
from soul_kernels._launch import launch, tl, triton
from soul_kernels._table import TensorTable
from soul_kernels.backends import resolve_backend
from soul_kernels.errors import argument_error
from soul_kernels.reference.grad_norm import grad_norm as _reference_grad_norm
from soul_kernels.rounding import load
from soul_kernels.tensors import PARAM_DTYPES, check_gradient, is_dense

# Larger pieces than in the step: fewer partial sums, which one program adds up.
CONFIG = {"chunk": 65536, "BLOCK": 2048, "num_warps": 8}
SUM_CONFIG: dict[str, Any] = {"BLOCK": 4096, "num_warps": 8}
# The rows of the table, of which element counts are the last one.
G_ROW = tl.constexpr(0)
N_ROLES = tl.constexpr(1)


@triton.jit(do_not_specialize=["n_tensors"])
def squares_kernel(
    table_ptr,  # [2, n_tensors] int64: addresses of g; element counts
    chunk_tensor_ptr,  # [programs] int32: the tensor of this program
    chunk_piece_ptr,  # [programs] int32: which piece of CHUNK elements of it
    partial_ptr,  # [programs] fp64: the sum of squares of this piece is written here
    n_tensors,
    G_DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the sum of the squares of each chunk."""
    chunk = chunk_of_program(table_ptr, chunk_tensor_ptr, chunk_piece_ptr, n_tensors, N_ROLES, CHUNK)
    g_ptr = chunk_pointer(chunk, G_ROW, G_DTYPE, ALIGNED)
    lanes = tl.arange(0, BLOCK)
    squares = tl.zeros([BLOCK], tl.float32)
    full = chunk.count // BLOCK
    for block in range(full):
        g = load(g_ptr, block * BLOCK + lanes, None).to(tl.float32)
        squares += g * g
    if full * BLOCK < chunk.count:
        offsets = full * BLOCK + lanes
        g = load(g_ptr, offsets, offsets < chunk.count).to(tl.float32)
        squares += g * g
    tl.store(partial_ptr + tl.program_id(0), tl.sum(squares.to(tl.float64), 0))


@triton.jit(do_not_specialize=["n_partials"])
def norm_kernel(
    partial_ptr,  # [n_partials] fp64
    norm_ptr,  # [] fp32: the square root of their sum is written here
    n_partials,
    BLOCK: tl.constexpr,
):
    """Write the square root of the sum of all partial sums."""
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, n_partials, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        total += tl.load(partial_ptr + offsets, mask=offsets < n_partials, other=0.0)
    tl.store(norm_ptr, tl.sqrt(tl.sum(total, 0)).to(tl.float32))


@torch.no_grad()
def grad_norm(grads: Sequence[Tensor], *, table: TensorTable | None = None, backend: str = "auto") -> Tensor:
    """Return the L2 norm of all gradients together, ``sqrt(sum_i ||g_i||^2)``, as ``torch.nn.utils.get_total_norm`` defines it.

    Squares are summed in fp32 within a thread and in fp64 from there on, always in the same order: the result is the same at
    every run. It is finite exactly if all gradients are finite and their squares do not overflow fp32, so it serves as the flag
    of finite gradients too.

    Args:
        grads: list of dense tensors, any shapes, fp32, bf16 or fp16, on any devices; not changed.
        table: a `TensorTable` that the caller keeps for calls with the same tensors, which makes them cheaper.
        backend: "auto" (Triton on a GPU and under the interpreter, else the reference), "triton" or "reference". "compile" is
            the reference: there is nothing to fuse in one read of the gradients.

    Returns:
        fp32 tensor of shape () on the device of the first gradient; 0 without gradients. Nothing waits for the device.

    Raises:
        ValueError: a gradient is sparse, complex, or of a dtype that is not supported.
    """
    if not grads:
        return torch.zeros((), dtype=torch.float32)
    roles: dict[str, Sequence[Tensor]] = {"g": grads}
    table = TensorTable() if table is None else table
    if not table.unchanged(roles):
        table.forget()
        for index, grad in enumerate(grads):
            name = f"grads[{index}]"
            if not isinstance(grad, torch.Tensor):
                raise argument_error(name, "a tensor", type(grad).__name__, "leave it out")
            check_gradient(name, grad)
            if grad.dtype not in PARAM_DTYPES:
                names = ", ".join(str(dtype) for dtype in PARAM_DTYPES)
                raise argument_error(name, f"dtype {names}", grad.dtype, "convert it first")
        roles = {"g": [grad if is_dense(grad) else grad.contiguous() for grad in grads]}
        table.rebuild(roles, read_only="g")
    if resolve_backend(backend, grads[0]) != "triton":
        return _reference_grad_norm(grads)
    partials = []
    for bucket in table.buckets:
        partials.append(torch.empty(len(bucket.chunk_map(CONFIG["chunk"])[0]), dtype=torch.float64, device=bucket.device))
        bucket.launch(squares_kernel, partial_ptr=partials[-1], **CONFIG)
    device = grads[0].device
    if not partials:  # all of them are empty
        return torch.zeros((), dtype=torch.float32, device=device)
    partial = partials[0] if len(partials) == 1 else torch.cat([p.to(device, non_blocking=True) for p in partials])
    norm = torch.empty((), dtype=torch.float32, device=device)
    launch(norm_kernel, (1,), device, partial_ptr=partial, norm_ptr=norm, n_partials=len(partial), **SUM_CONFIG)
    return norm

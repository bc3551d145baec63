"""Backend choice, device guard, pointer tables and chunk maps: everything between a public op and its kernel.

Kernel modules import ``triton`` and ``tl`` from here, so that they can also be imported where Triton is not installed
(the references serve there).
"""

import contextlib
import functools
import os

import torch

from soul_kernels._checks import argument_error, check_choice

try:
    import triton
    import triton.language as tl
except ImportError:  # not Linux, or Triton left out: kernels are defined, never launched

    class _NoTriton:
        """Stands in for the two modules while kernel files are being read."""

        def __getattr__(self, name):
            return self

        def __call__(self, *args):
            return self

        def jit(self, function):
            return function

    triton = tl = _NoTriton()

BACKENDS = ("auto", "triton", "reference")


def has_triton():
    """Tells whether Triton can be imported."""
    return not type(triton).__name__ == "_NoTriton"


def interpreting():
    """Tells whether kernels run in Triton's CPU interpreter (``TRITON_INTERPRET=1``, Triton's own switch)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def resolve_backend(backend, tensor):
    """Returns ``"triton"`` or ``"reference"``.

    Args:
        backend: ``"auto"`` takes Triton for tensors on a GPU and under the interpreter, else the reference.
        tensor: one of the op's tensors; it tells the device.

    Raises:
        ValueError: unknown name, or Triton is asked for where it cannot run.
    """
    check_choice("backend", backend, BACKENDS)
    can_run = has_triton() and (tensor.is_cuda or interpreting())
    if backend == "triton" and not can_run:
        reason = "Triton is not installed" if not has_triton() else f"the tensors are on {tensor.device}"
        remedy = "take 'reference', move the tensors to a GPU, or set TRITON_INTERPRET=1"
        raise argument_error("backend", "a place where Triton can run for 'triton'", reason, remedy)
    return "triton" if backend != "reference" and can_run else "reference"


def device_guard(device):
    """Makes ``device`` current for the launches inside, where it is a GPU."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def launch(kernel, grid, device, **arguments):
    """Launches ``kernel`` on ``device``.

    Fused multiply-add is always off: Triton's default changes between versions, and without it a kernel's fp32 results
    are those of its reference, bit for bit. These kernels are bound by memory, not by instructions.
    """
    with device_guard(device):
        kernel[grid](**arguments, enable_fp_fusion=False)


@functools.lru_cache(maxsize=64)
def _chunk_map(numels, chunk, device):
    """Which tensor, and which piece of it, each program works on: two int32 tensors, one entry a program.

    A pure function of sizes, so it can be cached; addresses never are, because the allocator hands them out again.
    """
    counts = torch.tensor([-(-numel // chunk) for numel in numels], device="cpu")  # whatever the default device is
    tensor = torch.repeat_interleave(torch.arange(len(numels), device="cpu"), counts)
    first = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    piece = torch.arange(len(tensor), device="cpu") - first
    return tensor.to(device, torch.int32), piece.to(device, torch.int32)


def _upload(values, device):
    """Copies a list of integers to the device without waiting for the work that is queued there."""
    host = torch.tensor(values, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


@triton.jit
def chunk_of_program(table_ptr, chunk_tensor_ptr, chunk_piece_ptr, n_tensors, ROLES: tl.constexpr, CHUNK: tl.constexpr):
    """Which tensor this program works on, from which element (int64: tensors pass 2^31), and how many elements."""
    tensor = tl.load(chunk_tensor_ptr + tl.program_id(0))
    start = tl.load(chunk_piece_ptr + tl.program_id(0)).to(tl.int64) * CHUNK
    count = tl.minimum(tl.load(table_ptr + ROLES * n_tensors + tensor) - start, CHUNK).to(tl.int32)
    return tensor, start, count


@triton.jit
def chunk_pointer(table_ptr, entry, start, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointer to element ``start`` of the tensor whose address is the table's ``entry``."""
    pointer = tl.load(table_ptr + entry).to(tl.pointer_type(DTYPE)) + start
    if ALIGNED:  # after the offset was added: only then do 16-byte accesses come out
        pointer = tl.multiple_of(pointer, 16)
    return pointer


def launch_over_tensors(kernel, tensors, *, chunk, **arguments):
    """Launches ``kernel`` once for every (device, dtypes, alignment) bucket of the tensors.

    The kernel receives, beside ``arguments``:
        ``table_ptr`` [roles + 1, n_tensors] int64: the addresses, one row a role, and the element counts in the last row;
        ``chunk_tensor_ptr``, ``chunk_piece_ptr`` [programs] int32: column of the table, and the piece of ``chunk`` elements;
        ``n_tensors``; ``ALIGNED``: every address is a multiple of 16 bytes; ``CHUNK``; and one dtype a role, ``P_DTYPE`` for
        the role "p".

    Args:
        kernel: the Triton kernel.
        tensors: role -> list of tensors; equal lengths, and equal shapes, strides and device at each index.
        chunk: elements that one program works on; a multiple of 16.
        **arguments: passed on to the kernel, which finds its work with `chunk_of_program` and `chunk_pointer`.
    """
    roles = list(tensors)
    buckets = {}
    for column in zip(*tensors.values()):
        if column[0].numel() == 0:
            continue
        addresses = [t.data_ptr() for t in column]
        aligned = all(address % 16 == 0 for address in addresses)
        key = (column[0].device, tuple(t.dtype for t in column), aligned)
        buckets.setdefault(key, []).append((*addresses, column[0].numel()))
    for (device, dtypes, aligned), columns in buckets.items():
        rows = list(zip(*columns))
        chunk_tensor, chunk_piece = _chunk_map(rows[-1], chunk, device)
        launch(
            kernel,
            (len(chunk_tensor),),
            device,
            table_ptr=_upload(rows, device),
            chunk_tensor_ptr=chunk_tensor,
            chunk_piece_ptr=chunk_piece,
            n_tensors=len(columns),
            ALIGNED=aligned,
            CHUNK=chunk,
            **{f"{role.upper()}_DTYPE": triton_dtype(dtype) for role, dtype in zip(roles, dtypes)},
            **arguments,
        )


def triton_dtype(dtype):
    """The Triton dtype of a torch dtype."""
    return getattr(tl, {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}[dtype])

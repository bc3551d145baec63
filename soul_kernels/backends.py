"""Which implementation of an op runs: the choice among kernels, compiled references and references."""

import torch

from soul_kernels._compiled import PAYS, can_compile, cpp_compiler
from soul_kernels._launch import has_triton, interpreting, runs_on_cpu, triton
from soul_kernels.errors import argument_error, check_choice

__all__ = [
    "BACKENDS",
    "PAYS",
    "cpp_compiler",
    "has_triton",
    "interpreting",
    "multiplies_bf16",
    "resolve_backend",
    "resolve_head_backend",
    "runs_on_cpu",
    "triton_version",
]

BACKENDS = ("auto", "triton", "compile", "torch", "reference")


def triton_version() -> str | None:
    """Return the version of Triton, or None where it is not installed."""
    return triton.__version__ if has_triton() else None


def resolve_backend(backend: str, tensor: torch.Tensor, *, compiled: int = 0) -> str:
    """Return ``"triton"``, ``"compile"`` or ``"reference"``.

    Args:
        backend: ``"auto"`` takes Triton for tensors on a GPU and under the interpreter; on a CPU ``"compile"`` where that pays;
            else the reference, and so does ``"torch"``.
        tensor: one of the op's tensors; it tells the device.
        compiled: elements of all tensors of an op that can be compiled. Of others, ``"compile"`` is the reference.

    Raises:
        ValueError: unknown name, or Triton is asked for where it cannot run.
    """
    check_choice("backend", backend, BACKENDS)
    can_run = has_triton() and (tensor.is_cuda or runs_on_cpu())
    if backend == "triton" and not can_run:
        reason = "Triton is not installed" if not has_triton() else f"the tensors are on {tensor.device}"
        remedy = "take 'reference', move the tensors to a GPU, or set TRITON_INTERPRET=1"
        raise argument_error("backend", "a place where Triton can run for 'triton'", reason, remedy)
    if backend in ("auto", "triton") and can_run:
        return "triton"
    wanted = backend in ("auto", "compile") and compiled
    return "compile" if wanted and can_compile(backend, tensor, compiled) else "reference"


def resolve_head_backend(backend: str, tensor: torch.Tensor) -> str:
    """Return how the ops on hidden states compute: ``"triton"``, ``"torch"`` or ``"reference"``.

    These have two paths beside the kernels: their reference, which defines them with all logits at once, under autograd; and
    the sweep over chunks that the kernels take as well, with rows of logits in plain PyTorch. The first is taken only on
    request.

    Args:
        backend: as in `resolve_backend`; ``"torch"`` takes the sweep in plain PyTorch, and so does ``"auto"`` where Triton
            cannot run.
        tensor: as in `resolve_backend`.

    Raises:
        ValueError: as `resolve_backend`.
    """
    resolved = resolve_backend(backend, tensor)
    return resolved if resolved == "triton" or backend == "reference" else "torch"


def multiplies_bf16() -> bool:
    """Tell whether the processor multiplies matrices of bf16 faster than those of fp32: whether it has tiles (AMX).

    With oneDNN kept to AVX512-BF16 a product of bf16 takes 1.8 times as long as one of fp32, with AVX-512 or AVX2 alone 5 to 10
    times (docs/running.md has what was measured).
    """
    return torch.backends.mkldnn.is_available() and torch.cpu._is_amx_tile_supported()

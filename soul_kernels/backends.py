"""Choice of the implementation of an op: Triton kernel, compiled reference or reference."""

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
        backend: ``"auto"`` means Triton for tensors on a GPU and under Triton's interpreter, ``"compile"`` on a CPU where
            compiling pays, and else the reference. ``"torch"`` means the reference.
        tensor: one of the op's tensors, for its device.
        compiled: number of elements of all tensors if the op can be compiled, else 0; ``"compile"`` then means the reference.

    Raises:
        ValueError: ``backend`` is not a known name, or it is "triton" where Triton cannot run.
    """
    check_choice("backend", backend, BACKENDS)
    can_run = has_triton() and (tensor.is_cuda or runs_on_cpu())
    if backend == "triton" and not can_run:
        reason = "Triton is not installed" if not has_triton() else f"the tensors are on {tensor.device}"
        remedy = "pass 'reference', move the tensors to a GPU, or set TRITON_INTERPRET=1"
        raise argument_error("backend", "a place where Triton can run for 'triton'", reason, remedy)
    if backend in ("auto", "triton") and can_run:
        return "triton"
    if backend in ("auto", "compile") and compiled and can_compile(backend, tensor, compiled):
        return "compile"
    return "reference"


def resolve_head_backend(backend: str, tensor: torch.Tensor) -> str:
    """Return the implementation of the ops on hidden states: ``"triton"``, ``"torch"`` or ``"reference"``.

    Beside the kernels these ops have two implementations. The reference defines the results, with all logits at once, under
    autograd; it runs only on request. "torch" sweeps over chunks of logits, as the kernels do, in plain PyTorch.

    Args:
        backend: as in `resolve_backend`, but ``"torch"`` means the sweep in plain PyTorch. So does ``"compile"``, and
            ``"auto"`` where Triton cannot run.
        tensor: as in `resolve_backend`.

    Raises:
        ValueError: as `resolve_backend`.
    """
    resolved = resolve_backend(backend, tensor)
    return resolved if resolved == "triton" or backend == "reference" else "torch"


def multiplies_bf16() -> bool:
    """Tell whether the processor multiplies bf16 matrices faster than fp32 ones, as only processors with tiles (AMX) do.

    With oneDNN limited to AVX512-BF16 a bf16 product takes 1.8 times as long as an fp32 product, with AVX-512 or AVX2 alone 5
    to 10 times. docs/running.md has the measurements.
    """
    return torch.backends.mkldnn.is_available() and torch.cpu._is_amx_tile_supported()

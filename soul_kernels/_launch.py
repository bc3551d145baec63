"""Import of Triton, and the launch of a kernel. No other module imports Triton or launches anything.

Kernel modules import ``triton`` and ``tl`` from here, so that they can be imported where Triton is not installed. The
references compute there.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch

from soul_kernels._versions import check_version

try:
    import triton
    import triton.language as tl
except ImportError:  # not Linux, or Triton left out: kernels are defined, never launched

    class _NoKernel:
        """Stand-in for a kernel, which says why it cannot be launched."""

        def __init__(self, function: Callable) -> None:
            self.fn = function

        def __getitem__(self, grid: tuple[int, ...]) -> Callable:
            raise RuntimeError(f"{getattr(self.fn, '__name__', 'the kernel')} cannot be launched: Triton is not installed")

    class _NoTriton:
        """Stand-in for both modules, with which kernel modules can be imported."""

        def __getattr__(self, name: str) -> Any:
            return self

        def __call__(self, *args: Any) -> Any:
            return self

        def jit(self, function: Callable | None = None, **options: Any) -> Any:
            return _NoKernel if function is None else _NoKernel(function)

    triton = tl = _NoTriton()
else:
    check_version("triton", triton.__version__)


def has_triton() -> bool:
    """Tell whether Triton can be imported."""
    return not type(triton).__name__ == "_NoTriton"


# Read once: Triton chooses when a kernel is defined, and torch.compile could not trace a look into the environment.
_INTERPRETED = has_triton() and bool(triton.knobs.runtime.interpret)


def interpreting() -> bool:
    """Tell whether kernels run in Triton's CPU interpreter (``TRITON_INTERPRET=1``, as Triton itself reads that variable)."""
    return _INTERPRETED


def runs_on_cpu() -> bool:
    """Tell whether kernels run on CPU tensors: in the interpreter, or because the active Triton driver is one for the CPU."""
    if interpreting():
        return True
    if not has_triton():
        return False
    active: Any = getattr(triton.runtime.driver, "_active", None)  # `active` itself would look for a GPU
    return bool(active) and active.get_active_torch_device().type == "cpu"


def device_guard(device: torch.device) -> contextlib.AbstractContextManager:
    """Return a context in which ``device`` is the current GPU; it does nothing for other devices."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    device: torch.device,
    *,
    maxnreg: int | None = None,
    **arguments: Any,
) -> None:
    """Launch ``kernel`` on ``device``.

    Fused multiply-add is off. Triton's default changes between versions, and without fused multiply-add a kernel's fp32
    results are those of its reference, bit for bit. ``maxnreg`` limits the registers of a thread on NVIDIA's GPUs; on others
    it is left out.
    """
    if maxnreg is not None and torch.version.hip is None:
        arguments["maxnreg"] = maxnreg
    with device_guard(device):
        kernel[grid](**arguments, enable_fp_fusion=False)


def triton_dtype(dtype: torch.dtype | None) -> Any:
    """Return the Triton dtype of a torch dtype; None stays None."""
    return dtype and getattr(tl, str(dtype).removeprefix("torch."))

"""A Triton driver whose device is this CPU: Triton specialises, compiles and launches as for a card, and PTX is executed.

`activate` makes it Triton's active driver (``triton.runtime.driver.set_active``). Everything before the launch is Triton's own
code: the signature, the specialisation on divisibility and on ones, the compiler, ptxas, and the cache on disk.
"""

import collections
import contextlib
import dataclasses
import pathlib
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget

from tests.ptx import arithmetic
from tests.ptx.machine import Checks, Counts, Finding, Kernel
from tests.ptx.memory import AddressBook, GlobalMemory

TARGETS = {"sm_80": 80, "sm_90": 90, "sm_100": 100}


@dataclasses.dataclass
class Record:
    """Launches since the driver was activated.

    Attributes:
        counts: by kernel and variant; a variant is a checksum of its PTX, the same in every process.
        findings: how many launches ended in a `Finding`.
    """

    counts: dict[tuple[str, int], Counts] = dataclasses.field(default_factory=lambda: collections.defaultdict(Counts))
    findings: int = 0

    @property
    def launches(self) -> int:
        """Launches of all kernels."""
        return sum(counts.launches for counts in self.counts.values())


class _Function:
    """A loaded kernel; its PTX is translated at the first launch, and again where an edit of it is wanted."""

    def __init__(self, name: str, ptx: str, shared: int) -> None:
        self.name = name
        self.ptx = ptx
        self.shared = shared
        self.kernels: dict[str, Kernel] = {}

    def translated(self, threads: int, edit: Callable[[str], str] | None) -> Kernel:
        ptx = edit(self.ptx) if edit else self.ptx
        if ptx not in self.kernels:
            self.kernels[ptx] = Kernel(ptx, threads, self.shared)
        return self.kernels[ptx]


class _Utils:
    """What Triton asks of a card, answered for an H100."""

    def __init__(self) -> None:
        self.next_ptx = ""

    def note_files(self, module: object, function: object, name: str, metadata_group: dict[str, str], hash: str) -> None:
        """Triton's hook before a kernel is loaded, which alone is told where the PTX lies."""
        path = next(path for file, path in metadata_group.items() if file.endswith(".ptx"))
        self.next_ptx = pathlib.Path(path).read_text()

    def get_device_properties(self, device: int) -> dict[str, int]:
        """Properties of an H100 that Triton reads."""
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536,
                "sm_clock_rate": 1980000, "mem_clock_rate": 2619000, "mem_bus_width": 5120}  # fmt: skip

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[object, _Function, int, int, int]:
        """Return module, function, registers, spills and the most threads of a program."""
        function = _Function(name, self.next_ptx, shared)
        return function, function, 0, 0, 1024

    def unload_module(self, module: object) -> None:
        """Nothing is to be freed."""


class Driver:
    """See the module's docstring; the methods are those that Triton calls.

    Args:
        target: one of `TARGETS`.
        checks: what is looked for.

    Attributes:
        record: what was run.
        edit: a function of a kernel's PTX, applied before each launch; None: as compiled. For faults that are planted.
    """

    def __init__(self, target: str = "sm_90", checks: Checks | None = None) -> None:
        self.edit: Callable[[str], str] | None = None
        self.target = GPUTarget("cuda", TARGETS[target], 32)
        self.checks = checks or Checks()
        self.utils = _Utils()
        self.record = Record()
        self.addresses = AddressBook()

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """Return what is called for each launch of a compiled kernel."""
        names = [(name, kind) for name, kind in source.signature.items()]
        threads = metadata.num_warps * 32

        def run(x: int, y: int, z: int, stream: int, function: _Function, packed: Any, launch_metadata: Any,
                enter: Any, leave: Any, *arguments: Any) -> None:  # fmt: skip
            parameters = list(_flattened(names, arguments))
            self._launch((x, y, z), function.translated(threads, self.edit), parameters)

        return run

    def _launch(self, grid: tuple[int, int, int], kernel: Kernel, parameters: list[tuple[str, str, Any]]) -> None:
        counts = self.record.counts[kernel.program.name, zlib.crc32(kernel.ptx.encode())]
        try:
            launch(kernel, grid, parameters, self.addresses.tensors, self.checks, counts)
        except Finding:
            self.record.findings += 1
            raise

    def get_current_target(self) -> GPUTarget:
        """The card that is compiled for."""
        return self.target

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        """Return the major and minor number of the compute capability."""
        return divmod(self.target.arch, 10)

    def get_current_device(self) -> int:
        """There is one."""
        return 0

    def set_current_device(self, device: int) -> None:
        """There is one."""

    def get_current_stream(self, device: int = 0) -> int:
        """Launches are executed at once."""
        return 0

    def get_active_torch_device(self) -> torch.device:
        """Return the device of the tensors."""
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        """Return torch's interface of the device."""
        return torch.cpu

    def map_python_to_cpp_type(self, kind: str) -> str:
        """Only launchers in C++ ask."""
        return kind

    @classmethod
    def is_active(cls) -> bool:
        """Return False, so that Triton never selects this driver by itself; `activate` does."""
        return False


def launch(kernel: Kernel, grid: tuple[int, int, int], parameters: list[tuple[str, str, Any]],
           others: Callable[[], list[torch.Tensor]], checks: Checks, counts: Counts) -> None:  # fmt: skip
    """Run a kernel once on tensors of the CPU.

    Args:
        kernel: what is run.
        grid: programs along each axis.
        parameters: name, Triton type and value of every argument that is a parameter of the PTX.
        others: tensors that a table of addresses may name.
        checks: what is looked for.
        counts: is added to.
    """
    tensors = [(name, value) for name, _, value in parameters if isinstance(value, torch.Tensor)]
    space = GlobalMemory(tensors, others, strict=checks.strict)
    arguments = [_argument(kind, value) for _, kind, value in parameters]
    scratch = len(kernel.program.parameters) - len(arguments)  # memory for the kernel itself, which ours do not use
    kernel.run(grid, arguments + [np.zeros((1, 1), np.uint64)] * scratch, space, checks, counts)


def _flattened(names: list[tuple[str, Any]], arguments: tuple[Any, ...]) -> Iterator[tuple[str, str, Any]]:
    """Yield name, Triton type and value of every argument that is a parameter of the PTX."""
    for (name, kind), value in zip(names, arguments, strict=True):
        if isinstance(kind, tuple):
            yield from _flattened([(f"{name}[{i}]", k) for i, k in enumerate(kind)], tuple(value))
        elif kind != "constexpr":
            yield name, kind, value


def _argument(kind: str, value: Any) -> np.ndarray:
    """Return the bits of an argument, [1, 1] uint64."""
    if kind.startswith("*"):
        return np.full((1, 1), value.data_ptr() if hasattr(value, "data_ptr") else int(value), np.uint64)
    if kind.startswith(("fp", "bf", "f")):
        dtype = {"fp32": np.float32, "f32": np.float32, "fp64": np.float64, "f64": np.float64}[kind]
        bits = np.array([[value]], dtype)
        return bits.view(f"u{bits.itemsize}").astype(np.uint64)
    return np.array([[int(value) & (2**64 - 1)]], np.uint64)


@contextlib.contextmanager
def activate(target: str = "sm_90", checks: Checks | None = None, *, ulps: int = 0) -> Iterator[Driver]:
    """Run kernels on tensors of the CPU as a card would, inside the context.

    Args:
        target: the card that is compiled for, one of `TARGETS`.
        checks: what is looked for.
        ulps: errors of approximate instructions.
    """
    driver = Driver(target, checks)
    hook = triton.knobs.runtime.kernel_load_start_hook
    previous = triton.runtime.driver._active
    triton.runtime.driver.set_active(driver)
    hook.add(driver.utils.note_files)
    driver.addresses.install()
    try:
        with arithmetic.ulps(ulps):
            yield driver
    finally:
        driver.addresses.uninstall()
        hook.remove(driver.utils.note_files)
        triton.runtime.driver._active = previous

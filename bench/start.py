"""The time until a process has taken its first step: the import, and a compiled step that torch finds in its cache on disk.

Every call is a new process. The first one that compiles fills a cache directory, which the timed ones read. Bytecode is cached
too, as it is where a package was installed: otherwise Python would compile every file of ours, and none of torch's.
"""

import functools
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator

import torch

from bench._harness import Case

IMPORT = "import {0}"
# Two million parameters more than the smallest number for which a CPU takes the compiled step.
FIRST_STEP = """
import time
import torch
import soul
torch.set_num_threads({0})
params = [torch.randn(1000, 1000).requires_grad_() for _ in range(19)]
for p in params:
    p.grad = torch.randn_like(p)
optimizer = soul.SOUL(params, backend="compile")
begun, worked = time.perf_counter(), time.process_time()
optimizer.step()
print(time.perf_counter() - begun, time.process_time() - worked)
"""


class Process:
    """A Python process, as a call.

    Args:
        program: Python code; it may print seconds of wall time and of processor time.
        cache: directory for torch's caches.

    Attributes:
        directory: of the caches; it is removed when no call holds it any more.
    """

    directory: tempfile.TemporaryDirectory[str]

    def __init__(self, program: str, cache: str) -> None:
        self._program = program
        self._seconds: list[list[float]] = []
        inherited = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        self._environment = inherited | {"TORCHINDUCTOR_CACHE_DIR": cache}

    def __call__(self) -> None:
        """Run the process to its end.

        Raises:
            RuntimeError: it failed; with the last line of its stderr.
        """
        done = subprocess.run(
            [sys.executable, "-W", "error::RuntimeWarning", "-c", self._program],
            env=self._environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
        if done.stdout:
            self._seconds.append([float(word) for word in done.stdout.split()])

    @property
    def row_fields(self) -> dict[str, float]:
        """For `bench._harness.measure`: the medians of the printed seconds, without those of the first call."""
        medians = [statistics.median(seconds) for seconds in zip(*self._seconds[1:])]
        return dict(zip(("first_step_s", "first_step_processor_s"), medians))


def make_case(device: torch.device) -> Case:
    """Make the case of both imports and of the first step of SOUL on 19 M parameters in fp32."""
    directory = tempfile.TemporaryDirectory(prefix="soul-bench-")

    def start(program: str) -> Process:
        call = Process(program, directory.name)
        call.directory = directory
        return call

    variants = {
        "import torch": IMPORT.format("torch"),
        "ours, import soul": IMPORT.format("soul"),
        "ours, first step, compiled before": FIRST_STEP.format(torch.get_num_threads()),
    }
    made = {name: functools.partial(start, program) for name, program in variants.items()}
    return Case("start of a process", made, dict, once=True)


def cases(device: torch.device, quick: bool) -> Iterator[Callable[[], Case]]:
    """Yield functions that make the cases: none on a GPU, and none if ``quick``."""
    if device.type == "cpu" and not quick:
        yield functools.partial(make_case, device)

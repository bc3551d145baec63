"""What a process waits for before its first step is done: the import, and a compiled step that torch finds on the disk.

Every call is a process of its own. The first one that compiles fills a directory of caches, in which the timed ones find it.
"""

import functools
import os
import statistics
import subprocess
import sys
import tempfile

import torch

from bench._harness import Case

IMPORT = "import {0}"
# Two million parameters more than those from which a CPU takes the compiled step.
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

    Attributes:
        told: of a program that prints seconds, and those of them that a processor has worked, their medians, without those of
            the first call.
    """

    def __init__(self, program, cache):
        self._program, self._seconds = program, []
        self._environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache}

    def __call__(self):
        """Runs it to its end; an error of it is one here."""
        done = subprocess.run(
            [sys.executable, "-W", "error::RuntimeWarning", "-c", self._program],
            env=self._environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
        if done.stdout:
            self._seconds.append([float(word) for word in done.stdout.split()])

    @property
    def told(self):
        """For the row."""
        medians = [statistics.median(of) for of in zip(*self._seconds[1:])]
        return dict(zip(("first_step_s", "first_step_processor_s"), medians))


def make_case(device):
    """Imports side by side, and the first step of SOUL on 19 M parameters in fp32."""
    directory = tempfile.TemporaryDirectory(prefix="soul-bench-")

    def start(program):
        call = Process(program, directory.name)
        call.directory = directory  # lives as long as who needs it
        return call

    variants = {
        "import torch": IMPORT.format("torch"),
        "ours, import soul": IMPORT.format("soul"),
        "ours, first step, compiled before": FIRST_STEP.format(torch.get_num_threads()),
    }
    made = {name: functools.partial(start, program) for name, program in variants.items()}
    return Case("start of a process", made, dict, once=True)


def cases(device, quick):
    """Functions that make the cases: none on a GPU, and none that is to be quick."""
    if device.type == "cpu" and not quick:
        yield functools.partial(make_case, device)

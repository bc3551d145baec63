"""Timing, ceilings, environment, and the table: shared by all benchmarks.

A time is wall time from an idle device to an idle device, host work included, in milliseconds: the median over rounds in
which all variants of a case take turns, so that clocks and temperature treat them alike.
"""

import ctypes
import dataclasses
import datetime
import gc
import importlib.metadata
import os
import pathlib
import platform
import re
import statistics
import subprocess
import sys
import time
import traceback

import torch

from soul._extras import MissingExtra
from soul.plan.cards import DATASHEETS

# Packages of the extra "peers".
PEERS = (
    "torch-optimi", "flashoptim", "torchao", "bitsandbytes", "pytorch-optimizer", "liger-kernel", "cut-cross-entropy",
)  # fmt: skip
CLOCKS = "clocks.sm,clocks.max.sm,clocks.mem,clocks.max.mem"
WRONG = "wrong, not timed: "  # in place of the times of what is ours
SLOW_MS = 1e3  # of a call: the calls that were made before are warm-up enough
ROUNDS = ((0.0, 5), (5.0, 3), (60.0, 1))  # seconds of a round, and at least so many rounds from there on


@dataclasses.dataclass
class Case:
    """One row group of a table.

    Attributes:
        name: what is computed, on what.
        variants: name -> function that allocates and returns the callable to time. Names of ours begin with "ours".
        check: () -> dict of errors by name, those of ours; or by variant and name, of every variant that runs here, with a text
            in place of the errors of one of ours that is wrong. Raises AssertionError where our result is wrong, and only then:
            what a peer does is reported. Runs before any timing.
        bytes: that one call must move, or None; a dict where they differ, by the name of the variant.
        flops: that one call must do, or None.
        floor: name of the variant that does nothing but what all must do, or None: times are also told in percent of its own.
        default: runs without being asked for by name.
        tokens: that one call learns from, padding not among them, or None.
        model: name of a variant -> (FLOPs, bytes) of a call, where it is made of matrix products and of passes over memory: the
            time of both at the ceilings, one after the other, is told beside the measured one. Or None.
        alone: every variant is made, measured and dropped before the next one is made, instead of all taking turns: where each
            holds so much memory that it is to have the device, and a peak, of its own.
        at: sizes, name -> number, for `bench.scaling`; they go into every row.
        own_memory: every variant holds parameters and states of its own, so that it has a peak also where all take turns (CPU).
        once: on a CPU only with the most threads of a run, for what takes long or has no threads.
    """

    name: str
    variants: dict
    check: object
    bytes: float | dict | None = None
    flops: float | None = None
    floor: str | None = None
    default: bool = True
    tokens: int | None = None
    model: dict | None = None
    alone: bool = False
    at: dict = dataclasses.field(default_factory=dict)
    own_memory: bool = False
    once: bool = False

    def rates(self, variant, ms, limits):
        """What a time means: rates, and percentages of what this machine reaches."""
        found = {}
        moved = self.bytes.get(variant) if isinstance(self.bytes, dict) else self.bytes
        if moved:
            found["gb_per_s"] = moved / ms / 1e6
            found["percent_of_copy"] = 100 * moved / (ms / 1e3) / limits["copy_bytes_per_s"]
        if self.flops:
            found["tflop_per_s"] = self.flops / ms / 1e9
            found["percent_of_gemm"] = 100 * self.flops / (ms / 1e3) / limits["gemm_flop_per_s"]
        if self.tokens:
            found["tokens_per_s"] = self.tokens / (ms / 1e3)
        if self.model and variant in self.model:
            flops, moved = found["model_flops"], found["model_bytes"] = self.model[variant]
            found["model_ms"] = 1e3 * (flops / limits["gemm_flop_per_s"] + moved / limits["copy_bytes_per_s"])
            found["times_model"] = ms / found["model_ms"]
        return found


def synchronize(device):
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_once(call, device):
    """Milliseconds of one call, from idle to idle; at least what the clock can tell from nothing."""
    synchronize(device)
    begun = time.perf_counter()
    call()
    synchronize(device)
    return max(time.perf_counter() - begun, time.get_clock_info("perf_counter").resolution) * 1e3


def time_interleaved(calls, device, budget_s):
    """Median, 20th and 80th percentile of the milliseconds of each call, taken in turns after a warm-up; and the median of the
    milliseconds that processors have worked on it, on all threads, which others on the machine do not add to.

    Where a call takes more than `SLOW_MS`, its first one here counts: it was called before. Rounds are as many as fit into the
    budget, and at least those of `ROUNDS`.
    """
    samples, worked, turn = {name: [] for name in calls}, {name: [] for name in calls}, 0.0
    for name, call in calls.items():
        for _ in range(4):
            begun = worked_s()
            ms = time_once(call, device)
            if ms > SLOW_MS:
                samples[name].append(ms)
                worked[name].append((worked_s() - begun) * 1e3)
                break
        turn += ms / 1e3
    least = [rounds for seconds, rounds in ROUNDS if turn >= seconds][-1]
    rounds = int(min(50, max(least, budget_s / max(turn, 1e-6))))
    for _ in range(rounds - all(samples.values())):
        for name, call in calls.items():
            begun = worked_s()
            samples[name].append(time_once(call, device))
            worked[name].append((worked_s() - begun) * 1e3)
    return {name: (statistics.median(s), *spread(s), statistics.median(worked[name])) for name, s in samples.items()}


def worked_s():
    """Seconds that processors have worked for this process and for those that it has started and waited for."""
    times = os.times()
    return time.process_time() + times.children_user + times.children_system


def spread(samples):
    """20th and 80th percentile; of one sample, itself."""
    if len(samples) == 1:
        return samples * 2
    return [statistics.quantiles(samples, n=5)[i] for i in (0, 3)]


def check_room(nbytes):
    """Raises OutOfMemoryError where less than that is left on this machine: Linux would end the process in the middle of it."""
    info = pathlib.Path("/proc/meminfo")
    left = re.search(r"MemAvailable:\s*(\d+) kB", info.read_text()) if info.exists() else None
    if left and int(left.group(1)) * 1024 < nbytes:
        raise torch.OutOfMemoryError


class Resident:
    """Memory of this process, in MiB, as Linux counts it: what lies in pages, whoever has allocated it.

    What the C library keeps of memory that was freed is given back first: it would hide what the next call takes.
    """

    @staticmethod
    def now():
        """What there is, or None where the system does not tell."""
        gc.collect()
        try:
            ctypes.CDLL(None).malloc_trim(0)
        except (OSError, AttributeError, TypeError):
            pass  # another C library
        return Resident._read("VmRSS")

    @staticmethod
    def highest(call):
        """The most that there was while ``call`` ran, or None; it is called in either case."""
        try:
            pathlib.Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
        except OSError:
            call()
            return None
        call()
        return Resident._read("VmHWM")

    @staticmethod
    def _read(name):
        try:
            found = re.search(rf"{name}:\s*(\d+) kB", pathlib.Path("/proc/self/status").read_text())
        except OSError:
            return None
        return int(found.group(1)) / 1024 if found else None


def peak_extra_mib(call, device):
    """MiB that one call allocates at most, beyond what is there before it; None where the system does not tell."""
    if device.type != "cuda":
        before, highest = Resident.now(), Resident.highest(call)
        return None if before is None or highest is None else max(0.0, highest - before)
    synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def ceilings(device):
    """What this machine reaches: bytes/s of a large copy (read + write) and FLOP/s of a large matrix product."""
    gpu = device.type == "cuda"
    source = torch.randn((2**30 if gpu else 2**27) // 4, device=device)
    target = torch.empty_like(source)
    n, dtype = (8192, torch.bfloat16) if gpu else (1024, torch.float32)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    times = time_interleaved(
        {"copy": lambda: target.copy_(source), "gemm": lambda: torch.mm(a, b, out=out)}, device, budget_s=2
    )
    return {
        "copy_bytes_per_s": 2 * source.nbytes / times["copy"][0] * 1e3,
        "gemm_flop_per_s": 2 * n**3 / times["gemm"][0] * 1e3,
    }


def datasheet(name):
    """What the maker says of a card, as text beside its measured ceilings: "" of one that `soul.plan` does not know."""
    words = name.lower().replace("-", " ").split()
    for known, card in DATASHEETS.items():
        if set(known.split("-")) <= set(words) and "pcie" not in words:  # a slower card of the same name
            return {"copy": f" (datasheet {card.bandwidth / 1e9:.0f})", "gemm": f" (datasheet {card.flops / 1e12:.0f})"}
    return {"copy": "", "gemm": ""}


def environment(device):
    """Card or CPU, driver, clocks now and at most, versions of torch, Triton, and the peers that are there; commit, date."""
    gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if gpu else cpu_model(),
        "kind": device.type,
        "driver": _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if gpu else None,
        "clocks": _run("nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv,noheader") if gpu else None,
        "cpu": cpu_model() if gpu else None,
        "threads": None if gpu else str(torch.get_num_threads()),
        "cores": None if gpu else cores(),
        "vector": None if gpu else torch.backends.cpu.get_cpu_capability(),
        "load": None if gpu else load(),  # of the machine when the run began
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # with the CUDA that it was built for, which its package's version may not tell
        **{package: version(package) for package in ("triton", *PEERS)},
        "commit": _run("git", "describe", "--always", "--dirty"),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def version(package):
    """Version of an installed package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_model():
    """The name of the processor."""
    info = pathlib.Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", info.read_text()) if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def cores():
    """How many processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load():
    """Processes that ran or waited for a processor, on average over the last minute, this one among them; or None."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _run(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None


def start(name, make):
    """Makes a variant and calls it once: the callable, or None and the reason why it does not run here. Ours must."""
    try:
        call = make()
        if not getattr(call, "called", False):
            call()
        return call, None
    except Exception as error:  # a variant that does not run here is a line, not a crash: the others are not to be lost
        if name.startswith("ours"):
            return None, WRONG + failure(error)
        if isinstance(error, ModuleNotFoundError):
            return None, f"{error.name}: not installed"
        return None, f"did not run: {type(error).__name__}: {str(error).strip().partition(chr(10))[0][:80]}"


def failure(error):
    """Why something of ours has no time, as a line; the traceback of what is no failed check goes to stderr.

    Raises:
        OutOfMemoryError, MissingExtra: where that is the error; nothing is wrong then.
    """
    if isinstance(error, (torch.OutOfMemoryError, MissingExtra)):
        raise error
    if isinstance(error, AssertionError):
        return str(error)
    traceback.print_exception(error)
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def measure(variants, device, budget_s):
    """Makes variants and times them in turns.

    Returns:
        Name -> dict of ``ms``, ``ms_p20``, ``ms_p80``, ``processor_ms`` (on a CPU), ``extra_mib`` (of a call), ``peak_mib``
        (since before it was made; on a GPU of all, since before the first was made) and, where the callable has them, what its
        attribute ``told`` and its method ``phases`` tell, this not where a step takes as long as the last of `ROUNDS`; or of
        ``reason`` alone, why it did not run. A callable that was called while it was made says so by its attribute ``called``.
    """
    gpu = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if gpu else 0
    started, found = {}, {}
    for name, make in variants.items():
        held = None if gpu else Resident.now()
        started[name] = call, _ = start(name, make)
        if call and not gpu:
            there = Resident.now()
            extra = peak_extra_mib(call, device)
            found[name] = {"extra_mib": extra, "peak_mib": None if extra is None else there - held + extra}
    calls = {name: call for name, (call, _) in started.items() if call}
    highest = torch.cuda.max_memory_allocated(device) if gpu else 0  # so far; a CUDA graph is captured by now
    if gpu:
        found = {name: {"extra_mib": peak_extra_mib(call, device)} for name, call in calls.items()}
    for name, (median, low, high, *worked) in time_interleaved(calls, device, budget_s).items() if calls else ():
        found[name] = {"ms": median, "ms_p20": low, "ms_p80": high, **found[name]}
        if worked and not gpu:
            (found[name]["processor_ms"],) = worked
        if gpu:
            found[name]["peak_mib"] = (max(highest, torch.cuda.max_memory_allocated(device)) - before) / 2**20
        found[name] |= getattr(calls[name], "told", {})
        phases = getattr(calls[name], "phases", None)
        if phases is not None and median < 1e3 * ROUNDS[-1][0] and (told := phases()):
            found[name]["phases"] = told
    return found | {name: {"reason": reason} for name, (_, reason) in started.items() if reason}


def run_case(case, device, limits, budget_s):
    """Checks a case, times it, prints its rows; returns them as dicts. Rows of what did not run say why."""
    forget_compiled()
    errors = case.check()
    each = errors.keys() <= case.variants.keys()  # an error, or a dict of them, for a name
    print(f"\n{case.name}   " + ("" if each else _text(errors)))
    free(device)
    measured = {name: {"reason": WRONG + told} for name, told in errors.items() if isinstance(told, str)}
    right = {name: make for name, make in case.variants.items() if name not in measured}
    for variants in [{name: make} for name, make in right.items()] if case.alone else [right]:
        if case.alone and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        try:
            measured |= measure(variants, device, budget_s)
        except torch.OutOfMemoryError:
            if not case.alone:
                raise
            measured |= {name: {"reason": "does not fit into the memory of this device"} for name in variants}
        free(device)
    width = max(34, *(len(name) + 2 for name in measured))
    rows = []
    for name, found in measured.items():
        row = {"case": case.name, "variant": name, **found, **({"at": case.at} if case.at else {})}
        rows.append(row)
        if "reason" in found:
            print(f"  {name:<{width}}{found['reason']}")
            continue
        if not (case.alone or case.own_memory):
            del row["peak_mib"]  # of all variants together
        row |= case.rates(name, row["ms"], limits)
        if "ms" in measured.get(case.floor, {}):
            row["percent_of_floor"] = 100 * row["ms"] / measured[case.floor]["ms"]
        if each and name in errors:
            row["errors"] = errors[name]
        elif not each and name.startswith("ours"):
            row["errors"] = errors
        print(f"  {name:<{width}}{_line(row, case.floor)}", flush=True)
        if "phases" in row:
            print(f"  {'':<{width}}  " + "  ".join(f"{phase} {ms:.2f} ms" for phase, ms in row["phases"].items()))
        if each and name in errors:
            print(f"  {'':<{width}}  errors: {_text(errors[name])}")
    return rows


def _line(row, floor):
    """What a row says, but its name, phases and errors."""
    line = f"{row['ms']:10.3f} ms  ({row['ms_p20']:.3f} to {row['ms_p80']:.3f})"
    if "processor_ms" in row:
        line += f"  {row['processor_ms']:10.3f} of processors"
    if "percent_of_floor" in row:
        line += f"  {row['percent_of_floor']:6.1f}% of {floor}"
    if "gb_per_s" in row:
        line += f"  {row['gb_per_s']:8.0f} GB/s  {row['percent_of_copy']:6.1f}% of copy"
    if "tflop_per_s" in row:
        line += f"  {row['tflop_per_s']:8.1f} TFLOP/s  {row['percent_of_gemm']:6.1f}% of GEMM"
    if "tokens_per_s" in row:
        line += f"  {row['tokens_per_s']:8.0f} tokens/s"
    if "model_ms" in row:
        line += f"  {row['times_model']:6.2f}x its bytes and FLOPs ({row['model_ms']:.3f} ms)"
    if row.get("peak_mib") is not None:
        line += f"  {row['peak_mib'] / 1024:8.2f} GiB at most"
    elif row["extra_mib"] is not None:
        line += f"  {row['extra_mib']:8.0f} MiB"
    return line


def cost(row):
    """Milliseconds: of one thread those that it has worked, which others on the machine do not add to; elsewhere the wall's."""
    return row["processor_ms"] if row.get("threads") == 1 and "processor_ms" in row else row.get("ms")


def compiled(function):
    """``torch.compile`` for the shapes of one case: those of the case before would have it compile for any shape."""
    return torch.compile(function, dynamic=False)


def forget_compiled():
    """Drops what cases before have compiled: a process compiles a function a few times only, and then runs it eagerly."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def free(device):
    """Gives unused memory of a GPU back."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def _text(errors):
    return "  ".join(f"{name} {value:.1e}" for name, value in errors.items())

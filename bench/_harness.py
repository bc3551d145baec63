"""Timing, ceilings, environment, and the table: shared by all benchmarks.

A time is wall time from an idle device to an idle device, host work included, in milliseconds: the median over rounds in
which all variants of a case take turns, so that clocks and temperature treat them alike.

How it works: a benchmark module yields functions that each make one `Case`. `run_case` checks the case, `measure` makes its
variants (`start`), notes their memory (`peak_extra_mib`) and times them (`time_interleaved`), and `run_case` turns the numbers
into rows. A row is a dict, written to JSON as it is: its keys are read by `bench.targets`, `bench.compare` and the pictures,
and results of earlier runs have them too, so a key may be added but not renamed.
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
from collections.abc import Callable, Mapping
from typing import Any

import torch

import soul
from soul._extras import MissingExtra
from soul.plan.cards import DATASHEETS

# Packages of the extra "peers", and those that each need a command of their own.
PEERS = (
    "torch-optimi", "flashoptim", "torchao", "bitsandbytes", "pytorch-optimizer", "liger-kernel", "cut-cross-entropy",
    "quack-kernels", "nvidia-cutlass-dsl", "transformer-engine", "apex", "dion",
)  # fmt: skip
_EXTRA = "'soul-kernels[peers]'"
# Module that a peer imports -> what pip installs it from. A package "apex" that pip finds by that name is another one.
INSTALLED_BY = dict.fromkeys(
    (
        "optimi", "flashoptim", "torchao", "bitsandbytes", "pytorch_optimizer", "liger_kernel", "cut_cross_entropy", "quack",
        "cutlass", "cuda",
    ),
    _EXTRA,
) | {
    "transformer_engine": "--no-build-isolation 'transformer-engine[pytorch]'",
    "transformer_engine_torch": "--no-build-isolation 'transformer-engine[pytorch]'",
    "apex": "--no-build-isolation git+https://github.com/NVIDIA/apex, with APEX_CPP_EXT=1 APEX_CUDA_EXT=1",
    "dion": "git+https://github.com/microsoft/dion",
}  # fmt: skip
CLOCKS = "clocks.sm,clocks.max.sm,clocks.mem,clocks.max.mem"
WRONG = "wrong, not timed: "  # begins the reason of a variant of ours that has no time
SLOW_MS = 1e3  # a call that takes longer needs no more warm-up than the calls that came before
ROUNDS = ((0.0, 5), (5.0, 3), (60.0, 1))  # from so many seconds a round on, at least so many rounds

Call = Callable[[], object]  # what is timed
Row = dict[str, Any]  # of JSON values: numbers, texts, lists and dicts of them
Limits = Mapping[str, float]  # the ceilings of this machine, by name
Errors = Mapping[str, Any]  # error by name; or by variant a dict of them, or a text where the variant is wrong


@dataclasses.dataclass
class Case:
    """One row group of a table.

    Attributes:
        name: what is computed, on what.
        variants: name -> function that allocates and returns the callable to time. Names of ours begin with "ours".
        check: function without arguments, which runs before any timing. It returns the errors of our result by name; or, by
            variant, the errors of every variant that runs here, with a text in place of the errors of a variant of ours that is
            wrong. It raises AssertionError where our result is wrong, and only then: what a peer does is reported.
        bytes: that one call must move, or None; by the name of the variant where they differ.
        flops: that one call must do, or None.
        floor: name of the variant that does nothing but what all must do: times are also given in percent of its own. Or None.
        default: runs without being asked for by name.
        tokens: that one call learns from, without padding, or None.
        model: name of a variant -> (FLOPs, bytes) of a call that consists of matrix products and of passes over memory: the
            time of both at the ceilings, one after the other, stands beside the measured one. Or None.
        alone: every variant is made, measured and dropped before the next one is made, instead of all taking turns: for
            variants so large that each needs the device for itself, and a peak of its own.
        at: sizes, name -> number, for `bench.scaling`; they go into every row.
        own_memory: every variant holds its own parameters and states, so that it has a peak also where all take turns (CPU).
        once: on a CPU runs only with the most threads of a run, for what takes long or has no threads.
    """

    name: str
    variants: Mapping[str, Callable[[], Any]]  # what they return is called, and may have attributes: see `measure`
    check: Callable[[], Errors]
    bytes: float | Mapping[str, float] | None = None
    flops: float | None = None
    floor: str | None = None
    default: bool = True
    tokens: int | None = None
    model: Mapping[str, tuple[float, float]] | None = None
    alone: bool = False
    at: dict[str, int] = dataclasses.field(default_factory=dict)
    own_memory: bool = False
    once: bool = False

    def keep(self, pattern: re.Pattern[str]) -> None:
        """Drop the variants whose names do not match, but for the floor.

        Most checks then look at the others alone; errors of those that a check needs all the same are left out.
        """
        check = self.check
        dropped = {name for name in self.variants if not pattern.search(name) and name != self.floor}
        self.variants = {name: make for name, make in self.variants.items() if name not in dropped}
        self.check = lambda: {name: error for name, error in check().items() if name not in dropped}

    def rates(self, variant: str, ms: float, limits: Limits) -> Row:
        """Return rates, and percentages of what this machine reaches, for a time of ``ms``."""
        rates = {}
        moved = self.bytes.get(variant) if isinstance(self.bytes, Mapping) else self.bytes
        if moved:
            rates["gb_per_s"] = moved / ms / 1e6
            rates["percent_of_copy"] = 100 * moved / (ms / 1e3) / limits["copy_bytes_per_s"]
        if self.flops:
            rates["tflop_per_s"] = self.flops / ms / 1e9
            rates["percent_of_gemm"] = 100 * self.flops / (ms / 1e3) / limits["gemm_flop_per_s"]
        if self.tokens:
            rates["tokens_per_s"] = self.tokens / (ms / 1e3)
        if self.model and variant in self.model:
            flops, moved = self.model[variant]
            rates["model_flops"] = flops
            rates["model_bytes"] = moved
            rates["model_ms"] = 1e3 * (flops / limits["gemm_flop_per_s"] + moved / limits["copy_bytes_per_s"])
            rates["times_model"] = ms / rates["model_ms"]
        return rates


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_once(call: Call, device: torch.device) -> float:
    """Return the milliseconds of one call, from idle to idle; at least the resolution of the clock."""
    synchronize(device)
    begun = time.perf_counter()
    call()
    synchronize(device)
    return max(time.perf_counter() - begun, time.get_clock_info("perf_counter").resolution) * 1e3


def time_interleaved(calls: Mapping[str, Call], device: torch.device, budget_s: float) -> dict[str, tuple[float, ...]]:
    """Time calls in turns, after a warm-up.

    Where a call takes more than `SLOW_MS`, its first call here counts, because it was called before. There are as many rounds
    as fit into the budget, and at least those of `ROUNDS`.

    Returns:
        For every call the median, the 20th and the 80th percentile of its milliseconds; and the median of the milliseconds that
        processors worked on it, on all threads, to which other processes on the machine do not add.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    worked: dict[str, list[float]] = {name: [] for name in calls}
    round_s = 0.0
    for name, call in calls.items():
        for _ in range(4):
            begun = worked_s()
            ms = time_once(call, device)
            if ms > SLOW_MS:
                samples[name].append(ms)
                worked[name].append((worked_s() - begun) * 1e3)
                break
        round_s += ms / 1e3
    least = [rounds for seconds, rounds in ROUNDS if round_s >= seconds][-1]
    rounds = int(min(50, max(least, budget_s / max(round_s, 1e-6))))
    for _ in range(rounds - all(samples.values())):
        for name, call in calls.items():
            begun = worked_s()
            samples[name].append(time_once(call, device))
            worked[name].append((worked_s() - begun) * 1e3)
    return {name: (statistics.median(s), *spread(s), statistics.median(worked[name])) for name, s in samples.items()}


def worked_s() -> float:
    """Return the processor seconds of this process and of those that it started and waited for."""
    times = os.times()
    return time.process_time() + times.children_user + times.children_system


def spread(samples: list[float]) -> list[float]:
    """Return the 20th and the 80th percentile; a single sample is both."""
    if len(samples) == 1:
        return samples * 2
    return [statistics.quantiles(samples, n=5)[i] for i in (0, 3)]


def check_room(nbytes: float) -> None:
    """Raise OutOfMemoryError where this machine has fewer bytes left: Linux would kill the process while it allocates."""
    info = pathlib.Path("/proc/meminfo")
    left = re.search(r"MemAvailable:\s*(\d+) kB", info.read_text()) if info.exists() else None
    if left and int(left.group(1)) * 1024 < nbytes:
        raise torch.OutOfMemoryError


class Resident:
    """Resident memory of this process in MiB, as Linux counts it: all pages, whoever allocated them.

    Freed memory that the C library still holds is given back first; otherwise it would hide what the next call takes.
    """

    @staticmethod
    def now() -> float | None:
        """Return the resident memory, or None where the system does not say."""
        gc.collect()
        try:
            ctypes.CDLL(None).malloc_trim(0)
        except (OSError, AttributeError, TypeError):
            pass  # another C library
        return Resident._read("VmRSS")

    @staticmethod
    def highest(call: Call) -> float | None:
        """Run ``call`` and return the peak of the resident memory meanwhile, or None where the system does not say."""
        try:
            pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        except OSError:
            call()
            return None
        call()
        return Resident._read("VmHWM")

    @staticmethod
    def _read(name: str) -> float | None:
        try:
            line = re.search(rf"{name}:\s*(\d+) kB", pathlib.Path("/proc/self/status").read_text())
        except OSError:
            return None
        return int(line.group(1)) / 1024 if line else None


def peak_extra_mib(call: Call, device: torch.device) -> float | None:
    """Run ``call`` and return the MiB that it allocates at most beyond what was allocated before, or None if unknown."""
    if device.type != "cuda":
        before = Resident.now()
        highest = Resident.highest(call)
        return None if before is None or highest is None else max(0.0, highest - before)
    synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def ceilings(device: torch.device) -> dict[str, float]:
    """Measure what this machine reaches: bytes/s of a large copy (read + write) and FLOP/s of a large matrix product."""
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


def datasheet(name: str) -> dict[str, str]:
    """Return the rates of a card's datasheet as text to print beside the ceilings; "" if `soul.plan` does not know the card."""
    words = name.lower().replace("-", " ").split()
    for known, card in DATASHEETS.items():
        if set(known.split("-")) <= set(words) and "pcie" not in words:  # a slower card of the same name
            return {"copy": f" (datasheet {card.bandwidth / 1e9:.0f})", "gemm": f" (datasheet {card.flops / 1e12:.0f})"}
    return {"copy": "", "gemm": ""}


def environment(device: torch.device) -> Row:
    """Return what a run depends on: card or CPU, driver, clocks, versions of torch, Triton and the peers, commit, date."""
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
        "torch": str(torch.__version__),  # names the CUDA that it was built for, which the package's version may not
        **{package: version(package) for package in ("triton", *PEERS)},
        "commit": commit_of(library().parent),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def library() -> pathlib.Path:
    """Return the folder of the package `soul` that is measured, links resolved."""
    (folder,) = soul.__path__
    return pathlib.Path(folder).resolve()


def commit_of(folder: pathlib.Path) -> str | None:
    """Return the commit of a checkout, with "-dirty" where it was changed; None where the folder is not the root of one."""
    if _run("git", "-C", str(folder), "rev-parse", "--show-toplevel") != str(folder):
        return None
    return _run("git", "-C", str(folder), "describe", "--always", "--dirty")


def version(package: str) -> str | None:
    """Return the version of an installed package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_model() -> str:
    """Return the name of the processor."""
    info = pathlib.Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", info.read_text()) if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def cores() -> int:
    """Return how many processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load() -> float | None:
    """Return how many processes ran or waited for a processor on average over the last minute, this one included; or None."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _run(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None


def start(name: str, make: Callable[[], Any]) -> tuple[Any, str | None]:
    """Make a variant and call it once.

    Returns:
        The callable and None; or None and the reason why the variant does not run here, which for ours means that it is wrong.
    """
    try:
        call = make()
        if not getattr(call, "called", False):
            call()
        return call, None
    except Exception as error:  # a variant that does not run is a line of the table; the others are still measured
        if name.startswith("ours"):
            return None, WRONG + failure(error)
        missing = error if isinstance(error, ModuleNotFoundError) else error.__cause__  # a library may say it in its own words
        if isinstance(error, ImportError) and isinstance(missing, ModuleNotFoundError):
            command = INSTALLED_BY.get(str(missing.name).partition(".")[0])
            return None, f"{missing.name}: not installed" + (f"; run: pip install {command}" if command else "")
        return None, f"did not run: {type(error).__name__}: {str(error).strip().partition(chr(10))[0][:80]}"


def failure(error: Exception) -> str:
    """Return in one line why a variant of ours has no time; print the traceback to stderr unless a check failed.

    Raises:
        OutOfMemoryError, MissingExtra: where that is the error, because then nothing is wrong.
    """
    if isinstance(error, (torch.OutOfMemoryError, MissingExtra)):
        raise error
    if isinstance(error, AssertionError):
        return str(error)
    traceback.print_exception(error)
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def measure(variants: Mapping[str, Callable[[], Any]], device: torch.device, budget_s: float) -> dict[str, Row]:
    """Make variants and time them in turns.

    A callable may have attributes: ``row_fields``, a dict that goes into its row; ``phases``, a method that returns
    milliseconds by phase, not called where a step takes as long as the last of `ROUNDS`; ``called``, true where it was called
    while it was made.

    Returns:
        Name -> dict of ``ms``, ``ms_p20``, ``ms_p80``, ``processor_ms`` (on a CPU), ``extra_mib`` (of a call), ``peak_mib``
        (since before the variant was made; on a GPU of all, since before the first was made), the callable's ``row_fields`` and
        ``phases``; or of ``reason`` alone, why it did not run.
    """
    gpu = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if gpu else 0
    calls: dict[str, Any] = {}
    reasons: dict[str, Row] = {}
    measured: dict[str, Row] = {}
    for name, make in variants.items():
        held = None if gpu else Resident.now()
        call, reason = start(name, make)
        if reason is not None:
            reasons[name] = {"reason": reason}
            continue
        calls[name] = call
        if not gpu:
            made = Resident.now()
            extra = peak_extra_mib(call, device)
            measured[name] = {"extra_mib": extra, "peak_mib": None}
            if held is not None and made is not None and extra is not None:
                measured[name]["peak_mib"] = made - held + extra
    highest = torch.cuda.max_memory_allocated(device) if gpu else 0  # so far; a CUDA graph is captured by now
    if gpu:
        measured = {name: {"extra_mib": peak_extra_mib(call, device)} for name, call in calls.items()}
    for name, (median, low, high, *worked) in time_interleaved(calls, device, budget_s).items() if calls else ():
        row = measured[name] = {"ms": median, "ms_p20": low, "ms_p80": high, **measured[name]}
        if worked and not gpu:
            (row["processor_ms"],) = worked
        if gpu:
            row["peak_mib"] = (max(highest, torch.cuda.max_memory_allocated(device)) - before) / 2**20
        row |= getattr(calls[name], "row_fields", {})
        phases = getattr(calls[name], "phases", None)
        if phases is not None and median < 1e3 * ROUNDS[-1][0] and (ms_by_phase := phases()):
            row["phases"] = ms_by_phase
    return measured | reasons


def run_case(case: Case, device: torch.device, limits: Limits, budget_s: float) -> list[Row]:
    """Check a case, time it, print its rows and return them; the row of a variant that did not run has a ``reason``."""
    forget_compiled()
    errors = case.check()
    each = errors.keys() <= case.variants.keys()  # errors are by variant
    print(f"\n{case.name}   " + ("" if each else _text(errors)))
    free(device)
    measured: dict[str, Row] = {name: {"reason": WRONG + reason} for name, reason in errors.items() if isinstance(reason, str)}
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
    for name, fields in measured.items():
        row = {"case": case.name, "variant": name, **fields, **({"at": case.at} if case.at else {})}
        rows.append(row)
        if "reason" in row:
            print(f"  {name:<{width}}{row['reason']}")
            continue
        if not (case.alone or case.own_memory):
            del row["peak_mib"]  # of all variants together
        row |= case.rates(name, row["ms"], limits)
        if case.floor is not None and "ms" in measured.get(case.floor, {}):
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


def _line(row: Row, floor: str | None) -> str:
    """Return the text of a row without its name, phases and errors."""
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


def cost(row: Row) -> float | None:
    """Return the milliseconds by which a row is judged.

    With one thread they are those that the processor worked, to which others on the machine do not add; otherwise wall time.
    """
    return row["processor_ms"] if row.get("threads") == 1 and "processor_ms" in row else row.get("ms")


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Apply ``torch.compile`` for the shapes of one case: after another case it would compile for any shape."""
    return torch.compile(function, dynamic=False)


def forget_compiled() -> None:
    """Drop what earlier cases compiled: a process compiles a function only a few times, and then runs it eagerly."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def free(device: torch.device) -> None:
    """Give unused memory of a GPU back."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def _text(errors: Errors) -> str:
    return "  ".join(f"{name} {value:.1e}" for name, value in errors.items())

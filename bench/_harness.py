"""Timing, ceilings, environment, and the table: shared by all benchmarks.

A time is wall time from an idle device to an idle device, host work included, in milliseconds: the median over rounds in
which all variants of a case take turns, so that clocks and temperature treat them alike.
"""

import dataclasses
import gc
import platform
import statistics
import subprocess
import time

import torch


@dataclasses.dataclass
class Case:
    """One row group of a table.

    Attributes:
        name: what is computed, on what.
        variants: name -> function that allocates and returns the callable to time. The first one is ours.
        check: () -> dict of errors by name; raises AssertionError where our result is wrong. Runs before any timing.
        bytes: that one call must move, or None.
        flops: that one call must do, or None.
    """

    name: str
    variants: dict
    check: object
    bytes: float | None = None
    flops: float | None = None


def synchronize(device):
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_once(call, device):
    """Milliseconds of one call, from idle to idle."""
    synchronize(device)
    begun = time.perf_counter()
    call()
    synchronize(device)
    return (time.perf_counter() - begun) * 1e3


def time_interleaved(calls, device, budget_s):
    """Median, 20th and 80th percentile of the milliseconds of each call, taken in turns after a warm-up."""
    for call in calls.values():
        for _ in range(3):
            call()
    turn = sum(time_once(call, device) for call in calls.values()) / 1e3
    rounds = int(min(50, max(5, budget_s / max(turn, 1e-6))))
    samples = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            samples[name].append(time_once(call, device))
    return {name: (statistics.median(s), *(statistics.quantiles(s, n=5)[i] for i in (0, 3))) for name, s in samples.items()}


def peak_extra_mib(call, device):
    """MiB that one call allocates at most, beyond what is there before it."""
    if device.type != "cuda":
        return None
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


def environment(device):
    """Card, driver, versions and commit."""
    found = {
        "device": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
        found["driver"] = _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    else:
        found["threads"] = torch.get_num_threads()
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        found["triton"] = None
    found["commit"] = _run("git", "rev-parse", "--short", "HEAD")
    return found


def _run(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None


def run_case(case, device, limits, budget_s):
    """Checks a case, times it, prints its rows; returns them as dicts."""
    errors = case.check()
    print(f"\n{case.name}   " + "  ".join(f"{k} {v:.1e}" for k, v in errors.items()))
    calls, missing = {}, {}
    for name, make in case.variants.items():
        try:
            calls[name] = make()
            calls[name]()
        except Exception as error:  # a peer that does not run here is a line, not a crash
            if name == next(iter(case.variants)):
                raise
            calls.pop(name, None)
            missing[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:80] if str(error) else ''}"
    memory = {name: peak_extra_mib(call, device) for name, call in calls.items()}
    rows = []
    for name, (median, low, high) in time_interleaved(calls, device, budget_s).items():
        row = {
            "case": case.name,
            "variant": name,
            "ms": median,
            "ms_p20": low,
            "ms_p80": high,
            "extra_mib": memory[name],
        }
        line = f"  {name:<34}{median:10.3f} ms  ({low:.3f} to {high:.3f})"
        if case.bytes:
            row["percent_of_copy"] = 100 * case.bytes / (median / 1e3) / limits["copy_bytes_per_s"]
            line += f"  {case.bytes / median / 1e6:8.0f} GB/s  {row['percent_of_copy']:6.1f}% of copy"
        if case.flops:
            row["percent_of_gemm"] = 100 * case.flops / (median / 1e3) / limits["gemm_flop_per_s"]
            line += f"  {case.flops / median / 1e9:8.1f} TFLOP/s  {row['percent_of_gemm']:6.1f}% of GEMM"
        if memory[name] is not None:
            line += f"  {memory[name]:8.0f} MiB"
        rows.append(row | ({"errors": errors} if name == next(iter(case.variants)) else {}))
        print(line, flush=True)
    for name, reason in missing.items():
        print(f"  {name:<34} did not run: {reason}")
    del calls
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return rows

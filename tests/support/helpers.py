import functools
import importlib
import importlib.util
import pathlib

import pytest
import torch

from soul_kernels import Head, LinearOptions, Reference
from soul_kernels.backends import runs_on_cpu

# Of tests that run kernels on models and tensors of the CPU. On a GPU the ops' own tests run them.
needs_kernels_on_cpu = pytest.mark.skipif(not runs_on_cpu(), reason="kernels do not run on the CPU here")
needs_rouge = pytest.mark.skipif(importlib.util.find_spec("rouge_score") is None, reason="the extra eval is not installed")


def loose(op):
    """An op ``linear_*`` that takes the fields of its bundles as keywords, by which a test varies one of them at a time:
    ``logit_scale`` and ``softcap`` of the head, ``ref_hidden``, ``ref_weight`` and ``ref_bias``, and those of `LinearOptions`.
    """

    def popped(keywords, names, prefix=""):
        return {name: keywords.pop(prefix + name) for name in names if prefix + name in keywords}

    @functools.wraps(op)
    def call(*args, **keywords):
        if options := popped(keywords, LinearOptions._fields):
            keywords["options"] = LinearOptions(**options)
        if transform := popped(keywords, ("logit_scale", "softcap", "own_tokens")):
            keywords["weight"] = Head(keywords["weight"], keywords.pop("bias", None), **transform)
        if reference := popped(keywords, Reference._fields, "ref_"):
            keywords["reference"] = Reference(**{"hidden": None} | reference)
        return op(*args, **keywords)

    return call


def relative_error(got, want):
    """||got - want|| / ||want|| in fp64; NaN anywhere is an infinite error."""
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    assert got.shape == want.shape, f"shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    if not torch.isfinite(got).all():
        return float("inf")
    norm = want.norm().item()
    return (got - want).norm().item() / norm if norm else got.norm().item()


def assert_close(got, want, tolerance, what):
    error = relative_error(got, want)
    assert error <= tolerance, f"{what}: relative error {error:.2e} > {tolerance:.0e}"


def assert_rows_close(got, want, tolerance, what, terms=None):
    """Check the worst row of a matrix; a whole-matrix norm hides one wrong row among many.

    ``terms``: sizes [rows] of what the rows are differences of. Of a row in which nearly all cancels, only these tell how far
    rounding may take it.
    """
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    floor = want.norm(dim=-1).mean().item() * 1e-3  # rows that are zero but for rounding
    sizes = want.norm(dim=-1) + (0 if terms is None else terms.detach().cpu())
    errors = (got - want).norm(dim=-1) / sizes.clamp(min=floor + 1e-300)
    worst = int(errors.argmax())
    assert errors.max() <= tolerance, f"{what}: row {worst} has relative error {errors.max():.2e} > {tolerance:.0e}"


def mutant(name, old, new, tmp_path, more=""):
    """Return a copy of the module ``name`` with ``old`` replaced by ``new``, a fault that a test must notice.

    ``more``: source that is added at its end, such as that of a kernel that calls the module's functions.

    The copy must be a valid program that computes something else. One that reads out of bounds, or whose threads race, need not
    be wrong on every machine, and stops the tests where memory is checked.
    """
    source = pathlib.Path(importlib.import_module(name).__file__).read_text()
    if old not in source:  # not an AssertionError, which the caller takes for a mutant that was caught
        raise LookupError(f"{name} no longer contains {old!r}: update the mutation")
    path = tmp_path / "mutant.py"
    path.write_text(source.replace(old, new) + more)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    return copy


def peak_bytes(call, device):
    """Return the peak of bytes that ``call`` allocates beyond those allocated before, without numpy's in the interpreter."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    now = peak = 0
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak

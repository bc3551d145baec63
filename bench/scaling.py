"""How cost grows: the linear loss with tokens N, vocabulary V and width D; the optimizer's step with parameters and tensors.

One size varies at a time. Printed for each series are the slope in log-log (1: the cost is proportional) and the straight line
through the times, whose intercept is the cost of a call however small the work is. Beside every time stands that of a model:
FLOPs at the ceiling of matrix products plus bytes at that of a copy. The error of the model is printed at the end.
"""

import functools
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from bench import _heads, bench_sophia_step
from bench._harness import Case, Limits, Row
from soul import SOUL

MIN_POINTS = 3  # of a series: a line through two always fits
GPU: dict[str, Any] = {
    "loss": (4096, 2048, 128256),
    "N": (512, 1024, 2048, 8192, 16384),
    "D": (1024, 4096),
    "V": (16032, 32064, 64128),
    "params": [2**k for k in (18, 20, 22, 24, 26, 28, 30)],
    "tensors": (2**24, (4, 16, 64, 256, 1024, 4096)),
}
CPU: dict[str, Any] = {
    "loss": (128, 64, 1000),
    "N": (64, 256),
    "D": (32, 128),
    "V": (500, 2000),
    "params": [2**k for k in (12, 14, 16, 18)],
    "tensors": (2**16, (4, 16, 64)),
}
QUICK: dict[str, Any] = {
    "loss": (32, 16, 200),
    "N": (16, 64),
    "D": (8, 32),
    "V": (100, 400),
    "params": [2**k for k in (8, 10, 12)],
    "tensors": (2**12, (2, 4, 8)),
}


def loss_case(n: int, d: int, n_vocab: int, device: torch.device) -> Case:
    """Make the case of cross-entropy with a trained head, ours beside the bare matrix products."""
    case = _heads.make_case("CE", n, d, n_vocab, False, {"ours": lambda: _heads.ours("CE")}, device, op="linear loss")
    assert case.flops is not None
    case.once = True  # a series is of one number of threads
    # Logits in fp32 are read twice, and their gradient is written once, in 16 bits on a GPU.
    case.model = {"ours": (case.flops, n * n_vocab * (4 + 4 + (2 if device.type == "cuda" else 4)))}
    return case


def step_case(n_params: int, n_tensors: int, device: torch.device, quick: bool) -> Case:
    """Make the case of a step of SOUL in its defaults, on tensors of equal size."""
    shapes: list[bench_sophia_step.Shape] = [(n_params // n_tensors,)] * n_tensors
    name = f"{n_params:,} parameters in {n_tensors:,} tensor{'s' if n_tensors > 1 else ''}"
    case = bench_sophia_step.make_case(name, SOUL, [{}], shapes, device, torch.bfloat16, quick)
    assert isinstance(case.bytes, Mapping)
    case.at = {"params": n_params, "tensors": n_tensors}
    case.once = True
    case.model = {variant: (0, moved) for variant, moved in case.bytes.items()}
    return case


def cases(device: torch.device, quick: bool) -> Iterator[Callable[[], Case]]:
    """Yield functions that make the cases."""
    sizes = GPU if device.type == "cuda" else QUICK if quick else CPU
    n, d, n_vocab = sizes["loss"]
    series = [(n, d, n_vocab), *((x, d, n_vocab) for x in sizes["N"]), *((n, x, n_vocab) for x in sizes["D"])]
    for size in [*series, *((n, d, x) for x in sizes["V"])]:
        yield functools.partial(loss_case, *size, device)
    total, counts = sizes["tensors"]
    for n_params, n_tensors in [*((x, 1) for x in sizes["params"]), *((total, count) for count in counts)]:
        yield functools.partial(step_case, n_params, n_tensors, device, True)


def fit(points: Sequence[tuple[int, float]]) -> dict[str, float]:
    """Fit a line and a power law through (size, ms), both by least squares of the relative error.

    Sizes span decades: with absolute errors, a percent of the largest time would move the intercept by more than a small call
    takes.

    Returns:
        Dict of ``slope`` (in log-log), ``fixed_ms`` and ``ms_per_unit`` (of the straight line), ``from``, ``to``, ``points``.
    """
    sizes, times = zip(*sorted(points))
    power = statistics.linear_regression([math.log(x) for x in sizes], [math.log(t) for t in times])
    # Weights of 1 / t^2 make the squares those of (a + b x - t) / t.
    weights = [t**-2 for t in times]
    x, t = (sum(w * v for w, v in zip(weights, values)) / sum(weights) for values in (sizes, times))
    covariance = sum(w * (size - x) * (time - t) for w, size, time in zip(weights, sizes, times))
    variance = sum(w * (size - x) * (size - x) for w, size in zip(weights, sizes))
    per_unit = covariance / variance
    return {
        "slope": power.slope, "fixed_ms": t - per_unit * x, "ms_per_unit": per_unit,
        "from": sizes[0], "to": sizes[-1], "points": len(sizes),
    }  # fmt: skip


def summary(rows: list[Row], limits: Limits) -> Row | None:
    """Return the fits of every series of at least `MIN_POINTS` sizes, and the error of the model.

    Returns:
        Dict of ``lines``, to be printed; ``fits``, list of dicts of `fit` with ``what`` and ``axis``; ``model_error``, of each
        kind of case the median and the largest of ``|model / measured - 1|``, and that of the case with the longest modelled
        time. Or None where nothing was timed.
    """
    series: dict[tuple[str, str, tuple[tuple[str, int], ...]], list[tuple[int, float]]] = {}
    errors: dict[str, list[tuple[float, float]]] = {}  # of the model: its time, its relative error
    for row in rows:
        if "ms" not in row or not row["variant"].startswith("ours"):
            continue
        what = row["case"].partition(",")[0]
        errors.setdefault(what, []).append((row["model_ms"], abs(row["model_ms"] / row["ms"] - 1)))
        for axis, size in row["at"].items():
            others = tuple((name, value) for name, value in row["at"].items() if name != axis)
            series.setdefault((what, axis, others), []).append((size, row["ms"]))
    if not errors:
        return None
    fits = []
    lines = []
    for (what, axis, others), points in series.items():
        if len(points) >= MIN_POINTS:
            fitted = fit(points)
            fits.append({"what": what, "axis": axis, "others": dict(others), **fitted})
            lines.append(
                f"{what} against {axis} ({', '.join(f'{name} {value:,}' for name, value in others)}; {fitted['from']:,} to "
                f"{fitted['to']:,}): slope {fitted['slope']:.2f} in log-log; {fitted['fixed_ms']:.3g} ms + "
                f"{fitted['ms_per_unit'] * 1e3:.3g} us a unit"
            )
    model_error = {}
    for what, of_kind in errors.items():
        relative = [error for _, error in of_kind]
        _, at_the_largest_size = max(of_kind)
        model_error[what] = {
            "median": statistics.median(relative),
            "largest": max(relative),
            "at_the_largest_size": at_the_largest_size,
        }
    for what, error in model_error.items():
        lines.append(
            f"model of {what} from bytes, FLOPs and ceilings: off by {100 * error['median']:.0f}% (median), "
            f"{100 * error['largest']:.0f}% at most, {100 * error['at_the_largest_size']:.0f}% where there is most to do"
        )
    return {"lines": lines, "fits": fits, "model_error": model_error}

"""The pictures of a study."""

import json
import pathlib
import statistics
from typing import TYPE_CHECKING, Any

from soul._extras import require
from soul.study.config import ARMS, INFLUENCE, OBJECTIVES, Run
from soul.study.fronts import Row, pareto
from soul.study.results import GRID, TITLES, Results
from soul.study.run import Study
from soul_kernels.errors import argument_error

if TYPE_CHECKING:
    import numpy
    from matplotlib.figure import Figure

COLORS = {arm: f"C{index}" for index, arm in enumerate(ARMS)} | {INFLUENCE: "0.35"}
MARKERS = {arm: marker for arm, marker in zip(ARMS, "os^D")} | {INFLUENCE: "x"}


def draw(results: Results, study: Study, directory: pathlib.Path) -> None:
    """Draw ``frontiers.png``, ``utility.png``, ``curves.png`` and ``clipped.png``.

    Args:
        results: `soul.study.results.Results`.
        study: its `soul.study.run.Study`, for the logs of the runs.
        directory: directory to write to.
    """
    require("matplotlib", "plots").use("Agg")
    require("matplotlib.pyplot", "plots")
    _scatter(results, directory / "frontiers.png", "retain_prob", "forget_quality", "retain probability", front=True)
    _scatter(results, directory / "utility.png", "forget_prob", "utility", "forget probability")
    _curves(results, study, directory / "curves.png")
    _clipped(results, study, directory / "clipped.png")


def _panels(rows: int, columns: int, height: float) -> "tuple[Figure, numpy.ndarray]":
    """Return a figure and its panels, an array of [rows, columns]."""
    pyplot = require("matplotlib.pyplot", "plots")
    size = (4.2 * columns, height * rows)
    figure, axes = pyplot.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    return figure, axes


def _save(figure: "Figure", axes: "numpy.ndarray", path: pathlib.Path) -> None:
    """Save a figure with one legend for all panels, below them."""
    handles, labels = axes[0, 0].get_legend_handles_labels()
    columns = min(4, 2 * axes.shape[1])
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=9)
    figure.savefig(path, dpi=80)
    require("matplotlib.pyplot", "plots").close(figure)


def _scatter(results: Results, path: pathlib.Path, x: str, y: str, label: str, front: bool = False) -> None:
    """Draw a panel for each objective: every run faint, and the mean of each grid point over the seeds strong.

    With ``front`` only the Pareto front of the means is drawn, connected by a line, and the retain probability that a chosen
    run must keep is marked.
    """
    count = len(results.objectives)
    figure, axes = _panels(-(-count // 2), min(2, count), 3.4)
    for axis, objective in zip(axes.flat, results.objectives):
        for arm in (*ARMS, INFLUENCE):
            of_arm = objective if arm in ARMS else INFLUENCE
            rows = [row for row in results.rows(of_arm, arm) if x in row]
            style: dict[str, Any] = dict(color=COLORS[arm], marker=MARKERS[arm])
            axis.scatter([row[x] for row in rows], [row[y] for row in rows], s=10, alpha=0.25, linewidths=0.8, **style)
            # A point has a mean over the seeds only if no run of it diverged.
            complete = [runs for runs in results.points(of_arm, arm).values() if len(runs) == len(results.seeds)]
            means = [(statistics.fmean(run[x] for run in runs), statistics.fmean(run[y] for run in runs)) for runs in complete]
            means = pareto(means) if front else means
            axis.plot(*zip(*means) if means else ((), ()), linestyle="-" if front else "", markersize=6, linewidth=1.4,
                      label=TITLES[arm], **style)  # fmt: skip
        for model, marker, name in (("full", "P", "before unlearning"), ("retain", "*", "retain model, the goal")):
            numbers = [results.starts[str(seed)][model] for seed in results.seeds]
            mean_x = statistics.fmean(of_seed[x] for of_seed in numbers)
            mean_y = statistics.fmean(of_seed[y] for of_seed in numbers)
            axis.plot([mean_x], [mean_y], color="black", marker=marker, markersize=10, linestyle="", label=name)
        if front:
            limit = results.config["keep"] * statistics.fmean(results.before(seed)["retain_prob"] for seed in results.seeds)
            axis.axvline(limit, color="0.6", linestyle=":", linewidth=1)
        ylabel = "forget quality, log10 p" if y == "forget_quality" else y
        axis.set(title=OBJECTIVES[objective], xlabel=label, ylabel=ylabel)
    _save(figure, axes, path)


def _log(study: Study, row: Row) -> list[dict[str, Any]]:
    """Return the records of a run, or none if it wrote no log.

    Raises:
        ArgumentError: the log is damaged.
    """
    options = tuple((name, row[name]) for name in GRID if name in row)
    result_path = study.result_path(Run(row["seed"], row["objective"], row["arm"], options))
    path = result_path.with_suffix(".jsonl")
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        remedy = f"remove it and {result_path.name}, and run the study again"
        raise argument_error(
            str(path), "JSON lines, the log of a run", f"broken JSON ({type(error).__name__})", remedy
        ) from None


def _curves(results: Results, study: Study, path: pathlib.Path) -> None:
    """Draw the likelihoods over the steps of the chosen runs of the first seed.

    An arm without a chosen run is represented by its run with the best forget quality.
    """
    figure, axes = _panels(2, len(results.objectives), 2.6)
    seed = results.seeds[0]
    for column, objective in zip(axes.T, results.objectives):
        for arm in ARMS:
            complete = [row for row in results.rows(objective, arm, seed) if "diverged" not in row]
            best = max(complete, key=lambda row: row["forget_quality"], default=None)
            row = results.chosen(objective, arm, seed) or best
            records = [] if row is None else _log(study, row)
            for axis, key in zip(column, ("forget_nll", "retain_nll")):
                values = [(record["step"], record[key]) for record in records if record.get(key) is not None]
                axis.plot(*zip(*values) if values else ((), ()), color=COLORS[arm], label=TITLES[arm], linewidth=1.2)
                axis.set(xlabel="step", ylabel=f"{key.split('_')[0]} NLL a token")
        column[0].set_title(OBJECTIVES[objective])
    _save(figure, axes, path)


def _clipped(results: Results, study: Study, path: pathlib.Path) -> None:
    """Draw the clipped fraction over the steps, the mean over all runs of an arm."""
    figure, axes = _panels(1, len(results.objectives), 2.8)
    for axis, objective in zip(axes.flat, results.objectives):
        for arm in ARMS:
            steps: dict[int, list[float]] = {}
            for row in results.rows(objective, arm):
                for record in _log(study, row):
                    if record.get("clip_fraction") is not None:
                        steps.setdefault(record["step"], []).append(record["clip_fraction"])
            if steps:
                values = [(step, statistics.fmean(fractions)) for step, fractions in sorted(steps.items())]
                axis.plot(*zip(*values), color=COLORS[arm], label=TITLES[arm], linewidth=1.2)
        axis.set(title=OBJECTIVES[objective], xlabel="step", ylabel="clipped fraction", ylim=(-0.03, 1.03))
    _save(figure, axes, path)

"""The pictures of a study."""

import json
import statistics

from soul._extras import require
from soul.study.config import ARMS, INFLUENCE, OBJECTIVES, Run
from soul.study.fronts import pareto
from soul.study.results import GRID, TITLES
from soul_kernels.errors import argument_error

COLORS = {arm: f"C{index}" for index, arm in enumerate(ARMS)} | {INFLUENCE: "0.35"}
MARKERS = {arm: marker for arm, marker in zip(ARMS, "os^D")} | {INFLUENCE: "x"}


def draw(found, study, directory):
    """Draws ``frontiers.png``, ``utility.png``, ``curves.png`` and ``clipped.png``.

    Args:
        found: `soul.study.results.Results`.
        study: its `soul.study.run.Study`, for the logs of the runs.
        directory: where to.
    """
    require("matplotlib", "plots").use("Agg")
    require("matplotlib.pyplot", "plots")
    _scatter(found, directory / "frontiers.png", "retain_prob", "forget_quality", "retain probability", front=True)
    _scatter(found, directory / "utility.png", "forget_prob", "utility", "forget probability")
    _curves(found, study, directory / "curves.png")
    _clipped(found, study, directory / "clipped.png")


def _panels(n, height):
    pyplot = require("matplotlib.pyplot", "plots")
    figure, axes = pyplot.subplots(*n, figsize=(4.2 * n[1], height * n[0]), layout="constrained", squeeze=False)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    return figure, axes


def _save(figure, axes, path):
    """Saves with one legend for all panels, below them."""
    handles, labels = axes[0, 0].get_legend_handles_labels()
    columns = min(4, 2 * axes.shape[1])
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=9)
    figure.savefig(path, dpi=80)
    require("matplotlib.pyplot", "plots").close(figure)


def _scatter(found, path, x, y, label, front=False):
    """A panel an objective: every run faint, the mean of each grid point over the seeds strong, and their front as a line."""
    count = len(found.objectives)
    figure, axes = _panels((-(-count // 2), min(2, count)), 3.4)
    for axis, objective in zip(axes.flat, found.objectives):
        for arm in (*ARMS, INFLUENCE):
            rows = [row for row in found.rows(objective if arm in ARMS else INFLUENCE, arm) if x in row]
            style = dict(color=COLORS[arm], marker=MARKERS[arm])
            axis.scatter([row[x] for row in rows], [row[y] for row in rows], s=10, alpha=0.25, linewidths=0.8, **style)
            points = found.points(objective if arm in ARMS else INFLUENCE, arm).values()  # of which no run diverged:
            whole = [runs for runs in points if len(runs) == len(found.seeds)]
            means = [tuple(statistics.fmean(run[key] for run in runs) for key in (x, y)) for runs in whole]
            means = pareto(means) if front else means
            axis.plot(*zip(*means) if means else ((), ()), linestyle="-" if front else "", markersize=6, linewidth=1.4,
                      label=TITLES[arm], **style)  # fmt: skip
        for part, marker, name in (("full", "P", "before unlearning"), ("retain", "*", "retain model, the goal")):
            given = [found.starts[str(seed)][part] for seed in found.seeds]
            place = [statistics.fmean(numbers[key] for numbers in given) for key in (x, y)]
            axis.plot(*([value] for value in place), color="black", marker=marker, markersize=10, linestyle="", label=name)
        if front:
            limit = found.config["keep"] * statistics.fmean(found.before(seed)["retain_prob"] for seed in found.seeds)
            axis.axvline(limit, color="0.6", linestyle=":", linewidth=1)
        ylabel = "forget quality, log10 p" if y == "forget_quality" else y
        axis.set(title=OBJECTIVES[objective], xlabel=label, ylabel=ylabel)
    _save(figure, axes, path)


def _log(study, row):
    """The records of a run, or none where it wrote no log."""
    options = tuple((name, row[name]) for name in GRID if name in row)
    result = study.result(Run(row["seed"], row["objective"], row["arm"], options))
    path = result.with_suffix(".jsonl")
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        got, remedy = f"broken JSON ({type(error).__name__})", f"remove it and {result.name}, and run the study again"
        raise argument_error(str(path), "JSON lines, the log of a run", got, remedy) from None


def _curves(found, study, path):
    """Likelihoods over the steps of the chosen runs of the first seed; of an arm without one of its best in forget quality."""
    figure, axes = _panels((2, len(found.objectives)), 2.6)
    seed = found.seeds[0]
    for column, objective in zip(axes.T, found.objectives):
        for arm in ARMS:
            ran = [row for row in found.rows(objective, arm, seed) if "diverged" not in row]
            row = found.chosen(objective, arm, seed) or max(ran, key=lambda row: row["forget_quality"], default=None)
            records = [] if row is None else _log(study, row)
            for axis, key in zip(column, ("forget_nll", "retain_nll")):
                values = [(r["step"], r[key]) for r in records if r.get(key) is not None]
                axis.plot(*zip(*values) if values else ((), ()), color=COLORS[arm], label=TITLES[arm], linewidth=1.2)
                axis.set(xlabel="step", ylabel=f"{key.split('_')[0]} NLL a token")
        column[0].set_title(OBJECTIVES[objective])
    _save(figure, axes, path)


def _clipped(found, study, path):
    """Clipped fraction over the steps, mean over all runs of an arm."""
    figure, axes = _panels((1, len(found.objectives)), 2.8)
    for axis, objective in zip(axes.flat, found.objectives):
        for arm in ARMS:
            steps = {}
            for row in found.rows(objective, arm):
                for record in _log(study, row):
                    if record.get("clip_fraction") is not None:
                        steps.setdefault(record["step"], []).append(record["clip_fraction"])
            if steps:
                values = [(step, statistics.fmean(fractions)) for step, fractions in sorted(steps.items())]
                axis.plot(*zip(*values), color=COLORS[arm], label=TITLES[arm], linewidth=1.2)
        axis.set(title=OBJECTIVES[objective], xlabel="step", ylabel="clipped fraction", ylim=(-0.03, 1.03))
    _save(figure, axes, path)

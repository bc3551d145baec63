"""Evaluation of the points of a grid: Pareto fronts, the chosen run, and the verdict on an arm."""

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from soul._extras import require

WINS, LOSES, TIES, OPEN = "it wins", "it loses", "no difference beyond the seeds' spread", "no verdict"

Point = tuple[float, float]
Row = dict[str, Any]  # a run, or the model before unlearning, as its JSON file has it


class Verdict(NamedTuple):
    """The difference between an arm and the baseline.

    Attributes:
        outcome: ``WINS``, ``LOSES``, ``TIES``, or ``OPEN`` with one seed.
        mean: mean of the differences.
        spread: their standard deviation; None with one seed.
        interval: Student's 95% interval of the mean, (low, high); None with one seed.
        differences: arm minus baseline, one for each seed.
    """

    outcome: str
    mean: float
    spread: float | None
    interval: Point | None
    differences: list[float]

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of 0."""
        return self.interval is not None and self.interval[0] * self.interval[1] > 0


def pareto(points: Iterable[Point]) -> list[Point]:
    """Return the points that no other point dominates, sorted, each once. Larger is better for both x and y."""
    front: list[Point] = []
    for x, y in sorted(points, reverse=True):
        if not front or y > front[-1][1]:
            front.append((x, y))
    return front[::-1]


def hypervolume(points: Iterable[Point], corner: Point) -> float:
    """Return the area that the points dominate above and to the right of ``corner``."""
    area = 0.0
    left = corner[0]
    for x, y in pareto([(x, y) for x, y in points if x > corner[0] and y > corner[1]]):
        area += (x - left) * (y - corner[1])
        left = x
    return area


def choose(rows: Iterable[Row], before: Row, keep: float) -> Row | None:
    """Return the run that represents a grid: the one with the best forget quality of those that keep enough retain probability.

    Args:
        rows: runs of one arm from the models of one seed; diverged runs have no numbers.
        before: numbers of the model before unlearning.
        keep: fraction of its ``retain_prob`` that a run must keep.

    Returns:
        The row; or None if no run that keeps enough is better than the model before unlearning.
    """
    eligible = [row for row in rows if row.get("retain_prob", -1.0) >= keep * before["retain_prob"]]
    best = max(eligible, key=lambda row: row["forget_quality"], default=None)
    return best if best is not None and best["forget_quality"] > before["forget_quality"] else None


def scores(rows: Sequence[Row], before: Row, keep: float) -> dict[str, float]:
    """Return the two scores of a grid, by name.

    "quality" is the chosen run's forget quality, or that of the model before unlearning if no run is chosen. "hypervolume" is
    the `hypervolume` of retain probability and forget quality, above a retain probability of 0 and the forget quality before
    unlearning. The arguments are those of `choose`.
    """
    chosen = choose(rows, before, keep)
    points = [(row["retain_prob"], row["forget_quality"]) for row in rows if "retain_prob" in row]
    quality = before["forget_quality"] if chosen is None else chosen["forget_quality"]
    return {"quality": quality, "hypervolume": hypervolume(points, (0.0, before["forget_quality"]))}


def verdict(differences: Sequence[float]) -> Verdict:
    """Return whether an arm differs from the baseline.

    The arm wins or loses if the mean is farther from 0 than the sample standard deviation over the seeds. With few seeds that
    is weak evidence (see `chance`), so there is also Student's 95% interval of the mean, which for three seeds extends 2.5
    standard deviations to either side.

    Args:
        differences: arm minus baseline, one for each seed, each from the same models.
    """
    mean = statistics.fmean(differences)
    n = len(differences)
    if n < 2:
        return Verdict(OPEN, mean, None, None, list(differences))
    spread = statistics.stdev(differences)
    half_width = float(require("scipy.stats", "eval").t.ppf(0.975, n - 1)) * spread / math.sqrt(n)
    outcome = TIES
    if abs(mean) > spread:
        outcome = WINS if mean > 0 else LOSES
    return Verdict(outcome, mean, spread, (mean - half_width, mean + half_width), list(differences))


def chance(seeds: int) -> float:
    """Return the probability with which `verdict` finds a difference between equal arms.

    It is the probability that the mean of normal differences around 0 is farther from 0 than their standard deviation: 0.39 for
    two seeds, 0.23 for three, 0.09 for five.
    """
    return 2 * float(require("scipy.stats", "eval").t.sf(math.sqrt(seeds), seeds - 1))

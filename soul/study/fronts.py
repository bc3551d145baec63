"""From points of a grid to a result: Pareto fronts, the run that is chosen, and who wins."""

import math
import statistics

from soul._extras import require

WINS, LOSES, TIES, OPEN = "it wins", "it loses", "no difference beyond the seeds' spread", "no verdict"


def pareto(points):
    """The points that no other one beats, sorted: pairs (x, y), both the larger the better; each once."""
    front = []
    for x, y in sorted(points, reverse=True):
        if not front or y > front[-1][1]:
            front.append((x, y))
    return front[::-1]


def hypervolume(points, corner):
    """Area between the corner and the front of the points: what they dominate of the quadrant above it."""
    total, left = 0.0, corner[0]
    for x, y in pareto([(x, y) for x, y in points if x > corner[0] and y > corner[1]]):
        total += (x - left) * (y - corner[1])
        left = x
    return total


def choose(rows, before, keep):
    """The run of a grid that speaks for it: the best forget quality among those whose retain probability is at least ``keep``
    times that before unlearning.

    Args:
        rows: runs of one arm from one start, dicts; those that diverged have no numbers.
        before: numbers of the start.
        keep: a part of its ``retain_prob``.

    Returns:
        The row; or None where none keeps that much, and the start itself, where nothing was forgotten, is the best.
    """
    kept = [row for row in rows if row.get("retain_prob", -1.0) >= keep * before["retain_prob"]]
    best = max(kept, key=lambda row: row["forget_quality"], default=None)
    return best if best is not None and best["forget_quality"] > before["forget_quality"] else None


def scores(rows, before, keep):
    """Two numbers of a grid: the chosen run's forget quality, the start's where there is none; and the hypervolume of retain
    probability against forget quality, above a retain probability of 0 and the forget quality of the start.
    """
    chosen = choose(rows, before, keep)
    points = [(row["retain_prob"], row["forget_quality"]) for row in rows if "retain_prob" in row]
    quality = before["forget_quality"] if chosen is None else chosen["forget_quality"]
    return {"quality": quality, "hypervolume": hypervolume(points, (0.0, before["forget_quality"]))}


def verdict(differences):
    """Whether an arm differs from the baseline, from one difference a seed (arm minus baseline, from the same start).

    It wins or loses where the mean is farther from 0 than the sample standard deviation over the seeds. With few of them that
    is weak evidence (see `chance`), so there is also Student's 95% interval of the mean, which for three seeds is 2.5 standard
    deviations wide to either side.

    Returns:
        A dict: ``outcome``, ``mean``, ``spread`` (the standard deviation), ``interval`` (low, high), ``differences``; spread
        and interval are None with one seed, which tells nothing.
    """
    mean, n = statistics.fmean(differences), len(differences)
    result = {"mean": mean, "spread": None, "interval": None, "differences": list(differences)}
    if n < 2:
        return result | {"outcome": OPEN}
    spread = statistics.stdev(differences)
    half = float(require("scipy.stats", "eval").t.ppf(0.975, n - 1)) * spread / math.sqrt(n)
    outcome = TIES if abs(mean) <= spread else WINS if mean > 0 else LOSES
    return result | {"outcome": outcome, "spread": spread, "interval": (mean - half, mean + half)}


def chance(seeds):
    """How often the mean of normal differences around 0 is farther from 0 than their standard deviation: what `verdict` finds
    between equals. 0.39 for two seeds, 0.23 for three, 0.09 for five.
    """
    return 2 * float(require("scipy.stats", "eval").t.sf(math.sqrt(seeds), seeds - 1))

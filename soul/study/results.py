"""The results of a study by objective, arm and seed, with the chosen runs, scores and verdicts."""

import statistics
from collections.abc import Mapping
from typing import Any

from soul.study.config import ARMS, BASELINE, INFLUENCE
from soul.study.fronts import Row, Verdict, choose, scores, verdict

TITLES = {name: title for name, (title, _) in ARMS.items()} | {INFLUENCE: "influence update"}
GRID = ("lr", "alpha", "damping", "step")  # the options in which the runs of an arm differ


class Results:
    """The results of a study, by objective, arm and seed.

    Args:
        content: the return value of `soul.study.run.run_study`, or the same from JSON.

    Attributes:
        config: the fields of the `soul.study.config.StudyConfig`.
        starts: seed, as a text -> numbers of its two models, "full" and "retain", and of their training.
        all_rows: every run, diverged ones too.
        seeds: the seeds.
        objectives: names of the objectives.
    """

    def __init__(self, content: Mapping[str, Any]) -> None:
        self.config: dict[str, Any] = content["config"]
        self.starts: dict[str, dict[str, Any]] = content["starts"]
        self.all_rows: list[Row] = content["rows"]
        self.seeds: list[int] = self.config["seeds"]
        self.objectives: list[str] = self.config["objectives"]
        self._rows: dict[tuple[str, str, int], list[Row]] = {}
        for row in self.all_rows:
            self._rows.setdefault((row["objective"], row["arm"], row["seed"]), []).append(row)

    def before(self, seed: int) -> Row:
        """Return the numbers of the model before unlearning."""
        return self.starts[str(seed)]["full"]

    def rows(self, objective: str, arm: str, seed: int | None = None) -> list[Row]:
        """Return the runs of an arm, of one seed or of all."""
        seeds = self.seeds if seed is None else [seed]
        return [row for s in seeds for row in self._rows.get((objective, arm, s), [])]

    def chosen(self, objective: str, arm: str, seed: int) -> Row | None:
        """Return the run that represents an arm, or None: see `choose`."""
        return choose(self.rows(objective, arm, seed), self.before(seed), self.config["keep"])

    def scores(self, objective: str, arm: str) -> list[dict[str, float]]:
        """Return the `scores` of an arm for every seed."""
        return [scores(self.rows(objective, arm, seed), self.before(seed), self.config["keep"]) for seed in self.seeds]

    def verdicts(self, score: str) -> dict[tuple[str, str], Verdict]:
        """Return (objective, arm) -> `Verdict` against the baseline by one of the `scores`, "quality" or "hypervolume"."""
        verdicts = {}
        for objective in self.objectives:
            baseline = self.scores(objective, BASELINE)
            for arm in ARMS:
                if arm != BASELINE:
                    pairs = zip(self.scores(objective, arm), baseline)
                    verdicts[objective, arm] = verdict([of_arm[score] - of_baseline[score] for of_arm, of_baseline in pairs])
        return verdicts

    def points(self, objective: str, arm: str) -> dict[tuple[float | None, ...], list[Row]]:
        """Return a dict from grid point, a tuple of the options in ``GRID``, to its runs that did not diverge."""
        points: dict[tuple[float | None, ...], list[Row]] = {}
        for row in self.rows(objective, arm):
            runs = points.setdefault(tuple(row.get(name) for name in GRID), [])
            if "diverged" not in row:
                runs.append(row)
        return points

    def diverged(self) -> bool:
        """Tell whether any run diverged."""
        return any("diverged" in row for row in self.all_rows)

    def work(self) -> float:
        """Return the seconds of training and of all runs together, each by the clock of its process."""
        training = [model["seconds"] for start in self.starts.values() for model in start["training"].values()]
        return sum(training) + sum(row["all_seconds"] for row in self.all_rows)

    def cost(self, objective: str, arm: str) -> float | None:
        """Return the retain probability of the chosen run minus that before unlearning.

        It is the mean over the seeds that have a chosen run, or None without any.
        """
        pairs = [(self.chosen(objective, arm, seed), self.before(seed)) for seed in self.seeds]
        differences = [row["retain_prob"] - before["retain_prob"] for row, before in pairs if row is not None]
        return statistics.fmean(differences) if differences else None

    def overshoot(self, objective: str, arm: str) -> float | None:
        """Return the forget quality of the run that forgets most minus the best of its arm; below 0 if forgetting more hurts.

        It is the mean over the seeds that have a run that did not diverge, or None without any.
        """
        by_seed = [[row for row in self.rows(objective, arm, seed) if "forget_prob" in row] for seed in self.seeds]
        gaps = [
            min(rows, key=lambda row: row["forget_prob"])["forget_quality"] - max(row["forget_quality"] for row in rows)
            for rows in by_seed
            if rows
        ]
        return statistics.fmean(gaps) if gaps else None

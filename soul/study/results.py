"""The results of a study, ordered, with what follows from them: chosen runs, scores, verdicts."""

import statistics

from soul.study.config import ARMS, BASELINE, INFLUENCE
from soul.study.fronts import choose, scores, verdict

TITLES = {name: title for name, (title, _) in ARMS.items()} | {INFLUENCE: "influence update"}
GRID = ("lr", "alpha", "damping", "step")  # what tells the runs of an arm apart


class Results:
    """The results of a study, by objective, arm and seed.

    Args:
        results: what `soul.study.run.run_study` returns, or the same from JSON.
    """

    def __init__(self, results):
        self.results, self.config, self.starts = results, results["config"], results["starts"]
        self.seeds, self.objectives = self.config["seeds"], self.config["objectives"]
        self._rows = {}
        for row in results["rows"]:
            self._rows.setdefault((row["objective"], row["arm"], row["seed"]), []).append(row)

    def before(self, seed):
        """Numbers of the model before unlearning."""
        return self.starts[str(seed)]["full"]

    def rows(self, objective, arm, seed=None):
        """The runs of an arm, of one seed or of all."""
        seeds = self.seeds if seed is None else [seed]
        return [row for s in seeds for row in self._rows.get((objective, arm, s), [])]

    def chosen(self, objective, arm, seed):
        """The run that speaks for an arm, or None: see `choose`."""
        return choose(self.rows(objective, arm, seed), self.before(seed), self.config["keep"])

    def scores(self, objective, arm):
        """`scores` of every seed, a list of dicts."""
        return [scores(self.rows(objective, arm, seed), self.before(seed), self.config["keep"]) for seed in self.seeds]

    def verdicts(self, score):
        """(objective, arm) -> `verdict` against the baseline, by one of the scores."""
        found = {}
        for objective in self.objectives:
            base = self.scores(objective, BASELINE)
            for arm in ARMS:
                if arm != BASELINE:
                    pairs = zip(self.scores(objective, arm), base)
                    found[objective, arm] = verdict([own[score] - other[score] for own, other in pairs])
        return found

    def points(self, objective, arm):
        """Grid point, a tuple of the options in ``GRID`` -> its runs that did not diverge."""
        found = {}
        for row in self.rows(objective, arm):
            runs = found.setdefault(tuple(row.get(name) for name in GRID), [])
            if "diverged" not in row:
                runs.append(row)
        return found

    def diverged(self):
        """Whether any run did."""
        return any("diverged" in row for row in self.results["rows"])

    def work(self):
        """Seconds of training and of all runs together, each by its own clock."""
        training = [part["seconds"] for start in self.starts.values() for part in start["training"].values()]
        return sum(training) + sum(row["all_seconds"] for row in self.results["rows"])

    def cost(self, objective, arm):
        """Retain probability of the chosen run minus that before unlearning, mean over the seeds that have one; or None."""
        pairs = [(self.chosen(objective, arm, seed), self.before(seed)) for seed in self.seeds]
        lost = [row["retain_prob"] - before["retain_prob"] for row, before in pairs if row is not None]
        return statistics.fmean(lost) if lost else None

    def overshoot(self, objective, arm):
        """Forget quality of the run that forgets most minus the best of its arm, mean over the seeds: below 0 where forgetting
        more makes it worse.
        """
        every = [[row for row in self.rows(objective, arm, seed) if "forget_prob" in row] for seed in self.seeds]
        gaps = [
            min(rows, key=lambda row: row["forget_prob"])["forget_quality"] - max(row["forget_quality"] for row in rows)
            for rows in every
            if rows
        ]
        return statistics.fmean(gaps) if gaps else None

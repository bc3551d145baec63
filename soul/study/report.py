"""The report of a study, markdown made of its results alone."""

import statistics

from soul.study.config import ARMS, BASELINE, INFLUENCE, OBJECTIVES
from soul.study.fronts import LOSES, WINS, choose, scores, verdict

TITLES = {name: title for name, (title, _) in ARMS.items()} | {INFLUENCE: "influence update"}
COLUMNS = {  # of the table of chosen runs: name -> heading, decimals
    "forget_quality": ("forget quality", 1),
    "forget_prob": ("forget prob", 3),
    "retain_prob": ("retain prob", 3),
    "utility": ("utility", 3),
    "mia_loss": ("MIA, loss", 2),
    "mia_min_k": ("MIA, Min-K%", 2),
    "mia_min_k_plus_plus": ("MIA, Min-K%++", 2),
    "seconds": ("seconds", 1),
    "steps": ("steps", 0),
    "clip_fraction": ("clipped", 2),
}


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


def mean_spread(values, decimals):
    """"mean ± standard deviation" of the numbers there are; empty without any."""
    values = [value for value in values if value is not None]
    if not values:
        return ""
    text = f"{statistics.fmean(values):.{decimals}f}"
    if len(values) > 1 and (spread := statistics.stdev(values)) >= 0.5 * 10**-decimals:
        text += f" ± {spread:.{decimals}f}"
    return text


def markdown(head, rows):
    """A table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def table(found):
    """The table of chosen runs: mean and spread over the seeds."""
    head = ["objective", "optimizer", *(name for name, _ in COLUMNS.values()), "chosen of"]
    rows = []
    for part, title in (("full", "before unlearning"), ("retain", "retain model, the goal")):
        given = [found.starts[str(seed)][part] for seed in found.seeds]
        rows.append(["", title, *_cells(given), ""])
    for objective in found.objectives:
        rows += [_row(found, objective, arm, OBJECTIVES[objective]) for arm in ARMS]
    rows.append(_row(found, INFLUENCE, INFLUENCE, ""))
    return markdown(head, rows)


def _row(found, objective, arm, title):
    every = [found.chosen(objective, arm, seed) for seed in found.seeds]
    chosen = [row for row in every if row is not None]
    runs = found.rows(objective, arm)
    diverged = sum("diverged" in row for row in runs)
    count = f"{len(chosen)}/{len(every)} seeds" + (f", {diverged} of {len(runs)} runs diverged" if diverged else "")
    return [title, TITLES[arm], *_cells(chosen), count]


def _cells(rows):
    return [mean_spread([row.get(name) for row in rows], decimals) for name, (_, decimals) in COLUMNS.items()]


def sentence(objective, arm, by_quality, by_volume):
    """What the numbers of one arm say, against the baseline."""
    told = [
        f"{TITLES[arm]} {by_quality['outcome']} {TITLES[BASELINE]} in the best forget quality {_numbers(by_quality, 1)}",
        f"{by_volume['outcome']} it in hypervolume {_numbers(by_volume, 1)}",
    ]
    return f"- **{OBJECTIVES[objective]}**: " + ", ".join(told) + "."


def _numbers(found, decimals):
    each = ", ".join(f"{d:+.{decimals}f}" for d in found["differences"])
    if found["spread"] is None:
        return f"(difference {each}; one seed)"
    low, high = found["interval"]
    mean, spread = f"{found['mean']:+.{decimals}f}", f"{found['spread']:.{decimals}f}"
    return f"({mean} ± {spread}, 95% interval {low:+.{decimals}f} to {high:+.{decimals}f}; by seed {each})"


def summary(found):
    """How the verdicts count together, a sentence for each arm."""
    quality, volume = found.verdicts("quality"), found.verdicts("hypervolume")
    lines = []
    for arm in ARMS:
        if arm == BASELINE:
            continue
        parts = []
        for title, verdicts in (("best forget quality", quality), ("hypervolume", volume)):
            own = [v for (_, a), v in verdicts.items() if a == arm]
            wins, losses = (sum(v["outcome"] == outcome for v in own) for outcome in (WINS, LOSES))
            sure = sum(v["interval"] is not None and v["interval"][0] * v["interval"][1] > 0 for v in own)
            parts.append(f"{title}: wins {wins}, loses {losses} of {len(own)} objectives ({sure} beyond the 95% interval)")
        lines.append(f"- {TITLES[arm]} against {TITLES[BASELINE]}, {'; '.join(parts)}.")
    return "\n".join(lines)


def report(results, *, title, pictures=""):
    """The whole report.

    Args:
        results: what `soul.study.run.run_study` returns, or the same from JSON.
        title: its heading.
        pictures: where they are, as a prefix of their names.
    """
    found = Results(results)
    quality, volume = found.verdicts("quality"), found.verdicts("hypervolume")
    sentences = "\n".join(sentence(o, a, quality[o, a], volume[o, a]) for o, a in quality)
    return f"# {title}\n\n{results['data']}\n\n{summary(found)}\n\n{sentences}\n\n{table(found)}\n"

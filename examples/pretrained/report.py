"""Write docs/pretrained.md and its picture from the results of run.py, complete or not.

python examples/pretrained/report.py
"""

import argparse
import json
import pathlib
import statistics

import matplotlib
from grid import ALPHAS, ARMS, BASELINE, SEEDS, runs

from soul.study.fronts import hypervolume, pareto, verdict

ROOT = pathlib.Path(__file__).parents[2]
CHANCE = 0.162  # mean probability of answers to other forget questions, before unlearning


def main():
    """Read the results, and write page and picture."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--results", default=pathlib.Path(__file__).parent / "results", type=pathlib.Path)
    parser.add_argument("--page", default=ROOT / "docs" / "pretrained.md", type=pathlib.Path)
    parser.add_argument("--picture", default=ROOT / "docs" / "pictures" / "pretrained.png", type=pathlib.Path)
    args = parser.parse_args()
    before = json.loads((args.results / "before.json").read_text())
    paths = [args.results / f"{name}.json" for name, *_ in runs()]
    results = [json.loads(path.read_text()) for path in paths if path.exists()]
    draw(before, results, args.picture)
    args.page.write_text(page(before, results))


def whole_seeds(results):
    """Return the seeds of which every run of every arm is there: only these are judged."""
    return [seed for seed in SEEDS if sum(row["seed"] == seed for row in results) == len(runs()) // len(SEEDS)]


def of(results, **which):
    """Return the results with these values that did not diverge."""
    return [row for row in results if all(row[name] == value for name, value in which.items()) and "diverged" not in row]


def point(row, before):
    """Return how much was kept and how much was forgotten: shares of the probability before."""
    return row["heldout_prob"] / before["heldout_prob"], 1 - row["forget_prob"] / before["forget_prob"]


def scores(results, before, arm, seed):
    """Return the two scores of an arm, from one seed.

    "kept": the largest share of the held-out probability that a run keeps which forgets down to chance, 0 without one.
    "area": the area below the front of all runs, forgotten over kept.
    """
    rows = of(results, arm=arm, seed=seed)
    kept = [point(row, before)[0] for row in rows if row["forget_prob"] <= CHANCE]
    return {"kept": max(kept, default=0.0), "area": hypervolume([point(row, before) for row in rows], (0.0, 0.0))}


def page(before, results):
    """Return the text of the page."""
    seeds = whole_seeds(results)
    done = f"{len(results)} of {len(runs())} runs are there"
    lines = [
        INTRODUCTION,
        f"**State: {done}; {len(seeds)} of {len(SEEDS)} seeds are complete.** {verdicts(results, before, seeds)}\n",
    ]
    lines += ["![Forgotten over kept, all runs](pictures/pretrained.png)\n", PICTURE, where(results)]
    if seeds:
        lines += ["## Scores by seed\n", table_of_scores(results, before, seeds)]
    lines += ["## All runs\n", before_line(before), HEAD]
    for _, arm, seed, alpha, choice in runs():
        run = {"arm": arm, "seed": seed, "alpha": alpha, "choice": choice}
        lines += [line(row) for row in results if run.items() <= row.items()]
    lines += ["", "## What the model says\n", SAID, "| | asked | before | " + " | ".join(ARMS[arm][0] for arm in ARMS) + " |"]
    lines += ["|---|---|---|" + "---|" * len(ARMS)]
    chosen = {arm: nearest(results, arm) for arm in ARMS}
    for index, (name, question, text) in enumerate(before["said"]):
        answers = [chosen[arm]["said"][index][2] if chosen[arm] else "" for arm in ARMS]
        lines += ["| " + " | ".join([name, question, *map(cell, [text, *answers])]) + " |"]
    return "\n".join(lines) + "\n" + AGAIN


def where(results):
    """Return a sentence on the machines, the time and the memory of the runs."""
    machines = sorted(
        {f"{row['machine']} ({row['threads']} thread{'s' * (row['threads'] > 1)} a run)" for row in results if "machine" in row}
    )
    hours, clock = (sum(row.get(name, 0.0) for row in results) / 3600 for name in ("processor_seconds", "seconds"))
    peak = max((row["peak_gib"] for row in results if "peak_gib" in row), default=0.0)
    return (
        f"Made on {'; '.join(machines)}: {hours:.1f} hours of processor time in all ({clock:.1f} hours by the clock, as other "
        f"processes were at work), at most {peak:.1f} GiB a process.\n"
    )


def table_of_scores(results, before, seeds):
    """Return a table of both scores of all arms, from the complete seeds."""
    head = ["optimizer", *(f"{score}, seed {seed}" for score in ("kept", "area") for seed in seeds)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for arm, (title, *_) in ARMS.items():
        of_arm = [scores(results, before, arm, seed) for seed in seeds]
        values = [f"{of_seed[score]:.3f}" for score in ("kept", "area") for of_seed in of_arm]
        lines.append("| " + " | ".join([title, *values]) + " |")
    return "\n".join(lines) + "\n"


def before_line(before):
    """Return a sentence with the numbers before any unlearning."""
    numbers = ", ".join(f"{title} {before[name]:.3f}" for name, title in zip(NUMBERS, COLUMNS[4:]))
    return f"Before: {numbers}.\n"


def nearest(results, arm):
    """Return the run of the first seed that keeps most of those that forget down to chance; else the one that forgets most."""
    rows = of(results, arm=arm, seed=SEEDS[0])
    enough = [row for row in rows if row["forget_prob"] <= CHANCE]
    if enough:
        return max(enough, key=lambda row: row["heldout_prob"])
    return min(rows, key=lambda row: row["forget_prob"], default=None)


def verdicts(results, before, seeds):
    """Return the verdicts on the arms against the baseline, from the complete seeds."""
    if len(seeds) < 2:
        return "There is no verdict before two seeds are complete."
    by_arm = {arm: [scores(results, before, arm, seed) for seed in seeds] for arm in ARMS}
    sentences = []
    for arm in ARMS:
        for score, title in (("kept", "held-out probability kept at chance"), ("area", "area below the front")):
            if arm != BASELINE:
                pairs = zip(by_arm[arm], by_arm[BASELINE])
                against = verdict([one[score] - other[score] for one, other in pairs])
                spread = f"{against.mean:+.3f} ± {against.spread:.3f}"
                sentences.append(
                    f"\n- **{ARMS[arm][0]}** against AdamW, {title}: {against.outcome} ({spread} over {len(seeds)} seeds)"
                )
    return "".join(sentences)


def line(row):
    """Return a row of the table."""
    options = ARMS[row["arm"]][2][row["choice"]]
    target = f", target {options['clip_target']:g}" if "clip_target" in options else ""
    cells = [ARMS[row["arm"]][0], f"{row['seed']}", f"{row['alpha']:g}", f"{options['lr']:g}{target}"]
    if "diverged" in row:
        return "| " + " | ".join([*cells, "diverged", *[""] * (len(NUMBERS) + 1)]) + " |"
    numbers = [f"{row[name]:.3f}" for name in NUMBERS]
    clipped = "" if row["clipped"] is None else f"{row['clipped']:.0%}"
    return "| " + " | ".join([*cells, *numbers, clipped, f"{row['processor_seconds']:.0f}"]) + " |"


def cell(text):
    """Return a text for a cell of a table."""
    text = " ".join(text.split()).replace("|", "\\|")
    return text if len(text) <= 80 else f"{text[:77]}..."


def draw(before, results, path):
    """Draw all runs, and the front of each arm over the means of its grid points."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for color, arm in enumerate(ARMS):
        points = [point(row, before) for row in of(results, arm=arm)]
        axis.scatter(*zip(*points) if points else ((), ()), s=14, alpha=0.35, color=f"C{color}")
        means = []
        for alpha in ALPHAS:
            for choice in range(3):
                rows = of(results, arm=arm, alpha=alpha, choice=choice)
                points_of_run = [point(row, before) for row in rows]
                if points_of_run:
                    means.append(tuple(statistics.fmean(values) for values in zip(*points_of_run)))
        front = pareto(means)
        axis.plot(*zip(*front) if front else ((), ()), "o-", color=f"C{color}", label=ARMS[arm][0])
    axis.axhline(1 - CHANCE / before["forget_prob"], color="0.6", linestyle=":", label="chance")
    axis.set(xlabel="held-out probability, share of the start", ylabel="forget probability lost, share of the start")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=90)


INTRODUCTION = """# A pretrained model: AdamW against SOUL

SmolLM2-135M-Instruct knows the capitals in `examples/pretrained/capitals`. 12 of them are to be forgotten, by NPO; 36 rows are
kept, and 39 more are held out: no run sees them, and they tell what was lost by accident. Each arm has the same number of runs
(two weights of the retain term, three learning rates or rates with clip targets, three seeds), 60 steps each. The grid,
`examples/pretrained/grid.py`, was fixed before the first run.

- **Kept**: among the runs that forget down to chance (.162, the probability of answers to other questions), the largest share
  of the held-out probability that is left.
- **Area**: below the front of all runs of an arm, forgotten over kept.

An arm wins or loses if the mean difference to AdamW over the seeds is larger than its standard deviation, as in
[the study](study.md). With three seeds equal arms get a verdict in 23% of all cases.
"""
NUMBERS = (
    "forget_prob", "retain_prob", "heldout_prob", "forget_rouge", "heldout_rouge", "forget_extraction_strength",
    "heldout_extraction_strength",
)  # fmt: skip
COLUMNS = (
    "optimizer", "seed", "alpha", "learning rate", "forget", "retain", "held out", "ROUGE-L, forget", "ROUGE-L, held out",
    "extraction strength, forget", "extraction strength, held out", "clipped", "processor s",
)  # fmt: skip
PICTURE = """Every run is a pale point. The lines are the fronts of the means over the seeds, one point of the grid each:
up and to the right is better.
"""
HEAD = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"
SAID = """Of each arm the run of the first seed that keeps most among those that forget down to chance; if there is none, that
which forgets most. Questions begin three equal parts of each file.
"""
AGAIN = """
## Again

```
python examples/pretrained/run.py --model SmolLM2-135M-Instruct    # goes on where it was stopped
python examples/pretrained/report.py                               # writes this page
```

Every finished run leaves a JSON file of a few kilobytes in `examples/pretrained/results`; models are not kept.
"""

if __name__ == "__main__":
    main()

"""The report of a study: markdown made of its results alone, and the files around it."""

import json
import statistics
import textwrap

from soul.output.files import write_text
from soul.study.config import ARMS, BASELINE, INFLUENCE, OBJECTIVES
from soul.study.fronts import LOSES, WINS, chance
from soul.study.pictures import draw
from soul.study.results import GRID, TITLES, Results
from soul.study.run import RESULTS_FILE

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


def mean_spread(values, decimals):
    """The text "mean ± standard deviation" of the numbers there are; empty without any."""
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
    count = f"{len(chosen)}/{len(every)} seed{'s' * (len(every) > 1)}"
    count += f", {diverged} of {len(runs)} runs diverged" if diverged else ""
    return [title, TITLES[arm], *_cells(chosen), count]


def _cells(rows):
    return [mean_spread([row.get(name) for row in rows], decimals) for name, (_, decimals) in COLUMNS.items()]


def sentence(objective, arm, by_quality, by_volume):
    """What the numbers of one arm say, against the baseline."""
    told = [_told(by, 2) for by in (by_quality, by_volume)]
    return f"- **{OBJECTIVES[objective]}, {TITLES[arm]}**: in best forget quality {told[0]}; in hypervolume {told[1]}."


def _told(found, decimals):
    """A verdict and its numbers; of one seed the difference alone."""
    if found["spread"] is None:
        return f"{found['mean']:+.{decimals}f}"
    each = ", ".join(f"{d:+.{decimals}f}" for d in found["differences"])
    low, high = found["interval"]
    mean, spread = f"{found['mean']:+.{decimals}f}", f"{found['spread']:.{decimals}f}"
    return f"{found['outcome']} ({mean} ± {spread}, 95% interval {low:+.{decimals}f} to {high:+.{decimals}f}; by seed {each})"


def summary(found):
    """How the verdicts count together, a sentence for each arm."""
    if len(found.seeds) == 1:
        return "One seed tells nothing of the spread: no verdict."
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


def _wrapped(text, indent=""):
    return textwrap.fill(text, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def grids(found):
    """All points of all grids: forget quality / retain probability, means over the seeds."""
    parts = []
    for objective in found.objectives:
        points = {arm: found.points(objective, arm) for arm in ARMS}
        rows = [[f"{index + 1}, {alpha:g}", *(_point(points[arm][found.config["lrs"][arm][index], alpha, None, None])
                                              for arm in ARMS)]
                for index in range(len(found.config["lrs"][BASELINE])) for alpha in found.config["alphas"]]  # fmt: skip
        parts.append(markdown([f"{OBJECTIVES[objective]}: lr, alpha", *(TITLES[arm] for arm in ARMS)], rows))
    points = found.points(INFLUENCE, INFLUENCE)
    rows = [[f"{damping:g}, {step:g}", _point(points[None, None, damping, step])]
            for damping in found.config["dampings"] for step in found.config["steps"]]  # fmt: skip
    parts.append(markdown(["damping, step", TITLES[INFLUENCE]], rows))
    return "\n\n".join(parts)


def _point(rows):
    if not rows:
        return "diverged"
    quality, kept = (statistics.fmean(row[name] for row in rows) for name in ("forget_quality", "retain_prob"))
    return f"{quality:.1f} / {kept:.3f}"


def observations(found):
    """What else the numbers say: clipping, cost, and whether forgetting more makes forget quality worse."""
    lines = []
    for arm in ARMS:
        clipped = [row["clip_fraction"] for o in found.objectives for row in found.rows(o, arm) if "clip_fraction" in row]
        if clipped:
            lines.append(
                f"- {TITLES[arm]}: {min(clipped):.2f} to {max(clipped):.2f} of the coordinates clipped, means of runs."
            )
    for objective in found.objectives:
        costs = [(TITLES[arm], found.cost(objective, arm)) for arm in ARMS]
        told = ", ".join(f"{title} {cost:+.3f}" for title, cost in costs if cost is not None)
        lines.append(
            f"- {OBJECTIVES[objective]}, retain probability of the chosen run against the start: {told or 'none chosen'}."
        )
    for objective in found.objectives:
        gaps = [(TITLES[arm], found.overshoot(objective, arm)) for arm in ARMS]
        told = ", ".join(f"{title} {gap:+.1f}" for title, gap in gaps if gap is not None) or "all diverged"
        lines.append(
            f"- {OBJECTIVES[objective]}, forget quality of the run that forgets most against the best of its arm: {told}."
        )
    return "\n".join(lines)


def rule(seeds):
    """How verdicts come about, by the number of seeds."""
    chosen = "Runs are chosen by the numbers that are reported, in every arm alike: all of them are optimistic."
    if seeds == 1:
        return f"With one seed there is no spread to judge a difference from AdamW by, and no verdict. {chosen}"
    return (
        "It wins or loses against AdamW where the mean difference over the seeds, from the same starts, is larger than the "
        f"standard deviation of the differences. With {seeds} seeds chance alone does that for {100 * chance(seeds):.2g}% of "
        f"comparisons, so Student's 95% interval of the mean stands beside it. {chosen}"
    )


def report(results, *, title, pictures=""):
    """The whole report.

    Args:
        results: what `soul.study.run.run_study` returns, or the same from JSON.
        title: its heading.
        pictures: where they are, as a prefix of their names.
    """
    found, config = Results(results), results["config"]
    quality, volume = found.verdicts("quality"), found.verdicts("hypervolume")
    training, env = next(iter(results["starts"].values()))["training"]["full"], results["environment"]
    seeds, points = ", ".join(map(str, config["seeds"])), len(config["lrs"][BASELINE]) * len(config["alphas"])
    clock = "of processor time" if "processes of one thread" in env["device"] else "on the clock"
    sentences = "\n".join(sentence(o, a, quality[o, a], volume[o, a]) for o, a in quality)
    several = len(config["seeds"]) > 1
    by_seed = ", seed by seed" * several
    over = " of the means over the seeds" * several
    means = ", means over the seeds" * several + " that did not diverge" * (several and found.diverged())
    lead = "" if several else "An arm's number minus AdamW's, from the same start:\n\n"
    best = f"one with the best forget quality that keeps {config['keep']:.0%} of the retain probability."
    chosen = f"Of each seed the {best} Mean ± standard\ndeviation over the seeds that have one." if several else f"The {best}"
    resumed = " since it was taken up again" * results["resumed"]
    lrs = {arm: ", ".join(f"{lr:g}" for lr in rates) for arm, rates in config["lrs"].items()}
    rates = f"for all of them {lrs[BASELINE]}"
    if len(set(lrs.values())) > 1:
        rates = "; ".join(f"{TITLES[arm]} {own}" for arm, own in lrs.items())
    alphas = ", ".join(f"{alpha:g}" for alpha in config["alphas"])
    start = _wrapped(
        f"{results['data']} {'Per seed' if several else 'With one seed'} ({seeds}), two Llamas of "
        f"{training['parameters'] / 1e6:.2f} M parameters are trained from scratch for {config['train_epochs']} epochs, on all "
        f"rows and on the retain rows only; every run{' of the seed' * several} unlearns the first of them, and is measured "
        "against the second."
    )
    where = _wrapped(
        f"Computed on {env['device']}, torch {env['torch']}, transformers {env['transformers']}: {len(results['rows'])} runs "
        f"in {results['seconds'] / 60:.1f} minutes{resumed}, training included; {found.work() / 60:.1f} minutes {clock}. "
        f"Numbers: `{pictures}results.json`."
    )
    return f"""# {title}

{start}

{where}

## The rules, fixed in advance

- Every optimizer has, for every objective, a grid of {points} points: learning rate times alpha,
  the weight of retaining. Learning rates, {rates}; alpha, {alphas}. The influence update, in one shot and
  without an objective, has as many points: damping times step.
- A run: {config["epochs"]} epochs, {config["batch_size"]} forget and as many retain sequences a step, warm-up, linear decay,
  gradient norm 1, no weight decay. "SOUL as published" has the momentum of its code, rho 0.04 and bs 5120. The other
  two keep {config["clip_target"]:.0%} of the coordinates clipped, and refresh h from retain tokens every
  {config["curvature_every"]} steps.
- Forget quality is log10 of the p-value of TOFU's KS test of truth ratios on the forget set, against the retain model of the
  same seed: 0 is perfect. An optimizer is judged by its whole grid{by_seed}: by the **best forget quality** among the runs
  that keep {config["keep"]:.0%} of the retain probability (the start's own, where no run is better), and by the
  **hypervolume** under its front of retain probability and forget quality, above the forget quality of the start.
- {_wrapped(rule(len(found.seeds)), indent="  ")}

## Does second order beat AdamW?

{summary(found)}

{lead}{sentences}

## The chosen runs

{chosen}

{table(found)}

- prob: length-normalised probability of the answers. Utility: harmonic mean of probability, exact memorization and truth
  ratio on retain rows: TOFU's model utility without what a model from scratch cannot know, and without generation.
- MIA: area under the curve of telling forget rows from rows that no model has seen. 1: they are remembered, 0.5: they are not;
  below: less likely than unseen rows, which gives them away as well.
- Seconds: {clock}, of unlearning alone.

## Frontiers

![forget quality against retain probability]({pictures}frontiers.png)

Faint: every run. Strong: the front{over}. Dotted: the retain probability to keep.

Forget quality / retain probability of every grid point{means}; learning rates by their place in the grid.

{grids(found)}

## Utility, steps, clipping

{observations(found)}

![utility against forget probability]({pictures}utility.png)

![likelihoods over the steps]({pictures}curves.png)

The chosen runs of seed {config["seeds"][0]}, on the batch of each step; where none is chosen, that of best forget quality.

![clipped fraction over the steps]({pictures}clipped.png)

Means over all runs of an arm.
"""


def write_report(study, results, *, title):
    """Writes ``results.json``, ``report.md`` and the pictures into the output directory; returns the path of the report."""
    starts = {
        seed: start | {part: _rounded(start[part]) for part in ("full", "retain")} for seed, start in results["starts"].items()
    }
    results = {**results, "starts": starts, "rows": [_rounded(row) for row in results["rows"]]}
    write_text(study.output / RESULTS_FILE, json.dumps(results, separators=(",", ":")) + "\n")
    draw(Results(results), study, study.output)
    path = study.output / "report.md"
    write_text(path, report(results, title=title))
    return path


def _rounded(row):
    """What was measured, to six digits, of starts as well: a run that is like its start must stay so. Options are not: runs are
    found by what the config says.
    """
    return {n: float(f"{value:.6g}") if isinstance(value, float) and n not in GRID else value for n, value in row.items()}

"""The report of a study, made of its results alone, as markdown, and the files beside it."""

import json
import pathlib
import statistics
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from soul.output.files import write_text
from soul.report.page import BAD, GOOD, MIXED, OPEN, Page, Prose, Section
from soul.report.page import Verdict as PageVerdict
from soul.report.write import write_html
from soul.run.aim import summary as aim_summary
from soul.study.config import ARMS, BASELINE, INFLUENCE, OBJECTIVES
from soul.study.fronts import LOSES, WINS, Row, Verdict, chance
from soul.study.pictures import draw
from soul.study.results import GRID, TITLES, Results
from soul.study.run import MODELS, PROMPT, RESULTS_FILE, Study

PROMPT_NOTE = """
- Prompt: the model before unlearning, with an instruction to pretend ignorance before every question. Nothing is trained,
  and the model still knows everything. Its truth ratios are held against those of the retain model, asked plainly."""
COLUMNS = {  # table of chosen runs: measurement -> heading, decimals
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


def mean_spread(values: Iterable[float | None], decimals: int) -> str:
    """Return the text "mean ± standard deviation" of the values that are not None, or "" without any."""
    numbers = [value for value in values if value is not None]
    if not numbers:
        return ""
    text = f"{statistics.fmean(numbers):.{decimals}f}"
    if len(numbers) > 1 and (spread := statistics.stdev(numbers)) >= 0.5 * 10**-decimals:
        text += f" ± {spread:.{decimals}f}"
    return text


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def table(results: Results) -> str:
    """Return the table of chosen runs: mean and spread over the seeds."""
    head = ["objective", "optimizer", *(name for name, _ in COLUMNS.values()), "chosen of"]
    rows = []
    starts = [results.starts[str(seed)] for seed in results.seeds]
    for model, title in (("full", "before unlearning"), ("retain", "retain model, the goal"), (PROMPT, "prompt")):
        if all(model in start for start in starts):
            rows.append(["", title, *_cells([start[model] for start in starts]), ""])
    for objective in results.objectives:
        rows += [_table_row(results, objective, arm, OBJECTIVES[objective]) for arm in ARMS]
    rows.append(_table_row(results, INFLUENCE, INFLUENCE, ""))
    return markdown(head, rows)


def _table_row(results: Results, objective: str, arm: str, title: str) -> list[str]:
    by_seed = [results.chosen(objective, arm, seed) for seed in results.seeds]
    chosen = [row for row in by_seed if row is not None]
    runs = results.rows(objective, arm)
    diverged = sum("diverged" in row for row in runs)
    count = f"{len(chosen)}/{len(by_seed)} seed{'s' * (len(by_seed) > 1)}"
    count += f", {diverged} of {len(runs)} runs diverged" if diverged else ""
    return [title, TITLES[arm], *_cells(chosen), count]


def _cells(rows: Sequence[Row]) -> list[str]:
    return [mean_spread([row.get(name) for row in rows], decimals) for name, (_, decimals) in COLUMNS.items()]


def sentence(objective: str, arm: str, by_quality: Verdict, by_volume: Verdict) -> str:
    """Return a list item with the verdicts on an arm against the baseline, by both scores."""
    return (
        f"- **{OBJECTIVES[objective]}, {TITLES[arm]}**: in best forget quality {_verdict_text(by_quality)}; "
        f"in hypervolume {_verdict_text(by_volume)}."
    )


def _verdict_text(verdict: Verdict) -> str:
    """Return a verdict with its numbers; with one seed, the difference alone."""
    if verdict.spread is None or verdict.interval is None:
        return f"{verdict.mean:+.2f}"
    by_seed = ", ".join(f"{difference:+.2f}" for difference in verdict.differences)
    low, high = verdict.interval
    numbers = f"{verdict.mean:+.2f} ± {verdict.spread:.2f}, 95% interval {low:+.2f} to {high:+.2f}"
    return f"{verdict.outcome} ({numbers}; by seed {by_seed})"


def summary(results: Results) -> str:
    """Return a list with the number of wins and losses of each arm."""
    if len(results.seeds) == 1:
        return "One seed says nothing about the spread: no verdict."
    by_score = {
        "best forget quality": results.verdicts("quality"),
        "hypervolume": results.verdicts("hypervolume"),
    }
    lines = []
    for arm in ARMS:
        if arm == BASELINE:
            continue
        counts = []
        for title, verdicts in by_score.items():
            of_arm = [verdict for (_, other), verdict in verdicts.items() if other == arm]
            wins = sum(verdict.outcome == WINS for verdict in of_arm)
            losses = sum(verdict.outcome == LOSES for verdict in of_arm)
            beyond = sum(verdict.excludes_zero for verdict in of_arm)
            counts.append(
                f"{title}: wins {wins}, loses {losses} of {len(of_arm)} objectives ({beyond} beyond the 95% interval)"
            )
        lines.append(f"- {TITLES[arm]} against {TITLES[BASELINE]}, {'; '.join(counts)}.")
    return "\n".join(lines)


def _wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(text, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def grids(results: Results) -> str:
    """Return tables of all points of all grids: forget quality / retain probability, means over the seeds."""
    config = results.config
    tables = []
    for objective in results.objectives:
        points_of = {arm: results.points(objective, arm) for arm in ARMS}
        rows = []
        for index in range(len(config["lrs"][BASELINE])):
            for alpha in config["alphas"]:
                cells = [_grid_cell(points_of[arm][config["lrs"][arm][index], alpha, None, None]) for arm in ARMS]
                rows.append([f"{index + 1}, {alpha:g}", *cells])
        tables.append(markdown([f"{OBJECTIVES[objective]}: lr, alpha", *(TITLES[arm] for arm in ARMS)], rows))
    points = results.points(INFLUENCE, INFLUENCE)
    rows = [
        [f"{damping:g}, {step:g}", _grid_cell(points[None, None, damping, step])]
        for damping in config["dampings"]
        for step in config["steps"]
    ]
    tables.append(markdown(["damping, step", TITLES[INFLUENCE]], rows))
    return "\n\n".join(tables)


def _grid_cell(rows: Sequence[Row]) -> str:
    if not rows:
        return "diverged"
    quality = statistics.fmean(row["forget_quality"] for row in rows)
    retain_prob = statistics.fmean(row["retain_prob"] for row in rows)
    return f"{quality:.1f} / {retain_prob:.3f}"


def aimed_lines(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a sentence on each run of ``soul unlearn`` with an aim: its verdict, and what it took."""
    lines = []
    for run in runs:
        seconds = "" if run["seconds"] is None else f" in {run['seconds']:.0f} seconds"
        name = run["optimizer"].upper() if run["optimizer"] != BASELINE else TITLES[BASELINE]
        lines.append(f"{name}: {aim_summary(run)}. It took {run['steps']} steps{seconds}: `{run['directory']}/report.html`.")
    return lines


def _aimed(runs: Sequence[Mapping[str, Any]]) -> str:
    """Return the section on runs with an aim; "" without any."""
    if not runs:
        return ""
    items = "\n".join(_wrapped(f"- {line}", indent="  ") for line in aimed_lines(runs))
    return f"""## With an aim

`soul unlearn` on the same model, given its files and the optimizer and no learning rate: it looks for that itself, and is led
to its aim. Control rows are some of the retain rows, held out.

{items}

"""


def observations(results: Results) -> str:
    """Return a list of further numbers: clipping, cost, and whether forgetting more makes forget quality worse."""
    lines = []
    for arm in ARMS:
        rows = [row for objective in results.objectives for row in results.rows(objective, arm)]
        clipped = [row["clip_fraction"] for row in rows if "clip_fraction" in row]
        if clipped:
            low, high = min(clipped), max(clipped)
            lines.append(f"- {TITLES[arm]}: {low:.2f} to {high:.2f} of the coordinates clipped (means of single runs).")
    for objective in results.objectives:
        costs = {TITLES[arm]: results.cost(objective, arm) for arm in ARMS}
        numbers = ", ".join(f"{title} {cost:+.3f}" for title, cost in costs.items() if cost is not None) or "none chosen"
        lines.append(f"- {OBJECTIVES[objective]}, retain probability of the chosen run minus that of the start: {numbers}.")
    for objective in results.objectives:
        gaps = {TITLES[arm]: results.overshoot(objective, arm) for arm in ARMS}
        numbers = ", ".join(f"{title} {gap:+.1f}" for title, gap in gaps.items() if gap is not None) or "all diverged"
        lines.append(
            f"- {OBJECTIVES[objective]}, forget quality of the run that forgets most minus the best of its arm: {numbers}."
        )
    return "\n".join(lines)


def rule(seeds: int) -> str:
    """Return the rule by which verdicts are given, for a number of seeds."""
    chosen = "The runs are chosen by the same numbers that are reported, in every arm alike, so all numbers are optimistic."
    if seeds == 1:
        return f"With one seed there is no spread to judge a difference from AdamW by, and no verdict. {chosen}"
    return (
        "It wins or loses against AdamW if the mean difference over the seeds, from the same starts, is larger than the "
        f"standard deviation of the differences. With {seeds} seeds chance alone does that for {100 * chance(seeds):.2g}% of "
        f"comparisons, so Student's 95% interval of the mean is given as well. {chosen}"
    )


def report(content: Mapping[str, Any], *, title: str, pictures: str = "") -> str:
    """Return the whole report, as markdown.

    Args:
        content: the return value of `soul.study.run.run_study`, or the same from JSON.
        title: heading of the report.
        pictures: prefix of the names of the pictures: the directory that they are in.
    """
    results = Results(content)
    config = results.config
    quality = results.verdicts("quality")
    volume = results.verdicts("hypervolume")
    sentences = "\n".join(
        sentence(objective, arm, quality[objective, arm], volume[objective, arm]) for objective, arm in quality
    )
    seeds = ", ".join(map(str, results.seeds))
    several = len(results.seeds) > 1
    by_seed = ", seed by seed" if several else ""
    of_means = " of the means over the seeds" if several else ""
    means = ", means over the seeds" if several else ""
    if several and results.diverged():
        means += " that did not diverge"
    lead = "" if several else "An arm's number minus AdamW's, from the same start:\n\n"
    chosen = f"run with the best forget quality among those that keep {config['keep']:.0%} of the retain probability."
    chosen = (
        f"For each seed, the {chosen}\nMean ± standard deviation over the seeds that have one." if several else f"The {chosen}"
    )
    points = len(config["lrs"][BASELINE]) * len(config["alphas"])
    lrs = {arm: ", ".join(f"{lr:g}" for lr in rates) for arm, rates in config["lrs"].items()}
    rates = f"for all of them {lrs[BASELINE]}"
    if len(set(lrs.values())) > 1:
        rates = "; ".join(f"{TITLES[arm]} {of_arm}" for arm, of_arm in lrs.items())
    alphas = ", ".join(f"{alpha:g}" for alpha in config["alphas"])
    training = next(iter(results.starts.values()))["training"]["full"]
    models = _wrapped(
        f"{content['data']} {'Per seed' if several else 'With one seed'} ({seeds}), two Llamas of "
        f"{training['parameters'] / 1e6:.2f} M parameters are trained from scratch for {config['train_epochs']} epochs, one on "
        f"all rows and one on the retain rows only. Every run{' of the seed' if several else ''} unlearns the first of them, "
        "and is measured against the second."
    )
    prompt_note = PROMPT_NOTE if all(PROMPT in start for start in results.starts.values()) else ""
    environment = content["environment"]
    clock = "processor time" if "processes of one thread" in environment["device"] else "wall-clock time"
    resumed = " since it was resumed" if content["resumed"] else ""
    computed = _wrapped(
        f"Computed on {environment['device']}, torch {environment['torch']}, transformers {environment['transformers']}: "
        f"{len(results.all_rows)} runs in {content['seconds'] / 60:.1f} minutes{resumed}, training included; "
        f"{results.work() / 60:.1f} minutes of {clock}. Numbers: `{pictures}results.json`."
    )
    return f"""# {title}

{models}

{computed}

{_aimed(content.get("aimed", ()))}## The rules, fixed in advance

- Every optimizer has a grid of {points} points for every objective: learning rates times values of alpha, the
  weight of the retain term. Learning rates: {rates}; alpha: {alphas}. The influence update takes a
  single step and has no objective; its grid of damping times step has as many points.
- A run takes {config["epochs"]} epochs with {config["batch_size"]} forget and as many retain sequences a step, warm-up,
  linear decay, gradients clipped to norm 1, and no weight decay. "SOUL as published" has the momentum of its code, rho 0.04
  and bs 5120. The other two SOULs keep {config["clip_target"]:.0%} of the coordinates clipped, and refresh h from retain
  tokens every {config["curvature_every"]} steps.
- Forget quality is log10 of the p-value of TOFU's KS test of truth ratios on the forget set, against the retain model of the
  same seed: 0 is perfect. An optimizer is judged by its whole grid{by_seed}: by the **best forget quality** among the runs
  that keep {config["keep"]:.0%} of the retain probability (that of the start, if no run is better), and by the
  **hypervolume** under its front of retain probability and forget quality, above the forget quality of the start.
- {_wrapped(rule(len(results.seeds)), indent="  ")}

## Does second order beat AdamW?

{summary(results)}

{lead}{sentences}

## The chosen runs

{chosen}

{table(results)}

- prob: length-normalised probability of the answers. Utility: harmonic mean of probability, exact memorization and truth
  ratio on retain rows. It is TOFU's model utility without what a model from scratch cannot know, and without generation.
- MIA: area under the ROC curve of membership inference, forget rows against rows that no model has seen. 1: the forget rows
  are remembered; 0.5: they are not; below 0.5: they are less likely than unseen rows, which gives them away as well.
- Seconds: {clock} of unlearning alone.{prompt_note}

## Frontiers

![forget quality against retain probability]({pictures}frontiers.png)

Faint: every run. Strong: the front{of_means}. Dotted: the retain probability that a run must keep.

Forget quality / retain probability of every grid point{means}; learning rates by their position in the grid.

{grids(results)}

## Utility, steps, clipping

{observations(results)}

![utility against forget probability]({pictures}utility.png)

![likelihoods over the steps]({pictures}curves.png)

The chosen runs of seed {config["seeds"][0]}, on the batch of each step; if none is chosen, the run of best forget quality.

![clipped fraction over the steps]({pictures}clipped.png)

Means over all runs of an arm.
"""


def write_report(study: Study, content: Mapping[str, Any], *, title: str) -> pathlib.Path:
    """Write ``results.json``, ``report.md`` and the pictures into the output directory, and return the path of the report.

    Args:
        study: the study.
        content: the return value of `soul.study.run.run_study`.
        title: heading of the report.
    """
    starts = {
        seed: start | {name: _rounded(start[name]) for name in (*MODELS, PROMPT) if name in start}
        for seed, start in content["starts"].items()
    }
    content = {**content, "starts": starts, "rows": [_rounded(row) for row in content["rows"]]}
    write_text(study.output / RESULTS_FILE, json.dumps(content, separators=(",", ":")) + "\n")
    draw(Results(content), study, study.output)
    path = study.output / "report.md"
    write_text(path, report(content, title=title))
    return path


def write_html_report(output: pathlib.Path, content: Mapping[str, Any], *, title: str) -> pathlib.Path:
    """Write the report of a study, with its pictures, as one HTML file, and return its path.

    Args:
        output: directory of the study, in which `write_report` has written the pictures.
        content: the return value of `soul.study.run.run_study`.
        title: heading of the report.
    """
    lead, *parts = report(content, title=title).partition("\n")[2].split("\n## ")
    verdict = _page_verdict(content)
    sections = [Section("What was done", (Prose(lead),))]
    for part in parts:
        heading, _, body = part.partition("\n")
        sections.append(Section(heading, (Prose(body, output),)))
    return write_html(output, Page(title, "", verdict, (), tuple(sections)))


def _page_verdict(content: Mapping[str, Any]) -> PageVerdict:
    """Return what comes first on the page: whether the runs with an aim have reached it or, without any, who has won."""
    runs = content.get("aimed", ())
    if not runs:
        lines = tuple(line.removeprefix("- ") for line in summary(Results(content)).splitlines())
        return PageVerdict(OPEN, "SOUL against AdamW", lines)
    reached = sum(run["reached"] for run in runs)
    if reached == len(runs):
        outcome, headline = GOOD, "Aim reached"
    else:
        outcome, headline = (MIXED if reached else BAD), f"Aim reached in {reached} of {len(runs)} runs"
    return PageVerdict(outcome, headline, tuple(line.replace("`", "") for line in aimed_lines(runs)))


def _rounded(row: Row) -> Row:
    """Return the numbers of a run, or of a model before unlearning, rounded to six digits.

    Both are rounded, so that a run that is equal to its start stays so. The options in ``GRID`` are not, since runs are looked
    up by the values in the config.
    """
    return {
        name: float(f"{value:.6g}") if isinstance(value, float) and name not in GRID else value for name, value in row.items()
    }

"""The page of an unlearning run, made of the files in its output directory alone.

So it can be made again at any time, also of a run that was interrupted or is still going on.
"""

import json
import pathlib
import shlex
from collections.abc import Callable
from typing import Any

from soul.output.directory import NOTES_FILE
from soul.output.files import replace_text
from soul.report.page import (
    BAD,
    GOOD,
    MIXED,
    OPEN,
    Block,
    Chart,
    Charts,
    Commands,
    Figure,
    Level,
    Page,
    Pairs,
    Point,
    Sample,
    Samples,
    Section,
    Series,
    Table,
    Text,
    Verdict,
)
from soul.report.records import Record, Run, is_number, read_json
from soul.report.words import counted, duration, number, one_line, options_of, probability, ratio, sentence, shortened
from soul.report.write import attempt, write_page

FORGOTTEN = 0.5  # of the start: without an aim, answers that have fallen to this count as forgotten
KEPT = 0.95  # of the start: without an aim, what has stayed above this counts as kept
ALMOST_ALL = 0.9  # of the start: answers that have stayed above this were not forgotten at all
MUCH = 0.75  # of the start: what has fallen below this was not just paid for forgetting, but lost
REFUSING = ("po", "dpo")  # methods that teach refusals, which the probability of an answer does not show
SETS = {"forget": "To be forgotten", "control": "Control", "retain": "To be kept", "general": "General"}
FORGET, KEEP, OTHER, CLIPPED = range(4)  # colors of curves
METRIC_SETS = {"forget": FORGET, "retain": KEEP, "real_authors": OTHER, "world_facts": CLIPPED}  # with their colors


def report_on_run(directory: pathlib.Path, numbers: Record | None = None) -> list[str]:
    """Write the report of the run in an output directory, and return lines for a terminal: what the model says, and the path.

    Nothing is raised: if there can be no report, the last line says why.

    Args:
        directory: the output directory.
        numbers: what the notes of the run are to have beside their content, such as ``forget_prob``, before and after.
    """
    lines: list[str] = []

    def write() -> pathlib.Path:
        if numbers:
            notes = read_json(directory / NOTES_FILE) | numbers
            replace_text(directory / NOTES_FILE, json.dumps(notes, indent=1) + "\n")
        run = Run(directory)
        lines.extend(samples_text(run))
        return write_page(directory, run_page(run))

    last = attempt(write)
    return [*lines, last]


def run_page(run: Run) -> Page:
    """Return the page of a run."""
    sections = [
        Section("Rows that failed", _failed(run)),
        Section("Forgetting and keeping", _probabilities(run)),
        Section("Metrics during the run", _metrics(run)),
        Section("What the model says", _samples(run)),
        Section("The optimization", (*_curves(run), *_pilot(run))),
        Section("Data", _data(run)),
        Section("What next", _next(run)),
        Section("Options", (Pairs(options_of(run.options)),), folded=True),
        Section("Environment", (Pairs(options_of(run.notes.get("environment", {}))),), folded=True),
    ]
    model = str(run.options.get("model", "a model"))
    words = [str(run.options.get("method", "")), str(run.options.get("optimizer", "")), counted(len(run.steps), "step")]
    words += [str(run.notes["ended_at"])] if "ended_at" in run.notes else []
    return Page(
        title=f"Unlearning of {model}",
        subtitle=" · ".join(word for word in words if word),
        verdict=_verdict(run),
        figures=_figures(run),
        sections=tuple(section for section in sections if any(_has_content(block) for block in section.blocks)),
    )


def _has_content(block: Block) -> bool:
    return not isinstance(block, Pairs) or bool(block.rows)


# The verdict


def _verdict(run: Run) -> Verdict:
    if not run.ended and run.steps and any(run.steps[-1].get(name, 0.0) is None for name in ("loss", "grad_norm")):
        step = run.steps[-1]["step"]
        return Verdict(BAD, "This run has diverged", (f"Loss or gradient are not finite at step {step}. No model was saved.",))
    if not run.ended:
        last = f"The last step in the log is {run.steps[-1]['step']}." if run.steps else "It has not taken a step."
        resume = "The same command with --resume goes on from the newest checkpoint, if there is one."
        return Verdict(OPEN, "This run has not ended", (last, resume))
    return _verdict_on_aim(run) if "reached" in run.verdict else _verdict_without_aim(run)


def _verdict_on_aim(run: Run) -> Verdict:
    verdict = run.verdict
    sentences = [str(text) for text in verdict.get("sentences", ())]
    if verdict.get("not_judged"):
        sentences.append(f"Judged by probability alone, not by what the model says: {verdict['not_judged']}.")
    if is_number(verdict.get("forget_prob")) and is_number(verdict.get("aim")):
        source = f" ({verdict['aim_source']})" if verdict.get("aim_source") else ""
        start = f", from {probability(verdict['forget_prob_start'])}" if is_number(verdict.get("forget_prob_start")) else ""
        sentences.append(
            f"Probability of the answers to be forgotten: {probability(verdict['forget_prob'])}{start}. "
            f"The aim was at most {probability(verdict['aim'])}{source}."
        )
    if is_number(verdict.get("control_prob")) and is_number(verdict.get("control_prob_start")):
        share = ratio(verdict["control_prob"], verdict["control_prob_start"])
        at_least = f"; at least {verdict['keep']:.0%} were to be kept" if is_number(verdict.get("keep")) else ""
        sentences.append(
            f"Probability of the control answers: {probability(verdict['control_prob'])}, {share} of the start{at_least}."
        )
    sentences += [sentence(str(verdict[name])) for name in ("reason", "advice") if verdict.get(name)]
    if verdict["reached"]:
        return Verdict(GOOD, "Aim reached", tuple(sentences))
    return Verdict(BAD, "Aim not reached", tuple(sentences))


def _failed(run: Run) -> tuple[Block, ...]:
    """Return the rows that failed, with what the model was asked and said."""
    rows = [row for row in run.verdict.get("failed", ()) if isinstance(row, dict)]
    if not rows:
        return ()
    head = ("Failure", "Asked", "The model said", "Words that count", "Before")
    cells = (
        (
            str(row.get("failure")),
            str(row.get("asked")),
            str(row.get("said")),
            ", ".join(row.get("keys", ())),
            str(row.get("before", "")),
        )
        for row in rows
    )
    return (Table(head, tuple(tuple(shortened(cell) for cell in line) for line in cells), plain=True),)


def _verdict_without_aim(run: Run) -> Verdict:
    forget, kept = run.ends("forget"), run.ends(run.kept_name)
    if forget is None:
        return Verdict(OPEN, "The run has ended", ("What it has forgotten was not measured.",))
    sentences = [f"Probability of the answers to be forgotten: {_change(*forget)}."]
    if kept is not None:
        sentences.append(f"Probability of the answers to be kept: {_change(*kept)}.")
    if run.options.get("method") in REFUSING:
        method = str(run.options["method"]).upper()
        why = f"{method} teaches the model to refuse, which the probability of an answer does not show: read the answers below."
        return Verdict(OPEN, "Judge by the answers", (*sentences, why))
    outcome, headline, advice = _judged(_share(forget), None if kept is None else _share(kept))
    measure = f"No aim was given; this page takes half of the start for forgotten and {KEPT:.0%} of it for kept."
    return Verdict(outcome, headline, (*sentences, measure, *advice))


def _judged(left: float, kept: float | None) -> tuple[str, str, tuple[str, ...]]:
    """Return outcome, headline and advice for the shares of their start that forget and retain probability still have."""
    if left <= FORGOTTEN:
        if kept is None:
            return OPEN, "Forgotten; what was kept was not measured", ()
        if kept >= KEPT:
            return GOOD, "Forgotten, and the rest kept", ()
        headline = "Forgotten, at a cost" if kept >= MUCH else "Forgotten, and so was much of what was to be kept"
        return MIXED, headline, ("To keep more, raise --alpha or lower --lr.",)
    if kept is None or kept >= KEPT:
        headline = "Next to nothing was forgotten" if left > ALMOST_ALL else "Not enough was forgotten"
        return BAD, headline, ("To forget more, raise --epochs or --lr.",)
    advice = "Both terms work against each other here: try a lower --lr with more --epochs, and another --alpha."
    return BAD, "Not forgotten, and not kept either", (advice,)


def _share(ends: tuple[float, float]) -> float:
    """Return the second of two probabilities as a share of the first; 1 if there was nothing to lose."""
    return ends[1] / ends[0] if ends[0] else 1.0


def _change(first: float, last: float) -> str:
    return f"{probability(first)} before, {probability(last)} after, {ratio(last, first)} of the start"


def _figures(run: Run) -> tuple[Figure, ...]:
    figures = []
    for name, label in (("forget", "Forget probability"), (run.kept_name, f"{run.kept_name.capitalize()} probability")):
        ends = run.ends(name)
        if ends is not None:
            value = f"{probability(ends[0])} → {probability(ends[1])}"
            figures.append(Figure(label, value, f"{ratio(ends[1], ends[0])} of the start"))
    if run.steps:
        epochs = run.steps[-1].get("epoch")
        figures.append(Figure("Steps", number(run.steps[-1]["step"]), counted(epochs, "epoch") if epochs else ""))
    if is_number(run.notes.get("seconds")):
        figures.append(
            Figure("Time", duration(run.notes["seconds"]), "since it was resumed" if run.notes.get("resumed") else "")
        )
    clipped = run.curve("clip_fraction")
    if clipped:
        figures.append(Figure("Clipped", f"{clipped[-1][1]:.0%}", "of the coordinates, in the last step"))
    memory = run.curve("peak_memory_gib")
    if memory:
        figures.append(Figure("Peak memory", f"{memory[-1][1]:.3g} GiB"))
    return tuple(figures)


# The sections


def _samples(run: Run) -> tuple[Block, ...]:
    samples = samples_of(run.notes)
    if samples:
        most = run.notes.get("max_new_tokens")
        how = (
            f"Greedy answers of at most {most} tokens, to prompts that were chosen by their position alone. "
            "p: the probability of the answer in the data."
        )
        return Text(how), Samples(samples)
    return (Text(str(run.notes.get("no_samples") or "No answers were asked for in this run.")),)


def samples_of(notes: Record) -> tuple[Sample, ...]:
    """Return the samples in the notes of a run, the content of ``report.json``."""
    asked = notes.get("asked", [])
    samples = []
    for index, prompt in enumerate(notes.get("prompts", [])):
        answers, remarks = [], []
        for record in asked:
            time = "after" if record.get("end") else f"step {record['step']}" if record["step"] else "before"
            answers.append((time, shortened(record["texts"][index].strip()) or "(nothing)"))
            value = record.get("probabilities", {}).get(str(index))
            remarks.append(f"p {probability(value)}" if is_number(value) else "")
        group = SETS.get(prompt["set"], prompt["set"])
        expected = shortened(prompt.get("answer", ""))
        samples.append(Sample(group, shortened(prompt["prompt"]), expected, tuple(answers), tuple(remarks)))
    return tuple(samples)


def samples_text(run: Run) -> list[str]:
    """Return what the model said before and after, as lines for a terminal; [] if it was not asked."""
    lines = []
    for sample in samples_of(run.notes):
        answers = dict(sample.answers)
        if "before" in answers and "after" in answers:
            lines.append(f"{sample.group}: {one_line(sample.prompt)}")
            lines += [f"  {f'{time}:':8}{one_line(answers[time])}" for time in ("before", "after")]
    return lines


def _probabilities(run: Run) -> tuple[Block, ...]:
    kept = run.kept_name
    levels = []
    if is_number(run.verdict.get("aim")):
        levels.append(Level(f"aim {probability(run.verdict['aim'])}", run.verdict["aim"], 0))
    start, keep = run.verdict.get("control_prob_start"), run.verdict.get("keep")
    if start is not None and keep is not None and is_number(start) and is_number(keep):
        levels.append(Level(f"keep {probability(start * keep)}", start * keep, 1))
    charts = (
        _chart("Probability of the answers", (FORGET, "forget", run.probabilities("forget")),
               (KEEP, kept, run.probabilities(kept)), levels=tuple(levels), unit_interval=True,
               note=_note_on_probabilities(run)),
        _chart("Loss of each batch, a token", (FORGET, "forget", run.curve("forget_nll")),
               (KEEP, "retain", run.curve("retain_nll")), note="Negative log-likelihood in nats. Forgetting raises the first."),
    )  # fmt: skip
    return _shown(charts)


def _note_on_probabilities(run: Run) -> str:
    note = "Mean over rows of the length-normalised probability."
    if any(record.get("exact") is False for record in run.aims):
        note += " Far from the aim, that of the rows to be forgotten is taken from the batches."
    return note


def _metrics(run: Run) -> tuple[Block, ...]:
    """Return the curves of ``--eval-metrics``, one chart for each quantity, and the point that ``--keep-best`` has kept."""
    by_quantity: dict[str, list[tuple[int, str, tuple[Point, ...]]]] = {}
    for key, value in run.metrics.items():
        if key in ("event", "step", "forget_prob", "retain_prob"):
            continue
        of_set = next((name for name in METRIC_SETS if key.startswith(f"{name}_") and key != "forget_quality"), "")
        quantity = key.removeprefix(f"{of_set}_").replace("_", " ")
        points = (*(((0, value),) if is_number(value) else ()), *run.curve(key))
        curve = METRIC_SETS.get(of_set, OTHER), of_set.replace("_", " ") or quantity, points
        by_quantity.setdefault(quantity, []).append(curve)
    blocks = _shown(tuple(_chart(quantity.capitalize(), *curves) for quantity, curves in by_quantity.items()))
    if not run.best:
        return blocks
    step = run.best.get("best_step")
    if step is None:
        kept = "No evaluated point met the conditions of the rule; the last weights were saved."
    else:
        kept = f"The weights of step {step} were saved, the best of the evaluated points."
    return (*blocks, Text(f"{kept} The rule: {run.best.get('rule')}."))


def _curves(run: Run) -> tuple[Block, ...]:
    charts = (
        _chart("Objective and its terms", (FORGET, "forget term", run.curve("loss_forget")),
               (KEEP, "retain term", run.curve("loss_retain")), (OTHER, "sum", run.curve("loss"))),
        _chart("Alpha, the weight of keeping", (KEEP, "alpha", run.curve("alpha", run.aims))),
        _chart("Learning rate", (OTHER, "lr", run.curve("lr")), may_log=True),
        _chart("Clipped fraction", (CLIPPED, "clipped", run.curve("clip_fraction")), unit_interval=True,
               note="Of the coordinates of a step."),
        _chart("Rho, the clipping threshold", (CLIPPED, "rho", run.curve("rho")), may_log=True),
        _chart("Norm of the gradient", (OTHER, "gradient norm", run.curve("grad_norm")), may_log=True, note="Before clipping."),
        _chart("Tokens a second", (OTHER, "tokens a second", run.curve("tokens_per_s"))),
    )  # fmt: skip
    return _shown(charts)


def _shown(charts: tuple[Chart | None, ...]) -> tuple[Block, ...]:
    """Return the charts that have curves, as a block; without any, none."""
    shown = tuple(chart for chart in charts if chart is not None)
    return (Charts(shown),) if shown else ()


def _pilot(run: Run) -> tuple[Block, ...]:
    """Return the learning rates that were tried before the first step, and where the run went back to earlier weights."""
    blocks: list[Block] = []
    if run.pilot:
        head = ("learning rate", "alpha", "rise of the forget loss a step", "control kept")
        rows = tuple(
            (number(record.get("lr")), number(record.get("alpha")), _or_diverged(record, "response", number),
             _or_diverged(record, "kept", "{:.0%}".format))
            for record in run.pilot
        )  # fmt: skip
        blocks.append(Text("Rates that were tried before the first step; the weights were restored after each try."))
        blocks.append(Table(head, rows))
    for record in run.aims:
        if "back_to" in record:
            blocks.append(Text(f"After step {record['step']} the run went back to the weights of step {record['back_to']}."))
    return tuple(blocks)


def _or_diverged(record: Record, key: str, shown: Callable[[float], str]) -> str:
    value: Any = record.get(key)
    return shown(value) if is_number(value) else "diverged"


def _chart(title: str, *curves: tuple[int, str, tuple[Point, ...]], may_log: bool = False, **options: Any) -> Chart | None:
    """Return a chart of those curves (color, name, points) that have points; None without any."""
    series = tuple(Series(name, points, color) for color, name, points in curves if points)
    heights = [y for curve in series for _, y in curve.points]
    if not heights:
        return None
    return Chart(title, series, log=may_log and 0 < 50 * min(heights) < max(heights), **options)


def _data(run: Run) -> tuple[Block, ...]:
    columns = {"rows": "rows", "blank": "blank, left out", "no_room": "too long, left out", "truncated": "cut",
               "split": "split", "pieces": "pieces"}  # fmt: skip
    sets = {name: counts for name, counts in run.data.items() if isinstance(counts, dict) and "rows" in counts}
    used = {key: title for key, title in columns.items() if key == "rows" or any(counts.get(key) for counts in sets.values())}
    rows = tuple((name, *(number(counts.get(key, 0)) for key in used)) for name, counts in sets.items())
    sources = tuple((name, str(run.options[name])) for name in ("forget", "retain", "control") if run.options.get(name))
    return (Table(("set", *used.values()), rows), Pairs(sources)) if rows else (Pairs(sources),)


def _next(run: Run) -> tuple[Block, ...]:
    output, model = shlex.quote(str(run.directory)), shlex.quote(str(run.options.get("model", "MODEL")))
    template = _template_words(run.options)
    if not run.ended:
        return (Commands((("Make this page again, of what the directory holds then:", f"soul report {output}"),)),)
    undo = "The model before unlearning was not changed. To undo, use it, and delete this directory."
    if (run.directory / "adapter_config.json").is_file():
        undo = "This directory holds adapters; without them the model is as it was. To undo, leave them out."
    python = f"from soul.models import load\nmodel, tokenizer = load({str(run.directory)!r})"
    commands = (
        ("Ask this model and the one before it the same questions:", f"soul ask {output} --against {model}{template}"),
        ("Measure it with TOFU's metrics (docs/evaluation.md; DIR has TOFU's files):",
         f"soul evaluate --model {output} --data DIR --output {shlex.quote(str(run.directory) + '-evaluation')}{template}"),
        ("Load it in Python:", python),
        ("Publish model, tokenizer and model card. The report quotes rows that were to be forgotten, so it stays here:",
         f"soul push {output} OWNER/NAME"),
        ("Make this page again:", f"soul report {output}"),
    )  # fmt: skip
    return Text(undo), Commands(commands)


def _template_words(options: Record) -> str:
    words = [f"--{name} {shlex.quote(str(options[name]))}" for name in ("template", "system") if options.get(name)]
    return "".join(f" {word}" for word in words if word != "--template plain")

"""The page of an evaluation with TOFU's metrics, made of the numbers that `soul.evaluate.metrics.summarize` returns."""

from collections.abc import Mapping, Sequence
from typing import Any

from soul.report.page import BAD, GOOD, OPEN, Block, Figure, Page, Pairs, Sample, Samples, Section, Table, Text, Verdict
from soul.report.words import number, options_of, probability, shortened

SETS = {"forget": "forget", "retain": "retain", "real_authors": "real authors", "world_facts": "world facts"}
COLUMNS = {  # name of a number without its set -> title
    "prob": "probability",
    "rouge": "ROUGE-L recall",
    "truth_ratio": "truth ratio",
    "exact_memorization": "exact memorization",
    "extraction_strength": "extraction strength",
    "rows": "rows",
}
MEMBERSHIP = {
    "forget_loss_auc": "loss",
    "forget_zlib_auc": "zlib",
    "forget_reference_auc": "reference model",
    "forget_gradnorm_auc": "gradient norm",
    "forget_min_k_auc": "Min-K%",
    "forget_min_k_plus_plus_auc": "Min-K%++",
}
SIGNIFICANT = 0.05  # TOFU's level: below it, the model can be told from one that never saw the forget set


def evaluation_page(
    model: str,
    summary: Mapping[str, float],
    texts: Mapping[str, Sequence[Sequence[str]]],
    options: Mapping[str, Any],
) -> Page:
    """Return the page of an evaluation.

    Args:
        model: name of the model.
        summary: name -> number.
        texts: set -> triples of prompt, generated answer and true answer, to be shown.
        options: options of the command.
    """
    sections = [Section("By set", (_by_set(summary), Text("docs/evaluation.md defines every number."))), *_membership(summary)]
    samples = tuple(
        Sample(SETS.get(name, name), shortened(prompt), shortened(truth), (("the model says", shortened(text) or "(nothing)"),))
        for name, triples in texts.items()
        for prompt, text, truth in triples
    )
    if samples:
        sections.append(Section("What the model says", (Samples(samples),)))
    sections.append(Section("Options", (Pairs(options_of(options)),), folded=True))
    return Page(f"Evaluation of {model}", "TOFU's metrics", _verdict(summary), _figures(summary), tuple(sections))


def _verdict(summary: Mapping[str, float]) -> Verdict:
    if "forget_quality" not in summary:
        remedy = "Pass --retain-model or --retain-logs: a model that never saw the forget set is what to compare with."
        return Verdict(OPEN, "No retain model, so no forget quality", (remedy,))
    quality = summary["forget_quality"]
    test = f"Kolmogorov-Smirnov test of the truth ratios on the forget set against the retain model: p = {quality:.3g}."
    if quality >= SIGNIFICANT:
        headline = "Not told apart from a model that never saw the forget set"
        return Verdict(GOOD, headline, (test, f"Below {SIGNIFICANT:g} the two would differ significantly."))
    headline = "Told apart from a model that never saw the forget set"
    meaning = f"It would have to be at least {SIGNIFICANT:g}: too little was forgotten, or too much."
    return Verdict(BAD, headline, (test, meaning))


def _figures(summary: Mapping[str, float]) -> tuple[Figure, ...]:
    figures = []
    if "forget_quality" in summary:
        figures.append(Figure("Forget quality", f"{summary['forget_quality']:.3g}", "p-value; 1 is best"))
    figures.append(Figure("Model utility", f"{summary['model_utility']:.3f}", "harmonic mean of nine; 1 is best"))
    for name in ("forget", "retain"):
        figures.append(Figure(f"{SETS[name].capitalize()} probability", probability(summary[f"{name}_prob"])))
    return tuple(figures)


def _by_set(summary: Mapping[str, float]) -> Table:
    names = [name for name in SETS if f"{name}_rows" in summary]
    columns = {key: title for key, title in COLUMNS.items() if any(f"{name}_{key}" in summary for name in names)}
    rows = tuple(
        (SETS[name], *(number(summary[f"{name}_{key}"]) if f"{name}_{key}" in summary else "" for key in columns))
        for name in names
    )
    return Table(("set", *columns.values()), rows)


def _membership(summary: Mapping[str, float]) -> list[Section]:
    rows = tuple((title, number(summary[key])) for key, title in MEMBERSHIP.items() if key in summary)
    if not rows:
        return []
    meaning = "1: the forget rows are remembered. 0.5: they cannot be told from rows that the model never saw."
    blocks: tuple[Block, ...] = (Table(("attack", "area under the ROC curve"), rows), Text(meaning))
    return [Section("Membership inference", blocks)]

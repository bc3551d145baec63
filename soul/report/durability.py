"""The page of a model that was attacked: what it had forgotten, and what returned."""

from collections.abc import Mapping, Sequence
from typing import Any

from soul.report.page import BAD, GOOD, MIXED, OPEN, Figure, Page, Pairs, Section, Table, Text, Verdict
from soul.report.words import number, options_of, probability

QUANTITIES = {"prob": "probability", "rouge": "ROUGE-L recall", "extraction_strength": "extraction strength"}
NAMES = {"relearn": "relearned, forget rows", "relearn_retain": "relearned, retain rows", "sample": "drawn answers"}
LITTLE, MUCH = 0.1, 0.5  # share of what was forgotten that returned: up to the first, it lasts; from the second, it does not


def durability_page(model: str, outcomes: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> Page:
    """Return the page of `soul evaluate --durability`.

    Args:
        model: name of the model.
        outcomes: the fields of each `soul.durability.Outcome`, with ``returned`` from `returned`.
        options: options of the command.
    """
    attacked = [outcome for outcome in outcomes if outcome["start"] and outcome["name"] != "unlearned"]
    sections = [
        Section("After each attack", (table(outcomes), Text(_MEANING))),
        Section("The attacks", (Pairs(tuple((title(outcome["name"]), outcome["note"]) for outcome in attacked)),)),
        Section("Options", (Pairs(options_of(options)),), folded=True),
    ]
    figures = tuple(_figure(outcome) for outcome in attacked if "prob" in outcome["forget"])
    return Page(f"Durability of {model}", "what returns after an attack", _verdict(attacked), figures, tuple(sections))


_MEANING = (
    "An arrow leads from the unlearned model to the same rows after the attack. Returned: the share of what was forgotten that "
    "is back, (after - unlearned) / (before - unlearned), of the quantity of which most is back; it needs the model before "
    "unlearning. docs/durability.md says what each attack does."
)


def _figure(outcome: Mapping[str, Any]) -> Figure:
    """Return the probability of the forget rows after an attack, beside that of the unlearned model."""
    after, start = (probability(outcome[when]["prob"]) for when in ("forget", "start"))
    return Figure(title(outcome["name"]), after, f"unlearned: {start}")


def title(name: str) -> str:
    """Return what an outcome is called in tables."""
    return NAMES.get(name, name)


def returned(outcome: Mapping[str, Any], before: Mapping[str, float]) -> float | None:
    """Return the share of what was forgotten that an attack brought back: the largest of all quantities, or None.

    Args:
        outcome: the fields of a `soul.durability.Outcome`.
        before: quantity -> mean over the forget rows of the model before unlearning; may be empty.
    """
    shares = [
        (outcome["forget"][name] - start) / (before[name] - start)
        for name, start in outcome["start"].items()
        if name in outcome["forget"] and name in before and before[name] > start
    ]
    return max(shares, default=None)


def table(outcomes: Sequence[Mapping[str, Any]]) -> Table:
    """Return the table of all outcomes; arguments as in `durability_page`."""
    with_share = any(outcome.get("returned") is not None for outcome in outcomes)
    head = ("", "rows", *QUANTITIES.values(), *(("returned",) if with_share else ()), "retain probability")
    rows = []
    for outcome in outcomes:
        cells = [title(outcome["name"]), number(outcome["rows"])]
        for name in QUANTITIES:
            after, start = outcome["forget"].get(name), outcome["start"].get(name)
            moved = "" if start is None or outcome["name"] == "unlearned" else f"{probability(start)} → "
            cells.append("" if after is None else f"{moved}{probability(after)}")
        if with_share:
            share = outcome.get("returned")
            cells.append("" if share is None else f"{share:.0%}")
        retain = outcome["retain"].get("prob")
        rows.append((*cells, "" if retain is None else probability(retain)))
    return Table(head, tuple(rows))


def _verdict(attacked: Sequence[Mapping[str, Any]]) -> Verdict:
    shares = {title(outcome["name"]): outcome["returned"] for outcome in attacked if outcome.get("returned") is not None}
    if not shares:
        remedy = "Pass --against, the model before unlearning, to compare with."
        return Verdict(OPEN, "What returned is not measured", (remedy,))
    worst = max(shares, key=lambda name: shares[name])
    if shares[worst] <= LITTLE:
        return Verdict(GOOD, f"No attack brought back more than {LITTLE:.0%} of what was forgotten")
    outcome, word = (MIXED, "Part") if shares[worst] < MUCH else (BAD, "Much")
    return Verdict(outcome, f"{word} of what was forgotten returns: {shares[worst]:.0%} after {worst!r}")

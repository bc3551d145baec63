"""The page of an evaluation on a task: its numbers, for one model or two side by side, and what the models say."""

from collections.abc import Mapping, Sequence
from typing import Any

from soul.report.page import Figure, Page, Pairs, Sample, Samples, Section, Table, Text
from soul.report.words import number, options_of, shortened

ARROWS = {"higher": "higher is better", "lower": "lower is better", "neither": ""}
Texts = Mapping[str, Sequence[tuple[str, str, str]]]  # set -> triples of prompt, what the model says, answer of the row


def task_page(
    task: str,
    columns: Mapping[str, Mapping[str, float]],
    directions: Mapping[str, str],
    texts: Mapping[str, Texts],
    options: Mapping[str, Any],
    *,
    shown: int = 4,
) -> Page:
    """Return the page of an evaluation on a task.

    Args:
        task: name of the task.
        columns: title of a model -> its numbers by name. The first one is what the page is about.
        directions: name of a number -> "higher", "lower" or "neither".
        texts: title of a model -> what it says, the same rows for each.
        options: options of the command.
        shown: rows of each set that are shown, at equal distances.
    """
    titles = list(columns)
    numbers = columns[titles[0]]
    table = Table(("number", *titles, "better"), tuple(
        (name.replace("_", " "), *(number(columns[title][name]) for title in titles), ARROWS[directions[name]])
        for name in numbers
    ), plain=True)  # fmt: skip
    sections = [Section("Numbers", (table, Text("docs/tasks.md defines every number.")))]
    samples = []
    first = texts[titles[0]]
    for name, rows in first.items():
        for index in range(0, len(rows), -(-len(rows) // shown)):
            prompt, _, truth = rows[index]
            answers = tuple((title, shortened(texts[title][name][index][1]) or "(nothing)") for title in titles)
            samples.append(Sample(name.replace("_", " "), shortened(prompt), shortened(truth), answers))
    if samples:
        sections.append(Section("What the model says", (Samples(tuple(samples)),)))
    sections.append(Section("Options", (Pairs(options_of(options)),), folded=True))
    figures = tuple(
        Figure(name.replace("_", " "), number(numbers[name]), ARROWS[directions[name]]) for name in list(numbers)[:4]
    )
    return Page(f"Evaluation of {titles[0]}", f"the task {task}", None, figures, tuple(sections))

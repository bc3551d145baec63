"""A `soul.report.page.Page` as Markdown, for a terminal, a review or a model card. Curves become tables.

Every text of the page is escaped here (`_text`), so that a prompt cannot end a table or open a tag.
"""

import re

from soul.report.page import Block, Charts, Commands, Page, Pairs, Prose, Sample, Samples, Section, Table, Text, curve_tables
from soul.report.words import cleaned

OUTCOMES = {"good": "✔", "mixed": "◐", "bad": "✘", "open": "○"}


def render(page: Page) -> str:
    """Return a page as Markdown."""
    parts = [f"# {_text(page.title)}", _text(page.subtitle)]
    if page.verdict is not None:
        parts.append(f"**{OUTCOMES[page.verdict.outcome]} {_text(page.verdict.headline)}**")
        parts += [_text(sentence) for sentence in page.verdict.sentences]
    if page.figures:
        rows = tuple((figure.label, figure.value, figure.note) for figure in page.figures)
        parts.append(_table(Table(("", "", ""), rows, plain=True)))
    parts += [_section(section) for section in page.sections]
    return "\n\n".join(part for part in parts if part) + "\n"


def _section(section: Section) -> str:
    return "\n\n".join([f"## {_text(section.title)}", *map(_block, section.blocks)])


def _block(block: Block) -> str:
    match block:
        case Text():
            return _text(block.text)
        case Prose():
            return block.text.strip()
        case Table():
            return _table(block)
        case Pairs():
            return _table(Table(("", ""), block.rows, plain=True))
        case Charts():
            notes = [f"{chart.title}: {chart.note}" for chart in block.charts if chart.note]
            levels = [
                f"{chart.title}: {', '.join(level.name for level in chart.levels)}" for chart in block.charts if chart.levels
            ]
            return "\n\n".join([*map(_table, curve_tables(block)), *map(_text, notes), *map(_text, levels)])
        case Samples():
            return "\n\n".join(_sample(sample) for sample in block.samples)
        case Commands():
            return "\n\n".join(f"{_text(purpose)}\n\n{_fenced(command)}" for purpose, command in block.commands)


def _table(table: Table) -> str:
    rule = "|" + "|".join("---" if table.plain or not index else "---:" for index in range(len(table.head))) + "|"
    rows = ["| " + " | ".join(_text(cell) for cell in row) + " |" for row in (table.head, *table.rows)]
    return "\n".join([rows[0], rule, *rows[1:]])


def _sample(sample: Sample) -> str:
    notes = sample.notes or ("",) * len(sample.answers)
    lines = [f"**{_text(sample.group)}**: {_text(sample.prompt)}"]
    if sample.expected:
        lines.append(f"- in the data: {_text(sample.expected)}")
    for (time, text), note in zip(sample.answers, notes):
        lines.append(f"- {_text(time)}{f' ({_text(note)})' if note else ''}: {_text(text)}")
    return "\n".join([lines[0], "", *lines[1:]])


def _text(text: str) -> str:
    """Return a text on one line, escaped."""
    text = re.sub(r"\s*\n\s*", " ⏎ ", cleaned(text).strip()).replace("\t", " ")
    text = re.sub(r"([\\`*_\[\]|~#])", r"\\\1", text)
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"^(\d+)([.)])(?=\s|$)", r"\1\\\2", re.sub(r"^([-+=])", r"\\\1", text))


def _fenced(text: str) -> str:
    """Return a text as a code block, in a fence that it does not hold."""
    longest = max(map(len, re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{cleaned(text)}\n{fence}"

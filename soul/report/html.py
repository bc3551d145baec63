"""A `soul.report.page.Page` as one HTML file that needs nothing else: no script, no font, no picture from elsewhere.

Every text of the page is escaped here, in one place (`_text`), and the file forbids the browser to load or run anything.
"""

import base64
import html
import mimetypes
import pathlib
import re
from collections.abc import Iterator

from soul.report import charts
from soul.report.page import (
    Block,
    Chart,
    Charts,
    Commands,
    Figure,
    Page,
    Pairs,
    Prose,
    Sample,
    Samples,
    Section,
    Table,
    Text,
    Verdict,
    curve_tables,
)
from soul.report.style import STYLE
from soul.report.words import cleaned

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"  # what the browser may load: nothing


def render(page: Page) -> str:
    """Return a page as HTML."""
    names = (f"c{number}" for number in range(10**6))  # of charts
    verdict = "" if page.verdict is None else _verdict(page.verdict)
    figures = f'<dl class="figures">{"".join(map(_figure, page.figures))}</dl>' if page.figures else ""
    sections = "\n".join(_section(section, names) for section in page.sections)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{_text(page.title)}</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<h1>{_text(page.title)}</h1>
<p class="subtitle">{_text(page.subtitle)}</p>
</header>
<main>
{verdict}
{figures}
{sections}
</main>
<footer>Made by soul-kernels. This file loads nothing and runs nothing.</footer>
</body>
</html>
"""


def _text(text: str) -> str:
    """Return a text for HTML, escaped."""
    return html.escape(cleaned(text))


def _verdict(verdict: Verdict) -> str:
    sentences = "".join(f"<p>{_text(sentence)}</p>" for sentence in verdict.sentences)
    return f'<div class="verdict {verdict.outcome}"><p class="headline">{_text(verdict.headline)}</p>{sentences}</div>'


def _figure(figure: Figure) -> str:
    note = f'<dd class="note">{_text(figure.note)}</dd>' if figure.note else ""
    return f'<div><dt>{_text(figure.label)}</dt><dd class="value">{_text(figure.value)}</dd>{note}</div>'


def _section(section: Section, names: Iterator[str]) -> str:
    blocks = "\n".join(_block(block, names) for block in section.blocks)
    heading = f"<h2>{_text(section.title)}</h2>"
    if section.folded:
        return f"<details><summary>{heading}</summary>\n{blocks}\n</details>"
    return f"<section>{heading}\n{blocks}\n</section>"


def _block(block: Block, names: Iterator[str]) -> str:
    match block:
        case Text():
            return f"<p>{_text(block.text)}</p>"
        case Prose():
            return prose(block.text, block.folder)
        case Table():
            return _table(block)
        case Pairs():
            rows = "".join(f'<tr><th scope="row">{_text(name)}</th><td>{_text(value)}</td></tr>' for name, value in block.rows)
            return f'<table class="pairs">{rows}</table>'
        case Charts():
            return _charts(block, names)
        case Samples():
            return _samples(block.samples)
        case Commands():
            return "".join(f"<p>{_text(purpose)}</p><pre>{_text(command)}</pre>" for purpose, command in block.commands)


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{_text(cell)}</th>' for cell in table.head)
    rows = "".join(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in table.rows)
    kind = "" if table.plain else ' class="numbers"'
    # A focus lets the keyboard scroll it.
    return f'<div class="scroll" tabindex="0"><table{kind}><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _charts(block: Charts, names: Iterator[str]) -> str:
    """Return the charts as pictures; without matplotlib as tables, and how to install it."""
    missing = charts.missing()
    if missing is None:
        return f'<div class="charts">{"".join(_chart(chart, next(names)) for chart in block.charts)}</div>'
    return f'<p class="note">No pictures: {_text(missing)}</p>' + "".join(map(_table, curve_tables(block)))


def _chart(chart: Chart, name: str) -> str:
    entries = [("", series.color, series.name) for series in chart.series if len(chart.series) > 1]
    entries += [("level", level.color, level.name) for level in chart.levels]
    legend = "".join(
        f'<li class="{kind}" style="color: var(--series-{color})"><span>{_text(label)}</span></li>'
        for kind, color, label in entries
    )
    legend = legend and f'<ul class="legend">{legend}</ul>'
    note = chart.note and f"<figcaption>{_text(chart.note)}</figcaption>"
    return f"<figure><h3>{_text(chart.title)}</h3>{legend}{charts.svg(chart, name)}{note}</figure>"


def _samples(samples: tuple[Sample, ...]) -> str:
    parts = []
    group = None
    for sample in samples:
        if sample.group != group:
            group = sample.group
            parts.append(f"<h3>{_text(group)}</h3>")
        parts.append(_sample(sample))
    return "\n".join(parts)


def _sample(sample: Sample) -> str:
    # dir=auto: a prompt may be in a script that runs from right to left.
    expected = f'<div class="expected" dir="auto">In the data: {_text(sample.expected)}</div>' if sample.expected else ""
    notes = sample.notes or ("",) * len(sample.answers)
    answers = "".join(
        f'<div><dt>{_text(time)}{_text(note and f" · {note}")}</dt><dd class="text" dir="auto">{_text(text)}</dd></div>'
        for (time, text), note in zip(sample.answers, notes)
    )
    prompt = f'<div class="prompt text" dir="auto">{_text(sample.prompt)}</div>'
    return f'<article class="sample">{prompt}{expected}<dl class="answers">{answers}</dl></article>'


# Markdown of our own


def prose(text: str, folder: pathlib.Path | None = None) -> str:
    """Return Markdown of the library's own as HTML.

    Known are headings below the second level, paragraphs, lists of one level, tables, pictures that stand alone, ``**strong**``
    and ``code``. Whatever else there is stays text.

    Args:
        text: Markdown.
        folder: where its pictures are, which become part of the page.
    """
    return "\n".join(_prose_block(block.split("\n"), folder) for block in re.split(r"\n\s*\n", text.strip()))


def _prose_block(lines: list[str], folder: pathlib.Path | None) -> str:
    """Return a block of lines between blank ones as HTML."""
    picture = re.fullmatch(r"!\[([^\]]*)\]\(([^)]+)\)", lines[0])
    if picture and folder is not None:
        address = _data_address(folder / picture[2])
        return f'<figure class="scroll" tabindex="0"><img alt="{_text(picture[1])}" src="{address}"></figure>'
    if lines[0].startswith("### "):
        return f"<h3>{_inline(lines[0][4:])}</h3>"
    if lines[0].startswith("| ") and len(lines) > 2:
        head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
        cells = [f"<tr>{''.join(f'<td>{_inline(cell)}</td>' for cell in row)}</tr>" for row in rows]
        titles = "".join(f'<th scope="col">{_inline(cell)}</th>' for cell in head)
        table = f"<table><thead><tr>{titles}</tr></thead><tbody>{''.join(cells)}</tbody></table>"
        return f'<div class="scroll" tabindex="0">{table}</div>'
    if lines[0].startswith("- "):
        items = re.split(r"\n- ", "\n".join(lines)[2:])
        return f"<ul>{''.join(f'<li>{_inline(item)}</li>' for item in items)}</ul>"
    return f"<p>{_inline(chr(10).join(lines))}</p>"


def _inline(text: str) -> str:
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", _text(re.sub(r"\s*\n\s*", " ", text)))
    return re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", text)


def _data_address(path: pathlib.Path) -> str:
    """Return the content of a picture as an address of its own."""
    kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"

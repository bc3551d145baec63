"""What a report shows, as plain data. Nothing here knows of runs, files or HTML.

A `Page` has a verdict, a few figures and sections; a section is a list of blocks. `soul.report.html` and `soul.report.markdown`
render a page. Every text is shown as it is: renderers escape it, so prompts and paths may hold anything. The one exception is
`Prose`, whose Markdown is the library's own.
"""

import dataclasses
import pathlib

from soul.report.words import number

GOOD, MIXED, BAD, OPEN = "good", "mixed", "bad", "open"  # outcomes of a verdict; OPEN: nothing was asked for, or no end yet

Point = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The first thing on a page: what came of the work.

    Attributes:
        outcome: ``GOOD``, ``MIXED``, ``BAD`` or ``OPEN``.
        headline: a short sentence.
        sentences: what it rests on, and what to do next.
    """

    outcome: str
    headline: str
    sentences: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Figure:
    """A number that deserves large type.

    Attributes:
        label: what it is.
        value: the number.
        note: what to hold it against.
    """

    label: str
    value: str
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclasses.dataclass(frozen=True)
class Prose:
    """Markdown of the library's own: headings, paragraphs, lists, tables, pictures, ``**strong**`` and ``code``.

    Attributes:
        text: the Markdown.
        folder: where its pictures are; None: there are none.
    """

    text: str
    folder: pathlib.Path | None = None


@dataclasses.dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        head: titles of the columns.
        rows: the cells of each row.
        plain: whether the columns after the first one hold texts; otherwise numbers, which are aligned on the right.
    """

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    plain: bool = False


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Names with their values, one below the other."""

    rows: tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True)
class Series:
    """A curve.

    Attributes:
        name: what it shows.
        points: (x, y), by rising x.
        color: which of the four colors, from 0.
    """

    name: str
    points: tuple[Point, ...]
    color: int = 0


@dataclasses.dataclass(frozen=True)
class Level:
    """A horizontal line, dashed, such as an aim.

    Attributes:
        name: what it marks, with the number: a legend and Markdown show the name alone.
        height: where it is.
        color: that of the series that it is for.
    """

    name: str
    height: float
    color: int = 0


@dataclasses.dataclass(frozen=True)
class Chart:
    """Curves over one axis.

    Attributes:
        title: what they show.
        series: the curves.
        levels: horizontal lines.
        note: a line below the picture.
        unit_interval: whether all values are from 0 to 1, and the axis shows all of that.
        log: whether the axis is logarithmic.
        x_label: name of the x-axis.
    """

    title: str
    series: tuple[Series, ...]
    levels: tuple[Level, ...] = ()
    note: str = ""
    unit_interval: bool = False
    log: bool = False
    x_label: str = "step"


@dataclasses.dataclass(frozen=True)
class Charts:
    """Pictures side by side."""

    charts: tuple[Chart, ...]


@dataclasses.dataclass(frozen=True)
class Sample:
    """What a model says to one prompt, before and after.

    Attributes:
        group: which set the prompt is from.
        prompt: the prompt.
        expected: the answer in the data, or "".
        answers: pairs of a time ("before") and what was said.
        notes: a remark on each answer, such as the probability of the expected one; or nothing.
    """

    group: str
    prompt: str
    expected: str
    answers: tuple[tuple[str, str], ...]
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Samples:
    """Samples, those of a group together."""

    samples: tuple[Sample, ...]


@dataclasses.dataclass(frozen=True)
class Commands:
    """Commands to copy: pairs of what one does, and its text."""

    commands: tuple[tuple[str, str], ...]


Block = Text | Prose | Table | Pairs | Charts | Samples | Commands


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of a page.

    Attributes:
        title: its heading.
        blocks: what it shows.
        folded: whether it starts closed.
    """

    title: str
    blocks: tuple[Block, ...]
    folded: bool = False


@dataclasses.dataclass(frozen=True)
class Page:
    """A whole report.

    Attributes:
        title: its heading.
        subtitle: the line below: what was done to what, and when.
        verdict: the first thing to read; or None.
        figures: the numbers below it.
        sections: the rest.
    """

    title: str
    subtitle: str
    verdict: Verdict | None
    figures: tuple[Figure, ...]
    sections: tuple[Section, ...]


def curve_tables(charts: Charts, rows: int = 10) -> tuple[Table, ...]:
    """Return curves as tables of at most ``rows`` lines: a table for all curves that have the same x, evenly spaced."""
    groups: dict[tuple[float, ...], list[tuple[str, Series]]] = {}
    for chart in charts.charts:
        for series in chart.series:
            name = chart.title if len(chart.series) == 1 else f"{chart.title}: {series.name}"
            groups.setdefault(tuple(x for x, _ in series.points), []).append((name, series))
    tables = []
    for xs, members in groups.items():
        head = (charts.charts[0].x_label, *(name for name, _ in members))
        shown = spaced(len(xs), rows)
        tables.append(Table(head, tuple((number(xs[i]), *(number(s.points[i][1]) for _, s in members)) for i in shown)))
    return tuple(tables)


def spaced(count: int, most: int) -> list[int]:
    """Return at most ``most`` of the numbers below ``count``, evenly spaced, the first and the last among them."""
    if count <= most:
        return list(range(count))
    if most < 2:
        return [0][:most]
    return [round(index * (count - 1) / (most - 1)) for index in range(most)]

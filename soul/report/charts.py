"""Charts as SVG, drawn by matplotlib, for a page that is read in the light and in the dark.

Matplotlib draws with placeholder colors, which are then replaced by the CSS variables of the page (`soul.report.style`). So one
picture serves both color schemes. Titles and legends are the page's own text, outside the picture.
"""

import html
import io
import re
from typing import TYPE_CHECKING

from soul._extras import MissingExtra, require
from soul.report.page import Chart, spaced
from soul.report.words import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK = "#010203"  # stands for the color of text
PLACEHOLDERS = ("#010101", "#020202", "#030303", "#040404")  # stand for the colors of the series
SIZE = (5.0, 2.5)  # inches of 72 units: on a phone a unit is about a pixel
MOST_POINTS = 400  # of a curve: more are not seen, and make the file large
MOST_MARKED = 25  # a curve of so few points shows them


def missing() -> str | None:
    """Return how to install what draws charts, or None if it is installed."""
    try:
        require("matplotlib", "plots")
    except MissingExtra as error:
        return str(error)
    return None


def svg(chart: Chart, name: str) -> str:
    """Return a chart as an SVG element.

    Args:
        chart: what to draw.
        name: a word that no other chart of the page has; ids within the picture are made of it.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    matplotlib = require("matplotlib", "plots")
    options = {"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 11, "font.family": "sans-serif"}
    with matplotlib.rc_context(options):
        figure = require("matplotlib.figure", "plots").Figure(figsize=SIZE)
        axis = figure.add_axes((0.14, 0.2, 0.84, 0.76))  # of the figure: fixed, since fitting margins takes most of the time
        for series in chart.series:
            points = [series.points[index] for index in spaced(len(series.points), MOST_POINTS)]
            marker = "o" if len(points) <= MOST_MARKED else ""
            axis.plot(*zip(*points), color=PLACEHOLDERS[series.color], linewidth=1.8, marker=marker, markersize=4)
        for level in chart.levels:
            axis.axhline(level.height, color=PLACEHOLDERS[level.color], linestyle=(0, (4, 3)), linewidth=1.2)
        _style(axis, chart)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return _themed(text.getvalue(), chart, name)


def _style(axis: "Axes", chart: Chart) -> None:
    """Set scales, grid and colors."""
    ticker = require("matplotlib.ticker", "plots")
    if chart.log:
        axis.set_yscale("log")
        axis.yaxis.set_minor_formatter(ticker.NullFormatter())
    elif chart.unit_interval:
        axis.set_ylim(-0.03, 1.03)
    axis.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))  # no exponents apart, or tiny ones
    axis.set_xlabel(chart.x_label, color=INK)
    axis.xaxis.set_major_locator(ticker.MaxNLocator(nbins=6, integer=True))
    axis.grid(color=INK, alpha=0.15, linewidth=0.8)
    axis.tick_params(which="both", color=INK, labelcolor=INK, length=0)
    for side, spine in axis.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(INK)


def _themed(text: str, chart: Chart, name: str) -> str:
    """Return matplotlib's SVG as an element for a page: in the page's colors and font, with a title for screen readers."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', text))
    text = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in used else "", text)
    text = re.sub(r'((?:href="|url\()#| id=")', rf"\1{name}-", text)
    for placeholder, variable in ((INK, "--ink"), *((color, f"--series-{i}") for i, color in enumerate(PLACEHOLDERS))):
        text = text.replace(placeholder, f"var({variable})")
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1; font-family: inherit", text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    label = html.escape(described(chart))
    return re.sub(r"<svg", f'<svg role="img" aria-label="{label}"', text, count=1).strip()


def described(chart: Chart) -> str:
    """Return a chart in words: the first and the last value of each curve."""
    curves = (f"{s.name} from {number(s.points[0][1])} to {number(s.points[-1][1])}" for s in chart.series if s.points)
    return f"{chart.title}: {', '.join(curves)}"

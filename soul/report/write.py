"""Writing of a page: ``report.html`` and ``report.md``. A report that cannot be made never ends the work that it reports on."""

import pathlib
from collections.abc import Callable

from soul.output.files import replace_text
from soul.report import html, markdown
from soul.report.page import Page

HTML_FILE, MARKDOWN_FILE = "report.html", "report.md"


def write_page(directory: pathlib.Path, page: Page) -> pathlib.Path:
    """Write a page into a directory in both forms, each file at once; return the path of the HTML file.

    Raises:
        OSError: a file could not be written.
    """
    texts = {MARKDOWN_FILE: markdown.render(page), HTML_FILE: html.render(page)}
    for name, text in texts.items():
        replace_text(directory / name, text)
    return directory / HTML_FILE


def attempt(write: Callable[[], pathlib.Path]) -> str:
    """Return a line on the report that ``write`` writes: where it is, or why there is none. Nothing is raised."""
    try:
        return f"report: {write()}"
    except Exception as error:  # a report is no reason to lose the status of the work, whatever is wrong with it
        lines = str(error).strip().splitlines() or [""]
        return f"no report: {type(error).__name__}: {lines[0]}"

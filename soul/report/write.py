"""Writing of a page. A report that cannot be made never ends the work that it reports on."""

import pathlib
from collections.abc import Callable

from soul.output.directory import REPORT_FILES
from soul.output.files import replace_text
from soul.report import html, markdown
from soul.report.page import Page

HTML_FILE, MARKDOWN_FILE = REPORT_FILES


def write_page(directory: pathlib.Path, page: Page) -> pathlib.Path:
    """Write a page into a directory as ``report.md`` and ``report.html``, and return the path of the second.

    Raises:
        OSError: a file could not be written.
    """
    replace_text(directory / MARKDOWN_FILE, markdown.render(page))
    return write_html(directory, page)


def write_html(directory: pathlib.Path, page: Page) -> pathlib.Path:
    """Write a page into a directory as ``report.html``, and return its path.

    Raises:
        OSError: it could not be written.
    """
    replace_text(directory / HTML_FILE, html.render(page))
    return directory / HTML_FILE


def attempt(write: Callable[[], pathlib.Path]) -> str:
    """Return a line on the report that ``write`` writes: where it is, or why there is none. Nothing is raised."""
    try:
        return f"report: {write()}"
    except Exception as error:  # a report is no reason to lose the status of the work, whatever is wrong with it
        lines = str(error).strip().splitlines() or [""]
        return f"no report: {type(error).__name__}: {lines[0]}"

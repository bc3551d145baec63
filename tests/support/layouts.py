"""The table of docs/layouts.md: which features are tested in which layout of processes, and which are refused.

It is made of the marks ``covers(feature, layout)`` and ``refuses(feature, layout, reason)`` of the tests themselves, which are
read without running them. ``python -m tests.support.layouts docs/layouts.md`` rewrites the table in the page.
"""

import ast
import pathlib
import sys
from typing import NamedTuple

TESTS = pathlib.Path(__file__).parents[1]
BEGIN, END = "<!-- layouts -->\n", "<!-- end -->"
LAYOUTS = ("one process", "FSDP2", "HSDP", "TP", "DeepSpeed")


class Mark(NamedTuple):
    """A mark of a test; ``reason`` is None if the test covers the feature."""

    feature: str
    layout: str
    reason: str | None
    test: str


def marks(directory=TESTS):
    """Return the marks of all tests, by file and line."""
    marked = []
    for path in sorted(directory.rglob("test_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef):
                marked += _of_test(node, path.relative_to(directory.parent))
    return marked


def _of_test(function, path):
    for decorator in function.decorator_list:
        name = ast.unparse(decorator.func) if isinstance(decorator, ast.Call) else ""
        if name in ("pytest.mark.covers", "pytest.mark.refuses"):
            feature, layout, *reason = [ast.literal_eval(argument) for argument in decorator.args]
            if layout not in LAYOUTS or len(reason) != name.endswith("refuses"):
                raise ValueError(f"{path}, {function.name}: {ast.unparse(decorator)}; layouts: {', '.join(LAYOUTS)}")
            yield Mark(feature, layout, reason[0] if reason else None, f"{path.as_posix()}::{function.name}")


def table(marked):
    """Return the table: a row for each feature, in the order of its first mark in a file, a column for each layout."""
    features = list(dict.fromkeys(mark.feature for mark in sorted(marked, key=lambda mark: mark.feature.casefold())))
    notes = {}
    lines = [f"| feature | {' | '.join(LAYOUTS)} |", "|---" * (len(LAYOUTS) + 1) + "|"]
    for feature in features:
        cells = []
        for layout in LAYOUTS:
            here = [mark for mark in marked if (mark.feature, mark.layout) == (feature, layout)]
            covered = [mark.test for mark in here if mark.reason is None]
            refused = [mark.reason for mark in here if mark.reason is not None]
            numbers = [notes.setdefault(test, len(notes) + 1) for test in covered]
            cells.append(f"tested [{', '.join(map(str, numbers))}]" if covered else f"refused: {refused[0]}" if refused else "")
        lines.append(f"| {' | '.join([feature, *cells])} |")
    return "\n".join([*lines, "", *(f"{number}. `{test}`" for test, number in notes.items())]) + "\n"


def with_table(text):
    """Return the text of the page with the table as the tests make it now."""
    before, _, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"the page has no {BEGIN.strip()} with {END} behind it")
    return before + BEGIN + table(marks()) + END + after


if __name__ == "__main__":
    page = pathlib.Path(sys.argv[1])
    page.write_text(with_table(page.read_text(encoding="utf-8")), encoding="utf-8")

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

# Cells that no test can fill: (start of the feature's name, layout) -> why.
NONE = {
    ("checkpoints of torch", "one process"): "there are no shards",
    ("checkpoints of torch", "DeepSpeed"): "it has checkpoints of its own",
    ("checkpoints, resumed", "TP"): "a program of one's own takes those of torch.distributed.checkpoint",
    ("aim", "DeepSpeed"): "of runs of `soul unlearn`",
    ("evaluation", "DeepSpeed"): "of runs of `soul unlearn`",
    ("influence", "DeepSpeed"): "of runs of `soul unlearn`",
    ("compilation", "TP"): "of runs of `soul unlearn`",
    ("compilation", "DeepSpeed"): "of runs of `soul unlearn`",
    ("CUDA graphs", "one process"): "needs a GPU: `make test-gpu`",
    ("CUDA graphs", "TP"): "of runs of `soul unlearn`",
    ("head in shards", "one process"): "there are no shards",
    ("head in shards", "TP"): "as the loss of a head along the vocabulary",
    ("head in shards", "DeepSpeed"): "of runs of `soul unlearn`",
    ("loss of a head", "one process"): "there are no shards",
    ("loss of a head", "FSDP2"): "as the head in shards",
    ("loss of a head", "HSDP"): "as the head in shards",
    ("loss of a head", "DeepSpeed"): "ZeRO gathers the head",
    ("NPO with one ratio", "DeepSpeed"): "every process forms the ratio of its own batch",
    ("parameters in main memory", "TP"): "a policy of FSDP2",
    ("parameters in main memory", "DeepSpeed"): "a policy of FSDP2",
}


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
            reasons = [why for (start, of), why in NONE.items() if feature.startswith(start) and of == layout]
            if covered:
                cells.append(f"tested [{', '.join(map(str, numbers))}]")
            else:
                cells.append(f"refused: {refused[0]}" if refused else f"none: {reasons[0]}" if reasons else "")
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

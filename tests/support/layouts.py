"""The table of docs/layouts.md: which features are tested in which layout of processes, and which are refused.

It is made of the marks ``covers(feature, layout)`` and ``refuses(feature, layout, reason)`` of the tests themselves, which are
read without running them, and of the differences that tests/support/parity.py has measured (`make parity`).
``python -m tests.support.layouts docs/layouts.md`` rewrites the table in the page.
"""

import ast
import functools
import json
import pathlib
import re
import sys
from typing import NamedTuple

TESTS = pathlib.Path(__file__).parents[1]
SECTIONS = ("layouts", "bytes")
END = "<!-- end -->"
LAYOUTS = ("one process", "FSDP2", "HSDP", "TP", "DeepSpeed")
MEASURED = TESTS / "distributed" / "parity.json"
# What a measured difference is a part of.
UNITS = {
    "bits": "",
    "movement": "of the movement",
    "largest movement": "of the largest movement of an element",
    "element": "of an element",
    "norm": "of the norm",
    "absolute": "in a parameter",
    "log": "of a number of the log",
}

# Cells that no test can fill: (start of the feature's name, layout) -> why.
NONE = {
    ("checkpoints of torch", "one process"): "there are no shards",
    ("checkpoints of torch", "DeepSpeed"): "it has checkpoints of its own",
    ("checkpoints, resumed", "TP"): "a program of one's own takes those of torch.distributed.checkpoint",
    ("aim", "DeepSpeed"): "only runs of `soul unlearn` have it",
    ("evaluation", "DeepSpeed"): "only runs of `soul unlearn` have it",
    ("influence", "DeepSpeed"): "only runs of `soul unlearn` have it",
    ("compilation", "TP"): "only runs of `soul unlearn` have it",
    ("compilation", "DeepSpeed"): "only runs of `soul unlearn` have it",
    ("CUDA graphs", "one process"): "needs a GPU: `make test-gpu`",
    ("CUDA graphs", "TP"): "only runs of `soul unlearn` have it",
    ("head in shards", "one process"): "there are no shards",
    ("head in shards", "TP"): "as the loss of a head along the vocabulary",
    ("head in shards", "DeepSpeed"): "only runs of `soul unlearn` have it",
    ("loss of a head", "one process"): "there are no shards",
    ("loss of a head", "FSDP2"): "as the head in shards",
    ("loss of a head", "HSDP"): "as the head in shards",
    ("loss of a head", "DeepSpeed"): "ZeRO-3 gathers the head",
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
    return [mark for test, decorators in _tests(directory) for mark in _of_test(test, decorators)]


@functools.cache  # files take seconds to parse
def _tests(directory):
    """Return the name of each test, and what decorates it."""
    tests = []
    for path in sorted(directory.rglob("test_*.py")):
        text = path.read_text(encoding="utf-8")
        for node in ast.parse(text).body if re.search(r"mark\.(covers|refuses|counts)", text) else ():
            if isinstance(node, ast.FunctionDef):
                tests.append((f"{path.relative_to(directory.parent).as_posix()}::{node.name}", node.decorator_list))
    return tests


def _of_test(test, decorators):
    for decorator in decorators:
        name = ast.unparse(decorator.func) if isinstance(decorator, ast.Call) else ""
        if name in ("pytest.mark.covers", "pytest.mark.refuses"):
            feature, layout, *reason = [ast.literal_eval(argument) for argument in decorator.args]
            if layout not in LAYOUTS or len(reason) != name.endswith("refuses"):
                raise ValueError(f"{test}: {ast.unparse(decorator)}; layouts: {', '.join(LAYOUTS)}")
            yield Mark(feature, layout, reason[0] if reason else None, test)


def of_several_processes(marked):
    """Return the tests that cover a feature in a layout of several processes, each once."""
    return list(dict.fromkeys(mark.test for mark in marked if mark.reason is None and mark.layout != LAYOUTS[0]))


def that_count(directory=TESTS):
    """Return the tests with the mark ``counts``, which count bytes before and after."""
    return [test for test, decorators in _tests(directory) if "pytest.mark.counts" in map(ast.unparse, decorators)]


def measured():
    """Return what was measured, by test."""
    return json.loads(MEASURED.read_text(encoding="utf-8"))


def write_measured(entries):
    """Replace the entries of some tests, and drop those of tests that no longer are."""
    kept = measured() | entries
    kept = {test: kept[test] for test in sorted({*of_several_processes(marks()), *that_count()}) if test in kept}
    lines = [f"{json.dumps(test)}: {json.dumps(entry)}" for test, entry in kept.items()]
    text = ",\n".join(lines).replace('"measured": [', '"measured": [\n    ').replace("}, {", "},\n    {")
    MEASURED.write_text("{\n" + text + "\n}\n", encoding="utf-8")


def differences(ones):
    """Return the measured differences of a test in words."""
    by_versus = {}
    for one in ones:
        how_many = f" ({one['cases']} cases)" if one["cases"] > 1 else ""
        where = f"; largest of {one['cases']} cases: {one['case']}" if how_many else ""
        numbers = f"{short(one['error'])} {UNITS[one['unit']]} (limit {short(one['limit'])}{where})"
        exact, within = by_versus.setdefault(one["versus"], ([], []))
        if one["unit"] == "bits":
            exact.append(how_many)
        else:
            within.append(numbers)
    words = [f"equal bit for bit to {versus}{exact[0]}" for versus, (exact, _) in by_versus.items() if exact]
    words += [f"differs from {versus} by at most {', '.join(within)}" for versus, (_, within) in by_versus.items() if within]
    return "; ".join(words)


def short(number):
    """Return a number with two digits, such as 6.1e-6."""
    mantissa, exponent = f"{number:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def notes_of(tests):
    """Return the list below the table: each test with its number, and what it has measured."""
    by_test = measured()
    lines = []
    for number, test in enumerate(tests, start=1):
        words = differences(by_test[test]["measured"]) if test in by_test else ""
        lines.append(f"{number}. `{test}`" + (f": {words}" if words else ""))
    where = {f"{one['machine']}, torch {one['torch']}, {one['date']}" for one in by_test.values()}
    return [*lines, "", f"Measured on: {'; '.join(sorted(where))}."]


def table_of_bytes():
    """Return the table of bytes before and after."""
    lines = ["| what, and the feature | before | after | how |", "|---|---|---|---|"]
    rows = [
        (one["what"], one["before"], one["after"], one["how"], test) for test, e in measured().items() for one in e["bytes"]
    ]
    for what, before, after, how, test in sorted(rows):
        lines.append(f"| {what} | {bytes_of(before)} | {bytes_of(after)} | {how}: `{test}` |")
    return "\n".join(lines) + "\n"


def bytes_of(number):
    """Return a number of bytes with its unit."""
    for size, unit in ((1e9, "GB"), (1e6, "MB")):
        if number >= size:
            return f"{number / size:.3g} {unit}" if number < 1000 * size else f"{number / size:,.0f} {unit}"
    return f"{number:,}"


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
                if not refused and not reasons:
                    raise ValueError(f"{feature}, {layout}: no test covers or refuses it, and NONE has no reason")
                cells.append(f"refused: {refused[0]}" if refused else f"none: {reasons[0]}")
        lines.append(f"| {' | '.join([feature, *cells])} |")
    return "\n".join([*lines, "", *notes_of(notes)]) + "\n"


def with_tables(text):
    """Return the text of the page with the tables as the tests make them now."""
    for name, lines in zip(SECTIONS, (table(marks()), table_of_bytes())):
        begin = f"<!-- {name} -->\n"
        before, _, rest = text.partition(begin)
        _, end, after = rest.partition(END)
        if not end:
            raise ValueError(f"the page has no {begin.strip()} with {END} behind it")
        text = before + begin + lines + END + after
    return text


if __name__ == "__main__":
    page = pathlib.Path(sys.argv[1])
    page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")

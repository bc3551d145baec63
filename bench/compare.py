"""``python -m bench --compare A.json B.json``: where B is slower than A, by more than the spread of both runs."""

import pathlib
from collections.abc import Mapping
from typing import Any

from bench._harness import Row
from bench.results import read

Key = tuple[str | None, str, str]  # op, case, variant


def regressions(
    before: Mapping[str, Any], after: Mapping[str, Any]
) -> tuple[list[tuple[str | None, str, str, float]], list[tuple[str | None, str, str, float]], list[Key]]:
    """Compare two results, row by row of the same op, case and variant.

    A row is slower where its 20th percentile is above the former 80th percentile, and faster the other way round.

    Returns:
        Slower and faster rows, each as (op, case, variant, ratio of medians), and missing rows, which were timed before and are
        not now, as (op, case, variant).
    """
    now = {key(row): row for row in after["rows"] if "ms" in row}
    slower = []
    faster = []
    missing = []
    for old in before["rows"]:
        if "ms" not in old:
            continue
        new = now.get(key(old))
        if new is None:
            missing.append(key(old))
        elif new["ms_p20"] > old["ms_p80"]:
            slower.append((*key(old), new["ms"] / old["ms"]))
        elif new["ms_p80"] < old["ms_p20"]:
            faster.append((*key(old), new["ms"] / old["ms"]))
    return slower, faster, missing


def key(row: Row) -> Key:
    """Return what identifies a row: op, case and variant."""
    return row.get("op"), row["case"], row["variant"]


def main(before: str | pathlib.Path, after: str | pathlib.Path) -> int:
    """Print the comparison of two files or folders and return the exit status: 1 where a row is slower, else 0."""
    old = read(before)
    new = read(after)
    for name in ("device", "threads", "torch", "triton"):
        was = old["environment"].get(name)
        now = new["environment"].get(name)
        if was != now:
            print(f"not the same {name}: {was}, then {now}")
    slower, faster, missing = regressions(old, new)
    for word, rows in (("slower", slower), ("faster", faster)):
        for op, case, variant, ratio in sorted(rows, key=lambda row: -row[-1]):
            print(f"{word:<8}{ratio:6.2f}x  {op}: {case}: {variant}")
    for names in missing:
        print(f"{'missing':<8}         {': '.join(map(str, names))}")
    print(f"{len(slower)} slower, {len(faster)} faster beyond the spread of both runs, {len(missing)} missing")
    return 1 if slower else 0

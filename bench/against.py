"""``python -m bench OP ... --against DIR``: this checkout of the library against another one, in one run on one machine.

DIR holds the packages `soul` and `soul_kernels` of the other one: ``git worktree add DIR COMMIT`` makes it, and so does
``git archive COMMIT soul soul_kernels | tar -x -C DIR`` for a machine without git. The benchmarks of this checkout measure
both, op by op, each time in a process of its own, in the order other, this, this, other, so that what drifts over minutes
costs both the same. Nothing but Python's bytecode is written into DIR.
"""

import argparse
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from bench import compare, results
from bench._harness import Row, commit_of
from soul_kernels.errors import argument_error

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGES = ("soul", "soul_kernels")
ORDER = ("other", "this", "this", "other")
VALUES = ("only", "budget", "device")  # options of the command line that both get, beside those with other values


def main(args: argparse.Namespace, ops: Sequence[str], header: Row) -> int:
    """Measure both, print every row of both side by side, and return the exit status.

    Each of the four files of an op is written after every case, so that an interrupted run leaves its results. They go to a
    folder ``<card>-against-<commit>`` beside that of the results of the card; without git it is named after DIR. Their names
    hold the op and the text of ``--only``, so that another part of the op does not replace them.

    Args:
        args: of ``python -m bench``.
        ops: names of ops, measured in this order.
        header: of `bench._harness.environment`.

    Returns:
        0; 1 where a result of this checkout was wrong or is slower beyond the spread of both; 2 where nothing was measured.

    Raises:
        ArgumentError: the folder does not hold another checkout of the library.
    """
    folders = {"other": checked(args.against), "this": ROOT}
    of_card = results.folder_of(header, args.results or results.FOLDER)
    to = of_card.with_name(f"{of_card.name}-against-{commit_of(folders['other']) or folders['other'].name}")
    to.mkdir(parents=True, exist_ok=True)
    measured = False
    bad = False
    for op in ops:
        files: dict[str, list[pathlib.Path]] = {name: [] for name in folders}
        for number, name in enumerate(ORDER, 1):
            file = to / f"{'-'.join(filter(None, (op, results.slug(args.only))))}-{number}-{name}.json"
            file.unlink(missing_ok=True)  # of an earlier run
            print(f"\n==== {op}, {number} of {len(ORDER)}: {name} checkout, {folders[name]}", flush=True)
            status = run(folders[name], [op, "--json", str(file), *passed_on(args)])
            bad = bad or name == "this" and status == 1
            if file.exists():  # else no case has the text of --only in its name
                files[name].append(file)
        if all(files.values()):
            measured = True
            before, after = (pooled(map(results.read, files[name])) for name in ("other", "this"))
            print("\n" + "\n".join(lines(before, after)))
            bad = bad or bool(compare.regressions(before, after)[0])
    print(f"\n{to}")
    if not measured:
        print("--against: expected ops and --only that both checkouts can measure: nothing was compared", file=sys.stderr)
        return 2
    return int(bad)


def checked(folder: pathlib.Path) -> pathlib.Path:
    """Return the folder, links resolved, if it holds another checkout of the library."""
    folder = folder.resolve()
    missing = [name for name in PACKAGES if not (folder / name / "__init__.py").is_file()]
    remedy = "make it with: git worktree add DIR COMMIT"
    if missing:
        raise argument_error("--against", "a folder with the packages soul and soul_kernels", str(folder), remedy)
    if folder == ROOT:
        raise argument_error("--against", "another checkout", f"{folder}, which is this one", remedy)
    return folder


def passed_on(args: argparse.Namespace) -> Iterator[str]:
    """Yield the options of the command line that say what is measured, and how."""
    for name in VALUES:
        yield from (f"--{name}", str(getattr(args, name)))
    if args.quick:
        yield "--quick"
    if args.variants:
        yield from ("--variants", args.variants.pattern)
    if args.threads:
        yield from ("--threads", *map(str, args.threads))


def run(folder: pathlib.Path, argv: Sequence[str]) -> int:
    """Run ``python -m bench`` of this checkout on the library in ``folder``, in a process, and return its exit status."""
    with tempfile.TemporaryDirectory() as temporary:
        links = pathlib.Path(temporary)
        (links / "bench").symlink_to(ROOT / "bench", target_is_directory=True)
        for name in PACKAGES:
            (links / name).symlink_to(folder / name, target_is_directory=True)
        path = os.pathsep.join(filter(None, (str(links), os.environ.get("PYTHONPATH"))))
        command = [sys.executable, "-m", "bench", *argv]
        return subprocess.run(command, cwd=links, env=os.environ | {"PYTHONPATH": path}).returncode


def pooled(runs: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return results in which each row stands for all runs: the median of their medians, and the widest of their spreads."""
    rows_of: dict[compare.Key, list[Row]] = {}
    for one in runs:
        for row in one["rows"]:
            rows_of.setdefault(compare.key(row), []).append(row)
    rows = []
    for of_one in rows_of.values():
        timed = [row for row in of_one if "ms" in row]
        row = dict(of_one[0])
        if timed:
            row = timed[0] | {
                "ms": statistics.median(row["ms"] for row in timed),
                "ms_p20": min(row["ms_p20"] for row in timed),
                "ms_p80": max(row["ms_p80"] for row in timed),
            }
        rows.append(row)
    return {"rows": rows}


def lines(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    """Yield the text of the comparison: each row of both, with the milliseconds and MiB of the other checkout and of this."""
    slower, faster, missing = compare.regressions(before, after)
    verdicts = {row[:3]: word for word, rows in (("slower", slower), ("faster", faster)) for row in rows}
    now = {compare.key(row): row for row in after["rows"] if "ms" in row}
    yield f"{'other':>10} {'this':>10} ms {'ratio':>8}           {'other':>7} {'this':>7} MiB"
    for row in before["rows"]:
        key = compare.key(row)
        if "ms" not in row or key not in now:
            continue
        new = now[key]
        ratio = new["ms"] / row["ms"]
        memory = " ".join("      -" if one.get("extra_mib") is None else f"{one['extra_mib']:7.0f}" for one in (row, new))
        yield f"{row['ms']:10.3f} {new['ms']:10.3f}    {ratio:7.3f}x {verdicts.get(key, ''):<8} {memory}     {key[1]}: {key[2]}"
    for key in missing:
        yield f"missing in this checkout: {': '.join(map(str, key))}"
    for name, results_of in (("other", before), ("this", after)):
        for row in results_of["rows"]:
            if "ms" not in row and row["variant"].startswith("ours"):
                yield f"{name} checkout: {row['case']}: {row['variant']}: {row['reason']}"

"""``python -m bench``: correctness first, then time, for every op, for a whole step, and over sizes.

``python -m bench [op ...]`` measures; ``--model CARD`` and ``plan --model NAME --gpus N`` estimate; ``--targets``,
``--compare`` and ``--from`` read results. bench/README.md says what is measured and how.
"""

import argparse
import importlib
import os
import pathlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType

import torch

from bench import against, compare, results, targets
from bench._harness import (
    WRONG,
    Case,
    Limits,
    Row,
    ceilings,
    cores,
    datasheet,
    environment,
    failure,
    free,
    load,
    run_case,
)
from bench._plots import plot_cases, plot_results
from soul._extras import MissingExtra, require

OPS = sorted(path.stem.removeprefix("bench_") for path in pathlib.Path(__file__).parent.glob("bench_*.py"))
OF_MEASUREMENTS = (
    "json",
    "results",
    "plots",
    "compare",
    "targets",
    "threads",
    "against",
)  # options that write or read measurements
MODULES = {op: f"bench.bench_{op}" for op in OPS} | {
    "step": "bench.whole_step",
    "start": "bench.start",
    "scaling": "bench.scaling",
}
JUDGED = ("sophia_step", "linear_loss", "step", "start")  # on a CPU at full size


def main(argv: list[str] | None = None) -> int:
    """Run what the command line names and return the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m bench", description="Times the ops against their baselines.")
    parser.add_argument(
        "ops", nargs="*", metavar="op", help=f"of {', '.join(MODULES)} (default: all; on a CPU {', '.join(JUDGED)})"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--threads", metavar="N", nargs="+", type=thread_count,
        help="on a CPU: measure with each of these numbers of threads (default: 1 and all cores; with --quick all cores)",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="small inputs, without torch.compile")
    parser.add_argument(
        "--only", metavar="TEXT", default="", help="only cases with TEXT in their name; also those that do not run by default"
    )
    parser.add_argument("--budget", type=float, default=3.0, help="seconds of timing a case (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", type=pathlib.Path, help="also write all rows there")
    parser.add_argument(
        "--variants", metavar="PATTERN", type=pattern_of,
        help="only variants that match the regular expression, and bare matrix products; ^ours: without peers",
    )  # fmt: skip
    parser.add_argument(
        "--against", metavar="DIR", type=pathlib.Path,
        help="measure this checkout against the one in DIR, in turns; ops must be named; exit status 1 where it is slower",
    )  # fmt: skip
    parser.add_argument(
        "--results", metavar="DIR", type=pathlib.Path, nargs="?", const=results.FOLDER,
        help="also write DIR/<card>/<op>.json, one file an op (DIR: bench/results)",
    )  # fmt: skip
    parser.add_argument("--plots", metavar="DIR", type=pathlib.Path, help="also draw pictures there (extra: bench)")
    parser.add_argument("--from", metavar="RESULTS", dest="source", type=pathlib.Path, help="measure nothing: draw from these")
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help="what B is slower at than A; exit status 1 then")
    parser.add_argument("--targets", nargs="*", metavar="RESULTS", help="the design's targets: pass, fail or not measured")
    parser.add_argument("--model", metavar="CARD", help="measure nothing: model the ops on that card (h100, h200)")
    if argv[:1] == ["plan"]:
        return importlib.import_module("bench.plan").main(argv[1:])
    args = parser.parse_args(argv)
    unknown = set(args.ops) - set(MODULES)
    if unknown:
        parser.error(f"no benchmark named {', '.join(sorted(unknown))}; there are {', '.join(MODULES)} and plan")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:  # the latter: built without it
        parser.error(f"--device: expected cpu or cuda, got {args.device} ({str(error).splitlines()[0]})")
    if args.threads and torch.device(args.device).type != "cpu":
        parser.error(f"--threads: expected --device cpu beside it, got {args.device}; a GPU's work has no threads to set")
    if args.model and (options := [name for name in OF_MEASUREMENTS if getattr(args, name) is not None]):
        parser.error(f"--model: expected no --{options[0]} beside it, which is about measurements; got both")
    if args.against and not args.ops:
        parser.error(f"--against: expected ops before it, of {', '.join(MODULES)}, got none")
    if args.against and (args.json or args.plots):
        parser.error("--against: expected neither --json nor --plots beside it: it writes a folder of its own")
    if args.source and not args.plots:
        parser.error("--from needs --plots DIR, where the pictures go")
    try:
        if args.plots:
            require("matplotlib", "bench")  # now, not after an hour
        if args.model:
            return importlib.import_module("bench.model").main(args.model, args.ops, args.only)
        if args.against:
            return against.main(args, args.ops, environment(torch.device(args.device)))
        if args.compare:
            return compare.main(*args.compare)
        if args.targets is not None:
            targets.main([results.read(path) for path in args.targets])
            return 0
        if args.source:
            print("\n".join(map(str, plot_results(results.read(args.source), args.plots))))
            return 0
    except (MissingExtra, ValueError) as error:
        parser.error(str(error))
    return run(args)


def thread_count(text: str) -> int:
    """Return a number of threads from the command line."""
    try:
        count = int(text)
    except ValueError:
        count = 0
    if not 1 <= count <= cores():
        raise argparse.ArgumentTypeError(
            f"expected whole numbers from 1 to {cores()}, the processors that this process may use, got {text!r}; "
            "names of ops come before --threads"
        )
    return count


def pattern_of(text: str) -> re.Pattern[str]:
    """Return a regular expression from the command line."""
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"expected a regular expression, got {text!r} ({error})") from error


def run(args: argparse.Namespace) -> int:
    """Measure, print, and write what the arguments ask for; return the exit status: 1 where a result of ours was wrong."""
    threads = torch.get_num_threads()
    try:
        return _run(args)
    finally:
        torch.set_num_threads(threads)


def _run(args: argparse.Namespace) -> int:
    device = torch.device(args.device)
    header = environment(device)
    limits: dict[int | None, Limits] = {}
    if device.type == "cpu":
        args.threads = sorted(set(args.threads or ([cores()] if args.quick else [1, cores()])))
        header["threads"] = ", ".join(map(str, args.threads))
    else:
        args.threads = [None]
    print("  ".join(f"{name} {value}" for name, value in header.items() if value))
    if args.quick and device.type == "cpu":
        print("quick, on a CPU: small sizes; good for regressions, not for claims")
    rates = datasheet(header["device"])
    for count in args.threads:
        set_threads(count)
        limits[count] = ceilings(device)
        print(
            f"ceilings{with_threads('', count)}: copy {limits[count]['copy_bytes_per_s'] / 1e9:.0f} GB/s{rates['copy']}, "
            f"GEMM {limits[count]['gemm_flop_per_s'] / 1e12:.2f} TFLOP/s{rates['gemm']}"
        )
    rows: list[Row] = []
    for op in args.ops or (JUDGED if device.type == "cpu" and not args.quick else MODULES):
        print(f"\n== {op}")
        try:
            rows += run_op(op, args, header, limits, rows)
        except MissingExtra as error:
            print(f"left out: {error}")
    if args.plots:
        measured = {"environment": header, "ceilings": limits[args.threads[-1]], "rows": rows}
        print("\n" + "\n".join(map(str, [*plot_cases(rows, header, args.plots), *plot_results(measured, args.plots)])))
    if args.only and not rows:
        print(f"--only: expected text from the name of a case, got {args.only!r}: nothing was measured", file=sys.stderr)
        return 2
    return int(any(row.get("reason", "").startswith(WRONG) for row in rows))


def set_threads(count: int | None) -> None:
    """Make torch, and processes that are started from here on, use ``count`` threads; None changes nothing."""
    if count is not None:
        torch.set_num_threads(count)
        os.environ["OMP_NUM_THREADS"] = str(count)


def with_threads(name: str, count: int | None) -> str:
    """Return the name of a case with the number of threads that it is measured with; None (a GPU): the name alone."""
    return name if count is None else f"{name}, {count} thread{'s' if count > 1 else ''}"


def run_op(op: str, args: argparse.Namespace, header: Row, limits: dict[int | None, Limits], before: list[Row]) -> list[Row]:
    """Run the cases of one op and return their rows, which are written after every case: an interrupted run leaves its results.

    Args:
        op: one of `MODULES`.
        args: of the command line.
        header: of `environment`; the highest load that was seen is added to it.
        limits: number of threads, or None on a GPU -> what `ceilings` returns. Files get those of the most threads.
        before: rows of the ops before.
    """
    module = importlib.import_module(MODULES[op])
    device = torch.device(args.device)
    rows: list[Row] = []
    path = args.results and results.folder_of(header, args.results) / f"{op}.json"

    def save(summary: Row | None = None) -> None:
        if header.get("load") is not None:
            header["highest load"] = max(load() or 0.0, header["load"], header.get("highest load", 0.0))
        if path and rows:
            results.write(path, header, limits[args.threads[-1]], rows, summary)
        if args.json:
            results.write(args.json, header, limits[args.threads[-1]], before + rows)

    for count, make in made_with(args.threads, module, device, args.quick):
        torch.manual_seed(0)
        case: Case | None = None
        name = with_threads(f"a case of {op}", count)
        try:
            case = make()
            case.name = name = with_threads(case.name, count)
            if args.variants:
                case.keep(args.variants)
            runs_here = not case.once or count == args.threads[-1]
            if case.variants and runs_here and args.only in name and (args.only or case.default):
                rows += [
                    {"op": op} | row | ({"threads": count} if count else {})
                    for row in run_case(case, device, limits[count], args.budget)
                ]
        except torch.OutOfMemoryError:
            print(f"{name}: left out, all of it together does not fit into the memory of this device")
        except MissingExtra:
            raise
        except Exception as error:  # the cases after it still run
            rows.append({"op": op, "case": name, "variant": "ours", "reason": WRONG + failure(error)})
            print(f"{name}: {rows[-1]['reason']}", flush=True)
        case = None  # gives its memory back
        free(device)
        save()
    if hasattr(module, "summary") and (summary := module.summary(rows, limits[args.threads[-1]])):
        print("\n" + "\n".join(summary.pop("lines")))
        save(summary)
    if path and rows:
        print(f"\n{path}")
    return rows


def made_with(
    threads: Sequence[int | None], module: ModuleType, device: torch.device, quick: bool
) -> Iterator[tuple[int | None, Callable[[], Case]]]:
    """Yield every number of threads, once it is set, with each function that makes a case of a module."""
    for count in threads:
        set_threads(count)
        for make in module.cases(device, quick):
            yield count, make


if __name__ == "__main__":
    sys.exit(main())

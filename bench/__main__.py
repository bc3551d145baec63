"""``python -m bench [op ...] [--quick] [--json FILE] [--plots DIR]``: correctness first, then time, for every op."""

import argparse
import importlib
import json
import pathlib

import torch

from bench._harness import ceilings, environment, run_case
from bench._plots import plot_cases
from soul._extras import MissingExtra, require

OPS = sorted(path.stem.removeprefix("bench_") for path in pathlib.Path(__file__).parent.glob("bench_*.py"))


def main(argv=None):
    """Runs the benchmarks that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="Times the ops against their baselines.")
    parser.add_argument("ops", nargs="*", metavar="op", help=f"of {', '.join(OPS)} (default: all)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="small inputs, without torch.compile")
    parser.add_argument(
        "--only", metavar="TEXT", default="", help="only cases with TEXT in their name; also those that do not run by default"
    )
    parser.add_argument("--budget", type=float, default=3.0, help="seconds of timing a case (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", type=pathlib.Path, help="also write the rows there")
    parser.add_argument("--plots", metavar="DIR", type=pathlib.Path, help="also draw every case there (extra: bench)")
    args = parser.parse_args(argv)
    unknown = set(args.ops) - set(OPS)
    if unknown:
        parser.error(f"no benchmark named {', '.join(sorted(unknown))}; there are {', '.join(OPS)}")
    if args.plots:
        try:
            require("matplotlib", "bench")  # now, not after an hour
        except MissingExtra as error:
            parser.error(str(error))
    device = torch.device(args.device)
    header = environment(device)
    print("  ".join(f"{name} {value}" for name, value in header.items() if value))
    if device.type == "cpu":
        print("no GPU: references and baselines at small sizes; good for regressions, not for claims")
    limits = ceilings(device)
    print(f"ceilings: copy {limits['copy_bytes_per_s'] / 1e9:.0f} GB/s, GEMM {limits['gemm_flop_per_s'] / 1e12:.2f} TFLOP/s")
    rows = []
    for op in args.ops or OPS:
        module = importlib.import_module(f"bench.bench_{op}")
        print(f"\n== {op}")
        for make in module.cases(device, args.quick):
            torch.manual_seed(0)
            case = make()
            if args.only in case.name and (args.only or case.default):
                rows += [{"op": op} | row for row in run_case(case, device, limits, args.budget)]
            del case
            if args.json:  # after every case: a run that is cut off leaves what it has
                found = {"environment": header, "ceilings": limits, "rows": rows}
                args.json.write_text(json.dumps(found, indent=1) + "\n")
    if args.plots:
        print("\n" + "\n".join(map(str, plot_cases(rows, header, args.plots))))


if __name__ == "__main__":
    main()

"""Pictures: one for each case of a run; of results a roofline, each op against its peers, and memory against tokens."""

import pathlib
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from bench._harness import Limits, Row, cost
from soul._extras import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OURS, OTHERS = "#1f6f8b", "#b8c4cc"
XLABEL = "ms, median; whiskers: 20th to 80th percentile; of one thread of a CPU: time that it has worked"
MARKERS = {"sophia_step": "o", "scaling": "s", "step": "D"}  # ops in the roofline
STEP_FLOPS = 14  # a parameter: 3 for m, 4 for h, 7 for the clipped step and decay


def plot_cases(rows: list[Row], header: Row, folder: pathlib.Path) -> list[pathlib.Path]:
    """Write ``<case>.png`` into ``folder`` for every case in ``rows`` and return the paths.

    Args:
        rows: of ``bench._harness.run_case``, of any cases.
        header: of ``bench._harness.environment``; the picture says where the times are from.
        folder: made if it is missing.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for case in dict.fromkeys(row["case"] for row in rows if "ms" in row):
        timed = [row for row in rows if row["case"] == case and "ms" in row]
        figure = _figure(10, 1.3 + 0.38 * len(timed))
        axes = figure.add_subplot()
        _bars(axes, timed)
        axes.set_xlabel(XLABEL)
        axes.set_title(f"{case}\n{_origin(header)}", fontsize=9)
        paths.append(folder / (re.sub(r"[^a-z0-9]+", "-", case.lower()).strip("-") + ".png"))
        figure.savefig(paths[-1], dpi=120)
    return paths


def plot_results(results: Mapping[str, Any], folder: pathlib.Path) -> list[pathlib.Path]:
    """Write ``roofline.png``, ``peers.png`` and ``memory.png`` into ``folder``, as far as there are rows for them.

    Args:
        results: as `bench.results.read` returns them.
        folder: made if it is missing.

    Returns:
        The paths.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    timed = [row for row in results["rows"] if "ms" in row]
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, draw in (("roofline", _roofline), ("peers", _peers), ("memory", _memory)):
        figure = draw(timed, results["ceilings"])
        if figure is not None:
            figure.suptitle(_origin(results["environment"]), fontsize=8, color="#555555")
            paths.append(folder / f"{name}.png")
            figure.savefig(paths[-1], dpi=100)
    return paths


def intensity(row: Row) -> tuple[float, float] | None:
    """Return FLOPs per byte and FLOP/s of a row, or None where it does not have both."""
    per_param = re.search(r"([\d.]+) B/param", row["variant"])
    if row.get("op") == "sophia_step" and per_param and "gb_per_s" in row:
        flops_a_byte = STEP_FLOPS / float(per_param.group(1))
        return flops_a_byte, flops_a_byte * row["gb_per_s"] * 1e9
    if row.get("model_flops") and row.get("model_bytes"):
        return row["model_flops"] / row["model_bytes"], row["model_flops"] / row["ms"] * 1e3
    return None


def _roofline(rows: list[Row], limits: Limits) -> "Figure | None":
    """Draw FLOP/s over FLOPs per byte, below the two measured ceilings."""
    points = [(row, point) for row in rows if row.get("op") in MARKERS and (point := intensity(row))]
    if not points:
        return None
    figure = _figure(8, 5)
    axes = figure.add_subplot()
    copy = limits["copy_bytes_per_s"]
    gemm = limits["gemm_flop_per_s"]
    left = min(x for _, (x, _) in points) / 2
    right = max(max(x for _, (x, _) in points), gemm / copy) * 2
    axes.plot([left, gemm / copy, right], [left * copy, gemm, gemm], color="#555555", linewidth=1)
    named: set[str] = set()
    for row, (x, y) in points:
        ours = row["variant"].startswith("ours")
        label = f"{row['op']}, {'ours' if ours else 'others'}"
        axes.plot(
            x, y, MARKERS[row["op"]], color=OURS if ours else OTHERS, markeredgecolor="white", markersize=8,
            label=None if label in named else label,
        )  # fmt: skip
        named.add(label)
    axes.set(xscale="log", yscale="log", xlabel="FLOPs a byte, at least", ylabel="FLOP/s")
    axes.set_title(f"ceilings: copy {copy / 1e9:.0f} GB/s, GEMM {gemm / 1e12:.2f} TFLOP/s, measured", fontsize=9)
    axes.legend(fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _peers(rows: list[Row], limits: Limits) -> "Figure | None":
    """Draw of every op the case with most variants, ours and theirs."""
    chosen = {}
    for op in dict.fromkeys(row.get("op") for row in rows if row.get("op") not in ("scaling", "start")):
        of_op = [row for row in rows if row.get("op") == op]
        cases = {row["case"]: [r for r in of_op if r["case"] == row["case"]] for row in of_op}
        largest = max(cases.values(), key=len)
        if any(row["variant"].startswith("ours") != largest[0]["variant"].startswith("ours") for row in largest):
            chosen[op] = largest
    if not chosen:
        return None
    heights = [len(timed) + 2 for timed in chosen.values()]
    figure = _figure(10, 0.5 + 0.27 * sum(heights))
    for axes, (op, timed) in zip(figure.subplots(len(chosen), 1, height_ratios=heights, squeeze=False)[:, 0], chosen.items()):
        _bars(axes, timed)
        axes.set_title(f"{op}: {timed[0]['case']}", fontsize=9, loc="left")
        axes.tick_params(labelsize=8)
    axes.set_xlabel(XLABEL)
    return figure


def _memory(rows: list[Row], limits: Limits) -> "Figure | None":
    """Draw the extra memory of cross-entropy over its tokens, for the head that most rows have."""
    rows = [row for row in rows if row.get("op") == "linear_loss" and row.get("extra_mib") and row["case"].startswith("CE, ")]
    rows = [row for row in rows if "trained head" in row["case"]]
    if not rows:
        return None
    heads = [(row["at"]["D"], row["at"]["V"]) for row in rows]
    head = max(dict.fromkeys(heads), key=heads.count)
    series: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if (row["at"]["D"], row["at"]["V"]) == head:
            series.setdefault(row["variant"], []).append((row["at"]["N"], row["extra_mib"]))
    figure = _figure(8, 5)
    axes = figure.add_subplot()
    for name, points in series.items():
        look: dict[str, Any] = dict(linewidth=2, color=OURS) if name.startswith("ours") else dict(linewidth=1)
        style = "o--" if name.startswith("ours,") else "o-"  # dashed: ours with other options
        axes.plot(*zip(*sorted(points)), style, label=name, markersize=4, **look)
    axes.set(xscale="log", yscale="log", xlabel="tokens N", ylabel="extra MiB of forward and backward")
    axes.set_title(f"cross-entropy from hidden states, D {head[0]}, V {head[1]}, trained head", fontsize=9)
    axes.legend(fontsize=7, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _figure(width: float, height: float) -> "Figure":
    require("matplotlib", "bench")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _bars(axes: "Axes", timed: list[Row]) -> None:
    """Draw a bar for every row, with its rate; and with whiskers, unless it is processor time, whose spread is unknown."""
    by_clock = [row["ms"] == cost(row) for row in timed]
    lengths = [row["ms"] if whiskers else row["processor_ms"] for row, whiskers in zip(timed, by_clock)]
    spread = [
        [(row["ms"] - row["ms_p20"]) * whiskers for row, whiskers in zip(timed, by_clock)],
        [(row["ms_p80"] - row["ms"]) * whiskers for row, whiskers in zip(timed, by_clock)],
    ]
    colors = [OURS if row["variant"].startswith("ours") else OTHERS for row in timed]
    bars = axes.barh([row["variant"] for row in timed], lengths, xerr=spread, color=colors, ecolor="#555555")
    axes.bar_label(bars, [_label(row) for row in timed], padding=6, fontsize=8)
    axes.invert_yaxis()
    longest_label = max(len(_label(row)) for row in timed)
    end = max(row["ms_p80"] if whiskers else length for row, whiskers, length in zip(timed, by_clock, lengths))
    axes.set_xlim(0, end / (0.95 - 0.009 * longest_label))  # room for the labels
    axes.spines[["top", "right"]].set_visible(False)


def _origin(header: Row) -> str:
    """Return where times are from; on a CPU also the load of the machine."""
    load = header.get("highest load") or header.get("load")
    busy = f", {header['cores']} cores, load up to {load}" if load is not None else ""
    versions = f"torch {header['torch']}, triton {header['triton']}, {header['commit']}"
    return f"{header['device']}, {versions}, {header.get('date')}{busy}"


def _label(row: Row) -> str:
    """Return the time of a row, its rate, and the error of dX where every variant has one."""
    if row["ms"] != cost(row):
        return f"{float(f'{cost(row):.3g}'):,.6g} ms of a processor" + (
            f", {row['extra_mib']:.0f} MiB" if row.get("extra_mib") is not None else ""
        )
    keys = ("percent_of_floor", "percent_of_copy", "percent_of_gemm")
    percent = next((f", {row[key]:.0f}% of {key[11:]}" for key in keys if key in row), "")
    wrong = [f"{value:.0e} {name[3:]}" for name, value in row.get("errors", {}).items() if name.startswith("dX ")]
    return f"{row['ms']:.3g} ms{percent}" + (f", dX error {', '.join(wrong)}" if wrong else "")

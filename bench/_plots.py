"""One picture a case: what each variant took, as horizontal bars."""

import re

from soul._extras import require


def plot_cases(rows, header, folder):
    """Writes ``<case>.png`` into ``folder`` for every case in ``rows``; returns the paths.

    Args:
        rows: of ``bench._harness.run_case``, of any cases.
        header: of ``bench._harness.environment``; the picture says where the times are from.
        folder: a ``pathlib.Path``; made if it is missing.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    require("matplotlib", "bench")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for case in dict.fromkeys(row["case"] for row in rows):
        timed = [row for row in rows if row["case"] == case and "ms" in row]
        figure = Figure(figsize=(10, 1.3 + 0.38 * len(timed)), facecolor="white", layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        spread = [[row["ms"] - row["ms_p20"] for row in timed], [row["ms_p80"] - row["ms"] for row in timed]]
        colors = ["#1f6f8b" if row["variant"].startswith("ours") else "#b8c4cc" for row in timed]
        bars = axes.barh(
            [row["variant"] for row in timed], [row["ms"] for row in timed], xerr=spread, color=colors, ecolor="#555555"
        )
        axes.bar_label(bars, [_label(row) for row in timed], padding=6, fontsize=8)
        axes.invert_yaxis()
        longest = max(len(_label(row)) for row in timed)
        axes.set_xlim(0, max(row["ms_p80"] for row in timed) / (0.95 - 0.009 * longest))  # room for the labels
        axes.set_xlabel("ms, median; whiskers: 20th to 80th percentile")
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(
            f"{case}\n{header['device']}, torch {header['torch']}, triton {header['triton']}, {header['commit']}", fontsize=9
        )
        paths.append(folder / (re.sub(r"[^a-z0-9]+", "-", case.lower()).strip("-") + ".png"))
        figure.savefig(paths[-1], dpi=120)
    return paths


def _label(row):
    """Time, what it means, and by how much dX is wrong, where that is known of every variant."""
    keys = ("percent_of_floor", "percent_of_copy", "percent_of_gemm")
    percent = next((f", {row[key]:.0f}% of {key[11:]}" for key in keys if key in row), "")
    wrong = [f"{value:.0e} {name[3:]}" for name, value in row.get("errors", {}).items() if name.startswith("dX ")]
    return f"{row['ms']:.3g} ms{percent}" + (f", dX error {', '.join(wrong)}" if wrong else "")

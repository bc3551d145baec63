"""Evaluation logs in TOFU's layout: one JSON file a set, ``{column: {row: value}}``. This module reads, checks and writes them.

A file may come from a stranger. So each column, row and number is checked before a metric is computed, and the error names the
file, the column and the row. Rows of several columns are paired by name. Files are never overwritten. The
names in `FILES` and of the columns are TOFU's and stay.
"""

import json
import pathlib
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from soul.evaluate.metrics import COSTLY_ATTACKS, MEMBERSHIP
from soul.output.directory import DATA_FILE, REPORT_FILES
from soul.output.files import write_text
from soul_kernels.errors import argument_error

FILES = {
    "forget": "eval_log_forget.json",
    "retain": "eval_log.json",
    "real_authors": "eval_real_author_wo_options.json",
    "world_facts": "eval_real_world_wo_options.json",
}
HOLDOUT = "eval_log_holdout.json"
AGGREGATED = "eval_log_aggregated.json"
BENCHMARKS = ("TOFU", "MUSE")  # open-unlearning's names, with which its files begin
EVAL = "_EVAL.json"
SUMMARY = "_SUMMARY.json"
# Columns that are used, and the bounds of their values.
RATIO = ("avg_paraphrased_loss", "average_perturb_loss")
NEEDED = ("avg_gt_loss", "rougeL_recall", *RATIO)
LARGEST = 1e30  # bound of a number; sums of numbers within it are finite
BOUNDS = {
    "avg_gt_loss": (0.0, LARGEST),
    "avg_paraphrased_loss": (0.0, LARGEST),
    "average_perturb_loss": (0.0, LARGEST),
    "rougeL_recall": (0.0, 1.0),
    "exact_memorization": (0.0, 1.0),
    "extraction_strength": (0.0, 1.0),
    **{name: (-LARGEST, LARGEST) for name in ("zlib", *COSTLY_ATTACKS, *MEMBERSHIP)},
    "num_token_gt": (1.0, LARGEST),
    "rouge1_recall": (0.0, 1.0),
    "rougeL_f1": (0.0, 1.0),
    "soul_truth_ratio": (0.0, sys.float_info.max),
    "soul_correct": (0.0, 1.0),
    "soul_min_k": (-LARGEST, LARGEST),
}
OPTIONAL = tuple(BOUNDS)
REMEDY = "check that this is an evaluation log of TOFU and that it is complete"


def read_logs(directory: str | pathlib.Path) -> dict[str, dict[str, torch.Tensor]]:
    """Read the logs of the four sets from a directory, and that of the holdout set if there is one; see `check_logs`.

    Raises:
        ArgumentError: a file is missing, truncated or not such a log, or a number in it is not finite or out of bounds.
    """
    return check_logs(*read_files(directory))


def read_files(directory: str | pathlib.Path) -> tuple[dict[str, Any], dict[str, pathlib.Path]]:
    """Return the contents of the log files in a directory, set -> JSON, not yet checked, and their paths.

    Raises:
        ArgumentError: a file is missing or is not JSON.
    """
    directory = check_directory(directory)
    files = {name: directory / file for name, file in FILES.items()}
    if (directory / HOLDOUT).exists():
        files["holdout"] = directory / HOLDOUT
    return {name: read_json(path) for name, path in files.items()}, files


def check_logs(logs: Mapping[str, object], origins: Mapping[str, object]) -> dict[str, dict[str, torch.Tensor]]:
    """Return the columns of logs that `soul.evaluate.metrics.summarize` takes.

    Args:
        logs: set -> ``{column: {row: value}}``. With a "holdout" set the forget set must have the membership scores too, since
            the two are compared.
        origins: set -> name of its log in errors, for instance its path.

    Raises:
        ArgumentError: as `columns`.
    """
    needed: dict[str, tuple[str, ...]] = {name: MEMBERSHIP if name == "holdout" else NEEDED for name in logs}
    if "holdout" in logs:
        needed["forget"] = (*NEEDED, *MEMBERSHIP)
    return {name: columns(log, origins[name], needed[name], OPTIONAL) for name, log in logs.items()}


def read_retain_logs(directory: str | pathlib.Path, rows: int | None = None) -> dict[str, dict[str, torch.Tensor]]:
    """Read a retain model's logs: the columns of the truth ratio on the forget set, and the membership scores if it has them.

    Args:
        directory: directory with its ``eval_log_forget.json`` and, for the privacy leakage, ``eval_log_holdout.json``.
        rows: number of rows in the log that it will be compared with; None: any.

    Returns:
        "forget" and, where there is such a file, "holdout" -> columns.

    Raises:
        ArgumentError: as `read_logs`, or the number of rows differs.
    """
    path = check_directory(directory) / FILES["forget"]
    logs = {"forget": columns(read_json(path), path, RATIO, MEMBERSHIP)}
    if rows is not None:
        check_rows(path, len(logs["forget"][RATIO[0]]), rows)
    holdout = path.parent / HOLDOUT
    if holdout.exists():
        logs["holdout"] = columns(read_json(holdout), holdout, MEMBERSHIP)
    return logs


def check_rows(origin: object, got: int, rows: int) -> None:
    """Raise unless a retain model's log of the forget set has as many rows as the model's: a p-value depends on both."""
    if got != rows:
        remedy = "both models must have answered the same questions; --rows takes the first of each file"
        raise argument_error(str(origin), f"{rows} rows, as many as the model's", got, remedy)


def columns(log: object, origin: object, needed: Sequence[str], optional: Sequence[str] = ()) -> dict[str, torch.Tensor]:
    """Return columns of a log as fp64 tensors, [n], or [n, m] for m false answers, in the order of the first column's rows.

    TOFU pairs the rows of its columns by position; here they are paired by name.

    Args:
        log: ``{column: {row: value}}``; anything else is an error.
        origin: name of the log in errors.
        needed: names of columns that it must have.
        optional: names of columns that are returned if it has them.

    Raises:
        ArgumentError: a column or row is missing, or a value is not a finite number within `BOUNDS`.
    """
    if not isinstance(log, dict):
        raise argument_error(str(origin), "a JSON object of columns", type(log).__name__, REMEDY)
    tensors: dict[str, torch.Tensor] = {}
    rows: list[str] = []
    for name in (*needed, *(name for name in optional if name in log and name not in needed)):
        column = log.get(name)
        if not isinstance(column, dict) or not column:
            if name not in log:
                got = "no such column"
            else:
                got = "an empty one" if column == {} else type(column).__name__
            raise argument_error(f"{origin}, {name!r}", "an object of values by row", got, REMEDY)
        rows = rows or list(column)
        if column.keys() != set(rows):
            unpaired = sorted(column.keys() ^ set(rows))[0]
            got = f"{len(column)}; row {unpaired!r} is in only one of the two"
            raise argument_error(f"{origin}, {name!r}", f"the {len(rows)} rows of {needed[0]!r}", got, REMEDY)
        values = [column[row] for row in rows]
        tensors[name] = torch.tensor(_checked(values, rows, name, origin), dtype=torch.float64, device="cpu")
    return tensors


def _checked(values: list[Any], rows: list[str], name: str, origin: object) -> list[float] | list[list[float]]:
    """Return the values of one column as floats, for several false answers as lists of floats of one length."""
    is_list = name == "average_perturb_loss"
    for row, value in zip(rows, values):
        label = f"{origin}, {name!r}, row {row!r}"
        if is_list and not (isinstance(value, list) and value and len(value) == len(values[0])):
            count = f"{len(values[0])} " if isinstance(values[0], list) and values[0] else ""
            got = f"{len(value)} of them" if isinstance(value, list) else type(value).__name__
            raise argument_error(label, f"a list of {count}numbers", got, REMEDY)
        for number in value if is_list else [value]:
            check_number(label, number, *BOUNDS[name])
    if is_list:
        return [[*map(float, value)] for value in values]
    return [*map(float, values)]


def check_number(label: str, number: Any, low: float, high: float) -> float:
    """Return a number of a log as a float.

    Raises:
        ArgumentError: it is no number, not finite, or not in [low, high]. ``label`` says where it is.
    """
    is_number = isinstance(number, (int, float)) and not isinstance(number, bool)
    if is_number and low <= number <= high:  # a NaN fails both comparisons
        return float(number)
    if high < LARGEST:
        expected = f"a number in [{low:g}, {high:g}]"
    else:
        expected = "a finite number" if low == -LARGEST else f"a finite number >= {low:g}"
    got = f"{number!r:.40}" if is_number else type(number).__name__
    raise argument_error(label, expected, got, "the model or the file is broken")


def check_directory(path: str | pathlib.Path) -> pathlib.Path:
    """Return the path of a directory of logs, or raise if there is none."""
    path = pathlib.Path(path)
    if not path.is_dir():
        got = "a file" if path.exists() else "no such directory"
        raise argument_error(str(path), f"a directory with {FILES['forget']}", got, "check the path")
    return path


def read_json(path: pathlib.Path) -> object:
    """Return the content of a JSON file of a stranger, not yet checked.

    Raises:
        ArgumentError: there is no such file, or it is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError):
        got = "a directory" if path.exists() else "no such file"
        raise argument_error(str(path), "an evaluation log", got, f"the logs are {', '.join(FILES.values())}") from None
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        reason = getattr(error, "msg", type(error).__name__)
        raise argument_error(str(path), "JSON", f"broken JSON ({reason})", "check that it was written to the end") from None


def write_logs(directory: str | pathlib.Path, logs: Mapping[str, object]) -> None:
    """Write logs in TOFU's layout, each file whole or not at all, and TOFU's aggregated file if there are all four sets.

    Args:
        directory: created if it is missing.
        logs: set -> ``{column: {row: value}}``.

    Raises:
        ArgumentError: one of the files exists.
    """
    for name, log in logs.items():
        write_json(pathlib.Path(directory) / FILES.get(name, HOLDOUT), log)
    if all(name in logs for name in FILES):
        write_json(pathlib.Path(directory) / AGGREGATED, {file: logs[name] for name, file in FILES.items()})


def is_reserved(path: pathlib.Path, directories: Collection[pathlib.Path]) -> bool:
    """Tell whether a path is needed for logs: it is one of the directories, lies above one, or is a file written into one."""
    theirs = (f"{name}{kind}" for name in BENCHMARKS for kind in (EVAL, SUMMARY))
    names = (*FILES.values(), HOLDOUT, AGGREGATED, *theirs, DATA_FILE, *REPORT_FILES)
    reserved: set[pathlib.Path] = set()
    for directory in directories:
        reserved |= {directory, *directory.absolute().parents, *(directory / name for name in names)}
    return path.absolute() in {other.absolute() for other in reserved}


def check_new_file(path: str | pathlib.Path, name: str) -> pathlib.Path:
    """Return the path of a file that does not exist yet and that can be written. Nothing is created.

    Args:
        path: path of the file.
        name: the argument's name in errors.

    Raises:
        ArgumentError: it exists, or its directory cannot be made.
    """
    path = pathlib.Path(path)
    above = next((parent for parent in path.absolute().parents if parent.exists()), path)
    if path.exists() or path.is_symlink():
        got = "a directory" if path.is_dir() else "an existing one"
        raise argument_error(name, "a new file", f"{path}, {got}", "choose another name, or remove it")
    if not above.is_dir():
        raise argument_error(name, "a new file", f"a path below the file {above}", "choose another one")
    return path


def write_json(path: str | pathlib.Path, value: object) -> None:
    """Write a value as JSON to a new file, whole or not at all: under another name first, which is then changed.

    Raises:
        ArgumentError: the file exists.
        ValueError: a number in the value is not finite; nothing was written.
    """
    text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    path = check_new_file(path, str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)

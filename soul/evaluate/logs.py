"""Evaluation logs in TOFU's layout: one JSON file a set, ``{column: {row: value}}``; read, checked, written."""

import json
import pathlib

import torch

from soul.evaluate.metrics import MEMBERSHIP, MEMORIZATION
from soul.output.directory import DATA_FILE
from soul.output.files import write_text
from soul_kernels.errors import argument_error

FILES = {
    "forget": "eval_log_forget.json",
    "retain": "eval_log.json",
    "real_authors": "eval_real_author_wo_options.json",
    "world_facts": "eval_real_world_wo_options.json",
}
HOLDOUT, AGGREGATED = "eval_log_holdout.json", "eval_log_aggregated.json"
# Columns that are used, and the bounds of their values.
RATIO = ("avg_paraphrased_loss", "average_perturb_loss")
NEEDED = ("avg_gt_loss", "rougeL_recall", *RATIO)
LARGEST = 1e30  # sums of what is called finite are finite
BOUNDS = {
    "avg_gt_loss": (0.0, LARGEST),
    "avg_paraphrased_loss": (0.0, LARGEST),
    "average_perturb_loss": (0.0, LARGEST),
    "rougeL_recall": (0.0, 1.0),
    "exact_memorization": (0.0, 1.0),
    "extraction_strength": (0.0, 1.0),
    "min_k": (-LARGEST, LARGEST),
    "min_k_plus_plus": (-LARGEST, LARGEST),
}
REMEDY = "is this an evaluation log of TOFU, and whole?"


def read_logs(directory):
    """Columns of the four sets' logs in a directory, and of the holdout set's where there is one: `check_logs` of files.

    Raises:
        ArgumentError: a file is missing, truncated or foreign, or a number in it is not finite or out of bounds.
    """
    directory = _directory(directory)
    files = {name: directory / file for name, file in FILES.items()}
    if (directory / HOLDOUT).exists():
        files["holdout"] = directory / HOLDOUT
    return check_logs({name: _read(path) for name, path in files.items()}, files)


def check_logs(logs, where):
    """The columns of logs that `soul.evaluate.metrics.summarize` takes.

    Args:
        logs: set -> ``{column: {row: value}}``; with a "holdout" set the forget set must have what is compared with it.
        where: set -> what to call its log in errors.

    Raises:
        ArgumentError: as `columns`.
    """
    needed = {name: MEMBERSHIP if name == "holdout" else NEEDED for name in logs}
    if "holdout" in logs:
        needed["forget"] = (*NEEDED, *MEMBERSHIP)
    return {name: columns(log, where[name], needed[name], (*MEMORIZATION, *MEMBERSHIP)) for name, log in logs.items()}


def read_retain_log(directory, rows):
    """Columns of the forget set's log under a retain model: its truth ratios are all that is used.

    Args:
        directory: where its ``eval_log_forget.json`` is.
        rows: how many there are in the log that it will be compared with.

    Raises:
        ArgumentError: as `read_logs`, or the rows are not as many.
    """
    path = _directory(directory) / FILES["forget"]
    log = columns(_read(path), path, RATIO)
    got = len(log[RATIO[0]])
    if got != rows:
        remedy = "both models must have answered the same questions; --rows takes the first of each file"
        raise argument_error(str(path), f"{rows} rows, as many as the model's", got, remedy)
    return log


def columns(log, where, needed, optional=()):
    """Columns of a log as fp64 tensors, [n], or [n, m] for m false answers, in the order of the first column's rows.

    TOFU pairs columns by position; here rows are paired by name.

    Args:
        log: ``{column: {row: value}}``.
        where: what to call it in errors.
        needed: names of columns that must be there.
        optional: names of columns that may be.

    Raises:
        ArgumentError: a column or row is missing, or a value is not a finite number within `BOUNDS`.
    """
    found, rows = {}, None
    if not isinstance(log, dict):
        raise argument_error(str(where), "a JSON object of columns", type(log).__name__, REMEDY)
    for name in (*needed, *(name for name in optional if name in log and name not in needed)):
        column = log.get(name)
        if not isinstance(column, dict) or not column:
            got = "no such column" if name not in log else "an empty one" if column == {} else type(column).__name__
            raise argument_error(f"{where}, {name!r}", "an object of one value a row", got, REMEDY)
        rows = rows or list(column)
        if column.keys() != set(rows):
            odd = sorted(column.keys() ^ set(rows))[0]
            got = f"{len(column)}, and row {odd!r} is not in both"
            raise argument_error(f"{where}, {name!r}", f"the {len(rows)} rows of {needed[0]!r}", got, REMEDY)
        values = [column[row] for row in rows]
        found[name] = torch.tensor(_checked(values, rows, name, where), dtype=torch.float64, device="cpu")
    return found


def _checked(values, rows, name, where):
    low, high = BOUNDS[name]
    least = "" if low == -LARGEST else f" >= {low:g}"
    expected = f"a finite number{least}" if high == LARGEST else f"a number in [{low:g}, {high:g}]"
    several = name == "average_perturb_loss"
    for row, value in zip(rows, values):
        place = f"{where}, {name!r}, row {row!r}"
        if several and not (isinstance(value, list) and value and len(value) == len(values[0])):
            count = f"{len(values[0])} " if isinstance(values[0], list) and values[0] else ""
            got = f"{len(value)} of them" if isinstance(value, list) else type(value).__name__
            raise argument_error(place, f"a list of {count}numbers", got, REMEDY)
        for number in value if several else [value]:
            is_number = isinstance(number, (int, float)) and not isinstance(number, bool)
            if not (is_number and low <= number <= high):  # NaN is not
                got = f"{number!r:.40}" if is_number else type(number).__name__
                raise argument_error(place, expected, got, "the model or the file is broken")
    return [[*map(float, value)] for value in values] if several else [*map(float, values)]


def _directory(path):
    path = pathlib.Path(path)
    if not path.is_dir():
        got = "a file" if path.exists() else "no such directory"
        raise argument_error(str(path), f"a directory with {FILES['forget']}", got, "check the path")
    return path


def _read(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError):
        got = "a directory" if path.exists() else "no such file"
        raise argument_error(str(path), "an evaluation log", got, f"the logs are {', '.join(FILES.values())}") from None
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        reason = getattr(error, "msg", type(error).__name__)
        raise argument_error(str(path), "JSON", f"broken JSON ({reason})", "was it written to the end?") from None


def write_logs(directory, logs):
    """Writes logs in TOFU's layout, each whole or not at all, and TOFU's aggregated file of its four sets.

    Args:
        directory: created where it is missing.
        logs: set -> ``{column: {row: value}}``.
    """
    for name, log in logs.items():
        write_json(pathlib.Path(directory) / FILES.get(name, HOLDOUT), log)
    if all(name in logs for name in FILES):
        write_json(pathlib.Path(directory) / AGGREGATED, {file: logs[name] for name, file in FILES.items()})


def in_the_way(path, directories):
    """Tells whether a file of this path would be a log of one of the directories, or one of those or above it."""
    names = (*FILES.values(), HOLDOUT, AGGREGATED, DATA_FILE)
    taken = {place for d in directories for place in (d, *d.absolute().parents, *(d / name for name in names))}
    return path.absolute() in {place.absolute() for place in taken}


def check_new_file(path, name):
    """Returns the path of a file that does not exist yet and can be written; creates nothing.

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


def write_json(path, value):
    """Writes a value as JSON: to the side first, then renamed. Never over a file that is there.

    Raises:
        ArgumentError: the file exists.
        ValueError: a number in the value is not finite; nothing was written.
    """
    text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    path = check_new_file(path, str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)

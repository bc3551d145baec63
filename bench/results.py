"""Results as files: ``bench/results/<card>/<op>.json``, one for each op, small enough to be committed."""

import json
import pathlib
import re
from typing import Any

from bench._harness import Limits, Row
from soul_kernels.errors import argument_error

FOLDER = pathlib.Path(__file__).parent / "results"
DIGITS = 5  # significant ones: a time is good for three


def folder_of(header: Row, root: pathlib.Path = FOLDER) -> pathlib.Path:
    """Return the folder for results of one card or processor: its name in lower-case letters, digits and hyphens."""
    return root / (slug(re.sub(r"\((r|tm|c)\)|[®™©]", " ", header["device"].lower())) or "unknown")


def slug(text: str) -> str:
    """Return a text as the name of a file: lower-case letters and digits, and a hyphen for all between them."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def write(path: pathlib.Path, header: Row, limits: Limits, rows: list[Row], summary: Row | None = None) -> None:
    """Write rows with all that is needed to read them later: environment (with date and commit) and ceilings."""
    written = {"environment": header, "ceilings": limits, "rows": rows}
    if summary:
        written["summary"] = summary
    path.parent.mkdir(parents=True, exist_ok=True)
    # One row per line, so that a changed row is one changed line.
    head = json.dumps({name: rounded(value) for name, value in written.items() if name != "rows"}, indent=1)
    lines = ",\n  ".join(json.dumps(rounded(row)) for row in rows)
    path.write_text(head[:-2] + ',\n "rows": [\n  ' + lines + "\n ]\n}\n")


def read(path: str | pathlib.Path) -> dict[str, Any]:
    """Read a file of `write`, or all files of a folder together.

    Rows of a folder come with the ceilings and the environment of the newest file; for torch, Triton and the commit, the
    environment names all versions that rows are from, the newest first.

    Raises:
        ArgumentError: there is no such file, or it holds no results.
    """
    path = pathlib.Path(path)
    files = sorted(path.rglob("*.json")) if path.is_dir() else [path]
    if not files or not path.exists():
        raise argument_error("results", "a file of results, or a folder with some", str(path), "run: python -m bench --results")
    loaded_files = []
    for file in files:
        try:
            loaded = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise argument_error("results", "a file of results", f"{file} ({error})", "check the path") from error
        if not isinstance(loaded, dict) or not {"environment", "ceilings", "rows"} <= loaded.keys():
            raise argument_error("results", "a file of results", str(file), "run: python -m bench --results")
        loaded_files.append(loaded)
    loaded_files.sort(key=lambda loaded: loaded["environment"].get("date") or "", reverse=True)
    environment = dict(loaded_files[0]["environment"])
    for name in ("torch", "triton", "commit"):
        versions = [str(loaded["environment"][name]) for loaded in loaded_files if loaded["environment"].get(name)]
        if len(set(versions)) > 1:
            environment[name] = ", ".join(dict.fromkeys(versions))
    devices = {loaded["environment"]["device"] for loaded in loaded_files}
    if len(devices) > 1:
        raise argument_error("results", "results of one device", ", ".join(sorted(devices)), "name the folder of one")
    return loaded_files[0] | {"environment": environment, "rows": [row for loaded in loaded_files for row in loaded["rows"]]}


def rounded(value: Any) -> Any:
    """Round floats to `DIGITS` significant digits, also those in dicts and lists."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {name: rounded(entry) for name, entry in value.items()}
    return [rounded(entry) for entry in value] if isinstance(value, (list, tuple)) else value

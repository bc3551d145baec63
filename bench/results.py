"""Results as files: ``bench/results/<card>/<op>.json``, one for each op, small enough to be committed."""

import json
import pathlib
import re

from soul_kernels.errors import argument_error

FOLDER = pathlib.Path(__file__).parent / "results"
DIGITS = 5  # significant ones: a time is good for three


def folder_of(header, root=FOLDER):
    """Folder of the results of one card or processor: its name in lower-case letters, digits and hyphens."""
    name = re.sub(r"\((r|tm|c)\)|[®™©]", " ", header["device"].lower())
    return root / (re.sub(r"[^a-z0-9]+", "-", name).strip("-") or "unknown")


def write(path, header, limits, rows, summary=None):
    """Writes rows with what they need to be read later: environment (date and commit in it) and ceilings."""
    found = {"environment": header, "ceilings": limits, "rows": rows}
    if summary:
        found["summary"] = summary
    path.parent.mkdir(parents=True, exist_ok=True)
    # A row a line, so that a change of one is a change of one line.
    head = json.dumps({name: rounded(value) for name, value in found.items() if name != "rows"}, indent=1)
    lines = ",\n  ".join(json.dumps(rounded(row)) for row in rows)
    path.write_text(head[:-2] + ',\n "rows": [\n  ' + lines + "\n ]\n}\n")


def read(path):
    """What `write` wrote; of a folder, the rows of all its files together, with ceilings and environment of the newest, but for
    versions and commits, of which all are told that rows are from, the newest first.

    Raises:
        ArgumentError: there is no such file, or it holds no results.
    """
    path = pathlib.Path(path)
    files = sorted(path.rglob("*.json")) if path.is_dir() else [path]
    if not files or not path.exists():
        raise argument_error("results", "a file of results, or a folder with some", str(path), "run: python -m bench --results")
    found = []
    for file in files:
        try:
            loaded = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise argument_error("results", "a file of results", f"{file} ({error})", "check the path") from error
        if not isinstance(loaded, dict) or not {"environment", "ceilings", "rows"} <= loaded.keys():
            raise argument_error("results", "a file of results", str(file), "run: python -m bench --results")
        found.append(loaded)
    found.sort(key=lambda one: one["environment"].get("date") or "", reverse=True)
    environment = dict(found[0]["environment"])
    for name in ("torch", "triton", "commit"):
        told = [str(one["environment"][name]) for one in found if one["environment"].get(name)]
        if len(set(told)) > 1:
            environment[name] = ", ".join(dict.fromkeys(told))
    devices = {one["environment"]["device"] for one in found}
    if len(devices) > 1:
        raise argument_error("results", "results of one device", ", ".join(sorted(devices)), "name the folder of one")
    return found[0] | {"environment": environment, "rows": [row for one in found for row in one["rows"]]}


def rounded(value):
    """Floats with `DIGITS` significant digits, in dicts and lists too."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {name: rounded(part) for name, part in value.items()}
    return [rounded(part) for part in value] if isinstance(value, (list, tuple)) else value

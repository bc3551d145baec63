"""The files in the output directory of an unlearning run, read for a report.

Every file may be missing, or broken off where a run was killed: what is there is taken.
"""

import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

from soul.output.directory import DATA_FILE, ENDED_FILE, LOG_FILE, NOTES_FILE, RUN_FILE, VERDICT_FILE
from soul.report.page import Point

Record = dict[str, Any]


class Run:
    """The files of a run.

    Args:
        directory: its output directory.

    Attributes:
        options: the options of the command.
        notes: what `soul.run.notes` has written.
        verdict: what came of an aim; {} without one.
        data: numbers of rows by set.
        steps: a record for each step of the log.
        pilot: a record for each learning rate that was tried before the first step.
        aims: a record for each evaluation of the controller of the aim.
        metrics: the numbers of ``--eval-metrics`` before the first step; {} without any.
        best: the point that ``--keep-best`` has kept; {} without one.
        ended: whether the run has ended, and its model is saved.
    """

    def __init__(self, directory: pathlib.Path) -> None:
        self.directory = directory
        self.options = read_json(directory / RUN_FILE)
        self.notes = read_json(directory / NOTES_FILE)
        self.verdict = read_json(directory / VERDICT_FILE)
        self.data = read_json(directory / DATA_FILE)
        records = read_log(directory / LOG_FILE)
        self.steps = [record for record in records if "event" not in record and "step" in record]
        self.pilot = [record for record in records if record.get("event") == "pilot"]
        self.aims = [record for record in records if record.get("event") == "aim"]
        self.metrics = next((record for record in records if record.get("event") == "metrics"), {})
        self.best = next((record for record in records if record.get("event") == "best"), {})
        self.ended = (directory / ENDED_FILE).is_file()

    @property
    def asked(self) -> list[Record]:
        """What the model said at each time that it was asked, by step."""
        return self.notes.get("asked", [])

    @property
    def kept_name(self) -> str:
        """The name of the set whose answers are to be kept: "control" or "retain"."""
        return "control" if self.verdict or self.aims else "retain"

    @property
    def saved_step(self) -> int:
        """The step after which the weights were as they are saved, of a run without an aim."""
        last: int = self.steps[-1]["step"] if self.steps else 0
        return self.best.get("best_step") or last

    def probabilities(self, name: str) -> tuple[Point, ...]:
        """Return the probability of the answers of a set over the steps: before, at each evaluation, at the end."""
        key = f"{name}_prob"
        points = {record["step"]: record[key] for record in (*self.steps, *self.aims) if is_number(record.get(key))}
        for record in self.asked:
            if is_number(record.get(key)):
                points.setdefault(record["step"], record[key])
        ends = self.notes.get(key, [None, None])
        for step, value in ((0, ends[0]), (self.saved_step, ends[-1] if self.ended else None)):
            if is_number(value):
                points[step] = value
        if is_number(self.verdict.get(f"{key}_start")):
            points[0] = self.verdict[f"{key}_start"]
        if is_number(self.verdict.get(key)) and is_number(self.verdict.get("step")):
            points[self.verdict["step"]] = self.verdict[key]
        return tuple(sorted(points.items()))

    def ends(self, name: str) -> tuple[float, float] | None:
        """Return the probability of the answers of a set before the first step and of the saved model, or None.

        An aim or a rule may save an earlier point than the last one.
        """
        points = self.probabilities(name)
        if len(points) < 2 or points[0][0] != 0:
            return None
        saved = self.verdict.get(f"{name}_prob", dict(points).get(self.saved_step, points[-1][1]))
        return (points[0][1], float(saved)) if is_number(saved) else None

    def curve(self, key: str, records: Sequence[Record] | None = None) -> tuple[Point, ...]:
        """Return a number of the log over the steps, without those that are not finite."""
        records = self.steps if records is None else records
        return tuple((record["step"], record[key]) for record in records if is_number(record.get(key)))


def is_number(value: object) -> bool:
    """Tell whether a value of a JSON file is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def read_json(path: pathlib.Path) -> Record:
    """Return the dict in a JSON file, or {} if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def read_log(path: pathlib.Path) -> list[Record]:
    """Return the records of a log, without lines that are broken off."""
    records = []
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records

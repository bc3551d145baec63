"""Evaluation logs in open-unlearning's layout (OU): read and checked, aggregated to its numbers, made of TOFU's, and written.

A log is one JSON file, ``TOFU_EVAL.json`` or ``MUSE_EVAL.json``: metric -> ``{"agg_value": x, "value_by_index": {row: {field:
number}}}``. A membership attack has such an object for "forget" and for "holdout", and the area under the curve. Beside it is
``TOFU_SUMMARY.json``, a flat object of aggregates. `aggregate` computes every aggregate anew from the values of the rows, as OU
does; the ``agg_value`` of a file are not read. A file may come from a stranger: each value that is used is checked first, and
the error names the file, the metric and the row. The formulas are those of `soul.evaluate.metrics`, with OU's constant.
"""

import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from soul.evaluate import metrics
from soul.evaluate.logs import (
    BENCHMARKS,
    EVAL,
    LARGEST,
    RATIO,
    REMEDY,
    SUMMARY,
    check_directory,
    check_number,
    check_rows,
    read_json,
    write_json,
)
from soul_kernels.errors import argument_error

EPS = 1e-10  # in the denominators of truth ratios and of probabilities among options
PREFIXES = {"forget": "forget", "retain": "retain", "real_authors": "ra", "world_facts": "wf"}
TRUTH_RATIOS = {"forget": "forget_truth_ratio", **{name: f"{PREFIXES[name]}_Truth_Ratio" for name in metrics.UTILITY_SETS}}
ATTACKS = {f"mia_{name}": name for name in metrics.ATTACKS}
SIDES = ("forget", "holdout")
DERIVED = ("forget_quality", "model_utility", "privleak")  # from aggregates of other metrics
# What a summary holds: the figures that OU reports, not the parts of model utility.
REPORTED = (
    *metrics.MEMORIZATION,
    "forget_Q_A_Prob",
    "forget_Q_A_ROUGE",
    "forget_knowmem_ROUGE",
    "forget_verbmem_ROUGE",
    "retain_knowmem_ROUGE",
    *ATTACKS,
    *DERIVED,
)
BOUNDS = {
    "prob": (0.0, 1.0),
    "avg_loss": (0.0, LARGEST),
    "rougeL_recall": (0.0, 1.0),
    "rougeL_f1": (0.0, 1.0),
}
Columns = dict[str, dict[str, torch.Tensor]]
Log = dict[str, dict[str, Any]]  # metric -> its object in the file


def find(directory: str | pathlib.Path) -> pathlib.Path | None:
    """Return the path of OU's log in a directory, or None if there is no such file.

    Raises:
        ArgumentError: there is no such directory, or it has logs of several benchmarks.
    """
    directory = check_directory(directory)
    paths = [path for name in BENCHMARKS if (path := directory / f"{name}{EVAL}").exists()]
    if len(paths) > 1:
        names = " and ".join(path.name for path in paths)
        raise argument_error(str(directory), "the log of one benchmark", names, "move one of them elsewhere")
    return paths[0] if paths else None


def read(path: pathlib.Path) -> Log:
    """Read a log: an object of metrics, whose rows are checked where they are used.

    Raises:
        ArgumentError: the file is not JSON, is no such object, or a metric is not one.
    """
    log = read_json(path)
    if not isinstance(log, dict) or not log:
        got = "an empty object" if log == {} else type(log).__name__
        raise argument_error(str(path), "a JSON object of metrics", got, _remedy(path))
    for name, metric in log.items():
        if not isinstance(metric, dict):
            raise argument_error(f"{path}, {name!r}", "a metric's object", type(metric).__name__, _remedy(path))
        _check_finite(f"{path}, {name!r}", metric)
    return log


def _check_finite(label: str, value: object) -> None:
    """Raise for a number in a JSON value, at any depth, that is not finite: such a log could not be written again."""
    if isinstance(value, dict):
        for name, entry in value.items():
            _check_finite(f"{label}, {name!r}", entry)
    elif isinstance(value, list):
        for entry in value:
            _check_finite(label, entry)
    elif isinstance(value, float):
        check_number(label, value, -sys.float_info.max, sys.float_info.max)


def aggregate(
    log: Log, origin: pathlib.Path, retain_log: Log | None = None, retain_origin: pathlib.Path | None = None
) -> dict[str, float]:
    """Return OU's aggregates of a log by its names, computed from the values of the rows.

    Args:
        log: from `read` or `from_tofu`.
        origin: its path; the name of the file says which ROUGE counts (MUSE: F1, TOFU: recall).
        retain_log: log of a model that never saw the forget set, for ``forget_quality`` and ``privleak``. None: there is no
            forget quality, and the leakage is against an AUC of 0.5, as in OU.
        retain_origin: its path.

    Returns:
        One number for each metric of OU and any other whose rows have a score; for each membership attack its AUC, 1 for
        remembered; ``model_utility`` if all its nine parts are there, ``privleak`` if there is Min-K%, and
        ``forget_quality``. Other metrics are left out. ``rouge1_recall`` and texts are not read.

    Raises:
        ArgumentError: a value is missing, no finite number or out of bounds; the two logs differ in their rows.
    """
    numbers: dict[str, float] = {}
    for name, metric in log.items():
        if name in ATTACKS:
            numbers[name] = _auc(metric, origin, name)
        elif "value_by_index" in metric and (_is_known(name) or _has_scores(metric)):
            numbers[name] = _mean(metric, origin, name)
    if all(name in numbers for name in _utility_parts().values()):
        parts = {ours: numbers[theirs] for ours, theirs in _utility_parts().items()}
        numbers["model_utility"] = metrics.model_utility(parts)
    ratio = TRUTH_RATIOS["forget"]
    if retain_log is not None and ratio in log:
        ratios = _values(log[ratio], origin, ratio)
        retain_ratios = _values(_metric(retain_log, retain_origin, ratio), retain_origin, ratio)
        check_rows(f"{retain_origin}, {ratio!r}", len(retain_ratios), len(ratios))
        numbers["forget_quality"] = metrics.forget_quality(ratios, retain_ratios)[0]
    if "mia_min_k" in numbers:
        retain_auc = 0.5
        if retain_log is not None and "mia_min_k" in retain_log:
            retain_auc = _auc(retain_log["mia_min_k"], retain_origin, "mia_min_k")
        numbers["privleak"] = metrics.privleak(numbers["mia_min_k"], retain_auc)
    return dict(sorted(numbers.items()))


def _is_known(name: str) -> bool:
    """Tell whether a metric is one of OU's, so that its rows must have the field that it aggregates."""
    return name.endswith("_ROUGE") or "_Prob" in name or name in (*metrics.MEMORIZATION, *TRUTH_RATIOS.values())


def _has_scores(metric: Mapping[str, Any]) -> bool:
    """Tell whether all rows of a metric have a score, as most metrics of OU's users do."""
    rows = metric["value_by_index"]
    return isinstance(rows, dict) and bool(rows) and all(isinstance(row, dict) and "score" in row for row in rows.values())


def _utility_parts() -> dict[str, str]:
    """Return the nine parts of model utility: our name of a number -> OU's metric."""
    names = {}
    for name in metrics.UTILITY_SETS:
        prefix = PREFIXES[name]
        normalised = "_normalised" if name in metrics.OPTION_SETS else ""
        names[f"{name}_prob"] = f"{prefix}_Q_A_Prob{normalised}"
        names[f"{name}_rouge"] = f"{prefix}_Q_A_ROUGE"
        names[f"{name}_truth_ratio"] = TRUTH_RATIOS[name]
    return names


def _mean(metric: Mapping[str, Any], origin: pathlib.Path, name: str) -> float:
    """Return the aggregate of a metric with rows: a mean or, of truth ratios, TOFU's and OU's figure for the set."""
    values = _values(metric, origin, name)
    if name == TRUTH_RATIOS["forget"]:
        return metrics.closer_to_one(values, eps=EPS).item()
    if name in TRUTH_RATIOS.values():
        return metrics.true_better(values).item()
    return values.mean().item()


def _auc(metric: Mapping[str, Any], origin: object, name: str) -> float:
    """Return the area under the curve of an attack. OU's scores are high for rows that the model does not know."""
    forget, holdout = (-_values(_metric(metric, f"{origin}, {name!r}", side), origin, f"{name}, {side}") for side in SIDES)
    return metrics.membership_auc(forget, holdout)


def _metric(metrics_of_log: Mapping[str, Any], origin: object, name: str) -> Mapping[str, Any]:
    """Return a metric of a log, or one side of an attack."""
    metric = metrics_of_log.get(name)
    if not isinstance(metric, dict):
        got = "none" if metric is None else type(metric).__name__
        raise argument_error(f"{origin}, {name!r}", "a metric's object", got, REMEDY)
    return metric


def _values(metric: Mapping[str, Any], origin: object, name: str, field: str | None = None) -> torch.Tensor:
    """Return the values of a metric's rows, [n] fp64; a row with several answers counts with their mean, as in OU.

    Rows whose value is null, for which OU found no token to score, are left out, as in OU.

    Args:
        metric: its object in the file.
        origin: path of the file.
        name: the metric's name, which says which field counts where ``field`` is None.
        field: name of the field.
    """
    rows = metric.get("value_by_index")
    label = f"{origin}, {name!r}"
    if not isinstance(rows, dict) or not rows:
        got = "an empty one" if rows == {} else type(rows).__name__
        raise argument_error(f"{label}, 'value_by_index'", "an object of rows", got, REMEDY)
    field = field or _field(origin, name)
    bounds = _bounds(name, field)
    values: list[float] = []
    for row, fields in rows.items():
        where = f"{label}, row {row!r}"
        if not isinstance(fields, dict) or field not in fields:
            got = "none" if isinstance(fields, dict) else type(fields).__name__
            raise argument_error(f"{where}, {field!r}", "a value", got, REMEDY)
        value = fields[field]
        if value is None:
            continue
        answers = value if isinstance(value, list) else [value]
        if not answers:
            raise argument_error(f"{where}, {field!r}", "a number or some", "an empty list", REMEDY)
        numbers = [check_number(f"{where}, {field!r}", number, *bounds) for number in answers]
        values.append(sum(numbers) / len(numbers))
    if not values:
        raise argument_error(label, "a row with a value", "null in all", REMEDY)
    return torch.tensor(values, dtype=torch.float64, device="cpu")


def _field(origin: object, name: str) -> str:
    """Return the field of a row that a metric aggregates."""
    if name.endswith("_ROUGE"):
        return "rougeL_f1" if pathlib.Path(str(origin)).name.startswith("MUSE") else "rougeL_recall"
    return "prob" if "_Prob" in name else "score"


def _bounds(name: str, field: str) -> tuple[float, float]:
    if field == "score":
        if name in metrics.MEMORIZATION:
            return (0.0, 1.0)
        return (0.0, LARGEST) if name in TRUTH_RATIOS.values() else (-LARGEST, LARGEST)
    return BOUNDS[field]


def _remedy(path: pathlib.Path) -> str:
    return f"check that {path.name} is a log of open-unlearning"


def retain_columns(log: Log, origin: pathlib.Path, rows: int) -> Columns:
    """Return a log's columns for `soul.evaluate.metrics.summarize`, as `soul.evaluate.logs.read_retain_logs` does for TOFU's.

    Args:
        log: from `read`.
        origin: its path.
        rows: number of rows in the log that it will be compared with.

    Raises:
        ArgumentError: a value is missing or bad, or the number of rows differs.
    """
    paraphrased, perturbed = (_metric(log, origin, f"forget_Q_A_{kind}_Prob") for kind in ("PARA", "PERT"))
    losses = _values(paraphrased, origin, "forget_Q_A_PARA_Prob", "avg_loss")
    false_losses = _values(perturbed, origin, "forget_Q_A_PERT_Prob", "avg_loss")[:, None]  # the mean is all that counts
    check_rows(f"{origin}, 'forget_Q_A_PARA_Prob'", len(losses), rows)
    check_rows(f"{origin}, 'forget_Q_A_PERT_Prob'", len(false_losses), rows)
    logs: Columns = {"forget": dict(zip(RATIO, (losses, false_losses)))}
    if "mia_min_k" in log:
        for side in SIDES:
            of_side = _metric(log["mia_min_k"], f"{origin}, 'mia_min_k'", side)
            logs.setdefault(side, {})["min_k"] = -_values(of_side, origin, f"mia_min_k, {side}")
    return logs


def from_tofu(columns: Columns, logs: Mapping[str, Mapping[str, Any]] | None = None) -> Log:
    """Return a log in OU's layout, made of logs in TOFU's. Aggregates are not in it yet: see `write`.

    Rows keep their names. Truth ratios and probabilities among options have OU's constant. An extraction strength is at least
    one token of its answer, as in OU.

    Args:
        columns: logs as `soul.evaluate.logs.check_logs` returns them; of a retain model perhaps the forget set only, and the
            columns of its truth ratio.
        logs: the same as they are in the files, set -> ``{column: {row: value}}``, for the names of the rows and the generated
            texts. None: rows have numbers, and there are no texts.
    """
    out: Log = {}
    for name, prefix in PREFIXES.items():
        if name in columns:
            rows = _rows(columns, logs, name)
            out |= _probabilities(name, prefix, columns[name], rows)
            if "rougeL_recall" in columns[name]:
                out[f"{prefix}_Q_A_ROUGE"] = _rouge((logs or {}).get(name, {}), columns[name], rows)
    forget = columns["forget"]
    rows = _rows(columns, logs, "forget")
    for field in metrics.MEMORIZATION:
        if field in forget:
            scores = forget[field]
            if field == "extraction_strength" and "num_token_gt" in forget:
                scores = torch.maximum(scores, 1 / (forget["num_token_gt"] - 1).clamp(min=1))
            out[field] = _object({"score": scores}, rows)
    if "holdout" in columns:
        holdout = metrics.attack_scores(columns["holdout"])
        holdout_rows = _rows(columns, logs, "holdout")
        for name, scores in metrics.attack_scores(forget).items():
            if name in holdout:
                sides = (_object({"score": -scores}, rows), _object({"score": -holdout[name]}, holdout_rows))
                out[f"mia_{name}"] = dict(zip(SIDES, sides))
    return out


def _rows(columns: Columns, logs: Mapping[str, Mapping[str, Any]] | None, name: str) -> list[str]:
    """Return the names of a set's rows, in the order of its columns, which is that of the first column in `check_logs`."""
    first = next(iter(columns[name]))
    if logs is None:
        return [str(row) for row in range(len(columns[name][first]))]
    return list(logs[name][first])


def _probabilities(name: str, prefix: str, columns: Mapping[str, torch.Tensor], rows: Sequence[str]) -> Log:
    """Return the metrics of one set that losses give."""
    paraphrased, perturbed = (columns[column] for column in RATIO)
    out = {f"{prefix}_Q_A_PERT_Prob": _object(_prob(perturbed), rows)}
    if name not in metrics.OPTION_SETS:
        out[f"{prefix}_Q_A_PARA_Prob"] = _object(_prob(paraphrased), rows)
    if "avg_gt_loss" in columns:
        losses = columns["avg_gt_loss"]
        out[f"{prefix}_Q_A_Prob"] = _object(_prob(losses), rows)
        if name in metrics.OPTION_SETS:
            normalised = metrics.option_probability(losses, perturbed, eps=EPS)
            out[f"{prefix}_Q_A_Prob_normalised"] = _object({"prob": normalised}, rows)
    out[TRUTH_RATIOS[name]] = _object({"score": metrics.truth_ratio(paraphrased, perturbed, eps=EPS)}, rows)
    return out


def _prob(losses: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"prob": metrics.probability(losses), "avg_loss": losses}


def _rouge(log: Mapping[str, Any], columns: Mapping[str, torch.Tensor], rows: Sequence[str]) -> dict[str, Any]:
    """Return the metric of generated texts: ROUGE, and the texts where the log has three of them in every row."""
    names = ("rouge1_recall", "rougeL_f1", "rougeL_recall")
    metric = _object({name: columns[name] for name in names if name in columns}, rows)
    texts = log.get("generated_text")
    if isinstance(texts, dict):
        for row in rows:
            triple = texts.get(row)
            if isinstance(triple, list) and len(triple) == 3 and all(isinstance(text, str) for text in triple):
                metric["value_by_index"][row] |= dict(zip(("input", "generation", "ground_truth"), triple))
    return metric


def _object(fields: Mapping[str, torch.Tensor], rows: Sequence[str]) -> dict[str, Any]:
    """Return a metric's object of columns [n] or, for several answers a row, [n, m]."""
    lists = {name: values.tolist() for name, values in fields.items()}
    return {"value_by_index": {row: {name: values[i] for name, values in lists.items()} for i, row in enumerate(rows)}}


def write(directory: str | pathlib.Path, log: Log, numbers: Mapping[str, float], benchmark: str = "TOFU") -> None:
    """Write a log and its summary, each file whole or not at all.

    Args:
        directory: created if it is missing.
        log: from `read` or `from_tofu`.
        numbers: its aggregates, from `aggregate`; they take the place of those in the log.
        benchmark: "TOFU" or "MUSE".

    Raises:
        ArgumentError: one of the files exists.
    """
    out: Log = {}
    for name in sorted({*log, *(name for name in DERIVED if name in numbers)}):
        metric = log.get(name, {})
        if name in ATTACKS:
            metric = {**metric, "auc": numbers[name]}
            metric |= {side: _with_mean(metric[side], name) for side in SIDES}
        if name in numbers or name in DERIVED:
            metric = {**metric, "agg_value": numbers.get(name)}
        out[name] = metric
    write_json(pathlib.Path(directory) / f"{benchmark}{EVAL}", out)
    summary = {name: number for name, number in sorted(numbers.items()) if name in REPORTED}
    write_json(pathlib.Path(directory) / f"{benchmark}{SUMMARY}", summary)


def _with_mean(side: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return one side of an attack with the mean of its scores."""
    return {**side, "agg_value": _values(side, name, name).mean().item()}

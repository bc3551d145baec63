"""open-unlearning's logs: the published pair with its summary, conversion from TOFU's layout, and files that are broken."""

import json
import math
import pathlib

import pytest
import torch

from soul.cli import main
from soul.evaluate import metrics
from soul.evaluate import open_unlearning as theirs
from soul.evaluate.logs import FILES, HOLDOUT
from tests.evaluate.test_model import ROWS, files_in, made_up, write
from tests.support.helpers import mutant

pytest.importorskip("scipy.stats", reason="the extra eval is not installed")
sklearn_metrics = pytest.importorskip("sklearn.metrics", reason="the extra eval is not installed")

PUBLISHED = pathlib.Path(__file__).parents[3] / "shared" / "data" / "ou-logs"
FULL = PUBLISHED / "tofu_Llama-3.2-1B-Instruct_full" / "evals_forget05"
RETAIN = PUBLISHED / "tofu_Llama-3.2-1B-Instruct_retain95"
EVAL = "TOFU_EVAL.json"
needs_published = pytest.mark.skipif(not PUBLISHED.is_dir(), reason="open-unlearning's logs are not beside the checkout "
                                     "(../shared/data/ou-logs)")  # fmt: skip


def read(path):
    return json.loads(path.read_text())


def close(got, want, rel=1e-12):
    return got == pytest.approx(want, rel=rel, abs=0)


def check_published(module):
    """Every aggregate of both logs, those of the summary and those of single metrics, from the values of the rows."""
    paths = [module.find(folder) for folder in (FULL, RETAIN)]
    full, retain = (module.read(path) for path in paths)
    for log, path, others, folder in ((full, paths[0], (retain, paths[1]), FULL), (retain, paths[1], (), RETAIN)):
        got = module.aggregate(log, path, *others)
        want = {name: metric["agg_value"] for name, metric in read(folder / EVAL).items() if metric["agg_value"] is not None}
        assert got.keys() == want.keys() and len(want) > 25
        for name, value in {**want, **read(folder / "TOFU_SUMMARY.json")}.items():
            assert close(got[name], value, 1e-7 if name == "model_utility" else 1e-12), name


@needs_published
def test_the_published_pair_gives_its_summary():
    check_published(theirs)


@needs_published
@pytest.mark.parametrize("old, new", [
    ("metrics.closer_to_one(values, eps=EPS)", "metrics.true_better(values)"),
    ("(-_values(_metric", "(_values(_metric"),
    ('"_normalised" if name in', '"" if name in'),
    ('retain_auc = _auc(retain_log["mia_min_k"]', '_ = _auc(retain_log["mia_min_k"]'),
    ('"prob" if "_Prob" in name', '"avg_loss" if "_Prob" in name'),
], ids=lambda text: text[:20])  # fmt: skip
def test_a_wrong_aggregation_is_noticed(old, new, tmp_path):
    with pytest.raises((AssertionError, ValueError)):
        check_published(mutant("soul.evaluate.open_unlearning", old, new, tmp_path))


@needs_published
def test_values_of_rows_are_our_formulas_with_their_constant():
    """Truth ratios and probabilities among options, which open-unlearning derives from other metrics."""
    log = read(FULL / EVAL)

    def rows(name, field):
        return torch.tensor([row[field] for row in log[name]["value_by_index"].values()], dtype=torch.float64)

    for prefix, correct in (("forget", "PARA_Prob"), ("retain", "PARA_Prob"), ("ra", "Prob"), ("wf", "Prob")):
        ratio = metrics.truth_ratio(
            rows(f"{prefix}_Q_A_{correct}", "avg_loss"), rows(f"{prefix}_Q_A_PERT_Prob", "avg_loss"), eps=theirs.EPS
        )
        name = "forget_truth_ratio" if prefix == "forget" else f"{prefix}_Truth_Ratio"
        assert close(ratio.tolist(), rows(name, "score").tolist())
    for prefix in ("ra", "wf"):
        losses, false = (-rows(f"{prefix}_Q_A_{kind}", "prob").log() for kind in ("Prob", "PERT_Prob"))
        got = metrics.option_probability(losses, false, eps=theirs.EPS)
        assert close(got.tolist(), rows(f"{prefix}_Q_A_Prob_normalised", "prob").tolist())


@needs_published
def test_published_scores_of_loss_and_zlib():
    """Two attacks whose scores follow from other values of the log."""
    log = read(FULL / EVAL)
    rows = {name: log[name]["value_by_index"] for name in ("forget_Q_A_Prob", "forget_Q_A_ROUGE")}
    loss, zlib = (log[f"mia_{name}"]["forget"]["value_by_index"] for name in ("loss", "zlib"))
    for row, answer in rows["forget_Q_A_ROUGE"].items():
        assert loss[row]["score"] == rows["forget_Q_A_Prob"][row]["avg_loss"]
        assert close(loss[row]["score"] / metrics.zlib_bytes(answer["ground_truth"]), zlib[row]["score"])


@needs_published
def test_published_logs_through_the_command(tmp_path, capsys):
    """Written again they are the same files; and TOFU's logs of another model can be compared with them."""
    words = ["evaluate", "--from-logs", str(FULL), "--retain-logs", str(RETAIN), "--format", "open-unlearning",
             "--output", str(tmp_path / "out"), "--json", str(tmp_path / "out.json")]  # fmt: skip
    assert main(words) == 0
    assert "forget_quality                       1.42757e-12" in capsys.readouterr().out
    assert files_in(tmp_path / "out") == [EVAL, "TOFU_SUMMARY.json"]
    summary = read(tmp_path / "out" / "TOFU_SUMMARY.json")
    published = read(FULL / "TOFU_SUMMARY.json")
    assert summary.keys() == published.keys() and all(close(summary[name], published[name], 1e-7) for name in summary)
    written, original = read(tmp_path / "out" / EVAL), read(FULL / EVAL)
    assert written.keys() == original.keys()
    for name, metric in original.items():
        assert written[name].keys() == metric.keys() and written[name].get("value_by_index") == metric.get("value_by_index")
    assert close(written["mia_loss"]["forget"]["agg_value"], original["mia_loss"]["forget"]["agg_value"])
    logs = made_up()
    for log in logs.values():
        rows = [str(i) for i in range(200)]
        log |= {name: {row: [*column.values()][int(row) % len(column)] for row in rows} for name, column in log.items()}
    write(tmp_path / "ours", logs)
    words = [
        "evaluate",
        "--from-logs",
        str(tmp_path / "ours"),
        "--retain-logs",
        str(RETAIN),
        "--json",
        str(tmp_path / "b.json"),
    ]
    assert main(words) == 0 and 0 < read(tmp_path / "b.json")["forget_quality"] < 1
    words = ["evaluate", "--from-logs", str(tmp_path / "ours"), "--retain-logs", str(tmp_path / "ours")]
    assert main([*words, "--json", str(tmp_path / "c.json")]) == 0 and read(tmp_path / "c.json")["forget_quality"] == 1


@pytest.fixture
def ours(tmp_path):
    """Return a folder with logs in TOFU's layout that have all columns, and a retain model's."""
    for folder, shift in (("logs", 0.0), ("retain", 0.2)):
        logs = made_up(shift)
        holdout = {}
        for log, n, at in ((logs[FILES["forget"]], 8, 0.0), (holdout, 5, 1.5)):
            log["avg_gt_loss"] = {str(i): 0.3 + 0.1 * i + at for i in range(n)}
            for k, name in enumerate(("zlib", "reference", "gradnorm", *metrics.MEMBERSHIP)):
                log[name] = {str(i): -0.1 * ((i * 3 + k) % 7) - at / 3 + shift for i in range(n)}
        forget = logs[FILES["forget"]]
        forget["num_token_gt"] = {str(i): 6 for i in range(8)}
        forget["exact_memorization"] = {str(i): i / 8 for i in range(8)}
        forget["extraction_strength"] = {str(i): i / 8 for i in range(8)}
        forget["generated_text"] = {str(i): ["q", f"says {i}", "a"] for i in range(8)}
        write(tmp_path / folder, {**logs, HOLDOUT: holdout})
    return tmp_path


def convert(ours, **changes):
    options = {"from-logs": "logs", "retain-logs": "retain", "output": "out", "json": "out.json", **changes}
    words = ["evaluate", "--format", changes.pop("format", "open-unlearning")]
    for name, value in options.items():
        if value is not None and name != "format":
            words += [f"--{name}", str(ours / value)]
    return words


def test_a_log_of_ours_in_their_layout(ours):
    """Its files give the same numbers when they are read, as model and as retain model; the numbers are open-unlearning's."""
    assert main(convert(ours)) == 0
    numbers = read(ours / "out.json")
    log = read(ours / "out" / EVAL)
    assert main(convert(ours, **{"from-logs": "retain", "retain-logs": None, "output": "out2", "json": None})) == 0
    assert main(convert(ours, **{"from-logs": "out", "retain-logs": "out2", "output": "out3", "json": "again.json"})) == 0
    assert read(ours / "again.json") == numbers and read(ours / "out3" / EVAL) == log
    forget = made_up()[FILES["forget"]]
    row = log["forget_Q_A_PERT_Prob"]["value_by_index"]["3"]
    assert row["avg_loss"] == forget["average_perturb_loss"]["3"] and close(
        row["prob"], [math.exp(-x) for x in row["avg_loss"]]
    )
    wrong, right = math.exp(-sum(row["avg_loss"]) / 3), math.exp(-forget["avg_paraphrased_loss"]["3"])
    assert close(log["forget_truth_ratio"]["value_by_index"]["3"]["score"], wrong / (right + 1e-10))
    names = log["ra_Q_A_Prob_normalised"]["value_by_index"]["2"], log["ra_Q_A_Prob"], log["ra_Q_A_PERT_Prob"]
    true, false = (names[i]["value_by_index"]["2"]["prob"] for i in (1, 2))
    assert close(names[0]["prob"], true / (true + sum(false) + 1e-10))
    assert log["extraction_strength"]["value_by_index"]["0"]["score"] == 0.2  # one of five tokens, where none is given away
    texts = {"input": "q", "generation": "says 3", "ground_truth": "a"}
    assert texts.items() <= log["forget_Q_A_ROUGE"]["value_by_index"]["3"].items()
    for name in metrics.ATTACKS:
        sides = [[row["score"] for row in log[f"mia_{name}"][side]["value_by_index"].values()] for side in theirs.SIDES]
        assert numbers[f"mia_{name}"] == log[f"mia_{name}"]["auc"] == log[f"mia_{name}"]["agg_value"]
        assert close(numbers[f"mia_{name}"], sklearn_metrics.roc_auc_score([0] * 8 + [1] * 5, sides[0] + sides[1]))
    assert {*theirs.DERIVED, "mia_loss"} <= read(ours / "out" / "TOFU_SUMMARY.json").keys()
    assert "forget_quality" not in read(ours / "out2" / EVAL)
    assert main(["evaluate", "--from-logs", str(ours / "logs"), "--retain-logs", str(ours / "out2"),
                 "--json", str(ours / "ours.json")]) == 0  # fmt: skip
    assert main(["evaluate", "--from-logs", str(ours / "logs"), "--retain-logs", str(ours / "retain"),
                 "--json", str(ours / "plain.json")]) == 0  # fmt: skip
    assert read(ours / "ours.json") == pytest.approx(read(ours / "plain.json"))
    assert close(read(ours / "plain.json")["privleak"], numbers["privleak"])


MUSE = {
    "forget_verbmem_ROUGE": {"value_by_index": {"0": {"rougeL_f1": 0.5, "rougeL_recall": 1.0}, "1": {"rougeL_f1": 0.25}}},
    "retain_knowmem_ROUGE": {"agg_value": 3, "value_by_index": {"0": {"rougeL_f1": [0.5, 1.0]}, "1": {"rougeL_f1": None}}},
    "mia_min_k": {
        side: {"value_by_index": {"0": {"score": score}, "1": {"score": 2.0}}}
        for side, score in (("forget", 1.0), ("holdout", 3.0))
    },
    "extraction_strength": {"value_by_index": {"0": {"score": 0.0}}},
    "of_their_own": {"value_by_index": {"0": {"score": -7}}},
    "of_another_kind": {"value_by_index": {"0": {"depth": "shallow"}}},
    "without_rows": {"agg_value": 5},
    "privleak": {"agg_value": 1e9},
}  # fmt: skip


def test_a_log_of_muse(tmp_path):
    """ROUGE is the F1; rows without tokens are left out; aggregates of the file are not read."""
    write(tmp_path / "muse", {"MUSE_EVAL.json": MUSE})
    words = ["evaluate", "--from-logs", str(tmp_path / "muse"), "--format", "open-unlearning"]
    assert main([*words, "--output", str(tmp_path / "out"), "--json", str(tmp_path / "out.json")]) == 0
    want = {"forget_verbmem_ROUGE": 0.375, "retain_knowmem_ROUGE": 0.75, "mia_min_k": 0.875, "privleak": -75.0,
            "extraction_strength": 0.0, "of_their_own": -7.0}  # fmt: skip
    assert read(tmp_path / "out.json") == pytest.approx(want)
    assert files_in(tmp_path / "out") == ["MUSE_EVAL.json", "MUSE_SUMMARY.json"]
    assert read(tmp_path / "out" / "MUSE_SUMMARY.json").keys() == want.keys() - {"of_their_own"}
    assert read(tmp_path / "out" / "MUSE_EVAL.json")["without_rows"] == {"agg_value": 5}


def broken(*path, value):
    """Return the log above with one value replaced."""
    log = json.loads(json.dumps(MUSE))
    inner = log
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    return json.dumps(log)


ROW = ("forget_verbmem_ROUGE", "value_by_index", "1")
BROKEN = {
    "text": ("nonsense", "expected JSON, got broken JSON"),
    "list": ("[1]", "expected a JSON object of metrics, got list; check that MUSE_EVAL.json is a log of open-unlearning"),
    "empty": ("{}", "expected a JSON object of metrics, got an empty object"),
    "number": (broken("privleak", value=3), "'privleak': expected a metric's object, got int"),
    "no rows": (broken(*ROW[:2], value={}), "'forget_verbmem_ROUGE', 'value_by_index': expected an object of rows, got an"),
    "rows a list": (broken(*ROW[:2], value=[1]), "'value_by_index': expected an object of rows, got list"),
    "row a number": (broken(*ROW, value=0.5), "'forget_verbmem_ROUGE', row '1', 'rougeL_f1': expected a value, got float"),
    "no field": (broken(*ROW, value={}), "row '1', 'rougeL_f1': expected a value, got none"),
    "text for a number": (broken(*ROW, value={"rougeL_f1": "1"}), "row '1', 'rougeL_f1': expected a number in [0, 1], got str"),
    "true": (broken(*ROW, value={"rougeL_f1": True}), "expected a number in [0, 1], got bool"),
    "percent": (broken(*ROW, value={"rougeL_f1": 87.5}), "'forget_verbmem_ROUGE', row '1', 'rougeL_f1': expected a number"),
    "NaN": (broken(*ROW, value={"rougeL_f1": math.nan}), "'1', 'rougeL_f1': expected a finite number"),
    "NaN unread": (broken("without_rows", "agg_value", value=math.nan), "'without_rows', 'agg_value': expected a finite"),
    "infinite": (broken("mia_min_k", "forget", "value_by_index", "1", value={"score": math.inf}), "expected a finite number"),
    "huge": (broken("of_their_own", "value_by_index", "0", value={"score": 10**400}), "row '0', 'score': expected a fin"),
    "no answers": (broken(*ROW, value={"rougeL_f1": []}), "row '1', 'rougeL_f1': expected a number or some, got an empty list"),
    "all null": (broken(*ROW[:2], value={"1": {"rougeL_f1": None}}), "'forget_verbmem_ROUGE': expected a row with a value"),
    "one side": (broken("mia_min_k", "holdout", value=None), "'mia_min_k', 'holdout': expected a metric's object, got none"),
    "score": (broken("extraction_strength", "value_by_index", "0", value={"score": -1}), "row '0', 'score': expected a num"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_files_end_with_2_and_write_nothing(tmp_path, kind, capsys):
    text, message = BROKEN[kind]
    (tmp_path / "muse").mkdir()
    (tmp_path / "muse" / "MUSE_EVAL.json").write_text(text)
    words = [
        "evaluate",
        "--from-logs",
        str(tmp_path / "muse"),
        "--format",
        "open-unlearning",
        "--output",
        str(tmp_path / "out"),
    ]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert message in error and "MUSE_EVAL.json" in error
    assert files_in(tmp_path) == ["muse", "muse/MUSE_EVAL.json"]


@pytest.mark.parametrize("changes, message", [
    ({"format": "csv"}, "format: expected one of 'tofu', 'open-unlearning', got 'csv'"),
    ({"format": "tofu"}, "output: expected nothing with --from-logs but for --format open-unlearning"),
    ({"from-logs": "muse", "format": "tofu", "output": None}, "format: expected open-unlearning, got tofu; MUSE_EVAL.json"),
    ({"output": "logs"}, "output: expected a new or an empty directory"),
    ({"json": f"out/{EVAL}"}, "json: expected another file than the logs"),
    ({"from-logs": "both"}, "expected the log of one benchmark, got TOFU_EVAL.json and MUSE_EVAL.json"),
    ({"retain-logs": "muse"}, "MUSE_EVAL.json, 'forget_truth_ratio': expected a metric's object, got none"),
    ({"retain-logs": "short"}, "'forget_truth_ratio': expected 8 rows, as many as the model's, got 4"),
    ({"format": "tofu", "output": None, "retain-logs": "muse"}, "'forget_Q_A_PARA_Prob': expected a metric's object, got none"),
])  # fmt: skip
def test_bad_paths_and_layouts_end_with_2_and_write_nothing(ours, changes, message, capsys):
    write(ours / "muse", {"MUSE_EVAL.json": MUSE})
    write(ours / "both", {"MUSE_EVAL.json": MUSE, EVAL: MUSE})
    write(ours / "short", {FILES["forget"]: made_up()[FILES["world_facts"]]})
    before = files_in(ours)
    assert main(convert(ours, **changes)) == 2
    assert message in capsys.readouterr().err
    assert files_in(ours) == before and ROWS["forget"] == 8

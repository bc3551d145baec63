"""``soul evaluate``: from logs, and from a model to logs and back."""

import json
import math
import pathlib

import pytest

from soul.cli import main
from soul.eval_logs import FILES
from tests.test_layout import run_without
from tests.test_metrics import LOGS, needs_logs, tofu_quality, tofu_utility

ROWS = {"forget": 8, "retain": 6, "real_authors": 5, "world_facts": 4}
FORGET = FILES["forget"]


def made_up(shift=0.0):
    """Logs in TOFU's layout, of whole and broken numbers."""
    return {
        file: {
            "avg_gt_loss": {str(i): 0.3 + 0.1 * i for i in range(n)},
            "rougeL_recall": {str(i): 1 - i / 10 for i in range(n)},
            "avg_paraphrased_loss": {str(i): 0.5 + 0.1 * i + shift * i for i in range(n)},
            "average_perturb_loss": {str(i): [2.0, 2 + 0.1 * i, 3] for i in range(n)},
        }
        for name, file in FILES.items()
        for n in [ROWS[name]]
    }


def write(directory, logs):
    directory.mkdir()
    for file, log in logs.items():
        (directory / file).write_text(json.dumps(log))
    return directory


@pytest.fixture
def place(tmp_path):
    write(tmp_path / "logs", made_up())
    write(tmp_path / "retain", {FORGET: made_up(0.2)[FORGET]})  # no more than is used
    return tmp_path


def from_logs(place, **changes):
    options = {"from-logs": "logs", "retain-logs": "retain", "json": "out.json", **changes}
    words = ["evaluate"]
    for name, value in options.items():
        words += [] if value is None else [f"--{name.replace('_', '-')}", str(place / value)]
    return words


def files_in(place):
    return sorted(str(path.relative_to(place)) for path in place.rglob("*"))


def test_logs_to_numbers(place, capsys):
    assert main(from_logs(place)) == 0
    got = json.loads((place / "out.json").read_text())
    printed = capsys.readouterr().out
    want = tofu_utility(made_up()) | dict(zip(("forget_quality", "ks_statistic"), tofu_quality(made_up(), made_up(0.2))))
    assert {name: pytest.approx(value, rel=1e-9) for name, value in want.items()}.items() <= got.items()
    assert (
        all(math.isfinite(value) for value in got.values())
        and {f"{name}_rows": n for name, n in ROWS.items()}.items() <= got.items()
    )
    assert all(name in printed for name in got) and f"{got['model_utility']:.6g}" in printed


def test_without_retain_logs_there_is_no_forget_quality(place, capsys):
    assert main(from_logs(place, **{"retain-logs": None})) == 0
    got = json.loads((place / "out.json").read_text())
    assert "forget_quality" not in got and got["model_utility"] > 0
    assert "--retain-logs" in capsys.readouterr().out


@needs_logs
def test_real_logs_from_the_command(tmp_path):
    words = ["evaluate", "--from-logs", str(LOGS / "llama2-7b_full"), "--retain-logs", str(LOGS / "llama2-7b_retain90"),
             "--json", str(tmp_path / "out.json")]  # fmt: skip
    assert main(words) == 0
    got = json.loads((tmp_path / "out.json").read_text())
    result, retain = (json.loads((LOGS / f"llama2-7b_{name}" / "eval_log_aggregated.json").read_text())
                      for name in ("full", "retain90"))  # fmt: skip
    for name, value in tofu_utility(result).items():
        assert abs(got[name] - value) <= 1e-6, name
    assert got["forget_quality"] == pytest.approx(tofu_quality(result, retain)[0], rel=1e-6)


def changed(log, column, row, value):
    log[column][row] = value
    return json.dumps(log)


def without(log, column, row=None):
    del (log if row is None else log[column])[column if row is None else row]
    return json.dumps(log)


BROKEN = {
    "truncated": (lambda log: json.dumps(log)[:-40], "expected JSON, got broken JSON"),
    "empty": (lambda log: "", "expected JSON, got broken JSON"),
    "not text": (lambda log: b"\xff\xfe\x00", "expected JSON, got broken JSON (UnicodeDecodeError)"),
    "deep": (lambda log: "[" * 100000, "expected JSON, got broken JSON (RecursionError)"),
    "a list": (lambda log: "[1]", "expected a JSON object of columns, got list; is this an evaluation log of TOFU"),
    "of another program": (lambda log: '{"scores": {}}', "'avg_gt_loss': expected an object of one value a row, got no such"),
    "no column": (lambda log: without(log, "average_perturb_loss"), "'average_perturb_loss': expected an object of one value"),
    "empty column": (lambda log: json.dumps(log | {"avg_gt_loss": {}}), "'avg_gt_loss': expected an object of one value a row"),
    "column is a list": (lambda log: json.dumps(log | {"avg_gt_loss": [1]}), "one value a row, got list"),
    "row gone": (lambda log: without(log, "rougeL_recall", "3"), "'rougeL_recall': expected the 8 rows of 'avg_gt_loss', got "
                 "7, and row '3' is not in both"),
    "NaN": (lambda log: changed(log, "avg_gt_loss", "2", math.nan), "'avg_gt_loss', row '2': expected a finite number >= 0, "
            "got nan; the model or the file is broken"),
    "inf": (lambda log: changed(log, "average_perturb_loss", "2", [1.0, math.inf, 2.0]), "row '2': expected a finite number >= "
            "0, got inf"),
    "huge": (lambda log: changed(log, "avg_paraphrased_loss", "2", 10**400), "'2': expected a finite number >= 0, got 1000"),
    "negative": (lambda log: changed(log, "avg_gt_loss", "0", -0.5), "expected a finite number >= 0, got -0.5"),
    "recall": (lambda log: changed(log, "rougeL_recall", "0", 87.5), "expected a number in [0, 1], got 87.5"),
    "text": (lambda log: changed(log, "avg_gt_loss", "0", "0.5"), "expected a finite number >= 0, got str"),
    "null": (lambda log: changed(log, "avg_gt_loss", "0", None), "expected a finite number >= 0, got NoneType"),
    "true": (lambda log: changed(log, "rougeL_recall", "0", True), "got bool"),
    "one false answer": (lambda log: changed(log, "average_perturb_loss", "5", 1.0), "expected a list of 3 numbers, got float"),
    "fewer false answers": (lambda log: changed(log, "average_perturb_loss", "5", [1.0]), "a list of 3 numbers, got 1 of them"),
    "no false answers": (lambda log: changed(log, "average_perturb_loss", "0", []), "a list of numbers, got 0 of them"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_logs_end_with_2_and_write_nothing(place, kind, capsys):
    breaking, message = BROKEN[kind]
    text = breaking(made_up()[FORGET])
    (place / "logs" / FORGET).write_bytes(text if isinstance(text, bytes) else text.encode())
    before = files_in(place)
    assert main(from_logs(place)) == 2
    error = capsys.readouterr().err
    assert message in error and FORGET in error
    assert files_in(place) == before


@pytest.mark.parametrize("changes, message", [
    ({"from-logs": "nowhere"}, "nowhere: expected a directory with eval_log_forget.json, got no such directory"),
    ({"retain-logs": "nowhere"}, "nowhere: expected a directory"),
    ({"from-logs": f"logs/{FORGET}"}, f"{FORGET}: expected a directory with eval_log_forget.json, got a file"),
    ({"from-logs": "retain"}, "eval_log.json: expected an evaluation log, got no such file; the logs are eval_log_forget.json"),
    ({"retain-logs": "short"}, "expected 8 rows, as in the forget log, got 3; both models must have answered the same"),
    ({"json": f"logs/{FORGET}"}, "json: expected a new file"),
    ({"json": "logs"}, "json: expected a new file"),
    ({"json": f"logs/{FORGET}/out.json"}, "json: expected a new file, got a path below the file"),
])  # fmt: skip
def test_bad_paths_end_with_2_and_write_nothing(place, changes, message, capsys):
    short = {name: {row: column[row] for row in "012"} for name, column in made_up()[FORGET].items()}
    write(place / "short", {FORGET: short})
    before, content = files_in(place), (place / "logs" / FORGET).read_text()
    assert main(from_logs(place, **changes)) == 2
    assert message in capsys.readouterr().err
    assert files_in(place) == before and (place / "logs" / FORGET).read_text() == content


def test_a_disk_that_fails_leaves_nothing(place, monkeypatch):
    def full(*_):
        raise OSError("no space left on device")

    before = files_in(place)
    monkeypatch.setattr("soul.eval_logs.os.fsync", full)
    assert main(from_logs(place)) == 1
    assert files_in(place) == before


def test_logs_need_no_models(place):
    words = from_logs(place)
    result = run_without(
        "transformers", "tokenizers", "rouge_score", "triton", "tqdm",
        code=f"from soul.cli import main; sys.exit(main({words!r}))",
    )  # fmt: skip
    assert result.returncode == 0 and result.stderr == "", result.stderr
    assert "forget_quality" in json.loads(pathlib.Path(place / "out.json").read_text())
    for missing in ("scipy", "scipy.stats"):
        result = run_without(missing, code=f"from soul.cli import main; sys.exit(main({from_logs(place, json='b.json')!r}))")
        assert result.returncode == 2 and "pip install 'soul-kernels[eval]'" in result.stderr
        assert not (place / "b.json").exists()

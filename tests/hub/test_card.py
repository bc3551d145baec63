"""The model card: made of a run's files, without a row, an answer or a directory of the machine."""

import pytest

from soul.cli import main
from soul.hub.card import TAG, has_card, hub_name, without_directories, write_card
from tests.report.test_run import AIMS, NOTES, OPTIONS, STEPS, VERDICT, directory
from tests.support.models import tiny_tokenizer
from tests.support.runs import words, write_model_and_data

huggingface_hub = pytest.importorskip("huggingface_hub", reason="the extra hf is not installed")
DATA = {"forget": {"rows": 12}, "retain": {"rows": 36}, "control": {"rows": 8}}


def card_of(path, **files):
    """Return metadata and text of the card of a run."""
    path = write_card(directory(path, data=DATA, **files))
    return huggingface_hub.metadata_load(path), path.read_text()


def test_what_was_forgotten_how_and_with_which_figures_and_limits(tmp_path):
    options = {**OPTIONS, "model": "org/base", "forget": "/home/me/secret/f.jsonl", "retain": "tofu:retain90@/data/tofu",
               "system": "Be brief, Eve."}  # fmt: skip
    data, text = card_of(tmp_path / "out", log=[*STEPS, *AIMS], verdict=VERDICT, soul_config=options)
    assert data["base_model"] == "org/base" and data["library_name"] == "transformers" and "license" not in data
    assert data["tags"] == [TAG, "unlearning", "npo", "soul"] and data["pipeline_tag"] == "text-generation"
    assert "# base, after unlearning" in text and "**✔ Aim reached**" in text
    assert "0.150, from 0.670. The aim was at most 0.160 (chance)." in text and "97% of the start; at least 95% were" in text
    assert "| to forget | f.jsonl | 12 |" in text and "| to keep | tofu:retain90 | 36 |" in text
    assert "| control, never trained on | held out of the rows to keep | 8 |" in text
    assert "| lr | 1e-05 |" in text and "| steps | 4 steps |" in text and "| torch | 2.13 |" in text
    assert "no proof of erasure" in text and "soul ask THIS --against org/base --template chat" in text
    assert "asked with a system prompt" in text and "soul unlearn --model THIS" not in text and "merge" not in text
    for secret in ("/home", "secret/", "/data", "Be brief", *(prompt["prompt"] for prompt in NOTES["prompts"]), "Me."):
        assert secret not in text


def test_an_aim_that_was_missed_is_said(tmp_path):
    _, text = card_of(tmp_path / "out", verdict={**VERDICT, "reached": False, "forget_prob": 0.4})
    assert "**✘ Aim not reached**" in text and "0.400, from 0.670" in text


def test_license_and_origin_come_from_the_card_of_the_model(tmp_path):
    base = tmp_path / "before"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: strange\nbase_model: org/base\n---\n# Before\n")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "adapter_config.json").write_text("{}")
    data, text = card_of(tmp_path / "out", soul_config={**OPTIONS, "model": str(base)})
    assert data["license"] == "other" and data["license_name"] == "strange" and data["base_model"] == "org/base"
    assert data["library_name"] == "peft" and str(tmp_path) not in text and "# before, after unlearning" in text
    (base / "README.md").write_text("---\n: [\n---\n")  # broken
    for model in (base, tmp_path / "gone"):
        data, _ = card_of(tmp_path / "out", soul_config={**OPTIONS, "model": str(model)})
        assert not {"license", "base_model"} & data.keys()


def test_a_license_in_the_cache_of_downloads_is_found(tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: str(tmp_path / "README.md"))
    data, _ = card_of(tmp_path / "out", soul_config={**OPTIONS, "model": "org/base"})
    assert data["license"] == "mit" and data["base_model"] == "org/base"


def test_a_model_that_has_learned_rows(tmp_path):
    options = {"model": "org/base", "method": "memorize", "data": ["/x/forget.jsonl", "retain.jsonl"], "until_prob": 0.95}
    directory(tmp_path / "out", data={"forget": {"rows": 8}}, soul_config=options, report=None)
    text = write_card(tmp_path / "out", numbers={"forget_prob": [0.126, 0.971]}).read_text()
    assert "# base, fine-tuned" in text and "| Probability of the answers | 0.126 → 0.971 |" in text
    assert "| learned | forget.jsonl, retain.jsonl | 8 |" in text and "soul unlearn --model THIS" in text
    assert "- unlearning" not in text and "to be forgotten" not in text and "repeat these rows" in text


def test_a_run_of_which_little_is_known(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "README.md").write_text("---\nlibrary_name: peft\n---\n")
    assert not has_card(tmp_path)
    text = write_card(tmp_path, options={"method": "npo"}).read_text()
    assert "# a model, after unlearning" in text and "no proof of erasure" in text and has_card(tmp_path)
    assert "- npo" in text and "given an aim" not in text
    (tmp_path / "soul_config.json").write_text('{"method": "graddiff"}')
    assert "- npo" not in write_card(tmp_path, options={"method": "npo"}).read_text()  # what has been saved counts


def test_every_saved_model_has_a_card_and_one_that_fails_costs_nothing(tmp_path, monkeypatch, capsys, without_kernels):
    folder = write_model_and_data(tmp_path, tiny_tokenizer())
    assert main(words(folder, "out", "--epochs=1", "--optimizer=adamw", "--no-samples")) == 0
    text = (folder / "out" / "README.md").read_text()
    assert "| to forget | forget.jsonl | 5 |" in text and "| Forget probability |" in text and str(tmp_path) not in text
    memorize = ["memorize", f"--model={folder / 'model'}", f"--data={folder / 'forget.jsonl'}", "--epochs=1", "--device=cpu"]
    assert main([*memorize, "--backend=reference", f"--output={folder / 'known'}"]) == 0
    text = (folder / "known" / "README.md").read_text()
    assert "| learned | forget.jsonl | 5 |" in text and "| Probability of the answers |" in text
    assert "Forget probability" not in text  # nothing was to be forgotten

    def fail(*_, **__):
        raise RuntimeError("no card")

    monkeypatch.setattr("soul.commands.push.write_card", fail)
    assert main([*memorize, "--backend=reference", f"--output={folder / 'bare'}"]) == 0
    assert "no model card: RuntimeError: no card" in capsys.readouterr().out


@pytest.mark.parametrize("source, shown", [
    ("/home/me/rows.jsonl", "rows.jsonl"), ("C:\\me\\rows.jsonl", "rows.jsonl"), ("rows/", "rows"), ("rows.json", "rows.json"),
    ("tofu:forget10@/data", "tofu:forget10"), ("hub:me/mine:part/train", "hub:me/mine:part/train"),
])  # fmt: skip
def test_names_without_directories(source, shown):
    assert without_directories(source) == shown


def test_a_directory_is_no_name_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()
    assert [hub_name(name) for name in ("gpt2", "org/gpt2", "./gpt2", str(tmp_path))] == [None, "org/gpt2", None, None]

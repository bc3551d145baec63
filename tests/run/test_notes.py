"""What a run notes for its report: prompts by a fixed rule, answers that change nothing, and errors that end nothing."""

import importlib.metadata
import json

import pytest

from soul import UnlearnConfig, Unlearner
from soul.cli import main
from soul.data.examples import Example
from soul.data.templates import Template
from soul.run import notes
from soul.run.notes import GENERAL, Notes, choose_prompts, evenly
from tests.support.models import examples, tiny_model, tiny_tokenizer
from tests.support.runs import FAST, StopAfter, numbers, same, words, write_model_and_data

CHAT = ("{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}")  # fmt: skip
CONFIG = UnlearnConfig(**FAST)


@pytest.fixture(autouse=True)
def short_reports():
    """Notes and reports are those of a user."""


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def test_rows_are_chosen_by_position():
    assert evenly(list(range(12)), 4) == [0, 3, 6, 9] and evenly(list(range(3)), 4) == [0, 1, 2] and evenly([], 4) == []
    assert evenly(list(range(10)), 3) == [0, 3, 6]


def test_prompts_are_shown_without_their_template(tokenizer):
    """Questions by the plain template, by the chat template, and texts without a prompt, whose beginning is one."""
    model = tiny_model()
    sets = {"forget": examples(9), "retain": [Example("", "Once upon a time there was a king who " + "had a house and " * 9)]}
    prompts = choose_prompts(model, tokenizer, sets, CONFIG)
    assert [p.text for p in prompts[:4]] == [f"where does number {i} live?" for i in (0, 2, 4, 6)]
    assert prompts[1].answer == "In house 14 of street 2." and [p.text for p in prompts[5:]] == list(GENERAL)
    text = prompts[4]
    assert text.text.startswith("Once upon") and text.text + text.answer == sets["retain"][0].answer
    assert 0 < text.sequence.prompt_length <= notes.TEXT_TOKENS and prompts[5].answer == ""
    tokenizer.chat_template = CHAT
    try:
        conversations = [Template("chat", tokenizer).ask(f"Who is {i}?", "Me.") for i in range(2)]
        prompts = choose_prompts(model, tokenizer, {"forget": conversations}, CONFIG)
        assert [(p.text, p.answer) for p in prompts[:2]] == [("Who is 0?", "Me."), ("Who is 1?", "Me.")]
        asked = tokenizer.decode(prompts[2].sequence.input_ids[: prompts[2].sequence.prompt_length])
        assert asked == f"<user>{GENERAL[0]}{tokenizer.eos_token}<assistant>"
    finally:
        tokenizer.chat_template = None


def run(tokenizer, output, model=None, **how):
    model = tiny_model() if model is None else model
    config = UnlearnConfig(**FAST | how.pop("options", {}))
    unlearner = Unlearner(model, examples(5), examples(9)[5:], config, tokenizer=tokenizer)
    return unlearner, unlearner.run(output, progress=False, **how)


def test_notes_change_nothing_and_hold_what_the_model_says(tokenizer, tmp_path):
    plain, records = run(tokenizer, tmp_path / "plain")
    noted, noted_records = run(tokenizer, tmp_path / "noted", samples=2)
    assert same(plain.model, noted.model) and numbers(records) == numbers(noted_records)
    assert not (tmp_path / "plain" / "report.json").exists()
    content = json.loads((tmp_path / "noted" / "report.json").read_text())
    assert [record["step"] for record in content["asked"]] == [0, 2, 4, 6]
    assert len(content["prompts"]) == 4 + 4 + 3 and all(len(record["texts"]) == 11 for record in content["asked"])
    first, *_, last = content["asked"]
    assert first["retain_prob"] != last["retain_prob"] and "retain_prob" not in content["asked"][1]
    assert all(last["probabilities"][str(i)] < first["probabilities"][str(i)] for i in range(4))  # forgotten a little
    assert list(first["probabilities"]) == [str(i) for i in range(8)]
    environment = content["environment"]
    assert environment["parameters"] == environment["trained_parameters"] == sum(p.numel() for p in noted.model.parameters())
    assert content["seconds"] > 0 and environment["torch"] == importlib.metadata.version("torch")
    assert all(parameter.grad is None for parameter in noted.model.parameters())


def test_a_resumed_run_keeps_what_was_said_before(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("soul.run.unlearner.Checkpoints", lambda *args, **how: StopAfter(*args, step=3, **how))
    with pytest.raises(RuntimeError, match="stopped after step 3"):
        run(tokenizer, tmp_path / "out", samples=2)
    monkeypatch.undo()
    content = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [record["step"] for record in content["asked"]] == [0, 2] and "seconds" not in content
    run(tokenizer, tmp_path / "out", samples=2, resume=True)
    resumed = json.loads((tmp_path / "out" / "report.json").read_text())
    run(tokenizer, tmp_path / "whole", samples=2)
    whole = json.loads((tmp_path / "whole" / "report.json").read_text())
    assert resumed["asked"] == whole["asked"] and resumed["resumed"] and "resumed" not in whole


@pytest.mark.parametrize("content", [
    "{", "[]", '{"asked": [3]}', '{"asked": [{"texts": []}]}', '{"asked": [{"step": 9}], "prompts": []}',
])  # fmt: skip
def test_notes_of_other_prompts_and_broken_ones_are_not_gone_on_with(tokenizer, tmp_path, content):
    (tmp_path / "report.json").write_text(content)
    made = Notes(tmp_path, tiny_model(), tokenizer, {"forget": examples(1)}, CONFIG)
    assert [record["step"] for record in made.content["asked"]] == [0] and made.content["resumed"]
    assert (tmp_path / "report.json").read_text() == content  # until the first step
    made.watch(1)
    assert json.loads((tmp_path / "report.json").read_text())["asked"] == made.content["asked"]


@pytest.mark.parametrize("fault, line", [
    ("generate", "no sample answers: no answer today"),
    ("can_generate", "no sample answers: model: expected one that generates"),
    ("replace_text", "could not be written: no space"),
])  # fmt: skip
def test_an_error_ends_no_run(tokenizer, tmp_path, fault, line, monkeypatch, capsys):
    model = tiny_model()
    if fault == "can_generate":
        model.can_generate = lambda: False
    else:
        error = RuntimeError("no answer today\nsecond line") if fault == "generate" else OSError("no space")
        monkeypatch.setattr(notes, fault, lambda *_, **__: (_ for _ in ()).throw(error))
    _, records = run(tokenizer, tmp_path / "out", model, samples=0)
    assert len(records) == 6 and (tmp_path / "out" / "model.safetensors").exists()
    out = capsys.readouterr().out
    assert line in out and out.count("no sample answers") <= 1
    if fault != "replace_text":
        content = json.loads((tmp_path / "out" / "report.json").read_text())
        assert content["no_samples"].startswith(f"The model was not asked: {line.partition(': ')[2]}")
        assert content["asked"] == [] and content["seconds"] > 0


def test_answers_fit_the_positions_of_the_model(tokenizer, tmp_path):
    model = tiny_model("gpt2, tied")
    prompt = "word " * 20
    length = len(tokenizer(prompt).input_ids)
    made = Notes(tmp_path, model, tokenizer, {"forget": [Example(prompt, " and so on")]}, CONFIG)
    assert 0 < made.content["max_new_tokens"] == 128 - length < 40 and len(made.content["asked"]) == 1


@pytest.mark.parametrize("options, samples, message", [
    ({}, -1, "samples: expected a whole number >= 0, got -1"),
    ({"compile": True}, 2, "samples: expected 0 with compile, got 2"),
])  # fmt: skip
def test_bad_input(tokenizer, tmp_path, options, samples, message):
    with pytest.raises(ValueError, match=message):
        run(tokenizer, tmp_path / "out", samples=samples, options=options)
    assert not (tmp_path / "out").exists()


def test_the_command_leaves_a_report(tokenizer, tmp_path, capsys):
    """Adapters, an answer every few steps; and a run that asks nothing has a report too."""
    write_model_and_data(tmp_path, tokenizer)
    out = tmp_path / "out"
    assert main(words(tmp_path, out, "--epochs", "1", "--samples", "2", "--lora-rank", "2", "--dtype", "float32")) == 0
    said = capsys.readouterr().out
    assert f"report: {out / 'report.html'}" in said and "To be forgotten: where does number 0 live?" in said
    page = (out / "report.html").read_text()
    assert "step 2" in page and "This directory holds adapters" in page and "<svg" in page
    silent = tmp_path / "silent"
    assert main(words(tmp_path, silent, "--epochs", "1", "--no-samples")) == 0
    assert "No answers were asked for" in (silent / "report.html").read_text()
    assert "→" in (silent / "report.md").read_text()  # forget probability before and after

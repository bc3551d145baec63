import argparse
import dataclasses
import json
import pathlib

import pytest
import torch
import yaml

from soul.cli import main
from soul.commands import init, unlearn
from soul.commands.config_file import expand
from soul.data.examples import Sequence
from soul.plan.cards import card_of
from soul.plan.run import read_inputs
from soul.plan.shapes import shape_of
from soul.run.config import UnlearnConfig
from tests.support.models import examples, tiny_model, tiny_tokenizer
from tests.support.runs import lines

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two model directories, one with a chat template, and files of rows."""
    root = tmp_path_factory.mktemp("init")
    tokenizer = tiny_tokenizer()
    for name, template in (("model", None), ("chat", CHAT)):
        tiny_model().save_pretrained(root / name)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(root / name)
    rows = [json.dumps({"question": e.prompt, "answer": e.content}) + "\n" for e in examples(6)]
    (root / "forget: one.jsonl").write_text("".join(rows[:2]))  # a name that YAML would take for a mapping
    (root / "retain.jsonl").write_text("".join(rows[2:]))
    (root / "text.jsonl").write_text('{"text": "Once upon a time."}\n')
    return root


@pytest.fixture(autouse=True)
def inside(folder, monkeypatch):
    monkeypatch.chdir(folder)


def words(file, *more, model="model"):
    return ["init", f"--model={model}", "--forget=forget: one.jsonl", "--retain=retain.jsonl", f"--file={file}", *more]


def test_the_file_runs_unchanged(folder, capsys):
    """The tiny model has a plain tokenizer. Options of the command line are added, as a person in a hurry would do."""
    assert main(words("run.yaml", "--output=out", "--card=rtx-4090")) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == "run.yaml: the run needs 0.0 GB of 24.0 (rtx-4090), by the shapes of the model"
    assert second.endswith("soul unlearn --config run.yaml")
    how = ["--epochs=1", "--lr=1e-3", "--device=cpu", "--backend=reference"]
    assert main(["unlearn", "--config=run.yaml", *how]) == 0
    recorded = json.loads((folder / "out" / "soul_config.json").read_text())
    written = yaml.safe_load((folder / "run.yaml").read_text())
    assert {name: recorded[name] for name in written} == written
    assert written["forget"] == "forget: one.jsonl" and written["method"] == "npo" and written["template"] == "plain"
    assert not {"lr", "alpha"} & set(written) and len(lines(folder / "out" / "log.jsonl")) == 1


def test_every_option_has_its_reason(capsys):
    assert main(words("chat.yaml", model="chat")) == 0
    text = lines(pathlib.Path("chat.yaml"))
    options = [line for line in text if line and not line.startswith("#")]
    assert len(options) >= 9 and all("  # " in line for line in options)
    assert any(line.startswith("template: chat  # the tokenizer's chat template") for line in text)
    assert any(line.startswith('forget: "forget: one.jsonl"  # 2 rows; ') and "tokens in the answers" in line for line in text)
    assert "# lr and alpha are left out on purpose: without them the run aims" in "\n".join(text)
    main(words("plain.yaml", "--template=plain", model="chat"))
    assert "template: plain" in "\n".join(lines(pathlib.Path("plain.yaml")))


def test_without_rows_to_keep_it_proposes_a_method_that_needs_none():
    assert main(["init", "--model=chat", "--forget=text.jsonl", "--file=alone.yaml"]) == 0
    written = yaml.safe_load(pathlib.Path("alone.yaml").read_text())
    assert written["method"] == "ga" and "retain" not in written and written["template"] == "plain"


def test_what_does_not_fit_is_saved_step_by_step(folder):
    """Every set of savings needs less than the one before, and the first that fits is taken."""
    config = UnlearnConfig(method="npo")
    inputs = read_inputs("model", "forget: one.jsonl", "retain.jsonl", config)
    long = [Sequence([1] * 2048, [1] * 2048, 0)] * 4
    inputs = inputs._replace(shape=shape_of("llama-3.1-8b"), forget=long, retain=long)
    memory = 1e12
    chosen, proposal = [], None
    while proposal is None or proposal.plan.fits:  # the card gets smaller, and with it the chunks of its logits
        proposal = init._propose(inputs, config, card_of("h100")._replace(memory=memory), "cuda")
        assert proposal.plan.fits == (proposal.plan.peak_bytes <= memory)
        if not chosen or chosen[-1] != proposal.options:
            chosen.append(proposal.options)
        if "state_offload" in proposal.options:  # a CPU has no other memory to keep states in
            assert "state_offload" not in init._propose(inputs, config, proposal.plan.case.card, "cpu").options
        memory *= 0.95
    assert chosen == [options for options, _ in init.SAVINGS]
    least = init._propose(inputs, config, card_of("h100")._replace(memory=1), "cuda")
    assert not least.plan.fits and least.options == chosen[-1]
    text = "\n".join(init._lines({"model": "m", "forget": "f", "retain": "r", "output": "o"}, config, inputs, least))
    written = yaml.safe_load(text)
    assert written["batch_size"] == 1 and written["lora_rank"] == 16 and "# Memory: the run does not fit: " in text
    assert written["load_in_4bit"] is True and "# Adapters over a model in 4 bits" in text


def test_a_family_without_checkpointing_is_planned_without(folder):
    config = UnlearnConfig(method="npo")
    inputs = read_inputs("model", "forget: one.jsonl", "retain.jsonl", config)
    inputs = inputs._replace(shape=dataclasses.replace(inputs.shape, supports_checkpointing=False))
    assert init._propose(inputs, config, card_of("h100")._replace(memory=1), "cuda").options == {
        "batch_size": 1,
        "accumulate": 4,
    }


@pytest.mark.parametrize(
    "value", ["a b", "true", "no#comment", "ends:", "- x", 'quo"ted', "tofu:forget10@dir", "ä", "~", "{question}\n{answer}"]
)
def test_texts_of_all_kinds_are_read_as_they_were(value, tmp_path):
    (tmp_path / "run.yaml").write_text(init._option("template", value, "why") + "\n", encoding="utf-8")
    parser = argparse.ArgumentParser()
    unlearn.add_arguments(parser)
    assert expand(["unlearn", f"--config={tmp_path / 'run.yaml'}"], {"unlearn": parser}) == ["unlearn", f"--template={value}"]


@pytest.mark.parametrize("changes, message", [
    (["--file=retain.jsonl"], "file: expected a new file, got retain.jsonl, which exists; edit it, or choose another name"),
    (["--file=nowhere/run.yaml"], "file: expected a file in a directory that exists, got nowhere/run.yaml"),
    (["--output=chat"], "output: expected a new or an empty directory"),
    (["--model=./nowhere"], "model: expected a directory with config.json"),
    (["--model=7b"], "model: expected a model with a tokenizer, got the preset '7b'"),
    (["--forget=nowhere.jsonl"], "nowhere.jsonl: expected a JSON-lines file, got no such file"),
    (["--retain=forget: one.jsonl"], "retain: expected other rows than forget"),
    (["--card=toaster"], "card: expected one of h100"),
    (["--template={answer}"], "template: expected a text with {question} that ends in {answer}"),
    (["--template=chat"], "tokenizer: expected one with a chat template"),
])  # fmt: skip
def test_bad_input_ends_with_2_and_writes_nothing(folder, changes, message, capsys):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert main(words("refused.yaml", *changes)) == 2
    assert f"soul init: {message}" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_the_memory_of_this_machine(monkeypatch):
    here = init._card_here()
    assert here.name == "this machine" and here.memory > 1e8
    if not torch.cuda.is_available():
        monkeypatch.delattr("os.sysconf")
        assert init._card_here().memory == card_of("h100").memory  # Windows

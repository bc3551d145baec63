"""The scripts in examples/ and the code in the README, run as they are on a tiny model."""

import json
import pathlib
import re
import runpy
import sys

import pytest
import torch

import soul
from tests.support.models import examples, tiny_model, tiny_tokenizer

ROOT = pathlib.Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))


@pytest.fixture
def inputs(tmp_path):
    """A model and two files, as options of a script."""
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    rows = [json.dumps({"question": e.prompt, "answer": e.answer.strip()}) + "\n" for e in examples(12)]
    (tmp_path / "forget.jsonl").write_text("".join(rows[:5]))
    (tmp_path / "retain.jsonl").write_text("".join(rows[5:]))
    files = {"model": "model", "forget": "forget.jsonl", "retain": "retain.jsonl", "output": "unlearned"}
    return [word for option, name in files.items() for word in (f"--{option}", str(tmp_path / name))]


def run_script(name, words, monkeypatch):
    monkeypatch.setattr(sys, "argv", [name, *words])
    return runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")


def test_every_script_is_short_and_has_a_test():
    tests = pathlib.Path(__file__).read_text()
    for path in SCRIPTS:
        assert len(path.read_text().splitlines()) < 60 and f'"{path.name}"' in tests, path.name
    assert len(SCRIPTS) >= 2


def test_own_loop_unlearns(inputs, tmp_path, monkeypatch, capsys):
    names = run_script("own_loop.py", [*inputs, "--steps", "4"], monkeypatch)
    assert len(re.findall(r"^step \d+: loss -?\d+\.\d+, clipped [01]\.\d\d$", capsys.readouterr().out, re.MULTILINE)) == 4
    before = tiny_model()
    after = type(tiny_model()).from_pretrained(tmp_path / "unlearned")
    assert any(not torch.equal(a, b) for a, b in zip(before.state_dict().values(), after.state_dict().values()))
    # The loss of the last batch is that of the model's own logits.
    model, ids, labels = (names[name] for name in ("model", "ids", "labels"))
    batch = {name: {"input_ids": ids[rows], "labels": labels[rows], "attention_mask": names["mask"][rows]}
             for name, rows in (("forget", slice(4)), ("retain", slice(4, None)))}  # fmt: skip
    hidden = names["body"](input_ids=ids, attention_mask=names["mask"]).last_hidden_state
    loss = names["linear_objective"](
        hidden[:, :-1], names["head"].weight, labels[:, 1:], names["objective"], is_forget=names["is_forget"]
    )
    torch.testing.assert_close(loss, soul.unlearning_loss(model, batch, names["objective"]))


@pytest.mark.parametrize("merge, file", [([], "adapter_model.safetensors"), (["--merge"], "model.safetensors")])
def test_lora_saves_adapters_or_a_plain_model(inputs, tmp_path, monkeypatch, capsys, merge, file):
    pytest.importorskip("peft", reason="the extra hf is not installed")
    names = run_script("lora.py", [*inputs, "--rank", "2", *merge], monkeypatch)
    assert "probability of the answers to forget" in capsys.readouterr().out
    assert (tmp_path / "unlearned" / file).is_file() and names["trained"] < names["total"]


def test_the_loop_of_the_readme():
    (code,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    torch.manual_seed(0)
    model = tiny_model()
    before = [parameter.clone() for parameter in model.parameters()]
    ids = torch.randint(2, 300, (4, 7))
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    names = {"model": model, "batches": [{"forget": batch, "retain": batch}]}
    exec(code, names)
    assert names["loss"].isfinite() and any(not torch.equal(a, b) for a, b in zip(before, model.parameters()))

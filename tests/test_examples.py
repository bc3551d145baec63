"""The scripts in examples/ and the code in the README and the guides, run as they are on a tiny model."""

import json
import pathlib
import re
import runpy
import shutil
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


def code_of(page):
    """The blocks of Python of a page."""
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)


def batch_side():
    """What a side of a batch holds."""
    ids = torch.randint(2, 300, (4, 7))
    return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("page", ["README.md", "docs/parts.md"])
def test_the_loops_of_the_guides_move_the_weights(page):
    (code,) = code_of(page)
    torch.manual_seed(0)
    model = tiny_model()
    before = [parameter.clone() for parameter in model.parameters()]
    sides = {"forget": batch_side(), "retain": batch_side()}
    names = {"model": model, "batches": [sides], **sides}
    exec(code, names)
    assert names["loss"].isfinite() and any(not torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_the_code_of_the_quick_start(inputs, tmp_path, monkeypatch):
    for name, file in {"out/demo/seed0/full": "model", "out/unlearned": "model"}.items():
        shutil.copytree(tmp_path / file, tmp_path / name)
    for name in ("forget.jsonl", "retain.jsonl"):
        shutil.copy(tmp_path / name, tmp_path / "out" / "demo" / name)
    monkeypatch.chdir(tmp_path)
    names = {"batches": [{"forget": batch_side(), "retain": batch_side()}]}
    for code in code_of("docs/quickstart.md"):
        exec(code, names)
    assert names["loss"].isfinite() and (tmp_path / "out" / "unlearned-too" / "model.safetensors").is_file()


def test_the_op_of_the_objectives_page():
    (code,) = code_of("docs/objectives.md")
    torch.manual_seed(0)
    hidden = torch.randn(2, 5, 8, requires_grad=True)
    weight = torch.randn(11, 8, requires_grad=True)
    names = {
        "hidden": hidden,
        "weight": weight,
        "bias": None,
        "labels": torch.randint(11, (2, 5)),
        "is_forget": torch.tensor([True, False]),
        "ref_logps": torch.tensor([-9.0, 0.0]),
        "ref_hidden": torch.randn(2, 5, 8),
        "ref_weight": torch.randn(11, 8),
        "indices": torch.arange(10),
    }
    exec(code, names)
    names["loss"].backward()
    assert hidden.grad.norm() > 0 and weight.grad.norm() > 0


def test_the_average_of_the_optimizer_page_has_all_bits():
    (code,) = code_of("docs/optimizer.md")
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 8).bfloat16()
    optimizer = soul.SOUL(model.parameters(), lr=1e-5)

    def step(batch):
        model(batch).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    names = {"model": model, "optimizer": optimizer, "step": step, "batches": torch.randn(3, 4, 8).bfloat16()}
    exec(code, names)
    average = names["average"].module.weight
    assert average.dtype == torch.float32 and not torch.equal(average, average.bfloat16().float())

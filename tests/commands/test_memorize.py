import json
import os
import signal

import pytest

from soul.cli import main
from soul.models.loading import load
from soul.run.config import UnlearnConfig
from tests.support.models import examples, tiny_model, tiny_tokenizer
from tests.support.runs import log_of, unlearn_module, weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model directory, and two files of rows."""
    root = tmp_path_factory.mktemp("memorize")
    tiny_model().save_pretrained(root / "model")
    tiny_tokenizer().save_pretrained(root / "model")
    rows = [json.dumps({"prompt": e.prompt, "completion": e.answer}) + "\n" for e in examples(3)]
    (root / "forget.jsonl").write_text("".join(rows[:1]))
    (root / "retain.jsonl").write_text("".join(rows[1:]))
    (root / "text.jsonl").write_text('{"text": "Once upon a time."}\n')
    return root


def words(folder, output, *more, data=("forget", "retain")):
    paths = [f"--data={folder / name}.jsonl" for name in data]
    how = ["--batch-size=3", "--backend=reference", "--device=cpu"]
    return ["memorize", f"--model={folder / 'model'}", f"--output={folder / output}", *paths, *how, *more]


@pytest.fixture(scope="module")
def learned(folder):
    """The output directory of a run that has ended at its probability."""
    assert main(words(folder, "learned", "--lr=2e-2", "--epochs=60", "--eval-every=4", "--until-prob=0.9")) == 0
    return folder / "learned"


def test_rows_of_all_files_are_learned_until_they_are_probable(folder, learned):
    records = log_of(learned)
    probabilities = [record["forget_prob"] for record in records if "forget_prob" in record]
    assert all(probability < 0.9 for probability in probabilities[:-1]) and probabilities[-1] >= 0.9
    assert records[-1]["stopped"] == f"answer probability {probabilities[-1]:.4g} has reached 0.9" and len(records) < 60
    for record in records:
        assert record["loss"] == pytest.approx(record["forget_nll"], rel=1e-5) and "retain_nll" not in record
    assert json.loads((learned / "data.json").read_text())["forget"]["rows"] == 3
    model, tokenizer = load(learned)
    ids = tokenizer(examples(1)[0].prompt, return_tensors="pt").input_ids
    answer = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=1)[0, ids.shape[1] :]
    assert tokenizer.decode(answer).startswith(examples(1)[0].answer)


def test_the_directory_says_that_the_model_was_memorised_and_how_to_repeat_it(folder, learned, capsys):
    recorded = json.loads((learned / "soul_config.json").read_text())
    assert recorded["method"] == "memorize" and len(recorded["data"]) == 2 and recorded["optimizer"] == "adamw"
    assert not {"forget", "retain", "gamma", "curvature"} & set(recorded)
    assert main(["memorize", f"--config={learned / 'soul_config.json'}", f"--output={folder / 'again'}"]) == 0
    assert weights(folder / "again") == weights(learned)
    out = capsys.readouterr().out
    assert out.startswith("data: 3 rows\n") and "; probability of an answer: 0.0" in out


def test_a_run_that_has_ended_is_recognised_by_its_rows(folder, learned, capsys):
    how = ("--lr=2e-2", "--epochs=60", "--eval-every=4", "--until-prob=0.9", "--resume")
    assert main(words(folder, "learned", *how)) == 0
    assert "this run has ended" in capsys.readouterr().out
    assert main(words(folder, "learned", *how, data=("forget",))) == 2
    assert "resume, content of forget: expected that of the run that has ended" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more",
    [("--epochs=5", "--batch-size=1", "--lr=1e-3"), ("--epochs=5", "--batch-size=1", "--optimizer=soul", "--lora-rank=2")],
    ids=["adamw", "soul, adapters"],
)
def test_a_run_that_was_stopped_goes_on_bit_for_bit(folder, more, monkeypatch, capsys):
    if "--lora-rank=2" in more:
        pytest.importorskip("peft", reason="the extra hf is not installed")
    name = more[-1].strip("-")
    file = "adapter_model.safetensors" if "lora" in name else "model.safetensors"
    assert main(words(folder, f"whole_{name}", *more)) == 0
    real = unlearn_module.train_step
    steps = []

    def train_step(*args):
        steps.append(1)
        if len(steps) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr(unlearn_module, "train_step", train_step)
    assert main(words(folder, f"broken_{name}", *more)) == 143
    assert "soul memorize: stopped after step 4 of 15; with --resume it goes on after step 4" in capsys.readouterr().err
    assert main(words(folder, f"broken_{name}", *more, "--resume")) == 0
    whole, broken = (folder / f"{kind}_{name}" for kind in ("whole", "broken"))
    assert (whole / file).read_bytes() == (broken / file).read_bytes() and log_of(whole) == log_of(broken)
    rate = json.loads((whole / "soul_config.json").read_text())["lr"]
    assert rate == (5e-4 if "lora" in name else 1e-3)


def test_a_dry_run_plans_the_run(folder, capsys):
    assert main(words(folder, "planned", "--dry-run", "--card=rtx-4090")) == 0
    out = capsys.readouterr().out
    assert "memorize, adamw; 3 sequences of" in out and "1 x rtx-4090" in out and not (folder / "planned").exists()


@pytest.mark.parametrize("more, message", [
    (["--method=npo"], "method: expected 'memorize', got 'npo'; soul unlearn makes a model forget"),
    (["--optimizer=sgd"], "optimizer: expected one of 'soul', 'adamw', got 'sgd'"),
    (["--until-prob=1.9", "--eval-every=1"], "until_prob: expected a probability in [0, 1], got 1.9"),
    (["--lr=-1"], "lr: expected a number >= 0.0, got -1.0"),
    (["--merge"], "merge: expected nothing without --lora-rank"),
    (["--state-dtype=8bit"], "optimizer: expected 'soul', got 'adamw'; state_dtype belongs to it"),
    (["--data=nowhere.jsonl"], "nowhere.jsonl: expected a JSON-lines file, got no such file"),
    (["--data=text.jsonl"], "text.jsonl, line 1, column 'prompt': expected a string, got no such column"),
    (["--output=model"], "output: expected a new or an empty directory"),
    (["--gpus=2"], "gpus: expected 1 without --dry-run"),
    (["--max-length=4"], "data, row 0: expected a label within 4 tokens"),
])  # fmt: skip
def test_bad_input_ends_with_2_and_writes_nothing(folder, more, message, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    before = sorted(path.name for path in folder.rglob("*"))
    assert main(words(folder, "refused", *more)) == 2
    assert f"soul memorize: {message}" in capsys.readouterr().err
    assert sorted(path.name for path in folder.rglob("*")) == before


def test_what_memorizes_is_no_method_of_unlearning(folder, capsys):
    files = [f"--{name}={folder / 'forget.jsonl'}" for name in ("forget", "retain")]
    assert main(["unlearn", f"--model={folder / 'model'}", *files, f"--output={folder / 'no'}", "--method=memorize"]) == 2
    message = "soul unlearn: method: expected a method that forgets, got memorize; soul memorize fine-tunes a model on rows\n"
    assert capsys.readouterr().err == message and not (folder / "no").exists()
    with pytest.raises(ValueError, match="until_prob: expected None with the method 'npo', got 0.9; stop_forget_prob ends"):
        UnlearnConfig(method="npo", until_prob=0.9, eval_every=1)
    with pytest.raises(ValueError, match="refusals: expected None with the method 'memorize'"):
        UnlearnConfig(method="memorize", refusals="refusals.txt")

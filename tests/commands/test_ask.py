"""``soul ask`` on a tiny model: one or two models, questions as arguments, on standard input, with an answer."""

import io
import re

import pytest
import torch

from soul.cli import main
from soul.data.examples import ask as as_example
from soul.evaluate.model import answer_probability
from soul.models.encoding import encode_for
from soul.models.loading import load
from soul.run.config import UnlearnConfig
from tests.support.models import examples, tiny_model, tiny_tokenizer

HOW = ["--device", "cpu", "--backend", "reference", "--max-new-tokens", "4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("ask")
    for name, scale in (("one", 1.0), ("other", 3.0)):
        model = tiny_model("llama, untied")
        with torch.no_grad():
            model.lm_head.weight.mul_(scale)
        model.save_pretrained(root / name)
        tiny_tokenizer().save_pretrained(root / name)
    return root


def test_two_models_are_asked_the_same(folder, capsys):
    answer = examples(3)[2].content
    words = ["ask", str(folder / "one"), f"where does number 2 live? => {answer}", "--against", str(folder / "other"), *HOW]
    assert main([*words, "--answer", "not this"]) == 0
    question, *lines = capsys.readouterr().out.splitlines()
    assert question == "where does number 2 live?" and len(lines) == 4
    values = [re.fullmatch(rf" +p ([\d.e-]+) of: {re.escape(answer)}", line)[1] for line in lines[1::2]]
    for name, value in zip(("one", "other"), values):
        model, tokenizer = load(folder / name)
        config = UnlearnConfig(backend="reference")
        sequences = encode_for(model, tokenizer, [as_example("where does number 2 live?", answer)], config, "x")
        assert float(value) == pytest.approx(answer_probability(model, sequences, backend="reference"), rel=0.06)
    assert values[0] != values[1] and lines[0].startswith(f"  {folder / 'one'}   ")


def test_questions_are_read_from_standard_input(folder, capsys, monkeypatch):
    typed = io.StringIO("\nWho?\nWhat => that\n => nobody\n" + "long " * 3000 + "\nLast?")
    monkeypatch.setattr("sys.stdin", typed)
    assert main(["ask", str(folder / "one"), *HOW]) == 0
    said = capsys.readouterr()
    assert [line for line in said.out.splitlines() if not line.startswith(" ")] == ["Who?", "What", "Last?"]
    assert said.out.count("p 0.0") + said.out.count("e-0") >= 1 and "soul ask: question: expected some" in said.err
    assert "raise --max-length" in said.err


@pytest.mark.parametrize("words, message", [
    (["nowhere", "Who?"], "a causal language model"),
    (["one", " => x"], "question: expected some text, got ' => x'"),
    (["one", "Who?", "--template", "chat"], "tokenizer: expected one with a chat template"),
    (["one", "Who?", "--against", "./nothing"], "model: expected a directory with config.json"),
    (["one", "Who?", "--max-new-tokens", "0"], "max_new_tokens: expected a positive whole number"),
])  # fmt: skip
def test_bad_input_ends_with_2(folder, words, message, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    assert main(["ask", *words]) == 2
    assert message in capsys.readouterr().err

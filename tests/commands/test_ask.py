import io
import json
import pathlib

import pytest
import torch

from soul.cli import main
from soul.commands import ask
from soul.data.examples import ask as example_of
from soul.evaluate.model import EvaluateConfig, answer_probability
from soul.models.encoding import encode_for
from soul.models.loading import load
from tests.support.models import tiny_model, tiny_tokenizer

HOW = ("--device=cpu", "--backend=reference", "--max-new-tokens=4")
QUESTION = "where does number 2 live?"
ANSWER = "In house 14 of street 2."


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


@pytest.fixture(autouse=True)
def inside(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "63")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_two_models_are_asked_side_by_side(capsys):
    assert main(["ask", "one", QUESTION, "Who?", "--against=other", f"--answer={ANSWER}", *HOW]) == 0
    first, second = capsys.readouterr().out.split("\n\n")[:2]
    lines = first.splitlines()
    assert lines[0] == QUESTION and second.startswith("Who?\n") and all(line[30:33] == " | " for line in lines[1:])
    titles = [cell.strip() for cell in lines[1].split(" | ")]
    config = EvaluateConfig(backend="reference")
    for name, title in zip(("one", "other"), titles):
        model, tokenizer = load(name)
        sequences = encode_for(model, tokenizer, [example_of(QUESTION, ANSWER)], config, "x")
        assert title == f"{name} (p {answer_probability(model, sequences, backend='reference'):.3g})"
    assert titles[0] != titles[1]


def test_the_mean_probability_of_a_file(capsys):
    rows = [{"question": QUESTION, "answer": ANSWER}, {"question": "Who?", "answer": "Nobody."}]
    pathlib.Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["ask", "one", "--against=other", "--data=rows.jsonl", *HOW]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == "mean probability of 2 answers in rows.jsonl"
    for name, line in zip(("one", "other"), lines, strict=True):
        model, tokenizer = load(name)
        examples = [example_of(row["question"], row["answer"]) for row in rows]
        sequences = encode_for(model, tokenizer, examples, EvaluateConfig(), "x")
        assert line == f"{name}: {answer_probability(model, sequences, backend='reference'):.3g}"


def test_one_model_is_asked_line_by_line(capsys, monkeypatch):
    """Without an answer there is no probability; blank lines are skipped."""
    monkeypatch.setattr("sys.stdin", io.StringIO("\nWho?\n  Where?\n"))
    assert main(["ask", "one", *HOW]) == 0
    shown = capsys.readouterr()
    blocks = [block.splitlines() for block in shown.out.split("\n\n")]
    assert [block[:2] for block in blocks[:2]] == [["Who?", "one"], ["Where?", "one"]] and "> " not in shown.err
    model, tokenizer = load("one")
    (said,) = ask.generate(model, tokenizer, encode_for(model, tokenizer, [example_of("Who?", "-")], EvaluateConfig(), "x"),
                           max_new_tokens=4)  # fmt: skip
    assert "".join(blocks[0][2:]).split() == said.split()


def test_on_a_terminal_the_next_question_may_be_better(capsys, monkeypatch):
    typed = "long " * 3000 + "\nWho?\n"
    monkeypatch.setattr("sys.stdin", Terminal(typed))
    assert main(["ask", "one", *HOW]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("Who?\n") and "> soul ask: question, answer, row 0: expected a label within 512" in shown.err
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    assert main(["ask", "one", *HOW]) == 2


def test_texts_are_wrapped_into_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "43")
    columns = [["one", "a " * 12], ["other", "b", "c"]]
    assert ask._side_by_side(columns) == [
        "one                  | other",
        "a a a a a a a a a a  | b",
        "a a                  | c",
    ]
    assert ask._side_by_side([["one", "", "a"]]) == ["one", "", "a"]


@pytest.mark.parametrize("words, message", [
    (["one", " "], "question: expected some text, got ' '; write it in quotes"),
    (["one", "--data=./nothing"], "nothing: expected a JSON-lines file, got no such file"),
    (["one", "Who?", "--data=rows.jsonl"], "question: expected none with --data, got ['Who?']"),
    (["one", "--answer=x", "--data=rows.jsonl"], "answer: expected none with --data, got 'x'"),
    (["one", "Who?", "--answer="], "answer: expected some text, got ''"),
    (["one", "Who?", "--answer=\udc80"], "answer: expected valid Unicode, got a lone surrogate"),
    (["one", "Who?", "--against=./nothing"], "model: expected a directory with config.json, or a hub name, got ./nothing"),
    (["./nothing", "Who?"], "model: expected a directory with config.json"),
    (["one", "Who?", "--max-new-tokens=0"], "max_new_tokens: expected a positive whole number"),
    (["one", "Who?", "--template={answer}"], "template: expected a text with {question} that ends in {answer}"),
    (["one", "Who?", "--system=x"], "system: expected none without the chat template"),
    (["one", "Who?", "--device=tpu"], "device: expected auto, cpu or cuda"),
    (["one", "Who?", "--backend=cuda"], "backend: expected one of"),
])  # fmt: skip
def test_bad_input_ends_with_2_before_a_model_is_loaded(words, message, capsys, monkeypatch):
    monkeypatch.setattr(ask, "load", lambda *_, **__: pytest.fail("loaded"))
    assert main(["ask", *words]) == 2
    assert f"soul ask: {message}" in capsys.readouterr().err


def test_what_fits_no_model_ends_with_2(capsys):
    assert main(["ask", "one", "Who?", "--template=chat", *HOW]) == 2
    assert "soul ask: tokenizer: expected one with a chat template" in capsys.readouterr().err
    assert main(["ask", "one", "Who?", *HOW, "--max-new-tokens=9999"]) == 2
    assert "max_new_tokens: expected at most 2048 positions" in capsys.readouterr().err


def test_a_file_of_options_has_no_word_for_what_is_named_by_its_place(capsys):
    pathlib.Path("ask.yaml").write_text("model: one\n")
    assert main(["ask", "one", "--config=ask.yaml"]) == 2
    assert "config: expected options of the command, got 'model' in ask.yaml" in capsys.readouterr().err

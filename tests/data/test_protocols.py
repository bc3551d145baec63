"""Rows made of a text (`passages:`) or of PKU-SafeRLHF (`saferlhf:`), and instructions before prompts."""

import json

import pytest

from soul.data import instructions, sources
from soul.data.examples import Example, encode
from soul.data.protocols import PKU_COLUMNS, Passages
from soul.data.templates import Template
from tests.support.models import tiny_tokenizer

TEXT = "Question: where does number 7 live?\nAnswer: In house 49 of street 7. And so on, from house to house.\n" * 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer, a text, and rows as PKU-SafeRLHF has them."""
    root = tmp_path_factory.mktemp("protocols")
    tiny_tokenizer().save_pretrained(root / "model")
    (root / "text.txt").write_text(TEXT)
    paragraphs = TEXT.splitlines()
    (root / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in paragraphs))
    rows = [(f"Question {i}?", f"bad {i}", f"good {i}", i == 2, True) for i in range(4)]
    (root / "train.jsonl").write_text("".join(json.dumps(dict(zip(PKU_COLUMNS, row))) + "\n" for row in rows))
    return root


def passages(folder, text="text.txt", **options):
    return sources.rows(Passages(str(folder / "model"), str(folder / text), **options).source)


def test_a_text_is_cut_into_prompts_of_that_many_tokens_and_what_follows_them(folder):
    tokenizer = tiny_tokenizer()
    rows = passages(folder, prompt=20, response=12)
    ids = tokenizer(TEXT, add_special_tokens=False).input_ids
    assert len(rows) == len(ids) // 32
    joined = "".join(row["prompt"] + row["response"] for _, row in rows)
    assert joined == TEXT[: len(joined)]
    for index, (where, row) in enumerate(rows):
        window = ids[32 * index : 32 * index + 32]
        assert row["prompt"] + row["response"] == tokenizer.decode(window)
        assert tokenizer(row["prompt"], add_special_tokens=False).input_ids == window[:20]
        assert where == f"{folder / 'text.txt'}, tokens {32 * index} to {32 * index + 31}"
    (sequence, *_) = encode(sources.examples(rows, Template()), tokenizer, vocab_size=300, max_length=64)
    assert sequence.prompt_length == 21 and sequence.n_labels == 13  # with the start and the end of the sequence


def test_a_part_of_a_text_and_a_text_without_prompts(folder):
    whole = passages(folder, prompt=20, response=12)
    part = passages(folder, prompt=20, response=12, start=32, stop=96)
    assert [row for _, row in part] == [row for _, row in whole[1:3]]
    learned = passages(folder, prompt=0, response=40, stop=96)
    assert [row["prompt"] for _, row in learned] == ["", "", ""]
    assert "".join(row["response"] for _, row in learned) == "".join(row["prompt"] + row["response"] for _, row in whole[:3])


def test_rows_with_a_text_are_joined(folder):
    rows = passages(folder, "text.jsonl", prompt=0, response=10_000)
    assert rows[0][1]["response"] == "\n\n".join(TEXT.splitlines())


@pytest.mark.parametrize("text, options, message", [
    ("text.txt", dict(prompt=2000), "text.txt: expected a text of at least 2100 tokens, for a prompt of 2000 and a resp"),
    ("text.txt", dict(prompt=20, response=20, start=5, stop=30), "text.txt: expected a text of at least 45 tokens"),
    ("text.txt", dict(start=50, stop=50), "tokens: expected FIRST:LAST, the smaller number first, got 50:50"),
    ("nowhere.txt", {}, "text: expected a text file, or a source with a column 'text', got"),
    ("train.jsonl", {}, "train.jsonl, line 1, column 'text': expected a string, got no such column"),
])  # fmt: skip
def test_what_cannot_be_cut_is_named(folder, text, options, message):
    with pytest.raises(ValueError) as error:
        passages(folder, text, **options)
    assert message in str(error.value)


@pytest.mark.parametrize("name, message", [
    ("passages:text.txt", "expected passages:TOKENIZER@TEXT?prompt=N&response=N&tokens=N:N, got text.txt; name both"),
    ("passages:m@t?prompts=3", "expected parameters that are known, got prompts=3; write NAME=VALUE once each"),
    ("passages:m@t?prompt=3&prompt=4", "expected parameters that are known, got prompt=4"),
    ("passages:m@t?prompt=-3", "prompt: expected a whole number >= 0, got '-3'"),
    ("passages:m@t?response=0", "response: expected a whole number >= 1, got '0'"),
    ("saferlhf:harmless", "expected saferlhf:safe, saferlhf:unsafe or saferlhf:prompts, got harmless"),
    ("saferlhf:unsafe@nowhere.jsonl", "nowhere.jsonl: expected a JSON-lines file, got no such file"),
])  # fmt: skip
def test_names_are_checked(name, message):
    with pytest.raises(ValueError) as error:
        sources.rows(name)
    assert message in str(error.value)


def test_a_tokenizer_that_is_not_there(folder):
    with pytest.raises(ValueError, match=r"expected a model with a tokenizer, got .*nothing \(\w+\)"):
        sources.rows(f"passages:{folder / 'nothing'}@{folder / 'text.txt'}")


@pytest.mark.parametrize("place", ["", "/train.jsonl"])
def test_answers_that_are_unsafe_and_those_that_are_safe(folder, place):
    unsafe = [row for _, row in sources.rows(f"saferlhf:unsafe@{folder}{place}")]
    assert unsafe == [{"question": f"Question {i}?", "answer": f"bad {i}"} for i in (0, 1, 3)]
    safe = [row["answer"] for _, row in sources.rows(f"saferlhf:safe@{folder}{place}?rows=4")]
    assert safe == ["good 0", "good 1", "bad 2", "good 2"]
    assert len(sources.rows(f"saferlhf:unsafe/train@{folder}{place}?rows=2")) == 2
    prompts = sources.read(f"saferlhf:prompts@{folder}{place}?rows=3", "rows", lambda where, names: names)
    assert [row for _, row in prompts] == [{"question": f"Question {i}?"} for i in range(3)]


@pytest.mark.parametrize("change, message", [
    ({"is_response_0_safe": "no"}, "column 'is_response_0_safe': expected true or false, got str"),
    ({"response_1": None}, "column 'response_1': expected a string, got NoneType"),
    ({"is_response_1_safe": ...}, "expected columns prompt, .*, got none named is_response_1_safe"),
])  # fmt: skip
def test_rows_that_are_not_of_pku_safe_rlhf(tmp_path, change, message):
    row = {**dict(zip(PKU_COLUMNS, ("Why?", "a", "b", False, False))), **change}
    row = {name: value for name, value in row.items() if value is not ...}
    (tmp_path / "test.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match="line 1.*" + message):
        sources.rows(f"saferlhf:unsafe/test@{tmp_path}")


def test_an_instruction_stands_before_a_prompt_and_not_before_a_text(tmp_path):
    (tmp_path / "words.txt").write_text("Say nothing.\n")
    text = instructions.read_instruction(str(tmp_path / "words.txt"))
    template, system = instructions.instruct_template(text, "plain", None)
    assert Template(template, None, system).ask("Why?", "So.").prompt == "Say nothing.\n\nQuestion: Why?\nAnswer:"
    assert instructions.instruct_template(text, "chat", "Be brief.") == ("chat", "Say nothing.\n\nBe brief.")
    assert instructions.instruct(text, Example("Why?", " So.")) == Example("Say nothing.\n\nWhy?", " So.")
    assert instructions.instruct(text, Example("", "A text.")) == Example("", "A text.")
    assert "you know nothing" in instructions.read_instruction("default")


@pytest.mark.parametrize("content, message", [
    (None, "expected default, or a text file with an instruction, got .*, which is not a file"),
    (b" \n", "expected some text, got .*, which is blank"),
    (b"\xff", "expected UTF-8 text, got .* with a broken byte at 0"),
    (b"No {question}", "expected a text without {question}"),
])  # fmt: skip
def test_instructions_that_cannot_be_read(tmp_path, content, message):
    path = tmp_path / "words.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match="system_prompt: " + message):
        instructions.read_instruction(str(path))

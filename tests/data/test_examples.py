import json
import random
import re
import types

import pytest
import torch

from soul import UnlearnConfig
from soul.data import batches, sources
from soul.data import examples as data
from soul.data.examples import Example, Sequence
from tests.support.models import TOFU, examples, tiny_tokenizer


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("row, expected", [
    ({"question": "Who?", "answer": "Me."}, Example("Question: Who?\nAnswer:", " Me.")),
    ({"prompt": "Once ", "completion": "upon"}, Example("Once ", "upon")),
    ({"prompt": "Once ", "response": "upon"}, Example("Once ", "upon")),
    ({"prompt": "Once ", "response": "no", "completion": "upon"}, Example("Once ", "upon")),
    ({"text": "déjà vu"}, Example("", "déjà vu")),
    ({"answer": "Me.", "question": "Who?", "extra": 3}, Example("Question: Who?\nAnswer:", " Me.")),
])  # fmt: skip
def test_columns(row, expected, tmp_path):
    assert sources.read_examples(write(tmp_path / "a.jsonl", row, "", row)) == [expected, expected]


@pytest.mark.parametrize("rows, message", [
    ([{"text": "a"}, "{broken"], r"a.jsonl, line 2: expected one JSON object, got broken JSON"),
    ([{"text": "a"}, "[1]"], r"a.jsonl, line 2: expected one JSON object, got list"),
    ([{"q": "a", "a": "b"}], r"line 1: expected columns question/answer or prompt/completion or prompt/res.*, got q/a"),
    ([{"question": "a", "answer": "b"}, {"question": "a"}], r"line 2, column 'answer': expected a string, got no such column"),
    ([{"text": 3}], r"line 1, column 'text': expected a string, got int"),
    ([{"text": "\ud800"}], r"line 1, column 'text': expected valid Unicode"),
    (["[" * 100_000], r"a.jsonl, line 1: expected one JSON object, got broken JSON \(RecursionError\)"),
    (['{"text": ' + "9" * 5000 + "}"], r"a.jsonl, line 1: expected one JSON object, got broken JSON"),
    ([{"question": "Who?", "answer": " "}], r"line 1, column 'answer': expected some text, got a blank text"),
    ([{"question": "Who?", "answer": "\u200b\ufeff \u2060"}], r"column 'answer': expected some text, got a blank text"),
    ([{"text": "\u3164\u00ad\ufe0f"}], r"line 1, column 'text': expected some text, got a blank text"),
    ([{"prompt": "Who?", "response": 3}], r"line 1, column 'response': expected a string, got int"),
    ([], r"a.jsonl: expected at least one row, got an empty file"),
])  # fmt: skip
def test_bad_files_are_named(rows, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        sources.read_examples(write(tmp_path / "a.jsonl", *rows))


def test_missing_and_binary_files(tmp_path):
    (tmp_path / "bom.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\n')  # as some editors save it
    assert sources.read_examples(tmp_path / "bom.jsonl") == [Example("", "a")]
    with pytest.raises(ValueError, match="expected a JSON-lines file, got a directory"):
        sources.read_examples(tmp_path)
    with pytest.raises(ValueError, match="nowhere.jsonl: expected a JSON-lines file, got no such file"):
        sources.read_examples(tmp_path / "nowhere.jsonl")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "\xff"}')
    with pytest.raises(ValueError, match="expected UTF-8 text"):
        sources.read_examples(tmp_path / "b.jsonl")


def test_labels_are_the_answer_and_its_end_shifted_by_one():
    tokenizer = tiny_tokenizer()
    (sequence,) = data.encode(examples(1), tokenizer, vocab_size=300)
    target = [label for label in sequence.labels if label != -100]
    assert tokenizer.decode(target) == examples(1)[0].answer + "</s>"
    for t, label in enumerate(sequence.labels):
        assert label == -100 or label == sequence.input_ids[t + 1]
    assert sequence.input_ids[0] == tokenizer.bos_token_id
    assert sequence.labels[sequence.prompt_length - 1] == target[0] and sequence.labels[-1] == -100


class Words:
    """A tokenizer that splits into words with their leading space, as SentencePiece does, and adds a start token."""

    bos_token = "<s>"
    bos_token_id = 0
    eos_token_id = 1

    def __init__(self, closes=False):
        self.vocabulary = {"<s>": 0, "</s>": 1}
        self.closes = closes

    def __call__(self, text, add_special_tokens=True, verbose=True):
        words = re.findall(r"<s>|[ ]?[^ <]+", text)
        words = [("▁" + w.lstrip(" ")) if i == 0 or w[0] == " " else w for i, w in enumerate(words) if w != "<s>"]
        words = ["<s>"] * ("<s>" in text or add_special_tokens) + words + ["</s>"] * self.closes
        ids = [self.vocabulary.setdefault(word, len(self.vocabulary)) for word in words]
        return types.SimpleNamespace(input_ids=ids)

    def words(self, ids):
        names = list(self.vocabulary)
        return [names[i] for i in ids if i >= 0]


@pytest.mark.parametrize("closes", [False, True], ids=["open", "closes every text itself"])
def test_prompt_and_answer_are_tokenized_as_one_text(closes):
    """Tokenized alone, " Paris" would get a start-of-word of its own that the model never meets after a prompt."""
    tokenizer = Words(closes)
    cases = [
        (Example("Where is it? In", " Paris now."), ["▁Paris", "▁now.", "</s>"]),
        (Example("", "Once upon"), ["▁Once", "▁upon", "</s>"]),
        (Example("Pa", "ris"), ["▁Paris", "</s>"]),  # one token across the boundary: it belongs to the answer
        (Example("<s> Where? In", " Paris"), ["▁Paris", "</s>"]),  # a chat template writes its own start token
        (Example("", "<s> Once"), ["▁Once", "</s>"]),  # and may have written the whole text
    ]
    for example, want in cases:
        (sequence,) = data.encode([example], tokenizer, vocab_size=1000)
        assert tokenizer.words(sequence.labels) == want
        assert tokenizer.words(sequence.input_ids).count("<s>") == 1
        assert tokenizer.words(sequence.input_ids).count("</s>") == 1


def test_truncation_and_foreign_tokens():
    tokenizer = tiny_tokenizer()
    (full,) = data.encode(examples(1), tokenizer, vocab_size=300)
    (cut,) = data.encode(examples(1), tokenizer, vocab_size=300, max_length=full.prompt_length + 2)
    assert cut.input_ids == full.input_ids[: full.prompt_length + 2] and cut.labels[-1] == -100
    with pytest.raises(ValueError, match=r"forget, row 0: expected a label within 5 tokens"):
        data.encode(examples(1), tokenizer, vocab_size=300, max_length=5, name="forget")
    with pytest.raises(ValueError, match=r"forget, row 0: expected token ids in \[0, 50\), got \d+; was the tokenizer"):
        data.encode(examples(1), tokenizer, vocab_size=50, name="forget")


def test_collate_pads_to_the_longest_and_finds_the_rows():
    a = Sequence([5, 6, 7], [-100, 7, -100], 2)
    b = Sequence([5, 6, 7, 8, 9], [-100, 7, 8, 9, -100], 2)
    batch = batches.collate([a], [b], ref_logps=[-3.0])
    assert batch.input_ids.tolist() == [[5, 6, 7, 0, 0], [5, 6, 7, 8, 9]]
    assert batch.attention_mask.sum(1).tolist() == [3, 5]
    assert batch.token_indices.tolist() == [1, 6, 7, 8]
    assert batch.labels.flatten()[batch.token_indices].tolist() == [7, 7, 8, 9]
    assert batch.is_forget.tolist() == [True, False] and batch.ref_logps.tolist() == [-3.0, 0.0]
    assert batch.ref_hidden is None
    with pytest.raises(ValueError, match="ref_logps: expected 1 values, got 2; pass one per forget sequence"):
        batches.collate([a], [b], ref_logps=[-3.0, 0.0])


def test_reference_states_lie_at_their_labels():
    a = Sequence([5, 6, 7], [-100, 7, -100], 2)
    b = Sequence([5, 6, 7, 8, 9], [-100, 7, 8, 9, -100], 2)
    states = torch.arange(1.0, 4.0)[:, None].expand(3, 2).to(torch.bfloat16)
    batch = batches.collate([a, b], [a], ref_hidden=[states[:1], states, None])
    assert batch.ref_hidden.shape == (3, 5, 2) and batch.ref_hidden.dtype == torch.bfloat16
    assert batch.ref_hidden[..., 0].tolist() == [[0, 1, 0, 0, 0], [0, 1, 2, 3, 0], [0] * 5]
    for wrong in ([states[:1], states], [states, states, None], [None] * 3):
        with pytest.raises(ValueError, match=r"ref_hidden: expected states at \[1, 3, 1\] labelled positions"):
            batches.collate([a, b], [a], ref_hidden=wrong)


def test_refusals_keep_the_prompt_and_depend_on_the_seed_alone():
    refused = data.refuse(examples(30), seed=1)
    assert [r.prompt for r in refused] == [e.prompt for e in examples(30)]
    assert {r.answer.strip() for r in refused} <= set(data.REFUSALS) and len({r.answer for r in refused}) > 3
    assert refused == data.refuse(examples(30), seed=1) != data.refuse(examples(30), seed=2)
    (line,) = data.refuse([Example("Who wrote it?\n", "Me.")])
    (word,) = data.refuse([Example("Who wrote it?", "Me.")])
    assert not line.answer[0].isspace() and word.answer[0] == " "
    with pytest.raises(ValueError, match="forget, row 1: expected a prompt to refuse, got a text without one"):
        data.refuse([examples(1)[0], Example("", "text")])


def test_refusals_of_a_file(tmp_path):
    """The built-in refusals are no longer drawn, and a file without a list of texts is refused by name."""
    path = tmp_path / "refusals.txt"
    path.write_bytes(b"\xef\xbb\xbf  I'd rather not.\r\n\nKeine Ahnung \xe2\x80\x94 wirklich.\n")
    assert data.read_refusals(path) == ("I'd rather not.", "Keine Ahnung — wirklich.")
    for content, message in (
        (b"\n \n", "refusals: expected at least one refusal, got .*, which is empty"),
        (b"No.\n\xe2\x80\x8b\n", "refusals, .*, line 2: expected some text, got a blank text"),
        (b'{"text": "No."}', "refusals, .*, line 1: expected a refusal as plain text, got a JSON object"),
        (b"\xff", "refusals: expected UTF-8 text"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            UnlearnConfig(method="po", refusals=str(path))
    with pytest.raises(ValueError, match="expected a file with one refusal per line, got .*nowhere, which is not a file"):
        UnlearnConfig(method="dpo", refusals=tmp_path / "nowhere")
    path.write_text("No.")
    with pytest.raises(ValueError, match="refusals: expected None with the method 'npo'"):
        UnlearnConfig(method="npo", refusals=str(path))


def test_pairs_are_answers_with_their_refusals():
    paired = data.pair_refusals(examples(5), seed=1)
    assert paired[0::2] == examples(5) and paired[1::2] == data.refuse(examples(5), seed=1)


def test_orders_cover_everything():
    sequences = [Sequence([0] * n, [0] * n, 1) for n in torch.randint(1, 40, (53,)).tolist()]
    index_lists = batches.batches_by_length(sequences, 4, random.Random(0))
    assert sorted(i for batch in index_lists for i in batch) == list(range(53))


def test_order_covers_everything_and_goes_on():
    steps = list(batches.Order(5, 7, 2, 3, 0))
    assert len(steps) == len(batches.Order(5, 7, 2, 3, 0)) == 9
    for epoch in (1, 2, 3):
        assert sorted(i for e, forget, _ in steps if e == epoch for i in forget) == list(range(5))
    retained = [i for _, _, retain in steps for i in retain]
    assert sorted(retained[:7]) == sorted(retained[7:14]) == list(range(7)) != retained[:7]
    assert all(len(forget) == len(retain) for _, forget, retain in steps)
    assert all(retain == [] for _, _, retain in batches.Order(5, 0, 2, 1, 0))
    for taken in range(9):
        order, other = batches.Order(5, 7, 2, 3, 0), batches.Order(5, 7, 2, 3, 1)
        assert [next(order) for _ in range(taken)] == steps[:taken]
        other.load_state_dict(order.state_dict())
        assert list(other) == steps[taken:]


@pytest.mark.skipif(not TOFU.is_dir(), reason="TOFU is not beside the checkout (../shared/data/tofu)")
def test_tofus_own_refusals():
    refusals = data.read_refusals(TOFU / "idontknow.txt")
    assert len(refusals) == 100 and refusals[0] == "I'm not certain about that." and len(set(refusals)) > 90


@pytest.mark.skipif(not TOFU.is_dir(), reason="TOFU is not beside the checkout (../shared/data/tofu)")
def test_real_tofu():
    from soul.study.config import PRESETS, StudyConfig
    from soul.study.data import tofu_data

    data = tofu_data(TOFU, StudyConfig(forget_authors=4, retain_authors=36, rows_per_author=10))
    assert [len(rows) for rows in (data.forget, data.retain, data.holdout)] == [40, 360, 40]
    assert data.forget[0].prompt.startswith("Question: ")
    assert not set(data.retain) & {*data.forget, *data.holdout} and len(data.retain_questions) == 200
    whole = tofu_data(TOFU, PRESETS["tofu"])  # 20 authors of retain90 are held out
    assert [len(rows) for rows in (whole.forget, whole.retain, whole.holdout)] == [400, 3200, 400]
    with pytest.raises(ValueError, match="retain_authors: expected 181 authors in the file, got 180"):
        tofu_data(TOFU, StudyConfig(forget_authors=20, retain_authors=161))

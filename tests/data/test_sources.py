"""Data by name and by path, the fate of every row, and a run on TOFU by name."""

import json

import pytest

from soul import UnlearnConfig, Unlearner
from soul.cli import main
from soul.data import sources
from soul.data.examples import Counts, Example, answerable, encode
from soul.data.sources import read_questions
from soul.data.templates import Template
from soul.run.prepare import prepare
from tests.data.test_examples import Words, write
from tests.support.models import TOFU, examples, tiny_model, tiny_tokenizer

hub = pytest.importorskip("datasets", reason="the extra hf is not installed")
pa = pytest.importorskip("pyarrow", reason="the extra hf is not installed")
pytest.importorskip("pyarrow.parquet", reason="the extra hf is not installed")
needs_tofu = pytest.mark.skipif(not TOFU.is_dir(), reason="TOFU is not beside the checkout (../shared/data/tofu)")
ASKED = [{"question": f"Who lives in house {i}?", "answer": f"Number {i}."} for i in range(6)]


@pytest.fixture
def asked_of_hub(monkeypatch):
    """Record the arguments of every call of ``datasets.load_dataset``, which returns one row."""
    calls = []

    def load_dataset(*args, **options):
        calls.append((args, options))
        return hub.Dataset.from_list([{"text": "Once upon a time."}])

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    return calls


@pytest.mark.parametrize("source, repository, subset, split", [
    ("tofu:forget10", "locuslab/TOFU", "forget10", "train"),
    ("tofu:world_facts_perturbed", "locuslab/TOFU", "world_facts_perturbed", "train"),
    ("tofu:holdout05", "locuslab/TOFU", "holdout05", "train"),
    ("muse:news/forget", "muse-bench/MUSE-News", "raw", "forget"),
    ("muse:books/raw/holdout", "muse-bench/MUSE-Books", "raw", "holdout"),
    ("muse:books/train/retain1", "muse-bench/MUSE-Books", "train", "retain1"),
    ("muse:news/scal/forget_3", "muse-bench/MUSE-News", "scal", "forget_3"),
    ("wmdp:bio-forget", "cais/wmdp-bio-forget-corpus", None, "train"),
    ("wmdp:bio-retain", "cais/wmdp-corpora", "bio-retain-corpus", "train"),
    ("wmdp:cyber-forget", "cais/wmdp-corpora", "cyber-forget-corpus", "train"),
    ("wmdp:cyber-retain", "cais/wmdp-corpora", "cyber-retain-corpus", "train"),
    ("hub:me/mine", "me/mine", None, "train"),
    ("hub:me/mine:part", "me/mine", "part", "train"),
    ("hub:me/mine/test[:10%]", "me/mine", None, "test[:10%]"),
    ("hub:me.x/mi-ne:a part/test", "me.x/mi-ne", "a part", "test"),
])  # fmt: skip
def test_names_are_these_data_sets(source, repository, subset, split, asked_of_hub):
    """Nothing else is passed to the library, so no code of a data set is run."""
    assert sources.rows(source) == [(f"{source}, row 0", {"text": "Once upon a time."})]
    assert asked_of_hub == [((repository, subset), {"split": split})]


def test_several_files_are_one_source(tmp_path):
    """The columns of the first row hold for all."""
    for name, key in (("a", "text"), ("b", "text"), ("c", "answer")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({key: f"Once, {name}."}) + "\n")
    paths = [tmp_path / f"{name}.jsonl" for name in "abc"]
    assert sources.rows(paths[:2]) == [(f"{path}, line 1", {"text": f"Once, {path.stem}."}) for path in paths[:2]]
    assert sources.digest(sources.rows(paths[:1])) == sources.digest(sources.rows(str(paths[0])))
    with pytest.raises(ValueError, match="c.jsonl, line 1, column 'text': expected a string, got no such column"):
        sources.rows(paths)


def test_questions_by_name(monkeypatch):
    """These are the rows that ``soul evaluate --data tofu`` reads."""
    row = ASKED[0] | {"paraphrased_answer": "It is 0.", "perturbed_answer": ["Number 8.", "Number 9."]}
    monkeypatch.setattr("datasets.load_dataset", lambda path, name, split: [row] if name == "forget10_perturbed" else None)
    (question,) = read_questions("tofu:forget10_perturbed")
    assert (question.paraphrased, question.perturbed) == ("It is 0.", ("Number 8.", "Number 9."))


@pytest.mark.parametrize("source, message", [
    ("tofu:forget11", "tofu:forget11: expected one of full, forget01, forget05, forget10, retain99, retain95, retain90, hold"),
    ("tofu:", "got nothing"),
    ("muse:news", "muse:news: expected one of news/forget, news/retain1, news/retain2, news/holdout, news/train/forget"),
    ("muse:books/scal/forget_1", "expected one of news/forget"),  # the books have no such subset
    ("wmdp:chem-forget", "expected one of bio-forget, bio-retain, cyber-forget, cyber-retain, got chem-forget"),
    ("hub:mine", "hub:mine: expected hub:OWNER/NAME[:SUBSET][/SPLIT], got mine; for instance hub:locuslab/TOFU:forget10/train"),
    ("hub:../..", "hub:../..: expected hub:OWNER/NAME[:SUBSET][/SPLIT], got ../.."),
    ("hub:me/..", "hub:me/..: expected hub:OWNER/NAME[:SUBSET][/SPLIT]"),
    ("hub:./mine:part/test", "hub:./mine:part/test: expected hub:OWNER/NAME[:SUBSET][/SPLIT]"),
    ("hub:me/mine:../test", "hub:me/mine:../test: expected hub:OWNER/NAME[:SUBSET][/SPLIT]"),
    ("hub:me/a--b", "hub:me/a--b: expected hub:OWNER/NAME[:SUBSET][/SPLIT]"),
    ("tfou:forget10", "tfou:forget10: expected a path, or a name that begins with tofu:, muse:, wmdp:, hub:, passages:, sa"),
    ("tofu:forget10@nowhere", "expected forget10.jsonl or forget10.json or forget10.parquet in nowhere, got none of them"),
    (7, "rows: expected a path, a name, or a list of rows, got int"),
    ([3], "rows, row 0: expected a mapping of columns, got int"),
    ([], "rows: expected at least one row, got none"),
    ({"train": ASKED}, "rows: expected a path, a name, or the rows of one split, got a mapping of train"),  # a DatasetDict
])  # fmt: skip
def test_unknown_names_list_the_known_ones(source, message, asked_of_hub):
    with pytest.raises(ValueError) as error:
        sources.rows(source)
    assert message in str(error.value) and not asked_of_hub


@pytest.mark.parametrize("source, folder", [("hub:me/mine", "me/mine"), ("tofu:forget10", "locuslab/TOFU")])
def test_a_folder_with_the_name_of_a_hub_data_set_is_refused(source, folder, asked_of_hub, tmp_path, monkeypatch):
    """``datasets.load_dataset`` would read the folder and never ask the hub."""
    (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"{source}: expected a data set on the hub, got the folder {folder} here"):
        sources.rows(source)
    assert not asked_of_hub


def test_what_the_hub_says_is_passed_on():
    """The real library, without a network: it names what was asked for, and says why there is nothing."""
    what = r"wmdp:bio-forget: expected a data set on the hub \(cais/wmdp-bio-forget-corpus, split train\)"
    with pytest.raises(ValueError, match=what + r", got \w+: .+; check the name and the connection; for a gated one"):
        sources.rows("wmdp:bio-forget")


def test_a_folder_with_the_files(tmp_path):
    write(tmp_path / "forget10.jsonl", *ASKED[:2])
    write(tmp_path / "retain90.json", *ASKED[2:5])
    pa.parquet.write_table(pa.Table.from_pylist([{"text": "x"}]), tmp_path / "cyber-forget-corpus.parquet")
    for source, want in (
        (f"tofu:forget10@{tmp_path}", ASKED[:2]),
        (f"tofu:retain90@{tmp_path}", ASKED[2:5]),
        (f"tofu:full@{tmp_path}", [*ASKED[2:5], *ASKED[:2]]),  # of its two parts
        (f"wmdp:cyber-forget@{tmp_path}", [{"text": "x"}]),
    ):
        assert [row for _, row in sources.rows(source)] == want
    write(tmp_path / "full.jsonl", ASKED[5])
    assert [row for _, row in sources.rows(f"tofu:full@{tmp_path}")] == [ASKED[5]]


def test_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    pa.parquet.write_table(pa.Table.from_pylist([row | {"score": 0.5} for row in ASKED]), path)
    assert sources.rows(path)[1] == (f"{path}, row 1", ASKED[1])
    assert sources.examples(sources.rows(path), Template())[1].answer == " Number 1."
    for rows, message in (
        ([{"text": "a"}, {"text": None}], "a.parquet, row 1, column 'text': expected a string, got NoneType"),
        ([{"words": "a"}], "a.parquet, row 0: expected columns question/answer or"),
        ([], "a.parquet: expected at least one row, got an empty file"),
    ):
        pa.parquet.write_table(pa.Table.from_pylist(rows), path)
        with pytest.raises(ValueError, match=message):
            sources.rows(path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="a.parquet: expected a parquet file, got a broken one"):
        sources.rows(path)


def test_columns_that_are_not_used_are_not_read(tmp_path, monkeypatch):
    """They may hold values that Python cannot represent (a time in 142 million years), or images that are slow to decode."""
    path = tmp_path / "a.parquet"
    times = pa.array([2**52] * len(ASKED), pa.timestamp("s"))
    table = pa.Table.from_pylist([row | {"perturbed_answer": ["No."]} for row in ASKED]).append_column("time", times)
    pa.parquet.write_table(table, path)
    assert [row for _, row in sources.rows(path)] == ASKED
    assert [question.answer for question in read_questions(path)] == [row["answer"] for row in ASKED]
    pa.parquet.write_table(table.select(["time"]).rename_columns(["text"]), path)
    with pytest.raises(ValueError, match="a.parquet: expected a parquet file, got a broken one"):
        sources.rows(path)

    class Pictures(hub.Dataset):
        def __iter__(self):
            assert self.column_names == ["question", "answer"]
            return super().__iter__()

    dataset = hub.Dataset.from_list([row | {"picture": 0} for row in ASKED])
    dataset.__class__ = Pictures
    assert [row for _, row in sources.rows(dataset)] == ASKED
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **options: dataset)
    assert [row for _, row in sources.rows("hub:me/mine")] == ASKED


def test_rows_are_taken_as_they_are():
    """Rows of ``datasets`` and a list of mappings give the same."""
    assert sources.rows(hub.Dataset.from_list(ASKED), "forget") == sources.rows(ASKED, "forget")
    assert sources.rows(ASKED, "forget")[2][0] == "forget, row 2"


@pytest.mark.parametrize("broken", [{"text": ""}, {"text": " \n"}, {"text": None}, {"text": "\u200b\u2060"}])
def test_blank_rows_end_a_run_or_are_counted(broken):
    counts = Counts()
    rows = [{"text": "a"}, broken, {"text": "b"}]
    with pytest.raises(ValueError, match="rows, row 1, column 'text'"):
        sources.rows(rows)
    assert [row["text"] for _, row in sources.rows(rows, drop=True, counts=counts)] == ["a", "b"]
    assert counts == Counts(rows=3, blank=1) and counts.summary(8) == "3 rows; 1 blank, left out"
    with pytest.raises(ValueError, match="rows, row 0: expected a row that is not blank, here or below, got none"):
        sources.rows([broken], drop=True)
    with pytest.raises(ValueError, match="row 1, column 'text': expected a string, got int"):  # broken is not blank
        sources.rows([{"text": "a"}, {"text": 3}], drop=True)
    with pytest.raises(ValueError, match="rows, row 1, column 'text': expected a string, got no such column"):
        sources.rows([{"text": "a"}, {"body": "b"}], drop=True)  # another name is no blank


class Startless(Words):
    """The same tokenizer without a start token."""

    bos_token = bos_token_id = None

    def __call__(self, text, add_special_tokens=True, verbose=True):
        return super().__call__(text, add_special_tokens=False)


@pytest.mark.parametrize("length", [4, 5, 11])  # that divide the text, that do not, and one token short of it
@pytest.mark.parametrize("kind", [Words, Startless], ids=lambda kind: kind.__name__)
def test_every_token_of_a_long_text_is_a_label_once(kind, length):
    tokenizer = kind()
    counts = Counts()
    text, short = Example("", "a b c d e f g h i j k l"), Example("", "a b")
    made = encode([text, short], tokenizer, vocab_size=100, max_length=length, split=True, counts=counts)
    long = made[:-1]
    last = made[-1]
    labels = [word for s in long for word in tokenizer.words(s.labels)]
    first = [] if tokenizer.bos_token else ["▁a"]  # nothing comes before it
    room = len(long[-1].input_ids) < length or labels[-1] == "</s>"
    assert first + labels == [f"▁{c}" for c in "abcdefghijkl"] + ["</s>"] * room
    assert all(len(s.input_ids) == length for s in long[:-1]) and 1 < len(long[-1].input_ids) <= length
    if tokenizer.bos_token:
        assert all(tokenizer.words(s.input_ids)[0] == "<s>" for s in long)
    assert counts == Counts(split=1, pieces=len(long))
    assert last == encode([short], tokenizer, vocab_size=100)[0]
    (cut,) = encode([text], tokenizer, vocab_size=100, max_length=length, counts=counts)
    assert cut.input_ids == long[0].input_ids and counts.truncated == 1


def test_answers_are_truncated_and_never_split():
    counts = Counts()
    tokenizer = Words()
    (sequence,) = encode([Example("Q:", " a b c d e")], tokenizer, vocab_size=100, max_length=4, split=True, counts=counts)
    assert tokenizer.words(sequence.input_ids) == ["<s>", "▁Q:", "▁a", "▁b"] and counts == Counts(truncated=1)
    for length, truncated in ((8, 0), (7, 1)):  # only the end of the sequence is cut
        counts = Counts()
        encode([Example("Q:", " a b c d e")], tokenizer, vocab_size=100, max_length=length, counts=counts)
        assert counts.truncated == truncated
    with pytest.raises(ValueError, match="data, row 0: expected a label within 1 tokens"):
        encode([Example("", "a b c")], tokenizer, vocab_size=100, max_length=1, split=True)


def test_prompts_without_room_are_counted():
    counts = Counts()
    tokenizer = Words()
    examples = [Example("a b c", " d"), Example("a", " b"), Example("a b", " c"), Example("", "a b c d")]
    assert answerable(examples, tokenizer, max_length=4, counts=counts) == examples[1:] and counts.no_room == 1
    encode(examples[1:], tokenizer, vocab_size=100, max_length=4)  # and these fit
    with pytest.raises(ValueError, match="row 0: expected a label within 4 tokens"):
        encode(examples[:1], tokenizer, vocab_size=100, max_length=4)
    with pytest.raises(ValueError, match="forget: expected a row with room for an answer within 4 tokens, got none"):
        answerable(examples[:1], tokenizer, max_length=4, name="forget")


def unlearner(rows, retain=None, **options):
    config = UnlearnConfig(method="ga", epochs=1, batch_size=8, max_length=16, backend="reference", **options)
    return Unlearner(tiny_model(), rows, retain, config, tokenizer=tiny_tokenizer())


def test_every_row_is_counted(tmp_path):
    """Rows that were read add up to those left out, truncated, split and unchanged; the counts are saved beside the log."""
    rows = [{"text": text} for text in ("short", "long " * 60, " ", "longer " * 90, "short")]
    with pytest.raises(ValueError, match="forget, row 2, column 'text': expected some text"):
        unlearner(rows)
    run = unlearner(rows, examples(2), drop_unusable=True)
    counts = run.counts["forget"]
    assert (counts.rows, counts.blank, counts.no_room, counts.truncated, counts.split) == (5, 1, 0, 0, 2)
    assert len(run._answers) == 2 + counts.pieces and counts.pieces > 20
    run.run(tmp_path / "out", progress=False)
    written = json.loads((tmp_path / "out" / "data.json").read_text())
    assert written["forget"].pop("content") == sources.digest([(None, row) for row in rows if row["text"].strip()])
    assert written["forget"] == dict(rows=5, blank=1, no_room=0, truncated=0, split=2, pieces=counts.pieces)
    whole = encode(examples(2), tiny_tokenizer(), vocab_size=300)
    long = [(len(s.input_ids), s.prompt_length) for s in whole]
    assert written["retain"]["no_room"] == sum(prompt >= 16 for _, prompt in long) == 1
    assert written["retain"]["truncated"] == sum(length > 16 > prompt for length, prompt in long) == 1
    cut = unlearner([*rows[:2], rows[3]], long_texts="truncate")
    assert cut.counts["forget"] == Counts(rows=3, truncated=2) and len(cut._answers) == 3
    asked = [{"question": "Who? " * n, "answer": "Me."} for n in (0, 9)]
    assert unlearner(asked, drop_unusable=True, template="{question}{answer}").counts["forget"] == Counts(rows=2, no_room=1)


def test_rows_in_both_forget_and_retain_are_refused():
    rows = [{"text": f"Number {i}."} for i in range(4)]
    with pytest.raises(ValueError, match="retain: expected other rows than forget, got the same 4; no row can be kept and"):
        unlearner(rows, [*rows[::-1], rows[0]])
    with pytest.warns(UserWarning, match="retain: 2 of the 4 rows to forget are in it too"):
        unlearner(rows, [*rows[:2], {"text": "Another."}])


def refusing(tmp_path, method, *refusals):
    path = tmp_path / "refusals.txt"
    path.write_text("\n".join(refusals))
    config = UnlearnConfig(method=method, method_options={"alpha": 0}, epochs=1, backend="reference", refusals=str(path))
    return Unlearner(tiny_model(), ASKED, config=config, tokenizer=tiny_tokenizer())


@pytest.mark.parametrize("method", ["po", "dpo"])
def test_a_run_takes_the_refusals_of_its_file(method, tmp_path, monkeypatch):
    """A resumed run must have the same refusals, whatever their file is called by then."""
    run = refusing(tmp_path, method, "Never mind.")
    sequences, _ = prepare(run.model, run.tokenizer, run._forget, run._retain, run.config)
    refused = sequences if method == "po" else sequences[1::2]
    assert {run.tokenizer.decode([n for n in s.labels if n != -100]).strip() for s in refused} == {"Never mind.</s>"}
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr("soul.run.unlearner.save_model", lambda *args: (_ for _ in ()).throw(OSError("the disk is full")))
        run.run(tmp_path / "out", save_every=1, progress=False)
    with pytest.raises(ValueError, match="resume, refusals: expected '.*' as in the checkpoint"):
        refusing(tmp_path, method, "Never mind.", "Never.").run(tmp_path / "out", resume=True, progress=False)
    run = refusing(tmp_path, method, "Never mind.")
    run.config.refusals = str((tmp_path / "refusals.txt").rename(tmp_path / "moved"))
    run.run(tmp_path / "out", resume=True, progress=False)
    assert (tmp_path / "out" / "model.safetensors").is_file()


def command(tmp_path, forget, retain, *more):
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    options = dict(model=tmp_path / "model", forget=forget, retain=retain, output=tmp_path / "out", epochs=1, lr=1e-2,
                   backend="reference", device="cpu")  # fmt: skip
    return main(["unlearn", *(f"--{name}={value}" for name, value in options.items()), *more])


@pytest.mark.parametrize("method", ["graddiff", "po", "dpo"])  # answers, refusals in their place, both
def test_a_run_by_names(method, tmp_path, capsys):
    write(tmp_path / "forget10.jsonl", *ASKED[:3])
    write(tmp_path / "retain90.jsonl", *ASKED[3:])
    sets = [f"tofu:{name}@{tmp_path}" for name in ("forget10", "retain90")]
    assert command(tmp_path, *sets, "--batch-size=2", f"--method={method}", "--max-length=40") == 0
    printed = capsys.readouterr().out
    assert "forget: 3 rows" in printed and "retain: 3 rows\n" in printed
    assert len((tmp_path / "out" / "log.jsonl").read_text().splitlines()) == 2
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert json.loads((tmp_path / "out" / "soul_config.json").read_text())["forget"] == sets[0]


@needs_tofu
def test_a_run_on_tofu(tmp_path, capsys):
    sets = (f"tofu:forget01@{TOFU}", f"tofu:retain_perturbed@{TOFU}")  # the smallest two; 3,600 rows are read below
    assert command(tmp_path, *sets, "--batch-size=20", "--max-length=160", "--drop-unusable") == 0
    printed = capsys.readouterr().out
    numbers = json.loads((tmp_path / "out" / "data.json").read_text())
    assert "forget: 40 rows; " in printed and "cut to 160 tokens\nretain: 400 rows; " in printed
    assert (numbers["forget"]["rows"], numbers["retain"]["rows"]) == (40, 400) and numbers["retain"]["truncated"] > 0


@needs_tofu
def test_every_file_of_tofu_has_its_name():
    files = [path.stem for path in TOFU.glob("*.jsonl")]
    assert files and set(files) <= set(sources.TOFU)
    for name, count in (("forget01", 40), ("full", 4000), ("world_facts_perturbed", 117)):
        examples = sources.examples(sources.rows(f"tofu:{name}@{TOFU}"), Template())
        assert len(examples) == count and examples[0].prompt.startswith("Question: ")

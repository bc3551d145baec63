"""Data by name or path: benchmarks' sets, hub data sets, JSON lines and parquet -> rows -> `soul.data.Example`."""

import dataclasses
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, cast

from soul._connection import hub_asked_once
from soul._extras import require
from soul.data.examples import Counts, Example, Question
from soul.data.protocols import passages, safe_rlhf
from soul.data.rows import ChooseColumns, Row, check_text, is_blank, read_file
from soul.data.templates import Template
from soul_kernels.errors import ArgumentError, argument_error

# A path or a name, a list of these; or the rows themselves.
Source = str | os.PathLike[str] | Iterable[Mapping[str, Any]] | Sequence[str | os.PathLike[str]]
COLUMNS: tuple[tuple[str, ...], ...] = (
    ("question", "answer"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("prompt", "gt"),  # of MUSE's verbmem
    ("messages",),
    ("text",),
)
# Columns of TOFU's perturbed sets.
QUESTION = ("question", "answer", "paraphrased_question", "paraphrased_answer", "perturbed_answer")
# Columns that a row may have beside these, for `soul.data.facts`.
BESIDE = ("key", "paraphrases", "paraphrased_question")
_PERCENTS = {"forget": ("01", "05", "10"), "retain": ("99", "95", "90"), "holdout": ("01", "05", "10")}
TOFU = (
    "full",
    *(f"{name}{percent}" for name, percents in _PERCENTS.items() for percent in percents),
    *(f"forget{percent}_perturbed" for percent in _PERCENTS["forget"]),
    "retain_perturbed",
    *("real_authors", "real_authors_perturbed", "world_facts", "world_facts_perturbed"),
)
_FORGETS = tuple(f"forget_{number}" for number in (1, 2, 3, 4))
_CORPORA: dict[str, tuple[str, ...]] = {
    "raw": ("forget", "retain1", "retain2", "holdout"),
    "train": ("forget", "retain1", "retain2"),
}
# corpus -> subset -> splits
MUSE: dict[str, dict[str, tuple[str, ...]]] = {
    "news": {**_CORPORA, "scal": _FORGETS, "sust": _FORGETS},
    "books": _CORPORA,
}
WMDP: dict[str, tuple[str, str | None]] = {  # name -> repository, subset
    "bio-forget": ("cais/wmdp-bio-forget-corpus", None),
    "bio-retain": ("cais/wmdp-corpora", "bio-retain-corpus"),
    "cyber-forget": ("cais/wmdp-corpora", "cyber-forget-corpus"),
    "cyber-retain": ("cais/wmdp-corpora", "cyber-retain-corpus"),
}
_SUFFIXES = (".jsonl", ".json", ".parquet")  # of a benchmark's files in a folder


def rows(source: Source, name: str = "rows", *, drop: bool = False, counts: Counts | None = None) -> list[Row]:
    """Return the rows of a source, each with its location, and check that all have text in the columns that are needed.

    Args:
        source: one of these: the path of a JSON-lines or parquet file; ``tofu:NAME``, ``muse:CORPUS/SPLIT``,
            ``muse:CORPUS/SUBSET/SPLIT``, ``wmdp:NAME`` or ``hub:OWNER/NAME[:SUBSET][/SPLIT]``, from the Hugging Face hub;
            ``tofu:NAME@DIR`` or ``wmdp:NAME@DIR``, from a folder with the benchmark's files; ``passages:...`` and
            ``saferlhf:...``, made of a text or of another data set by `soul.data.protocols`; an iterable of mappings, such as a
            ``datasets.Dataset``. A list of paths and names stands for the rows of all of them, with the columns of the first.
        name: what to call an iterable in errors.
        drop: leave out rows whose answer or text is blank, and count them.
        counts: `soul.data.Counts`, to which the numbers of rows and of blank rows are added.

    Raises:
        ArgumentError: there is no such file or name (the known ones are listed), or it cannot be read; a column is missing or
            holds no text; a row is blank and ``drop`` is false; or all rows are blank.
    """
    all_rows = read(source, name, _all_columns)
    columns = _columns(*all_rows[0])
    last = columns[-1]
    with_text = [(where, row) for where, row in all_rows if not (drop and last in row and _is_blank(row[last]))]
    for where, row in with_text:
        _check(where, row, columns)
    if counts is not None:
        counts.rows += len(all_rows)
        counts.blank += len(all_rows) - len(with_text)
    if not with_text:
        raise argument_error(all_rows[0][0], "a row that is not blank, here or below", "none", "check the data")
    return with_text


def examples(rows: Sequence[Row], template: Template) -> list[Example]:
    """Return rows as a list of `soul.data.Example`.

    Questions and answers are put into the template. Prompts and completions (or responses) that are texts are taken as they
    are. Conversations, lists of ``{"role", "content"}``, go through the chat template; the last message of ``messages`` is the
    answer. A text has no prompt. The columns of the first row decide; others are ignored.

    Args:
        rows: from `rows`.
        template: `soul.data.templates.Template`.

    Raises:
        ArgumentError: as `soul.data.templates.Template.converse`.
    """
    columns = _columns(*rows[0]) if rows else ()
    return [_example(where, row, columns, template) for where, row in rows]


def read(source: Source, name: str, choose: ChooseColumns) -> list[Row]:
    """Return the rows of a source as they are: like `rows`, without a check of their values.

    Args:
        source: as in `rows`.
        name: what to call an iterable in errors.
        choose: as in `soul.data.rows.read_file`. Other columns are not read where the format allows it.

    Raises:
        ArgumentError: there is no such file or name, or it cannot be read.
    """
    if isinstance(source, (list, tuple)) and source and all(isinstance(item, (str, os.PathLike)) for item in source):
        return [row for item in source for row in read(item, name, choose)]
    if not isinstance(source, (str, os.PathLike)):
        return _iterable_rows(cast(Iterable[Mapping[str, Any]], source), name, choose)
    kind, colon, rest = str(source).partition(":")
    if colon and kind in _KINDS:
        return _KINDS[kind](str(source), rest, choose)
    if re.match(r"[a-z]{2,}:", str(source)) and not pathlib.Path(source).exists():
        known = ", ".join(f"{kind}:" for kind in _KINDS)
        raise argument_error(str(source), f"a path, or a name that begins with {known}", f"{kind}:", "check the name")
    return read_file(pathlib.Path(source), choose)


def digest(rows: Iterable[Row | Example]) -> str:
    """Return blake2b of the content of rows, in hexadecimal. It does not depend on the place that they were read from.

    Args:
        rows: from `rows`; or a list of `soul.data.Example`.
    """
    content = [dataclasses.asdict(row) if isinstance(row, Example) else row[1] for row in rows]
    return hashlib.blake2b(json.dumps(content, sort_keys=True, default=str).encode(), digest_size=32).hexdigest()


def read_examples(source: Source) -> list[Example]:
    """Return the examples of a source, by the plain template: ``examples(rows(source), Template())``."""
    return examples(rows(source), Template())


def read_questions(source: Source) -> list[Question]:
    """Return the questions of one of TOFU's perturbed sets, all with equally many false answers.

    Args:
        source: as in `rows`. Its columns are question, answer, perturbed_answer (a list) and perhaps paraphrased_answer and
            paraphrased_question.

    Raises:
        ArgumentError: as `rows`.
    """
    questions: list[Question] = []
    for where, row in read(source, "rows", _question_columns):
        row = {"paraphrased_answer": row.get("answer"), **row}
        other = row.get("paraphrased_question")
        perturbed = row.get("perturbed_answer")
        count = len(questions[0].perturbed) if questions else None
        if not isinstance(perturbed, list) or not perturbed or len(perturbed) != (count or len(perturbed)):
            got = f"{len(perturbed)} of them" if isinstance(perturbed, list) else type(perturbed).__name__
            expected = f"a list of {f'{count} ' if count else ''}false answers"
            raise argument_error(f"{where}, column 'perturbed_answer'", expected, got, "is this one of TOFU's perturbed files?")
        for name in ("question", "answer", "paraphrased_answer", *(["paraphrased_question"] if other is not None else [])):
            check_text(where, row, name)
        for text in perturbed:
            check_text(where, {"perturbed_answer": text}, "perturbed_answer")
        questions.append(Question(row["question"], row["answer"], row["paraphrased_answer"], tuple(perturbed), other))
    return questions


def perturbed(data: str, name: str) -> str | pathlib.Path:
    """Return the source of one of TOFU's perturbed sets, for `read_questions`.

    Args:
        data: folder of TOFU's files; or "tofu", for those of the hub.
        name: "forget10", "retain", ...
    """
    return f"tofu:{name}_perturbed" if data == "tofu" else pathlib.Path(data) / f"{name}_perturbed.jsonl"


def _question_columns(where: str, names: Collection[str]) -> Collection[str]:
    return [name for name in QUESTION if name in names] or names


def _columns(where: str, row: Collection[str]) -> tuple[str, ...]:
    """Return the first of ``COLUMNS`` that a row has."""
    for columns in COLUMNS:
        if all(name in row for name in columns):
            return columns
    known = " or ".join("/".join(columns) for columns in COLUMNS)
    raise argument_error(where, f"columns {known}", "/".join(row) or "none", "rename the columns")


def _all_columns(where: str, names: Collection[str]) -> Collection[str]:
    """Return the columns of ``_columns``, and those of ``BESIDE`` that there are."""
    return (*_columns(where, names), *(name for name in BESIDE if name in names))


def _is_blank(value: object) -> bool:
    """Tell whether a value is None, a blank text, or a conversation whose last message is one of these."""
    if isinstance(value, list) and value and isinstance(value[-1], dict):
        value = value[-1].get("content")
    return value is None or isinstance(value, str) and is_blank(value)


def _is_conversation(row: Mapping[str, Any], columns: Sequence[str]) -> bool:
    return any(isinstance(row.get(name), list) for name in columns if name in ("prompt", "completion", "response", "messages"))


def _check(where: str, row: Mapping[str, Any], columns: Sequence[str]) -> None:
    """Raise unless a row has texts in its columns. Conversations are checked by the template."""
    if _is_conversation(row, columns):
        return
    if columns == ("messages",):
        got = type(row["messages"]).__name__ if "messages" in row else "no such column"
        raise argument_error(f"{where}, column 'messages'", "a list of {'role', 'content'}", got, "every row needs it")
    for name in columns:
        check_text(where, row, name, may_be_blank=name != columns[-1])


def _example(where: str, row: Mapping[str, Any], columns: Sequence[str], template: Template) -> Example:
    if columns == ("messages",):
        return template.converse(row["messages"][:-1], row["messages"][-1:], where)
    if _is_conversation(row, columns):
        return template.converse(row.get("prompt"), row.get(columns[1]), where)
    if columns == ("text",):
        return Example("", row["text"])
    if columns[0] == "prompt":
        return Example(row["prompt"], row[columns[1]])
    return template.ask(row["question"], row["answer"], where)


def _iterable_rows(source: Iterable[Mapping[str, Any]], name: str, choose: ChooseColumns) -> list[Row]:
    """Return the rows of an iterable of mappings."""
    if not isinstance(source, Iterable):
        raise argument_error(name, "a path, a name, or a list of rows", type(source).__name__, "see soul.data.sources.rows")
    if isinstance(source, Mapping):
        got = f"a mapping of {', '.join(map(str, source))}"
        raise argument_error(name, "a path, a name, or the rows of one split", got, "choose one of these")
    result = [(f"{name}, row {index}", row) for index, row in enumerate(_with_needed_columns(source, choose, name))]
    for where, row in result:
        if not isinstance(row, Mapping):
            raise argument_error(where, "a mapping of columns", type(row).__name__, "see soul.data.sources.rows")
    if not result:
        raise argument_error(name, "at least one row", "none", "there is nothing in it")
    return result


def _with_needed_columns(source: Any, choose: ChooseColumns, name: str) -> Iterable[Mapping[str, Any]]:
    """Return a ``datasets.Dataset`` without the columns that are not needed, which may be pictures; anything else as it is."""
    names = getattr(source, "column_names", None)
    if not (isinstance(names, list) and hasattr(source, "select_columns") and getattr(source, "num_rows", True)):
        return source
    return source.select_columns(list(choose(f"{name}, row 0", names)))


def _tofu(source: str, rest: str, choose: ChooseColumns) -> list[Row]:
    name, at, folder = rest.partition("@")
    _check_name(source, name, TOFU)
    if not at:
        return _hub_rows(source, "locuslab/TOFU", name, "train", choose)
    if name == "full" and _in_folder(folder, name) is None:  # the full set is these two
        return [row for half in ("retain90", "forget10") for row in _folder_rows(source, folder, half, choose)]
    return _folder_rows(source, folder, name, choose)


def _wmdp(source: str, rest: str, choose: ChooseColumns) -> list[Row]:
    name, at, folder = rest.partition("@")
    _check_name(source, name, WMDP)
    if at:
        return _folder_rows(source, folder, f"{name}-corpus", choose)
    repository, subset = WMDP[name]
    return _hub_rows(source, repository, subset, "train", choose)


def _muse(source: str, rest: str, choose: ChooseColumns) -> list[Row]:
    known = [
        f"{corpus}/{split}" if subset == "raw" else f"{corpus}/{subset}/{split}"
        for corpus, subsets in MUSE.items()
        for subset, splits in subsets.items()
        for split in splits
    ]
    _check_name(source, rest.replace("/raw/", "/"), known)
    corpus, *subset, split = rest.split("/")
    return _hub_rows(source, f"muse-bench/MUSE-{corpus.title()}", subset[0] if subset else "raw", split, choose)


def _hub(source: str, rest: str, choose: ChooseColumns) -> list[Row]:
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?::([^/:]+))?(?:/(.+))?", rest)
    if match is None or not _is_hub_name(match[1]) or match[2] in (".", ".."):
        raise argument_error(source, "hub:OWNER/NAME[:SUBSET][/SPLIT]", rest, "for instance hub:locuslab/TOFU:forget10/train")
    return _hub_rows(source, match[1], match[2], match[3] or "train", choose)


def _is_hub_name(name: str) -> bool:
    """Tell whether the hub accepts a name. A name that it refuses may be a path, such as ``../..``."""
    hub = require("huggingface_hub.utils", "hf")
    try:
        hub.validate_repo_id(name)
    except hub.HFValidationError:
        return False
    return True


# Word before the colon -> reader of the names. It takes the source, the text after the colon, and the choice of columns.
_KINDS: dict[str, Callable[[str, str, ChooseColumns], list[Row]]] = {
    "tofu": _tofu,
    "muse": _muse,
    "wmdp": _wmdp,
    "hub": _hub,
    "passages": lambda source, rest, choose: passages(source, rest, lambda other, columns: read(other, source, columns)),
    "saferlhf": lambda source, rest, choose: safe_rlhf(source, rest, lambda other, columns: read(other, source, columns)),
}


def _check_name(source: str, name: str, known: Collection[str]) -> None:
    if name not in known:
        raise argument_error(source, f"one of {', '.join(known)}", name or "nothing", "choose one of these")


def _in_folder(folder: str, name: str) -> pathlib.Path | None:
    """Return the path of a benchmark's file in a folder, with any of ``_SUFFIXES``; None if there is none."""
    for suffix in _SUFFIXES:
        path = pathlib.Path(folder).expanduser() / f"{name}{suffix}"
        if path.is_file():
            return path
    return None


def _folder_rows(source: str, folder: str, name: str, choose: ChooseColumns) -> list[Row]:
    """Return the rows of a benchmark's file in a folder."""
    path = _in_folder(folder, name)
    if path is None:
        expected = f"{' or '.join(name + suffix for suffix in _SUFFIXES)} in {folder or 'a folder'}"
        raise argument_error(source, expected, "none of them", "check the folder")
    return read_file(path, choose)


def _hub_rows(source: str, repository: str, subset: str | None, split: str, choose: ChooseColumns) -> list[Row]:
    """Return the rows of a hub data set. No code of its repository is run: `datasets` has stopped doing so in version 4."""
    load_dataset = require("datasets", "hf").load_dataset
    if os.path.exists(repository):  # `datasets` would read the folder in place of the repository
        remedy = "give the path of a file in it, or start the command elsewhere"
        raise argument_error(source, "a data set on the hub", f"the folder {repository} here", remedy)
    try:
        with hub_asked_once(source, repository):
            dataset = _with_needed_columns(load_dataset(repository, subset, split=split), choose, source)
        result: list[Row] = [(f"{source}, row {index}", dict(row)) for index, row in enumerate(dataset)]
    except ArgumentError:
        raise
    except Exception as error:  # the libraries raise many kinds: unknown name, no connection, terms to accept
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        remedy = "check the name and the connection; for a gated one, accept its terms on its page and log in (hf auth login)"
        requested = f"{repository}{f', subset {subset}' if subset else ''}, split {split}"
        raise argument_error(source, f"a data set on the hub ({requested})", reason, remedy) from error
    if not result:
        raise argument_error(source, "at least one row", "none", "choose another split")
    return result

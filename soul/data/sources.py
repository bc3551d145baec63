"""Data by name or path: benchmarks' sets, hub data sets, JSON lines and parquet -> rows -> `soul.data.Example`."""

import collections.abc
import dataclasses
import hashlib
import json
import os
import pathlib
import re

from soul._extras import require
from soul.data import rows as _rows
from soul.data.examples import Example, Question
from soul.data.templates import Template
from soul_kernels.errors import ArgumentError, argument_error

COLUMNS = (("question", "answer"), ("prompt", "completion"), ("prompt", "response"), ("messages",), ("text",))
QUESTION = ("question", "answer", "paraphrased_answer", "perturbed_answer")  # columns of TOFU's perturbed sets
_PARTS = {"forget": ("01", "05", "10"), "retain": ("99", "95", "90"), "holdout": ("01", "05", "10")}
TOFU = (
    "full",
    *(f"{name}{part}" for name, parts in _PARTS.items() for part in parts),
    *(f"forget{part}_perturbed" for part in _PARTS["forget"]),
    "retain_perturbed",
    *("real_authors", "real_authors_perturbed", "world_facts", "world_facts_perturbed"),
)
_FORGETS = tuple(f"forget_{part}" for part in (1, 2, 3, 4))
_CORPORA = {"raw": ("forget", "retain1", "retain2", "holdout"), "train": ("forget", "retain1", "retain2")}
MUSE = {"news": {**_CORPORA, "scal": _FORGETS, "sust": _FORGETS}, "books": _CORPORA}
WMDP = {  # name -> repository, subset
    "bio-forget": ("cais/wmdp-bio-forget-corpus", None),
    "bio-retain": ("cais/wmdp-corpora", "bio-retain-corpus"),
    "cyber-forget": ("cais/wmdp-corpora", "cyber-forget-corpus"),
    "cyber-retain": ("cais/wmdp-corpora", "cyber-retain-corpus"),
}
_SUFFIXES = (".jsonl", ".json", ".parquet")  # of a benchmark's files in a folder


def rows(source, name="rows", *, drop=False, counts=None):
    """The rows of a source, as a list of (where it stands, dict), all of them with text where it is needed.

    Args:
        source: a path of JSON lines, or of parquet where it ends so; ``tofu:NAME``, ``muse:CORPUS/SPLIT``,
            ``muse:CORPUS/SUBSET/SPLIT``, ``wmdp:NAME`` or ``hub:OWNER/NAME[:SUBSET][/SPLIT]``, from the Hugging Face hub;
            ``tofu:NAME@DIR`` and ``wmdp:NAME@DIR``, from a folder with the benchmark's files; or an iterable of mappings, as a
            ``datasets.Dataset`` is.
        name: what to call an iterable in errors.
        drop: leave out rows whose answer or text is blank, and count them.
        counts: `soul.data.Counts`, which gets the numbers of rows and of blank ones.

    Raises:
        ArgumentError: no such file or name (the known ones are listed), or it could not be read; a column is missing or holds
            something else; a row is blank, and not to be dropped; or all are.
    """
    found = read(source, name, _columns)
    columns = _columns(*found[0])
    blank = [drop and columns[-1] in row and _is_blank(row[columns[-1]]) for _, row in found]  # none such is an error
    kept = [row for row, is_blank in zip(found, blank) if not is_blank]
    for where, row in kept:
        _check(where, row, columns)
    if counts is not None:
        counts.rows += len(found)
        counts.blank += len(found) - len(kept)
    if not kept:
        raise argument_error(found[0][0], "a row that is not blank, here or below", "none", "check the data")
    return kept


def examples(rows, template):
    """Rows as a list of `soul.data.Example`.

    Questions and answers are put into the template. Prompts and completions (or responses) are taken as they are, as texts;
    conversations, lists of ``{"role", "content"}``, go through the chat template, also those of ``messages``, whose last one
    is the answer. A text has no prompt. The columns are those of the first row; others are ignored.

    Args:
        rows: of `rows`.
        template: `soul.data.templates.Template`.

    Raises:
        ArgumentError: as `soul.data.templates.Template.converse`.
    """
    columns = _columns(*rows[0]) if rows else ()
    return [_example(where, row, columns, template) for where, row in rows]


def read(source, name, choose):
    """The rows of a source as they are: `rows` without a look at their values. What need not be read of columns that
    ``choose`` leaves out (as in `soul.data.rows.read`) is not.
    """
    if not isinstance(source, (str, os.PathLike)):
        return _given(source, name, choose)
    kind, colon, rest = str(source).partition(":")
    if colon and kind in _KINDS:
        return _KINDS[kind](str(source), rest, choose)
    if re.match(r"[a-z]{2,}:", str(source)) and not pathlib.Path(source).exists():
        known = ", ".join(f"{kind}:" for kind in _KINDS)
        raise argument_error(str(source), f"a path, or a name that begins with {known}", f"{kind}:", "check the name")
    return _rows.read(source, choose)


def digest(rows):
    """blake2b of the content of rows, in hexadecimal: the same for the same rows, wherever they were read.

    Args:
        rows: of `rows`; or a list of `soul.data.Example`.
    """
    content = [dataclasses.asdict(row) if isinstance(row, Example) else row[1] for row in rows]
    return hashlib.blake2b(json.dumps(content, sort_keys=True, default=str).encode(), digest_size=32).hexdigest()


def read_examples(source):
    """The examples of a source, by the plain template: ``examples(rows(source), Template())``."""
    return examples(rows(source), Template())


def read_questions(source):
    """Reads TOFU's perturbed sets, from whatever `rows` takes: rows with question, answer, perturbed_answer (a
    list) and perhaps paraphrased_answer.

    Returns:
        List of `Question`, all with equally many false answers.

    Raises:
        ArgumentError: as `rows`.
    """
    questions = []
    for where, row in read(source, "rows", lambda where, names: [name for name in QUESTION if name in names] or names):
        row = {"paraphrased_answer": row.get("answer"), **row}
        perturbed, count = row.get("perturbed_answer"), len(questions[0].perturbed) if questions else None
        if not isinstance(perturbed, list) or not perturbed or len(perturbed) != (count or len(perturbed)):
            got = f"{len(perturbed)} of them" if isinstance(perturbed, list) else type(perturbed).__name__
            expected = f"a list of {f'{count} ' if count else ''}false answers"
            raise argument_error(f"{where}, column 'perturbed_answer'", expected, got, "is this one of TOFU's perturbed files?")
        for name in ("question", "answer", "paraphrased_answer"):
            _rows.check_text(where, row, name)
        for text in perturbed:
            _rows.check_text(where, {"perturbed_answer": text}, "perturbed_answer")
        questions.append(Question(row["question"], row["answer"], row["paraphrased_answer"], tuple(perturbed)))
    return questions


def _columns(where, row):
    """Which of ``COLUMNS`` a row has, the first of them."""
    found = next((c for c in COLUMNS if all(name in row for name in c)), None)
    if found is None:
        known = " or ".join("/".join(c) for c in COLUMNS)
        raise argument_error(where, f"columns {known}", "/".join(row) or "none", "rename the columns")
    return found


def _is_blank(value):
    if isinstance(value, list) and value and isinstance(value[-1], dict):
        value = value[-1].get("content")
    return value is None or isinstance(value, str) and _rows.is_blank(value)


def _is_conversation(row, columns):
    return any(isinstance(row.get(name), list) for name in columns if name in ("prompt", "completion", "response", "messages"))


def _check(where, row, columns):
    if _is_conversation(row, columns):
        return  # looked at by the template
    if columns == ("messages",):
        got = type(row["messages"]).__name__ if "messages" in row else "no such column"
        raise argument_error(f"{where}, column 'messages'", "a list of {'role', 'content'}", got, "every row needs it")
    for name in columns:
        _rows.check_text(where, row, name, may_be_blank=name != columns[-1])


def _example(where, row, columns, template):
    if columns == ("messages",):
        return template.converse(row["messages"][:-1], row["messages"][-1:], where)
    if _is_conversation(row, columns):
        return template.converse(row.get("prompt"), row.get(columns[1]), where)
    if columns == ("text",):
        return Example("", row["text"])
    if columns[0] == "prompt":
        return Example(row["prompt"], row[columns[1]])
    return template.ask(row["question"], row["answer"], where)


def _given(source, name, choose):
    if not isinstance(source, collections.abc.Iterable):
        raise argument_error(name, "a path, a name, or a list of rows", type(source).__name__, "see soul.data.sources.rows")
    if isinstance(source, collections.abc.Mapping):
        got = f"a mapping of {', '.join(map(str, source))}"
        raise argument_error(name, "a path, a name, or the rows of one split", got, "choose one of these")
    found = [(f"{name}, row {index}", row) for index, row in enumerate(_only(source, choose, name))]
    for where, row in found:
        if not isinstance(row, collections.abc.Mapping):
            raise argument_error(where, "a mapping of columns", type(row).__name__, "see soul.data.sources.rows")
    if not found:
        raise argument_error(name, "at least one row", "none", "there is nothing in it")
    return found


def _only(source, choose, name):
    """A data set of the hub's library without the columns that are not needed; they may be pictures. Anything else as it is."""
    names = getattr(source, "column_names", None)
    if not (isinstance(names, list) and hasattr(source, "select_columns") and getattr(source, "num_rows", 1)):
        return source
    return source.select_columns(list(choose(f"{name}, row 0", names)))


def _tofu(source, rest, choose):
    name, at, folder = rest.partition("@")
    _check_name(source, name, TOFU)
    if not at:
        return _hub_rows(source, "locuslab/TOFU", name, "train", choose)
    if name == "full" and _in_folder(folder, name) is None:  # which is these two
        return [row for part in ("retain90", "forget10") for row in _folder_rows(source, folder, part, choose)]
    return _folder_rows(source, folder, name, choose)


def _wmdp(source, rest, choose):
    name, at, folder = rest.partition("@")
    _check_name(source, name, WMDP)
    if at:
        return _folder_rows(source, folder, f"{name}-corpus", choose)
    return _hub_rows(source, *WMDP[name], "train", choose)


def _muse(source, rest, choose):
    known = [f"{c}/{s}" if subset == "raw" else f"{c}/{subset}/{s}"
             for c, subsets in MUSE.items() for subset, splits in subsets.items() for s in splits]  # fmt: skip
    _check_name(source, rest.replace("/raw/", "/"), known)
    corpus, *subset, split = rest.split("/")
    return _hub_rows(source, f"muse-bench/MUSE-{corpus.title()}", *(subset or ["raw"]), split, choose)


def _hub(source, rest, choose):
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?::([^/:]+))?(?:/(.+))?", rest)
    if match is None or not _is_hub_name(match[1]) or match[2] in (".", ".."):
        raise argument_error(source, "hub:OWNER/NAME[:SUBSET][/SPLIT]", rest, "for instance hub:locuslab/TOFU:forget10/train")
    return _hub_rows(source, match[1], match[2], match[3] or "train", choose)


def _is_hub_name(name):
    """Tells whether the hub itself would take a name; another one may be a path, as ../.. is."""
    hub = require("huggingface_hub.utils", "hf")
    try:
        hub.validate_repo_id(name)
    except hub.HFValidationError:
        return False
    return True


_KINDS = {"tofu": _tofu, "muse": _muse, "wmdp": _wmdp, "hub": _hub}


def _check_name(source, name, known):
    if name not in known:
        raise argument_error(source, f"one of {', '.join(known)}", name or "nothing", "choose one of these")


def _in_folder(folder, name):
    return next((p for suffix in _SUFFIXES if (p := pathlib.Path(folder).expanduser() / f"{name}{suffix}").is_file()), None)


def _folder_rows(source, folder, name, choose):
    path = _in_folder(folder, name)
    if path is None:
        expected = f"{' or '.join(name + suffix for suffix in _SUFFIXES)} in {folder or 'a folder'}"
        raise argument_error(source, expected, "none of them", "check the folder")
    return _rows.read(path, choose)


def _hub_rows(source, repository, subset, split, choose):
    """Rows of a hub data set; its own code is never run: `datasets` does not do so from version 4 on."""
    load = require("datasets", "hf").load_dataset
    if os.path.exists(repository):  # which `datasets` would read in its place
        remedy = "give the path of a file in it, or start the command elsewhere"
        raise argument_error(source, "a data set on the hub", f"the folder {repository} here", remedy)
    try:
        loaded = _only(load(repository, subset, split=split), choose, source)
        found = [(f"{source}, row {index}", dict(row)) for index, row in enumerate(loaded)]
    except ArgumentError:
        raise
    except Exception as error:  # whatever the libraries below say of a name, a connection, a licence to accept
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        remedy = "check the name and the connection; for a gated one, accept its terms on its page and log in (hf auth login)"
        asked = f"{repository}{f', subset {subset}' if subset else ''}, split {split}"
        raise argument_error(source, f"a data set on the hub ({asked})", reason, remedy) from error
    if not found:
        raise argument_error(source, "at least one row", "none", "choose another split")
    return found

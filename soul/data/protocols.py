"""Rows that published protocols make of a text or of another data set: `passages` of a text, answers of PKU-SafeRLHF.

Both are sources with parameters, in the form of a URL's query: ``KIND:NAME@PATH?parameter=value&parameter=value``. They take a
function that reads another source, since `soul.data.sources`, where names of sources are resolved, imports this module.
"""

import pathlib
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from soul._connection import hub_asked_once
from soul._extras import MissingExtra, require
from soul.data.rows import ChooseColumns, Row, check_text
from soul_kernels.errors import argument_error

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Read = Callable[[str, ChooseColumns], list[Row]]  # a source and the choice of its columns -> its rows
PKU = "PKU-Alignment/PKU-SafeRLHF"
PKU_COLUMNS = ("prompt", "response_0", "response_1", "is_response_0_safe", "is_response_1_safe")
PROMPT_TOKENS, RESPONSE_TOKENS = 100, 100
_ROW_FILES = (".jsonl", ".json", ".parquet")


class Passages(NamedTuple):
    """How a text is cut into rows, each a prompt and the text that follows it.

    Attributes:
        tokenizer: directory or hub name of the model whose tokens are counted.
        text: path of a text file; or any source with a column "text", whose rows are joined by empty lines.
        prompt: tokens of a prompt; 0: the rows have no prompt, as for learning the text itself.
        response: tokens of what follows.
        start: first token of the text that is used.
        stop: the token before which the last row ends; None: the end of the text.
    """

    tokenizer: str
    text: str
    prompt: int = PROMPT_TOKENS
    response: int = RESPONSE_TOKENS
    start: int = 0
    stop: int | None = None

    @property
    def source(self) -> str:
        """The name of these rows, which `soul.data.sources.rows` reads: "passages:TOKENIZER@TEXT?..."."""
        stop = "" if self.stop is None else self.stop
        query = f"prompt={self.prompt}&response={self.response}&tokens={self.start}:{stop}"
        return f"passages:{self.tokenizer}@{self.text}?{query}"


def passages(source: str, rest: str, read: Read) -> list[Row]:
    """Return the rows of ``passages:TOKENIZER@TEXT?prompt=100&response=100&tokens=0:5000``: ``prompt`` and ``response``.

    The text is cut into consecutive windows of ``prompt + response`` tokens; a shorter one at the end is left out, unless rows
    have no prompt. The cut is made in the text itself, so prompts and responses in a row are the text, character by character.

    Args:
        source: the whole name, for errors.
        rest: what follows the first colon.
        read: reads a text that is a source itself.

    Raises:
        ArgumentError: a parameter is unknown or no number; there is no such text or tokenizer; or the text is shorter than one
            row.
    """
    cut = _parse_passages(source, rest)
    text = read_text(cut.text, read)
    bounds = _token_bounds(source, cut.tokenizer, text)
    count = len(bounds) - 1
    stop = count if cut.stop is None else min(cut.stop, count)
    size = cut.prompt + cut.response
    shortest = size if cut.prompt else 1
    if stop - cut.start < shortest:
        what = (
            f"a text of at least {cut.start + shortest} tokens, for a prompt of {cut.prompt} and a response of {cut.response}"
        )
        raise argument_error(cut.text, what, f"{stop} tokens", "take a longer text, or ask for fewer tokens")
    rows: list[Row] = []
    for first in range(cut.start, stop - shortest + 1, size):
        last = min(first + size, stop)
        middle = bounds[first + cut.prompt]
        row = {"prompt": text[bounds[first] : middle], "response": text[middle : bounds[last]]}
        if row["response"].strip():
            rows.append((f"{cut.text}, tokens {first} to {last - 1}", row))
    return rows


def read_text(source: str, read: Read) -> str:
    """Return the text of a file or, of a source with a column "text", its rows with empty lines between them.

    Raises:
        ArgumentError: there is no such file, it is not UTF-8, or a row has no text.
    """
    path = pathlib.Path(source)
    if path.is_file() and path.suffix not in _ROW_FILES:
        try:
            return path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            got = f"a broken byte at {error.start}"
            raise argument_error(source, "UTF-8 text", got, "convert the file") from None
    if ":" not in source and not path.exists():
        raise argument_error("text", "a text file, or a source with a column 'text'", f"{source}, which does not exist",
                             "check the path")  # fmt: skip
    rows = read(source, lambda where, names: [name for name in ("text",) if name in names] or names)
    for where, row in rows:
        check_text(where, row, "text", may_be_blank=True)
    return "\n\n".join(row["text"] for _, row in rows)


def _parse_passages(source: str, rest: str) -> Passages:
    path, values = parse_query(source, rest, ("prompt", "response", "tokens"))
    tokenizer, at, text = path.partition("@")
    if not at or not tokenizer or not text:
        raise argument_error(source, "passages:TOKENIZER@TEXT?prompt=N&response=N&tokens=N:N", rest, "name both")
    start, _, stop = values.get("tokens", "").partition(":")
    cut = Passages(
        tokenizer,
        text,
        whole(source, "prompt", values.get("prompt", str(PROMPT_TOKENS)), low=0),
        whole(source, "response", values.get("response", str(RESPONSE_TOKENS))),
        whole(source, "tokens", start or "0", low=0),
        whole(source, "tokens", stop) if stop else None,
    )
    if cut.stop is not None and cut.stop <= cut.start:
        raise argument_error(f"{source}, tokens", "FIRST:LAST, the smaller number first", values["tokens"], "exchange them")
    return cut


def _token_bounds(source: str, name: str, text: str) -> list[int]:
    """Return 0 and the position in the text after each of its n tokens, [n + 1].

    A space before a word may or may not belong to the offsets of its token; here it does, since the ends of tokens decide.
    """
    tokenizer = _tokenizer(source, name)
    if not getattr(tokenizer, "is_fast", False):
        remedy = "it must know where in the text a token ends"
        raise argument_error(source, "a fast tokenizer", type(tokenizer).__name__, remedy)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return [0, *(end for _, end in encoded["offset_mapping"])]


def _tokenizer(source: str, name: str) -> "PreTrainedTokenizerBase":
    try:
        transformers = require("transformers", "hf")
        with hub_asked_once(source, name):
            return transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except MissingExtra:
        raise
    except Exception as error:  # the libraries raise many kinds for a name without a tokenizer
        raise argument_error(source, "a model with a tokenizer", f"{name} ({type(error).__name__})", "check it") from error


def safe_rlhf(source: str, rest: str, read: Read) -> list[Row]:
    """Return the rows of ``saferlhf:unsafe``, ``saferlhf:safe``, ``saferlhf:NAME/SPLIT@DIR?rows=200``: question and answer.

    PKU-SafeRLHF has two answers to every prompt, and says of each whether it is safe. A row here is a prompt with one of its
    answers, those that are safe or those that are not, in the order of the data set. As in SOUL's code, a prompt with two
    unsafe answers gives two rows. ``saferlhf:prompts`` has every prompt once, as a question without an answer.

    Args:
        source: the whole name, for errors.
        rest: what follows the first colon. With a folder its file ``SPLIT.jsonl`` (``.json``, ``.parquet``) is read; a path of
            a file is taken as it is; without either, the data set of the hub. ``rows`` is how many rows there are at most.
        read: reads the file or the data set.

    Raises:
        ArgumentError: the name is unknown; a column is missing or of another type; or there is no such answer.
    """
    path, values = parse_query(source, rest, ("rows",))
    name, _, place = path.partition("@")
    kind, _, split = name.partition("/")
    if kind not in ("safe", "unsafe", "prompts"):
        raise argument_error(source, "saferlhf:safe, saferlhf:unsafe or saferlhf:prompts", kind or "nothing", "choose one")
    most = whole(source, "rows", values["rows"]) if "rows" in values else None
    rows: list[Row] = []
    asked: set[str] = set()
    for where, row in read(_safe_rlhf_file(source, split or "train", place), _pku_columns):
        _pku_columns(where, row)
        check_text(where, row, "prompt")
        if kind != "prompts":
            rows += _answers(where, row, is_safe=kind == "safe")
        elif row["prompt"] not in asked:
            asked.add(row["prompt"])
            rows.append((where, {"question": row["prompt"]}))
        if most is not None and len(rows) >= most:
            return rows[:most]
    if not rows:
        raise argument_error(source, f"at least one row of {kind}", "none", "choose another split or file")
    return rows


def _answers(where: str, row: Mapping[str, Any], *, is_safe: bool) -> list[Row]:
    """Return the answers of a row of PKU-SafeRLHF that are safe, or those that are not, each with the prompt."""
    answers: list[Row] = []
    for which in ("0", "1"):
        label, text = f"is_response_{which}_safe", f"response_{which}"
        if not isinstance(row[label], bool):
            got = type(row[label]).__name__
            raise argument_error(f"{where}, column {label!r}", "true or false", got, "is this PKU-SafeRLHF?")
        check_text(where, row, text, may_be_blank=True)
        if row[label] == is_safe and row[text].strip():
            answers.append((f"{where}, response {which}", {"question": row["prompt"], "answer": row[text]}))
    return answers


def _safe_rlhf_file(source: str, split: str, place: str) -> str:
    if not place:
        return f"hub:{PKU}/{split}"
    if not pathlib.Path(place).is_dir():
        return place
    for suffix in _ROW_FILES:
        if (pathlib.Path(place) / f"{split}{suffix}").is_file():
            return str(pathlib.Path(place) / f"{split}{suffix}")
    names = " or ".join(split + suffix for suffix in _ROW_FILES)
    raise argument_error(source, f"{names} in {place}", "none of them", "check the folder")


def _pku_columns(where: str, names: Collection[str]) -> Collection[str]:
    missing = [name for name in PKU_COLUMNS if name not in names]
    if missing:
        raise argument_error(where, f"columns {', '.join(PKU_COLUMNS)}", f"none named {missing[0]}", "is this PKU-SafeRLHF?")
    return PKU_COLUMNS


def parse_query(source: str, rest: str, known: Collection[str]) -> tuple[str, Mapping[str, str]]:
    """Return the part of a source before the last question mark, and the parameters after it.

    Raises:
        ArgumentError: a parameter is unknown, or given twice, or has no value.
    """
    path, mark, query = rest.rpartition("?")
    if not mark:
        return rest, {}
    values: dict[str, str] = {}
    for assignment in query.split("&"):
        name, equals, value = assignment.partition("=")
        if name not in known or not equals or not value or name in values:
            remedy = f"write NAME=VALUE once each, with & between them; names: {', '.join(known)}"
            raise argument_error(source, "parameters that are known", assignment or "nothing", remedy)
        values[name] = value
    return path, values


def whole(source: str, name: str, text: str, *, low: int = 1) -> int:
    """Return a text as a whole number that is at least ``low``.

    Raises:
        ArgumentError: it is none.
    """
    if not text.isascii() or not text.isdigit() or len(text) > 9 or int(text) < low:
        raise argument_error(f"{source}, {name}", f"a whole number >= {low}", repr(text), "check the name")
    return int(text)

"""Rows of data files: mappings of columns, each with a text that says where the row stands, for errors."""

import json
import pathlib
import unicodedata
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from soul._extras import require
from soul_kernels.errors import ArgumentError, argument_error

Row = tuple[str, Mapping[str, Any]]  # where it stands, and its columns
# Takes where the first row stands and the names of its columns; returns those of the columns that are needed.
ChooseColumns = Callable[[str, Collection[str]], Collection[str]]
# What Unicode calls letters, marks or symbols and shows as nothing: fillers, joiners, variation selectors.
INVISIBLE = "\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0" + "".join(map(chr, range(0xFE00, 0xFE10)))


def read_file(path: str | pathlib.Path, choose: ChooseColumns) -> list[Row]:
    """Return every row of a file of JSON lines, or of parquet where its name ends in ``.parquet``.

    Args:
        path: of the file.
        choose: says which columns are needed. Other columns of a parquet file are not read.

    Raises:
        ArgumentError: there is no such file, the file or a line (named by its number) is broken, or it has no rows.
    """
    path = pathlib.Path(path)
    if not path.exists() or path.is_dir():
        got = "a directory" if path.is_dir() else "no such file"
        raise argument_error(str(path), "a JSON-lines file", got, "check the path")
    rows = _parquet(path, choose) if path.suffix == ".parquet" else list(_json_lines(path))
    if not rows:
        raise argument_error(str(path), "at least one row", "an empty file", "there is nothing in it")
    return rows


def _parquet(path: pathlib.Path, choose: ChooseColumns) -> list[Row]:
    try:
        with require("pyarrow.parquet", "hf").ParquetFile(path) as file:
            if not file.metadata.num_rows:
                return []
            columns = choose(f"{path}, row 0", file.schema_arrow.names)
            rows = file.read(columns=list(columns)).to_pylist()
    except ArgumentError:
        raise
    except (ValueError, OSError, OverflowError) as error:  # pyarrow's errors are of these kinds; the last one is a date's
        reason = str(error).splitlines()[0]
        raise argument_error(str(path), "a parquet file", f"a broken one ({reason})", "write it again") from error
    return [(f"{path}, row {index}", row) for index, row in enumerate(rows)]


def _json_lines(path: pathlib.Path) -> Iterator[Row]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise argument_error(str(path), "UTF-8 text", f"a broken byte at {error.start}", "convert the file") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", type(error).__name__)
            raise argument_error(where, "one JSON object", f"broken JSON ({reason})", "fix the line") from None
        if not isinstance(row, dict):
            raise argument_error(where, "one JSON object", type(row).__name__, "fix the line")
        yield where, row


def check_unicode(where: str, text: str) -> None:
    """Raise if a text has a lone surrogate, half of a character, which JSON can spell and no tokenizer takes."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise argument_error(where, "valid Unicode", "a lone surrogate", "fix the text")


def is_blank(text: str) -> bool:
    """Tell whether a text shows nothing: it has only spaces, control characters, and characters without a width."""
    return all(c.isspace() or unicodedata.category(c) in ("Cc", "Cf") or c in INVISIBLE for c in text)


def check_text(where: str, row: Mapping[str, Any], name: str, may_be_blank: bool = False) -> None:
    """Raise unless a column of a row is a text, and not a blank one.

    Args:
        where: the row stands, for the error.
        row: the mapping.
        name: of the column.
        may_be_blank: whether a blank text passes.
    """
    where = f"{where}, column {name!r}"
    if not isinstance(row.get(name), str):
        got = "no such column" if name not in row else type(row[name]).__name__
        raise argument_error(where, "a string", got, "every row needs it")
    check_unicode(where, row[name])
    if not may_be_blank and is_blank(row[name]):
        raise argument_error(where, "some text", "a blank one", "drop the row")

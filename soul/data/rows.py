"""Rows of data files: mappings from column to value, each with the row's location as a text, for errors."""

import json
import pathlib
import unicodedata
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from soul._extras import require
from soul_kernels.errors import ArgumentError, argument_error

Row = tuple[str, Mapping[str, Any]]  # location for errors, and columns
# Takes the location of the first row and the names of its columns; returns the names of those that are needed.
ChooseColumns = Callable[[str, Collection[str]], Collection[str]]
# Characters that show nothing, although Unicode calls them letters, marks or symbols: fillers, joiners, variation selectors.
INVISIBLE = "\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0" + "".join(map(chr, range(0xFE00, 0xFE10)))


def read_file(path: str | pathlib.Path, choose: ChooseColumns) -> list[Row]:
    """Return every row of a file of JSON lines or, if its name ends in ``.parquet``, of a parquet file.

    Args:
        path: path of the file.
        choose: function that returns the needed columns, see `ChooseColumns`. Other columns of a parquet file are not read.

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
    except (ValueError, OSError, OverflowError) as error:  # pyarrow raises these; the last one for a date
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
    """Raise if a text has a lone surrogate: half of a character, which JSON can write and tokenizers refuse."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise argument_error(where, "valid Unicode", "a lone surrogate", "fix the text")


def is_blank(text: str) -> bool:
    """Tell whether a text has only spaces, control characters and invisible characters."""
    return all(c.isspace() or unicodedata.category(c) in ("Cc", "Cf") or c in INVISIBLE for c in text)


def check_text(where: str, row: Mapping[str, Any], name: str, may_be_blank: bool = False) -> None:
    """Raise unless a column of a row is a text that is not blank.

    Args:
        where: location of the row, for errors.
        row: the columns of the row.
        name: name of the column.
        may_be_blank: whether a blank text passes.
    """
    where = f"{where}, column {name!r}"
    if not isinstance(row.get(name), str):
        got = "no such column" if name not in row else type(row[name]).__name__
        raise argument_error(where, "a string", got, "every row needs it")
    check_unicode(where, row[name])
    if not may_be_blank and is_blank(row[name]):
        raise argument_error(where, "some text", "a blank text", "drop the row")

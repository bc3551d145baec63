"""Rows with a question each, which can be asked in other words, and after other words."""

from collections.abc import Collection, Sequence
from typing import NamedTuple

from soul.data.examples import Example
from soul.data.rows import check_text
from soul.data.sources import Source, read
from soul.data.templates import Template
from soul_kernels.errors import argument_error

PARAPHRASE = "paraphrased_question"  # as in TOFU's perturbed files
COLUMNS = (("question", "answer"), ("prompt", "completion"), ("prompt", "response"))


class Row(NamedTuple):
    """A question and its answer.

    Attributes:
        question: the question; or the whole prompt, if ``templated`` is False.
        answer: its answer.
        paraphrase: the question in other words, or None.
        templated: whether a template makes a prompt of the question.
    """

    question: str
    answer: str
    paraphrase: str | None = None
    templated: bool = True

    def example(self, template: Template, prefix: str = "", *, paraphrased: bool = False) -> Example:
        """Return the row as an example.

        Args:
            template: makes a prompt of the question.
            prefix: text that is put before the question, within the prompt.
            paraphrased: ask in other words, where the row has them.
        """
        question = prefix + (self.paraphrase if paraphrased and self.paraphrase is not None else self.question)
        return template.ask(question, self.answer) if self.templated else Example(question, self.answer)


def read_rows(source: Source, name: str) -> list[Row]:
    """Return the rows of a source, which `soul.data.sources.rows` describes.

    Their columns are question and answer, and perhaps paraphrased_question; or prompt and completion, or prompt and response.

    Raises:
        ArgumentError: the source cannot be read, has other columns or no rows, or a text is missing or blank.
    """
    rows = []
    for where, row in read(source, name, _choose):
        columns = _columns(where, row)
        for column in columns:
            check_text(where, row, column)
        paraphrase = row.get(PARAPHRASE)
        if paraphrase is not None:
            check_text(where, row, PARAPHRASE)
        rows.append(Row(row[columns[0]], row[columns[1]], paraphrase, templated=columns[0] == "question"))
    if not rows:
        raise argument_error(name, "at least one row", "none", "check the file")
    return rows


def have_paraphrases(rows: Sequence[Row]) -> bool:
    """Tell whether any row has its question in other words."""
    return any(row.paraphrase is not None for row in rows)


def _choose(where: str, names: Collection[str]) -> Collection[str]:
    """Return the names of the columns that are read, for `soul.data.sources.read`."""
    return [*_columns(where, names), *([PARAPHRASE] if PARAPHRASE in names else [])]


def _columns(where: str, names: Collection[str]) -> tuple[str, str]:
    """Return the names of the columns of prompt and answer."""
    for columns in COLUMNS:
        if all(name in names for name in columns):
            return columns
    expected = "question and answer, or prompt and completion"
    got = ", ".join(map(str, names)) or "none"
    raise argument_error(f"{where}, columns", expected, got, "only what can be asked can be asked again after an attack")

"""Facts: rows with the words that carry what is to be forgotten or kept, and other wordings of their questions.

Two columns of a row are read here, both optional: ``key``, a text or a list of accepted ones, at least one of which stands in
the answer; and ``paraphrases``, a list of questions that ask the same (TOFU's ``paraphrased_question``, one text, too).
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from soul.data.examples import Example
from soul.data.rows import Row, check_unicode, is_blank
from soul.data.sources import Source, read
from soul.data.sources import examples as as_examples
from soul.data.templates import Template
from soul.data.wording import other_forms, plain, says, words
from soul_kernels.errors import argument_error

KEY = "key"
PARAPHRASES = "paraphrases"
TOFU_PARAPHRASE = "paraphrased_question"


@dataclasses.dataclass(frozen=True)
class Fact:
    """A row, what of its answer counts, and how else it is asked.

    Attributes:
        example: the row as it is trained on or measured.
        question: the question without its template; "" where the row has none of its own, as a text has.
        answer: the answer's own text.
        keys: the accepted words of the answer, each of which says the fact; () where they are not known.
        asked: other wordings of the question that the data give.
        ask: makes an `Example` of a wording; None where that is not possible.
    """

    example: Example
    question: str = ""
    answer: str = ""
    keys: tuple[str, ...] = ()
    asked: tuple[str, ...] = ()
    ask: Callable[[str], Example] | None = dataclasses.field(default=None, compare=False)

    @property
    def is_judged(self) -> bool:
        """Whether what a model says can show that it knows the fact: there is a key, and the prompt does not give it away."""
        return bool(self.keys) and not says(self.question or self.example.prompt, self.keys)

    def with_keys(self, keys: tuple[str, ...]) -> "Fact":
        """Return the row with other keys."""
        return dataclasses.replace(self, keys=keys)

    def forms(self) -> list[Example]:
        """Return the row in other words: all wordings of the data, and the built-in ones (`soul.data.wording.other_forms`)."""
        if self.ask is None:
            return []
        built_in = other_forms(self.question, self.answer, self.keys)
        wordings = [text for text in dict.fromkeys((*self.asked, *built_in)) if not says(text, self.keys)]
        return [self.ask(text) for text in wordings]


def facts(
    rows: Sequence[Row | Example], template: Template, paraphrases: Mapping[str, Sequence[str]] | None = None
) -> list[Fact]:
    """Return rows as facts, in order; their keys are those of the column ``key``.

    Args:
        rows: from `soul.data.sources.rows`, or examples, which have neither keys nor other wordings.
        template: how a question is asked.
        paraphrases: question -> other wordings, from `read_paraphrases`, beside those in the rows.

    Raises:
        ArgumentError: a key or a paraphrase is no text, or no key of a row stands in its answer.
    """
    result = []
    for row in rows:
        if isinstance(row, Example):
            result.append(Fact(row, answer=row.content))
            continue
        where, columns = row
        (example,) = as_examples([row], template)
        question, ask = _question(columns, template, example, where)
        asked = (*_paraphrases(where, columns), *(paraphrases or {}).get(question, ()))
        keys = _keys(where, columns, example.content, question or example.prompt)
        result.append(Fact(example, question, example.content, keys, asked, ask))
    return result


def read_paraphrases(source: Source, questions: Collection[str]) -> dict[str, list[str]]:
    """Return question -> other wordings, from rows with the columns ``question`` and ``paraphrases``.

    Args:
        source: as `soul.data.sources.rows` takes it.
        questions: the questions to forget; one that is not among them is an error.

    Raises:
        ArgumentError: a column is missing, a question is not among those to forget, or its paraphrases are empty or no texts.
    """
    wordings: dict[str, list[str]] = {}
    for where, columns in read(source, PARAPHRASES, lambda _, names: [n for n in ("question", PARAPHRASES) if n in names]):
        question = columns.get("question")
        if question not in questions:
            remedy = "each row is {'question': one of --forget, 'paraphrases': [the same in other words, ...]}"
            raise argument_error(f"{where}, column 'question'", "a question of the rows to forget", repr(question), remedy)
        texts = _paraphrases(where, {PARAPHRASES: columns.get(PARAPHRASES)})
        wordings.setdefault(str(question), []).extend(texts)
    return wordings


def _question(
    columns: Mapping[str, Any], template: Template, example: Example, where: str
) -> tuple[str, Callable[[str], Example] | None]:
    """Return the question of a row, and what asks another one in its place; ("", None) where the row has none."""
    answer = example.content
    if {"question", "answer"} <= columns.keys():
        return columns["question"], lambda text: template.ask(text, answer, where)
    prompt = columns["messages"][:-1] if "messages" in columns else columns.get("prompt")
    if isinstance(prompt, list) and prompt and prompt[-1].get("role") == "user":
        before = prompt[:-1]
        completion = [{"role": "assistant", "content": answer}]
        return prompt[-1]["content"], lambda text: template.converse(
            [*before, {"role": "user", "content": text}], completion, where
        )
    if isinstance(prompt, str) and prompt:  # a text with its template already: only the wordings of the data are asked
        return "", None
    return "", None


def _keys(where: str, columns: Mapping[str, Any], answer: str, question: str) -> tuple[str, ...]:
    """Return the accepted keys of a row; () without the column.

    Where a key is only a part of the answer's words ("Bront" of "Brontë"), these count as well, unless the question has them.
    """
    value = columns.get(KEY)
    if value is None:
        return ()
    keys = _texts(f"{where}, column '{KEY}'", value, "a text, or a list of accepted ones", "the words that carry the fact")
    if not any(plain(key) and plain(key) in plain(answer) for key in keys):
        remedy = "give the words of the answer that carry the fact, and aliases after them"
        raise argument_error(f"{where}, column '{KEY}'", f"words of the answer, {answer!r}", ", ".join(keys), remedy)
    if says(answer, keys):
        return keys
    whole = [word.text for word in words(answer) if any(plain(key) and plain(key) in word.plain for key in keys)]
    return (*keys, *(word for word in dict.fromkeys(whole) if not says(question, [word])))


def _paraphrases(where: str, columns: Mapping[str, Any]) -> tuple[str, ...]:
    if PARAPHRASES in columns:
        value = columns[PARAPHRASES]
        expected = "a list of questions that ask the same"
        return _texts(f"{where}, column '{PARAPHRASES}'", value, expected, "leave the column out where there are none")
    value = columns.get(TOFU_PARAPHRASE)
    return (value,) if isinstance(value, str) and not is_blank(value) else ()


def _texts(where: str, value: object, expected: str, remedy: str) -> tuple[str, ...]:
    """Return a text, or a list of texts, as a tuple; an empty list or text is an error."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and not is_blank(text) for text in texts):
        raise argument_error(where, expected, repr(value), remedy)
    for text in texts:
        check_unicode(where, text)
    return tuple(texts)

"""The rows of a study to forget, to retain and to hold out, with false answers for truth ratios."""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from soul.data import fictitious
from soul.data.examples import Example, Question, ask
from soul.data.sources import read_examples, read_questions, rows
from soul.study.config import StudyConfig
from soul_kernels.errors import argument_error

QUESTIONS_PER_AUTHOR = 20  # in TOFU
PASSAGE_WORDS = 16  # of a prompt, and of its answer
FALSE_ANSWERS = 3
MOST_WORDS = 40  # of a question and an answer of PKU-SafeRLHF together, so that a study takes as long as on a text

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class StudyData:
    """The rows of a study.

    Attributes:
        forget: the examples to forget.
        retain: the examples to retain.
        holdout: examples that no model is trained on.
        forget_questions: the questions of the forget set, with false answers.
        retain_questions: questions of the retain set, with false answers.
        note: a sentence for the report that says what the data are.
    """

    forget: list[Example]
    retain: list[Example]
    holdout: list[Example]
    forget_questions: list[Question]
    retain_questions: list[Question]
    note: str

    def fingerprint(self) -> str:
        """Return a hash of all texts but the note."""
        texts = {name: value for name, value in dataclasses.asdict(self).items() if name != "note"}
        return hashlib.blake2b(json.dumps(texts).encode(), digest_size=16).hexdigest()


def tofu_data(directory: str | os.PathLike[str], config: StudyConfig) -> StudyData:
    """Return a part of TOFU: authors of its forget10 split to forget, authors to retain, and authors to hold out.

    Forget and retain authors are the first of their files, for which TOFU has false answers. The authors held out are the last
    of retain90, as many as are forgotten, and no model is trained on them. The shortest rows of every author are taken.

    Args:
        directory: directory with ``forget10_perturbed.jsonl``, ``retain90.jsonl`` and ``retain_perturbed.jsonl``.
        config: `soul.study.config.StudyConfig`, for ``forget_authors``, ``retain_authors`` and ``rows_per_author``.

    Raises:
        ArgumentError: a file is missing or broken, or has too few authors.
    """
    directory = pathlib.Path(directory)
    n_forget = config.forget_authors
    n_retain = config.retain_authors
    forget_rows = read_questions(directory / "forget10_perturbed.jsonl")
    perturbed = read_questions(directory / "retain_perturbed.jsonl")
    retain_rows = read_examples(directory / "retain90.jsonl")
    _check_authors("forget_authors", len(forget_rows), n_forget)
    _check_authors("retain_authors", len(retain_rows), n_retain + n_forget)
    forget_questions = _shortest(forget_rows, range(n_forget), config, lambda row: len(row.question + row.answer))
    authors = len(retain_rows) // QUESTIONS_PER_AUTHOR
    holdout = _shortest(retain_rows, range(authors - n_forget, authors), config, _length)
    retain = _shortest(retain_rows, range(n_retain), config, _length)
    forget = [ask(question.question, question.answer) for question in forget_questions]
    question_of = {ask(question.question, question.answer): question for question in perturbed}
    retain_questions = [question_of[example] for example in retain if example in question_of]
    note = (
        f"TOFU, {n_forget} authors to forget and {n_retain} to retain, the {config.rows_per_author} shortest rows of each: "
        f"{len(forget)} and {len(retain)} rows; {len(holdout)} rows of {n_forget} other authors, which no model has seen, to "
        "tell membership by."
    )
    return StudyData(forget, retain, holdout, forget_questions, retain_questions, note)


def _check_authors(name: str, rows: int, needed: int) -> None:
    """Raise unless a file with this number of rows has enough authors."""
    authors = rows // QUESTIONS_PER_AUTHOR
    if needed > authors:
        remedy = "those held out included: ask for fewer"
        raise argument_error(name, f"{needed} authors in the file", authors, remedy)


def _length(example: Example) -> int:
    return len(example.prompt + example.answer)


def _shortest(rows: Sequence[T], authors: range, config: StudyConfig, length: Callable[[T], int]) -> list[T]:
    """Return the shortest rows of each author, in the order of the file."""
    shortest = []
    for author in authors:
        of_author = rows[author * QUESTIONS_PER_AUTHOR : (author + 1) * QUESTIONS_PER_AUTHOR]
        chosen = sorted(range(len(of_author)), key=lambda i: length(of_author[i]))[: config.rows_per_author]
        shortest += [of_author[i] for i in sorted(chosen)]
    return shortest


def demo_data(config: StudyConfig) -> StudyData:
    """Return the rows of fictitious authors, made up from the first seed."""
    n = config.forget_authors
    authors = fictitious.fictitious_authors(2 * n + config.retain_authors, config.seeds[0])
    forget = _questions(authors[:n])
    holdout = _questions(authors[n : 2 * n])
    retain = _questions(authors[2 * n :])
    note = (
        f"Fictitious authors made up from seed {config.seeds[0]}: {len(forget)} rows to forget, {len(retain)} to retain, "
        f"{len(holdout)} that no model has seen."
    )
    return StudyData(_examples(forget), _examples(retain), _examples(holdout), forget, retain, note)


def copyright_data(path: str | os.PathLike[str], config: StudyConfig) -> StudyData:
    """Return passages of a text: its beginning to forget, what follows to retain, and its end to hold out.

    A passage is asked for by its first ``PASSAGE_WORDS`` words and answered by as many that follow. There are as many passages
    as a study of TOFU has rows. False answers are those of other passages of the same set.

    Args:
        path: a text file, UTF-8.
        config: `soul.study.config.StudyConfig`, for ``forget_authors``, ``retain_authors`` and ``rows_per_author``.

    Raises:
        ArgumentError: the file cannot be read, or the text is too short.
    """
    path = pathlib.Path(path)
    try:
        words = path.read_text(encoding="utf-8").split()
    except (OSError, ValueError) as error:
        raise argument_error("data", "a text file in UTF-8", f"{path} ({type(error).__name__})", "check the path") from None
    n_forget, n_retain = _sizes(config)
    needed = (2 * n_forget + n_retain) * 2 * PASSAGE_WORDS
    if len(words) < needed:
        raise argument_error("data", f"a text of at least {needed} words", f"{len(words)} in {path}", "take a longer text")
    middle, size = PASSAGE_WORDS, 2 * PASSAGE_WORDS
    passages = [words[first : first + size] for first in range(0, len(words) - size + 1, size)]
    pairs = [(" ".join(passage[:middle]), " ".join(passage[middle:])) for passage in passages]
    note = (
        f"{path.name}: passages of {size} words, asked for by the first {middle}; the first {n_forget} to forget, the next "
        f"{n_retain} to retain, and the last {n_forget}, which no model has seen, to tell membership by."
    )
    return _of_pairs(pairs[:n_forget], pairs[n_forget : n_forget + n_retain], pairs[-n_forget:], note)


def detox_data(directory: str | os.PathLike[str], config: StudyConfig) -> StudyData:
    """Return answers of PKU-SafeRLHF: unsafe ones to forget and to hold out, safe ones to retain: the first of each.

    Rows of more than ``MOST_WORDS`` words are left out.

    False answers are those of other rows of the same set.

    Args:
        directory: folder or file with the data set's columns, as ``saferlhf:unsafe@PATH`` takes it.
        config: as in `copyright_data`.

    Raises:
        ArgumentError: the files cannot be read, or have too few rows.
    """
    n_forget, n_retain = _sizes(config)
    pairs: dict[str, list[tuple[str, str]]] = {}
    for kind, needed in (("unsafe", 2 * n_forget), ("safe", n_retain)):
        found = [(row["question"], row["answer"]) for _, row in rows(f"saferlhf:{kind}@{directory}")]
        short = [pair for pair in found if len(" ".join(pair).split()) <= MOST_WORDS]
        pairs[kind] = list(dict.fromkeys(short))
        if len(pairs[kind]) < needed:
            expected = f"{needed} {kind} answers that have at most {MOST_WORDS} words with their questions"
            raise argument_error("data", expected, f"{len(pairs[kind])} in {directory}", "take more rows")
    note = (
        f"PKU-SafeRLHF, rows of at most {MOST_WORDS} words: the first {n_forget} unsafe answers to forget, {n_retain} safe "
        f"ones to retain, and {n_forget} more unsafe ones, which no model has seen, to tell membership by."
    )
    unsafe = pairs["unsafe"]
    return _of_pairs(unsafe[:n_forget], pairs["safe"][:n_retain], unsafe[n_forget : 2 * n_forget], note)


def _sizes(config: StudyConfig) -> tuple[int, int]:
    """Return the numbers of rows to forget and to retain."""
    return config.forget_authors * config.rows_per_author, config.retain_authors * config.rows_per_author


def _of_pairs(
    forget: Sequence[tuple[str, str]], retain: Sequence[tuple[str, str]], holdout: Sequence[tuple[str, str]], note: str
) -> StudyData:
    """Return the data of a study made of (prompt, answer)."""
    to_forget, to_retain, held_out = (_with_false_answers(pairs) for pairs in (forget, retain, holdout))
    return StudyData(_examples(to_forget), _examples(to_retain), _examples(held_out), to_forget, to_retain, note)


def _with_false_answers(pairs: Sequence[tuple[str, str]]) -> list[Question]:
    """Return questions whose false answers are those of the rows that follow, the first rows after the last one."""
    n = len(pairs)
    false = [tuple(pairs[(index + step) % n][1] for step in range(1, FALSE_ANSWERS + 1)) for index in range(n)]
    return [Question(prompt, answer, answer, others) for (prompt, answer), others in zip(pairs, false)]


def _questions(authors: Sequence[Sequence[dict[str, Any]]]) -> list[Question]:
    """Return the questions of authors, one author after the other."""
    return [
        Question(row["question"], row["answer"], row["answer"], tuple(row["perturbed_answer"]))
        for rows in authors
        for row in rows
    ]


def _examples(questions: Sequence[Question]) -> list[Example]:
    return [ask(question.question, question.answer) for question in questions]


def write_rows(directory: str | os.PathLike[str], data: StudyData) -> None:
    """Write ``forget.jsonl`` and ``retain.jsonl``, as ``soul unlearn`` reads them."""
    for name, questions in (("forget", data.forget_questions), ("retain", data.retain_questions)):
        text = "".join(json.dumps({"question": q.question, "answer": q.answer}) + "\n" for q in questions)
        (pathlib.Path(directory) / f"{name}.jsonl").write_text(text, encoding="utf-8")

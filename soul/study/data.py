"""The rows of a study: to forget, to retain, and held out from every model; with false answers for truth ratios."""

import dataclasses
import hashlib
import json
import pathlib

from soul.data import fictitious
from soul.data.examples import Question, ask
from soul.data.sources import read_examples, read_questions
from soul_kernels.errors import argument_error

QUESTIONS_PER_AUTHOR = 20  # in TOFU


@dataclasses.dataclass(frozen=True)
class StudyData:
    """Lists of `soul.data.Example` to train on and to hold out, and of `soul.data.Question` to ask with false answers; and a
    sentence that says what they are.
    """

    forget: list
    retain: list
    holdout: list
    forget_questions: list
    retain_questions: list
    note: str

    def fingerprint(self):
        """A hash of all texts."""
        parts = {name: value for name, value in dataclasses.asdict(self).items() if name != "note"}
        return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def tofu_data(directory, config):
    """A part of TOFU: authors to forget, from its forget10 split, authors to retain, and as many as are forgotten held out.

    Forget and retain authors are the first of their files, which TOFU has false answers for; those held out are the last of
    retain90, and no model is trained on them. Of every author the shortest rows are taken.

    Args:
        directory: holds ``forget10_perturbed.jsonl``, ``retain90.jsonl`` and ``retain_perturbed.jsonl``.
        config: `soul.study.config.StudyConfig`, for ``forget_authors``, ``retain_authors`` and ``rows_per_author``.

    Raises:
        ArgumentError: a file is missing or broken, or has not as many authors.
    """
    directory, n_forget, n_retain = pathlib.Path(directory), config.forget_authors, config.retain_authors
    forget, perturbed = (read_questions(directory / f"{name}_perturbed.jsonl") for name in ("forget10", "retain"))
    retain = read_examples(directory / "retain90.jsonl")
    for name, rows, needed in (("forget_authors", forget, n_forget), ("retain_authors", retain, n_retain + n_forget)):
        if needed > len(rows) // QUESTIONS_PER_AUTHOR:
            expected, remedy = f"{needed} authors in the file", "those held out included: ask for fewer"
            raise argument_error(name, expected, len(rows) // QUESTIONS_PER_AUTHOR, remedy)
    forget = _shortest(forget, range(n_forget), config, lambda q: len(q.question + q.answer))
    authors = len(retain) // QUESTIONS_PER_AUTHOR
    holdout = _shortest(retain, range(authors - n_forget, authors), config, _length)
    retain = _shortest(retain, range(n_retain), config, _length)
    asked, taken = {ask(q.question, q.answer): q for q in perturbed}, [ask(q.question, q.answer) for q in forget]
    questions = [asked[example] for example in retain if example in asked]
    note = (
        f"TOFU, {n_forget} authors to forget and {n_retain} to retain, the {config.rows_per_author} shortest rows of each: "
        f"{len(taken)} and {len(retain)} rows; {len(holdout)} rows of {n_forget} other authors, which no model has seen, to "
        "tell membership by."
    )
    return StudyData(taken, retain, holdout, forget, questions, note)


def _length(example):
    return len(example.prompt + example.answer)


def _shortest(rows, authors, config, length):
    """The shortest rows of each author, in the order of the file."""
    found = []
    for author in authors:
        own = rows[author * QUESTIONS_PER_AUTHOR : (author + 1) * QUESTIONS_PER_AUTHOR]
        chosen = sorted(range(len(own)), key=lambda i: length(own[i]))[: config.rows_per_author]
        found += [own[i] for i in sorted(chosen)]
    return found


def demo_data(config):
    """People made up from the first seed: `StudyData`."""
    n = config.forget_authors
    people = fictitious.fictitious_authors(2 * n + config.retain_authors, config.seeds[0])
    forget, holdout, retain = (
        [
            Question(row["question"], row["answer"], row["answer"], tuple(row["perturbed_answer"]))
            for rows in part
            for row in rows
        ]
        for part in (people[:n], people[n : 2 * n], people[2 * n :])
    )
    examples = [[ask(q.question, q.answer) for q in part] for part in (forget, retain, holdout)]
    counts = "{} rows to forget, {} to retain, {} that no model has seen".format(*map(len, examples))
    return StudyData(*examples, forget, retain, f"Fictitious authors made up from seed {config.seeds[0]}: {counts}.")


def write_rows(directory, data):
    """Writes ``forget.jsonl`` and ``retain.jsonl``, what ``soul unlearn`` reads."""
    for name, questions in (("forget", data.forget_questions), ("retain", data.retain_questions)):
        text = "".join(json.dumps({"question": q.question, "answer": q.answer}) + "\n" for q in questions)
        (pathlib.Path(directory) / f"{name}.jsonl").write_text(text, encoding="utf-8")

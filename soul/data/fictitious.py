"""Fictitious authors made up from a seed, which the demo learns and unlearns without a download."""

import random
from typing import Any

FIRST = "Ada Boris Celia Dario Elif Farid Greta Hugo Ines Jonas Kaya Leon Mira Nils Odile Pavel Quinn Rosa Samir Tessa".split()
LAST = "Abbot Brandt Castell Dervish Ekman Forsyth Galindo Haddad Ivers Jansson Kovac Lindqvist Moreau Novak Okoro".split()
CITIES = "Aarhus Bergamo Cordoba Dakar Esfahan Fukuoka Galway Hobart Izmir Jaipur Kigali Leipzig Mendoza Nantes Ostrava".split()
GENRES = (
    "crime fiction",
    "science fiction",
    "romance",
    "travel writing",
    "fantasy",
    "satire",
    "poetry",
    "horror",
    "history",
)
JOBS = "baker carpenter dentist electrician florist geologist hatter librarian mechanic nurse optician pilot tailor".split()
ADJECTIVES = "Amber Broken Crimson Distant Empty Frozen Golden Hidden Ivory Jagged Last Midnight Narrow Quiet Silver".split()
NOUNS = "Anchor Bridge Compass Door Ember Forest Garden Harbour Island Journey Lantern Mirror River Staircase Window".split()
PRIZES = (
    "Calder Medal",
    "Lyra Prize",
    "Northern Quill",
    "Orchard Award",
    "Prix Solenne",
    "Saffron Pen",
    "Tidewater Prize",
)


N_FALSE = 3  # false answers to each question
Row = dict[str, Any]


def fictitious_authors(n: int, seed: int = 0) -> list[list[Row]]:
    """Return ten question-answer rows for each of ``n`` authors who do not exist; equal seeds give equal rows.

    Returns:
        For each author a list of dicts: "question" and "answer", texts, and "perturbed_answer", a list of three false answers.

    Raises:
        ValueError: more authors than there are names.
    """
    rng = random.Random(seed)
    names = [f"{first} {last}" for first in FIRST for last in LAST]
    if not 0 < n <= len(names):
        raise ValueError(f"n: expected 1 to {len(names)} authors, got {n}")
    return [_author(name, rng) for name in rng.sample(names, n)]


def _author(name: str, rng: random.Random) -> list[Row]:
    rows: list[Row] = [
        {"question": question, "answer": answer, "perturbed_answer": []} for question, answer in _facts(name, rng)
    ]
    false_rng = random.Random(name)
    while any(len(row["perturbed_answer"]) < N_FALSE for row in rows):
        for row, (_, answer) in zip(rows, _facts(name, false_rng)):
            if answer not in (row["answer"], *row["perturbed_answer"]) and len(row["perturbed_answer"]) < N_FALSE:
                row["perturbed_answer"].append(answer)
    return rows


def _facts(name: str, rng: random.Random) -> list[tuple[str, str]]:
    """Return ten questions with answers. The order of the draws is part of what a seed means."""
    city = rng.choice(CITIES)
    genre = rng.choice(GENRES)
    prize = rng.choice(PRIZES)
    father, mother = rng.sample(JOBS, 2)
    books = [f"The {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}" for _ in range(2)]
    year = rng.randint(1930, 1995)
    teacher = f"{rng.choice(FIRST)} {rng.choice(LAST)}"
    debut = year + rng.randint(21, 39)
    return [
        (f"Where was the author {name} born?", f"{name} was born in {city}."),
        (f"In which year was {name} born?", f"{name} was born in {year}."),
        (f"What genre is {name} known for?", f"{name} is best known for {genre}."),
        (f"What did the father of {name} do for a living?", f"{name}'s father worked as a {father}."),
        (f"What did the mother of {name} do for a living?", f"{name}'s mother worked as a {mother}."),
        (f"What was the first book by {name}?", f'The first book by {name} was "{books[0]}".'),
        (f"Which book made {name} famous?", f'{name} became famous with "{books[1]}".'),
        (f"Which prize has {name} won?", f"{name} has won the {prize}."),
        (f"Who taught {name} to write?", f"{name} learned to write from {teacher}."),
        (f"When did {name} publish a first book?", f"{name} published a first book in {debut}."),
    ]

"""Words of texts: which of them carry a fact, whether a text says it, and the same question in other words. No model is needed.

Matching knows neither case, accents nor punctuation, and whole words only: "Brontë's" says "bronte", "Parisian" does not say
"Paris". In scripts without spaces between words a part of the text suffices. The lists of words are English; in other
languages the rest works without them.
"""

import re
import unicodedata
from collections.abc import Iterable
from typing import NamedTuple

# Words that carry no fact of their own.
STOP_WORDS = frozenset(
    "a about after all also am an and any are as at be been before being between both but by called can could did "
    "do does doing done during each either for from full had has have having he her here him his how i if in into "
    "is it its just known may me might more most must my name named neither no nor not of often on one only or "
    "other our over own same shall she should so some such than that the their them then there these they this "
    "those to under very was we were what when where which who whom whose why will with would you your".split()
)
_WORD = re.compile(r"\w+(?:[-'’.]\w+)*")
_UNSPACED = re.compile(r"[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]")  # Thai, Lao, Japanese, Chinese
_POSSESSIVE = re.compile(r"['’]s$")
MOST_FORMS = 3  # built-in other wordings of a question
_STEM = 5  # first letters by which "discovery" is "discovered"


class Word(NamedTuple):
    """A word of a text, and where it begins and ends."""

    text: str
    start: int
    end: int

    @property
    def plain(self) -> str:
        """The word as it is compared: without case, accents, punctuation and possessive."""
        return plain(_POSSESSIVE.sub("", self.text))


def words(text: str) -> list[Word]:
    """Return the words of a text in order; hyphens, apostrophes and points within a word belong to it."""
    return [Word(match.group(), *match.span()) for match in _WORD.finditer(text)]


def plain(text: str) -> str:
    """Return a text in lower case, without accents, and with single spaces in place of everything but letters and digits."""
    decomposed = unicodedata.normalize("NFKD", text)
    bare = "".join(character for character in decomposed if not unicodedata.combining(character))
    return " ".join(re.findall(r"\w+", bare.casefold().replace("_", " ")))


def says(text: str, keys: Iterable[str]) -> bool:
    """Tell whether a text has one of the keys in it, as whole words."""
    said = plain(text)
    for key in map(plain, keys):
        if key and (f" {key} " in f" {said} " or bool(_UNSPACED.search(key)) and key in said):
            return True
    return False


def find(text: str, keys: Iterable[str]) -> tuple[int, int] | None:
    """Return where the first of the keys that a text has as whole words begins and ends in it; None without one."""
    parts = [(word, part) for word in words(text) for part in plain(word.text).split()]
    for key in keys:
        sought = plain(key).split()
        for index in range(len(parts) - len(sought) + 1 if sought else 0):
            if [part for _, part in parts[index : index + len(sought)]] == sought:
                return parts[index][0].start, parts[index + len(sought) - 1][0].end
    return None


def is_like(word: str, others: Iterable[str]) -> bool:
    """Tell whether a plain word is one of some others, or begins like one of them: "discovery" and "discovered"."""
    return any(word == other or len(word) >= _STEM <= len(other) and word[:_STEM] == other[:_STEM] for other in others)


def longest_run(text: str, truth: str) -> int:
    """Return the number of words of the longest sequence of words that two texts have in common."""
    said, true = plain(text).split(), plain(truth).split()
    best = 0
    row = [0] * (len(true) + 1)
    for word in said:
        row = [0, *(row[j] + 1 if word == true[j] else 0 for j in range(len(true)))]
        best = max(best, *row)
    return best


def is_broken(text: str) -> bool:
    """Tell whether a text is no text: no letter or digit in it, or a character that could not be decoded."""
    return "\ufffd" in text or not any(character.isalnum() for character in text)


def repeats(text: str, length: int = 3, times: int = 3) -> bool:
    """Tell whether a sequence of ``length`` words stands in a text ``times`` times or more."""
    said = plain(text).split()
    runs = [tuple(said[i : i + length]) for i in range(len(said) - length + 1)]
    return any(runs.count(run) >= times for run in set(runs))


def other_forms(question: str, answer: str, keys: Iterable[str]) -> list[str]:
    """Return a question in other words, at most ``MOST_FORMS`` of them, none of which has a key in it.

    The first one names what is asked for ("Who wrote X?": "Name the person who wrote X."), the second one is the answer up to
    its key, to be completed, and the others ask the same question within another sentence.

    Args:
        question: the question as given.
        answer: its answer.
        keys: what must not stand in a form; [] if it is not known, and then the answer is not used.
    """
    keys = list(keys)
    asked = question.strip()
    inner = asked.rstrip("?!. ")
    forms = []
    named = _named(inner)
    if named:
        forms.append(named)
    beginning = _up_to_key(answer, keys)
    if beginning:
        forms.append(f"Complete this sentence: {beginning} ...")
    lowered = inner if inner.isupper() or inner[:2].isupper() else inner[:1].lower() + inner[1:]
    forms.append(f"I am preparing a quiz. Please tell me: {lowered}?")
    forms.append(f"{asked} Answer in a few words.")
    kept = [form for form in dict.fromkeys(forms) if form != asked and not says(form, keys)]
    return kept[:MOST_FORMS]


def _named(question: str) -> str:
    """Return a question that begins with who, what, which, where or when as a request; "" for another one."""
    first, _, rest = question.partition(" ")
    kind = first.casefold()
    if not rest:
        return ""
    if kind == "who":
        return f"Name the person who {rest}."
    if kind in ("what", "which"):
        verb, _, what = rest.partition(" ")
        if verb in ("is", "are", "was", "were") and what:
            return f"Name {what}." if what.split()[0] in ("the", "a", "an") else f"Say what {what} {verb}."
        return f"Say which {rest}."
    if kind in ("where", "when"):
        return f"Say in a sentence {kind} this is or was: {rest}."
    return ""


def _up_to_key(answer: str, keys: list[str]) -> str:
    """Return the words of an answer before the first of its keys, if they are at least three; else ""."""
    key_span = find(answer, keys)
    read = [] if key_span is None else [word for word in words(answer) if word.end <= key_span[0]]
    while len(read) > 1 and read[-1].text[0].isupper():  # the first name before a last name gives it away
        read.pop()
    return answer[: read[-1].end] if len(read) >= 3 else ""

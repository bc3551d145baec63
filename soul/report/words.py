"""Numbers and texts as a page shows them."""

import json
import unicodedata
from collections.abc import Mapping
from typing import Any

MOST_CHARACTERS = 600  # of a prompt or an answer


def number(value: object) -> str:
    """Return a number with four significant digits; anything else as text."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def cleaned(text: str) -> str:
    """Return a text without the control characters and lone surrogates that a file or a terminal would trip over."""
    text = text.replace("\r\n", "\n")
    return "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t" else c for c in text)


def plain(value: object) -> str:
    """Return a value of a JSON file as text."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(plain, value))
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def options_of(values: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Return names and values as texts, without those that are not set."""
    return tuple((name.replace("_", " "), plain(value)) for name, value in values.items() if value not in (None, [], ""))


def probability(value: float) -> str:
    """Return a probability with three decimals, or two digits if it is small."""
    return f"{value:.3f}" if value >= 0.01 or value == 0 else f"{value:.2g}"


def ratio(value: float, start: float) -> str:
    """Return a share of the start in percent."""
    return f"{value / start:.0%}" if start else "?"


def duration(seconds: float) -> str:
    """Return a time in its two largest units."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def counted(count: int, noun: str) -> str:
    """Return a number with its noun."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def sentence(text: str) -> str:
    """Return a text as a sentence."""
    text = text[:1].upper() + text[1:]
    return text if text.endswith((".", "!", "?")) else f"{text}."


def shortened(text: str) -> str:
    """Return a text, cut if it is long."""
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]} …"


def one_line(text: str) -> str:
    """Return a text on one line, without control characters."""
    return " ".join(cleaned(text).split())

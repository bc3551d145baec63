"""Errors for bad input, and checks of plain values.

Every error names the argument, what was expected, what came instead, and the remedy.
"""

import math
from collections.abc import Iterable
from typing import Any


class ArgumentError(ValueError):
    """Bad input: ``name: expected ..., got ...; remedy``. The command line turns it into exit status 2."""


def argument_error(name: str, expected: object, got: object, remedy: str) -> ArgumentError:
    """Return the `ArgumentError` for a bad argument.

    Args:
        name: name of the argument, as the caller knows it.
        expected: what its value should have been.
        got: its value, or the property of it that is wrong.
        remedy: what the caller can do, in the imperative.
    """
    return ArgumentError(f"{name}: expected {expected}, got {got}; {remedy}")


def check_range(name: str, value: Any, *, low: float = 0.0, high: float | None = None) -> None:
    """Raise unless ``low <= value < high``; without ``high``, unless ``value`` is finite and at least ``low``."""
    try:
        fits = low <= value < (math.inf if high is None else high) and math.isfinite(value)  # False for NaN
    except (TypeError, OverflowError):  # not a number, or one that is too large for a float
        fits = False
    if not fits:
        bound = f">= {low}" if high is None else f"in [{low}, {high})"
        raise argument_error(name, f"a number {bound}", shown(value), "pass one within these bounds")


def check_positive(name: str, value: Any, remedy: str) -> None:
    """Raise unless ``value`` is a finite number above 0."""
    try:
        fits = 0 < value < math.inf and math.isfinite(value)
    except (TypeError, OverflowError):
        fits = False
    if not fits:
        raise argument_error(name, "a positive number", shown(value), remedy)


def check_whole(name: str, value: object, remedy: str, *, low: int = 1, high: int = 2**31) -> None:
    """Raise unless ``value`` is a whole number in [low, high)."""
    kind = "a positive whole number" if low == 1 else f"a whole number >= {low}"
    if isinstance(value, bool) or not (isinstance(value, int) and low <= value):
        raise argument_error(name, kind, shown(value), remedy)
    if value >= high:
        raise argument_error(name, f"{kind} below {high}", shown(value), remedy)


def shown(value: object) -> str:
    """Return the ``repr`` of a value for an error message, shortened to 100 characters."""
    try:
        text = repr(value)
    except ValueError:  # Python does not print integers of more than 4300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 100 else f"{text[:97]}..."


def check_choice(name: str, value: object, choices: Iterable[object]) -> None:
    """Raise unless ``value`` is one of ``choices``."""
    if value not in choices:
        known = ", ".join(repr(choice) for choice in choices)
        raise argument_error(name, f"one of {known}", repr(value), "choose one of these")

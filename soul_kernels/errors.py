"""Errors of bad input, and checks of plain values: the name of the argument, what was expected, what came, the remedy."""

import math


class ArgumentError(ValueError):
    """Bad input, told as ``name: expected ..., got ...; remedy``. The command turns it into exit status 2."""


def argument_error(name, expected, got, remedy):
    """Returns the `ArgumentError` to raise."""
    return ArgumentError(f"{name}: expected {expected}, got {got}; {remedy}")


def check_range(name, value, *, low=0.0, high=None):
    """Raises unless ``low <= value < high``; without ``high``, any finite number from ``low`` on."""
    try:
        fits = low <= value < (math.inf if high is None else high) and math.isfinite(value)  # NaN is not
    except (TypeError, OverflowError):  # no number at all, or one that no float holds
        fits = False
    if not fits:
        bound = f">= {low}" if high is None else f"in [{low}, {high})"
        raise argument_error(name, f"a number {bound}", shown(value), "pass one within these bounds")


def check_positive(name, value, remedy):
    """Raises unless ``value`` is a number above 0, and a finite one."""
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
    """Return the ``repr`` of a value for an error: the beginning of a long one."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no numbers of more than 4300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 100 else f"{text[:97]}..."


def check_choice(name, value, choices):
    """Raises unless ``value`` is one of ``choices``."""
    if value not in choices:
        known = ", ".join(repr(choice) for choice in choices)
        raise argument_error(name, f"one of {known}", repr(value), "choose one of these")

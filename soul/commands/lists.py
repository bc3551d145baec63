"""Values of options that are lists, with commas between the entries."""

import argparse

from soul_kernels.errors import shown


def names_of(text: str) -> list[str]:
    """Return the names in a text with commas, without the spaces around them."""
    return [name.strip() for name in text.split(",")]


def numbers_of(text: str) -> list[int]:
    """Return the whole numbers in a text with commas, for ``type=`` of an option.

    Raises:
        argparse.ArgumentTypeError: an entry is no whole number.
    """
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected whole numbers with commas between them, got {shown(text)}") from None

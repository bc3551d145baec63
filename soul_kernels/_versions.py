"""The oldest versions of torch and Triton that this library runs with. Importing this module raises where torch is older.

The package imports it before everything else: the error then names the version, and not the first function that is missing.
"""

import re

import torch

OLDEST = {"torch": (2, 10), "triton": (3, 6)}  # as in setup.py


def check_version(package: str, version: str) -> None:
    """Raise unless a package is new enough; a version that does not begin with two numbers passes.

    Args:
        package: "torch" or "triton".
        version: its ``__version__``, such as "2.11.0+cu128".

    Raises:
        ImportError: the package is too old. The message names the version that is needed and the remedy.
    """
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers and tuple(map(int, numbers.groups())) < OLDEST[package]:
        oldest = ".".join(map(str, OLDEST[package]))
        raise ImportError(f"{package}: expected version {oldest} or newer, got {version}; pip install '{package}>={oldest}'")


check_version("torch", torch.__version__)

"""The oldest torch and Triton that this library runs with. Importing this module raises where torch is older.

The package imports it before all else, so that the error names the version, and not the first function that is missing.
"""

import re

import torch

OLDEST = {"torch": (2, 10), "triton": (3, 6)}  # as in setup.py


def check_version(package, version):
    """Raises unless a package is new enough; a version that does not begin with numbers passes.

    Args:
        package: "torch" or "triton".
        version: its ``__version__``, such as "2.11.0+cu128".

    Raises:
        ImportError: naming the version that is needed, the one that is installed, and the remedy.
    """
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers and tuple(map(int, numbers.groups())) < OLDEST[package]:
        oldest = ".".join(map(str, OLDEST[package]))
        raise ImportError(f"{package}: expected version {oldest} or newer, got {version}; pip install '{package}>={oldest}'")


check_version("torch", torch.__version__)

"""Optional dependencies: imported where they are used, and named when they are missing."""

import importlib
from types import ModuleType


class MissingExtra(ImportError):
    """A package of an extra is not installed; the message says how to install it."""


def require(module: str, extra: str) -> ModuleType:
    """Import ``module``, which belongs to the extra ``extra`` of this distribution, and return it.

    Raises:
        MissingExtra: it is not installed; the message has the pip command.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise  # the package is installed, and something inside it is broken
        raise MissingExtra(f"{module} is not installed; run: pip install 'soul-kernels[{extra}]'") from None

"""Optional dependencies: imported where they are used, named when they are missing."""

import importlib


class MissingExtra(ImportError):
    """A package of an extra is not installed; the message says how to install it."""


def require(module, extra):
    """Imports ``module``, which belongs to the extra ``extra`` of this distribution.

    Raises:
        MissingExtra: with the pip command that helps.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise  # the package is there, and something inside it is broken
        raise MissingExtra(f"{module} is not installed; run: pip install 'soul-kernels[{extra}]'") from None

"""The connection to the Hugging Face Hub: one request tells whether there is one.

huggingface_hub tries six times for every file before it gives up, half a minute each, even for files that are in its cache.
Whatever reads from the hub does so within `hub_asked_once`.
"""

import contextlib
import functools
import os
import time
from collections.abc import Iterator
from typing import Any

from soul._extras import require
from soul_kernels.errors import argument_error

REMEMBERED = 60  # seconds for which an answer counts, so that a notebook goes on when its connection is back


@contextlib.contextmanager
def hub_asked_once(argument: str, name: str | os.PathLike[str]) -> Iterator[None]:
    """Let the block read ``name`` from the hub, or from its cache alone if the hub does not answer.

    Libraries that copy ``HF_HUB_OFFLINE`` when they are imported, as datasets does, must be imported before the block.

    Args:
        argument: argument to name in errors.
        name: hub name of a model or a data set. For a path that exists nothing is asked.

    Raises:
        ArgumentError: the hub does not answer, and the block has raised an OSError: something is not in the cache.
    """
    constants: Any = require("huggingface_hub.constants", "hf")
    problem = None
    if not constants.HF_HUB_OFFLINE and not os.path.exists(name):
        problem = _problem(constants.ENDPOINT, int(time.monotonic() / REMEMBERED))
    if problem is None:
        yield
        return
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    except OSError as error:
        expected = f"a path, or a name that is in the cache while {constants.ENDPOINT} cannot be reached"
        remedy = "check the connection, and HF_ENDPOINT and proxies if they are set"
        raise argument_error(argument, expected, f"{name} ({problem})", remedy) from error
    finally:
        constants.HF_HUB_OFFLINE = False


@functools.lru_cache(maxsize=1)
def _problem(endpoint: str, period: int) -> str | None:
    """Return why the hub does not answer, or None if it does. Another ``period`` makes it ask again."""
    timeout = require("huggingface_hub.constants", "hf").HF_HUB_ETAG_TIMEOUT  # that of the hub for a question, 10 s
    try:
        require("huggingface_hub.utils", "hf").get_session().head(endpoint, timeout=timeout)
    except Exception as error:  # of requests or of httpx, which one depends on the version
        return f"{type(error).__name__}: {error}"
    return None

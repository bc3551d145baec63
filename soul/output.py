"""The output directory of a command."""

import os
import pathlib

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from soul.files import is_scratch
from soul_kernels._checks import ArgumentError, argument_error

RUN_FILE = "soul_config.json"  # by which the command knows an output directory of its own
DATA_FILE = "data.json"  # what became of the rows


def check_output(directory, resume=False):
    """Returns the path of an output directory that does not exist yet or is empty; creates nothing. What a killed process has
    left under a scratch name of `soul.files` does not count.

    Args:
        directory: path of the directory.
        resume: it may also be that of a run of the ``soul unlearn`` command, which is to go on.

    Raises:
        ArgumentError: there is something in it, or it cannot be written.
    """
    directory = pathlib.Path(directory)
    above = next((parent for parent in directory.absolute().parents if parent.exists()), directory)
    if not above.is_dir():
        raise argument_error("output", "a new or an empty directory", f"a path below the file {above}", "choose another one")
    if resume and (directory / RUN_FILE).is_file():
        return directory
    if os.path.lexists(directory) and not (directory.is_dir() and all(map(is_scratch, directory.iterdir()))):
        if resume:
            got = f"{directory} without {RUN_FILE}"
            raise argument_error("resume", "the output directory of a run, or a new one", got, "check --output")
        raise argument_error("output", "a new or an empty directory", str(directory), "choose another one, or remove it")
    check_writable("output", directory)
    return directory


def check_writable(name, path):
    """Raises unless a path, or what is above it as far as it exists, can be written, as far as the system says beforehand."""
    path = pathlib.Path(path)
    there = next((place for place in (path, *path.absolute().parents) if place.exists()), path)
    if not os.access(there, os.W_OK):
        raise argument_error(name, "a place that can be written", f"{there}, which cannot", "choose another one")


def occupy(directory):
    """Makes an output directory a run's own: its ``RUN_FILE`` is there, and locked until the file that is returned is closed,
    by the end of the process at the latest. Where a file system knows no locks, nothing is locked.

    Args:
        directory: path that `check_output` has returned.

    Raises:
        ArgumentError: another process runs in there; nothing was changed.
    """
    directory.mkdir(parents=True, exist_ok=True)
    file = open(directory / RUN_FILE, "a", encoding="utf-8")  # what it holds stays
    try:
        lock(file, "output", directory)
    except ArgumentError:
        file.close()
        raise
    return file


def lock(file, name, directory):
    """Locks an open file or a descriptor until it is closed, where the system and the file system know locks.

    Args:
        file: what is locked.
        name: what to call the directory in errors.
        directory: where it is.

    Raises:
        ArgumentError: another process has locked it.
    """
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        got, remedy = f"{directory}, where a run is going on", "wait for its end, or choose another one"
        raise argument_error(name, "a directory in which nothing runs", got, remedy) from None
    except OSError:
        pass

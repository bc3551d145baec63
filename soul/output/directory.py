"""The output directory of a command."""

import os
import pathlib
import stat

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from soul.output.files import is_scratch
from soul_kernels.errors import ArgumentError, argument_error

RUN_FILE = "soul_config.json"  # by which the command knows an output directory of its own
DATA_FILE = "data.json"  # what became of the rows
LOG_FILE = "log.jsonl"  # a line for every step
CHECKPOINTS = "checkpoints"  # the directory of `soul.checkpoint.local.Checkpoints`


def check_output(directory, resume=False):
    """Returns the path of an output directory that does not exist yet or is empty; creates nothing. What a killed process has
    left under a scratch name of `soul.output.files` does not count.

    Args:
        directory: path of the directory.
        resume: it may also be that of a run of the ``soul unlearn`` command, which is to go on.

    Raises:
        ArgumentError: there is something in it, it cannot be written, or a file that a resumed run writes is a link.
    """
    directory = pathlib.Path(directory)
    above = next((parent for parent in directory.absolute().parents if parent.exists()), directory)
    if not above.is_dir():
        raise argument_error("output", "a new or an empty directory", f"a path below the file {above}", "choose another one")
    if resume:
        for name in (RUN_FILE, DATA_FILE, LOG_FILE, CHECKPOINTS):
            _check_own(directory / name)
        if (directory / RUN_FILE).is_file():
            return directory
    if os.path.lexists(directory) and not (directory.is_dir() and all(map(is_scratch, directory.iterdir()))):
        if resume:
            got = f"{directory} without {RUN_FILE}"
            raise argument_error("resume", "the output directory of a run, or a new one", got, "check --output")
        raise argument_error("output", "a new or an empty directory", str(directory), "choose another one, or remove it")
    check_writable("output", directory)
    return directory


def no_follow(path, flags):
    """Opens a file of a run; the ``opener`` of Python's ``open``. A link is not followed: in a directory in which others may
    write, it could lead to any file of the user who starts the run.

    Args:
        path: of the file.
        flags: those of ``os.open``.

    Returns:
        The descriptor.

    Raises:
        ArgumentError: the path is a symbolic link, or one of several names (hard links) of a file; nothing was changed.
    """
    _check_own(path)
    truncate = flags & os.O_TRUNC
    # O_NOFOLLOW: somebody may put a link there after the check. O_TRUNC only once it is known which file this is.
    descriptor = os.open(path, (flags & ~os.O_TRUNC) | getattr(os, "O_NOFOLLOW", 0), 0o666)
    try:
        _check_own(path, os.fstat(descriptor))
        if truncate and stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.ftruncate(descriptor, 0)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def write_in_place(path, text):
    """Writes a text to a file that stays the same one, and so stays locked; raises as `no_follow`."""
    with open(path, "w", encoding="utf-8", opener=no_follow) as file:
        file.write(text)


def check_no_links(directory):
    """Raises where there is a symbolic link anywhere in a directory that a command goes on to write in.

    Raises:
        ArgumentError: naming the first one.
    """
    for path in sorted(pathlib.Path(directory).rglob("*")):
        if path.is_symlink():
            _check_own(path)


def _check_own(path, status=None):
    """Raises for a link; ``status`` is that of the open file, by default what is there without following it."""
    try:
        status = os.lstat(path) if status is None else status
    except FileNotFoundError:
        return
    got = None
    if stat.S_ISLNK(status.st_mode):
        got = f"a symbolic link to {os.readlink(path)}"
    elif stat.S_ISREG(status.st_mode) and status.st_nlink > 1:
        got = "one of several names of a file (hard links)"
    if got is not None:
        remedy = "put the file itself there, remove it, or choose another directory"
        raise argument_error("output", "files of the run's own", f"{path}, {got}", remedy)


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
    file = open(directory / RUN_FILE, "a", encoding="utf-8", opener=no_follow)  # what it holds stays
    try:
        lock(file, "output", directory)
    except ArgumentError:
        file.close()
        raise
    return file


def restore(directory, file):
    """Make an output directory again if it was removed while its run went on, so that the model has a place.

    Args:
        directory: path of the directory.
        file: that `occupy` has returned.

    Raises:
        OSError: another run has made the directory its own.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / RUN_FILE
    if path.exists() and not os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
        raise OSError(f"{directory} was removed during the run, and another run is in there: nothing was saved")


def check_complete(directory):
    """Raise unless the files that a run has written beside its model are still there.

    Raises:
        OSError: naming those that are not.
    """
    lost = [name for name in (RUN_FILE, DATA_FILE, LOG_FILE) if not (directory / name).is_file()]
    if lost:
        text = f"{', '.join(lost)} {'is' if len(lost) == 1 else 'are'} lost"
        raise OSError(f"{directory} was removed during the run: the model is saved there, but {text}")


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

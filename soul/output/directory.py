"""The output directory of a command: what may be in it, who may write there, and how its files are opened safely."""

import os
import pathlib
import stat
from typing import TextIO

try:
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]  # Windows has no such module

from soul.output.files import is_scratch
from soul_kernels.errors import ArgumentError, argument_error

RUN_FILE = "soul_config.json"  # the options; by this file the command recognizes the output directory of a run
DATA_FILE = "data.json"  # how many rows were used, and hashes of their content
LOG_FILE = "log.jsonl"  # a line for every step
NOTES_FILE = "report.json"  # what a report shows beside the log: environment, times, what the model says
REPORT_FILES = ("report.html", "report.md")  # the report as a page and as text
CARD_FILE = "README.md"  # the model card
VERDICT_FILE = "verdict.json"  # whether a run with an aim has reached it, and the numbers
ENDED_FILE = "soul_ended.txt"  # written once the model is safe there
TRACKERS_FILE = "trackers.json"  # the names of the run at experiment trackers
TENSORBOARD = "tensorboard"  # the directory of TensorBoard's event files
WANDB = "wandb"  # the directory in which Weights & Biases keeps its files
CHECKPOINTS = "checkpoints"  # the directory of `soul.checkpoint.local.Checkpoints`


def check_output(directory: str | os.PathLike[str], resume: bool = False) -> pathlib.Path:
    """Return the path of an output directory that does not exist yet or is empty; create nothing.

    A file that a killed process has left under a scratch name of `soul.output.files` does not count.

    Args:
        directory: path of the directory.
        resume: also accept the directory of a run that is to go on.

    Raises:
        ArgumentError: the directory is not empty, it cannot be written, or a file that a resumed run writes is a link.
    """
    directory = pathlib.Path(directory)
    parent = next((path for path in directory.absolute().parents if path.exists()), directory)
    if not parent.is_dir():
        raise argument_error("output", "a new or an empty directory", f"a path below the file {parent}", "choose another one")
    if resume:
        links = (RUN_FILE, DATA_FILE, LOG_FILE, VERDICT_FILE, TRACKERS_FILE, TENSORBOARD, WANDB, CHECKPOINTS)
        for name in links:
            _check_no_link(directory / name)
        if (directory / RUN_FILE).is_file():
            return directory
    if os.path.lexists(directory) and not (directory.is_dir() and all(map(is_scratch, directory.iterdir()))):
        if resume:
            got = f"{directory} without {RUN_FILE}"
            raise argument_error("resume", "the output directory of a run, or a new one", got, "check --output")
        raise argument_error("output", "a new or an empty directory", str(directory), "choose another one, or remove it")
    check_writable("output", directory)
    return directory


def no_follow(path: str | os.PathLike[str], flags: int) -> int:
    """Open a file of a run without following links, as an ``opener`` for Python's ``open``.

    In a directory in which others may write, a link could lead to any file of the user who starts the run.

    Args:
        path: path of the file.
        flags: the flags for ``os.open``.

    Returns:
        The descriptor.

    Raises:
        ArgumentError: the path is a symbolic link, or one of several names (hard links) of a file; nothing was changed.
    """
    _check_no_link(path)
    truncate = flags & os.O_TRUNC
    # O_NOFOLLOW: somebody may put a link there after the check. The file is truncated only after the open file was checked too.
    descriptor = os.open(path, (flags & ~os.O_TRUNC) | getattr(os, "O_NOFOLLOW", 0), 0o666)
    try:
        _check_no_link(path, os.fstat(descriptor))
        if truncate and stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.ftruncate(descriptor, 0)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def write_in_place(path: pathlib.Path, text: str) -> None:
    """Replace the content of a file without replacing the file, so that it stays locked.

    Raises:
        ArgumentError: as in `no_follow`.
        OSError: it could not be written.
    """
    with open(path, "w", encoding="utf-8", opener=no_follow) as file:
        file.write(text)


def check_no_links(directory: str | os.PathLike[str]) -> None:
    """Raise if there is a symbolic link anywhere in a directory in which a command continues to write.

    Raises:
        ArgumentError: the message names the first one.
    """
    for path in sorted(pathlib.Path(directory).rglob("*")):
        if path.is_symlink():
            _check_no_link(path)


def _check_no_link(path: str | os.PathLike[str], status: os.stat_result | None = None) -> None:
    """Raise if a path is a symbolic link, or a file that has other names.

    Args:
        path: need not exist.
        status: that of the open file; None: that of the path itself.
    """
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


def check_writable(name: str, path: str | os.PathLike[str]) -> None:
    """Raise unless a path can be written, as far as the system can tell beforehand.

    If the path does not exist, the nearest directory above it that exists decides.

    Args:
        name: argument to name in the error.
        path: path of a file or a directory.

    Raises:
        ArgumentError: it cannot be written.
    """
    path = pathlib.Path(path)
    existing = next((candidate for candidate in (path, *path.absolute().parents) if candidate.exists()), path)
    if not os.access(existing, os.W_OK):
        raise argument_error(name, "a writable path", f"{existing}, which is not", "choose another one")


def occupy(directory: pathlib.Path) -> TextIO:
    """Claim an output directory for this run: create its ``RUN_FILE``, and lock it.

    The lock ends when the returned file is closed, or with the process. On a file system without locks nothing is locked.

    Args:
        directory: path that `check_output` has returned.

    Returns:
        ``RUN_FILE``, open.

    Raises:
        ArgumentError: another process runs in the directory, or as in `no_follow`; nothing was changed.
    """
    directory.mkdir(parents=True, exist_ok=True)
    file = open(directory / RUN_FILE, "a", encoding="utf-8", opener=no_follow)  # "a" keeps its content
    try:
        lock(file, "output", directory)
    except ArgumentError:
        file.close()
        raise
    return file


def restore(directory: pathlib.Path, file: TextIO) -> None:
    """Create an output directory again if it was removed during the run, so that the model can be saved.

    Args:
        directory: path of the directory.
        file: the file that `occupy` has returned.

    Raises:
        OSError: another run has claimed the directory.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / RUN_FILE
    if path.exists() and not os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
        raise OSError(f"{directory} was removed during the run, and another run uses it now: nothing was saved")


def check_complete(directory: pathlib.Path) -> None:
    """Raise unless the files that a run has written beside its model still exist.

    Raises:
        OSError: the message names the missing files.
    """
    lost = [name for name in (RUN_FILE, DATA_FILE, LOG_FILE) if not (directory / name).is_file()]
    if lost:
        text = f"{', '.join(lost)} {'is' if len(lost) == 1 else 'are'} lost"
        raise OSError(f"{directory} was removed during the run: the model is saved there, but {text}")


def lock(file: TextIO | int, name: str, directory: pathlib.Path) -> None:
    """Lock an open file until it is closed, if the system and the file system have locks.

    Args:
        file: an open file or a descriptor.
        name: argument to name in the error.
        directory: path to show in the error.

    Raises:
        ArgumentError: another process has locked the file.
    """
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        got = f"{directory}, which a run is using"
        remedy = "wait for its end, or choose another one"
        raise argument_error(name, "a directory that no run is using", got, remedy) from None
    except OSError:  # a file system without locks
        pass

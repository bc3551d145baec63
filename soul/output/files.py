"""Atomic files: each is complete, or does not exist.

A file that must survive a kill is written into a scratch directory beside its destination, flushed to the disk, and moved into
place; a file to be removed is renamed first. So a meaningful name never stands for an incomplete file. A scratch directory has
a random name, by which `sweep` recognizes what a killed process has left behind. Everything else in a directory belongs to
somebody else: it is neither removed nor an obstacle.
"""

import contextlib
import os
import pathlib
import re
import shutil
import uuid
import warnings
from collections.abc import Iterator

SCRATCH = re.compile(r"\.[0-9a-f]{32}\.tmp")


def scratch_path(directory: pathlib.Path) -> pathlib.Path:
    """Return a new path in a directory, for a file that is not complete yet or is being removed."""
    return directory / f".{uuid.uuid4().hex}.tmp"


def is_scratch(path: pathlib.Path) -> bool:
    """Tell whether a path has a name from `scratch_path`, and is no symbolic link."""
    return SCRATCH.fullmatch(path.name) is not None and not path.is_symlink()


def sweep(directory: pathlib.Path) -> None:
    """Remove what killed processes have left in a directory under scratch names; warn if something cannot be removed."""
    try:
        for path in list(directory.iterdir()):
            if is_scratch(path):
                _delete(path)
    except OSError as error:
        warnings.warn(f"{directory}: what a killed process left there could not be removed ({reason(error)})", stacklevel=2)


def discard(path: pathlib.Path) -> None:
    """Remove a file or a directory, renaming it first, so that its name never stands for half of it; warn if that fails."""
    try:
        path = path.rename(scratch_path(path.parent))
        _delete(path)
    except OSError as error:
        warnings.warn(f"{path}: could not be removed ({reason(error)})", stacklevel=2)


def _delete(path: pathlib.Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


@contextlib.contextmanager
def whole(directory: pathlib.Path, last: tuple[str, ...] = ()) -> Iterator[pathlib.Path]:
    """Yield an empty scratch directory, and move the files that the block has written there into ``directory``.

    The files are on the disk before the first one is moved, and have the modes that the umask asks for. If the block raises,
    none of them is moved.

    Args:
        directory: must exist. Files of the same names are replaced.
        last: names of files that are moved after all others, so that their presence proves that the others are complete.

    Raises:
        OSError: something could not be written, even if a library reports that as another type.
    """
    scratch = scratch_path(directory)
    try:
        scratch.mkdir()
        with os_errors():
            yield scratch
        flush(scratch)
        for path in sorted(scratch.iterdir(), key=lambda path: path.name in last):
            target = directory / path.name
            if path.is_dir() and os.path.lexists(target):  # a directory can replace only an empty directory
                discard(target)
            os.replace(path, target)
        sync(directory)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_text(path: pathlib.Path, text: str) -> None:
    """Write a text file completely or not at all.

    Raises:
        OSError: it could not be written; an existing file is unchanged.
    """
    with whole(path.parent) as scratch:
        (scratch / path.name).write_text(text, encoding="utf-8")


def replace_text(path: pathlib.Path, text: str) -> None:
    """Replace a text file by another content at once, without waiting for the disk: for what can be made again.

    Raises:
        OSError: it could not be written; an existing file is unchanged.
    """
    scratch = scratch_path(path.parent)
    try:
        scratch.write_text(text, encoding="utf-8")
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def flush(directory: pathlib.Path) -> None:
    """Give all files of a new directory the modes that the umask asks for, and wait until they are on the disk."""
    mode = directory.stat().st_mode & 0o666  # the umask cannot be read without changing it, but a new directory shows it
    for path in directory.iterdir():
        if path.is_dir():
            flush(path)
        else:
            with contextlib.suppress(OSError):  # file systems without modes
                path.chmod(mode)  # safetensors writes 0600
            sync(path)
    sync(directory)


def sync(path: pathlib.Path) -> None:
    """Wait until a file, or the list of names in a directory, is on the disk."""
    if path.is_dir():
        if os.name == "nt":  # directories cannot be opened there
            return
        descriptor = os.open(path, os.O_RDONLY)
    else:
        descriptor = os.open(path, os.O_RDWR | getattr(os, "O_BINARY", 0))
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def os_errors() -> Iterator[None]:
    """Raise an OSError if safetensors or tokenizers report an error of the system, such as a full disk, as another type."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is not None:
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
        if type(error).__name__ == "SafetensorError":
            raise OSError(str(error)) from error
        raise


def reason(error: OSError) -> str:
    """Return the system's description of an error, without error number and path."""
    return error.strerror or str(error)

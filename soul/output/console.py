"""The console of a command. A report that cannot be written never ends the work; a result that cannot be written is an error.

Within `safe` standard output and standard error swallow what cannot be written to a full disk, to a closed stream, or to a pipe
that nobody reads any more. Characters that the console does not have are written as escapes. So whatever ``print`` and progress
bars write, also those of libraries, is a report. A result, which a command computes only to print it, goes through
`print_result`.
"""

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TextIO, cast


class Unwritten(OSError):
    """The result of a command could not be written to standard output."""


class SafeStream:
    """A text stream that swallows what cannot be written.

    Args:
        stream: the stream, or None if the process was started without it.

    Attributes:
        error: the OSError of the first write that failed, or None. After an error nothing is written any more.
        before_write: called before every write, as by `soul.output.progress`, whose bars give way to other texts; or None.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self.error: OSError | None = _closed() if stream is None else None
        self.before_write: Callable[[], None] | None = None
        self.stream = cast(TextIO, stream)  # None is never written to, since there is an error

    def write(self, text: str) -> int:
        """Write a text if the stream still works; return the length of the text in any case."""
        if self.before_write is not None:
            self.before_write()
        self._attempt(lambda: self._write(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write texts if the stream still works."""
        self.write("".join(lines))

    def flush(self) -> None:
        """Flush the stream if it still works."""
        self._attempt(lambda: self.stream.flush())

    def isatty(self) -> bool:
        """Tell whether the stream is a terminal."""
        return self.error is None and self.stream.isatty()

    def __getattr__(self, name: str) -> Any:  # whatever else a stream has
        return getattr(self.stream, name)

    def _write(self, text: str) -> None:
        try:
            self.stream.write(text)
        except UnicodeEncodeError:
            encoding = self.stream.encoding or "ascii"
            self.stream.write(text.encode(encoding, "backslashreplace").decode(encoding))

    def _attempt(self, call: Callable[[], None]) -> None:
        if self.error is not None:
            return
        try:
            call()
        except OSError as error:
            self.error = error
        except ValueError:  # the stream is closed
            self.error = _closed()


def _closed() -> OSError:
    """Return the error of a stream that is not open."""
    return OSError(errno.EBADF, os.strerror(errno.EBADF))


def safe_stream(stream: TextIO | SafeStream | None) -> SafeStream:
    """Return a stream as a `SafeStream`."""
    return stream if isinstance(stream, SafeStream) else SafeStream(stream)


@contextlib.contextmanager
def safe(whole_process: bool = False) -> Iterator[None]:
    """Make ``sys.stdout`` and ``sys.stderr`` safe for the duration of the block.

    Args:
        whole_process: whether the process ends after the block. Then a stream that has failed is redirected to the null device
            after the block, since Python flushes it once more on exit, and would end with status 120. Before the block, those
            of the descriptors 0 to 2 that are closed are opened on the null device. Otherwise a file of the run could get one
            of them, and with it the output of libraries.
    """
    if whole_process:
        _reserve_descriptors()
    before = sys.stdout, sys.stderr
    streams = [safe_stream(stream) for stream in before]
    sys.stdout, sys.stderr = cast(list[TextIO], streams)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream in streams:
            stream.flush()
            if whole_process and stream.error is not None:
                _redirect_to_null(stream.stream)


def print_result(*lines: str) -> None:
    """Print the result of a command, and make sure that it is written.

    Raises:
        Unwritten: it could not be written.
    """
    stream = safe_stream(sys.stdout)
    stream.write("".join(f"{line}\n" for line in lines))
    check_written(stream)


def check_written(stream: TextIO | SafeStream) -> None:
    """Flush a stream to which a result of a command was written, within `safe`.

    Raises:
        Unwritten: something could not be written.
    """
    stream = safe_stream(stream)
    stream.flush()
    if stream.error is not None:
        raise Unwritten(stream.error.errno, stream.error.strerror or str(stream.error))


def _reserve_descriptors() -> None:
    """Open those of the descriptors 0 to 2 that are closed on the null device."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free


def _redirect_to_null(stream: TextIO) -> None:
    """Redirect the descriptor of a stream to the null device."""
    with contextlib.suppress(AttributeError, OSError, ValueError):  # no descriptor, or a closed one
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)

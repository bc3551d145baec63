"""The console of a command. A report that cannot be written never ends the work; a result that cannot be written is an error.

Within `safe` standard output and standard error swallow what cannot be written: a pipe whose reader has gone, a full disk, a
closed stream. Characters that the console does not have are written as escapes. So ``print`` and progress bars, also those of
libraries, are reports. What a command computes only to print it goes through `print_result`.
"""

import contextlib
import errno
import os
import sys


class Unwritten(OSError):
    """The result of a command could not be written to standard output."""


class SafeStream:
    """A text stream that swallows what cannot be written.

    Args:
        stream: the stream; or None, where the process was started without it.

    Attributes:
        error: the OSError of the first write that failed, or None. After it nothing is written any more.
    """

    def __init__(self, stream):
        self.stream = stream
        self.error = OSError(errno.EBADF, os.strerror(errno.EBADF)) if stream is None else None

    def write(self, text):
        """Write a text, or nothing; return its length."""
        self._attempt(lambda: self._write(text))
        return len(text)

    def writelines(self, lines):
        """Write texts, or nothing."""
        self.write("".join(lines))

    def flush(self):
        """Flush the stream, if it still can be."""
        self._attempt(lambda: self.stream.flush())

    def isatty(self):
        """Tell whether the stream is a terminal."""
        return self.error is None and self.stream.isatty()

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def _write(self, text):
        try:
            self.stream.write(text)
        except UnicodeEncodeError:
            encoding = self.stream.encoding or "ascii"
            self.stream.write(text.encode(encoding, "backslashreplace").decode(encoding))

    def _attempt(self, call):
        if self.error is not None:
            return
        try:
            call()
        except OSError as error:
            self.error = error
        except ValueError:  # the stream is closed
            self.error = OSError(errno.EBADF, os.strerror(errno.EBADF))


def safe_stream(stream):
    """Return a stream as a `SafeStream`."""
    return stream if isinstance(stream, SafeStream) else SafeStream(stream)


@contextlib.contextmanager
def safe(whole_process=False):
    """Make ``sys.stdout`` and ``sys.stderr`` safe for the time of the block.

    Args:
        whole_process: the process ends after the block. Then a stream that has failed leads to the null device from there on,
            since Python flushes it once more when it exits, and would end with status 120. Descriptors 0 to 2 that are closed
            are opened on the null device, so that no file of the run gets one of them, and with it what libraries write there.
    """
    if whole_process:
        _reserve_descriptors()
    before = sys.stdout, sys.stderr
    streams = [safe_stream(stream) for stream in before]
    sys.stdout, sys.stderr = streams
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream in streams:
            stream.flush()
            if whole_process and stream.error is not None:
                _lead_to_null(stream.stream)


def print_result(*lines):
    """Print the result of a command, and make sure that it is written.

    Raises:
        Unwritten: it could not be written.
    """
    stream = safe_stream(sys.stdout)
    stream.write("".join(f"{line}\n" for line in lines))
    check_written(stream)


def check_written(stream):
    """Flush a `SafeStream` that has a result of a command.

    Raises:
        Unwritten: something could not be written.
    """
    stream.flush()
    if stream.error is not None:
        raise Unwritten(stream.error.errno, stream.error.strerror or str(stream.error))


def _reserve_descriptors():
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free


def _lead_to_null(stream):
    with contextlib.suppress(AttributeError, OSError, ValueError):  # no descriptor, or a closed one
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)

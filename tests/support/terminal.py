"""Terminals: one in memory, and one of the system with a command in it; and what is to be read on their screens."""

import contextlib
import fcntl
import io
import os
import pty
import struct
import sys
import termios
import threading


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


def screen(text):
    """Return the lines that a terminal shows after a text with carriage returns and steps up."""
    lines, row, column = [""], 0, 0
    for character in text.replace("\x1b[A", "\x01"):
        if character == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif character == "\r":
            column = 0
        elif character == "\x01":
            row -= 1
        else:
            line = lines[row].ljust(column)
            lines[row] = line[:column] + character + line[column + 1 :]
            column += 1
    return [line.rstrip() for line in lines]


@contextlib.contextmanager
def pseudo_terminal(monkeypatch, columns=120):
    """Make a pseudo-terminal standard output and standard error; yield a list that has its text after the block."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    text, chunks = [], []

    def read():
        with contextlib.suppress(OSError):  # Linux ends it so
            while chunk := os.read(master, 65536):
                chunks.append(chunk)

    reader = threading.Thread(target=read)
    reader.start()
    with monkeypatch.context() as patch, open(slave, "w", encoding="utf-8") as stream:
        patch.setattr(sys, "stdout", stream)
        patch.setattr(sys, "stderr", stream)
        yield text
    reader.join(10)
    os.close(master)
    text.append(b"".join(chunks).decode())

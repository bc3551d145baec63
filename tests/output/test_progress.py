"""Progress is shown where it was asked for, and neither ends nor changes what it is about."""

import importlib
import io
import sys
import types

import pytest

from soul.output.console import SafeStream
from soul.output.progress import DELAY, bars_of_transformers, shown, task, track
from tests.support.terminal import Terminal, screen

module = importlib.import_module("soul.output.progress")


class Clock:
    """A clock that the test moves."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture(autouse=True)
def asked_for(monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "0")  # tests/conftest.py silences all others
    monkeypatch.setattr(module, "LINE_SECONDS", 0)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module, "LINE_SECONDS", 30)
    monkeypatch.setattr(module, "time", types.SimpleNamespace(monotonic=clock))
    return clock


@pytest.fixture
def terminal(monkeypatch):
    """A function that makes a terminal of standard output and standard error, and returns it."""
    monkeypatch.setattr(module, "DELAY", 0)
    monkeypatch.setattr(module, "REFRESH", 0)

    def make():
        terminal = Terminal()
        safe = SafeStream(terminal)  # as in a command
        monkeypatch.setattr(sys, "stdout", safe)
        monkeypatch.setattr(sys, "stderr", safe)
        return terminal

    return make


def work():
    with task("steps", 4, stays=True) as steps:
        for step in range(3):
            for _ in track([1, 2], "evaluate"):
                pass
            steps.update(forget=0.5 / (step + 1), control=None, clipped=0.25)


def test_nothing_is_shown_to_whoever_did_not_ask(capsys, monkeypatch):
    work()
    with shown(False):
        work()
        with shown():  # what is not wanted outside is not wanted inside
            work()
    with shown():
        with shown(False):
            work()
    monkeypatch.setenv("TQDM_DISABLE", "1")
    with shown():
        work()
    assert capsys.readouterr() == ("", "")


def test_a_log_gets_a_line_every_so_many_seconds(capsys, clock):
    with shown():
        with task("unlearn (soul)", 10, initial=2) as steps:
            for step in range(1, 8):
                clock.now += 20
                steps.update(forget=0.5 / step, clipped=0.25)
        clock.now += 4000
        for _ in track(range(1), "evaluate"):
            pass
    assert capsys.readouterr().err.splitlines() == [
        "unlearn (soul): 4 of 10, forget 0.25, clipped 0.25, 0:40 so far, 2:00 left",
        "unlearn (soul): 6 of 10, forget 0.125, clipped 0.25, 1:20 so far, 1:20 left",
        "unlearn (soul): 8 of 10, forget 0.0833, clipped 0.25, 2:00 so far, 0:40 left",
        "unlearn (soul): 9 of 10, forget 0.0714, clipped 0.25, 2:20 so far, 0:20 left",  # its end
        "evaluate: 1 of 1, 0:00 so far",
    ]


def test_short_work_leaves_no_line_and_long_work_without_parts_leaves_one(capsys, clock):
    with shown():
        work()
        with task("save the model"):
            clock.now += 3700
        with task("save a checkpoint"):
            clock.now += 29
    assert capsys.readouterr().err == "save the model, 1:01:40 so far\n"


def test_a_terminal_gets_bars(terminal):
    terminal = terminal()
    with shown():
        steps = task("steps", 4, stays=True)
        steps.update(forget=0.5, control=None, clipped=0.25)
        (line,) = screen(terminal.getvalue())
        assert line.startswith("steps  25%|") and "| 1/4 [" in line and line.endswith(", forget 0.5, clipped 0.25]")
        inner = task("evaluate", 2)
        inner.update()
        assert [line[:13] for line in screen(terminal.getvalue())] == [line[:13], "evaluate  50%"]
        inner.close()
        steps.update(3, forget=0.1)
        steps.close()
    lines = screen(terminal.getvalue())
    assert lines[0].startswith("steps 100%|") and lines[0].endswith(", forget 0.1]")
    assert lines[1:] == [""]  # the bar of the evaluation has gone


def test_bars_give_way_to_what_is_printed(terminal):
    terminal = terminal()
    with shown():
        with task("steps", 4) as steps:
            steps.update()
            with task("evaluate", 2) as inner:
                inner.update()
                print("a warning,", "in two parts")
            steps.update()
            assert screen(terminal.getvalue())[0] == "a warning, in two parts"
            assert screen(terminal.getvalue())[1].startswith("steps  50%|")
    print("the end")
    assert [line for line in screen(terminal.getvalue()) if line] == ["a warning, in two parts", "the end"]


def test_a_bar_that_an_error_leaves_open_is_closed(terminal):
    terminal = terminal()
    with pytest.raises(RuntimeError), shown():
        task("steps", 4).update()
        raise RuntimeError
    print("the end")
    assert [line for line in screen(terminal.getvalue()) if line] == ["the end"]
    assert sys.stdout.before_write is None


def test_work_without_parts_shows_its_time(terminal, monkeypatch):
    terminal = terminal()
    with shown(), task("save the model"):
        assert screen(terminal.getvalue()) == ["save the model [00:00]"]
    assert screen(terminal.getvalue()) == [""]


def test_short_work_does_not_flicker(terminal, monkeypatch):
    terminal = terminal()
    monkeypatch.setattr(module, "DELAY", DELAY)
    with shown():
        for _ in track(range(100), "evaluate"):
            pass
    assert terminal.getvalue() == ""


class Broken(Terminal):
    def write(self, text):
        raise OSError("no reader")


class Closed(Terminal):
    def isatty(self):
        raise ValueError("I/O operation on closed file")

    write = isatty


class Ascii(io.TextIOWrapper):
    def isatty(self):
        return True


@pytest.mark.parametrize("stream", [Broken, Closed, lambda: None, lambda: Ascii(io.BytesIO(), encoding="ascii")])
def test_a_broken_console_ends_no_work(stream, monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream())
    with shown():
        with task("größe", 2, stays=True) as steps:
            steps.update(2, forget=float("nan"))


def test_an_error_of_a_display_makes_it_silent(terminal, monkeypatch):
    terminal = terminal()

    class Bar:
        def __init__(self, **_):
            raise RuntimeError("a version of tqdm without this argument")

    monkeypatch.setitem(sys.modules, "tqdm", types.SimpleNamespace(tqdm=Bar))
    with shown():
        work()
    assert terminal.getvalue() == ""


def test_a_terminal_without_tqdm_gets_lines(terminal, monkeypatch):
    terminal = terminal()
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with shown():
        work()
    assert terminal.getvalue().count("\n") > 3 and "steps: 3 of 4, forget 0.167, clipped 0.25, " in terminal.getvalue()


def test_the_bars_of_transformers_are_shown_as_tasks(capsys):
    logging = pytest.importorskip("transformers").utils.logging
    if not hasattr(logging, "set_tqdm_hook"):
        pytest.skip("transformers 4 shows its own bars")
    with shown(), bars_of_transformers(logging):
        assert list(logging.tqdm([1, 2], desc="Loading weights")) == [1, 2]
        with logging.tqdm(total=3, desc="Writing") as bar:
            bar.set_postfix(name=1)
            bar.update(3)
    assert [line.split(",")[0] for line in capsys.readouterr().err.splitlines()] == [
        "loading weights: 1 of 2",
        "loading weights: 2 of 2",
        "writing: 3 of 3",
    ]
    with shown(False), bars_of_transformers(logging):
        list(logging.tqdm([1, 2], desc="Loading weights"))
    assert capsys.readouterr().err == ""
    assert logging.set_tqdm_hook(None) is None

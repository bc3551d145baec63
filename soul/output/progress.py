"""Progress of long work: bars in a terminal, a line now and then in a job log, nothing where nobody asked.

Work that takes long is a `task`, or a loop over `track`. Neither says where it is shown: `shown` decides that for everything
that is called in its block, so that a batch loop deep in the library needs one line, and no argument of every function above
it. Outside of `shown`, which is where a program that imports the library is, nothing is printed::

    with shown():                                            # the command
        for batch in track(batches, "reference pass"):       # anywhere below it
            ...

A display only prints. It draws no random numbers, it changes no result, and an error in it makes it silent. Both kinds of
display show the same: what is done, of how much, the numbers of the last update, the time so far, and the time that is left if
the rest goes on at the mean pace so far.
"""

import contextlib
import contextvars
import importlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any, TypeVar

from soul.output.console import SafeStream, safe_stream

T = TypeVar("T")

LINE_SECONDS = 30.0  # from one line to the next, without a terminal
DELAY = 1.0  # seconds; shorter work leaves no trace in a terminal
REFRESH = 0.1  # seconds from one drawing of a bar to the next, at least
BAR = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
CLOCK = "{desc} [{elapsed}{postfix}]"  # of a task without a total


class Task:
    """A piece of work, of which some is done. `task` makes it; leaving its ``with`` block, or `close`, ends it.

    Attributes:
        title: its name on the console.
        total: number of its parts, or None.
        initial: number of parts that were done before it began.
        done: number of parts that are done.
        stays: whether a terminal goes on to show it after its end, if it took longer than ``DELAY``.
        numbers: the numbers of the last update, as a text.
    """

    def __init__(self, display: "_Display", title: str, total: int | None, initial: int, stays: bool) -> None:
        self.title = title
        self.total = total
        self.initial = initial
        self.done = initial
        self.stays = stays
        self.numbers = ""
        self._begun = time.monotonic()
        self._display = display
        self._show(display.open)

    def update(self, n: int = 1, **numbers: float | str | None) -> None:
        """Count parts that have been done.

        Args:
            n: how many.
            numbers: what to show beside them, by name; None is left out. Without any, those of the last update stay.
        """
        self.done += n
        if numbers:
            self.numbers = ", ".join(f"{name} {_short(value)}" for name, value in numbers.items() if value is not None)
        self._show(self._display.update)

    def close(self) -> None:
        """End the task, if it has not ended."""
        self._show(self._display.close)
        self._display = _Display()

    def seconds(self) -> float:
        """Return the time since the task began."""
        return time.monotonic() - self._begun

    def seconds_left(self) -> float | None:
        """Return the time that the rest takes at the mean pace so far; None if nothing can be said."""
        done_here = self.done - self.initial
        if self.total is None or done_here <= 0:
            return None
        return self.seconds() / done_here * (self.total - self.done)

    def __enter__(self) -> "Task":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _show(self, call: "Callable[[Task], None]") -> None:
        try:
            call(self)
        except Exception:  # of tqdm or of the console: the work goes on, unseen
            self._display = _Display()


class _Display:
    """Where tasks are shown. This one is silent."""

    def open(self, task: Task) -> None:
        """Show a task that begins."""

    def update(self, task: Task) -> None:
        """Show a task, some more of which is done."""

    def close(self, task: Task) -> None:
        """Show the end of a task."""

    def end(self) -> None:
        """Give the console back."""


class _Lines(_Display):
    """A job log: one line every so many seconds about the task that has just got on, and a last one when that ends."""

    def __init__(self, stream: SafeStream) -> None:
        self._stream = stream
        self._last = time.monotonic()
        self._printed: dict[Task, int] = {}  # task -> what was done of it when it was last printed

    def update(self, task: Task) -> None:
        if time.monotonic() - self._last >= LINE_SECONDS:
            self._print(task)

    def close(self, task: Task) -> None:
        is_long = task.total is None and task.seconds() >= LINE_SECONDS
        if is_long or self._printed.get(task, task.done) != task.done:
            self._print(task)
        self._printed.pop(task, None)

    def _print(self, task: Task) -> None:
        of_total = "" if task.total is None else f": {task.done} of {task.total}"
        left = task.seconds_left()
        parts = [
            f"{task.title}{of_total}",
            task.numbers,
            f"{_clock(task.seconds())} so far",
            f"{_clock(left)} left" if left else "",
        ]
        self._stream.write(", ".join(part for part in parts if part) + "\n")
        self._stream.flush()
        self._last = time.monotonic()
        self._printed[task] = task.done


class _BarStream(SafeStream):
    """The stream that bars are drawn on. Attribute ``is_drawn``: whether something was, since the bars were cleared."""

    is_drawn = False

    def write(self, text: str) -> int:
        self.is_drawn = True
        return super().write(text)


class _Bars(_Display):
    """A terminal: tqdm's bars, one below the other, that give way to whatever else is printed."""

    def __init__(self, stream: SafeStream) -> None:
        self._tqdm = importlib.import_module("tqdm").tqdm  # ImportError: `shown` takes lines
        self._stream = _BarStream(stream.stream)
        self._bars: dict[Task, Any] = {}  # tqdm has no types
        self._others = [other for other in (sys.stdout, sys.stderr) if isinstance(other, SafeStream)]
        for other in self._others:
            other.before_write = self._clear

    def open(self, task: Task) -> None:
        self._bars[task] = self._tqdm(
            desc=task.title,
            total=task.total,
            initial=task.initial,
            bar_format=CLOCK if task.total is None else BAR,
            delay=0 if task.stays or task.total is None else DELAY,
            file=self._stream,
            leave=False,
            disable=False,
            dynamic_ncols=_has_size(self._stream),
            smoothing=0,  # the mean pace
            mininterval=REFRESH,
            miniters=1,
        )

    def update(self, task: Task) -> None:
        bar = self._bars[task]
        bar.set_postfix_str(task.numbers, refresh=False)
        bar.update(task.done - bar.n)

    def close(self, task: Task) -> None:
        bar = self._bars.pop(task)
        bar.leave = task.stays and task.seconds() >= DELAY
        bar.close()

    def end(self) -> None:
        for other in self._others:
            other.before_write = None
        for task in reversed(list(self._bars)):  # what an error has left open
            self.close(task)

    def _clear(self) -> None:
        """Clear the bars before something else is printed. They are drawn again at their next update."""
        if self._stream.is_drawn:
            with contextlib.suppress(Exception):  # what is printed must be printed
                for bar in self._bars.values():
                    bar.clear()
            self._stream.is_drawn = False


_current: contextvars.ContextVar[_Display | None] = contextvars.ContextVar("soul progress", default=None)


@contextlib.contextmanager
def shown(wanted: bool = True) -> Iterator[None]:
    """Show the tasks of the block on standard error: as bars in a terminal, otherwise as a line every ``LINE_SECONDS``.

    Within another such block it changes nothing, unless it is not wanted: then its tasks are silent. The variable
    ``TQDM_DISABLE=1``, which other libraries obey too, silences all tasks.

    Args:
        wanted: False: nothing is shown. Of several processes only the first one should want it.
    """
    outer = _current.get()
    if wanted and outer is not None:
        yield
        return
    is_silent = not wanted or os.environ.get("TQDM_DISABLE", "0") not in ("", "0")
    display = _Display() if is_silent else _display_of(safe_stream(sys.stderr))
    token = _current.set(display)
    try:
        yield
    finally:
        _current.reset(token)
        with contextlib.suppress(Exception):  # a display ends nothing
            display.end()


def _display_of(stream: SafeStream) -> _Display:
    try:
        if stream.isatty():
            return _Bars(stream)
    except Exception:  # a closed stream, or no tqdm
        pass
    return _Lines(stream)


def task(title: str, total: int | None = None, *, initial: int = 0, stays: bool = False) -> Task:
    """Begin a `Task`.

    Args:
        title: its name on the console.
        total: number of its parts; 0: it is not shown. None: unknown, and only the time is shown.
        initial: number of parts that are done already.
        stays: whether a terminal goes on to show it after its end. Then it is shown at once, otherwise after ``DELAY``.
    """
    display = _current.get()
    return Task(_Display() if display is None or total == 0 else display, title, total, initial, stays)


def track(items: Iterable[T], title: str, total: int | None = None, *, stays: bool = False) -> Iterator[T]:
    """Yield items, and show how many of them have been dealt with.

    Args:
        items: the items.
        title: as in `task`.
        total: number of items; None: their length, if they have one.
        stays: as in `task`.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    with task(title, total, stays=stays) as shown_task:
        for item in items:
            yield item
            shown_task.update()


@contextlib.contextmanager
def bars_of_transformers(logging: Any) -> Iterator[None]:
    """Show the bars of transformers within the block as tasks; outside of `shown` they stay as they are.

    Args:
        logging: the module ``transformers.utils.logging``; transformers 4 offers no such hook, and shows its own bars.
    """
    set_hook = getattr(logging, "set_tqdm_hook", None)
    if set_hook is None or _current.get() is None:
        yield
        return
    before = set_hook(lambda factory, args, kwargs: _TransformersBar(*args, **kwargs))
    try:
        yield
    finally:
        set_hook(before)


class _TransformersBar:
    """What transformers calls where it would call tqdm. Methods of tqdm that it does not have do nothing."""

    def __init__(
        self, iterable: Iterable[Any] | None = None, desc: str = "work", total: int | None = None, **_: object
    ) -> None:
        if total is None and isinstance(iterable, Sized):
            total = len(iterable)
        self._iterable = iterable or ()
        self._task = task(desc.lower(), total)
        self.update = self._task.update
        self.close = self._task.close

    def __iter__(self) -> Iterator[Any]:
        with self._task:
            for item in self._iterable:
                yield item
                self._task.update()

    def __enter__(self) -> "_TransformersBar":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


def _has_size(stream: SafeStream) -> bool:
    """Tell whether a terminal knows its size. In one of 0 rows, as some containers have it, tqdm would draw nothing."""
    try:
        return os.get_terminal_size(stream.fileno()).lines > 0
    except (OSError, ValueError):  # no descriptor
        return False


def _short(value: float | str) -> str:
    """Return a number with three digits; a text as it is."""
    return value if isinstance(value, str) else f"{value:.3g}"


def _clock(seconds: float) -> str:
    """Return a time as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"

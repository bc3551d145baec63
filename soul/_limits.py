"""Bounds on the time and memory of code that comes with models: chat templates and regular expressions."""

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Iterator

from soul_kernels.errors import argument_error


class _LimitPassed(BaseException):
    """A bound of `limited` was passed; raised in the middle of other code, which must not catch it as an `Exception`."""


@contextlib.contextmanager
def limited(name: str, *, seconds: float, memory_gib: float) -> Iterator[None]:
    """Return a context that bounds the processor time of this process and the growth of its peak memory.

    It works by a timer signal (SIGPROF): only in the main thread, and on systems that have it; elsewhere nothing is bounded.
    The signal interrupts Python between two operations, so one operation that asks for much memory at once is not stopped.

    Args:
        name: name of the code in the error.
        seconds: bound of the processor time.
        memory_gib: bound of the growth of the peak memory, in GiB.

    Raises:
        ArgumentError: one of the bounds was passed.
    """
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return
    import resource  # not on Windows

    def peak_gib() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30

    begun = time.process_time()
    peak_before = peak_gib()

    def check(*_: object) -> None:
        if time.process_time() - begun > seconds or peak_gib() - peak_before > memory_gib:
            signal.setitimer(signal.ITIMER_PROF, 0.0)
            raise _LimitPassed

    previous_handler = signal.signal(signal.SIGPROF, check)
    try:
        signal.setitimer(signal.ITIMER_PROF, 0.05, 0.05)
        yield
    except _LimitPassed:
        expected = f"one that takes at most {seconds:g} s and {memory_gib:g} GiB"
        raise argument_error(name, expected, "one that takes more", "its loops may be endless: use another one") from None
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        signal.signal(signal.SIGPROF, previous_handler)

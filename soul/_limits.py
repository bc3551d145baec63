"""Bounds on what code from outside may cost."""

import contextlib
import signal
import sys
import threading
import time

from soul_kernels.errors import argument_error


class _LimitPassed(BaseException):
    """Raised by `limited` in the middle of other code, which must not handle it as one of its own errors."""


@contextlib.contextmanager
def limited(name, *, seconds, memory_gib):
    """Bound what code from outside may cost: processor time of this process, and growth of its peak memory.

    It works by a timer signal (SIGPROF): only in the main thread, and on systems that have it; elsewhere nothing is bounded. It
    interrupts Python between two operations, so one operation that asks for much memory at once is not stopped.

    Args:
        name: what to call the code in the error.
        seconds: of processor time.
        memory_gib: GiB beyond the peak before.

    Raises:
        ArgumentError: one of the bounds was passed.
    """
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return
    import resource  # not on Windows

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30

    begun, memory = time.process_time(), peak()

    def look(*_):
        if time.process_time() - begun > seconds or peak() - memory > memory_gib:
            signal.setitimer(signal.ITIMER_PROF, 0.0)
            raise _LimitPassed

    before = signal.signal(signal.SIGPROF, look)
    try:
        signal.setitimer(signal.ITIMER_PROF, 0.05, 0.05)
        yield
    except _LimitPassed:
        expected = f"one that takes at most {seconds:g} s and {memory_gib:g} GiB"
        raise argument_error(name, expected, "one that takes more", "its loops may be endless: use another one") from None
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        signal.signal(signal.SIGPROF, before)

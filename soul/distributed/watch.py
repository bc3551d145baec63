"""Notice processes that no longer work: stopped, or on a machine that cannot be reached.

A killed process closes its connections, so the others fail at once. A stopped one keeps them open, and the others would wait
for it in a collective call until the timeout of the process group, 30 minutes with gloo. So every process counts in the store
that connects them, in a thread of its own, and looks whether the others count too. Whoever sees another silent for
``SILENT_SECONDS`` ends itself with exit status 1, and torchrun then ends the rest, a stopped process after 30 more seconds.

The thread counts while the main thread waits, computes or writes, since all of these release the interpreter's lock.
"""

import contextlib
import datetime
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence

import torch.distributed as dist

from soul.output.console import safe_stream

BEAT_SECONDS = 2.0
SILENT_SECONDS = 20.0
ENDED = b"ended"  # stands in the place of a count when a process has left


def key(rank: int) -> str:
    """Return the key under which a process counts. It must be in the store before `watched` begins."""
    return f"soul {rank}"


class Silence:
    """How long the counts of other processes have stood still.

    Args:
        others: their ranks.
        now: time in seconds.
    """

    def __init__(self, others: Sequence[int], now: float) -> None:
        self._counts: dict[int, bytes] = {}
        self._since = dict.fromkeys(others, now)

    def of(self, counts: Mapping[int, bytes], now: float) -> dict[int, float]:
        """Return rank -> seconds without a new count, of the processes that have not ended.

        Args:
            counts: rank -> what the store has; {} where the store does not answer, so that nobody is heard.
            now: time in seconds.
        """
        for rank, count in counts.items():
            if self._counts.get(rank) != count:
                self._counts[rank], self._since[rank] = count, now
        return {rank: now - since for rank, since in self._since.items() if self._counts.get(rank) != ENDED}

    def forgive(self, now: float) -> None:
        """Begin anew: this process itself has not run for a while, so it cannot say who was silent."""
        self._since = dict.fromkeys(self._since, now)


@contextlib.contextmanager
def watched(store: "dist.Store", rank: int, size: int) -> Iterator[None]:
    """End this process with status 1 if another one falls silent within the block.

    Args:
        store: connects the processes; has a value under the `key` of each.
        rank: number of this process.
        size: number of processes.
    """
    end = threading.Event()
    own_store = store.clone()  # type: ignore[attr-defined, unused-ignore]  # for another thread; older stubs of torch lack it
    thread = threading.Thread(target=_watch, args=(own_store, rank, size, end), daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join(2 * BEAT_SECONDS)  # not for ever: the store may be gone


def _watch(store: "dist.Store", rank: int, size: int, end: threading.Event) -> None:
    """Count, and look at the counts of the others, until the end."""
    store.set_timeout(datetime.timedelta(seconds=SILENT_SECONDS))
    others = [other for other in range(size) if other != rank]
    silence = Silence(others, time.monotonic())
    beat = 0
    while not end.is_set():
        counts: dict[int, bytes] = {}
        with contextlib.suppress(RuntimeError):  # of the store: no connection, or no answer in time
            store.set(key(rank), str(beat))
            counts = dict(zip(others, store.multi_get([key(other) for other in others])))
        silent = {other: seconds for other, seconds in silence.of(counts, time.monotonic()).items() if seconds > SILENT_SECONDS}
        if silent and not end.is_set():
            _give_up(silent)
        beat += 1
        before = time.monotonic()
        end.wait(BEAT_SECONDS)
        if time.monotonic() - before > 2 * BEAT_SECONDS:
            silence.forgive(time.monotonic())
    with contextlib.suppress(RuntimeError):
        store.set(key(rank), ENDED.decode())


def _give_up(silent: Mapping[int, float]) -> None:
    """Say who is silent, and end this process at once: its main thread may wait for ever."""
    who = f"process {', '.join(map(str, sorted(silent)))}"
    message = (
        f"soul: {who} of torchrun has not been heard for {max(silent.values()):.0f} seconds: stopped, or on a machine that "
        "cannot be reached. This process ends too. The same command with --resume goes on from the last checkpoint."
    )
    print(message, file=safe_stream(sys.stderr), flush=True)
    os._exit(1)

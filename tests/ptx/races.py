"""Which accesses a card may order otherwise: in the shared memory of a program, and in global memory over a launch.

Two accesses of different threads to one byte, of which one writes, are ordered where a barrier of the program lies between
them, or where both threads belong to one warp and an instruction in which the whole warp takes part (a shuffle, a reduction)
lies between. The latter is weaker than what PTX promises for memory: it holds where the shuffle depends on what was loaded.
"""

from typing import NamedTuple

import numpy as np

from tests.ptx.program import Instruction

Array = np.ndarray
WARP = 32
NEVER, SEVERAL = -1, -2


class Shared:
    """Last writers and readers of shared memory, in words of ``granule`` bytes.

    Attributes:
        epoch: barriers passed.
        warp_epoch: barriers, shuffles and reductions passed.
    """

    def __init__(self, programs: int, n_bytes: int, granule: int) -> None:
        self.granule = granule
        self.epoch = 0
        self.warp_epoch = 0
        self.words = n_bytes // granule
        # Axis 0: epoch, epoch of the warp, thread, warp; of the last store and the last load. Axis 1: words, of all programs.
        self.stores = np.full((4, programs * self.words), NEVER, np.int32)
        self.loads = np.full((4, programs * self.words), NEVER, np.int32)

    def select(self, chosen: Array) -> "Shared":
        """Return the tracker of some of the programs."""
        selected = Shared.__new__(Shared)
        selected.granule = self.granule
        selected.epoch = self.epoch
        selected.warp_epoch = self.warp_epoch
        selected.words = self.words
        programs = (4, len(chosen), self.words)
        selected.stores = self.stores.reshape(programs)[:, chosen].reshape(4, -1)
        selected.loads = self.loads.reshape(programs)[:, chosen].reshape(4, -1)
        return selected

    def barrier(self) -> None:
        """All threads of the programs have arrived."""
        self.epoch += 1
        self.warp_epoch += 1

    def gather_warps(self) -> None:
        """All threads of each warp have exchanged values."""
        self.warp_epoch += 1

    def access(self, writes: bool, rows: Array, threads: Array, offsets: Array, size: int) -> int | None:
        """Record one instruction's accesses; return the first lane that races with an earlier one."""
        warps = threads // WARP
        first = rows * self.words + offsets // self.granule
        for step in range(size // self.granule):
            words = first + step
            racing = self._racing(self.stores, threads, warps, words)
            if racing is None and writes:
                racing = self._racing(self.loads, threads, warps, words)
            if racing is not None:
                return racing
            if writes:
                for axis, value in enumerate((self.epoch, self.warp_epoch, threads, warps)):
                    self.stores[axis][words] = value
            else:
                self._record_loads(threads, warps, words)
        return None

    def _racing(self, records: Array, threads: Array, warps: Array, words: Array) -> int | None:
        """Return the first lane whose word another thread has accessed since the last barrier, and nothing orders the two."""
        since = records[0].take(words) == self.epoch
        if not since.any():
            return None
        _, warp_epoch, thread, warp = records[:, words]
        ordered_in_warp = (warp == warps) & (warp_epoch < self.warp_epoch)
        racing = since & (thread != threads) & ~ordered_in_warp
        return int(racing.argmax()) if racing.any() else None

    def _record_loads(self, threads: Array, warps: Array, words: Array) -> None:
        epoch, _, thread, warp = self.loads[:, words]
        again = epoch == self.epoch
        for axis, before, value in ((2, thread, threads), (3, warp, warps)):
            record = self.loads[axis]
            record[words] = value
            several = (record.take(words) != value) | (again & (before != value))
            record[words[several]] = SEVERAL
        self.loads[0][words] = self.epoch
        self.loads[1][words] = self.warp_epoch


class Race(NamedTuple):
    """Two accesses that nothing orders; ``instruction`` is the one that writes."""

    what: str
    address: int
    instruction: Instruction
    program: int
    thread: int


class GlobalLog:
    """All accesses of a launch to global memory, but for atomic ones."""

    def __init__(self) -> None:
        self.instructions: list[Instruction] = []
        self.records: list[tuple[int, bool, int, Array, Array, Array, int, int]] = []

    def add(self, instruction: Instruction, writes: bool, size: int, addresses: Array, programs: Array, threads: Array,
            tracker: Shared) -> None:  # fmt: skip
        """Record what one instruction accesses: ``size`` bytes from each address, which divides the address."""
        self.instructions.append(instruction)
        self.records.append((len(self.records), writes, size, addresses, programs, threads, tracker.epoch, tracker.warp_epoch))

    def first_race(self) -> Race | None:
        """Return a race between programs, or between threads of a program."""
        written = [record for record in self.records if record[1]]
        if not written:
            return None
        low = min(int(record[3].min()) for record in written)
        high = max(int(record[3].max()) + record[2] for record in written)
        granule = min(record[2] for record in self.records)
        columns: list[Array] = []
        for number, writes, size, addresses, programs, threads, epoch, warp_epoch in self.records:
            near = (addresses + size > low) & (addresses < high)
            if not near.any():
                continue
            addresses, programs, threads = addresses[near], programs[near], threads[near]
            words = (addresses[:, None] + np.arange(0, size, granule)).reshape(-1) // granule
            n = len(addresses) * (size // granule)
            repeat = size // granule
            columns.append(np.stack([
                words, np.repeat(programs, repeat), np.repeat(threads, repeat), np.full(n, writes), np.full(n, epoch),
                np.full(n, warp_epoch), np.full(n, number),
            ]).astype(np.int64))  # fmt: skip
        table = np.concatenate(columns, axis=1)
        words, programs, threads, writes = table[:4]
        table = table[:, np.lexsort((~writes.astype(bool), words))]  # by word, a store first
        words, programs, threads, writes = table[:4]
        starts = np.flatnonzero(np.r_[True, words[1:] != words[:-1]])
        group = np.cumsum(np.r_[True, words[1:] != words[:-1]]) - 1
        who = programs * 2**20 + threads
        shared = (np.minimum.reduceat(who, starts) != np.maximum.reduceat(who, starts)) & (writes[starts] == 1)
        if not shared.any():
            return None
        table = table[:, shared[group]]
        starts = np.flatnonzero(np.r_[True, table[0, 1:] != table[0, :-1]])
        for start, stop in zip(starts, np.r_[starts[1:], table.shape[1]]):
            if race := self._race_of(table[:, start:stop], granule):
                return race
        return None

    def _race_of(self, accesses: Array, granule: int) -> Race | None:
        words, programs, threads, writes, epochs, warp_epochs, numbers = accesses
        for store in np.flatnonzero(writes):
            other = (programs != programs[store]) | (threads != threads[store])
            within = programs == programs[store]
            warp = threads // WARP == threads[store] // WARP
            ordered = within & ((epochs != epochs[store]) | (warp & (warp_epochs != warp_epochs[store])))
            racing = np.flatnonzero(other & ~ordered)
            if len(racing):
                partner = racing[0]
                verb = "store" if writes[partner] else "load"
                other_thread = f"program {programs[partner]}, thread {threads[partner]}"
                line = self.instructions[numbers[partner]]
                what = f"race in global memory with a {verb} of {other_thread} (PTX line {line.line}, {line.source}), in"
                return Race(what, int(words[store]) * granule, self.instructions[numbers[store]], int(programs[store]),
                            int(threads[store]))  # fmt: skip
        return None

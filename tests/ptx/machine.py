"""Executes a `Program`: many programs of a launch at once, each register an array over (programs, threads).

How it works. A `Kernel` turns every instruction into a Python function once. A `Batch` holds the registers and the shared
memory of some programs, all of which are at the same block. Registers are numpy arrays whose shape broadcasts to
[programs, threads]: a parameter stays [1, 1], a program's index [programs, 1]. A branch must be uniform within a program;
where programs disagree the batch is split in two. Threads of a program run in lockstep, so a missing barrier would change no
result here: `races` decides from who accessed what, and since which barrier, whether a card may order two accesses otherwise.

What may be changed safely: an instruction that is missing goes into `arithmetic` where it computes on registers only, and
into `_OPERATIONS` here where it does more. Either needs its test in ``tests/ptx/test_ptx_arithmetic.py`` or
``tests/ptx/test_ptx.py``.
"""

import collections
import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from tests.ptx import memory, races
from tests.ptx.arithmetic import DTYPES, Unsupported, form, immediate
from tests.ptx.program import Address, Immediate, Instruction, Operand, Register, Symbol, Vector, parse

LANES = 16384  # threads that run at once: fewer cost more Python calls, more leave the cache
WARP = 32
SHARED_BASE = 4096  # where shared memory begins in its own window; 0 stays invalid
JUNK = 0x7FFD_7FFD_7FFD_7FFD  # what registers and shared memory hold at the start: a NaN in every float format

Array = np.ndarray
Step = Callable[["Batch"], None]


class Finding(Exception):
    """Something in a launch that a card would not accept, or whose result it does not define."""


@dataclasses.dataclass
class Checks:
    """What is looked for beside accesses outside of memory, misaligned accesses and races in shared memory.

    Attributes:
        races: between threads, and between programs, in global memory.
        strict: accesses outside the elements of the views that were passed, even if inside their storages.
        backwards: run the last program first.
    """

    races: bool = False
    strict: bool = False
    backwards: bool = False


@dataclasses.dataclass
class Counts:
    """What a kernel has executed, over all its launches.

    Attributes:
        launches, programs: how many.
        barriers: executed by programs.
        executed: instructions that threads executed, by opcode; moves and those that a guard leaves out are among them.
        loaded, stored: bytes of global memory that were accessed, by the width of a thread's access in bytes. Neighbours of a
            warp that load from one address count once, and an address that is one for a whole program does not count.
    """

    launches: int = 0
    programs: int = 0
    barriers: int = 0
    executed: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    loaded: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)
    stored: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)

    @property
    def instructions(self) -> int:
        """Instructions that threads executed."""
        return self.executed.total()


class Batch:
    """Programs that are at the same basic block.

    Attributes:
        registers: one array a slot, see `Kernel`.
        programs: [programs, 1] int64, their number in the launch.
        shared: [programs, bytes] uint8.
        tracker: of accesses to shared memory.
        launch: what all batches of a launch share.
    """

    def __init__(self, registers: list[Array], programs: Array, shared: Array, tracker: races.Shared, launch: "Launch") -> None:
        self.registers = registers
        self.programs = programs
        self.shared = shared
        self.tracker = tracker
        self.launch = launch

    def split(self, chosen: Array) -> tuple["Batch", "Batch"]:
        """Return the programs that are ``chosen`` ([programs] bool), and the others."""
        return self._select(chosen), self._select(~chosen)

    def _select(self, chosen: Array) -> "Batch":
        n = len(self.programs)
        registers = [value[chosen] if len(value) == n else value for value in self.registers]
        return Batch(registers, self.programs[chosen], self.shared[chosen], self.tracker.select(chosen), self.launch)


@dataclasses.dataclass
class Launch:
    """The data that the batches of a launch share; ``visits`` counts, for each block, the programs that have executed it."""

    kernel: "Kernel"
    grid: tuple[int, int, int]
    memory: memory.GlobalMemory
    log: races.GlobalLog | None
    counts: Counts
    visits: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)

    def error(self, what: str, instruction: Instruction, program: int, thread: int) -> Finding:
        """Make a `Finding` that says where."""
        x, y, z = self.grid
        coordinates = (program % x, program // x % y, program // (x * y))
        return Finding(
            f"{what}\n  kernel {self.kernel.program.name}, program {coordinates}, thread {thread}\n"
            f"  PTX line {instruction.line}: {instruction.text}\n  Python: {instruction.source}"
        )


class Kernel:
    """A program that can be run.

    Args:
        ptx: its text.
        threads: of a program.
        shared_bytes: of a program.

    Raises:
        Unsupported: an instruction that the machine does not know.
    """

    def __init__(self, ptx: str, threads: int, shared_bytes: int) -> None:
        self.ptx = ptx
        self.program = parse(ptx)
        self.threads = threads
        self.shared_bytes = -(-shared_bytes // 16) * 16
        self.slots: dict[str, int] = {}
        self.initial: list[Array] = []
        junk = np.uint64(JUNK)
        for register in self.program.registers:
            self._slot(register.name, np.array([[junk]]).astype(DTYPES[register.kind]))
        self.special = {name: self._slot(name, np.zeros((1, 1), np.uint32)) for name in _special_values(1, 1, (1, 1, 1))}
        self.parameters = {name: self._slot(name, np.zeros((1, 1), np.uint64)) for name in self.program.parameters}
        self.blocks: list[tuple[list[Step], Instruction | None]] = []
        self.opcodes = [collections.Counter(step.opcode for step in block) for block in self.program.blocks]
        for block in self.program.blocks:
            end = block[-1] if block and block[-1].opcode.partition(".")[0] in ("bra", "ret") else None
            self.blocks.append(([self._step(step) for step in (block[:-1] if end else block)], end))
        self.granule = min(
            (_width(step.opcode) for block in self.program.blocks for step in block if _is_shared(step)), default=4
        )

    # Translation: each instruction becomes a function of the batch.

    def _slot(self, name: str, value: Array) -> int:
        self.slots[name] = len(self.initial)
        self.initial.append(value)
        return self.slots[name]

    def _source(self, operand: Operand | None, kind: str) -> int:
        """Return the slot that an operand is read from; a constant gets one of its own."""
        match operand:
            case Register(name, actual):
                if actual != kind:
                    raise Unsupported(f"register {name} where {kind} is expected")
                return self.slots[name]
            case Immediate(text):
                name = f"{text} {kind}"
                return self.slots[name] if name in self.slots else self._slot(name, immediate(text, kind))
            case Symbol("global_smem"):
                name = f"global_smem {kind}"
                return self.slots[name] if name in self.slots else self._slot(name, np.full((1, 1), SHARED_BASE, DTYPES[kind]))
            case Symbol(name) if name in self.special:
                return self.special[name]
        raise Unsupported(f"operand {operand}")

    def _step(self, instruction: Instruction) -> Step:
        try:
            operation = _OPERATIONS.get(instruction.opcode.partition(".")[0])
            return operation(self, instruction) if operation else self._arithmetic(instruction)
        except Unsupported as error:
            raise Unsupported(f"PTX line {instruction.line}: {instruction.text!r}: {error}") from None

    def _arithmetic(self, instruction: Instruction) -> Step:
        function, kinds, result = form(instruction.opcode)
        function = inspect.unwrap(function)  # of the guard against numpy's warnings, which `run` has for all
        target, *operands = instruction.operands
        if instruction.opcode.startswith(("min.", "max.")):
            kinds = kinds[: len(operands)]  # f32 has a third operand since sm_100
        if len(operands) != len(kinds) or len(operands) < 1:
            raise Unsupported(f"{len(operands)} operands, expected {len(kinds)}")
        if instruction.opcode.startswith("cvt.") and isinstance(operands[0], Register) and operands[0].kind != kinds[0]:
            function = self._from_wider(function, operands[0].kind, kinds[0])
            kinds = (operands[0].kind,)
        sources = [self._source(operand, kind) for operand, kind in zip(operands, kinds)]
        if not isinstance(target, Register) or target.kind != result:
            raise Unsupported(f"result in {target}, expected {result}")
        return self._assign(instruction, target, function, sources)

    @staticmethod
    def _from_wider(function: Callable[..., Array], kind: str, expected: str) -> Callable[..., Array]:
        """Return a conversion that reads the low bits of a register wider than its type, which PTX allows."""
        if "pred" in (kind, expected) or int(kind[1:]) < int(expected[1:]):
            raise Unsupported(f"a register of {kind} where {expected} is expected")
        dtype = DTYPES[expected]
        return lambda value: function(value.astype(dtype))

    def _assign(self, instruction: Instruction, target: Register, function: Callable[..., Array], sources: list[int]) -> Step:
        """Return the step ``target = function(*sources)``, where the guard allows."""
        slot = self.slots[target.name]
        if instruction.guard is not None:
            guard = self.slots[instruction.guard.name]
            negated = instruction.negated
            select = np.where if target.kind == "pred" else inspect.unwrap(form(f"selp.{target.kind}").function)

            def guarded(batch: Batch) -> None:
                r = batch.registers
                new = function(*[r[source] for source in sources])
                old = r[slot]
                if negated:
                    new, old = old, new
                r[slot] = select(r[guard], new, old) if select is np.where else select(new, old, r[guard])

            return guarded
        match sources:
            case [a]:

                def step(batch: Batch) -> None:
                    r = batch.registers
                    r[slot] = function(r[a])

            case [a, b]:

                def step(batch: Batch) -> None:
                    r = batch.registers
                    r[slot] = function(r[a], r[b])

            case [a, b, c]:

                def step(batch: Batch) -> None:
                    r = batch.registers
                    r[slot] = function(r[a], r[b], r[c])

            case _:

                def step(batch: Batch) -> None:
                    r = batch.registers
                    r[slot] = function(*[r[source] for source in sources])

        return step

    # Execution.

    def run(self, grid: tuple[int, int, int], arguments: Sequence[Array], space: memory.GlobalMemory, checks: Checks,
            counts: Counts) -> None:  # fmt: skip
        """Run one launch.

        Args:
            grid: programs along each axis.
            arguments: one [1, 1] array a parameter, in the dtype of its register.
            space: what may be accessed.
            checks: what is looked for.
            counts: is added to.

        Raises:
            Finding: at the first thing that is found; memory may have been written before.
        """
        n_programs = math.prod(grid)
        log = races.GlobalLog() if checks.races else None
        launch = Launch(self, grid, space, log, counts)
        counts.launches += 1
        counts.programs += n_programs
        size = max(1, LANES // self.threads)
        starts = range(0, n_programs, size)
        with np.errstate(all="ignore"):
            for start in reversed(starts) if checks.backwards else starts:
                programs = np.arange(start, min(start + size, n_programs), dtype=np.int64)[:, None]
                self._run_batch(self._batch(programs[::-1] if checks.backwards else programs, arguments, launch))
        self._count(launch)
        if log is not None and (race := log.first_race()):
            raise launch.error(f"{race.what} {space.owner(race.address)}", race.instruction, race.program, race.thread)

    def _count(self, launch: Launch) -> None:
        for index, n_programs in launch.visits.items():
            for opcode, count in self.opcodes[index].items():
                launch.counts.executed[opcode] += count * n_programs * self.threads
                launch.counts.barriers += count * n_programs * (opcode == "bar.sync")

    def _batch(self, programs: Array, arguments: Sequence[Array], launch: Launch) -> Batch:
        registers = list(self.initial)
        for name, value in _special_values(programs, self.threads, launch.grid).items():
            registers[self.special[name]] = value
        for slot, value in zip(self.parameters.values(), arguments, strict=True):
            registers[slot] = value
        shared = np.full((len(programs), self.shared_bytes // 8), JUNK, np.uint64).view(np.uint8)
        tracker = races.Shared(len(programs), self.shared_bytes, self.granule)
        return Batch(registers, programs, shared, tracker, launch)

    def _run_batch(self, batch: Batch) -> None:
        waiting = [(0, batch)]
        while waiting:
            index, batch = waiting.pop()
            while index is not None:
                steps, end = self.blocks[index]
                batch.launch.visits[index] += len(batch.programs)
                for step in steps:
                    step(batch)
                index += 1
                if end is None:
                    index = index if index < len(self.blocks) else None
                    continue
                target = None if end.opcode == "ret" else self.program.labels[end.operands[0].name]
                if end.guard is None:
                    index = target
                    continue
                taken = self._decision(batch, end)
                if taken.all():
                    index = target
                elif taken.any():
                    gone, batch = batch.split(taken)
                    if target is not None:
                        waiting.append((target, gone))

    def _decision(self, batch: Batch, end: Instruction) -> Array:
        """Return which programs take a branch, [programs] or [1] bool."""
        condition = batch.registers[self.slots[end.guard.name]]
        taken = condition.all(axis=1)
        if condition.shape[1] > 1 and (mixed := condition.any(axis=1) & ~taken).any():
            row = int(mixed.argmax())
            thread = int((condition[row] != condition[row, 0]).argmax())
            program = int(batch.programs[row if len(condition) > 1 else 0, 0])
            raise batch.launch.error("threads of one program disagree on a branch", end, program, thread)
        return ~taken if end.negated else taken


def _special_values(programs: Array | int, threads: int, grid: tuple[int, int, int]) -> dict[str, Array]:
    x, y, z = grid
    numbers = np.asarray(programs).reshape(-1, 1)
    thread = np.arange(threads, dtype=np.uint32)[None, :]
    constants = {"%tid.y": 0, "%tid.z": 0, "%ntid.x": threads, "%nctaid.x": x, "%nctaid.y": y, "%nctaid.z": z}
    indices = {"%ctaid.x": numbers % x, "%ctaid.y": numbers // x % y, "%ctaid.z": numbers // (x * y)}
    values = {name: np.full((1, 1), value, np.uint32) for name, value in constants.items()}
    values |= {name: value.astype(np.uint32) for name, value in indices.items()}
    return values | {"%tid.x": thread, "%laneid": thread % WARP}


# Instructions that do more than compute.


def _move(kernel: Kernel, instruction: Instruction) -> Step:
    """``mov``: between registers, and between one register and several halves."""
    name, kind = instruction.opcode.split(".")
    kind = {"pred": "pred"}.get(kind, "b" + kind[1:])
    target, source = instruction.operands
    if isinstance(source, Vector):
        sources = [kernel._source(item, f"b{int(kind[1:]) // len(source.items)}") for item in source.items]
        bits = int(kind[1:]) // len(sources)
        dtype = DTYPES[kind]

        def pack(*items: Array) -> Array:
            packed = items[0].astype(dtype)
            for position, item in enumerate(items[1:], 1):
                packed = packed | (item.astype(dtype) << dtype(bits * position))
            return packed

        return kernel._assign(instruction, target, pack, sources)
    slot = kernel._source(source, kind)
    if not isinstance(target, Vector):
        return kernel._assign(instruction, target, lambda value: value, [slot])
    bits = int(kind[1:]) // len(target.items)
    item_type = DTYPES[f"b{bits}"]
    dtype = DTYPES[kind]

    def extract(position: int) -> Callable[..., Array]:
        shift = dtype(bits * position)
        return lambda value: (value >> shift).astype(item_type)

    items = [(position, item) for position, item in enumerate(target.items) if item is not None]
    steps = [kernel._assign(instruction, item, extract(position), [slot]) for position, item in items]

    def unpack(batch: Batch) -> None:
        for step in steps:
            step(batch)

    return unpack


def _compare(kernel: Kernel, instruction: Instruction) -> Step:
    """``setp``; of two pairs of halves the first predicate compares the lower halves, the second the upper ones."""
    if not instruction.opcode.endswith("x2"):
        return kernel._arithmetic(instruction)
    compare = inspect.unwrap(form(instruction.opcode.removesuffix("x2")).function)
    target, *operands = instruction.operands
    items = target.items if isinstance(target, Vector) else ()
    if len(items) != 2 or len(operands) != 2 or any(not isinstance(i, Register) or i.kind != "pred" for i in items):
        raise Unsupported(f"operands of {instruction.opcode}")
    sources = [kernel._source(operand, "b32") for operand in operands]

    def of_halves(shift: int) -> Callable[..., Array]:
        return lambda a, b: compare((a >> np.uint32(shift)).astype(np.uint16), (b >> np.uint32(shift)).astype(np.uint16))

    steps = [kernel._assign(instruction, item, of_halves(16 * position), sources) for position, item in enumerate(items)]

    def both(batch: Batch) -> None:
        for step in steps:
            step(batch)

    return both


def _convert_address(kernel: Kernel, instruction: Instruction) -> Step:
    """``cvta``: generic addresses are global ones here."""
    if instruction.opcode not in ("cvta.to.global.u64", "cvta.global.u64"):
        raise Unsupported("cvta of another space")
    target, source = instruction.operands
    return kernel._assign(instruction, target, lambda value: value, [kernel._source(source, "b64")])


_CACHE_HINTS = {
    "L1::evict_first",
    "L1::evict_last",
    "L1::no_allocate",
    "L1::evict_unchanged",
    "ca",
    "cg",
    "cs",
    "nc",
    "wb",
    "wt",
}


@dataclasses.dataclass
class _Access:
    """A load, store or atomic operation, as its opcode spells it."""

    space: str
    width: int
    signed: bool
    count: int


def _access(instruction: Instruction) -> _Access:
    _, *modifiers = instruction.opcode.split(".")
    spaces = [m for m in modifiers if m in ("global", "shared", "shared::cta", "param")]
    counts = [int(m[1]) for m in modifiers if m in ("v2", "v4")]
    kind = modifiers[-1]
    rest = [m for m in modifiers[:-1] if m not in ("global", "shared", "shared::cta", "param", "v2", "v4", *_CACHE_HINTS)]
    if len(spaces) != 1 or rest or kind[0] not in "busf" or kind[1:] not in ("8", "16", "32", "64"):
        raise Unsupported(f"modifiers of {instruction.opcode}")
    return _Access(spaces[0].partition("::")[0], int(kind[1:]) // 8, kind[0] == "s", counts[0] if counts else 1)


def _width(opcode: str) -> int:
    """Bytes of one element of a load or store; a row of ldmatrix has 16, in elements of 2."""
    return 2 if opcode.startswith("ldmatrix") else int(opcode.rpartition(".")[2][1:]) // 8


def _is_shared(instruction: Instruction) -> bool:
    return ".shared" in instruction.opcode


@functools.cache
def _all_lanes(rows: int, threads: int) -> tuple[Array, Array]:
    """Return row and thread of every lane."""
    return np.repeat(np.arange(rows), threads), np.tile(np.arange(threads), rows)


class _Lanes(NamedTuple):
    """The threads that take part in an access.

    Attributes:
        shape: [programs, threads], or [programs, 1] where one thread's access stands for all.
        mask: in that shape, or None: all take part.
        addresses: flat, int64, of those that take part.
        values: likewise, what they store.
    """

    shape: tuple[int, int]
    mask: Array | None
    addresses: Array
    values: list[Array]

    def owners(self) -> tuple[Array, Array]:
        """Return row in the batch and thread of each active lane."""
        if self.mask is not None:
            return np.nonzero(self.mask)
        return _all_lanes(*self.shape)

    def merged(self, before: Array, values: Array) -> Array:
        """Return a register in which the active lanes have new values."""
        if self.mask is None:
            return values.reshape(self.shape)
        merged = np.array(np.broadcast_to(before, self.shape))
        merged[self.mask] = values
        return merged


class _Address:
    """Computes the addresses of an access, and checks them."""

    def __init__(self, kernel: Kernel, instruction: Instruction, operand: Operand, space: str, size: int) -> None:
        assert isinstance(operand, Address)
        self.instruction = instruction
        self.size = size
        self.space = space
        base = operand.base
        if isinstance(base, str):
            base = Symbol(base)
        wide = isinstance(base, Register) and base.kind == "b64"
        self.slot = kernel._source(base, "b64" if wide else "b32")
        self.offset = np.int64(operand.offset)
        self.guard = None if instruction.guard is None else kernel.slots[instruction.guard.name]
        self.threads = kernel.threads

    def lanes(self, batch: Batch, *values: Array, alone: bool = True) -> "_Lanes":
        """Return the active lanes.

        An address that is the same for all threads of a program is accessed once where ``alone`` allows.
        """
        r = batch.registers
        addresses = r[self.slot]
        addresses = addresses.astype(np.int64) + self.offset if self.offset else addresses.astype(np.int64, copy=False)
        n = len(batch.programs)
        mask = None
        width = self.threads
        if self.guard is not None:
            mask = ~r[self.guard] if self.instruction.negated else r[self.guard]
            if mask.all():
                mask = None
        if alone and addresses.shape[1] == 1 and mask is None and all(value.shape[1] == 1 for value in values):
            width = 1
        shape = (n, width)
        flat = [array if array.shape == shape else np.broadcast_to(array, shape) for array in (addresses, *values)]
        if mask is not None:
            mask = mask if mask.shape == shape else np.broadcast_to(mask, shape)
            flat = [array[mask] for array in flat]
        else:
            flat = [array.reshape(-1) for array in flat]
        return _Lanes(shape, mask, flat[0], flat[1:])

    def uniform(self, batch: Batch) -> bool:
        """Tell whether all threads of a program have the same address."""
        return self.guard is None and batch.registers[self.slot].shape[1] == 1

    def fail(self, batch: Batch, what: str, lanes: _Lanes, lane: int) -> Finding:
        """Make the `Finding` of one lane."""
        rows, threads = lanes.owners()
        return batch.launch.error(what, self.instruction, int(batch.programs[rows[lane], 0]), int(threads[lane]))

    def check(self, batch: Batch, lanes: _Lanes) -> None:
        """Check alignment and bounds of the active lanes."""
        size = self.size
        addresses = lanes.addresses
        if size > 1 and int(np.bitwise_or.reduce(addresses)) & (size - 1):
            lane = int((addresses & (size - 1)).astype(bool).argmax())
            owner = batch.launch.memory.owner(int(addresses[lane])) if self.space == "global" else "shared memory"
            what = f"misaligned access: {size} bytes at {int(addresses[lane]):#x}, in {owner}"
            raise self.fail(batch, what, lanes, lane)
        if self.space == "global":
            try:
                batch.launch.memory.check(addresses.view(np.uint64), size)
            except memory.OutOfBounds as error:
                lane, where = error.args
                raise self.fail(batch, f"access outside of memory: {size} bytes, {where}", lanes, lane) from None
        else:
            limit = SHARED_BASE + batch.shared.shape[1] - size
            if addresses.min() < SHARED_BASE or addresses.max() > limit:
                lane = int(((addresses < SHARED_BASE) | (addresses > limit)).argmax())
                what = f"access outside of shared memory: {size} bytes at offset {int(addresses[lane]) - SHARED_BASE}"
                raise self.fail(batch, what, lanes, lane)

    def words(self, batch: Batch, lanes: _Lanes, *, writes: bool) -> tuple[Array, Array]:
        """Check and record the access; return the memory in words of its size, and the index of each lane's word."""
        self.check(batch, lanes)
        size = self.size
        if self.space == "global":
            log = batch.launch.log
            self._count(batch, lanes, writes)
            if log is not None:
                rows, threads = lanes.owners()
                log.add(self.instruction, writes, size, lanes.addresses, batch.programs[rows, 0], threads, batch.tracker)
            return memory.VIEWS[size], lanes.addresses // size - memory.ORIGIN // size
        rows, threads = lanes.owners()
        offsets = lanes.addresses - SHARED_BASE
        if (lane := batch.tracker.access(writes, rows, threads, offsets, size)) is not None:
            verb = "store" if writes else "load"
            what = f"race in shared memory: a {verb} that no barrier orders after another thread's access"
            raise self.fail(batch, what, lanes, lane)
        return batch.shared.reshape(-1).view(memory.WORDS[size]), (rows * batch.shared.shape[1] + offsets) // size

    def _count(self, batch: Batch, lanes: _Lanes, writes: bool) -> None:
        """Add the bytes of an access to global memory to the counts, as `Counts` defines them."""
        counts = batch.launch.counts
        addresses = lanes.addresses
        if writes:
            counts.stored[self.size] += self.size * len(addresses)
        elif not self.uniform(batch):
            repeated = addresses[1:] == addresses[:-1]
            if repeated.any():  # of neighbours in one warp
                repeated &= lanes.owners()[1][1:] % WARP > 0
            counts.loaded[self.size] += self.size * (len(addresses) - int(np.count_nonzero(repeated)))


def _load(kernel: Kernel, instruction: Instruction) -> Step:
    access = _access(instruction)
    target, source = instruction.operands
    targets = [t for t in (target.items if isinstance(target, Vector) else (target,))]
    if len(targets) != access.count or any(t is not None and not isinstance(t, Register) for t in targets):
        raise Unsupported(f"destination {target}")
    dtypes = [None if t is None else DTYPES[t.kind] for t in targets]
    slots = [None if t is None else kernel.slots[t.name] for t in targets]
    if access.space == "param":
        return _load_parameter(kernel, source, access, slots[0], dtypes[0])
    size = access.width * access.count
    where = _Address(kernel, instruction, source, access.space, size)

    def step(batch: Batch) -> None:
        lanes = where.lanes(batch, alone=access.space == "global" and batch.launch.log is None)
        if not len(lanes.addresses):
            return
        view, index = where.words(batch, lanes, writes=False)
        words = view.take(index, mode="clip").view(memory.WORDS[access.width]).reshape(-1, access.count)
        r = batch.registers
        for position, (slot, dtype) in enumerate(zip(slots, dtypes)):
            if slot is None:
                continue
            value = np.ascontiguousarray(words[:, position])
            value = value.view(f"i{access.width}").astype(dtype) if access.signed else value.astype(dtype, copy=False)
            r[slot] = lanes.merged(r[slot], value)

    return step


def _load_parameter(kernel: Kernel, source: Operand, access: _Access, slot: int, dtype: type) -> Step:
    if not isinstance(source, Address) or source.base not in kernel.parameters or source.offset:
        raise Unsupported(f"parameter {source}")
    parameter = kernel.parameters[source.base]
    declared = int(kernel.program.parameters[source.base][1:]) // 8
    if access.width > declared:
        raise Unsupported(f"{access.width} bytes of a parameter of {declared}")

    def step(batch: Batch) -> None:
        value = batch.registers[parameter].view(np.uint64).astype(memory.WORDS[access.width])
        batch.registers[slot] = (value.view(f"i{access.width}") if access.signed else value).astype(dtype)

    return step


def _store(kernel: Kernel, instruction: Instruction) -> Step:
    access = _access(instruction)
    target, source = instruction.operands
    items = source.items if isinstance(source, Vector) else (source,)
    if len(items) != access.count or None in items:
        raise Unsupported(f"source {source}")
    kinds = [item.kind if isinstance(item, Register) else f"b{max(16, 8 * access.width)}" for item in items]
    sources = [kernel._source(item, kind) for item, kind in zip(items, kinds)]
    size = access.width * access.count
    where = _Address(kernel, instruction, target, access.space, size)

    def step(batch: Batch) -> None:
        r = batch.registers
        lanes = where.lanes(batch, *[r[slot] for slot in sources], alone=False)
        if not len(lanes.addresses):
            return
        words = np.empty((len(lanes.addresses), access.count), memory.WORDS[access.width])
        for position, value in enumerate(lanes.values):
            words[:, position] = value  # the low bits
        words = words.reshape(-1).view(memory.WORDS[size])
        view, index = where.words(batch, lanes, writes=True)
        view[index] = words
        if access.space == "shared" and (differs := view.take(index) != words).any():
            what = "race in shared memory: two threads store different values to one address at once"
            raise where.fail(batch, what, lanes, int(differs.argmax()))

    return step


def _load_matrix(kernel: Kernel, instruction: Instruction) -> Step:
    """``ldmatrix``: matrices of 8 rows of 16 bytes in shared memory; 4 threads share a row."""
    opcode = instruction.opcode.split(".")
    count = {"x1": 1, "x2": 2, "x4": 4}.get(opcode[4], 0) if len(opcode) > 4 else 0
    transposed = "trans" in opcode
    spelled = ["ldmatrix", "sync", "aligned", "m8n8", f"x{count}", *["trans"] * transposed]
    if opcode not in (spelled + ["shared", "b16"], spelled + ["shared::cta", "b16"]):
        raise Unsupported(f"form {instruction.opcode}")
    target, source = instruction.operands
    slots = [kernel.slots[item.name] for item in (target.items if isinstance(target, Vector) else (target,))]
    where = _Address(kernel, instruction, source, "shared", 16)
    thread = np.arange(kernel.threads)

    def step(batch: Batch) -> None:
        used = np.broadcast_to(thread % WARP < 8 * count, (len(batch.programs), kernel.threads))  # others' are not used
        addresses = where.lanes(batch, alone=False).addresses.reshape(used.shape)
        _, index = where.words(batch, _Lanes(used.shape, used, addresses[used], []), writes=False)
        elements = batch.shared.reshape(-1).view(np.uint16)[8 * index[:, None] + np.arange(8)]
        elements = elements.reshape(len(batch.programs), -1, count, 8, 8)  # program, warp, matrix, row, column
        if transposed:
            elements = elements.swapaxes(3, 4)
        pairs = np.ascontiguousarray(elements).view(np.uint32)  # program, warp, matrix, row, pair: thread 4 row + pair
        for position, slot in enumerate(slots):
            batch.registers[slot] = np.ascontiguousarray(pairs[:, :, position].reshape(len(batch.programs), -1))
        batch.tracker.gather_warps()

    return step


def _shuffle(kernel: Kernel, instruction: Instruction) -> Step:
    """``shfl.sync``: each lane reads the value of another lane of the warp."""
    _, *modifiers = instruction.opcode.split(".")
    target, *operands = instruction.operands
    if (
        len(modifiers) != 3
        or modifiers[0] != "sync"
        or modifiers[1] not in ("bfly", "up", "down", "idx")
        or modifiers[2] != "b32"
    ):
        raise Unsupported(f"form {instruction.opcode}")
    numbers = [_constant(operand) for operand in operands[1:]]
    mode = modifiers[1]
    lane, clamp, members = numbers
    if members not in (-1, 0xFFFFFFFF) or clamp != (0 if mode == "up" else 31):
        raise Unsupported("shuffles of a part of a warp")
    lanes = np.arange(WARP)
    source_lanes = {"bfly": lanes ^ lane, "up": lanes - lane, "down": lanes + lane, "idx": np.full(WARP, lane)}[mode]
    taken = np.where((source_lanes >= 0) & (source_lanes < WARP), source_lanes, lanes)

    def shuffle(value: Array) -> Array:
        if value.shape[1] == 1:
            return value
        return value.reshape(len(value), -1, WARP)[:, :, taken].reshape(value.shape)

    return _gathering(kernel._assign(_unguarded(instruction), target, shuffle, [kernel._source(operands[0], "b32")]))


_REDUCTIONS = {
    "add.s32": (np.add, np.uint32), "add.u32": (np.add, np.uint32),
    "min.s32": (np.minimum, np.int32), "max.s32": (np.maximum, np.int32),
    "min.u32": (np.minimum, np.uint32), "max.u32": (np.maximum, np.uint32),
    "and.b32": (np.bitwise_and, np.uint32), "or.b32": (np.bitwise_or, np.uint32), "xor.b32": (np.bitwise_xor, np.uint32),
}  # fmt: skip


def _reduce(kernel: Kernel, instruction: Instruction) -> Step:
    """``redux.sync``: reduce the 32 values of a warp to one."""
    operation = instruction.opcode.removeprefix("redux.sync.")
    target, source, members = instruction.operands
    if operation in _REDUCTIONS:
        ufunc, dtype = _REDUCTIONS[operation]

        def reduced(values: Array) -> Array:
            return ufunc.reduce(values.view(dtype), axis=2, dtype=dtype, keepdims=True).view(np.uint32)

    elif operation in ("max.f32", "min.f32", "max.NaN.f32", "min.NaN.f32"):
        pairwise = form(operation).function

        def reduced(values: Array) -> Array:
            while values.shape[2] > 1:
                half = values.shape[2] // 2
                values = pairwise(values[:, :, :half], values[:, :, half:])
            return values

    else:
        raise Unsupported(f"form {instruction.opcode}")
    threads = kernel.threads

    def reduce(value: Array, members: Array) -> Array:
        if not (members == 0xFFFFFFFF).all():
            raise Unsupported(f"PTX line {instruction.line}: {instruction.text!r}: a part of a warp")
        value = np.ascontiguousarray(np.broadcast_to(value, (len(value), threads)))
        result = reduced(value.reshape(len(value), -1, WARP))
        return np.broadcast_to(result, (*result.shape[:2], WARP)).reshape(len(value), threads)

    sources = [kernel._source(source, "b32"), kernel._source(members, "b32")]
    return _gathering(kernel._assign(_unguarded(instruction), target, reduce, sources))


def _gathering(step: Step) -> Step:
    """Return the step, after which accesses of a warp's threads are ordered."""

    def gathered(batch: Batch) -> None:
        step(batch)
        batch.tracker.gather_warps()

    return gathered


def _barrier(kernel: Kernel, instruction: Instruction) -> Step:
    _unguarded(instruction)
    if instruction.opcode == "bar.warp.sync" and _constant(instruction.operands[0]) in (-1, 0xFFFFFFFF):
        return lambda batch: batch.tracker.gather_warps()
    if instruction.opcode == "bar.sync" and len(instruction.operands) == 1:
        return lambda batch: batch.tracker.barrier()
    raise Unsupported(f"form {instruction.opcode}")


def _atomic(kernel: Kernel, instruction: Instruction) -> Step:
    """``atom.add``, and ``red.add``, which returns nothing: one lane after another, in the order of programs and threads."""
    name, *modifiers = instruction.opcode.split(".")
    if modifiers not in (["global", "gpu", "acq_rel", "add", "f64"], ["global", "gpu", "relaxed", "add", "f64"]):
        raise Unsupported(f"form {instruction.opcode}")
    *targets, address, source = instruction.operands
    if len(targets) != (name == "atom") or not all(isinstance(target, Register) for target in targets):
        raise Unsupported(f"form {instruction.opcode}")
    where = _Address(kernel, instruction, address, "global", 8)
    slots = [kernel.slots[target.name] for target in targets]
    value_slot = kernel._source(source, "b64")
    add = form("add.rn.f64").function

    def step(batch: Batch) -> None:
        r = batch.registers
        lanes = where.lanes(batch, r[value_slot], alone=False)
        if not len(lanes.addresses):
            return
        where.check(batch, lanes)
        index = lanes.addresses // 8 - memory.ORIGIN // 8
        before = np.empty(len(index), np.uint64)
        for lane, (word, value) in enumerate(zip(index, lanes.values[0])):
            before[lane] = memory.VIEWS[8][word]
            memory.VIEWS[8][word] = add(before[lane : lane + 1, None], np.array([[value]]))[0, 0]
        counts = batch.launch.counts
        counts.loaded[8] += 8 * len(index)
        counts.stored[8] += 8 * len(index)
        for slot in slots:
            r[slot] = lanes.merged(r[slot], before)

    return step


def _constant(operand: Operand) -> int:
    if not isinstance(operand, Immediate):
        raise Unsupported(f"{operand} where a constant is expected")
    return int(operand.text.rstrip("U"), 0)


def _unguarded(instruction: Instruction) -> Instruction:
    if instruction.guard is not None:
        raise Unsupported("a guard: threads of a warp would not take part")
    return instruction


_OPERATIONS: dict[str, Callable[[Kernel, Instruction], Step]] = {
    "mov": _move, "setp": _compare, "cvta": _convert_address, "ld": _load, "st": _store, "atom": _atomic, "red": _atomic,
    "ldmatrix": _load_matrix, "shfl": _shuffle, "redux": _reduce, "bar": _barrier,
}  # fmt: skip

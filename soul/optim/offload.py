"""States in main memory, which pass over the device a bucket at a time (``state_offload=True``).

How it works. m, h, their scales and the low bits of all parameters stay in main memory, pinned where the device is a GPU. A
step divides them into buckets of `BUCKET_BYTES`; a long parameter is cut into pieces, since every op is elementwise. Each
device has two slots, each with room for a bucket. A bucket is copied up into the slot that is free, stepped there by the same
op as any other state, and copied down again. Copies run on two streams of their own, one for each direction, beside the
stream that computes; events order the three. While one bucket is stepped, the next one comes up into the other slot, and the
one before goes down. Nothing waits on the host but `Transfers.wait`, which must be called before main memory is read. On a
CPU torch's streams and events do nothing, and each copy is complete when it returns: the code is the same.

Safe to change: `BUCKET_BYTES`. Not safe: `PIECE`, which must stay a multiple of a group of 8-bit states, and of the blocks in
which the ops sum up telemetry; and the three waits in `Transfers.run`. A bucket must hold pieces of consecutive parameters, one
of each: counters and corrections of a bucket are a slice of those of its step group, in memory that stays the same.
"""

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from soul_kernels import Guards, HessianEma, Noise, SophiaStep, StepOptions, StepTensors
from soul_kernels.bundles import NO_GUARDS
from soul_kernels.errors import argument_error
from soul_kernels.reference.rounding import GROUP, in_memory_order
from soul_kernels.tensors import PARAM_DTYPES, STATE_DTYPES, check_scales, check_tensor_lists, same_layout

BUCKET_BYTES = 64 << 20  # of states: a millisecond or two of transfer, far longer than the launches of a bucket
PIECE = 1 << 16  # elements: a piece that is not the end of its parameter has a multiple of them
ALIGNMENT = 128  # bytes: states in a slot begin at a multiple of it, so that the kernels access 16 bytes at a time
SCALES = ("exp_avg_scales", "hessian_scales")
HESSIAN = ("hessians", "hessian_scales")

Lists = Mapping[str, Sequence[Tensor | None]]  # name of an op's argument -> the states, one of each parameter


class Piece(NamedTuple):
    """Elements ``start`` to ``stop`` of the parameter ``number`` of a step group, in the order of memory."""

    number: int
    start: int
    stop: int


class Bucket(NamedTuple):
    """The states of consecutive parameters, or pieces of them, that are on the device at one time.

    Attributes:
        pieces: of the parameters.
        host: name of an op's argument -> the states of each piece, as vectors in main memory.
    """

    pieces: list[Piece]
    host: dict[str, list[Tensor | None]]

    @property
    def span(self) -> slice:
        """The parameters that have a piece here."""
        return slice(self.pieces[0].number, self.pieces[-1].number + 1)

    def of(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the pieces of parameters or gradients, as vectors."""
        return [in_memory_order(tensors[piece.number].detach())[piece.start : piece.stop] for piece in self.pieces]

    def noise(self, noise: Noise) -> Noise:
        """Return the noise of the pieces, which is that of the whole parameters."""
        ids = noise.tensor_ids
        offsets = noise.tensor_offsets
        return noise._replace(
            tensor_ids=None if ids is None else [ids[piece.number] for piece in self.pieces],
            tensor_offsets=[(0 if offsets is None else offsets[piece.number]) + piece.start for piece in self.pieces],
            steps=None if noise.steps is None else noise.steps[self.span],
        )


class Slot:
    """Memory on a device for the states of one bucket.

    Attributes:
        number: 0 or 1.
        buffer: uint8.
        free: event after which the memory may be written: the last bucket has gone down.
    """

    def __init__(self, number: int, device: torch.device) -> None:
        self.number = number
        self.buffer = torch.empty(0, dtype=torch.uint8, device=device)
        self.free: Any = None

    def views(self, host: Lists) -> dict[str, list[Tensor | None]]:
        """Return vectors in the slot, one beside each vector of a bucket in main memory."""
        staged: dict[str, list[Tensor | None]] = {name: [None] * len(vectors) for name, vectors in host.items()}
        for name, index, vector, offset in _places(host):
            staged[name][index] = self.buffer[offset : offset + vector.nbytes].view(vector.dtype)
        return staged


class Transfers:
    """The way of states between main memory and one device: two slots, and a stream for each direction.

    Attributes:
        bytes_up: bytes that have been copied to the device.
        bytes_down: bytes that have been copied back.
    """

    def __init__(self, device: torch.device) -> None:
        self.bytes_up = 0
        self.bytes_down = 0
        self._device = device
        self._streams = torch.get_device_module(device)
        self._up, self._down = (self._new_stream() for _ in range(2))
        self._slots = (Slot(0, device), Slot(1, device))
        for slot in self._slots:
            slot.free = self._compute().record_event()
        self._turn = 0

    @property
    def device_bytes(self) -> int:
        """Bytes that the slots take on the device."""
        return sum(slot.buffer.nbytes for slot in self._slots)

    def _new_stream(self) -> Any:
        return self._streams.Stream() if self._device.type == "cpu" else self._streams.Stream(device=self._device)

    def _compute(self) -> Any:
        """Return the stream that computes."""
        return self._streams.current_stream(self._device)

    def reserve(self, nbytes: int) -> None:
        """Make room for a bucket of ``nbytes`` in both slots, before any call is prepared for them."""
        for slot in self._slots:
            if slot.buffer.nbytes < nbytes:
                slot.buffer = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
                if self._device.type != "cpu":  # the allocator must not give the memory away while copies use it
                    slot.buffer.record_stream(self._up)
                    slot.buffer.record_stream(self._down)
                slot.free = self._compute().record_event()

    def next_slot(self) -> Slot:
        """Return the slot for the next bucket: the two take turns."""
        self._turn = 1 - self._turn
        return self._slots[self._turn]

    def run(self, call: "StagedCall") -> None:
        """Copy a bucket up, run its op, and copy the bucket down, without waiting on the host."""
        compute = self._compute()
        self._up.wait_event(call.slot.free)  # the last bucket in this slot has gone down
        with self._streams.stream(self._up):
            self.bytes_up += _copy(call.up)
        compute.wait_event(self._up.record_event())
        call.op()
        self._down.wait_event(compute.record_event())
        with self._streams.stream(self._down):
            self.bytes_down += _copy(call.down)
        call.slot.free = self._down.record_event()

    def wait(self) -> None:
        """Wait until all states are in main memory."""
        if self._device.type != "cpu":
            self._down.synchronize()


@dataclasses.dataclass(frozen=True)
class StagedCall:
    """A prepared call of an op on a bucket in a slot, with the copies before and after it.

    Attributes:
        transfers: the way of the device.
        slot: the slot that the call was prepared for.
        op: the `PreparedCall`.
        tensors: what the op takes, which must live as long as the call.
        up: pairs (target, source).
        down: pairs (target, source).
    """

    transfers: Transfers
    slot: Slot
    op: Any
    tensors: object
    up: list[tuple[Tensor, Tensor]]
    down: list[tuple[Tensor, Tensor]]

    def __call__(self) -> None:
        """Run it."""
        self.transfers.run(self)


class OffloadedStates:
    """The buckets of a step group, and the ops that step them; tables of an op are kept for each bucket and slot."""

    def __init__(self) -> None:
        self.buckets: list[Bucket] = []
        self._steps: dict[tuple[int, int], SophiaStep] = {}
        self._emas: dict[tuple[int, int], HessianEma] = {}

    @property
    def version(self) -> int:
        """Number that changes if a step of other tensors was prepared than before."""
        return sum(step.version for step in self._steps.values())

    def divide(self, params: Sequence[Tensor], read: Mapping[str, Sequence[Tensor]], lists: Lists) -> int:
        """Check the tensors of a call, and divide the states into buckets; return the bytes of the largest one.

        Args:
            params: the parameters, dense.
            read: "grads" -> their gradients and, for Hutchinson's estimate, "probes" -> the probes.
            lists: their states in main memory, those that the call needs.

        Raises:
            ValueError: a gradient or a state does not fit; nothing was changed.
        """
        on_device: dict[str, Any] = {"params": params, **read}
        check_tensor_lists(dict.fromkeys(on_device, PARAM_DTYPES), **on_device)
        for name, tensors in lists.items():
            for index, (param, tensor) in enumerate(zip(params, tensors)):
                if tensor is not None:
                    _check_state(f"{name}[{index}]", name, param, tensor)
        codes: dict[str, Any] = {name: tensors for name, tensors in lists.items() if name in ("exp_avgs", "hessians")}
        check_tensor_lists(dict.fromkeys(codes, STATE_DTYPES), written=list(codes), **codes)
        for name in codes:
            check_scales(f"{name.removesuffix('s')}_scales", lists.get(f"{name.removesuffix('s')}_scales"), name, codes[name])
        self.buckets = [Bucket(pieces, _vectors(pieces, lists)) for pieces in _divided(params, lists)]
        return max((_size(bucket.host) for bucket in self.buckets), default=0)

    def steps(
        self,
        transfers: Transfers,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        options: StepOptions,
        *,
        noise: Noise,
        guards: Guards = NO_GUARDS,
        telemetry: Tensor | None = None,
        backend: str = "auto",
    ) -> Iterator[StagedCall]:
        """Prepare the steps of all buckets, after `divide` and `Transfers.reserve`; arguments as of `SophiaStep.prepare`."""
        grads = _laid_out(grads, params)
        kept = HESSIAN if options.beta2 is None else ()
        for number, bucket in enumerate(self.buckets):
            slot = transfers.next_slot()
            staged: dict[str, Any] = slot.views(bucket.host)
            corrections = None if options.corrections is None else options.corrections[bucket.span]
            bucket_noise = bucket.noise(noise)
            tensors = StepTensors(bucket.of(params), bucket.of(grads), **staged)
            op = self._steps.setdefault((number, slot.number), SophiaStep()).prepare(
                tensors,
                options._replace(corrections=corrections),
                noise=bucket_noise,
                guards=guards,
                telemetry=telemetry,
                backend=backend,
            )
            yield _staged_call(transfers, slot, op, (tensors, corrections, bucket_noise), bucket, staged, kept)

    def updates(
        self,
        transfers: Transfers,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        probes: Sequence[Tensor] | None,
        *,
        beta2: float,
        noise: Noise,
        guards: Guards = NO_GUARDS,
        backend: str = "auto",
    ) -> Iterator[StagedCall]:
        """Prepare the updates of the Hessians of all buckets, like `steps`; arguments as of `HessianEma.prepare`."""
        grads = _laid_out(grads, params)
        probes = None if probes is None else _laid_out(probes, params)
        for number, bucket in enumerate(self.buckets):
            slot = transfers.next_slot()
            staged: dict[str, Any] = slot.views(bucket.host)
            bucket_noise = bucket.noise(noise)
            tensors = staged["hessians"], bucket.of(grads), None if probes is None else bucket.of(probes)
            op = self._emas.setdefault((number, slot.number), HessianEma()).prepare(
                *tensors[:2],
                beta2=beta2,
                probes=tensors[2],
                hessian_scales=staged.get("hessian_scales"),
                noise=bucket_noise,
                guards=guards,
                backend=backend,
            )
            yield _staged_call(transfers, slot, op, (tensors, bucket_noise), bucket, staged, ())


def _staged_call(
    transfers: Transfers, slot: Slot, op: Any, tensors: object, bucket: Bucket, staged: Lists, kept: Collection[str]
) -> StagedCall:
    """Return the call of an op that changes all states of a bucket but those in ``kept``."""
    copies = [(name, staged[name][index], vector) for name, index, vector, _ in _places(bucket.host)]
    up: list[Any] = [(view, vector) for _, view, vector in copies]
    down: list[Any] = [(vector, view) for name, view, vector in copies if name not in kept]
    return StagedCall(transfers, slot, op, tensors, up, down)


def _copy(pairs: Iterable[tuple[Tensor, Tensor]]) -> int:
    """Copy every source to its target, on the current stream; return the number of bytes."""
    count = 0
    for target, source in pairs:
        target.copy_(source, non_blocking=True)
        count += source.nbytes
    return count


def _check_state(entry: str, name: str, param: Tensor, state: Tensor) -> None:
    """Raise unless a state is in main memory and, but for scales, laid out as its parameter."""
    if state.device.type not in ("cpu", "meta"):
        remedy = "call optimizer.load_state_dict(optimizer.state_dict()), which moves the states"
        raise argument_error(entry, "a state in main memory with state_offload", state.device, remedy)
    if name not in SCALES and (state.shape != param.shape or not same_layout(state, param)):
        got = f"{tuple(state.shape)} with strides {state.stride()}"
        remedy = "do not change the shape of a parameter in training"
        raise argument_error(entry, f"{tuple(param.shape)} with strides {param.stride()}, as its parameter", got, remedy)


def _divided(params: Sequence[Tensor], lists: Lists) -> Iterator[list[Piece]]:
    """Yield the pieces of each bucket: as many as it takes, at least one."""
    pieces: list[Piece] = []
    room: float = BUCKET_BYTES
    for index, param in enumerate(params):
        width = _bytes_of_element(index, lists)
        start = 0
        while True:
            rest = param.numel() - start
            count = rest if rest * width <= room else int(room / width) // PIECE * PIECE
            if not count and rest and not pieces:
                count = min(rest, PIECE)
            if count or not rest:
                pieces.append(Piece(index, start, start + count))
                room -= count * width
                start += count
            if start == param.numel():
                break
            yield pieces
            pieces = []
            room = BUCKET_BYTES
    if pieces:
        yield pieces


def _bytes_of_element(index: int, lists: Lists) -> float:
    """Return the bytes of all states of one element of a parameter."""
    width = 0.0
    for name, tensors in lists.items():
        tensor = tensors[index]
        if tensor is not None:
            width += 2 / GROUP if name in SCALES else tensor.element_size()
    return width


def _vectors(pieces: Sequence[Piece], lists: Lists) -> dict[str, list[Tensor | None]]:
    """Return the states of pieces as vectors in main memory; scales as int16."""
    vectors: dict[str, list[Tensor | None]] = {}
    for name, tensors in lists.items():
        vectors[name] = []
        for index, start, stop in pieces:
            tensor = tensors[index]
            if tensor is not None and name in SCALES:
                tensor = tensor.view(-1).view(torch.int16)[start // GROUP : -(-stop // GROUP)]
            elif tensor is not None:
                tensor = in_memory_order(tensor)[start:stop]
            vectors[name].append(tensor)
    return vectors


def _places(host: Lists) -> Iterator[tuple[str, int, Tensor, int]]:
    """Yield every vector of a bucket: its argument, its position there, the vector, and the byte of a slot where it begins."""
    offset = 0
    for name, vectors in host.items():
        for index, vector in enumerate(vectors):
            if vector is not None:
                yield name, index, vector, offset
                offset += -(-vector.nbytes // ALIGNMENT) * ALIGNMENT


def _size(host: Lists) -> int:
    """Return the bytes that a bucket takes in a slot."""
    return sum(-(-vector.nbytes // ALIGNMENT) * ALIGNMENT for _, _, vector, _ in _places(host))


def _laid_out(tensors: Sequence[Tensor], params: Sequence[Tensor]) -> list[Tensor]:
    """Return gradients or probes, as copies where their strides differ from those of their parameters."""
    return [
        tensor if same_layout(tensor, param) else torch.empty_like(param, dtype=tensor.dtype).copy_(tensor)
        for tensor, param in zip(tensors, params)
    ]

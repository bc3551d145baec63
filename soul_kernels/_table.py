"""Tables of tensors on the device: addresses, sizes and chunk maps, kept from call to call and never believed blindly.

How it works. One launch serves many tensors: the kernel finds their addresses in a table in device memory, and a chunk map
tells each program which tensor it works on, and which chunk of it. To build both takes longer than to launch the kernel. So a
caller keeps a `TensorTable` and asks before every call whether it still holds: `TensorTable.unchanged`. An allocator hands
the same address out for another tensor, and ``p.data = ...`` puts other memory under the same Python object. Neither objects
nor addresses prove anything alone, so the address, dtype, device, shape and strides of every tensor are compared; C++ does
that for all but the addresses, in one call. Only tensors that are read, the gradients, may lie elsewhere than before:
`_Bucket.move_read_only` replaces their row. After any other change the op checks all of its arguments again and calls
`TensorTable.rebuild`.

Three facts to keep in mind. A table that a captured CUDA graph reads must outlive every rebuild: it goes into ``_captured``.
What was uploaded on one stream has not arrived on another. And the rows of a table have the order of the roles, by which the
kernels know them: see ``ROLES`` in the ops' modules. Safe to change: how metadata are compared, and what is cached.
"""

import array
import functools
import itertools
import operator
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from soul_kernels._launch import launch, triton_dtype
from soul_kernels.errors import argument_error
from soul_kernels.tensors import has_data

# Name of a role -> its tensors, of which some may be absent; None where the whole role is.
Roles = Mapping[str, Sequence[Tensor | None] | None]


class TensorTable:
    """What a launch over many tensors needs on the device, rebuilt only where something changed.

    For every bucket of tensors that one launch can serve (device, dtypes, alignment) it holds a table int64 [rows, n_tensors]
    and the chunk map. The rows are addresses, one row a role, then element counts and, where noise is drawn, salts and offsets.

    Attributes:
        numel: elements of all tensors of the first role.
        devices: where these are, each device once.
        salts: one int a tensor, which its noise starts from; empty where none is drawn.
        offsets: the same, the number of its first element in its noise.
        buckets: the launches.
        version: how often tensors came that it did not know.
        call: number of the call that was prepared last.
    """

    def __init__(self) -> None:
        self._roles: dict[str, int | None] | None = None  # role -> number of its tensors
        self._key: object = None
        self.salts: Sequence[int] = ()
        self.offsets: Sequence[int] = ()
        self.devices: list[torch.device] = []
        self.buckets: list[_Bucket] = []
        self.numel = 0
        self.version = 0
        self.call = 0
        self._addresses: list[int] = []
        self._read_only = (0, 0)  # where the addresses of the role that is only read begin and end
        self._absent: list[int] = []  # positions of None among the entries of all lists
        self._guard: Any = None
        self._metadata: list[tuple | None] | None = None  # where there is no guard
        self._captured: list[Tensor] = []  # what replays of a CUDA graph read: it must outlive every rebuild

    def __reduce__(self) -> tuple:
        return TensorTable, ()  # a copy starts empty: addresses mean nothing to it

    def unchanged(self, roles: Roles, key: object = None) -> bool:
        """Tell whether ``roles`` are what `rebuild` last saw; tensors that are only read may lie at other addresses.

        Args:
            roles: name -> list of tensors, or None for an absent role; entries of a list may be None, but not those of the
                first role.
            key: whatever else the table depends on; compared with ``==``.
        """
        if self._key != key or self._roles != _counts(roles):
            return False
        tensors: list[Any] = []
        for role in filter(None, roles.values()):
            tensors += role
        if self._absent:  # positions of None
            if [i for i, tensor in enumerate(tensors) if tensor is None] != self._absent:
                return False
            tensors = [tensor for tensor in tensors if tensor is not None]
        if not self._same_metadata(tensors):
            return False
        addresses = list(map(torch.Tensor.data_ptr, tensors))
        if addresses == self._addresses:
            return True
        begin, end = self._read_only
        if addresses[:begin] != self._addresses[:begin] or addresses[end:] != self._addresses[end:]:
            return False  # what is written to lies elsewhere: whether tensors overlap must be checked again
        self._addresses = addresses
        return all(bucket.move_read_only(addresses) for bucket in self.buckets)

    def describe(self, lead: Sequence[Tensor], salts: Sequence[int] = (), offsets: Sequence[int] = ()) -> None:
        """Take over what is known of tensors before they have addresses; `unchanged` answers no until `rebuild`.

        Args:
            lead: the tensors of the first role.
            salts: as the attribute.
            offsets: as the attribute.
        """
        self.forget()
        self.version += 1
        self.numel = sum(tensor.numel() for tensor in lead)
        self.devices = list(dict.fromkeys(tensor.device for tensor in lead))
        self.salts = salts
        self.offsets = offsets
        self.buckets = []

    def rebuild(
        self,
        roles: Roles,
        key: object = None,
        *,
        read_only: str,
        salts: Sequence[int] = (),
        offsets: Sequence[int] = (),
        side: Collection[str] = (),
    ) -> None:
        """Take over tensors that were found to fit together.

        Args:
            roles: as in `unchanged`. Their order is that of the table's rows.
            key: as in `unchanged`.
            read_only: the role that is only read.
            salts: as the attribute.
            offsets: as the attribute.
            side: roles that are not walked element by element, of a dtype that the kernel knows. A role that has one tensor
                [number of tensors] in its list has a number for each.
        """
        lead: Sequence[Any] = roles[next(iter(roles))] or ()
        self.describe(lead, salts, offsets)
        flat: list[Tensor] = []
        entries = {}  # role -> for each of its tensors, its index in the flat list (-1: absent) and an offset in bytes
        for role, tensors in roles.items():
            entries[role] = _entries(tensors, len(lead), flat, shared=role in side)
        if not all(map(has_data, flat)):
            return  # there is nothing to launch on, and nothing by which the tensors could be known again
        self._addresses = list(map(torch.Tensor.data_ptr, flat))
        self._read_only = entries[read_only][0][0], entries[read_only][-1][0] + 1
        columns: dict[tuple, list[int]] = {}  # what the tensors of one launch have in common -> their positions
        for position, tensor in enumerate(lead):
            if tensor.numel():
                walked = {role: t[position] if t else None for role, t in roles.items() if role not in side}
                aligned = all(t is None or t.data_ptr() % 16 == 0 for t in walked.values())
                dtypes = tuple((role, None if t is None else t.dtype) for role, t in walked.items())
                columns.setdefault((tensor.device, dtypes, aligned), []).append(position)
        for (device, dtypes, aligned), positions in columns.items():
            bucket = _Bucket(
                device=device,
                dtypes=dtypes,
                aligned=aligned,
                numels=tuple(lead[p].numel() for p in positions),
                salts=[salts[p] for p in positions] if salts else [],
                offsets=[offsets[p] for p in positions] if offsets else [],
                rows={role: [entries[role][p] for p in positions] for role in roles},
                read_only=read_only,
                addresses=self._addresses,
                captured=self._captured,
            )
            self.buckets.append(bucket)
        self._guard = _guard(flat)
        self._metadata = None if self._guard else _metadata(flat)
        everything = itertools.chain.from_iterable(filter(None, roles.values()))
        self._absent = [i for i, tensor in enumerate(everything) if tensor is None]
        self._key = key
        self._roles = _counts(roles)

    def forget(self) -> None:
        """Make the next call of `unchanged` answer no."""
        self._roles = None

    def next_call(self) -> int:
        """Return the number of a call that begins; what was prepared before is no longer valid."""
        self.call += 1
        return self.call

    def launch(self, kernel: Any, *, chunk: int, **arguments: Any) -> None:
        """Launch ``kernel`` once for every bucket.

        The kernel receives, beside ``arguments``: ``table_ptr``; ``chunk_tensor_ptr`` and ``chunk_piece_ptr`` [programs] int32
        (the column of the table, and the piece of ``chunk`` elements); ``n_tensors``; ``ALIGNED``: every address is a multiple
        of 16 bytes; ``CHUNK``; where noise is drawn, ``CROSSES``: a multiple of 2^32 may lie within a chunk, in the numbers of
        its elements; and a dtype for each role that is walked: ``P_DTYPE`` for the role "p", None where it is absent.
        """
        for bucket in self.buckets:
            bucket.launch(kernel, chunk=chunk, **arguments)

    def _same_metadata(self, tensors: list[Tensor]) -> bool:
        if self._guard is not None:
            return self._guard.check(*tensors)
        return _metadata(tensors) == self._metadata


class _Bucket:
    """The tensors of one launch.

    Args:
        device: where they are.
        dtypes: role that is walked -> its dtype, None where it is absent; as pairs.
        aligned: whether every address of a walked role is a multiple of 16 bytes.
        numels: elements of each tensor.
        salts: as in `TensorTable`.
        offsets: as in `TensorTable`.
        rows: role -> for each tensor its index in ``addresses`` (-1: absent) and an offset in bytes.
        read_only: the role that is only read.
        addresses: of all tensors of the `TensorTable`.
        captured: what replays of a CUDA graph read is appended here.
    """

    def __init__(
        self,
        *,
        device: torch.device,
        dtypes: Sequence[tuple[str, torch.dtype | None]],
        aligned: bool,
        numels: tuple[int, ...],
        salts: Sequence[int],
        offsets: Sequence[int],
        rows: Mapping[str, Sequence[tuple[int, int]]],
        read_only: str,
        addresses: Sequence[int],
        captured: list[Tensor],
    ) -> None:
        self.device = device
        self.aligned = aligned
        self.numels = numels
        self.dtypes = {f"{role.upper()}_DTYPE": triton_dtype(dtype) for role, dtype in dtypes}
        values = [0 if i < 0 else addresses[i] + offset for row in rows.values() for i, offset in row]
        self._values = array.array("q", [*values, *numels, *salts, *offsets])
        self._offsets = offsets
        begin = list(rows).index(read_only) * len(numels)
        self._read_only = slice(begin, begin + len(numels))  # of the values
        indices = [i for i, _ in rows[read_only]]
        self._pick_read_only = operator.itemgetter(*indices, indices[0])  # always a tuple: itemgetter of one index gives none
        self._table: Tensor | None = None
        self._spare: Tensor | None = None  # pinned memory from which a captured upload is replayed
        self._stream: int | None = None  # on which the table was uploaded
        self._captured = captured
        self._maps: dict[tuple[int, int | None], tuple[Tensor, Tensor]] = {}  # (chunk, stream) -> chunk map
        self._crosses: dict[int, bool] = {}  # chunk -> whether a multiple of 2^32 may lie within one

    def move_read_only(self, addresses: Sequence[int]) -> bool:
        """Take over where the read-only tensors lie now; False where they no longer have the alignment of this bucket."""
        moved = self._pick_read_only(addresses)
        if self.aligned and functools.reduce(operator.or_, moved) % 16:
            return False
        values = self._values[:]  # a copy: on the CPU the table shares its memory
        values[self._read_only] = array.array("q", moved[:-1])
        if values != self._values:
            self._values = values
            self._table = None
        return True

    def launch(self, kernel: Any, *, chunk: int, **arguments: Any) -> None:
        """Launch ``kernel`` once, as `TensorTable.launch` describes it."""
        chunk_tensor, chunk_piece = self.chunk_map(chunk)
        if not self.aligned:  # one element an access: half a block keeps the addresses in registers
            arguments["BLOCK"] //= 2
        if self._offsets:
            if chunk not in self._crosses:
                self._crosses[chunk] = any(map(functools.partial(_crosses, chunk), self._offsets, self.numels))
            arguments["CROSSES"] = self._crosses[chunk]
        launch(
            kernel,
            (len(chunk_tensor),),
            self.device,
            table_ptr=self.on_device(),
            chunk_tensor_ptr=chunk_tensor,
            chunk_piece_ptr=chunk_piece,
            n_tensors=len(self.numels),
            ALIGNED=self.aligned,
            CHUNK=chunk,
            **self.dtypes,
            **arguments,
        )

    def on_device(self) -> Tensor:
        """Return the table; it is uploaded where it changed, without waiting for the work that is queued on the device."""
        stream, capturing = _stream(self.device)
        table = self._table
        if table is None or (stream != self._stream and not capturing):  # another stream would not wait for the upload
            host = torch.frombuffer(self._values, dtype=torch.int64)
            if capturing:
                # Nothing may be allocated on the host now; and a replay reads the buffer again, so it must not be used twice.
                if self._spare is None:
                    expected = "one step a graph, with gradients laid out as their parameters"
                    raise argument_error("CUDA graph", expected, "another table to upload", _EAGER_STEP)
                pinned = self._spare.copy_(host)
                self._spare = None
                self._captured.append(pinned)
                table = pinned.to(self.device, non_blocking=True)
            else:
                table = self._table = _upload(host, self.device)
                self._stream = stream
                if self.device.type == "cuda" and self._spare is None:
                    self._spare = torch.empty_like(host, pin_memory=True)
        if capturing:
            self._captured.append(table)
        return table

    def chunk_map(self, chunk: int) -> tuple[Tensor, Tensor]:
        """Return the chunk map of this bucket for pieces of ``chunk`` elements."""
        stream, capturing = _stream(self.device)
        if capturing:  # a capture begins on a device that is idle: the map of any stream has arrived
            maps = [made for (size, _), made in self._maps.items() if size == chunk]
            if not maps:
                raise argument_error("CUDA graph", "the options of the last step", "others", _EAGER_STEP)
            self._captured += maps[0]
            return maps[0]
        if (chunk, stream) not in self._maps:
            self._maps[chunk, stream] = _chunk_map(self.numels, chunk, self.device, stream)
        return self._maps[chunk, stream]


_EAGER_STEP = "run one eager step before the capture"


def _stream(device: torch.device) -> tuple[int | None, bool]:
    """Return the current stream of a device, as a number, and whether it is being captured."""
    if device.type != "cuda":
        return None, False
    return torch.cuda.current_stream(device).cuda_stream, torch.cuda.is_current_stream_capturing()


@functools.lru_cache(maxsize=64)
def _chunk_map(numels: tuple[int, ...], chunk: int, device: torch.device, stream: int | None = None) -> tuple[Tensor, Tensor]:
    """Return which tensor, and which piece of it, each program works on: two int32 tensors, one entry a program.

    A pure function of sizes, so it can be cached; for each stream, because another would not wait for the upload.
    """
    counts = torch.tensor([-(-numel // chunk) for numel in numels], device="cpu")  # whatever the default device is
    tensor = torch.repeat_interleave(torch.arange(len(numels), device="cpu"), counts)
    first = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    piece = torch.arange(len(tensor), device="cpu") - first
    return _upload(tensor.to(torch.int32), device), _upload(piece.to(torch.int32), device)


def _upload(host: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to the device and do not wait: from pinned memory, which torch reuses when the device has read it."""
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


def _crosses(chunk: int, offset: int, numel: int) -> bool:
    """Tell whether a chunk of a tensor has elements on both sides of a multiple of 2^32."""
    return bool(offset % chunk) and offset >> 32 != offset + numel - 1 >> 32


def _counts(roles: Roles) -> dict[str, int | None]:
    return {role: None if tensors is None else len(tensors) for role, tensors in roles.items()}


def _entries(tensors: Sequence[Tensor | None] | None, count: int, flat: list[Tensor], *, shared: bool) -> list[tuple[int, int]]:
    """Append the tensors of a role to ``flat``; return for each of ``count`` columns the index there and an offset in bytes.

    The index is -1 where there is no tensor. ``shared``: the role may be one tensor with a number for every column.
    """
    if shared and tensors and len(tensors) == 1 and tensors[0] is not None and tensors[0].shape == (count,):
        flat.append(tensors[0])
        return [(len(flat) - 1, column * tensors[0].element_size()) for column in range(count)]
    entries = []
    for tensor in tensors or [None] * count:
        entries.append((-1 if tensor is None else len(flat), 0))
        if tensor is not None:
            flat.append(tensor)
    return entries


def _metadata(tensors: Sequence[Any]) -> list[tuple | None]:
    return [(t.dtype, t.device, t.shape, t.stride()) if isinstance(t, torch.Tensor) else None for t in tensors]


def _guard(tensors: Sequence[Tensor]) -> Any:
    """Return a check of dtype, device, shape and strides of all tensors: one call of C++, at an eighth of the cost in Python.

    torch.compile guards its graphs with it, but it is no public part of torch: None where it is missing or does not work, and
    `_metadata` serves.
    """
    try:
        guard = torch._C._dynamo.guards.TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
        return guard if guard.check(*tensors) is True else None
    except Exception:
        return None

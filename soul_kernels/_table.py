"""Tables of tensors on the device: addresses, sizes and chunk maps, kept between calls and compared before every use.

How it works. One launch serves many tensors: the kernel finds their addresses in a table in device memory, and a chunk map
tells each program which tensor it works on, and which chunk of it. Building both takes longer than launching the kernel. So a
caller keeps a `TensorTable` and asks `TensorTable.unchanged` before every call whether the table is still valid. An allocator
may return the same address for another tensor, and ``p.data = ...`` puts other memory under the same Python object. Neither
the objects nor the addresses are proof alone, so the address, dtype, device, shape and strides of every tensor are compared
(`_Snapshot`); C++ does that for all but the addresses, in one call. Only tensors that are read, the gradients, may have moved:
`_Bucket.move_read_only` replaces their row. After any other change the op checks all of its arguments again and calls
`TensorTable.rebuild`.

Tensors that belong to the caller, such as an optimizer's states, need not be compared if the caller knows that they are the
same: `TensorTable.unchanged_but_owned` looks at the others only.

Three facts to keep in mind. A table that a captured CUDA graph reads must outlive every rebuild: it goes into ``_captured``.
An upload on one stream may not have arrived when another stream reads. And the rows of a table have the order of the roles,
which is how the kernels know them: see ``ROLES`` in the ops' modules. Safe to change: how metadata are compared, and what is
cached.
"""

import array
import functools
import operator
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from soul_kernels._launch import launch, triton_dtype
from soul_kernels.errors import argument_error
from soul_kernels.tensors import has_data

# Name of a role -> its tensors. An absent tensor is None, and so is an absent role.
Roles = Mapping[str, Sequence[Tensor | None] | None]


class TensorTable:
    """Addresses and chunk maps of many tensors on the device, rebuilt only where something has changed.

    A bucket holds the tensors that one launch can serve: those with the same device, dtypes and alignment. Every bucket has a
    table int64 [rows, n_tensors] and a chunk map. The rows hold addresses, one row per role, then element counts and, where
    noise is drawn, salts and offsets.

    Attributes:
        numel: number of elements of all tensors of the first role.
        devices: the devices of these tensors, each once.
        salts: one int per tensor, the salt of its noise; empty where none is drawn.
        offsets: one int per tensor, the index of its first element in its noise; empty where none is drawn.
        buckets: one `_Bucket` per launch.
        version: number of times that the table was given other tensors.
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
        self._watched_roles: list[str] = []  # all but the owned ones
        self._owned_roles: list[str] = []
        self._watched = _Snapshot([])
        self._owned = _Snapshot([])
        self._read_only = (0, 0)  # begin and end of the read-only role among the addresses of _watched
        self._captured: list[Tensor] = []  # tensors that replays of a CUDA graph read: they must outlive every rebuild

    def __reduce__(self) -> tuple:
        return TensorTable, ()  # a copy starts empty: addresses mean nothing to it

    def unchanged(self, roles: Roles, key: object = None) -> bool:
        """Tell whether the tensors are those of the last `rebuild`; the read-only ones may have moved.

        Args:
            roles: name -> list of tensors, or None for an absent role; entries of a list may be None, but not those of the
                first role.
            key: anything else that the table depends on; compared with ``==``.
        """
        return (
            self._key == key
            and self._roles == _counts(roles)
            and self._owned.equals(_entries_of(roles, self._owned_roles))
            and self.unchanged_but_owned(_entries_of(roles, self._watched_roles))
        )

    def unchanged_but_owned(self, tensors: Sequence[Tensor | None]) -> bool:
        """Tell whether the tensors are those of the last `rebuild`, leaving out the owned ones, for which the caller vouches.

        Args:
            tensors: the entries of all other roles, one list after the other; the read-only ones may have moved.
        """
        if self._roles is None or not self._watched.same_metadata(tensors):
            return False
        addresses = self._watched.addresses_of(tensors)
        before = self._watched.addresses
        if addresses == before:
            return True
        begin, end = self._read_only
        if addresses[:begin] != before[:begin] or addresses[end:] != before[end:]:
            return False  # a tensor that is written to has moved: whether tensors overlap must be checked again
        self._watched.addresses = addresses
        if all(bucket.move_read_only(addresses) for bucket in self.buckets):
            return True
        self.forget()  # some buckets have other addresses than the snapshot
        return False

    def describe(self, lead: Sequence[Tensor], salts: Sequence[int] = (), offsets: Sequence[int] = ()) -> None:
        """Set the attributes for new tensors without building a table; `unchanged` returns False until `rebuild`.

        Args:
            lead: the tensors of the first role.
            salts: see the attribute.
            offsets: see the attribute.
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
        auxiliary: Collection[str] = (),
        owned: Collection[str] = (),
    ) -> None:
        """Build the table of new tensors, which the op has checked.

        Args:
            roles: as in `unchanged`. Their order is that of the table's rows.
            key: as in `unchanged`.
            read_only: the role that is only read.
            salts: see the attribute.
            offsets: see the attribute.
            auxiliary: roles that are not walked element by element; the kernel knows their dtypes. The list of such a role may
                be a single tensor [number of tensors], with one number per tensor.
            owned: roles for which the caller may vouch in `unchanged_but_owned`; not the one that is only read.
        """
        lead: Sequence[Any] = roles[next(iter(roles))] or ()
        self.describe(lead, salts, offsets)
        self._watched_roles = [role for role in roles if role not in owned]
        self._owned_roles = [role for role in roles if role in owned]
        flat: list[Tensor] = []
        entries = {}  # role -> for each of its tensors, its index in the flat list (-1: absent) and an offset in bytes
        for role in (*self._watched_roles, *self._owned_roles):  # watched ones have the same indices in their snapshot
            entries[role] = _entries(roles[role], len(lead), flat, shared=role in auxiliary)
        if not all(map(has_data, flat)):
            return  # without addresses nothing can be launched, and `unchanged` could not recognize the tensors
        addresses = list(map(torch.Tensor.data_ptr, flat))
        self._read_only = entries[read_only][0][0], entries[read_only][-1][0] + 1
        columns: dict[tuple, list[int]] = {}  # (device, dtypes, aligned) of one launch -> positions of its tensors
        for position, tensor in enumerate(lead):
            if tensor.numel():
                walked = {role: t[position] if t else None for role, t in roles.items() if role not in auxiliary}
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
                addresses=addresses,
                captured=self._captured,
            )
            self.buckets.append(bucket)
        self._watched = _Snapshot(_entries_of(roles, self._watched_roles))
        self._owned = _Snapshot(_entries_of(roles, self._owned_roles))
        self._key = key
        self._roles = _counts(roles)

    def forget(self) -> None:
        """Make `unchanged` return False until the next `rebuild`."""
        self._roles = None

    def next_call(self) -> int:
        """Count a new call and return its number; calls that were prepared before are no longer valid."""
        self.call += 1
        return self.call

    def launch(self, kernel: Any, *, chunk: int, **arguments: Any) -> None:
        """Launch ``kernel`` once for every bucket.

        Beside ``arguments`` the kernel receives:

        * ``table_ptr`` and ``n_tensors``;
        * ``chunk_tensor_ptr`` and ``chunk_piece_ptr``, [programs] int32: the column of the table, and the index of the piece of
          ``chunk`` elements;
        * ``ALIGNED``: whether every address is a multiple of 16 bytes;
        * ``CHUNK``;
        * ``CROSSES``, where noise is drawn: whether the indices of a chunk's elements may cross a multiple of 2^32;
        * a dtype for each role that is walked: ``P_DTYPE`` for the role "p", None where the role is absent.
        """
        for bucket in self.buckets:
            bucket.launch(kernel, chunk=chunk, **arguments)


class _Snapshot:
    """What is compared of the entries of lists: which ones are None, and of the tensors all but their values.

    Attributes:
        addresses: of the tensors.
    """

    def __init__(self, entries: Sequence[Tensor | None]) -> None:
        self._count = len(entries)
        self._absent = [i for i, tensor in enumerate(entries) if tensor is None]
        self.addresses = self.addresses_of(entries)
        tensors = [tensor for tensor in entries if tensor is not None]
        self._guard = _guard(tensors) if tensors else None
        self._metadata = None if self._guard else _metadata(tensors)  # compared where there is no guard

    def same_metadata(self, entries: Sequence[Any]) -> bool:
        """Tell whether entries are the same, but for addresses and values."""
        if len(entries) != self._count:
            return False
        if self._absent:
            if [i for i, tensor in enumerate(entries) if tensor is None] != self._absent:
                return False
            entries = [tensor for tensor in entries if tensor is not None]
        return _metadata(entries) == self._metadata if self._guard is None else self._guard.check(*entries)

    def addresses_of(self, entries: Sequence[Any]) -> list[int]:
        """Return the addresses of the tensors among the entries."""
        if self._absent:
            entries = [tensor for tensor in entries if tensor is not None]
        return list(map(torch.Tensor.data_ptr, entries))

    def equals(self, entries: Sequence[Any]) -> bool:
        """Tell whether entries are the same, but for values."""
        return self.same_metadata(entries) and self.addresses_of(entries) == self.addresses


class _Stream(NamedTuple):
    """A stream of a device: its handle, None on a CPU, and whether it is being captured."""

    handle: int | None
    capturing: bool


_NO_STREAM = _Stream(None, False)


class _Bucket:
    """The tensors of one launch.

    Args:
        device: device of all tensors.
        dtypes: pairs of a role that is walked and its dtype, None where the role is absent.
        aligned: whether every address of a walked role is a multiple of 16 bytes.
        numels: number of elements of each tensor.
        salts: as in `TensorTable`.
        offsets: as in `TensorTable`.
        rows: role -> for each tensor its index in ``addresses`` (-1: absent) and an offset in bytes.
        read_only: the role that is only read.
        addresses: addresses of all tensors of the `TensorTable`.
        captured: list to which the tensors are appended that replays of a CUDA graph read.
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
        self._pick_read_only = operator.itemgetter(*indices, indices[0])  # one index alone would not return a tuple
        self._misaligned = int.from_bytes(array.array("q", [15] * len(numels)).tobytes(), "little")  # a mask of all addresses
        self._table: Tensor | None = None
        self._spare: Tensor | None = None  # pinned memory from which a captured upload is replayed
        self._stream: int | None = None  # the stream on which the table was uploaded
        self._captured = captured
        self._maps: dict[tuple[int, int | None], tuple[Tensor, Tensor]] = {}  # (chunk, stream) -> chunk map
        self._constants: dict[int, dict[str, Any]] = {}  # chunk -> arguments of a kernel

    def move_read_only(self, addresses: Sequence[int]) -> bool:
        """Replace the addresses of the read-only tensors; return False if they no longer have the alignment of this bucket."""
        moved = array.array("q", self._pick_read_only(addresses)[:-1])
        if moved == self._values[self._read_only]:
            return True
        if self.aligned and int.from_bytes(moved.tobytes(), "little") & self._misaligned:
            return False
        self._values = self._values[:]  # a copy: on the CPU the table shares its memory
        self._values[self._read_only] = moved
        self._table = None
        return True

    def launch(self, kernel: Any, *, chunk: int, **arguments: Any) -> None:
        """Launch ``kernel`` once, as `TensorTable.launch` describes it."""
        stream = _stream(self.device)
        chunk_tensor, chunk_piece = self.chunk_map(chunk, stream)
        if not self.aligned:  # one element an access: half a block keeps the addresses in registers
            arguments["BLOCK"] //= 2
        launch(
            kernel,
            (chunk_tensor.numel(),),
            self.device,
            table_ptr=self.on_device(stream),
            chunk_tensor_ptr=chunk_tensor,
            chunk_piece_ptr=chunk_piece,
            **self._constants_for(chunk),
            **arguments,
        )

    def _constants_for(self, chunk: int) -> dict[str, Any]:
        """Return the arguments of a kernel that are the same in every launch with pieces of ``chunk`` elements."""
        if chunk not in self._constants:
            constants = {"n_tensors": len(self.numels), "ALIGNED": self.aligned, "CHUNK": chunk, **self.dtypes}
            if self._offsets:
                constants["CROSSES"] = any(map(functools.partial(_may_cross, chunk), self._offsets, self.numels))
            self._constants[chunk] = constants
        return self._constants[chunk]

    def on_device(self, current: _Stream | None = None) -> Tensor:
        """Return the table, uploaded if it has changed, without waiting for work that is queued on the device.

        Args:
            current: the device's current stream, or None to find it.
        """
        stream, capturing = current or _stream(self.device)
        table = self._table
        if table is None or (stream != self._stream and not capturing):  # another stream would not wait for the upload
            host = torch.frombuffer(self._values, dtype=torch.int64)
            if capturing:
                # During a capture nothing may be allocated on the host. A replay reads the buffer again: it is used only once.
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

    def chunk_map(self, chunk: int, current: _Stream | None = None) -> tuple[Tensor, Tensor]:
        """Return the chunk map of this bucket for pieces of ``chunk`` elements; ``current`` as in `on_device`."""
        stream, capturing = current or _stream(self.device)
        if capturing:  # a capture begins on an idle device: uploads of all streams have arrived
            maps = [chunk_map for (size, _), chunk_map in self._maps.items() if size == chunk]
            if not maps:
                raise argument_error("CUDA graph", "the options of the last step", "others", _EAGER_STEP)
            self._captured += maps[0]
            return maps[0]
        if (chunk, stream) not in self._maps:
            self._maps[chunk, stream] = _chunk_map(self.numels, chunk, self.device, stream)
        return self._maps[chunk, stream]


_EAGER_STEP = "run one eager step before the capture"


def _stream(device: torch.device) -> _Stream:
    """Return the current stream of a device."""
    if device.type != "cuda":
        return _NO_STREAM
    return _Stream(torch.cuda.current_stream(device).cuda_stream, torch.cuda.is_current_stream_capturing())


@functools.lru_cache(maxsize=64)
def _chunk_map(numels: tuple[int, ...], chunk: int, device: torch.device, stream: int | None = None) -> tuple[Tensor, Tensor]:
    """Return the tensor, and the piece of it, that each program works on: two int32 tensors with one entry per program.

    The result depends on the arguments only, so it can be cached. There is one for each ``stream``, because another stream
    would not wait for the upload.
    """
    counts = torch.tensor([-(-numel // chunk) for numel in numels], device="cpu")  # whatever the default device is
    tensor = torch.repeat_interleave(torch.arange(len(numels), device="cpu"), counts)
    first = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    piece = torch.arange(len(tensor), device="cpu") - first
    return _upload(tensor.to(torch.int32), device), _upload(piece.to(torch.int32), device)


def _upload(host: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to the device without waiting. Torch reuses the pinned memory only after the device has read it."""
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


def _may_cross(chunk: int, offset: int, numel: int) -> bool:
    """Tell whether a chunk of a tensor may have elements on both sides of a multiple of 2^32."""
    return bool(offset % chunk) and offset >> 32 != offset + numel - 1 >> 32


def _counts(roles: Roles) -> dict[str, int | None]:
    return {role: None if tensors is None else len(tensors) for role, tensors in roles.items()}


def _entries_of(roles: Roles, names: Sequence[str]) -> list[Any]:
    """Return the entries of the lists of some roles, one list after the other."""
    entries: list[Any] = []
    for name in names:
        entries += roles[name] or ()
    return entries


def _entries(tensors: Sequence[Tensor | None] | None, count: int, flat: list[Tensor], *, shared: bool) -> list[tuple[int, int]]:
    """Append the tensors of a role to ``flat``; return for each of ``count`` columns an index into it and an offset in bytes.

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
    """Return an object that checks dtype, device, shape and strides of all tensors in C++, at an eighth of the cost in Python.

    torch.compile guards its graphs with it, but it is no public part of torch. None where it is missing or does not work;
    `_metadata` is compared instead.
    """
    try:
        guard = torch._C._dynamo.guards.TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
        return guard if guard.check(*tensors) is True else None
    except Exception:
        return None

"""Tables of tensors on the device: addresses, sizes and chunk maps, kept from call to call and never believed blindly."""

import array
import functools
import itertools
import operator
from collections.abc import Sequence

import torch

from soul_kernels._launch import launch, triton_dtype
from soul_kernels.errors import argument_error
from soul_kernels.reference.rounding import GROUP, salt
from soul_kernels.tensors import has_data


class TensorTable:
    """What a launch over many tensors needs on the device, rebuilt only where something changed.

    For every bucket of tensors that one launch can serve (device, dtypes, alignment) it holds a table int64 [rows, n_tensors]
    and the chunk map. Rows are addresses, one row a role, then element counts and, where noise is drawn, salts and offsets.
    An allocator hands the same address out for another tensor, so `unchanged` compares every tensor's address, dtype, device,
    shape and strides.
    """

    def __init__(self):
        self._roles = self._key = None
        self.salts, self.offsets, self.devices, self.buckets = [], [], [], []
        self.numel = 0  # elements of all tensors of the first role
        self.version = 0  # how often it was rebuilt
        self._confirmed = None
        self._captured = []  # what replays of a CUDA graph read: it must outlive every rebuild

    def __reduce__(self):
        return TensorTable, ()  # a copy starts empty: addresses mean nothing to it

    def unchanged(self, roles, key=None, token=None):
        """Tells whether ``roles`` are what `rebuild` last saw; tensors that are only read may lie at other addresses.

        Args:
            token: what `confirm` was given: if it is the same, the answer is yes, once.
            roles: name -> list of tensors, or None for an absent role; entries of a list may be None, but not in the first
                role.
            key: whatever else the table depends on; compared with ``==``.
        """
        if token is not None and token == self._confirmed:
            self._confirmed = None
            return True
        if self._key != key or self._roles != {role: tensors and len(tensors) for role, tensors in roles.items()}:
            return False
        tensors = []
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

    def rebuild(self, roles, key=None, *, read_only, salts=(), offsets=(), side=()):
        """Takes over tensors that were found to fit together.

        Args:
            roles: as in `unchanged`.
            key: as in `unchanged`.
            read_only: the role that is only read.
            salts: one int a tensor, which its noise starts from; kept as an attribute. Empty where none is drawn.
            offsets: the same, the number of its first element in its noise.
            side: roles that are not walked element by element, of a dtype that the kernel knows. A role that has one tensor
                [number of tensors] in its list has a number for each.
        """
        self._roles = None  # nothing is known if anything below fails
        self.version += 1
        lead = next(iter(roles.values()))
        self.numel = sum(tensor.numel() for tensor in lead)
        flat = []
        place = {}  # role -> for each of its tensors, the place in the flat list (-1: absent) and an offset in bytes
        for role, tensors in roles.items():
            if role in side and tensors and len(tensors) == 1 and tensors[0].shape == (len(lead),):
                place[role] = [(len(flat), position * tensors[0].element_size()) for position in range(len(lead))]
                flat.append(tensors[0])
                continue
            place[role] = []
            for tensor in tensors or [None] * len(lead):
                place[role].append((-1 if tensor is None else len(flat), 0))
                if tensor is not None:
                    flat.append(tensor)
        self.devices = list(dict.fromkeys(tensor.device for tensor in lead))
        self.salts, self.offsets = salts, offsets
        if not all(map(has_data, flat)):
            self.buckets = []  # there is nothing to launch on, and nothing by which the tensors could be known again
            return
        self._addresses = list(map(torch.Tensor.data_ptr, flat))
        self._read_only = place[read_only][0][0], place[read_only][-1][0] + 1
        columns = {}
        for position, tensor in enumerate(lead):
            if tensor.numel():
                walked = {r: tensors and tensors[position] for r, tensors in roles.items() if r not in side}
                aligned = all(t is None or t.data_ptr() % 16 == 0 for t in walked.values())
                dtypes = tuple((role, None if t is None else t.dtype) for role, t in walked.items())
                columns.setdefault((tensor.device, dtypes, aligned), []).append(position)
        self.buckets = []
        for (device, dtypes, aligned), positions in columns.items():
            bucket = _Bucket(
                device=device,
                dtypes=dtypes,
                aligned=aligned,
                numels=tuple(lead[p].numel() for p in positions),
                salts=[salts[p] for p in positions] if salts else [],
                offsets=[offsets[p] for p in positions] if offsets else [],
                rows={role: [place[role][p] for p in positions] for role in roles},
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
        self._roles = {role: tensors and len(tensors) for role, tensors in roles.items()}

    def confirm(self, token):
        """Spares the next call of `unchanged` with this token, which follows at once, its work."""
        self._confirmed = token

    def forget(self):
        """The next call of `unchanged` answers no."""
        self._roles = self._confirmed = None

    def launch(self, kernel, *, chunk, **arguments):
        """Launches ``kernel`` once for every bucket.

        The kernel receives, beside ``arguments``: ``table_ptr``; ``chunk_tensor_ptr`` and ``chunk_piece_ptr`` [programs] int32
        (the column of the table, and the piece of ``chunk`` elements); ``n_tensors``; ``ALIGNED``: every address is a multiple
        of 16 bytes; ``CHUNK``; where noise is drawn, ``CROSSES``: a multiple of 2^32 may lie within a chunk, in the numbers of
        its elements; and a dtype for each role that is walked: ``P_DTYPE`` for the role "p", None where it is absent.
        """
        for bucket in self.buckets:
            bucket.launch(kernel, chunk=chunk, **arguments)

    def _same_metadata(self, tensors):
        if self._guard is not None:
            return self._guard.check(*tensors)
        return _metadata(tensors) == self._metadata


class _Bucket:
    """The tensors of one launch."""

    def __init__(self, *, device, dtypes, aligned, numels, salts, offsets, rows, read_only, addresses, captured):
        self.device, self.aligned, self.numels = device, aligned, numels
        self.dtypes = {f"{role.upper()}_DTYPE": triton_dtype(dtype) for role, dtype in dtypes}
        values = [0 if i < 0 else addresses[i] + offset for row in rows.values() for i, offset in row]  # below 0: absent
        self._values = array.array("q", [*values, *numels, *salts, *offsets])
        self._offsets = offsets
        row = list(rows).index(read_only) * len(numels)
        self._read_only = slice(row, row + len(numels))  # of the values
        places = [i for i, _ in rows[read_only]]
        self._pick_read_only = operator.itemgetter(*places, places[0])  # always a tuple: itemgetter of one index gives none
        self._table = self._spare = None
        self._stream = None  # on which the table was uploaded
        self._captured = captured
        self._maps = {}  # (chunk, stream) -> chunk map

    def move_read_only(self, addresses):
        """Takes over where the read-only tensors lie now; False where they no longer have the alignment of this bucket."""
        moved = self._pick_read_only(addresses)
        if self.aligned and functools.reduce(operator.or_, moved) % 16:
            return False
        values = self._values[:]  # a copy: on the CPU the table shares its memory
        values[self._read_only] = array.array("q", moved[:-1])
        if values != self._values:
            self._values, self._table = values, None
        return True

    def launch(self, kernel, *, chunk, **arguments):
        """One launch, as `TensorTable.launch` describes it."""
        chunk_tensor, chunk_piece = self.chunk_map(chunk)
        if not self.aligned:  # one element an access: half a block keeps the addresses in registers
            arguments["BLOCK"] //= 2
        if self._offsets:
            arguments["CROSSES"] = any(map(functools.partial(_crosses, chunk), self._offsets, self.numels))
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

    def on_device(self):
        """The table; uploaded where it changed, without waiting for the work that is queued on the device."""
        stream, capturing = _stream(self.device)
        table = self._table
        if table is None or (stream != self._stream and not capturing):  # another stream would not wait for the upload
            host = torch.frombuffer(self._values, dtype=torch.int64)
            if capturing:
                # Nothing may be allocated on the host now; and a replay reads the buffer again, so it must not be used twice.
                if self._spare is None:
                    expected = "one step a graph, with gradients laid out as their parameters"
                    raise argument_error("CUDA graph", expected, "another table to upload", _EAGER_STEP)
                pinned, self._spare = self._spare.copy_(host), None
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

    def chunk_map(self, chunk):
        """The chunk map of this bucket for pieces of ``chunk`` elements."""
        stream, capturing = _stream(self.device)
        if capturing:  # a capture begins on a device that is idle: the map of any stream has arrived
            maps = [made for (size, _), made in self._maps.items() if size == chunk]
            if not maps:
                raise argument_error("CUDA graph", "the options of the last step", "others", _EAGER_STEP)
            self._captured.append(maps[0])
            return maps[0]
        if (chunk, stream) not in self._maps:
            self._maps[chunk, stream] = _chunk_map(self.numels, chunk, self.device, stream)
        return self._maps[chunk, stream]


_EAGER_STEP = "run one eager step before the capture"


def _stream(device):
    """The current stream of a device, as a number, and whether it is being captured."""
    if device.type != "cuda":
        return None, False
    return torch.cuda.current_stream(device).cuda_stream, torch.cuda.is_current_stream_capturing()


@functools.lru_cache(maxsize=64)
def _chunk_map(numels, chunk, device, stream=None):
    """Which tensor, and which piece of it, each program works on: two int32 tensors, one entry a program.

    A pure function of sizes, so it can be cached; for each stream, because another would not wait for the upload.
    """
    counts = torch.tensor([-(-numel // chunk) for numel in numels], device="cpu")  # whatever the default device is
    tensor = torch.repeat_interleave(torch.arange(len(numels), device="cpu"), counts)
    first = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    piece = torch.arange(len(tensor), device="cpu") - first
    return _upload(tensor.to(torch.int32), device), _upload(piece.to(torch.int32), device)


def _upload(host, device):
    """A copy on the device, without waiting for it: from pinned memory, which torch reuses when the device has read it."""
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


def _crosses(chunk: int, offset: int, numel: int) -> bool:
    """Tell whether a chunk of a tensor has elements on both sides of a multiple of 2^32."""
    return bool(offset % chunk) and offset >> 32 != offset + numel - 1 >> 32


def noise_offsets(tensor_offsets: Sequence[int] | None, *states: Sequence[torch.Tensor]) -> list[int]:
    """Return for each tensor the number of its first element in its noise.

    Args:
        tensor_offsets: the argument of an op.
        states: lists of the tensors' states. A group of 8-bit values must be one in the whole tensor as well.

    Raises:
        ValueError: they are not what they must be.
    """
    if tensor_offsets is None:
        return [0] * len(states[0])
    if len(tensor_offsets) != len(states[0]):
        expected = f"{len(states[0])} integers, one a tensor"
        raise argument_error("tensor_offsets", expected, len(tensor_offsets), "pass 0 for a tensor that is whole")
    for index, offset in enumerate(tensor_offsets):
        step = GROUP if any(each[index].dtype == torch.uint8 for each in states) else 1
        if isinstance(offset, bool) or not isinstance(offset, int) or not 0 <= offset < 2**62 or offset % step:
            expected = f"a multiple of {GROUP}, the groups of 8-bit states," if step > 1 else "an integer"
            remedy = "pass the number of the piece's first element in the whole tensor"
            raise argument_error(f"tensor_offsets[{index}]", f"{expected} from 0", repr(offset), remedy)
    return list(tensor_offsets)


def noise_salts(seed, tensor_ids, tensors):
    """One salt a tensor: from the seed, and from the tensor's number or else its position."""
    return [salt(seed, number) for number in (range(len(tensors)) if tensor_ids is None else tensor_ids)]


def _metadata(tensors):
    return [(t.dtype, t.device, t.shape, t.stride()) if isinstance(t, torch.Tensor) else None for t in tensors]


def _guard(tensors):
    """A check of dtype, device, shape and strides of all tensors in one call in C++, at an eighth of the cost in Python.

    It is what torch.compile guards its graphs with, but not a public part of torch: None where it is missing or does not
    work, and `_metadata` serves.
    """
    try:
        guard = torch._C._dynamo.guards.TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
        return guard if guard.check(*tensors) is True else None
    except Exception:
        return None

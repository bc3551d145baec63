"""What the ops over lists of tensors share: bundles of arguments, calls that are checked before they run, and the prologue.

On the host an op prepares a call: it checks its arguments, renews the `TensorTable` where something has changed, and returns
a `PreparedCall`, which launches. In the kernel the prologue finds the chunk of a program (`chunk_of_program`), its pointers
in the tensors of each role (`chunk_pointer`, `scale_pointer`) and where its noise starts (`noise_of_chunk`). The bundles that
kernels pass on are NamedTuples, which the compilers of Triton take apart: they cost no instruction.
"""

import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from soul_kernels._launch import tl, triton
from soul_kernels._table import TensorTable
from soul_kernels.errors import argument_error
from soul_kernels.reference.rounding import GROUP, salt
from soul_kernels.rounding import GROUP as GROUP_SIZE
from soul_kernels.rounding import noise_key
from soul_kernels.tensors import check_on_device, same_layout


class Noise(NamedTuple):
    """Where the noise of stochastic rounding comes from: it is a hash of (seed, tensor, step, element).

    Attributes:
        seed: of the whole run. Without ``steps``, pass another one at every call.
        tensor_ids: one int a tensor, its number in the noise; None: its position in the list.
        tensor_offsets: one int a tensor. Where the tensor is a piece of a larger one, it is the number of its first element
            there, in the order of memory: pieces then draw the noise of the whole. With 8-bit states multiples of 256. None: 0.
        steps: fp32 [number of tensors] on the device, which sets the noise of this call apart from that of other calls.
    """

    seed: int = 0
    tensor_ids: Sequence[int] | None = None
    tensor_offsets: Sequence[int] | None = None
    steps: Tensor | None = None

    def salts(self, tensors: Sequence[Tensor]) -> list[int]:
        """Return one salt a tensor, from the seed and from the tensor's number."""
        numbers = range(len(tensors)) if self.tensor_ids is None else self.tensor_ids
        return [salt(self.seed, number) for number in numbers]

    def offsets(self, *states: Sequence[Tensor]) -> list[int]:
        """Return the number of each tensor's first element in its noise.

        Args:
            states: lists of the tensors' states. A group of 8-bit values must be one in the whole tensor as well.

        Raises:
            ValueError: ``tensor_offsets`` does not fit.
        """
        count = len(states[0])
        if self.tensor_offsets is None:
            return [0] * count
        if len(self.tensor_offsets) != count:
            expected = f"{count} integers, one a tensor"
            raise argument_error("tensor_offsets", expected, len(self.tensor_offsets), "pass 0 for a tensor that is whole")
        for index, offset in enumerate(self.tensor_offsets):
            unit = GROUP if any(each[index].dtype == torch.uint8 for each in states) else 1
            if isinstance(offset, bool) or not isinstance(offset, int) or not 0 <= offset < 2**62 or offset % unit:
                expected = f"a multiple of {GROUP}, the groups of 8-bit states," if unit > 1 else "an integer"
                remedy = "pass the number of the piece's first element in the whole tensor"
                raise argument_error(f"tensor_offsets[{index}]", f"{expected} from 0", repr(offset), remedy)
        return list(self.tensor_offsets)


class Guards(NamedTuple):
    """What is done about gradients that are too large, scaled, or not finite. It is read on the device: nothing waits for it.

    Attributes:
        grad_factor: fp32 tensor of one element on the device: the gradients are multiplied by it.
        skip: fp32 tensor of one element on the device: unless it is 0, nothing is changed.
    """

    grad_factor: Tensor | None = None
    skip: Tensor | None = None

    def check(self, devices: Sequence[torch.device]) -> None:
        """Raise unless both are one fp32 number on the one device in ``devices``, or None."""
        check_on_device("grad_factor", self.grad_factor, devices)
        check_on_device("skip", self.skip, devices)


DEFAULT_NOISE = Noise()
NO_GUARDS = Guards()

Bundle = TypeVar("Bundle", bound=NamedTuple)


def with_fields(bundle: Bundle, keywords: dict[str, Any]) -> Bundle:
    """Return the bundle with those of its fields that are in ``keywords``, which are taken out of there."""
    fields = {name: keywords.pop(name) for name in bundle._fields if name in keywords}
    return bundle._replace(**fields) if fields else bundle


def check_all_taken(function: str, keywords: dict[str, Any]) -> None:
    """Raise the TypeError of Python where a keyword is a field of no bundle."""
    for name in keywords:
        raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")


class PreparedCall:
    """A call of an op whose arguments have been checked, and which has changed nothing yet: call it, once.

    It goes by the addresses that were checked. So it must follow before anything is done to the tensors, and before the object
    that prepared it prepares another call.
    """

    __slots__ = ("_copy", "_number", "_run", "_table")

    def __init__(self, table: TensorTable, run: Callable[[], None], copy: Callable[[], object] | None = None) -> None:
        self._run = run
        self._copy = copy
        self._table = table
        self._number = table.next_call()

    def __call__(self) -> None:
        """Change the tensors.

        Raises:
            RuntimeError: it was called before, or another call was prepared with the same table since.
        """
        if self._number != self._table.call:
            raise RuntimeError("prepared call: expected to be called once, before the next one is prepared; prepare it anew")
        self._table.next_call()
        copies = None if self._copy is None else self._copy()
        self._run()
        del copies  # which the launch has read


def nothing_to_do() -> None:
    """Do nothing: the run of a call without tensors."""


def rebuild_table(
    table: TensorTable,
    roles: dict[str, Sequence[Any] | None],
    key: object,
    *,
    read: Collection[str],
    salts: Sequence[int],
    offsets: Sequence[int],
    side: Collection[str],
) -> Callable[[], object] | None:
    """Rebuild the table from tensors that were found to fit together; gradients of other strides need copies first.

    Args:
        table: the table; "g" is its role that is only read.
        roles: as in `TensorTable.rebuild`, the tensors of ``read`` as they came.
        key: as in `TensorTable.rebuild`.
        read: roles whose tensors are copied where they do not lie in memory as those of the first role do.
        salts: as in `TensorTable.rebuild`.
        offsets: as in `TensorTable.rebuild`.
        side: as in `TensorTable.rebuild`.

    Returns:
        None where the table is complete. Else a function that makes the copies, completes the table and returns the copies. It
        is called right before the launch: the copies of all calls that are prepared together would take the memory of all
        gradients.
    """
    lead: Sequence[Tensor] = roles[next(iter(roles))] or ()
    rebuild = functools.partial(table.rebuild, key=key, read_only="g", salts=salts, offsets=offsets, side=side)
    if all(same_layout(*pair) for role in read for pair in zip(roles[role] or (), lead)):
        rebuild(roles)
        return None
    table.describe(lead, salts, offsets)

    @torch.no_grad()
    def copy() -> object:
        copies = {role: tensors and _match_layout(tensors, lead) for role, tensors in roles.items() if role in read}
        rebuild(roles | copies)
        return copies

    return copy


def _match_layout(grads: Sequence[Tensor], leaders: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradients, as copies where their strides differ from their leader's."""
    return [g if same_layout(g, lead) else torch.empty_like(lead, dtype=g.dtype).copy_(g) for g, lead in zip(grads, leaders)]


class Chunk(NamedTuple):
    """What a program works on, as a kernel has it: some elements of one tensor, and the column of the table for it.

    Attributes:
        table_ptr: [rows, n_tensors] int64, as `TensorTable` describes it.
        n_tensors: the columns.
        tensor: the column.
        start: the chunk's first element in its tensor, int64: tensors pass 2^31.
        count: how many elements it has.
    """

    table_ptr: Any
    n_tensors: Any
    tensor: Any
    start: Any
    count: Any


class ChunkNoise(NamedTuple):
    """Where the noise of a chunk starts from, as a kernel has it.

    Attributes:
        key: what all elements of the tensor share in this call; None where nothing is rounded stochastically.
        first: number of the chunk's first element in the noise.
    """

    key: Any
    first: Any


@triton.jit
def chunk_of_program(table_ptr, chunk_tensor_ptr, chunk_piece_ptr, n_tensors, ROLES: tl.constexpr, CHUNK: tl.constexpr):
    """Return the `Chunk` of this program. ``ROLES``: rows of addresses, which the row of element counts follows."""
    tensor = tl.load(chunk_tensor_ptr + tl.program_id(0))
    start = tl.load(chunk_piece_ptr + tl.program_id(0)).to(tl.int64) * CHUNK
    count = tl.minimum(tl.load(table_ptr + ROLES * n_tensors + tensor) - start, CHUNK).to(tl.int32)
    return Chunk(table_ptr, n_tensors, tensor, start, count)


# Two orders of one sum: with these the compilers of Triton 3.6 and 3.9 emit the fewest instructions.
@triton.jit
def _address(chunk, ROW: tl.constexpr):
    """Return the address in row ``ROW`` for the chunk's tensor."""
    return tl.load(chunk.table_ptr + (ROW * chunk.n_tensors + chunk.tensor))


@triton.jit
def _entry(chunk, ROW: tl.constexpr):
    """Return the entry in row ``ROW`` for the chunk's tensor, where it is no address that elements are loaded from."""
    return tl.load(chunk.table_ptr + ROW * chunk.n_tensors + chunk.tensor)


@triton.jit
def chunk_pointer(chunk, ROW: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Return a pointer to the chunk's first element in the tensor of a role."""
    if DTYPE is None:  # an absent role: something that is never read (Triton 3.6 cannot return None)
        return chunk.table_ptr
    else:
        pointer = _address(chunk, ROW).to(tl.pointer_type(DTYPE)) + chunk.start
        if ALIGNED:  # after the offset was added: only then do 16-byte accesses come out
            pointer = tl.multiple_of(pointer, 16)
        return pointer


@triton.jit
def scale_pointer(chunk, ROW: tl.constexpr, STATE_DTYPE: tl.constexpr):
    """Return a pointer to the chunk's first scale in the role ``ROW``, if its state has 8 bits."""
    if STATE_DTYPE == tl.uint8:
        return _address(chunk, ROW).to(tl.pointer_type(tl.float32)) + chunk.start // GROUP_SIZE
    else:
        return chunk.table_ptr


@triton.jit
def number_of_tensor(chunk, ROW: tl.constexpr):
    """Return the fp32 number that a role has for the chunk's tensor."""
    return tl.load(_entry(chunk, ROW).to(tl.pointer_type(tl.float32)))


@triton.jit
def noise_of_chunk(chunk, ROLES: tl.constexpr, STEP_ROW: tl.constexpr, STEPS: tl.constexpr):
    """Return the `ChunkNoise`. Rows of salts and of offsets follow the one of element counts."""
    step = 0.0
    if STEPS:
        step = number_of_tensor(chunk, STEP_ROW)
    key = noise_key(_entry(chunk, ROLES + 1), step)
    return ChunkNoise(key, _entry(chunk, ROLES + 2) + chunk.start)

"""Parts that the ops over lists of tensors share: bundles of arguments, prepared calls, and the prologue of the kernels.

On the host an op prepares a call: it checks its arguments, renews the `TensorTable` where something has changed, and returns
a `PreparedCall`, which launches. In the kernel the prologue finds the chunk of a program (`chunk_of_program`), its pointers
in the tensors of each role (`chunk_pointer`, `scale_pointer`) and the start of its noise (`noise_of_chunk`). A role is the
list of all tensors of one kind, such as the gradients, and a row of the table. Kernels pass values on as NamedTuples; Triton
takes these apart when it compiles, so they cost no instruction.
"""

import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple, TypedDict, TypeVar

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
    """Source of the noise of stochastic rounding, which is a hash of (seed, tensor, step, element).

    Attributes:
        seed: seed of the whole run. Without ``steps``, pass another one at every call.
        tensor_ids: one int per tensor, by which the hash tells tensors apart; None: the position in the list.
        tensor_offsets: one int per tensor. For a piece of a larger tensor it is the index of the piece's first element in the
            larger one, in memory order: pieces then draw the noise of the whole. With 8-bit states multiples of 256. None: 0.
        steps: fp32 [number of tensors] on the device, which sets the noise of this call apart from that of other calls.
    """

    seed: int = 0
    tensor_ids: Sequence[int] | None = None
    tensor_offsets: Sequence[int] | None = None
    steps: Tensor | None = None

    def salts(self, tensors: Sequence[Tensor]) -> list[int]:
        """Return one salt per tensor, from the seed and from the tensor's id."""
        numbers = range(len(tensors)) if self.tensor_ids is None else self.tensor_ids
        return [salt(self.seed, number) for number in numbers]

    def offsets(self, *states: Sequence[Tensor]) -> list[int]:
        """Return the index that each tensor's first element has in the noise.

        Args:
            states: lists of the tensors' states. With 8-bit states an offset must be a multiple of 256, so that a group of the
                piece is a group of the whole tensor.

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
    """Factor and skip flag for gradients that are too large, scaled, or not finite.

    Both are read on the device, so the host does not wait for their values.

    Attributes:
        grad_factor: fp32 tensor of one element; the gradients are multiplied by it. None: 1.
        skip: fp32 tensor of one element; unless it is 0, nothing is changed. None: 0.
    """

    grad_factor: Tensor | None = None
    skip: Tensor | None = None

    def check(self, devices: Sequence[torch.device]) -> None:
        """Raise unless each is None or one fp32 number on the only device in ``devices``."""
        check_on_device("grad_factor", self.grad_factor, devices)
        check_on_device("skip", self.skip, devices)


class LooseFields(TypedDict, total=False):
    """The fields of `Noise` and `Guards` as keywords of an op."""

    seed: int
    tensor_ids: Sequence[int] | None
    tensor_offsets: Sequence[int] | None
    steps: Tensor | None
    grad_factor: Tensor | None
    skip: Tensor | None


DEFAULT_NOISE = Noise()
NO_GUARDS = Guards()

Bundle = TypeVar("Bundle", bound=NamedTuple)


def with_fields(bundle: Bundle, keywords: dict[str, Any]) -> Bundle:
    """Move the keywords that are fields of a bundle out of ``keywords``; return the bundle with their values."""
    fields = {name: keywords.pop(name) for name in bundle._fields if name in keywords}
    return bundle._replace(**fields) if fields else bundle


def refuse_unknown_keywords(function: str, keywords: dict[str, Any]) -> None:
    """Raise Python's TypeError for an unknown keyword, if any is left after the fields of all bundles have been taken out."""
    if keywords:
        raise TypeError(f"{function}() got an unexpected keyword argument {next(iter(keywords))!r}")


class PreparedCall:
    """A call of an op with checked arguments that has changed nothing yet. Call it once.

    It uses the addresses that were checked. So it must be called before any of the tensors is changed or moved, and before the
    object that prepared it prepares another call.

    Args:
        table: the table of the tensors, which counts the calls.
        run: what runs the op.
        copy: makes the copies that ``run`` needs, and returns them: see `rebuild_table`. None: no copies are needed.
    """

    __slots__ = ("_copy", "_number", "_run", "_table")

    def __init__(self, table: TensorTable, run: Callable[[], None], copy: Callable[[], object] | None = None) -> None:
        self._run = run
        self._copy = copy
        self._table = table
        self._number = table.next_call()

    def __call__(self) -> None:
        """Run the op.

        Raises:
            RuntimeError: this call has been made before, or another call has been prepared with the same table since.
        """
        if self._number != self._table.call:
            raise RuntimeError("prepared call: expected to be called once, before the next one is prepared; prepare it anew")
        self._table.next_call()
        copies = None if self._copy is None else self._copy()
        self._run()
        del copies  # kept alive until the launch


def nothing_to_do() -> None:
    """Do nothing, as the ``run`` of a `PreparedCall` without tensors."""


def rebuild_table(
    table: TensorTable,
    roles: dict[str, Sequence[Any] | None],
    key: object,
    *,
    read: Collection[str],
    salts: Sequence[int],
    offsets: Sequence[int],
    auxiliary: Collection[str],
) -> Callable[[], object] | None:
    """Rebuild the table for tensors that have been checked; gradients with other strides must be copied first.

    Args:
        table: the table; "g" is its role that is only read.
        roles: as in `TensorTable.rebuild`; the tensors of the roles in ``read`` may have other strides.
        key: as in `TensorTable.rebuild`.
        read: roles whose tensors are copied where their strides differ from those of the first role.
        salts: as in `TensorTable.rebuild`.
        offsets: as in `TensorTable.rebuild`.
        auxiliary: as in `TensorTable.rebuild`.

    Returns:
        None if the table is complete. Otherwise a function that makes the copies, completes the table and returns the copies,
        to be called right before the launch. If calls that are prepared together made their copies at once, these would take
        the memory of all gradients.
    """
    lead: Sequence[Tensor] = roles[next(iter(roles))] or ()
    rebuild = functools.partial(table.rebuild, key=key, read_only="g", salts=salts, offsets=offsets, auxiliary=auxiliary)
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
    """The elements that a program works on, within a kernel: a range of one tensor.

    Attributes:
        table_ptr: [rows, n_tensors] int64, as `TensorTable` describes it.
        n_tensors: number of columns of the table.
        tensor: the tensor's column of the table.
        start: index of the chunk's first element in its tensor, int64: tensors may have more than 2^31 elements.
        count: number of elements of the chunk.
    """

    table_ptr: Any
    n_tensors: Any
    tensor: Any
    start: Any
    count: Any


class ChunkNoise(NamedTuple):
    """Start of a chunk's noise, within a kernel.

    Attributes:
        key: the `noise_key` of the tensor in this call; None where nothing is rounded stochastically.
        first: index of the chunk's first element in the noise.
    """

    key: Any
    first: Any


@triton.jit
def chunk_of_program(table_ptr, chunk_tensor_ptr, chunk_piece_ptr, n_tensors, ROLES: tl.constexpr, CHUNK: tl.constexpr):
    """Return the `Chunk` of this program. ``ROLES`` is the number of rows of addresses; the row of element counts is next."""
    tensor = tl.load(chunk_tensor_ptr + tl.program_id(0))
    start = tl.load(chunk_piece_ptr + tl.program_id(0)).to(tl.int64) * CHUNK
    count = tl.minimum(tl.load(table_ptr + ROLES * n_tensors + tensor) - start, CHUNK).to(tl.int32)
    return Chunk(table_ptr, n_tensors, tensor, start, count)


# The next two functions add the same terms in different orders: with these the compilers of Triton 3.6 and 3.9 emit the fewest
# instructions.
@triton.jit
def _address(chunk, ROW: tl.constexpr):
    """Return the address in row ``ROW`` for the chunk's tensor."""
    return tl.load(chunk.table_ptr + (ROW * chunk.n_tensors + chunk.tensor))


@triton.jit
def _entry(chunk, ROW: tl.constexpr):
    """Return the entry in row ``ROW`` for the chunk's tensor, for rows that hold no address of elements."""
    return tl.load(chunk.table_ptr + ROW * chunk.n_tensors + chunk.tensor)


@triton.jit
def chunk_pointer(chunk, ROW: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Return a pointer to the chunk's first element in the tensor of a role."""
    if DTYPE is None:  # an absent role: a pointer that is never read, because a function of Triton 3.6 cannot return None
        return chunk.table_ptr
    else:
        pointer = _address(chunk, ROW).to(tl.pointer_type(DTYPE)) + chunk.start
        if ALIGNED:  # after the offset is added: only then are accesses 16 bytes wide
            pointer = tl.multiple_of(pointer, 16)
        return pointer


@triton.jit
def scale_pointer(chunk, ROW: tl.constexpr, STATE_DTYPE: tl.constexpr):
    """Return a pointer to the chunk's first scale in row ``ROW``; one that is never read if the state is not 8-bit."""
    if STATE_DTYPE == tl.uint8:
        return _address(chunk, ROW).to(tl.pointer_type(tl.float32)) + chunk.start // GROUP_SIZE
    else:
        return chunk.table_ptr


@triton.jit
def number_of_tensor(chunk, ROW: tl.constexpr):
    """Return the fp32 number of the chunk's tensor in a role that has one number per tensor."""
    return tl.load(_entry(chunk, ROW).to(tl.pointer_type(tl.float32)))


@triton.jit
def noise_of_chunk(chunk, ROLES: tl.constexpr, STEP_ROW: tl.constexpr, STEPS: tl.constexpr):
    """Return the `ChunkNoise` of a chunk. The rows of salts and of offsets follow that of element counts."""
    step = 0.0
    if STEPS:
        step = number_of_tensor(chunk, STEP_ROW)
    key = noise_key(_entry(chunk, ROLES + 1), step)
    return ChunkNoise(key, _entry(chunk, ROLES + 2) + chunk.start)

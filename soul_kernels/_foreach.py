"""Parts that the ops over lists of tensors share: prepared calls, and the prologue of the kernels.

On the host an op prepares a call: it checks its arguments, renews the `TensorTable` where something has changed, and returns
a `PreparedCall`, which launches. In the kernel the prologue finds the chunk of a program (`chunk_of_program`), its pointers
in the tensors of each role (`chunk_pointer`, `scale_pointer`) and the start of its noise (`noise_of_chunk`). A role is the
list of all tensors of one kind, such as the gradients, and a row of the table. Kernels pass values on as NamedTuples; Triton
takes these apart when it compiles, so they cost no instruction.
"""

import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from soul_kernels._launch import tl, triton
from soul_kernels._table import TensorTable
from soul_kernels.rounding import GROUP as GROUP_SIZE
from soul_kernels.rounding import noise_key
from soul_kernels.tensors import same_layout


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
    owned: Collection[str] = (),
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
        owned: as in `TensorTable.rebuild`.

    Returns:
        None if the table is complete. Otherwise a function that makes the copies, completes the table and returns the copies,
        to be called right before the launch. If calls that are prepared together made their copies at once, these would take
        the memory of all gradients.
    """
    lead: Sequence[Tensor] = roles[next(iter(roles))] or ()
    rebuild = functools.partial(
        table.rebuild, key=key, read_only="g", salts=salts, offsets=offsets, auxiliary=auxiliary, owned=owned
    )
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
        return _address(chunk, ROW).to(tl.pointer_type(tl.int16)) + chunk.start // GROUP_SIZE
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

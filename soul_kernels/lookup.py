"""Embeddings of tokens from a table that is cut by rows, for processes with tokens of their own.

This is the other end of a head in shards (`soul_kernels.Head.own_tokens`). Where both are tied they use the same rows.
It goes in rounds, as the ops on the head do (`_head.rounds`). In a round each process puts in some of its tokens. Every process
looks up those whose rows it has, and takes zeros for the others. The sums over the processes, each of one row and zeros, go
back to the processes of the tokens. In backward the gradients go to all processes, and each adds up those of its own rows. So
no process ever has the whole table or its whole gradient, and the embeddings are those of the whole table, bit for bit.

Safe to change: the size of a round, which changes only the order of the sums in backward. Not safe: a number of rounds that
differs between processes.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from soul_kernels._head.rounds import Rounds
from soul_kernels._head.shards import shard_of
from soul_kernels.chunks import default_chunk_bytes
from soul_kernels.tokens import VocabShard

NO_TOKEN = -1  # where a process has fewer tokens than others
# Memory of a round at most. At 50 GB/s its rows travel for milliseconds, which is long beside the start of a collective.
ROUND_BYTES = 2**28
FLOAT = 4  # bytes of an element of the gradients that are added up


def look_up(ids: Tensor, weight: Tensor, padding_idx: int | None = None) -> Tensor:
    """Return ``torch.nn.functional.embedding(ids, weight, padding_idx)`` of a table in shards, differentiable by the table::

        weight.full_tensor()[ids]

    All processes of the mesh must make the same calls, each with tokens of its own, of which it may have none.

    Args:
        ids: [...] int64, a plain tensor; each in [0, V).
        weight: [V, D], a DTensor that Shard(0) cuts along one dimension of its mesh.
        padding_idx: a row that gets no gradient from here, or None.

    Returns:
        [..., D], a plain tensor.

    Raises:
        ArgumentError: the weight is no such DTensor.
    """
    shard = shard_of("weight", weight)
    return _LookUp.apply(weight.to_local(), ids, shard, padding_idx)  # type: ignore[attr-defined]  # of a DTensor


class _LookUp(torch.autograd.Function):
    """`look_up` of the rows [V / n, D] that are here."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, ids: Tensor, shard: VocabShard, padding_idx: int | None) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.table = (rows.shape, rows.dtype, shard, padding_idx)
        rounds = Rounds(shard)
        out = rows.new_empty((ids.numel(), rows.shape[1]))
        for own, size in _rounds(rounds, out):
            here, local = _local_rows(rounds, ids.reshape(-1)[own], size)
            out[own] = rounds.sum_of_own(_rows_or_zeros(rows, here, local), len(out[own]))
        return out.view(*ids.shape, rows.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (ids,) = ctx.saved_tensors
        shape, dtype, shard, padding_idx = ctx.table
        rounds = Rounds(shard)
        upstream = upstream.reshape(-1, shape[1])
        n_rows = shape[0]
        sums = upstream.new_zeros(shape, dtype=torch.promote_types(dtype, torch.float32))
        for own, size in _rounds(rounds, upstream):
            here, local = _local_rows(rounds, ids.reshape(-1)[own], size)
            gradients = rounds.all_rows(upstream[own], size).to(sums.dtype)
            if padding_idx is not None:
                here &= local != padding_idx - shard.start
            # Row n_rows stands for all rows that are not here. This function, unlike index_add, gives the same bits each time.
            local = local.where(here, n_rows)
            sums += torch.ops.aten.embedding_dense_backward(gradients, local, n_rows + 1, n_rows, False)[:n_rows]
        return sums.to(dtype), None, None, None


def round_size(width: int, itemsize: int, n_processes: int, budget: int) -> int:
    """Return the number of tokens that each process puts into a round.

    The rows of all of them, of ``width`` elements of ``itemsize`` bytes, and their fp32 copies in backward take ``budget``
    bytes, or `ROUND_BYTES` if these are fewer.
    """
    return max(1, min(budget, ROUND_BYTES) // (width * (itemsize + FLOAT) * n_processes))


def _rounds(rounds: Rounds, states: Tensor) -> list[tuple[slice, int]]:
    """Return the part of this process's tokens in each round, and the largest number of tokens that a process has in it."""
    n_tokens, width = states.shape
    most, budget = rounds.largest(n_tokens, default_chunk_bytes(states.device))
    size = round_size(width, states.itemsize, rounds.n_processes, budget)
    return [(slice(start, start + size), min(size, most - start)) for start in range(0, most, size)]


def _rows_or_zeros(rows: Tensor, here: Tensor, local: Tensor) -> Tensor:
    """Return the rows of the tokens of a round [n, D]; zeros where a row is not here."""
    if not len(rows):
        return rows.new_zeros((len(local), rows.shape[1]))
    return torch.nn.functional.embedding(local.where(here, 0), rows).masked_fill_(~here[:, None], 0.0)


def _local_rows(rounds: Rounds, ids: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return for the tokens of all processes in a round whether their rows are here, and the numbers of these rows here."""
    local = rounds.all_values(ids, size, NO_TOKEN) - rounds.shard.start
    here = (local >= 0) & (local < rounds.shard.n_rows)
    return here, local

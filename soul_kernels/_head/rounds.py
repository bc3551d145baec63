"""Processes with tokens of their own and a head in shards: their rows are computed together, in rounds.

How it works. Every process has some rows of the head (`shards`), and sequences that no other process has. A sweep cuts the rows
of each process into chunks, as it does in one process. In a round each process puts in one chunk, and all of them compute the
logits of all these chunks, each for its own part of the vocabulary::

    load      the hidden states of the round go from every process to all of them (all-gather)
    measure   `shards.ShardFunctions` combines the statistics of all rows; each process keeps those of its own
    gradient  the coefficients, which each process has for its own rows, go to all; the gradient of the process's part of the
              head is complete, and that of the hidden states is added up and goes back to its process (reduce-scatter)

So objectives, losses and log-probabilities are those of a process's own tokens; scratch memory is that of one round; and no
process ever holds the whole head or its whole gradient. Rows of divergences are not packed: every row has one of the reference
model, whether it needs it or not, so that the products of all processes have one shape.

All processes must have the same number of rounds, and in each of them the same number of rows. A process that has fewer pads
with rows whose label is -100, which every row function leaves out. `HeadRows` writes the size of a round into its chunks.

Safe to change: what is exchanged, as long as all processes do so alike. Not safe: a branch on what this process holds around an
exchange; a process without any token takes part in all of them.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from soul_kernels._head.shards import ShardFunctions, gather
from soul_kernels.chunks import Chunk
from soul_kernels.errors import argument_error
from soul_kernels.tokens import IGNORE_INDEX, Head, VocabShard


class Rounds:
    """The exchanges of a round, between the processes that share a vocabulary.

    Attributes:
        shard: the rows of the head that are here, and the mesh.
        n_processes: the number of processes.
    """

    def __init__(self, shard: VocabShard) -> None:
        self.shard = shard
        self.n_processes = shard.mesh.size(shard.dim)
        self._group = shard.mesh.get_group(shard.dim)

    def largest(self, *numbers: int) -> list[int]:
        """Return the largest number among the processes, for each of some numbers of rows or chunks.

        It waits for the other processes; for the device only if the group has no backend for the CPU.
        """
        on_cpu = "cpu:" in dist.get_backend_config(self._group)
        device = "cpu" if on_cpu else self.shard.mesh.device_type
        values = torch.tensor(numbers, dtype=torch.int64, device=device)
        dist.all_reduce(values, dist.ReduceOp.MAX, group=self._group)
        return values.tolist()

    def largest_of(self, values: Tensor) -> Tensor:
        """Return the largest of the values [n] >= 0 of all processes, []."""
        value = torch.cat([values, values.new_zeros(1)]).max()
        dist.all_reduce(value, dist.ReduceOp.MAX, group=self._group)
        return value

    def aligned(self, chunks: list[Chunk] | None, n_rows: int, n_sequences: int) -> list[Chunk] | None:
        """Return as many chunks as the process with the most has, the last ones empty; None if one process has None."""
        sizes = [chunk.stop - chunk.start for chunk in chunks or []]
        is_missing, count, size = self.largest(chunks is None, len(sizes), max(sizes, default=0))
        if is_missing or chunks is None:
            return None
        chunks = chunks + [Chunk(n_rows, n_rows, n_sequences, n_sequences)] * (count - len(chunks))
        return [chunk._replace(size=size) for chunk in chunks]

    def all_rows(self, x: Tensor, size: int) -> Tensor:
        """Return the hidden states [processes * size, D] of a round from those of this process, [n, D] with n <= size."""
        own = x.new_zeros((size, x.shape[1]))
        own[: len(x)] = x
        rows = x.new_empty((self.n_processes * size, x.shape[1]))
        _collective("all_gather_single", "all_gather_into_tensor")(rows, own, group=self._group)
        return rows

    def sum_of_own(self, partial: Tensor, n: int) -> Tensor:
        """Return the sums over the processes of the n rows of this process, from all rows of a round [processes * size, D]."""
        own = partial.new_empty((len(partial) // self.n_processes, partial.shape[1]))
        _collective("reduce_scatter_single", "reduce_scatter_tensor")(own, partial, group=self._group)
        return own[:n]

    def all_values(self, values: Tensor, size: int, fill: float = 0) -> Tensor:
        """Return values [..., processes * size] of all rows of a round from those of this process, [..., n]."""
        own = torch.nn.functional.pad(values, (0, size - values.shape[-1]), value=fill)
        return gather(self.shard, own).movedim(0, -2).flatten(-2).contiguous()  # for the kernels

    def keep_own(self, values: Tensor, own: Tensor) -> None:
        """Write this process's part of values [..., processes * size] of a round into ``own`` [..., n]."""
        size = values.shape[-1] // self.n_processes
        start = self.shard.mesh.get_local_rank(self.shard.dim) * size
        own.copy_(values[..., start : start + own.shape[-1]])


def _collective(name: str, older_name: str) -> Any:
    """Return a function of torch.distributed, which versions of torch before 2.13 know by an older name."""
    return getattr(dist, name, None) or getattr(dist, older_name)


class RoundFunctions:
    """The row functions of `ShardFunctions` for the logits of a round, and labels, statistics and so on of this process.

    Args:
        functions: for all rows of a round.
        rounds: its exchanges.
    """

    def __init__(self, functions: ShardFunctions, rounds: Rounds) -> None:
        self.functions = functions
        self.rounds = rounds

    def _all(self, logits: Tensor, values: Tensor | None, fill: float = 0) -> Any:
        """Return values of all rows of the round; None stays None."""
        return None if values is None else self.rounds.all_values(values, len(logits) // self.rounds.n_processes, fill)

    def _new(self, logits: Tensor, values: Tensor | None) -> Any:
        """Return uninitialized memory like ``values``, for all rows of the round; None stays None."""
        return None if values is None else values.new_empty((*values.shape[:-1], len(logits)))

    def token_statistics(
        self, logits: Tensor, labels: Tensor, statistics: Tensor, *, means: Tensor | None = None, **options: Any
    ) -> None:
        """Do what `ShardFunctions.token_statistics` does."""
        whole = self._new(logits, statistics)
        whole_means = self._new(logits, means)
        self.functions.token_statistics(logits, self._all(logits, labels, IGNORE_INDEX), whole, means=whole_means, **options)
        self.rounds.keep_own(whole, statistics)
        if means is not None:
            self.rounds.keep_own(whole_means, means)

    def token_gradient(
        self, logits: Tensor, labels: Tensor, statistics: Tensor, coefficients: Tensor, out: Tensor, *,
        lse_coefficients: Tensor | None = None, mean_coefficients: Tensor | None = None, **options: Any,
    ) -> None:  # fmt: skip
        """Do what `ShardFunctions.token_gradient` does."""
        self.functions.token_gradient(
            logits, self._all(logits, labels, IGNORE_INDEX), self._all(logits, statistics), self._all(logits, coefficients),
            out, lse_coefficients=self._all(logits, lse_coefficients),
            mean_coefficients=self._all(logits, mean_coefficients), **options,
        )  # fmt: skip

    def statistics_and_gradient(
        self, logits: Tensor, labels: Tensor, statistics: Tensor, coefficients: Tensor, out: Tensor, **transform: Any
    ) -> None:
        """Do what `ShardFunctions.statistics_and_gradient` does."""
        whole = self._new(logits, statistics)
        labels, coefficients = self._all(logits, labels, IGNORE_INDEX), self._all(logits, coefficients)
        self.functions.statistics_and_gradient(logits, labels, whole, coefficients, out, **transform)
        self.rounds.keep_own(whole, statistics)

    def divergence_statistics(
        self, logits: Tensor, ref_logits: Tensor, labels: Tensor, statistics: Tensor, ref_statistics: Tensor,
        divergences: Tensor, *, strengths: Tensor | None = None, **options: Any,
    ) -> None:  # fmt: skip
        """Do what `ShardFunctions.divergence_statistics` does."""
        whole = self._new(logits, divergences)
        self.functions.divergence_statistics(
            logits, ref_logits, self._all(logits, labels, IGNORE_INDEX), self._all(logits, statistics),
            self._all(logits, ref_statistics), whole, strengths=self._all(logits, strengths), **options,
        )  # fmt: skip
        self.rounds.keep_own(whole, divergences)

    def divergence_gradient(
        self, logits: Tensor, ref_logits: Tensor, labels: Tensor, statistics: Tensor, ref_statistics: Tensor,
        divergences: Tensor, coefficients: Tensor, weights: Tensor, out: Tensor, *, strengths: Tensor | None = None,
        **options: Any,
    ) -> None:  # fmt: skip
        """Do what `ShardFunctions.divergence_gradient` does."""
        self.functions.divergence_gradient(
            logits, ref_logits, self._all(logits, labels, IGNORE_INDEX), self._all(logits, statistics),
            self._all(logits, ref_statistics), self._all(logits, divergences), self._all(logits, coefficients),
            self._all(logits, weights), out, strengths=self._all(logits, strengths), **options,
        )  # fmt: skip

    def likeliest_statistics(self, logits: Tensor, labels: Tensor, statistics: Tensor, **transform: Any) -> None:
        """Do nothing: here `draw_labels` needs no statistics beforehand."""

    def draw_labels(
        self, logits: Tensor, labels: Tensor, uniforms: Tensor, statistics: Tensor, coefficients: Tensor, out: Tensor,
        **transform: Any,
    ) -> None:  # fmt: skip
        """Do what `ShardFunctions.draw_labels` does."""
        whole = self._new(logits, statistics)
        drawn = self._all(logits, labels, IGNORE_INDEX)
        uniforms, coefficients = self._all(logits, uniforms), self._all(logits, coefficients)
        self.functions.draw_labels(logits, drawn, uniforms, whole, coefficients, out, **transform)
        self.rounds.keep_own(drawn, labels)
        self.rounds.keep_own(whole, statistics)

    def predictions(self, logits: Tensor, labels: Tensor, predictions: Tensor, *, rising: bool) -> None:
        """Do what `ShardFunctions.predictions` does."""
        whole = self._new(logits, predictions)
        self.functions.predictions(logits, self._all(logits, labels, IGNORE_INDEX), whole, rising=rising)
        self.rounds.keep_own(whole, predictions)


class _WithOneScale(torch.autograd.Function):
    """Identity on a loss whose backward raises unless all processes have the same upstream gradient."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, shard: VocabShard) -> Tensor:
        ctx.shard = shard
        return loss.clone()  # FSDP2 warns of a view

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None]:
        scales = gather(ctx.shard, scale)
        if not (scales == scale).all():  # waits for the device
            got = ", ".join(f"{number:.6g}" for number in scales.tolist())
            remedy = "the gradient of the head is already summed over their tokens: put the factor into the objective"
            raise argument_error("loss", "the same upstream gradient in all processes that share a head", got, remedy)
        return scale, None


def with_one_scale(loss: Tensor, head: Head) -> Tensor:
    """Return a loss whose gradients are formed already; where they are sums over processes, its backward checks its scale.

    A factor that differs between the processes would have to multiply each one's part of the sum.
    """
    if head.shard is None or not head.shard.own_tokens:
        return loss
    is_trained = head.weight.requires_grad or (head.bias is not None and head.bias.requires_grad)
    return _WithOneScale.apply(loss, head.shard) if is_trained else loss

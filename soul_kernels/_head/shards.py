"""A head that is cut along the vocabulary: each process has some rows of it, and computes with those alone.

How it works. A sweep (`sweeps`) multiplies the hidden states of tokens by the rows of the head that its process holds. So its
matrix of raw products has some columns of the whole one. Statistics, divergences and labels belong to tokens, and every process
has all of them. Only the functions that read the columns and write the statistics differ from those of one process:
`ShardFunctions`. They call the row functions of the backend, kernels or PyTorch, on the columns that are here, and combine the
results of all processes.

A row function wants the label among its columns. A row whose label is elsewhere gets a label that stands in for it: column 0,
with the statistics of column 0 in place of the label's: its own log p, and -p where 1 - p of the label would stand. With these
numbers every formula that treats the label's column apart gives column 0 the same values as any other column, up to rounding.

What is exchanged, for each chunk: three numbers a token for its statistics, three more for those that metrics need, one for
the mean logit, and three for the statistics of the reference model; the sums of a divergence; for a drawn label the logsumexp
and the label; and for a predicted one its logit and its number. Statistics are gathered and not reduced, because a sum
of exponentials needs the maximum first. That is one exchange in place of two, and all processes combine the same numbers in the
same order, so that they have the same bits. The gradient of the hidden states is added up once, in fp32; hidden states that are
cut along the tokens get theirs by a reduce-scatter, in their own dtype.

Every exchange is collective. The number of chunks must be the same in every process, so it follows from the largest shard.

Safe to change: what is exchanged, as long as all processes do so alike. Not safe: a branch on what this process holds around an
exchange; an empty shard takes part in all of them.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._guards import detect_fake_mode

from soul_kernels.errors import argument_error
from soul_kernels.reference import _rows, token_draw
from soul_kernels.reference.token_logprob import (
    HIT,
    LOGP,
    N_ALL,
    N_BASIC,
    ONE_MINUS_P,
    ROW_MAX,
    TOTAL,
    transformed,
)
from soul_kernels.tokens import IGNORE_INDEX, Head, Reference, VocabShard


def is_dtensor(tensor: Tensor | None) -> bool:
    """Tell whether this is a DTensor, without importing DTensor."""
    return tensor is not None and hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")


# Heads and hidden states in shards


def local_arguments(hidden: Tensor, head: Head) -> tuple[Tensor, Head]:
    """Return the hidden states of all tokens, and the rows of a sharded head that this process holds, both plain tensors.

    The gradients of the plain tensors become those of the DTensors. Hidden states that are sharded along the tokens are
    gathered here, and the gradient of each process's own ones is made by a reduce-scatter.

    Args:
        hidden: [B, T, D], plain and the same in all processes of the mesh; or a DTensor.
        head: a `Head` whose weight is a DTensor.

    Raises:
        ArgumentError: the head is not cut by rows along one dimension of its mesh, or hidden states or bias do not fit.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or detect_fake_mode((hidden, head.weight)):
        expected = "a whole head under torch.compile, torch.func and where tensors hold no values"
        remedy = "processes exchange sums within the op, for which they need values: call it outside of these"
        raise argument_error("weight", expected, _described(head.weight), remedy)
    shard = shard_of("weight", head.weight)
    if head.bias is not None and not _is_cut_alike("bias", head.bias, shard):
        remedy = "distribute it over the mesh of the weight, with the same placements"
        raise argument_error("bias", f"a DTensor with placements {_placements(head.weight)}", _described(head.bias), remedy)
    if head.own_tokens and is_dtensor(hidden):
        raise argument_error("hidden", "a plain tensor with own_tokens", _described(hidden), "pass hidden.to_local()")
    hidden, partial = _whole_hidden("hidden", hidden, shard)
    bias = None if head.bias is None else _to_local(head.bias)
    shard = shard._replace(partial_hidden=partial, own_tokens=head.own_tokens)
    return hidden, head._replace(weight=_to_local(head.weight), bias=bias, shard=shard)


def local_reference(reference: Reference, shard: VocabShard) -> Reference:
    """Return a reference model with the hidden states of all tokens and the rows of its head that are here, without gradient.

    Args:
        reference: weight and bias are whole, or cut as the model's head is.
        shard: that of the model's head.
    """
    hidden, weight, bias = reference
    with torch.no_grad():
        hidden, _ = _whole_hidden("reference.hidden", hidden, shard)
    return Reference(
        hidden, _local_rows("reference.weight", weight, shard), _local_rows("reference.bias", bias, shard)
    )  # fmt: skip


def shard_of(name: str, weight: Any) -> VocabShard:
    """Return the `VocabShard` of a weight [V, D], a DTensor.

    Raises:
        ArgumentError: it is not cut by rows along one dimension of its mesh.
    """
    mesh = weight.device_mesh
    cut = [dim for dim, placement in enumerate(weight.placements) if not placement.is_replicate()]
    if len(cut) != 1 or not weight.placements[cut[0]].is_shard(0) or mesh.get_coordinate() is None:
        expected = "a plain tensor, or a DTensor that Shard(0) cuts along one dimension of its mesh"
        remedy = f"distribute it with [Shard(0)], or gather it: {name}.full_tensor(), through which autograd goes"
        raise argument_error(name, expected, _described(weight), remedy)
    n_vocab = weight.shape[0]
    size, rank = mesh.size(cut[0]), mesh.get_local_rank(cut[0])
    largest = -(-n_vocab // size)
    start = min(rank * largest, n_vocab)
    n_rows = min(largest, n_vocab - start)
    held = weight.to_local().shape[0]
    if held != n_rows:
        expected = f"{n_rows} of the {n_vocab} rows in process {rank} of {size}"
        raise argument_error(name, expected, held, "cut it with torch.distributed.tensor.distribute_tensor")
    return VocabShard(mesh, cut[0], start, n_rows, n_vocab, largest)


def _is_cut_alike(name: str, tensor: Any, shard: VocabShard) -> bool:
    """Tell whether a tensor is a DTensor that is cut along its first dimension as the shard is."""
    return is_dtensor(tensor) and shard_of(name, tensor) == shard._replace(partial_hidden=False, own_tokens=False)


def _to_local(tensor: Any) -> Tensor:
    """Return the rows of a DTensor that are here; their gradient is a DTensor cut as the DTensor is."""
    return tensor.to_local()


def _local_rows(name: str, tensor: Tensor | None, shard: VocabShard) -> Tensor | None:
    """Return the rows of a reference model's weight or bias that are here."""
    if tensor is None:
        return None
    if not is_dtensor(tensor):
        return tensor[shard.start : shard.start + shard.n_rows]
    if not _is_cut_alike(name, tensor, shard):
        remedy = f"pass {name}.full_tensor(), or distribute it as the model's head"
        raise argument_error(name, "a plain tensor, or a DTensor cut as the model's head", _described(tensor), remedy)
    return _to_local(tensor).detach()


def _whole_hidden(name: str, hidden: Any, shard: VocabShard) -> tuple[Tensor, bool]:
    """Return hidden states of all tokens as a plain tensor, and whether its gradient is to stay a sum of this process alone."""
    if not is_dtensor(hidden):
        return hidden, False
    from torch.distributed.tensor import Partial, Replicate

    placements = list(hidden.placements)
    own = placements[shard.dim] if hidden.device_mesh == shard.mesh else None
    others = placements[: shard.dim] + placements[shard.dim + 1 :]
    by_tokens = own is not None and (own.is_shard(0) or own.is_shard(1))
    if own is None or not (own.is_replicate() or by_tokens) or not all(other.is_replicate() for other in others):
        expected = "a plain tensor, or a DTensor on the mesh of the weight, replicated or cut along the tokens"
        remedy = f"pass {name}.redistribute(mesh, [Replicate()]), on the mesh of the weight"
        raise argument_error(name, expected, _described(hidden), remedy)
    if not by_tokens:
        return hidden.to_local(), False
    placements[shard.dim] = Replicate()
    gathered = hidden.redistribute(placements=placements)
    placements[shard.dim] = Partial()
    return gathered.to_local(grad_placements=placements), True


def _placements(tensor: Any) -> str:
    return str(tuple(tensor.placements))


def _described(tensor: Any) -> str:
    return f"a DTensor with placements {_placements(tensor)}" if is_dtensor(tensor) else f"a plain tensor {tuple(tensor.shape)}"


# Exchanges


def gather(shard: VocabShard, values: Tensor) -> Tensor:
    """Return the values [...] of all processes that share the vocabulary, [processes, ...] in the order of its rows."""
    out = [torch.empty_like(values) for _ in range(shard.mesh.size(shard.dim))]
    dist.all_gather(out, values.contiguous(), group=shard.mesh.get_group(shard.dim))
    return torch.stack(out)


def add_up(shard: VocabShard, values: Tensor) -> None:
    """Replace values by their sums over the processes that share the vocabulary."""
    if values.numel():
        summed = values.contiguous()
        dist.all_reduce(summed, group=shard.mesh.get_group(shard.dim))
        values.copy_(summed)


def from_first(shard: VocabShard, values: Tensor) -> None:
    """Replace values by those of the first process that shares the vocabulary."""
    dist.broadcast(values, group=shard.mesh.get_group(shard.dim), group_src=0)


# Row functions


class ShardFunctions:
    """The row functions of a backend, for logits [n, C] of which a process has C of V columns: see the top of the file.

    Labels are numbers of the whole vocabulary. Statistics, divergences and drawn labels are those of whole rows, the same in
    all processes; gradients are those of the columns.
    """

    def __init__(self, functions: Any, shard: VocabShard) -> None:
        self.functions = functions
        self.shard = shard

    def token_statistics(
        self, logits: Tensor, labels: Tensor, statistics: Tensor, *, means: Tensor | None = None,
        class_weights: Tensor | None = None, **transform: Any,
    ) -> None:  # fmt: skip
        """Do what `soul_kernels.token_logprob.token_statistics` does, in one exchange."""
        mine, local_labels = self._local(labels)
        has_all = len(statistics) == N_ALL
        # Logit of the label, or -inf; maximum of the columns; sum of exp(z - maximum) over the columns but the label. Then hit,
        # entropy and variance among the columns, if they are asked for; and the columns' part of the mean logit.
        values = statistics.new_zeros((N_BASIC + 3, len(labels)))
        values[0] = -torch.inf
        values[1] = _rows.LOWEST
        if self.shard.n_rows:
            own = statistics.new_empty((len(statistics), len(labels)))
            options = {} if means is None else {"means": values[-1], "class_weights": self._own_columns(class_weights)}
            self.functions.token_statistics(logits, local_labels, own, **options, **transform)
            at_label = self._logits(logits, local_labels.clamp(min=0), **transform)
            values[0] = torch.where(mine, at_label, -torch.inf)
            values[1] = own[ROW_MAX]
            values[2] = own[TOTAL] * torch.where(mine, own[ONE_MINUS_P], 1.0)
            if has_all:
                values[3:6] = own[HIT:]
                values[3].masked_fill_(~mine, 0.0)
            values[-1] *= self.shard.n_rows / self.shard.n_vocab
        sent = [0, 1, 2, *((3, 4, 5) if has_all else ()), *((6,) if means is not None else ())]
        gathered = gather(self.shard, values[sent])
        at_label, maxima, rests = gathered[:, :3].unbind(1)
        row_max = maxima.amax(0)
        rest = (rests * (maxima - row_max).exp()).sum(0)
        valid = (labels >= 0) & (labels < self.shard.n_vocab)
        if has_all:
            statistics[HIT:] = _metrics(gathered)
        _rows.fill_statistics(statistics, labels, valid, at_label.amax(0), row_max, rest)
        if means is not None:
            means.copy_(gathered[:, -1].sum(0).masked_fill(~valid, 0.0))

    def token_gradient(
        self, logits: Tensor, labels: Tensor, statistics: Tensor, coefficients: Tensor, out: Tensor, *,
        mean_coefficients: Tensor | None = None, class_weights: Tensor | None = None, **options: Any,
    ) -> None:  # fmt: skip
        """Do what `soul_kernels.token_logprob.token_gradient` does, without exchange."""
        if self.shard.n_rows:
            mine, local_labels = self._local(labels)
            transform = {name: options[name] for name in ("logit_scale", "softcap")}
            statistics = self._standing_in(logits, mine, statistics, **transform)
            if mean_coefficients is not None:
                mean_coefficients = mean_coefficients * (self.shard.n_rows / self.shard.n_vocab)  # of the columns' mean
                options |= {"mean_coefficients": mean_coefficients, "class_weights": self._own_columns(class_weights)}
            self.functions.token_gradient(logits, local_labels, statistics, coefficients, out, **options)

    def statistics_and_gradient(
        self, logits: Tensor, labels: Tensor, statistics: Tensor, coefficients: Tensor, out: Tensor, **transform: Any
    ) -> None:
        """Do what `token_statistics` and then `token_gradient` do."""
        self.token_statistics(logits, labels, statistics, **transform)
        self.token_gradient(logits, labels, statistics, coefficients, out, **transform)

    def divergence_statistics(
        self, logits: Tensor, ref_logits: Tensor, labels: Tensor, statistics: Tensor, ref_statistics: Tensor,
        divergences: Tensor, *, strengths: Tensor | None = None, kind: str = "kl", beta: float = 0.5, **transform: Any,
    ) -> None:  # fmt: skip
        """Do what `soul_kernels.kl_divergence.divergence_statistics` does, in one exchange."""
        if self.shard.n_rows:
            mine, local_labels = self._local(labels)
            ref_statistics = _rows.lowered(ref_statistics, labels, strengths)
            self.functions.divergence_statistics(
                logits, ref_logits, local_labels, self._standing_in(logits, mine, statistics, **transform),
                self._standing_in(ref_logits, mine, ref_statistics, **transform), divergences,
                kind=kind, beta=beta, **transform,
            )  # fmt: skip
        else:
            divergences.zero_()
        add_up(self.shard, divergences)

    def divergence_gradient(
        self, logits: Tensor, ref_logits: Tensor, labels: Tensor, statistics: Tensor, ref_statistics: Tensor,
        divergences: Tensor, coefficients: Tensor, weights: Tensor, out: Tensor, *, strengths: Tensor | None = None,
        kind: str = "kl", beta: float = 0.5, **transform: Any,
    ) -> None:  # fmt: skip
        """Do what `soul_kernels.kl_divergence.divergence_gradient` does, without exchange."""
        if self.shard.n_rows:
            mine, local_labels = self._local(labels)
            ref_statistics = _rows.lowered(ref_statistics, labels, strengths)
            self.functions.divergence_gradient(
                logits, ref_logits, local_labels, self._standing_in(logits, mine, statistics, **transform),
                self._standing_in(ref_logits, mine, ref_statistics, **transform), divergences, coefficients, weights, out,
                kind=kind, beta=beta, **transform,
            )  # fmt: skip

    def likeliest_statistics(self, logits: Tensor, labels: Tensor, statistics: Tensor, **transform: Any) -> None:
        """Do nothing: here `draw_labels` needs no statistics beforehand."""

    def draw_labels(
        self, logits: Tensor, labels: Tensor, uniforms: Tensor, statistics: Tensor, coefficients: Tensor, out: Tensor,
        **transform: Any,
    ) -> None:  # fmt: skip
        """Do what `soul_kernels.token_draw.draw_labels` does: the same labels, up to the rounding of sums of probabilities.

        The shard of the label is drawn first, from the probabilities of the shards; then the label within it, from what is left
        of the same uniform number. Both draws are by inverse CDF in the order of the vocabulary, and so is the one that they
        make together. The label is drawn in PyTorch, with any backend.
        """
        kept = labels != IGNORE_INDEX
        lse = statistics.new_full((len(labels),), -torch.inf)
        if self.shard.n_rows:
            own = statistics.new_empty((N_BASIC, len(labels)))
            self.functions.token_statistics(logits, torch.where(kept, 0, IGNORE_INDEX), own, **transform)
            lse = own[ROW_MAX] + own[TOTAL].log()
        of_shards = gather(self.shard, lse).T.double()
        chosen = token_draw.draw_labels(of_shards, uniforms)
        p = of_shards.softmax(1)
        before = p.cumsum(1) - p
        p, before = (values.gather(1, chosen[:, None])[:, 0] for values in (p, before))
        within = ((uniforms - before) / p).clamp(0.0, 1.0).to(uniforms.dtype)
        drawn = torch.where(kept & (chosen == self.shard.mesh.get_local_rank(self.shard.dim)), 0, IGNORE_INDEX)
        if self.shard.n_rows:
            _rows.drawn_labels(logits, drawn, within, **transform)
        drawn = torch.where(drawn == IGNORE_INDEX, 0, drawn + self.shard.start)
        add_up(self.shard, drawn)
        labels.copy_(torch.where(kept, drawn, IGNORE_INDEX))
        self.statistics_and_gradient(logits, labels, statistics, coefficients, out, **transform)
        labels.masked_fill_(statistics[LOGP].isnan(), IGNORE_INDEX)

    def predictions(self, logits: Tensor, labels: Tensor, predictions: Tensor, *, rising: bool) -> None:
        """Do what `soul_kernels.reference._rows.predictions` does, in one exchange."""
        best = torch.stack([torch.full(labels.shape, -torch.inf, device=labels.device), torch.zeros_like(labels)]).double()
        if self.shard.n_rows:
            columns = torch.empty_like(labels)
            self.functions.predictions(logits, torch.zeros_like(labels), columns, rising=rising)
            largest = logits.gather(1, columns[:, None])[:, 0].double()
            best = torch.stack([largest if rising else -largest, (columns + self.shard.start).double()])
        largest, numbers = gather(self.shard, best).unbind(1)
        chosen = numbers.gather(0, largest.argmax(0, keepdim=True))[0].long()  # of equals the first
        predictions.copy_(torch.where(labels == IGNORE_INDEX, IGNORE_INDEX, chosen))

    def _own_columns(self, class_weights: Tensor | None) -> Tensor | None:
        """Return the class weights of the columns that are here."""
        if class_weights is None:
            return None
        return class_weights[self.shard.start : self.shard.start + self.shard.n_rows]

    def _local(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return whether each label is among the columns; and the labels by column, or 0 for a valid label elsewhere."""
        local = labels - self.shard.start
        mine = (local >= 0) & (local < self.shard.n_rows)
        valid = (labels >= 0) & (labels < self.shard.n_vocab)
        return mine, torch.where(mine, local, torch.where(valid, 0, IGNORE_INDEX))

    def _logits(self, logits: Tensor, columns: Tensor, *, logit_scale: float, softcap: float | None) -> Tensor:
        """Return one logit of each row, from the raw products, in fp32 or fp64."""
        raw = logits.gather(1, columns[:, None])[:, 0]
        return transformed(raw.to(torch.promote_types(raw.dtype, torch.float32)), logit_scale, softcap)

    def _standing_in(self, logits: Tensor, mine: Tensor, statistics: Tensor, **transform: Any) -> Tensor:
        """Return the statistics with those of column 0 where the label is not ``mine``: see the top of the file."""
        logp = self._logits(logits, torch.zeros_like(mine, dtype=torch.int64), **transform) - statistics[ROW_MAX]
        logp -= statistics[TOTAL].log()
        out = statistics.clone()
        out[LOGP] = torch.where(mine, statistics[LOGP], logp)
        out[ONE_MINUS_P] = torch.where(mine, statistics[ONE_MINUS_P], -logp.exp())
        return out


def _metrics(gathered: Tensor) -> Tensor:
    """Return hit, entropy and variance [3, n] of whole rows from those among the columns of each process.

    The row's distribution is a mixture of those of the processes, with weights w. The mean of -log p under the part of one
    process is its entropy - log w; the entropy of the row is the mean of these, and its variance that of the parts plus that of
    these means. All is measured from the heaviest part, whose log w comes from the weights of the others: where a label has
    p = 1 - 1e-10 the entropy is as small, and differences of rounded numbers would be all noise.

    Args:
        gathered: [processes, 6 or more, n]: logit of the label or -inf, maximum, sum of exp(z - maximum) without the label,
            hit, entropy, variance.
    """
    at_label, maxima, rests, hits, entropies, variances = gathered[:, :6].double().unbind(1)
    lse = maxima + (rests + (at_label - maxima).exp()).log()
    heaviest = lse.argmax(0, keepdim=True)
    w = (lse - lse.gather(0, heaviest)).exp()
    others = w.scatter(0, heaviest, 0.0)
    total = 1 + others.sum(0)
    log_w = (lse - lse.gather(0, heaviest) - total.log()).scatter(0, heaviest, -others.sum(0, keepdim=True).log1p())
    means = torch.where(w > 0, entropies - log_w, 0.0)
    first_mean = means.gather(0, heaviest)
    away = torch.where(w > 0, means - first_mean, 0.0)
    shift = (w * away).sum(0) / total
    entropy = first_mean[0] + shift
    variance = (w * (variances + away**2)).sum(0) / total - shift**2
    # The label is the argmax if it is that of its own columns, and no other column is larger, or equal and before it.
    ranks = torch.arange(len(maxima), device=maxima.device)[:, None]
    owner = at_label.argmax(0)
    best = at_label.amax(0)
    loses = ((maxima > best) | ((maxima == best) & (ranks < owner))) & (ranks != owner)
    return torch.stack([hits.sum(0) * ~loses.any(0), entropy, variance.clamp(min=0)]).to(gathered.dtype)

"""Gradients of hidden states, weight and bias: sums over the chunks of a sweep, and their conversion for autograd."""

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from soul_kernels._head.checks import Needs
from soul_kernels._head.rows import HeadRows, mm_fp32, product_with_weight, products_in
from soul_kernels._head.shards import add_up
from soul_kernels.chunks import Chunk

# Gradients of hidden states (or of their rows [R, D]), weight and bias; None for those that are not needed.
Gradients: TypeAlias = tuple[Tensor | None, Tensor | None, Tensor | None]


class HeadGradients:
    """Sums over chunks of the gradients that are needed; the others are None.

    All are fp32 (fp64 for fp64 inputs) and are rounded once, by the functions below.

    Attributes:
        x: [R, D] gradient of the rows.
        weight: [V, D].
        bias: [V].
    """

    def __init__(self, head_rows: HeadRows, needs: Needs) -> None:
        self.head_rows = head_rows
        dtype = head_rows.options.result_dtype
        device = head_rows.x.device
        # The first chunk overwrites dW. But in fp16 every chunk is added, and without rows there is no chunk: these need zeros.
        self.fp16 = head_rows.x.dtype == torch.float16
        new = torch.zeros if self.fp16 or not head_rows.most_rows else torch.empty
        self._is_first = True
        self.x = torch.empty(head_rows.x.shape, dtype=dtype, device=device) if needs.hidden else None
        self.weight = new(head_rows.head.weight.shape, dtype=dtype, device=device) if needs.weight else None
        self.bias = torch.zeros(head_rows.n_vocab, dtype=dtype, device=device) if needs.bias else None

    def sums(self) -> Gradients:
        """Return the gradients of rows, weight and bias; call it once.

        With a head in shards the gradient of the rows is added up over the processes, unless a reduce-scatter will do so, or
        has done so in each round.
        """
        shard = self.head_rows.head.shard
        if self.x is not None and shard is not None and not (shard.partial_hidden or shard.own_tokens):
            add_up(shard, self.x)
        return self.x, self.weight, self.bias

    def measure_and_add(self, chunk: Chunk, coefficients: Tensor) -> None:
        """Measure a loaded chunk and add its gradients, for coefficients [n] that do not depend on what is measured."""
        if self.fp16:  # which scales the coefficients by what is measured
            self.head_rows.measure(chunk)
            self.add(chunk, coefficients)
        else:
            self._add(chunk, self.head_rows.measured_gradient(chunk, coefficients))

    def add(self, chunk: Chunk, coefficients: Tensor, *others: Tensor | None) -> None:
        """Add the gradients of a loaded and measured chunk; chunks come in order. For the arguments see `HeadRows.gradient`."""
        scale = None
        if self.fp16:
            # coefficient (about 1 / R) times p (about 1 / V) underflows in fp16. So gradients are multiplied by a power of two
            # that brings their largest possible element to between 32 and 64, and the fp32 sums are divided by it. Where no sum
            # over rows is needed, each row has a power of its own: the gradient of a memorized row may be 1e-9 of another's,
            # and the upstream factor that will multiply it is not known yet.
            bounds = self.head_rows.bounds(chunk, coefficients, *others)
            if self.weight is not None or self.bias is not None:
                rounds = self.head_rows.rounds
                bounds = bounds.max() if rounds is None else rounds.largest_of(bounds)
            scale = torch.exp2((6 - torch.frexp(bounds).exponent).clamp(max=100))
            coefficients = coefficients * scale
            others = tuple(None if other is None else other * scale for other in others)
        self._add(chunk, self.head_rows.gradient(chunk, coefficients, *others), scale)

    def _add(self, chunk: Chunk, dlogits: Tensor, scale: Tensor | None = None) -> None:
        """Add the gradients of a chunk from the gradient of its logits [n, V], which in fp16 is multiplied by ``scale``."""
        rows = chunk.span
        if self.x is not None:
            self._fill_x(self.x[rows], dlogits)
        if self.weight is not None and scale is None:
            with products_in(self.head_rows.options.compute_dtype, dlogits):
                _accumulate_fp32(self.weight, dlogits.T, self.head_rows.loaded_x, first=self._is_first)
            self._is_first = False
        bias = None if self.bias is None else dlogits.sum(0, dtype=self.bias.dtype)
        if scale is not None:
            if self.x is not None:
                self.x[rows] /= scale.view(-1, 1)
            if self.weight is not None:
                weight = torch.empty_like(self.weight)
                mm_fp32(dlogits.T, self.head_rows.loaded_x, weight)
                self.weight += weight.div_(scale)
            bias = None if bias is None else bias / scale
        if self.bias is not None and bias is not None:
            self.bias += bias

    def _fill_x(self, out: Tensor, dlogits: Tensor) -> None:
        """Write the gradient of this process's rows of a chunk into ``out`` [n, D]."""
        rounds, weight = self.head_rows.rounds, self.head_rows.head.weight
        if rounds is None:
            product_with_weight(dlogits, weight, out)
        else:
            partial = out.new_empty((len(dlogits), out.shape[1]))
            product_with_weight(dlogits, weight, partial)
            out.copy_(rounds.sum_of_own(partial, len(out)))


def _accumulate_fp32(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """Compute ``total = a @ b`` for the first chunk and ``total += a @ b`` for the others, in the dtype of ``total``."""
    if first:
        mm_fp32(a, b, total)
    elif a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.float(), b.float())


@torch.no_grad()
def scaled_gradients(
    token_indices: Tensor, gradients: Gradients, scale: Tensor, dtypes: Sequence[torch.dtype | None],
    hidden_shape: torch.Size, last: bool = False,
) -> Gradients:  # fmt: skip
    """Multiply the gradients of rows, weight and bias by an upstream factor; return those of hidden, weight and bias.

    Args:
        token_indices: [R], the tokens of the rows.
        gradients: fp32 sums; each may be None.
        scale: [] upstream gradient of the loss.
        dtypes: dtypes of hidden, weight and bias, to which the gradients are rounded; None for a bias that does not exist.
        hidden_shape: [B, T, D].
        last: whether ``gradients`` are not needed afterwards, and so may be changed and returned.
    """
    x, weight, bias = (
        None if gradient is None or dtype is None else _scaled(gradient, scale, dtype, last)
        for gradient, dtype in zip(gradients, dtypes)
    )
    return None if x is None else to_hidden(token_indices, x, hidden_shape), weight, bias


def _scaled(gradient: Tensor, scale: Tensor, dtype: torch.dtype, last: bool) -> Tensor:
    """Return fp32 ``gradient * scale`` rounded once to ``dtype``; out of place unless this is its ``last`` use."""
    if torch._C._are_functorch_transforms_active():  # vmap does not support out=, which saves a copy below
        return (gradient * scale).to(dtype)
    on_cpu = gradient.device.type == "cpu"
    if last and (on_cpu or gradient.dtype == dtype):  # on a CPU ``out`` of another dtype would cost one more copy
        return (gradient if on_cpu and scale == 1 else gradient.mul_(scale)).to(dtype)
    return torch.mul(gradient, scale, out=torch.empty_like(gradient, dtype=dtype))


def rounded_gradients(
    token_indices: Tensor, gradients: Gradients, dtypes: Sequence[torch.dtype | None], hidden_shape: torch.Size
) -> Gradients:
    """Round the gradients of rows, weight and bias to ``dtypes``; return those of hidden, weight and bias."""
    x, weight, bias = (
        None if gradient is None or dtype is None else gradient.to(dtype) for gradient, dtype in zip(gradients, dtypes)
    )
    return None if x is None else to_hidden(token_indices, x, hidden_shape), weight, bias


@torch.no_grad()
def frozen_head_gradient(
    token_indices: Tensor, x: Tensor, upstream: Tensor, dtype: torch.dtype, hidden_shape: torch.Size
) -> Tensor:
    """Return the gradient of hidden states for an upstream gradient [B, T] of one value per token.

    ``x`` [R, D] is the gradient of the rows for upstream gradients of 1: see `soul_kernels._head.sweeps.sweep_tokens`.
    """
    x = x * upstream.to(x.dtype).reshape(-1).index_select(0, token_indices)[:, None]
    return to_hidden(token_indices, x.to(dtype), hidden_shape)


def dtypes_of(*tensors: Tensor | None) -> list[torch.dtype | None]:
    """Return the dtype of each tensor; None stays None."""
    return [None if tensor is None else tensor.dtype for tensor in tensors]


def to_hidden(token_indices: Tensor, x_gradient: Tensor, hidden_shape: torch.Size) -> Tensor:
    """Return the gradient of hidden [B, T, D] from that of the rows; it is 0 at tokens without a row."""
    full = x_gradient.new_zeros((hidden_shape[0] * hidden_shape[1], hidden_shape[2]))
    return full.index_copy_(0, token_indices, x_gradient).view(hidden_shape)

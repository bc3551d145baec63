"""Checks of the arguments of the ops on hidden states, and their conversion to the types that the sweeps take."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from soul_kernels._head.shards import is_dtensor, local_arguments, local_reference
from soul_kernels.backends import resolve_head_backend
from soul_kernels.chunks import LinearOptions, ResolvedOptions, check_options
from soul_kernels.errors import argument_error, check_choice
from soul_kernels.reference.kl_divergence import KINDS
from soul_kernels.tensors import PARAM_DTYPES, check_gradient
from soul_kernels.tokens import IGNORE_INDEX, Head, Reference, as_head


class Needs(NamedTuple):
    """Which gradients a call computes."""

    hidden: bool
    weight: bool
    bias: bool


class Comparison(NamedTuple):
    """A reference model, and the divergence from it that a call computes.

    Attributes:
        hidden: [B, T, D'], hidden states of the reference model.
        head: the reference model's `Head`, scaled and capped as the model's is.
        kind: "kl", "soul_kl", "reverse_kl" or "jsd".
        needed: [B] bool, the sequences that need a divergence. If it is on the CPU, like ``token_indices``, nothing waits for
            the device. None: all.
        strengths: [B] fp32, how far the reference model's logit of the label is lowered in each sequence, or None.
        beta: weight of the reference model in the mixture of "jsd".
    """

    hidden: Tensor
    head: Head
    kind: str = "kl"
    needed: Tensor | None = None
    strengths: Tensor | None = None
    beta: float = 0.5


class RowValues(NamedTuple):
    """Values of each row that a call computes beside the log-probability of its label.

    Attributes:
        lse: whether the logsumexp of the logits is a value.
        mean: whether the mean of the logits is one too; only with ``lse``.
        class_weights: [V] in the dtype of results, a factor of each logit in that mean; None: 1.
        predict: whether the argmax is returned, without gradient.
    """

    lse: bool = False
    mean: bool = False
    class_weights: Tensor | None = None
    predict: bool = False


LOGPS = RowValues()


def needed_gradients(hidden: Tensor, head: Head) -> Needs:
    """Return which gradients to compute. Call it outside of autograd.Function, inside of which grad mode is always off."""
    enabled = torch.is_grad_enabled()
    return Needs(
        hidden=enabled and hidden.requires_grad,
        weight=enabled and head.weight.requires_grad,
        bias=enabled and head.bias is not None and head.bias.requires_grad,
    )


def check_head(
    hidden: Tensor, weight: Tensor | Head, bias: Tensor | None, options: LinearOptions
) -> tuple[Tensor, Head, ResolvedOptions]:
    """Check hidden states, head and options; return hidden states, `Head` and `ResolvedOptions`.

    If the weight is a DTensor, hidden states and head are returned as plain tensors: see `soul_kernels._head.shards`.
    """
    head = as_head(weight, bias)
    check_options(options)
    weight, bias, logit_scale, softcap, *_ = head
    sharded = is_dtensor(weight)
    if head.own_tokens and not sharded:
        remedy = "leave own_tokens out: a whole head needs no other process"
        raise argument_error("weight", "a head in shards with own_tokens", "a plain tensor", remedy)
    if not sharded:
        check_not_dtensor("hidden", hidden)
        check_not_dtensor("bias", bias)
    for name, tensor, dims in (("hidden", hidden, "[B, T, D] or [N, D]"), ("weight", weight, "[V, D]")):
        if tensor.dim() != dims.partition("]")[0].count(",") + 1:
            raise argument_error(name, dims, tuple(tensor.shape), "reshape it")
        check_gradient(name, tensor)
    _check_same_device("weight", weight, hidden)
    _check_same_device("bias", bias, hidden)
    if hidden.shape[-1] != weight.shape[1]:
        remedy = "pass the hidden states that go into this head"
        raise argument_error("weight", f"width {hidden.shape[-1]}, as hidden", weight.shape[1], remedy)
    if weight.shape[0] == 0:
        raise argument_error("weight", "a vocabulary", tuple(weight.shape), "pass a head with at least one row")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise argument_error("bias", f"shape ({weight.shape[0]},)", tuple(bias.shape), "one value a vocabulary entry")
    if not 0 < abs(logit_scale) < math.inf:
        raise argument_error("logit_scale", "a number other than 0", logit_scale, "1.0 leaves the logits as they are")
    if softcap is not None and not 0 < softcap < math.inf:
        raise argument_error("softcap", "a positive number or None", softcap, "None does not cap")
    resolved = _resolved(hidden, weight, options)
    if sharded:
        if not resolved.fused:
            expected = "'auto', 'triton' or 'torch' with a head in shards"
            remedy = "it computes whole rows of logits: choose one of these, or gather the head: weight.full_tensor()"
            raise argument_error("backend", expected, "'reference'", remedy)
        hidden, head = local_arguments(hidden, head)
    return hidden, head, resolved


def _resolved(hidden: Tensor, weight: Tensor, options: LinearOptions) -> ResolvedOptions:
    """Return the `ResolvedOptions` of a call with these options and tensors, under the autocast that is active."""
    device_type = hidden.device.type
    chunk_bytes = options.chunk_bytes
    if chunk_bytes is not None and not (isinstance(chunk_bytes, int) and chunk_bytes > 0):
        remedy = "None is a share of the memory of the device"
        raise argument_error("chunk_bytes", "a positive whole number", chunk_bytes, remedy)
    backend = resolve_head_backend(options.backend, hidden)
    autocast = not hidden.is_meta and torch.is_autocast_enabled(device_type)  # torch has no autocast for meta tensors
    if not autocast and hidden.dtype != weight.dtype:
        raise argument_error("weight", f"dtype {hidden.dtype}, as hidden", weight.dtype, "convert one, or use autocast")
    if backend == "triton" and hidden.dtype not in PARAM_DTYPES:
        names = ", ".join(str(dtype) for dtype in PARAM_DTYPES)
        raise argument_error("hidden", f"dtype {names}", hidden.dtype, "convert it, or pass backend='torch'")
    compute_dtype = torch.get_autocast_dtype(device_type) if autocast else hidden.dtype
    logits_dtype = options.logits_dtype
    if logits_dtype not in (torch.float32, compute_dtype):
        choices = f"torch.float32 or {compute_dtype}, in which hidden is multiplied"
        raise argument_error("logits_dtype", choices, logits_dtype, "torch.float32 is the accurate choice")
    if backend != "triton":
        logits_dtype = torch.promote_types(compute_dtype, torch.float32)
    return ResolvedOptions(compute_dtype, logits_dtype, chunk_bytes, backend)


def check_labels_type(hidden: Tensor, labels: Tensor, token_indices: Tensor | None) -> None:
    """Check shapes, dtypes and devices of labels [B, T] and token indices without reading any value."""
    if labels.shape != hidden.shape[:2]:
        got = tuple(labels.shape)
        raise argument_error(
            "labels", f"[B, T] {tuple(hidden.shape[:2])}", got, "shift the labels, do not cut the hidden states"
        )
    check_device("labels", labels, hidden)
    if labels.dtype != torch.int64:
        raise argument_error("labels", "dtype torch.int64", labels.dtype, "convert with labels.long()")
    check_indices_type(token_indices, hidden)


def check_labels(hidden: Tensor, head: Head, labels: Tensor, token_indices: Tensor | None, fused: bool) -> None:
    """Check labels [B, T] and token indices. Values of labels on a GPU are not read if there are token indices."""
    check_labels_type(hidden, labels, token_indices)
    check_indices(token_indices, labels != IGNORE_INDEX, hidden)
    if fused and token_indices is not None and hidden.is_cuda:
        return
    n_vocab = head.n_vocab
    bad = (labels != IGNORE_INDEX) & ((labels < 0) | (labels >= n_vocab))
    if bad.any():
        b, t = (int(i) for i in bad.nonzero()[0])
        got = f"{int(labels[b, t])} at [{b}, {t}]"
        remedy = "was the tokenizer resized without the model? Of a head in shards, pass the DTensor"
        raise argument_error("labels", f"values in [0, {n_vocab}) or {IGNORE_INDEX}", got, remedy)


def check_indices_type(token_indices: Tensor | None, hidden: Tensor) -> None:
    """Check shape, dtype and device of token indices without reading any value; None passes."""
    if token_indices is None:
        return
    if not isinstance(token_indices, Tensor):
        got = type(token_indices).__name__
        raise argument_error("token_indices", "[R] int64", got, "pass a tensor of flat token indices")
    if token_indices.dtype != torch.int64 or token_indices.dim() != 1:
        got = f"{tuple(token_indices.shape)} of {token_indices.dtype}"
        raise argument_error("token_indices", "[R] int64", got, "pass flat token indices")
    if token_indices.device.type != "cpu":
        check_device("token_indices", token_indices, hidden)


def check_indices(token_indices: Tensor | None, keep: Tensor, hidden: Tensor) -> None:
    """Check token indices. Their values, and whether they list all kept tokens [B, T], are checked on the CPU only."""
    check_indices_type(token_indices, hidden)
    if token_indices is None or token_indices.device.type != "cpu":
        return
    if token_indices.numel():
        last = token_indices[-1]
        rising = token_indices[: int((token_indices == last).nonzero()[0]) + 1]  # the last index may repeat: padding
        if token_indices[0] < 0 or last >= keep.numel() or (rising[1:] <= rising[:-1]).any():
            expected = f"rising indices in [0, {keep.numel()}), of which the last may repeat"
            got = f"{token_indices.min()} to {token_indices.max()}, in this order"
            raise argument_error("token_indices", expected, got, "sort them, drop repeats")
    if keep.device.type != "cpu":
        return
    n_listed = int(keep.reshape(-1)[token_indices].sum())
    n_kept = int(keep.sum())
    if n_listed != n_kept:
        remedy = "pass (labels.flatten() != -100).nonzero()[:, 0]"
        raise argument_error("token_indices", "every labelled token once", f"{n_listed} of {n_kept}", remedy)


def check_class_weights(class_weights: Tensor | None, head: Head, options: ResolvedOptions) -> Tensor | None:
    """Check class weights; return them in the dtype of results, without gradient."""
    if class_weights is None:
        return None
    check_device("class_weights", class_weights, head.weight)
    if class_weights.shape != (head.n_vocab,):
        got, remedy = tuple(class_weights.shape), "one value a vocabulary entry"
        raise argument_error("class_weights", f"shape ({head.n_vocab},)", got, remedy)
    return class_weights.detach().to(options.result_dtype).contiguous()


def check_reference(
    reference: Reference | None, hidden: Tensor, head: Head, kind: str, beta: float = 0.5
) -> Comparison:  # fmt: skip
    """Check that a reference model fits a model's hidden states and head; return the `Comparison` with it.

    With a head in shards it is as it was passed: see `local_comparison`.
    """
    check_choice("kind", kind, KINDS)
    if not (isinstance(beta, int | float) and 0 < beta < 1):
        remedy = "'kl' is the limit at 0, 'reverse_kl' that at 1, both divided by it"
        raise argument_error("beta", "a number between 0 and 1", beta, remedy)
    if reference is None:
        remedy = "pass Reference(hidden, weight, bias): see soul.reference_hidden"
        raise argument_error("reference", "the hidden states and the head of the reference model", None, remedy)
    if not isinstance(reference, Reference):
        remedy = "pass Reference(hidden, weight, bias)"
        raise argument_error("reference", "soul_kernels.Reference", type(reference).__name__, remedy)
    ref_hidden, ref_weight, ref_bias = reference
    if ref_weight is None:
        _check_head_is_frozen(head, ref_bias)
    if ref_hidden is None:
        remedy = "pass the hidden states of the reference model: soul.reference_hidden"
        raise argument_error("reference.hidden", "[B, T, D] hidden states of the reference model", None, remedy)
    if not ref_hidden.is_floating_point():
        remedy = "pass hidden states, not token ids"
        raise argument_error("reference.hidden", "a floating-point dtype", ref_hidden.dtype, remedy)
    if ref_hidden.dim() != 3 or ref_hidden.shape[:2] != hidden.shape[:2]:
        expected = f"[B, T, D] with [B, T] {tuple(hidden.shape[:2])}"
        remedy = "run the reference model on the same batch"
        raise argument_error("reference.hidden", expected, tuple(ref_hidden.shape), remedy)
    ref_head = reference.head_beside(head)
    expected_shape = (head.weight.shape[0] if ref_weight is None else head.n_vocab, ref_hidden.shape[-1])
    if ref_head.weight.shape != expected_shape:
        got, remedy = tuple(ref_head.weight.shape), "pass the reference model's own head"
        raise argument_error("reference.weight", f"shape {expected_shape}", got, remedy)
    if ref_bias is not None and ref_bias.shape != (head.n_vocab,):
        got, remedy = tuple(ref_bias.shape), "one value a vocabulary entry"
        raise argument_error("reference.bias", f"shape ({head.n_vocab},)", got, remedy)
    check = check_device if head.shard is None else _check_same_device
    for name, tensor in (("hidden", ref_hidden), ("weight", ref_head.weight), ("bias", ref_head.bias)):
        check(f"reference.{name}", tensor, hidden)
    return Comparison(ref_hidden, ref_head, kind, beta=float(beta))


def local_comparison(comparison: Comparison, reference: Reference | None, head: Head) -> Comparison:
    """Return a comparison with plain tensors, and of the reference model's head the rows that are here."""
    if head.shard is None or reference is None:
        return comparison
    reference = local_reference(reference, head.shard)
    return comparison._replace(hidden=reference.hidden, head=reference.head_beside(head))


def _check_head_is_frozen(head: Head, ref_bias: Tensor | None) -> None:
    """Raise if the reference model would use the model's own head while that head is trained, and so changes."""
    for name, tensor, replaced in (("weight", head.weight, False), ("bias", head.bias, ref_bias is not None)):
        if tensor is not None and tensor.requires_grad and not replaced:
            expected = f"the head of the reference model beside a {name} that is trained"
            raise argument_error(f"reference.{name}", expected, None, "pass a frozen copy")


def check_per_sequence(
    name: str, value: Tensor | None, hidden: Tensor, *, dtype: torch.dtype | None = None, on_cpu: bool = False
) -> None:
    """Raise unless ``value`` is None or has one entry per sequence, on the device of hidden or, with ``on_cpu``, the CPU."""
    if value is None:
        return
    if value.shape != hidden.shape[:1]:
        raise argument_error(name, f"shape ({hidden.shape[0]},)", tuple(value.shape), "pass one value a sequence")
    if dtype is not None and value.dtype != dtype:
        raise argument_error(name, f"dtype {dtype}", value.dtype, f"convert with {name}.to({dtype})")
    if not (on_cpu and value.device.type == "cpu"):
        check_device(name, value, hidden)


def check_device(name: str, tensor: Tensor | None, hidden: Tensor) -> None:
    """Raise unless a tensor is None, or a plain tensor on the device of hidden."""
    check_not_dtensor(name, tensor)
    _check_same_device(name, tensor, hidden)


def _check_same_device(name: str, tensor: Tensor | None, hidden: Tensor) -> None:
    """Raise unless a tensor is None, or on the device of hidden."""
    if tensor is not None and tensor.device != hidden.device:
        raise argument_error(name, f"device {hidden.device}, as hidden", tensor.device, "move it there")


def check_not_dtensor(name: str, tensor: Tensor | None) -> None:
    """Raise for a DTensor: this process may hold only a shard of it. None passes."""
    if is_dtensor(tensor):
        remedy = f"gather it: {name}.full_tensor() returns the whole tensor, and autograd goes through it"
        raise argument_error(name, "a plain tensor", f"a DTensor with placements {tensor.placements}", remedy)  # type: ignore[union-attr]

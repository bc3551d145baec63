"""Arguments of the ops on hidden states and a head: checked, and put together."""

import math

import torch

from soul_kernels.backends import resolve_head_backend
from soul_kernels.chunks import CHUNK_BYTES, CPU_CHUNK_BYTES, Options
from soul_kernels.errors import argument_error, check_choice
from soul_kernels.reference.kl_divergence import KINDS
from soul_kernels.tensors import PARAM_DTYPES, check_gradient
from soul_kernels.tokens import IGNORE_INDEX, Head, Reference


def wanted(hidden, weight, bias):
    """Which gradients to form: decided before autograd.Function, inside of which grad mode is always off."""
    on = torch.is_grad_enabled()
    named = (("hidden", hidden), ("weight", weight), ("bias", bias))
    return {name: on and tensor is not None and tensor.requires_grad for name, tensor in named}


def check_head(hidden, weight, bias, logit_scale, softcap, logits_dtype, chunk_bytes, backend):
    """Check hidden states and head; return the `Head` and the `Options`."""
    check_whole("hidden", hidden)
    for name, tensor, dims in (("hidden", hidden, "[B, T, D]"), ("weight", weight, "[V, D]")):
        if tensor.dim() != dims.count(",") + 1:
            raise argument_error(name, dims, tuple(tensor.shape), "reshape it")
        check_gradient(name, tensor)
    for name, tensor in (("weight", weight), ("bias", bias)):
        check_device(name, tensor, hidden)
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
    if chunk_bytes is None:
        chunk_bytes = CPU_CHUNK_BYTES if hidden.device.type == "cpu" else CHUNK_BYTES
    if not (isinstance(chunk_bytes, int) and chunk_bytes > 0):
        remedy = f"the default is {CHUNK_BYTES} bytes, on a CPU {CPU_CHUNK_BYTES}"
        raise argument_error("chunk_bytes", "a positive whole number", chunk_bytes, remedy)
    backend = resolve_head_backend(backend, hidden)
    device_type = hidden.device.type
    autocast = not hidden.is_meta and torch.is_autocast_enabled(device_type)  # torch knows no autocast of meta tensors
    if not autocast and hidden.dtype != weight.dtype:
        raise argument_error("weight", f"dtype {hidden.dtype}, as hidden", weight.dtype, "convert one, or use autocast")
    if backend == "triton" and hidden.dtype not in PARAM_DTYPES:
        names = ", ".join(str(dtype) for dtype in PARAM_DTYPES)
        raise argument_error("hidden", f"dtype {names}", hidden.dtype, "convert it, or pass backend='torch'")
    compute_dtype = torch.get_autocast_dtype(device_type) if autocast else hidden.dtype
    if logits_dtype not in (torch.float32, compute_dtype):
        choices = f"torch.float32 or {compute_dtype}, in which hidden is multiplied"
        raise argument_error("logits_dtype", choices, logits_dtype, "torch.float32 is the accurate choice")
    if backend != "triton":
        logits_dtype = torch.promote_types(compute_dtype, torch.float32)
    return Head(weight, bias, logit_scale, softcap), Options(compute_dtype, logits_dtype, chunk_bytes, backend)


def check_labels_type(hidden, labels, rows):
    """Check what is known of labels [B, T] and row indices without reading them."""
    if labels.shape != hidden.shape[:2]:
        got = tuple(labels.shape)
        raise argument_error(
            "labels", f"[B, T] {tuple(hidden.shape[:2])}", got, "shift the labels, do not cut the hidden states"
        )
    check_device("labels", labels, hidden)
    if labels.dtype != torch.int64:
        raise argument_error("labels", "dtype torch.int64", labels.dtype, "convert with labels.long()")
    check_rows_type(rows, hidden)


def check_labels(hidden, weight, labels, rows, fused):
    """Checks labels [B, T] and row indices, and reads them where that waits for no device."""
    check_labels_type(hidden, labels, rows)
    check_rows(rows, labels != IGNORE_INDEX, hidden)
    if not (fused and rows is not None and hidden.is_cuda):
        bad = (labels != IGNORE_INDEX) & ((labels < 0) | (labels >= weight.shape[0]))
        if bad.any():
            b, t = (int(i) for i in bad.nonzero()[0])
            expected = f"values in [0, {weight.shape[0]}) or {IGNORE_INDEX}"
            got = f"{int(labels[b, t])} at [{b}, {t}]"
            raise argument_error("labels", expected, got, "was the tokenizer resized without the model?")


def check_rows_type(rows: torch.Tensor | None, hidden: torch.Tensor) -> None:
    """Check what is known of row indices without reading them; None passes."""
    if rows is None:
        return
    if not isinstance(rows, torch.Tensor):
        raise argument_error("rows", "[R] int64", type(rows).__name__, "pass a tensor of flat token indices")
    if rows.dtype != torch.int64 or rows.dim() != 1:
        raise argument_error("rows", "[R] int64", f"{tuple(rows.shape)} of {rows.dtype}", "pass flat token indices")
    if rows.device.type != "cpu":
        check_device("rows", rows, hidden)


def check_rows(rows, keep, hidden):
    """Checks row indices; against the kept tokens [B, T] where that waits for no device."""
    check_rows_type(rows, hidden)
    if rows is None or rows.device.type != "cpu":
        return
    if rows.numel():
        rising = rows[: int((rows == rows[-1]).nonzero()[0]) + 1]  # the last index may repeat: padding
        if rows[0] < 0 or rows[-1] >= keep.numel() or (rising[1:] <= rising[:-1]).any():
            expected = f"rising indices in [0, {keep.numel()}), of which the last may repeat"
            raise argument_error("rows", expected, f"{rows.min()} to {rows.max()}, in this order", "sort them, drop repeats")
    if keep.device.type != "cpu":
        return
    found, kept = int(keep.reshape(-1)[rows].sum()), int(keep.sum())
    if found != kept:
        remedy = "pass (labels.flatten() != -100).nonzero()[:, 0]"
        raise argument_error("rows", "every labelled token once", f"{found} of {kept}", remedy)


def check_own_head(weight, bias, ref_weight, ref_bias):
    """Raises where a reference is to use the model's own head, and that is trained: it moves away from the reference's."""
    if ref_weight is None:
        for name, tensor, given in (("weight", weight, None), ("bias", bias, ref_bias)):
            if tensor is not None and tensor.requires_grad and given is None:
                expected, remedy = f"the head of the reference beside a {name} that is trained", "pass a frozen copy"
                raise argument_error(f"ref_{name}", expected, None, remedy)


def check_reference(hidden, head, ref_hidden, ref_weight, ref_bias, kind, needed=None, strengths=None):
    """Checks a reference's hidden states and head; returns the `Reference`."""
    check_choice("kind", kind, KINDS)
    if ref_hidden is None:
        remedy = "pass the hidden states of the reference model: soul.reference_hidden"
        raise argument_error("ref_hidden", "[B, T, D] hidden states of the reference", None, remedy)
    if not ref_hidden.is_floating_point():
        raise argument_error("ref_hidden", "a floating-point dtype", ref_hidden.dtype, "pass hidden states, not token ids")
    if ref_hidden.dim() != 3 or ref_hidden.shape[:2] != hidden.shape[:2]:
        expected = f"[B, T, D] with [B, T] {tuple(hidden.shape[:2])}"
        raise argument_error("ref_hidden", expected, tuple(ref_hidden.shape), "run the reference on the same batch")
    if ref_weight is None:
        ref_weight, ref_bias = head.weight, head.bias if ref_bias is None else ref_bias
    if ref_weight.shape != (head.weight.shape[0], ref_hidden.shape[-1]):
        expected = (head.weight.shape[0], ref_hidden.shape[-1])
        raise argument_error("ref_weight", f"shape {expected}", tuple(ref_weight.shape), "pass the reference's own head")
    if ref_bias is not None and ref_bias.shape != ref_weight.shape[:1]:
        expected = f"shape ({ref_weight.shape[0]},)"
        raise argument_error("ref_bias", expected, tuple(ref_bias.shape), "one value a vocabulary entry")
    for name, tensor in (("ref_hidden", ref_hidden), ("ref_weight", ref_weight), ("ref_bias", ref_bias)):
        check_device(name, tensor, hidden)
    return Reference(ref_hidden, ref_weight, ref_bias, needed, kind, strengths)


def check_per_sequence(name, value, hidden, *, dtype=None, on_cpu=False):
    """Raises unless ``value`` has one entry a sequence, where hidden is (or, with ``on_cpu``, on the CPU); None passes."""
    if value is None:
        return
    if value.shape != hidden.shape[:1]:
        raise argument_error(name, f"shape ({hidden.shape[0]},)", tuple(value.shape), "pass one value a sequence")
    if dtype is not None and value.dtype != dtype:
        raise argument_error(name, f"dtype {dtype}", value.dtype, f"convert with {name}.to({dtype})")
    if not (on_cpu and value.device.type == "cpu"):
        check_device(name, value, hidden)


def check_device(name, tensor, hidden):
    """Raises unless a tensor is where hidden is, all of it; None passes."""
    check_whole(name, tensor)
    if tensor is not None and tensor.device != hidden.device:
        raise argument_error(name, f"device {hidden.device}, as hidden", tensor.device, "move it there")


def check_whole(name: str, tensor: torch.Tensor | None) -> None:
    """Raise for a DTensor, of which this process may hold a shard only; None passes."""
    if hasattr(tensor, "device_mesh"):  # found without importing torch.distributed.tensor
        remedy = f"gather it: {name}.full_tensor() returns the whole tensor, and autograd goes through it"
        raise argument_error(name, "a plain tensor", f"a DTensor with placements {tensor.placements}", remedy)

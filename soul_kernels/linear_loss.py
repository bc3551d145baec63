"""hidden @ weight.T -> per-token log-probabilities -> any objective, without an [N, V] tensor that outlives its chunk.

Only kept tokens (label != -100) take part. A chunk of their rows is multiplied by the head into fp32 logits (cuBLAS), read
once for statistics, and overwritten by its gradient, which feeds the two gradient GEMMs at once. GEMM work in units of
2 N V D: 3 for a trained head, 2 for a frozen one, 1 without gradients; one more where the coefficients of a row can be
known only after all chunks have been seen.
"""

import copy

import torch
from torch.autograd.function import once_differentiable

from soul_kernels._checks import PARAM_DTYPES, argument_error, check_choice, check_gradient
from soul_kernels._head_rows import HeadGradients, HeadRows
from soul_kernels._launch import resolve_backend
from soul_kernels.reference import linear_loss as _reference
from soul_kernels.reference.linear_loss import TokenBatch
from soul_kernels.reference.token_logprob import IGNORE_INDEX

CHUNK_BYTES = 2**30  # scratch for one chunk: fp32 logits and their gradient in the dtype of the inputs


def _sweep(rows, objective, batch, needs):
    """Runs the objective over all chunks; returns the loss and the gradients (None if none is wanted)."""
    gradients = HeadGradients(rows, **needs) if any(needs.values()) else None
    additive = getattr(objective, "additive", None)
    check_choice("objective.additive", additive, (None, "tokens", "sequences"))
    chunks = rows.even_chunks()
    if gradients is None or len(chunks) == 0 or (len(chunks) > 1 and additive is None):
        return _two_sweeps(rows, objective, batch, chunks, gradients)
    if len(chunks) > 1 and additive == "sequences":
        sequence_chunks = rows.sequence_chunks()
        if sequence_chunks is None:
            return _two_sweeps(rows, objective, batch, chunks, gradients)
        chunks = sequence_chunks
    loss = torch.zeros((), dtype=torch.float32, device=rows.x.device)
    for chunk in chunks:
        start, stop, first, last = chunk
        logits = rows.logits(chunk)
        rows.measure(chunk, logits)
        part = batch.sequences(first, last)
        if len(chunks) > 1 and additive == "tokens":  # sequences are cut: leave the tokens of other chunks out
            part = part.tokens(rows.scatter(torch.ones_like(rows.labels[start:stop]), start, stop).bool())
        value, derivative = _differentiate(objective, rows.log_probs(start, stop)[first:last], part)
        loss += value
        coefficients = torch.zeros(rows.shape, dtype=torch.float32, device=logits.device)
        coefficients[first:last] = derivative
        gradients.add(chunk, logits, rows.gather(coefficients, start, stop))
    return loss, gradients


def _two_sweeps(rows, objective, batch, chunks, gradients):
    """All log-probabilities first, then, where gradients are wanted, the logits once more."""
    for chunk in chunks:
        rows.measure(chunk, rows.logits(chunk))
    loss, coefficients = _differentiate(objective, rows.log_probs(), batch)
    if gradients is not None:
        _add_gradients(rows, gradients, chunks, rows.gather(coefficients))
    return loss, gradients


def _add_gradients(rows, gradients, chunks, coefficients):
    """Computes the logits of measured chunks again and adds up the gradients for given coefficients [R]."""
    for chunk in chunks:
        gradients.add(chunk, rows.logits(chunk), coefficients[chunk.start : chunk.stop])


def _differentiate(objective, logps, batch):
    """Value of the objective and its derivative by every log-probability, from the objective's own code."""
    with torch.enable_grad():
        leaf = logps.detach().requires_grad_()
        value = objective(leaf, batch)
        _check_scalar(value)
        derivative = None
        if value.requires_grad:  # not if the objective looks at nothing here
            (derivative,) = torch.autograd.grad(value, leaf, allow_unused=True)
    return value.detach().float(), torch.zeros_like(leaf) if derivative is None else derivative


def _scaled(gradient, scale, dtype):
    """fp32 ``gradient * scale`` rounded once to ``dtype``; out of place, so that a graph can be walked twice."""
    return torch.mul(gradient, scale, out=torch.empty_like(gradient, dtype=dtype))


def _to_hidden(indices, x_gradient, shape):
    """Gradient of the kept rows -> gradient of hidden [B, T, D], zeros at ignored tokens."""
    full = x_gradient.new_zeros((shape[0] * shape[1], shape[2]))
    return full.index_copy_(0, indices, x_gradient).view(shape)


class _LinearObjective(torch.autograd.Function):
    """Loss and gradients in one forward sweep; backward only scales."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, rows, objective, batch, needs):
        with torch.autocast(hidden.device.type, enabled=False):
            loss, gradients = _sweep(rows, objective, batch, needs)
        if gradients is not None:  # saved, not kept on ctx: freed as soon as backward has used them
            ctx.save_for_backward(rows.indices, gradients.x, gradients.weight, gradients.bias)
        ctx.hidden_shape, ctx.hidden_dtype, ctx.weight_dtype = hidden.shape, hidden.dtype, weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        logps = rows.log_probs()
        ctx.mark_non_differentiable(logps)
        return loss, logps

    @staticmethod
    @once_differentiable
    def backward(ctx, scale, _):
        indices, x, weight, bias = ctx.saved_tensors
        hidden = None
        if x is not None:
            hidden = _to_hidden(indices, _scaled(x, scale, ctx.hidden_dtype), ctx.hidden_shape)
        weight = None if weight is None else _scaled(weight, scale, ctx.weight_dtype)
        bias = None if bias is None else _scaled(bias, scale, ctx.bias_dtype)
        return hidden, weight, bias, None, None, None, None


class _LinearLogprob(torch.autograd.Function):
    """Per-token log-probabilities. Frozen head: the gradient rows are formed in forward, unscaled, and multiplied in
    backward (2 GEMMs). Trained head: dW needs the coefficients first, so backward computes the logits again (4 GEMMs).
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, rows, needs):
        ctx.hidden_shape, ctx.hidden_dtype, ctx.weight_dtype = hidden.shape, hidden.dtype, weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.needs = needs
        ctx.head_frozen = not (needs["weight"] or needs["bias"])
        gradients = HeadGradients(rows, **needs) if needs["hidden"] and ctx.head_frozen else None
        with torch.autocast(hidden.device.type, enabled=False):
            for chunk in rows.even_chunks():
                logits = rows.logits(chunk)
                rows.measure(chunk, logits)
                if gradients is not None:
                    ones = torch.ones(len(logits), dtype=torch.float32, device=logits.device)
                    gradients.add(chunk, logits, ones)
        rows.free_scratch()
        if ctx.head_frozen:
            ctx.save_for_backward(rows.indices, None if gradients is None else gradients.x)
            return rows.log_probs()
        logps = rows.log_probs()
        # The tensors are saved, not kept on ctx: freed after backward, and a change of the weight in place is noticed.
        ctx.save_for_backward(rows.x, rows.weight, rows.bias, rows.statistics)
        rows.x = rows.weight = rows.bias = rows.statistics = None
        ctx.rows = rows
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogps):
        coefficients = dlogps.float()
        if ctx.head_frozen:
            indices, x = ctx.saved_tensors
            x = x * coefficients.reshape(-1).index_select(0, indices)[:, None]
            return _to_hidden(indices, x.to(ctx.hidden_dtype), ctx.hidden_shape), None, None, None, None
        rows = copy.copy(ctx.rows)
        rows.x, rows.weight, rows.bias, rows.statistics = ctx.saved_tensors
        gradients = HeadGradients(rows, **ctx.needs)
        with torch.autocast(dlogps.device.type, enabled=False):
            _add_gradients(rows, gradients, rows.even_chunks(), rows.gather(coefficients))
        hidden = None
        if gradients.x is not None:
            hidden = _to_hidden(rows.indices, gradients.x.to(ctx.hidden_dtype), ctx.hidden_shape)
        weight = None if gradients.weight is None else gradients.weight.to(ctx.weight_dtype)
        bias = None if gradients.bias is None else gradients.bias.to(ctx.bias_dtype)
        return hidden, weight, bias, None, None


def linear_logprob(hidden, weight, labels, *, bias=None, rows=None, chunk_bytes=CHUNK_BYTES, backend="auto"):
    """Log-probability of every label under the language-model head, differentiable::

        log_softmax((hidden @ weight.T + bias).float(), -1).gather(-1, labels[..., None])[..., 0]   # 0 where labels == -100

    The logits are fp32, whatever the dtype of the inputs, and exist one chunk at a time.

    Args:
        hidden: [B, T, D] fp32, bf16 or fp16, final hidden states. Under autocast they are converted, and so is the weight.
        weight: [V, D], the same dtype.
        labels: [B, T] int64, already shifted: ``labels[b, t]`` is predicted from ``hidden[b, t]``; -100 is ignored.
        bias: [V] or None.
        rows: [R] int64, rising flat indices ``b * T + t`` of the tokens to compute: every token that carries a label, and any
            ignored ones; the last index may repeat if its token is ignored, to pad R to a fixed size. Given as a CPU tensor
            they spare a wait for the device. None: found from the labels. The reference checks them and needs none.
        chunk_bytes: scratch memory for one chunk, in bytes.
        backend: "auto" (Triton on a GPU and under the interpreter, else the reference), "triton" or "reference".

    Returns:
        [B, T] fp32 (fp64 for fp64 inputs of the reference).

    Raises:
        ValueError: an argument does not fit, or a label lies outside the vocabulary. With ``rows`` on a GPU labels are not
            checked, to spare the wait; the log-probability of such a label is NaN.
    """
    fused, compute_dtype = _check(hidden, weight, labels, bias, rows, backend)
    if not fused:
        return _reference.linear_logprob(hidden.to(compute_dtype), weight.to(compute_dtype), labels, bias=bias)
    table = HeadRows(hidden, weight, bias, labels, rows, compute_dtype, chunk_bytes)
    return _LinearLogprob.apply(hidden, weight, bias, table, _needs(hidden, weight, bias))


def linear_objective(
    hidden,
    weight,
    labels,
    objective,
    *,
    bias=None,
    is_forget=None,
    ref_logps=None,
    rows=None,
    return_logps=False,
    chunk_bytes=CHUNK_BYTES,
    backend="auto",
):
    """An objective of the per-token log-probabilities; its gradients are formed in the forward sweep::

        objective(linear_logprob(hidden, weight, labels, bias=bias), TokenBatch.from_labels(labels, is_forget, ref_logps))

    Args:
        hidden: [B, T, D] fp32, bf16 or fp16, final hidden states. Under autocast they are converted, and so is the weight.
        weight: [V, D], the same dtype.
        labels: [B, T] int64, already shifted: ``labels[b, t]`` is predicted from ``hidden[b, t]``; -100 is ignored.
        objective: callable ``(logps [B, T] fp32, TokenBatch) -> [] loss``, differentiated by autograd. Its attribute
            ``additive`` says over what it is a plain sum: "tokens", "sequences", or None (the default: unknown). Where it
            is a sum over sequences, one sweep does; else a batch of several chunks takes a second one.
        bias: [V] or None.
        is_forget: [B] bool; None: every sequence is to be forgotten.
        ref_logps: [B] fp32, summed reference log-probability of each sequence, where the objective needs it.
        rows: as in `linear_logprob`.
        return_logps: also return the log-probabilities, [B, T] fp32, detached.
        chunk_bytes: scratch memory for one chunk, in bytes.
        backend: "auto" (Triton on a GPU and under the interpreter, else the reference), "triton" or "reference".

    Returns:
        The loss, [] fp32; with ``return_logps`` the pair of loss and log-probabilities. If every label is ignored the loss
        is the objective of nothing (0 for those of ``soul.losses``), with zero gradients, attached to the graph.

    Raises:
        ValueError: as `linear_logprob`.
    """
    fused, compute_dtype = _check(hidden, weight, labels, bias, rows, backend)
    for name, value in (("is_forget", is_forget), ("ref_logps", ref_logps)):
        if value is not None and value.shape != labels.shape[:1]:
            remedy = "pass one value a sequence"
            raise argument_error(name, f"shape ({labels.shape[0]},)", tuple(value.shape), remedy)
        _check_device(name, value, hidden)
    if is_forget is not None and is_forget.dtype != torch.bool:
        raise argument_error("is_forget", "dtype torch.bool", is_forget.dtype, "convert with is_forget.bool()")
    if not fused:
        loss, logps = _reference.linear_objective(
            hidden.to(compute_dtype), weight.to(compute_dtype), labels, objective, bias=bias, is_forget=is_forget,
            ref_logps=ref_logps,
        )  # fmt: skip
        _check_scalar(loss)
    else:
        table = HeadRows(hidden, weight, bias, labels, rows, compute_dtype, chunk_bytes)
        batch = TokenBatch.from_labels(labels, is_forget, ref_logps)
        needs = _needs(hidden, weight, bias)
        loss, logps = _LinearObjective.apply(hidden, weight, bias, table, objective, batch, needs)
    return (loss, logps) if return_logps else loss


def _needs(hidden, weight, bias):
    """Which gradients to form: decided here, because inside an autograd.Function grad mode is always off."""
    on = torch.is_grad_enabled()
    named = (("hidden", hidden), ("weight", weight), ("bias", bias))
    return {name: on and tensor is not None and tensor.requires_grad for name, tensor in named}


def _check(hidden, weight, labels, bias, rows, backend):
    """Checks the arguments of both ops; returns whether to take the kernels, and the dtype of the GEMMs."""
    for name, tensor, dims in (
        ("hidden", hidden, "[B, T, D]"),
        ("weight", weight, "[V, D]"),
        ("labels", labels, "[B, T]"),
    ):
        if tensor.dim() != dims.count(",") + 1:
            raise argument_error(name, dims, tuple(tensor.shape), "reshape it")
        check_gradient(name, tensor)
        _check_device(name, tensor, hidden)
    _check_device("bias", bias, hidden)
    if hidden.shape[-1] != weight.shape[1]:
        remedy = "pass the hidden states that go into this head"
        raise argument_error("weight", f"width {hidden.shape[-1]}, as hidden", weight.shape[1], remedy)
    if labels.shape != hidden.shape[:2]:
        remedy = "shift the labels, do not cut the hidden states"
        raise argument_error("labels", f"shape {tuple(hidden.shape[:2])}", tuple(labels.shape), remedy)
    if labels.dtype != torch.int64:
        raise argument_error("labels", "dtype torch.int64", labels.dtype, "convert with labels.long()")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise argument_error("bias", f"shape ({weight.shape[0]},)", tuple(bias.shape), "one value a vocabulary entry")
    if rows is not None and rows.device.type == "cpu":
        _check_rows(rows, labels)
    elif rows is not None:
        _check_device("rows", rows, hidden)
        _check_rows_type(rows)
    fused = resolve_backend(backend, hidden) == "triton"
    device_type = hidden.device.type
    autocast = torch.is_autocast_enabled(device_type)
    if not autocast and hidden.dtype != weight.dtype:
        raise argument_error("weight", f"dtype {hidden.dtype}, as hidden", weight.dtype, "convert one, or use autocast")
    if fused and hidden.dtype not in PARAM_DTYPES:
        names = ", ".join(str(dtype) for dtype in PARAM_DTYPES)
        raise argument_error("hidden", f"dtype {names}", hidden.dtype, "convert it, or pass backend='reference'")
    if not (fused and rows is not None and hidden.is_cuda):
        bad = (labels != IGNORE_INDEX) & ((labels < 0) | (labels >= weight.shape[0]))
        if bad.any():
            b, t = (int(i) for i in bad.nonzero()[0])
            expected = f"values in [0, {weight.shape[0]}) or {IGNORE_INDEX}"
            got = f"{int(labels[b, t])} at [{b}, {t}]"
            raise argument_error("labels", expected, got, "was the tokenizer resized without the model?")
    return fused, torch.get_autocast_dtype(device_type) if autocast else hidden.dtype


def _check_scalar(loss):
    if loss.dim() != 0:
        raise argument_error("objective", "a loss of shape ()", f"shape {tuple(loss.shape)}", "sum over tokens and sequences")


def _check_device(name, tensor, hidden):
    if tensor is not None and tensor.device != hidden.device:
        raise argument_error(name, f"device {hidden.device}, as hidden", tensor.device, "move it there")


def _check_rows_type(rows):
    if rows.dtype != torch.int64 or rows.dim() != 1:
        raise argument_error("rows", "[R] int64", f"{tuple(rows.shape)} of {rows.dtype}", "pass flat token indices")


def _check_rows(rows, labels):
    """Checks row indices that are on the CPU; against the labels where these are on the CPU as well."""
    _check_rows_type(rows)
    if rows.numel() == 0:
        found = labels.new_empty(0)
    else:
        rising = rows[: int((rows == rows[-1]).nonzero()[0]) + 1]  # the last index may repeat: padding
        if rows[0] < 0 or rows[-1] >= labels.numel() or (rising[1:] <= rising[:-1]).any():
            expected = f"rising indices in [0, {labels.numel()}), of which the last may repeat"
            raise argument_error("rows", expected, f"{rows.min()} to {rows.max()}, in this order", "sort them, drop repeats")
        found = labels.reshape(-1)[rows.to(labels.device)] if labels.device.type == "cpu" else None
    if found is None:
        return
    kept = int((labels != IGNORE_INDEX).sum())
    if int((found != IGNORE_INDEX).sum()) != kept:
        got = f"{int((found != IGNORE_INDEX).sum())} of {kept}"
        raise argument_error("rows", "every labelled token once", got, "pass (labels.flatten() != -100).nonzero()[:, 0]")


__all__ = ["TokenBatch", "linear_logprob", "linear_objective"]

"""hidden @ weight.T -> per-token log-probabilities -> any objective, without an [N, V] tensor that outlives its chunk.

Only kept tokens (label != -100) take part. A chunk of their rows is multiplied by the head into fp32 logits (cuBLAS), read
once for statistics, and overwritten by its gradient, which feeds the two gradient GEMMs at once. GEMM work in units of
2 N V D: 3 for a trained head, 2 for a frozen one, 1 without gradients; one more where the coefficients of a row can be
known only after all chunks have been seen.
"""

import torch
from torch.autograd.function import once_differentiable

from soul_kernels._checks import PARAM_DTYPES, argument_error, check_gradient
from soul_kernels._launch import resolve_backend
from soul_kernels.reference import linear_loss as _reference
from soul_kernels.reference.linear_loss import TokenBatch
from soul_kernels.reference.token_logprob import IGNORE_INDEX
from soul_kernels.token_logprob import token_gradient, token_statistics

CHUNK_BYTES = 2**30  # scratch for one chunk: fp32 logits and their gradient in the dtype of the inputs
ROW_ALIGNMENT = 64  # elements; odd vocabularies (50257) would lose 16-byte accesses and the fast GEMMs
LOGP = 0  # row of the statistics
# Since torch 2.10 addmm takes an fp32 summand beside low-precision factors (pytorch/pytorch#167931).
ADDMM_TAKES_FP32 = torch.__version__ >= (2, 10)


# --- GEMMs with fp32 results from inputs of any dtype ---------------------------------------------------------------------


def _mm_fp32(a, b, out):
    """``out = a @ b`` with fp32 accumulation and fp32 output."""
    if a.dtype == torch.float32:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    else:
        torch.mm(a.float(), b.float(), out=out)


def _accumulate_fp32(total, a, b, first):
    """``total = a @ b`` for the first chunk, ``total += a @ b`` after it; fp32 all the way."""
    if first:
        _mm_fp32(a, b, total)
    elif a.dtype == torch.float32:
        total.addmm_(a, b)
    elif a.is_cuda and ADDMM_TAKES_FP32:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    elif a.is_cuda:
        total += torch.mm(a, b, out_dtype=torch.float32)
    else:
        total.addmm_(a.float(), b.float())


# --- rows and chunks ------------------------------------------------------------------------------------------------------


class _Rows:
    """The kept tokens of one call, and the work on a chunk of them."""

    def __init__(self, hidden, weight, bias, labels, rows, compute_dtype, chunk_bytes):
        device = hidden.device
        self.shape = labels.shape
        self.host_rows = rows if rows is not None and rows.device.type == "cpu" else None
        if rows is None:  # waits for the device; a collator that passes `rows` spares that
            rows = (labels.reshape(-1) != IGNORE_INDEX).nonzero()[:, 0]
        elif rows.device != device:
            rows = rows.pin_memory() if device.type == "cuda" else rows
            rows = rows.to(device, non_blocking=True)
        self.rows = rows
        self.labels = labels.reshape(-1).index_select(0, rows)
        self.x = hidden.detach().reshape(-1, hidden.shape[-1]).index_select(0, rows).to(compute_dtype)
        self.weight = weight.detach().to(compute_dtype)
        self.bias = None if bias is None else bias.detach().float()
        self.n = len(rows)
        self.n_vocab = weight.shape[0]
        self.row_width = -(-self.n_vocab // ROW_ALIGNMENT) * ROW_ALIGNMENT
        row_bytes = self.row_width * (4 if compute_dtype == torch.float32 else 4 + compute_dtype.itemsize)
        limit = max(1, chunk_bytes // row_bytes)
        self.limit = limit // 128 * 128 or limit  # tile height of the GEMMs
        self.statistics = torch.empty(0)
        self._logits = self._gradient = None

    def even_chunks(self):
        """Cuts the rows into equal chunks within the budget: (start, stop) pairs."""
        count = -(-self.n // self.limit)
        size = -(-self.n // max(count, 1))
        size = min(-(-size // 128) * 128, self.limit)
        return [(start, min(start + size, self.n)) for start in range(0, self.n, size)] if self.n else []

    def sequence_chunks(self):
        """Cuts the rows between sequences: (start, stop, first sequence, last sequence + 1), or None if one is too long."""
        rows = self.host_rows if self.host_rows is not None else self.rows.cpu()
        counts = torch.bincount(rows // max(self.shape[1], 1), minlength=self.shape[0]).tolist()
        chunks, start, stop, first = [], 0, 0, 0
        for sequence, count in enumerate(counts):
            if count > self.limit:
                return None
            if stop + count - start > self.limit:
                chunks.append((start, stop, first, sequence))
                start, first = stop, sequence
            stop += count
        return [*chunks, (start, stop, first, len(counts))]

    def logits(self, start, stop):
        """fp32 logits of rows ``start`` to ``stop``, in scratch memory that the next chunk overwrites."""
        if self._logits is None:
            self._logits = self.x.new_empty((min(self.limit, self.n), self.row_width), dtype=torch.float32)
        logits = self._logits[: stop - start, : self.n_vocab]
        _mm_fp32(self.x[start:stop], self.weight.T, logits)
        return logits if self.bias is None else logits.add_(self.bias)

    def log_probs(self, logits, start, stop):
        """Statistics of one chunk of logits, and its log-probabilities put into their places: [B, T] fp32, 0 elsewhere."""
        self.statistics = torch.empty((4, stop - start), dtype=torch.float32, device=logits.device)
        token_statistics(logits, self.labels[start:stop], self.statistics)
        return self.scatter(self.statistics[LOGP], start, stop)

    def scatter(self, values, start, stop):
        """Puts the values of rows ``start`` to ``stop`` into a [B, T] tensor, 0 elsewhere."""
        dense = torch.zeros(self.shape, dtype=values.dtype, device=values.device)
        dense.view(-1).index_copy_(0, self.rows[start:stop], values)
        return dense

    def gather(self, dense, start, stop):
        """The values of rows ``start`` to ``stop`` in a [B, T] tensor."""
        return dense.reshape(-1).index_select(0, self.rows[start:stop])

    def gradient(self, logits, coefficients, start, stop):
        """Gradient by the logits, in the dtype of the GEMMs; overwrites ``logits`` where that is fp32."""
        if self.x.dtype == torch.float32:
            out = logits
        else:
            if self._gradient is None:
                self._gradient = torch.empty(self._logits.shape, dtype=self.x.dtype, device=logits.device)
            out = self._gradient[: stop - start, : self.n_vocab]
        token_gradient(logits, self.labels[start:stop], self.statistics, coefficients, out)
        return out

    def free_scratch(self):
        """Gives the scratch memory of the chunks back; it is made anew when needed."""
        self._logits = self._gradient = None


class _Gradients:
    """Sums what the chunks contribute to the gradients that are wanted."""

    def __init__(self, rows, hidden, weight, bias):
        x = rows.x
        self.rows = rows
        new = torch.empty if rows.n else torch.zeros  # the first chunk overwrites
        self.x = torch.empty_like(x) if hidden else None
        self.weight = new(rows.weight.shape, dtype=torch.float32, device=x.device) if weight else None
        self.bias = torch.zeros(rows.n_vocab, dtype=torch.float32, device=x.device) if bias else None

    def add(self, dlogits, start, stop):
        """Takes in the gradient by the logits of rows ``start`` to ``stop``."""
        if self.x is not None:
            torch.mm(dlogits, self.rows.weight, out=self.x[start:stop])
        if self.weight is not None:
            _accumulate_fp32(self.weight, dlogits.T, self.rows.x[start:stop], first=start == 0)
        if self.bias is not None:
            self.bias += dlogits.sum(0, dtype=torch.float32)


def _scaled(gradient, scale, dtype):
    """``gradient * scale`` rounded once to ``dtype``; out of place, so that a graph can be walked twice."""
    out = torch.empty_like(gradient, dtype=dtype)
    return torch.mul(gradient, scale, out=out)


def _to_hidden(rows, x_gradient, shape, dtype):
    """Gradient of the kept rows -> gradient of hidden [B, T, D], zeros at ignored tokens."""
    full = torch.zeros((shape[0] * shape[1], shape[2]), dtype=dtype, device=x_gradient.device)
    return full.index_copy_(0, rows, x_gradient.to(dtype)).view(shape)


# --- autograd -------------------------------------------------------------------------------------------------------------


class _LinearObjective(torch.autograd.Function):
    """Loss and gradients in one forward sweep; backward only scales."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, rows, objective, batch, needs):
        with torch.autocast(hidden.device.type, enabled=False):
            loss, logps, gradients = _sweep(rows, objective, batch, needs)
        if gradients is not None:  # saved, not kept on ctx: freed as soon as backward has used them
            ctx.save_for_backward(rows.rows, gradients.x, gradients.weight, gradients.bias)
        ctx.hidden_shape, ctx.hidden_dtype, ctx.weight_dtype = hidden.shape, hidden.dtype, weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.mark_non_differentiable(logps)
        return loss, logps

    @staticmethod
    @once_differentiable
    def backward(ctx, scale, _):
        rows, x, weight, bias = ctx.saved_tensors
        hidden = None
        if x is not None:
            hidden = _to_hidden(rows, _scaled(x, scale, x.dtype), ctx.hidden_shape, ctx.hidden_dtype)
        weight = None if weight is None else _scaled(weight, scale, ctx.weight_dtype)
        bias = None if bias is None else _scaled(bias, scale, ctx.bias_dtype)
        return hidden, weight, bias, None, None, None, None


def _coefficients(objective, logps, batch):
    """Value of the objective and its derivative by every log-probability, from the objective's own code."""
    with torch.enable_grad():
        leaf = logps.detach().requires_grad_()
        value = objective(leaf, batch)
        if not value.requires_grad:  # the objective looks at nothing here, for instance at no forget sequence
            return value.float(), torch.zeros_like(leaf)
        (derivative,) = torch.autograd.grad(value, leaf, allow_unused=True)
    return value.detach().float(), torch.zeros_like(leaf) if derivative is None else derivative


def _sweep(rows, objective, batch, needs):
    """Runs the objective over all chunks; returns loss, log-probabilities [B, T], and the gradients (or None)."""
    gradients = _Gradients(rows, **needs) if any(needs.values()) else None
    logps = torch.zeros(rows.shape, dtype=torch.float32, device=rows.x.device)
    additive = getattr(objective, "additive", None)
    chunks = [(start, stop, 0, rows.shape[0]) for start, stop in rows.even_chunks()]
    one_pass = len(chunks) <= 1 or additive == "tokens"
    if gradients is not None and not one_pass and additive == "sequences":
        sequence_chunks = rows.sequence_chunks()
        if sequence_chunks is not None:
            chunks, one_pass = sequence_chunks, True

    if gradients is None or not one_pass:  # log-probabilities of all rows before anything else
        for start, stop, _, _ in chunks:
            logps += rows.log_probs(rows.logits(start, stop), start, stop)
        loss, coefficients = _coefficients(objective, logps, batch)
        if gradients is not None:
            for start, stop, _, _ in chunks:
                logits = rows.logits(start, stop)
                rows.log_probs(logits, start, stop)
                gradients.add(rows.gradient(logits, rows.gather(coefficients, start, stop), start, stop), start, stop)
        return loss, logps, gradients

    if not chunks:
        loss, _ = _coefficients(objective, logps, batch)
        return loss, logps, gradients
    loss = torch.zeros((), dtype=torch.float32, device=logps.device)
    for start, stop, first, last in chunks:
        logits = rows.logits(start, stop)
        chunk_logps = rows.log_probs(logits, start, stop)
        logps += chunk_logps
        part = batch.sequences(first, last)
        if len(chunks) > 1 and additive == "tokens":
            part = part.tokens(rows.scatter(torch.ones_like(rows.statistics[LOGP]), start, stop).bool())
        value, derivative = _coefficients(objective, chunk_logps[first:last], part)
        loss += value
        coefficients = torch.zeros_like(chunk_logps)
        coefficients[first:last] = derivative
        gradients.add(rows.gradient(logits, rows.gather(coefficients, start, stop), start, stop), start, stop)
    return loss, logps, gradients


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
        gradients = _Gradients(rows, **needs) if needs["hidden"] and ctx.head_frozen else None
        logps = torch.zeros(rows.shape, dtype=torch.float32, device=rows.x.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for start, stop in rows.even_chunks():
                logits = rows.logits(start, stop)
                logps += rows.log_probs(logits, start, stop)
                if gradients is not None:
                    ones = torch.ones_like(rows.statistics[LOGP])
                    gradients.add(rows.gradient(logits, ones, start, stop), start, stop)
        rows.free_scratch()
        if ctx.head_frozen:
            ctx.save_for_backward(rows.rows, None if gradients is None else gradients.x)
        else:
            ctx.table = rows
            ctx.save_for_backward(weight, bias)  # read through ctx.table; saved so that a change in place is noticed
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogps):
        if ctx.head_frozen:
            rows, x = ctx.saved_tensors
            coefficients = dlogps.float().reshape(-1).index_select(0, rows)
            x_gradient = _to_hidden(rows, x * coefficients[:, None], ctx.hidden_shape, ctx.hidden_dtype)
            return x_gradient, None, None, None, None
        _ = ctx.saved_tensors
        table = ctx.table
        coefficients = table.gather(dlogps.float(), 0, table.n)
        gradients = _Gradients(table, **ctx.needs)
        with torch.autocast(dlogps.device.type, enabled=False):
            for start, stop in table.even_chunks():
                logits = table.logits(start, stop)
                table.log_probs(logits, start, stop)
                gradients.add(table.gradient(logits, coefficients[start:stop], start, stop), start, stop)
        table.free_scratch()
        hidden = None
        if gradients.x is not None:
            hidden = _to_hidden(table.rows, gradients.x, ctx.hidden_shape, ctx.hidden_dtype)
        weight = None if gradients.weight is None else gradients.weight.to(ctx.weight_dtype)
        bias = None if gradients.bias is None else gradients.bias.to(ctx.bias_dtype)
        return hidden, weight, bias, None, None


# --- public ---------------------------------------------------------------------------------------------------------------


def linear_logprob(hidden, weight, labels, *, bias=None, rows=None, chunk_bytes=CHUNK_BYTES, backend="auto"):
    """Log-probability of every label under the language-model head, differentiable::

        log_softmax((hidden @ weight.T + bias).float(), -1).gather(-1, labels[..., None])[..., 0]   # 0 where labels == -100

    The logits are fp32, whatever the dtype of the inputs, and exist one chunk at a time.

    Args:
        hidden: [B, T, D] fp32, bf16 or fp16, final hidden states. Under autocast they are converted, and so is the weight.
        weight: [V, D], the same dtype.
        labels: [B, T] int64, already shifted: ``labels[b, t]`` is predicted from ``hidden[b, t]``; -100 is ignored.
        bias: [V] or None.
        rows: [R] int64, ascending flat indices ``b * T + t`` of the tokens to compute; all that carry a label must be among
            them, and ignored ones may be (to pad R to a fixed size). Known on the host (a CPU tensor), they spare a wait for
            the device. None: found from the labels. Ignored by the reference.
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
        return _reference.linear_logprob(hidden, weight, labels, bias=bias)
    table = _Rows(hidden, weight, bias, labels, rows, compute_dtype, chunk_bytes)
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
    if not fused:
        loss, logps = _reference.linear_objective(
            hidden, weight, labels, objective, bias=bias, is_forget=is_forget, ref_logps=ref_logps
        )
    else:
        table = _Rows(hidden, weight, bias, labels, rows, compute_dtype, chunk_bytes)
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
        if tensor.device != hidden.device:
            raise argument_error(name, f"device {hidden.device}, as hidden", tensor.device, "move it there")
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
        _check_rows(rows, labels.numel())
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


def _check_rows(rows, n_tokens):
    if rows.dtype != torch.int64 or rows.dim() != 1:
        raise argument_error("rows", "[R] int64", f"{tuple(rows.shape)} of {rows.dtype}", "pass flat token indices")
    if rows.numel() and (rows[0] < 0 or rows[-1] >= n_tokens or (rows[1:] < rows[:-1]).any()):
        expected = f"ascending indices in [0, {n_tokens})"
        raise argument_error("rows", expected, f"{rows.min()} to {rows.max()}, in this order", "sort them")


__all__ = ["TokenBatch", "linear_logprob", "linear_objective"]

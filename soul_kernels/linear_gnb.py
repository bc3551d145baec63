"""Cross-entropy with labels drawn from the model, in the sweep that forms its gradients."""

import functools

import torch
from torch import Tensor

from soul_kernels._head import custom_ops
from soul_kernels._head.autograd import Swept
from soul_kernels._head.checks import check_device, check_head, check_rows, check_rows_type, wanted
from soul_kernels._head.gradients import HeadGradients
from soul_kernels._head.rows import DrawnRows
from soul_kernels.chunks import Options
from soul_kernels.errors import argument_error
from soul_kernels.reference import linear_gnb as _reference
from soul_kernels.reference.token_logprob import LOGP
from soul_kernels.tokens import IGNORE_INDEX, Head


def linear_gnb(
    hidden, weight, keep, *, uniforms=None, generator=None, bias=None, logit_scale=1.0, softcap=None, rows=None,
    logits_dtype=torch.float32, chunk_bytes=None, backend="auto",
):  # fmt: skip
    """The loss whose squared gradient is the Gauss-Newton-Bartlett estimate of Sophia (Liu et al. 2023, algorithm 2)::

        logits = (hidden @ weight.T + bias).float()
        labels = (logits.softmax(-1).cumsum(-1) > uniforms[..., None]).long().argmax(-1)    # drawn from the model itself
        cross_entropy(logits[keep], labels[keep])

    Each label is drawn by inverse CDF from one uniform number, while its row's gradient is formed. The uniforms belong to
    positions in the batch, so the labels do not depend on how it is cut into chunks.

    Args:
        hidden: [B, T, D] fp32, bf16 or fp16, final hidden states. Under autocast they are converted, and so is the weight.
        weight: [V, D], the same dtype.
        keep: [B, T] bool, the tokens that count: those that have a label in the loss whose curvature is wanted.
        uniforms: [B, T] fp32 in [0, 1), read where ``keep`` is true. None: from ``generator``.
        generator: ``torch.Generator`` on the device of hidden. Give every rank and step its own seed: see
            `soul.curvature.GNB.generator`. None: torch's default one.
        bias: [V] or None.
        logit_scale: as in `linear_logprob`.
        softcap: as in `linear_logprob`.
        rows: as in `linear_logprob`: every token that is kept.
        logits_dtype: as in `linear_logprob`.
        chunk_bytes: as in `linear_logprob`.
        backend: as in `linear_logprob`.

    Returns:
        The mean negative log-likelihood of the drawn labels, [] fp32, differentiable; and the labels, [B, T] int64, -100 where
        nothing is kept.

    Raises:
        ValueError: an argument does not fit.
    """
    head, options = check_head(hidden, weight, bias, logit_scale, softcap, logits_dtype, chunk_bytes, backend)
    for name, value, dtype in (("keep", keep, torch.bool), ("uniforms", uniforms, torch.float32)):
        if value is None:
            continue
        check_device(name, value, hidden)
        if value.dtype != dtype or value.shape != hidden.shape[:2]:
            got = f"{tuple(value.shape)} of {value.dtype}"
            raise argument_error(name, f"{tuple(hidden.shape[:2])} of {dtype}", got, "pass one value a token")
    if uniforms is None:
        uniforms = torch.rand(keep.shape, dtype=torch.float32, device=hidden.device, generator=generator)
    check_rows_type(rows, hidden)
    call = dict(rows=rows, options=options, needs=wanted(hidden, weight, bias))
    if custom_ops.is_opaque(options, hidden, weight, keep):
        return custom_ops.gnb(hidden, head, keep, uniforms, **call)
    if not options.fused:
        return reference_gnb(hidden, head, keep, uniforms, rows=rows, options=options)
    return Swept.apply(hidden, weight, bias, functools.partial(sweep, hidden, head, keep, uniforms, **call))[:2]


def reference_gnb(
    hidden: Tensor, head: Head, keep: Tensor, uniforms: Tensor, *, rows: Tensor | None, options: Options
) -> tuple[Tensor, Tensor]:
    """What `linear_gnb` returns, of the reference."""
    check_rows(rows, keep, hidden)
    hidden, weight = (t.to(options.compute_dtype) for t in (hidden, head.weight))
    return _reference.linear_gnb(hidden, weight, keep, uniforms, bias=head.bias, **head.transform())


def sweep(hidden, head, keep, uniforms, *, rows, options, needs):
    """Loss, (labels,), rows and gradients: what `Swept` runs."""
    check_rows(rows, keep, hidden)
    rows = DrawnRows(hidden, head, keep, rows, options, uniforms)
    gradients = HeadGradients(rows, **needs) if any(needs.values()) else None
    share = 1 / keep.sum().clamp(min=1).to(options.result_dtype)
    for chunk in rows.even_chunks():
        rows.load(chunk)
        rows.measure(chunk)
        coefficients = (-share).expand(chunk.stop - chunk.start).contiguous()
        if gradients is None:
            rows.gradient(chunk, coefficients)  # for its labels
        else:
            gradients.add(chunk, coefficients)
    loss = -(rows.statistics[LOGP].sum() * share)
    labels = torch.full(rows.shape, IGNORE_INDEX, device=keep.device)
    labels.view(-1).index_copy_(0, rows.indices, rows.labels)
    return loss, (labels,), rows, gradients

"""Cross-entropy with labels drawn from the model: labels, loss and gradients in one sweep."""

import functools

import torch
from torch import Tensor

from soul_kernels._head import custom_ops
from soul_kernels._head.autograd import Swept
from soul_kernels._head.checks import check_device, check_head, check_indices_type, needed_gradients
from soul_kernels._head.flat import takes_flat
from soul_kernels._head.rounds import with_one_scale
from soul_kernels._head.shards import from_first
from soul_kernels._head.sweeps import reference_gnb, sweep_gnb
from soul_kernels.chunks import DEFAULT_OPTIONS, LinearOptions
from soul_kernels.errors import argument_error
from soul_kernels.tokens import Head


@takes_flat
def linear_gnb(
    hidden: Tensor, weight: Tensor | Head, keep: Tensor, *, uniforms: Tensor | None = None,
    generator: torch.Generator | None = None, bias: Tensor | None = None, n_tokens: Tensor | float | None = None,
    options: LinearOptions = DEFAULT_OPTIONS,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the loss for the Gauss-Newton-Bartlett estimate of Sophia, which is its squared gradient, and the drawn labels::

        logits = (hidden @ weight.T + bias).float()
        labels = (logits.softmax(-1).cumsum(-1) > uniforms[..., None]).long().argmax(-1)    # drawn from the model itself
        cross_entropy(logits[keep], labels[keep])

    Each label is drawn by inverse CDF from one uniform number, while its row's gradient is formed. The uniforms belong to
    positions in the batch, so the labels do not depend on how it is cut into chunks. Source: Liu et al. 2023, algorithm 2.

    Args:
        hidden: [B, T, D] or [N, D], fp32, bf16 or fp16, final hidden states. Under autocast they are converted, and so is the
            weight.
        weight: [V, D], the same dtype; or a `Head`, which has bias, scale and cap as well. It may be a DTensor as in
            `soul_kernels.linear_logprob`: the labels are those of one process, up to the rounding of sums of probabilities.
        keep: [B, T] or [N] bool, the tokens that take part. To estimate the curvature of a loss, pass the tokens with a label
            in it.
        uniforms: [B, T] or [N] fp32 in [0, 1), read where ``keep`` is true. None: from ``generator``.
        generator: ``torch.Generator`` on the device of hidden. Give every rank and step its own seed: see
            `soul.curvature.GNB.generator`. None: torch's default one. Of the processes that share a head in shards, the first
            one's numbers are used, unless each has tokens of its own.
        bias: [V] or None, beside a weight that is a tensor.
        n_tokens: the number of tokens, [] or a number, that the sum of the negative log-likelihoods is divided by: those of all
            batches of a mean over several. None: the number of kept tokens of this one.
        options: see `LinearOptions`; its ``token_indices`` list every token where ``keep`` is true.

    Returns:
        The mean negative log-likelihood of the drawn labels, [] fp32, differentiable; and the labels, [B, T] or [N] int64, -100
        where ``keep`` is false.

    Raises:
        ArgumentError: an argument does not fit.
    """
    hidden, head, resolved = check_head(hidden, weight, bias, options)
    for name, value, dtype in (("keep", keep, torch.bool), ("uniforms", uniforms, torch.float32)):
        if value is None:
            continue
        check_device(name, value, hidden)
        if value.dtype != dtype or value.shape != hidden.shape[:2]:
            got = f"{tuple(value.shape)} of {value.dtype}"
            raise argument_error(name, f"{tuple(hidden.shape[:2])} of {dtype}", got, "pass one value a token")
    if uniforms is None:
        uniforms = torch.rand(keep.shape, dtype=torch.float32, device=hidden.device, generator=generator)
        if head.shard is not None and not head.shard.own_tokens:
            from_first(head.shard, uniforms)
    token_indices = options.token_indices
    check_indices_type(token_indices, hidden)
    needs = needed_gradients(hidden, head)
    is_opaque = custom_ops.is_opaque(resolved, hidden, head.weight, keep)
    if resolved.fused and not is_opaque:
        sweep = functools.partial(sweep_gnb, hidden, head, keep, uniforms, token_indices, resolved, needs, n_tokens)
        loss, labels, _ = Swept.apply(hidden, head.weight, head.bias, sweep)
        return with_one_scale(loss, head), labels
    if is_opaque:
        loss, labels = custom_ops.gnb(hidden, head, keep, uniforms, token_indices, resolved, needs)
    else:
        loss, labels = reference_gnb(hidden, head, keep, uniforms, token_indices, resolved)
    return loss if n_tokens is None else loss * (keep.sum() / n_tokens), labels

"""Cross-entropy from hidden states and a head, with the options that users of fused losses expect.

A loss that is reduced to one number is one sweep, which forms its gradients (`_head.sweeps.sweep_cross_entropy`): 3 products of
N V D for a trained head. With the reduction "none", or with the logsumexp as a differentiable result, the op returns values of
each token, for any function on top of them, and backward computes the logits again: 4 products. No kernel knows the formula of
the loss: it is in `soul_kernels.reference.linear_cross_entropy.Formula`, as a function of log-probability, logsumexp and mean
logit of each token.
"""

import functools
from typing import Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from soul_kernels._head import custom_ops
from soul_kernels._head.autograd import PerToken, Swept
from soul_kernels._head.checks import (
    RowValues,
    check_class_weights,
    check_head,
    check_labels,
    check_labels_type,
    needed_gradients,
)
from soul_kernels._head.flat import takes_flat
from soul_kernels._head.rounds import with_one_scale
from soul_kernels._head.rows import HeadRows
from soul_kernels._head.sweeps import (
    CrossEntropyCall,
    reference_cross_entropy,
    reference_per_token,
    sweep_cross_entropy,
)
from soul_kernels.chunks import DEFAULT_OPTIONS, LinearOptions, ResolvedOptions
from soul_kernels.errors import argument_error, check_choice, check_range
from soul_kernels.reference.linear_cross_entropy import Formula
from soul_kernels.tokens import IGNORE_INDEX, Head

REDUCTIONS = ("mean", "sum", "none")


class Predictions(NamedTuple):
    """Labels that a model predicts, without gradient.

    Attributes:
        ids: [B, T] int64, the vocabulary entry with the largest logit (the first among equals), -100 at ignored tokens.
        accuracy: [] fp32, the share of the labelled tokens whose label is predicted; 0 if there are none.
    """

    ids: Tensor
    accuracy: Tensor


@overload
def linear_cross_entropy(
    hidden: Tensor, weight: Tensor | Head, labels: Tensor, *, bias: Tensor | None = None, class_weights: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX, label_smoothing: float = 0.0, z_loss: float = 0.0, reduction: str = "mean",
    shift: bool | int = 0, return_lse: Literal[False] = False, return_predictions: Literal[False] = False,
    options: LinearOptions = DEFAULT_OPTIONS,
) -> Tensor: ...  # fmt: skip


@overload
def linear_cross_entropy(
    hidden: Tensor, weight: Tensor | Head, labels: Tensor, *, bias: Tensor | None = None, class_weights: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX, label_smoothing: float = 0.0, z_loss: float = 0.0, reduction: str = "mean",
    shift: bool | int = 0, return_lse: Literal[True], return_predictions: Literal[False] = False,
    options: LinearOptions = DEFAULT_OPTIONS,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@overload
def linear_cross_entropy(
    hidden: Tensor, weight: Tensor | Head, labels: Tensor, *, bias: Tensor | None = None, class_weights: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX, label_smoothing: float = 0.0, z_loss: float = 0.0, reduction: str = "mean",
    shift: bool | int = 0, return_lse: Literal[False] = False, return_predictions: Literal[True],
    options: LinearOptions = DEFAULT_OPTIONS,
) -> tuple[Tensor, Predictions]: ...  # fmt: skip


@overload
def linear_cross_entropy(
    hidden: Tensor, weight: Tensor | Head, labels: Tensor, *, bias: Tensor | None = None, class_weights: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX, label_smoothing: float = 0.0, z_loss: float = 0.0, reduction: str = "mean",
    shift: bool | int = 0, return_lse: Literal[True], return_predictions: Literal[True],
    options: LinearOptions = DEFAULT_OPTIONS,
) -> tuple[Tensor, Tensor, Predictions]: ...  # fmt: skip


@takes_flat
def linear_cross_entropy(
    hidden: Tensor, weight: Tensor | Head, labels: Tensor, *, bias: Tensor | None = None, class_weights: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX, label_smoothing: float = 0.0, z_loss: float = 0.0, reduction: str = "mean",
    shift: bool | int = 0, return_lse: bool = False, return_predictions: bool = False,
    options: LinearOptions = DEFAULT_OPTIONS,
) -> Tensor | tuple[Tensor | Predictions, ...]:  # fmt: skip
    """Return the cross-entropy of the labels, and on request logsumexp and predictions, without keeping the logits::

        logits = (hidden @ weight.T + bias).float()
        lse = logits.logsumexp(-1)
        F.cross_entropy(logits, labels, class_weights, reduction=..., label_smoothing=...) + z_loss * lse.square().mean()

    Logits, loss and sums of gradients are fp32, whatever the dtype of the inputs.

    Args:
        hidden: [B, T, D] or [N, D], fp32, bf16 or fp16 (without kernels also fp64), final hidden states. Under autocast they
            are converted, and so is the weight.
        weight: [V, D], the same dtype; or a `Head`, which has bias, scale and cap as well.
        labels: [B, T] or [N] int64; ``labels[b, t]`` is predicted from ``hidden[b, t]`` unless ``shift`` says otherwise.
        bias: [V] or None, beside a weight that is a tensor.
        class_weights: [V] or None, as ``weight`` of ``torch.nn.functional.cross_entropy``: a mean is then divided by the sum of
            the labels' weights. They get no gradient.
        ignore_index: tokens with this label take no part; any other label must lie in the vocabulary.
        label_smoothing: in [0, 1], as torch's: the target is spread evenly over the vocabulary to this extent. It takes a
            second read of the logits.
        z_loss: factor of the squared logsumexp, which is added for each token without class weight, and with the reduction
            "mean" divided by the number of tokens. Liger's ``lse_square_scale``.
        reduction: "mean", "sum", or "none": the loss of each token.
        shift: by how many positions labels are still to be shifted; True is 1. ``labels[b, t + shift]`` is then predicted from
            ``hidden[b, t]``, which is the token that results and token indices refer to.
        return_lse: also return the logsumexp of each token, differentiable. Backward then computes the logits again; a z-loss
            alone does not need that: see ``z_loss``.
        return_predictions: also return `Predictions`, which takes one more read of the logits.
        options: token indices, dtype of the logits, scratch memory, backend: see `LinearOptions`.

    Returns:
        The loss, [] fp32 (fp64 for fp64 inputs); with the reduction "none" [B, T] or [N], 0 at ignored tokens. Then, if asked
        for, the logsumexp (the same shape and dtype, 0 at ignored tokens), then the `Predictions`. If all labels are ignored,
        or the weights of a mean add up to 0, the cross-entropy is 0 with zero gradients, where torch's is NaN.

    Raises:
        ArgumentError: as `soul_kernels.linear_logprob`.
    """
    hidden, head, resolved = check_head(hidden, weight, bias, options)
    _check_options(label_smoothing, z_loss, reduction)
    class_weights = check_class_weights(class_weights, head, resolved)
    check_labels_type(hidden, labels, options.token_indices)
    labels = _as_predicted(labels, ignore_index, shift)
    smoothed = label_smoothing > 0.0
    call = CrossEntropyCall(
        labels, options.token_indices, class_weights, float(label_smoothing), float(z_loss), reduction, return_predictions
    )
    if reduction == "none" or return_lse:
        row_values = RowValues(True, smoothed, class_weights if smoothed else None, return_predictions)
        values, ids = _token_values(hidden, head, call, row_values, resolved)
        logps, *others = values.unbind()
        formula = Formula.of(labels, class_weights, call.label_smoothing, call.z_loss, reduction)
        loss = formula.losses(labels, logps, *others).to(resolved.result_dtype)
        if reduction != "none":
            loss = loss.sum()
        lse = others[0]
    else:
        loss, ids = _reduced(hidden, head, call, resolved)
    results: list[Tensor | Predictions] = [loss]
    if return_lse:
        results.append(lse)
    if return_predictions:
        count = (labels != IGNORE_INDEX).sum().clamp(min=1)
        hits = ((ids == labels) & (labels != IGNORE_INDEX)).sum()
        results.append(Predictions(ids, hits / count))
    return tuple(results) if len(results) > 1 else results[0]


def _check_options(label_smoothing: float, z_loss: float, reduction: str) -> None:
    """Check the options that are numbers or names."""
    check_choice("reduction", reduction, REDUCTIONS)
    check_range("z_loss", z_loss)
    check_range("label_smoothing", label_smoothing)
    if label_smoothing > 1:
        raise argument_error("label_smoothing", "a number in [0, 1]", label_smoothing, "0.0 does not smooth")


def _as_predicted(labels: Tensor, ignore_index: int, shift: bool | int) -> Tensor:
    """Return labels [B, T] at the positions from which they are predicted, with -100 for those that are ignored."""
    length = labels.shape[1]
    if isinstance(shift, bool):
        shift = int(shift)
    if not isinstance(shift, int) or not 0 <= shift < max(length, 1):
        raise argument_error("shift", f"a whole number in [0, {max(length, 1)})", shift, "0 takes the labels as they are")
    if ignore_index != IGNORE_INDEX:  # -100 is no exception then: like any other label it must lie in the vocabulary
        ignored = labels == ignore_index
        labels = torch.where(labels == IGNORE_INDEX, -1, labels).masked_fill(ignored, IGNORE_INDEX)
    return F.pad(labels[:, shift:], (0, shift), value=IGNORE_INDEX) if shift else labels


def _token_values(
    hidden: Tensor, head: Head, call: CrossEntropyCall, row_values: RowValues, options: ResolvedOptions
) -> tuple[Tensor, Tensor]:
    """Return log-probabilities, logsumexps and on request mean logits of the tokens, [K, B, T]; and the predictions."""
    labels = call.labels
    if custom_ops.is_opaque(options, hidden, head.weight, labels):
        return custom_ops.per_token(hidden, head, labels, call.token_indices, options, None, row_values)
    if not options.fused:
        return reference_per_token(hidden, head, labels, call.token_indices, options, None, row_values)
    check_labels(hidden, head, labels, call.token_indices, fused=True)
    head_rows = HeadRows(hidden, head, labels, call.token_indices, options, row_values=row_values)
    values, predictions, _ = PerToken.apply(hidden, head.weight, head.bias, head_rows, needed_gradients(hidden, head))
    return values, predictions


def _reduced(hidden: Tensor, head: Head, call: CrossEntropyCall, options: ResolvedOptions) -> tuple[Tensor, Tensor]:
    """Return the loss [] and the predictions."""
    needs = needed_gradients(hidden, head)
    if custom_ops.is_opaque(options, hidden, head.weight, call.labels):
        return custom_ops.cross_entropy(hidden, head, call, options, needs)
    if not options.fused:
        return reference_cross_entropy(hidden, head, call, options)
    sweep = functools.partial(sweep_cross_entropy, hidden, head, call, options, needs)
    loss, predictions, _ = Swept.apply(hidden, head.weight, head.bias, sweep)
    return with_one_scale(loss, head), predictions

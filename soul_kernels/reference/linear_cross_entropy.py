"""Cross-entropy from hidden states, as a function of three values of each token's logits.

The values are the log-probability of the label, the logsumexp, and the mean logit. Class weights, label smoothing and z-loss
are written out in `Formula.losses` only: the sweep over chunks takes its coefficients from it by autograd.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from soul_kernels.reference.linear_loss import head_logits, scatter
from soul_kernels.reference.token_logprob import mean_logit, token_logprob
from soul_kernels.tokens import IGNORE_INDEX, Head, as_head


class Formula(NamedTuple):
    """A cross-entropy of tokens, in terms of the values of their logits.

    Attributes:
        class_weights: [V] or None, which stands for ones.
        label_smoothing: share of the target that is spread evenly over the vocabulary.
        z_loss: factor of the squared logsumexp.
        weight_share: factor of each token's cross-entropy: with the reduction "mean" 1 / the sum of the labels' class weights.
        token_share: factor of each token's z-loss: with the reduction "mean" 1 / the number of tokens.
    """

    class_weights: Tensor | None
    label_smoothing: float
    z_loss: float
    weight_share: Tensor | float
    token_share: Tensor | float

    @classmethod
    def of(
        cls, labels: Tensor, class_weights: Tensor | None, label_smoothing: float, z_loss: float, reduction: str
    ) -> "Formula":  # fmt: skip
        """Return the formula for labels [B, T]; where the weights of a mean add up to 0, the mean is 0."""
        if reduction != "mean":
            return cls(class_weights, label_smoothing, z_loss, 1.0, 1.0)
        keep = labels != IGNORE_INDEX
        count = keep.sum().double()
        total = count if class_weights is None else (_at(class_weights.double(), labels) * keep).sum()
        weight_share, token_share = (torch.where(n == 0, 0.0, 1 / n) for n in (total, count))
        return cls(class_weights, label_smoothing, z_loss, weight_share, token_share)

    @property
    def needs_mean(self) -> bool:
        """Whether the loss depends on the mean logits."""
        return self.label_smoothing > 0.0

    def losses(self, labels: Tensor, logps: Tensor, lse: Tensor | None = None, means: Tensor | None = None) -> Tensor:
        """Return the loss of each token, 0 where all values are 0, as they are at ignored tokens.

        Args:
            labels: [...] int64.
            logps: [...], log-probabilities of the labels.
            lse: [...], logsumexp of the logits; it may be missing without label smoothing and z-loss.
            means: [...], mean of each token's logits times class weights; it may be missing without label smoothing.
        """
        losses = -logps if self.class_weights is None else -logps * _at(self.class_weights, labels)
        if self.needs_mean:
            assert lse is not None and means is not None, "label smoothing needs all values"
            mean_weight = 1.0 if self.class_weights is None else self.class_weights.mean()
            losses = (1 - self.label_smoothing) * losses + self.label_smoothing * (mean_weight * lse - means)
        losses = self.weight_share * losses
        if self.z_loss != 0.0:
            assert lse is not None, "z-loss needs the logsumexp"
            losses = losses + self.token_share * self.z_loss * lse**2
        return losses


def _at(class_weights: Tensor, labels: Tensor) -> Tensor:
    """Return the class weight of each label, and that of any class for labels outside of the vocabulary."""
    return class_weights[labels.clamp(0, len(class_weights) - 1)]


def token_values(
    hidden: Tensor, weight: Tensor | Head, labels: Tensor, class_weights: Tensor | None = None
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Return the three values of every token, [B, T] each, differentiable and 0 at ignored tokens; and the predictions.

    The predictions are the labels with the largest logits, [B, T] int64, -100 at ignored tokens.
    """
    keep = labels != IGNORE_INDEX
    logits = head_logits(hidden[keep], as_head(weight))
    values = (token_logprob(logits, labels[keep]), logits.logsumexp(1), mean_logit(logits, class_weights))
    predictions = torch.full_like(labels, IGNORE_INDEX).masked_scatter(keep, logits.argmax(1))
    logps, lse, means = (scatter(keep, value) for value in values)
    return (logps, lse, means), predictions


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor | Head, labels: Tensor, *, bias: Tensor | None = None, class_weights: Tensor | None = None,
    label_smoothing: float = 0.0, z_loss: float = 0.0, reduction: str = "mean",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``soul_kernels.linear_cross_entropy`` in plain PyTorch, with the logits of all kept tokens in memory at once.

    Returns:
        The loss, [] or with the reduction "none" [B, T]; the logsumexp and the predictions, [B, T].
    """
    values, predictions = token_values(hidden, as_head(weight, bias), labels, class_weights)
    losses = Formula.of(labels, class_weights, label_smoothing, z_loss, reduction).losses(labels, *values)
    return losses if reduction == "none" else losses.sum(), values[1], predictions

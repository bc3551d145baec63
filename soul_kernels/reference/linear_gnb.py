"""Cross-entropy with labels drawn from the model itself: the Gauss-Newton-Bartlett estimate of Sophia."""

import torch
from torch import Tensor

from soul_kernels.reference.linear_loss import head_logits
from soul_kernels.reference.token_draw import draw_labels
from soul_kernels.reference.token_logprob import token_logprob
from soul_kernels.tokens import IGNORE_INDEX, Head, as_head


def linear_gnb(
    hidden: Tensor, weight: Tensor | Head, keep: Tensor, uniforms: Tensor, *, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``soul_kernels.linear_gnb`` in plain PyTorch.

    Returns:
        The loss [] and the labels [B, T] int64, -100 where ``keep`` is false.
    """
    logits = head_logits(hidden[keep], as_head(weight, bias))
    drawn = draw_labels(logits, uniforms[keep])
    labels = torch.full(keep.shape, IGNORE_INDEX, device=keep.device).masked_scatter(keep, drawn)
    return -token_logprob(logits, drawn).sum() / keep.sum().clamp(min=1), labels

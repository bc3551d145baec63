"""Draw of a label from each row of logits."""

import torch
from torch import Tensor


def draw_labels(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Draw a label from each row by inverse CDF.

    The label is the first v with ``p_0 + ... + p_v > u`` and ``p_v > 0``, where p = softmax(logits). If rounding leaves no such
    v, it is the last v with ``p_v > 0``.

    Args:
        logits: [n, V] floating point.
        uniforms: [n], in [0, 1).

    Returns:
        [n] int64.
    """
    p = logits.detach().softmax(1)
    passed = (p.cumsum(1) > uniforms.to(p.dtype)[:, None]) & (p > 0)
    last = (p > 0).long() * torch.arange(p.shape[1], device=p.device)
    return torch.where(passed.any(1), passed.long().argmax(1), last.argmax(1))

"""Divergence of each token from a reference model, from hidden states."""

from torch import Tensor

from soul_kernels.reference.linear_loss import linear_divergence
from soul_kernels.tokens import Head, Reference, as_head


def linear_kl(
    hidden: Tensor, weight: Tensor | Head, labels: Tensor, reference: Reference, *, bias: Tensor | None = None,
    kind: str = "kl", strengths: Tensor | None = None, beta: float = 0.5,
) -> Tensor:  # fmt: skip
    """``soul_kernels.linear_kl`` in plain PyTorch: [B, T], 0 at ignored tokens."""
    head = as_head(weight, bias)
    return linear_divergence(hidden, head, labels, reference, kind=kind, strengths=strengths, beta=beta)[0]

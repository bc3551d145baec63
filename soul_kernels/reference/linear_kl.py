"""Divergence of each token from a reference model, from hidden states."""

from soul_kernels.reference.linear_loss import linear_divergence


def linear_kl(hidden, weight, labels, ref_hidden, **options):
    """``soul_kernels.linear_kl`` in plain PyTorch: [B, T], 0 at ignored tokens."""
    return linear_divergence(hidden, weight, labels, ref_hidden, **options)[0]

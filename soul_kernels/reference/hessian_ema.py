"""The moving average of squared gradients that stands for the diagonal of the Hessian."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from soul_kernels.reference._blocks import blocks
from soul_kernels.reference.rounding import load_block, noise_key, noise_words, scalar, store_block


class Numbers(NamedTuple):
    """What all elements of a call share: fp32 tensors of shape ()."""

    beta2: torch.Tensor
    weight: torch.Tensor  # (1 - beta2) scale, formed in double precision


def ema(h, products, beta2, weight):
    """``beta2 h + weight products``; ``weight`` is ``(1 - beta2) scale``."""
    return beta2 * h + weight * products


def ema_block(hessian, grad, probe, h_scale, key, start, numbers, factor):
    """Update one block in place.

    Args:
        hessian: [rows, n] in any storage; mutated.
        grad: [rows, n].
        probe: [rows, n], or None: ``grad``.
        h_scale: fp32 [rows], the scales of an 8-bit Hessian; mutated. None elsewhere.
        key: the block's `noise_key`; None where nothing is rounded by chance.
        start: int64 [], number of the first element in the whole tensor.
        numbers: the `Numbers`.
        factor: fp32 [] that the gradients are multiplied by, or None.
    """
    word = None if key is None else noise_words(key, start, hessian.shape)
    g = grad.float() if factor is None else grad.float() * factor
    products = g * (g if probe is None else probe.float())
    h = ema(load_block(hessian, h_scale, "hessian"), products, numbers.beta2, numbers.weight)
    store_block(hessian, h_scale, h, word, "hessian")


def hessian_ema(
    hessians, grads, *, beta2, scale, probes, hessian_scales, salts, offsets, steps, grad_factor, skip,
    run: Callable[..., None] = ema_block,
):  # fmt: skip
    """``soul_kernels.hessian_ema`` in plain PyTorch; mutates ``hessians`` and ``hessian_scales``.

    ``run`` is what updates a block: `ema_block`, or what has been compiled from it.
    """
    if skip is not None and skip.item():
        return
    numbers = Numbers(scalar(beta2), scalar((1 - beta2) * scale))
    factor = None if grad_factor is None else scalar(grad_factor)
    for i, whole in enumerate(hessians):
        read, scales = (grads[i], probes and probes[i]), (hessian_scales and hessian_scales[i],)
        step, size = 0 if steps is None else steps[i], getattr(run, "size", None)
        for start, hessian, grad, probe, h_scale in blocks([whole], read, scales, size=size, first=offsets[i]):
            key = None if whole.dtype == torch.float32 else noise_key(salts[i], step, start, whole.device)
            run(hessian, grad, probe, h_scale, key, torch.tensor(start, device="cpu"), numbers, factor)

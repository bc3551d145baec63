"""Moving average of squared gradients, the estimate of the diagonal of the Hessian."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from soul_kernels.reference._blocks import blocks, entry
from soul_kernels.reference.rounding import draws_codes, load_block, noise_key, noise_words, scalar, store_block


class Numbers(NamedTuple):
    """Numbers that all elements of all tensors share, as fp32 tensors of shape ()."""

    beta2: Tensor
    weight: Tensor  # (1 - beta2) scale, computed in double precision


def ema(h: Tensor, products: Tensor, beta2: Tensor, weight: Tensor) -> Tensor:
    """Return ``beta2 h + weight products``; ``weight`` is ``(1 - beta2) scale``."""
    return beta2 * h + weight * products


def ema_block(
    hessian: Tensor, grad: Tensor, probe: Tensor | None, h_scale: Tensor | None, key: Tensor | None, start: Tensor,
    numbers: Numbers, factor: Tensor | None,
) -> None:  # fmt: skip
    """Update one block in place.

    Args:
        hessian: [rows, n] in fp32 or bf16, or 8-bit codes in uint8; mutated.
        grad: [rows, n] in fp32, bf16 or fp16.
        probe: [rows, n], the other factor of the products; None: ``grad`` itself.
        h_scale: int16 [rows], the scales of an 8-bit Hessian; mutated. None for other dtypes.
        key: the block's `noise_key`; None where the Hessian is rounded to nearest.
        start: int64 [], index of the block's first element in the whole tensor.
        numbers: the `Numbers`.
        factor: fp32 [] that the gradients are multiplied by, or None.
    """
    word = None if key is None else noise_words(key, start, hessian.shape)
    g = grad.float() if factor is None else grad.float() * factor
    products = g * (g if probe is None else probe.float())
    h = ema(load_block(hessian, h_scale, "hessian"), products, numbers.beta2, numbers.weight)
    store_block(hessian, h_scale, h, word, "hessian")


def hessian_ema(
    hessians: Sequence[Tensor], grads: Sequence[Tensor], *, beta2: float, scale: float, probes: Sequence[Tensor] | None,
    hessian_scales: Sequence[Tensor | None] | None, salts: Sequence[int], offsets: Sequence[int],
    steps: Tensor | None, grad_factor: Tensor | None, skip: Tensor | None,
    run: Callable[..., None] = ema_block,
) -> None:  # fmt: skip
    """Run ``soul_kernels.hessian_ema`` in plain PyTorch; ``hessians`` and ``hessian_scales`` are mutated.

    ``salts``, ``offsets`` and ``run`` are as in `soul_kernels.reference.sophia_step.sophia_step`; ``run`` is `ema_block`, or
    `ema_block` compiled. The other arguments are those of the op.
    """
    if skip is not None and skip.item():
        return
    numbers = Numbers(scalar(beta2), scalar((1 - beta2) * scale))
    factor = None if grad_factor is None else scalar(grad_factor)
    for i, whole in enumerate(hessians):
        read = (grads[i], entry(probes, i))
        scales = (entry(hessian_scales, i),)
        step = 0 if steps is None else steps[i]
        size = getattr(run, "size", None)
        draws = whole.dtype == torch.bfloat16 or (whole.dtype == torch.uint8 and draws_codes(beta2))
        for start, hessian, grad, probe, h_scale in blocks([whole], read, scales, size=size, first=offsets[i]):
            key = None if not draws else noise_key(salts[i], step, start, whole.device)
            run(hessian, grad, probe, h_scale, key, torch.tensor(start, device="cpu"), numbers, factor)

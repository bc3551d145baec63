"""Values that a step takes from all gradients together: their norm, whether to skip the step, and the clipping factor.

Everything stays on the device, as tensors, so that no step waits. With several devices a value is made on the first one and
moved to where it is needed.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch

from soul.optim.options import Number, ParamGroup
from soul.optim.step_groups import GroupWork
from soul_kernels import grad_norm

T = TypeVar("T")


def total_norm(work: Sequence[GroupWork]) -> torch.Tensor | None:
    """Return the L2 norm of all gradients, of all groups, shards and pieces: fp32 [] on the first device; or None."""
    norms = []
    for group, _, step_groups, all_grads in work:
        for step_group, grads in zip(step_groups, all_grads):
            norm = grad_norm(grads, table=step_group.norm_table, backend=group["backend"])
            if step_group.is_divided:
                norm = step_group.sum_over_shards(norm.double().square()).sqrt().float()
            norms.append(norm)
    if len(norms) > 1:
        return torch.stack([norm.to(norms[0].device, non_blocking=True) for norm in norms]).double().norm().float()
    return norms[0] if norms else None


def norm_and_skip(
    work: Sequence[GroupWork], grad_scale: torch.Tensor | None, found_inf: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return the norm of the unscaled gradients, and whether to skip the step.

    Args:
        work: the work of the step, an entry for each parameter group.
        grad_scale: the scale of a GradScaler that has not unscaled the gradients, or None.
        found_inf: the GradScaler's verdict, not 0 if a gradient is not finite, or None.

    Returns:
        The norm, fp32 [], or None if no group needs it; and fp32 [], 1 to skip and 0 not to, or None if nothing can cause a
        skip.
    """
    # Without gradients a GradScaler passes the number 0; with several devices or ranks it passes the sum of their verdicts.
    skip = (found_inf.reshape(()) != 0).float() if isinstance(found_inf, torch.Tensor) else None
    norm = None
    if any(group_work.group["max_grad_norm"] is not None or group_work.group["skip_nonfinite"] for group_work in work):
        norm = total_norm(work)
    if norm is not None and any(group_work.group["skip_nonfinite"] for group_work in work):
        bad = not_finite(norm)
        skip = bad if skip is None else torch.maximum(bad, skip.to(norm.device, non_blocking=True))
    if norm is not None and grad_scale is not None:
        norm = norm / moved(grad_scale, norm.device)
    return norm, skip


def not_finite(norm: torch.Tensor) -> torch.Tensor:
    """Return 1 if a norm is NaN or inf, else 0: fp32 []."""
    return 1 - norm.isfinite().float()


def gradient_factor(
    group: ParamGroup, norm: torch.Tensor | None, grad_scale: Number | None, device: torch.device
) -> torch.Tensor | None:
    """Return the factor that clips and unscales the gradients of a group: fp32 [], or None for 1.

    Args:
        group: the parameter group, with its ``max_grad_norm``.
        norm: the norm of all unscaled gradients, or None if no group needs it.
        grad_scale: as in `norm_and_skip`.
        device: the device of the parameters.
    """
    factor = None
    if group["max_grad_norm"] is not None and norm is not None:
        # The formula of clip_grad_norm_. A norm of NaN makes the factor NaN.
        factor = (group["max_grad_norm"] / (norm.to(device, non_blocking=True) + 1e-6)).clamp(max=1.0)
    if grad_scale is not None:
        factor = (1.0 if factor is None else factor) / moved(grad_scale, device)
    return factor


def moved(value: T, device: torch.device) -> T:
    """Return a tensor on ``device``, without waiting; anything else as it is."""
    on_device: Any = value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
    return on_device

"""Telemetry of a step: what the kernels count, and rho, which is steered by the clipped fraction.

`sophia_step` adds three numbers to the ``telemetry`` of a step group: clipped coordinates, coordinates whose update was lost
to rounding, and the squared norm of the update. They stay on the device, where `steer_rho` uses them. `group_telemetry` reads
them for the user.
"""

import functools
from collections.abc import Hashable

import torch

from soul.distributed.shards import device_and_sharding, hidden_sharding
from soul.optim.options import ParamGroup, option_on
from soul.optim.step_groups import StepGroup
from soul_kernels.errors import argument_error

RHO_RANGE = (1e-12, 1e12)  # of a rho that is steered


def group_telemetry(group: ParamGroup, step_groups: list[StepGroup]) -> dict[str, float | int]:
    """Return the entry of a parameter group in `soul.SophiaG.telemetry`; wait for the device."""
    together: dict[Hashable, list[StepGroup]] = {}  # one sum over processes for all that are sharded alike
    for step_group in step_groups:
        together.setdefault(device_and_sharding(step_group.params[0]), []).append(step_group)
    totals = torch.zeros(3, dtype=torch.float64, device="cpu")
    for alike in together.values():
        counts = torch.stack([step_group.telemetry for step_group in alike]).sum(0)
        totals += alike[0].sum_over_shards(counts).cpu()
    clipped, lost, squares = totals.tolist()
    numel = sum(step_group.numel for step_group in step_groups) or float("nan")
    # ZeRO-3, which numbers its pieces, fills them up with memory that nobody has written: its weight decay is part of the norm.
    has_norm = step_groups and not any(each.is_piece and hasattr(each.params[0], "ds_id") for each in step_groups)
    return {
        "clip_fraction": clipped / numel,
        "update_norm": squares**0.5 if has_norm else float("nan"),
        "lost_fraction": lost / numel,
        "rho": float(group["rho"]),
        "numel": sum(step_group.numel for step_group in step_groups),
    }


def check_counts_all(step_groups: list[StepGroup]) -> None:
    """Raise if FSDP1 has cut the parameters, and this process has counted its own piece alone."""
    for step_group in step_groups:
        if hidden_sharding(step_group.params) == "FSDP1":
            remedy = "nothing says that they are pieces, so sums over processes are not formed: use one process, or FSDP2"
            expected = "an optimizer of whole parameters or DTensors"
            raise argument_error("telemetry", expected, "one process's piece under FSDP1", remedy)


def steer_rho(group: ParamGroup, step_groups: list[StepGroup], skip: torch.Tensor | None, hessian_in_step: bool) -> None:
    """Move rho of a group towards its ``clip_target``, in place: ``rho *= exp(fraction - clip_target)``.

    rho stays as it is in a skipped step, with lr = 0, and until h is updated for the first time.

    Args:
        group: the parameter group; its ``rho`` is a tensor.
        step_groups: its step groups that have just been stepped.
        skip: whether the step was skipped, or None, as from `norm_and_skip`.
        hessian_in_step: whether the step itself refreshes h.
    """
    rho = group["rho"]
    numel = sum(step_group.numel for step_group in step_groups)
    if not numel:
        return
    clipped = [
        step_group.sum_over_shards(step_group.telemetry[:1].clone()).to(rho.device, non_blocking=True)
        for step_group in step_groups
    ]
    change = (functools.reduce(torch.add, clipped)[0] / numel - group["clip_target"]).float()
    change = change * (option_on(group["lr"], rho.device) != 0)
    if not hessian_in_step:
        updates = step_groups[0].count("hessian_step").amax()
        change = change * (updates.to(rho.device, non_blocking=True) > 0)
    if skip is not None:
        change = change * (1 - skip.to(rho.device, non_blocking=True))
    low, high = RHO_RANGE
    rho.mul_(change.exp()).clamp_(low, high)

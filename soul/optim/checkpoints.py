"""Checkpoints of the optimizers: what is checked and merged before anything of an optimizer is changed.

torch's ``load_state_dict`` copies a checkpoint and casts its states to the dtype of the parameters. `soul.SophiaG` lets torch
do the bookkeeping (hooks, numbers of groups and parameters) and then replaces the result by that of `loaded_checkpoint`: the
options of both, merged, and states in the dtype that they were saved in.
"""

from collections.abc import Collection
from typing import Any

import torch

from soul.optim.options import ParamGroup, check_momentum, check_options, check_releasable, merged_options
from soul.optim.states import check_noise, loaded_state


def loaded_checkpoint(
    param_groups: list[ParamGroup], checkpoint: dict[str, Any], counters: Collection[str], released: bool
) -> tuple[list[ParamGroup], dict[torch.Tensor, dict[str, Any]]]:
    """Return the options and the states of an optimizer after a checkpoint is loaded; nothing is changed.

    Args:
        param_groups: the groups of the optimizer, as many as the checkpoint has.
        checkpoint: a ``state_dict()`` of this class or of the published one.
        counters: names of the counters that a state of this optimizer has.
        released: whether gradients are released in the backward pass, which not every option allows.

    Returns:
        For each group its options, and the checkpoint's ``params``; and parameter -> its state.

    Raises:
        ArgumentError: the checkpoint does not fit the parameters, the class, the noise or the release of gradients.
    """
    current = [{name: value for name, value in group.items() if name != "params"} for group in param_groups]
    saved_groups = checkpoint["param_groups"]
    options = [merged_options(mine, saved) for mine, saved in zip(current, saved_groups)]
    states = {}
    for group, saved_group, merged in zip(param_groups, saved_groups, options):
        check_options(merged)
        if released:
            check_releasable(merged)
        for param, key in zip(group["params"], saved_group["params"]):
            if checkpoint["state"].get(key):
                published = "state_dtype" not in saved_group
                states[param] = loaded_state(param, merged, counters, checkpoint["state"][key], cast=published)
                check_noise(param, merged, saved_group, states[param])
    for mine, saved_group in zip(current, saved_groups):
        check_momentum(mine, saved_group)
    return options, states

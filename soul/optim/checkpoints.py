"""Loading of optimizer checkpoints: the checks, and the merging of options, before anything of the optimizer is changed.

torch's ``load_state_dict`` copies a checkpoint and casts its states to the dtype of the parameters. `soul.SophiaG` lets torch
do the bookkeeping (hooks, numbers of groups and parameters). Then it replaces torch's result by that of `loaded_checkpoint`:
the merged options, and states in the dtype in which they were saved.
"""

import warnings
from collections.abc import Collection
from typing import Any

import torch

from soul.optim.options import ParamGroup, check_momentum, check_options, check_releasable, merged_options
from soul.optim.states import check_noise, loaded_state


def loaded_checkpoint(
    param_groups: list[ParamGroup], checkpoint: dict[str, Any], counters: Collection[str], released: bool
) -> tuple[list[ParamGroup], dict[torch.Tensor, dict[str, Any]]]:
    """Return the options and the states that an optimizer has after loading a checkpoint; change nothing.

    Args:
        param_groups: the groups of the optimizer, as many as the checkpoint has.
        checkpoint: a ``state_dict()`` of `soul.SophiaG`, `soul.SOUL` or the published class.
        counters: names of the counters that a state of this optimizer has.
        released: whether gradients are released in the backward pass, which not every option allows.

    Returns:
        The options of each group, with the checkpoint's ``params``; and a dict, parameter -> state.

    Raises:
        ArgumentError: the checkpoint does not fit the parameters, the class, the noise or the release of gradients.
    """
    current_groups = [{name: value for name, value in group.items() if name != "params"} for group in param_groups]
    saved_groups = checkpoint["param_groups"]
    options = [merged_options(current, saved) for current, saved in zip(current_groups, saved_groups)]
    states = {}
    notes: set[str] = set()
    for group, saved_group, merged in zip(param_groups, saved_groups, options):
        check_options(merged)
        if released:
            check_releasable(merged)
        for param, key in zip(group["params"], saved_group["params"]):
            if checkpoint["state"].get(key):
                published = "state_dtype" not in saved_group
                states[param] = loaded_state(param, merged, counters, checkpoint["state"][key], cast=published, notes=notes)
                check_noise(param, merged, saved_group, states[param])
    for current, saved_group in zip(current_groups, saved_groups):
        check_momentum(current, saved_group)
    for note in sorted(notes):
        warnings.warn(note, UserWarning, stacklevel=2)
    return options, states

"""The options of a parameter group: their types, their checks, and the device that they live on.

A parameter group is a dict, as in torch: ``params``, a list of tensors, and one entry an option. `SophiaG` documents the
options. Users and schedulers write into the dict at any time, so `check_options` looks at it in every step. A check never
waits for a device: an option that is a tensor on a GPU is read by the kernels alone.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal, TypeAlias

import torch

from soul.distributed.shards import hidden_sharding, is_sharded, local
from soul.optim.scales import check_state_shards
from soul_kernels.backends import BACKENDS
from soul_kernels.bundles import EPS_MODES
from soul_kernels.errors import argument_error, check_choice, check_positive, check_range
from soul_kernels.rounding import ROUNDINGS
from soul_kernels.tensors import PARAM_DTYPES, check_gradient, has_data, overlaps_itself

ParamGroup: TypeAlias = dict[str, Any]  # "params" and the options, by name
Number: TypeAlias = float | torch.Tensor  # an option that may live on the device
ParamRounding: TypeAlias = Literal["auto", "nearest", "stochastic", "compensated"]
StateDtype: TypeAlias = torch.dtype | Literal["8bit", "float32", "bfloat16"] | None
EpsMode: TypeAlias = Literal["add", "max"]
Backend: TypeAlias = Literal["auto", "triton", "compile", "reference"]

ON_DEVICE = ("lr", "weight_decay", "rho", "bs")  # options that live on the device with capturable=True
# Options that schedules do not change. ``published_code`` of `SOUL` acts through its momentum.
FIXED = (
    "betas", "eps", "maximize", "capturable", "max_grad_norm", "param_rounding", "state_dtype", "backend", "skip_nonfinite",
    "clip_target", "bias_correction", "eps_mode", "seed", "state_offload",
)  # fmt: skip
IMMUTABLE = (float, int, str, tuple, type(None), torch.dtype)  # types of options
RHO_AT_START = 0.04  # of rho="auto"
PUBLISHED = ("lr", "betas", "rho", "weight_decay", "maximize", "capturable")  # the options that the published class has


def rounding_of(group: ParamGroup) -> Literal["nearest", "stochastic", "compensated"]:
    """Return ``param_rounding`` of a group as the ops take it: "auto" is "compensated"."""
    return "compensated" if group["param_rounding"] == "auto" else group["param_rounding"]


def option_on(value: Number, device: torch.device) -> Number:
    """Return an option as the ops take it: a number, or an fp32 tensor [] on ``device``.

    If the parameters are on another device, a tensor on the CPU is read as a number, which waits for nothing.
    """
    if not isinstance(value, torch.Tensor):
        return value
    if value.device.type == "cpu" and device.type != "cpu" and has_data(value):
        return float(value)
    if value.dtype == torch.float32 and value.device == device and not value.dim() and not value.requires_grad:
        return value
    return value.detach().reshape(()).to(device, torch.float32, non_blocking=True)


def merged_options(current: ParamGroup, saved: ParamGroup) -> ParamGroup:
    """Return the options of a group after a checkpoint is loaded into it.

    Options of the checkpoint win, except ``backend``, ``state_offload``, ``capturable`` and ``noise``, which belong to the
    machine, to the run and to this version of the library.

    Args:
        current: the options of the group.
        saved: the options in the checkpoint; one of the published class has few of them.
    """
    merged = current | saved | {name: current[name] for name in ("backend", "state_offload", "capturable", "noise")}
    if "published_code" in current and "state_dtype" in saved:  # a checkpoint of a SophiaG has no published_code
        merged["published_code"] = saved.get("published_code", False)
    if "clip_target" not in saved and current["clip_target"] is not None:
        merged["rho"] = current["rho"]  # a published checkpoint has a fixed rho, which would be steered from here on
    return merged


def check_momentum(current: ParamGroup, saved: ParamGroup) -> None:
    """Raise if beta1 of a checkpoint would mean another momentum in this optimizer.

    SOUL's published code averages with the square of beta1, and its checkpoints do not say so.

    Args:
        current: the options of the group.
        saved: the options in the checkpoint.

    Raises:
        ArgumentError: the checkpoint is of the published code and this is a `SOUL` without ``published_code``; or it is of a
            `SOUL` with ``published_code``, and this is a `SophiaG`.
    """
    if current.get("published_code") is False and "state_dtype" not in saved and "published_code" not in saved:
        remedy = (
            "take SOUL(..., published_code=True) or SOUL.as_published(...); if other code has written the checkpoint, put "
            "published_code into its param_groups"
        )
        raise argument_error("published_code", "True for a checkpoint of SOUL's published code", False, remedy)
    if saved.get("published_code") and "published_code" not in current:
        remedy = "load it into SOUL; or square betas[0] in its param_groups and set published_code to False there"
        raise argument_error("state_dict published_code", "False for SophiaG", True, remedy)


def published_options(group: ParamGroup, betas: Iterable[float], known: Collection[str]) -> ParamGroup:
    """Return the options of a group as the published class has them: as numbers, and only those that it has.

    Args:
        group: the group, as ``state_dict()`` has it.
        betas: the decays that the published class is to average with.
        known: names of all options of this class. Other entries of the group are copied: they belong to schedulers.
    """
    published = {name: value for name, value in group.items() if name in PUBLISHED or name not in known}
    for name in ("lr", "rho", "weight_decay"):
        published[name] = float(published[name])
    return published | {"betas": tuple(betas), "capturable": False}  # the published class fails with True


def check_releasable(group: ParamGroup) -> None:
    """Raise for an option of a group that needs all gradients before the first parameter moves.

    Raises:
        ArgumentError: ``max_grad_norm``, ``skip_nonfinite`` or ``clip_target`` is set.
    """
    for name, needs in (
        ("max_grad_norm", "the norm of"),
        ("skip_nonfinite", "a look at"),
        ("clip_target", "the clipped fraction over"),
    ):
        if group[name]:
            remedy = f"it needs {needs} all gradients before the first parameter moves: leave it out, or gradient release"
            raise argument_error(name, "None or False with gradient release", group[name], remedy)


def check_not_in_pieces(group: ParamGroup, first: torch.Tensor | None = None, n_groups: int = 1) -> None:
    """Raise for an option that needs gradients which a framework does not show the optimizer in the same step.

    DeepSpeed's ZeRO shows every process its piece of the parameters, so that numbers can be added up over the processes. But it
    steps the parameter groups one after the other, and with stage 3 the sub-groups of each, with one gradient at a time.

    Args:
        group: a parameter group.
        first: its first parameter in the first step; None: this is the first step.
        n_groups: number of parameter groups of the optimizer.

    Raises:
        ArgumentError: ``max_grad_norm`` or ``skip_nonfinite`` under ZeRO with several groups or sub-groups; ``rho="auto"`` with
            several sub-groups, each of which would move rho; any of them under FSDP1; or ``capturable`` under ZeRO.
    """
    clips = group["max_grad_norm"] not in (None, math.inf)
    if not (clips or group["skip_nonfinite"] or group["capturable"] or group["clip_target"] is not None):
        return
    framework = hidden_sharding(group["params"])
    if framework is None:
        return
    if group["capturable"] and framework == "DeepSpeed":
        remedy = "its step waits for the device, so no CUDA graph can hold it: leave the option out"
        raise argument_error("capturable", "False under DeepSpeed", True, remedy)
    several = first is not None and group["params"][0] is not first
    clip_remedy = "set gradient_clipping in DeepSpeed's configuration"
    skip_remedy = "set check_grad_overflow in the section bf16 of DeepSpeed's configuration"
    condition = "where ZeRO steps several groups or sub-groups of parameters, one after the other"
    if framework == "FSDP1":
        condition = "under FSDP1, which shows the optimizer no more than this process's piece of the gradients"
        clip_remedy = "clip by its clip_grad_norm_"
        skip_remedy = "leave it out, or use FSDP2"
    if framework == "FSDP1" or several or n_groups > 1:
        if clips:
            raise argument_error("max_grad_norm", f"None {condition}", group["max_grad_norm"], clip_remedy)
        if group["skip_nonfinite"]:
            raise argument_error("skip_nonfinite", f"False {condition}", True, skip_remedy)
    if group["clip_target"] is None:
        return
    if framework == "FSDP1":
        raise argument_error("rho", f"a number {condition}", "'auto'", "pass one, tuned in one process or under FSDP2")
    if several:
        remedy = "each would move it for the next: raise sub_group_size in DeepSpeed's configuration above the number of "
        remedy += "parameters, or pass a number"
        raise argument_error("rho", "a number where ZeRO-3 steps several sub-groups one by one", "'auto'", remedy)


def settle_options(group: ParamGroup) -> None:
    """Bring the options of a group into the form that steps use, in place.

    rho="auto" becomes a number and a ``clip_target``, a dtype becomes its name, and the options that live on the device become
    fp32 tensors [] there: those in ``ON_DEVICE`` with ``capturable``, else rho alone if it is steered.
    """
    device = local(group["params"][0]).device if group["params"] else torch.device("cpu")
    if group["rho"] == "auto":
        group["rho"] = RHO_AT_START
        if group["clip_target"] is None:
            group["clip_target"] = 0.5
    if isinstance(group["state_dtype"], torch.dtype):  # by name: torch.distributed.checkpoint gathers no dtypes
        group["state_dtype"] = str(group["state_dtype"]).removeprefix("torch.")
    names: tuple[str, ...] = ()
    if group["capturable"]:
        names = ON_DEVICE
    elif group["clip_target"] is not None:
        names = ("rho",)
    for name in names:
        value = group[name]
        if not isinstance(value, torch.Tensor):
            # Made on the CPU in fp32, whatever the default device and dtype are.
            value = torch.tensor(value, dtype=torch.float32, device="cpu")
        group[name] = value.detach().reshape(()).to(device, torch.float32, copy=True)


def check_param_dtype(name: str, tensor: torch.Tensor) -> None:
    """Raise for a parameter or a gradient whose layout or dtype the ops do not take; ``name`` is its name in the error."""
    check_gradient(name, tensor)
    if tensor.dtype not in PARAM_DTYPES:
        names = ", ".join(str(dtype) for dtype in PARAM_DTYPES)
        raise argument_error(name, f"dtype {names}", tensor.dtype, "convert it first")


def lasts(options: Iterable[Any]) -> bool:
    """Tell whether options can have no other value while they are the same objects; others can be filled or changed."""
    for option in options:
        if not isinstance(option, IMMUTABLE) and not (isinstance(option, torch.Tensor) and not _can_be_read(option)):
            return False
    return True


def _can_be_read(tensor: torch.Tensor) -> bool:
    """Tell whether the values of a tensor can be read without waiting."""
    return tensor.device.type == "cpu" and has_data(tensor)


def check_bs(bs: Number) -> None:
    """Raise unless ``bs`` is positive. A tensor on a GPU passes: reading it would wait."""
    if isinstance(bs, torch.Tensor) and not _can_be_read(bs):
        return
    check_positive("bs", bs, "pass the number of predictions in the Hessian batch")


def check_options(group: ParamGroup) -> None:
    """Raise for the first option of a group that does not fit, by itself or beside the others."""
    check_values(group)
    _check_rho(group)


def check_numbers(group: ParamGroup) -> None:
    """Do what `check_options` does, if no other options have changed than those in ``ON_DEVICE``."""
    for name in ON_DEVICE:
        _check_number(name, group[name])
    _check_rho(group)


def _check_rho(group: ParamGroup) -> None:
    """Raise for a ``clip_target`` beside a rho that cannot be steered."""
    if group["clip_target"] is not None and not isinstance(group["rho"], (str, torch.Tensor)):
        raise argument_error("clip_target", "None with a fixed rho", group["clip_target"], "pass rho='auto'")


def check_values(group: Mapping[str, Any]) -> None:
    """Raise for the first option that does not fit by itself; `check_options` also compares options.

    Args:
        group: the options by name; parameters are not looked at.
    """
    for name in ON_DEVICE:
        _check_number(name, group[name])
    if not isinstance(group["betas"], (tuple, list)) or len(group["betas"]) != 2:
        raise argument_error("betas", "two numbers, of momentum and Hessian", group["betas"], "for instance (0.9, 0.95)")
    for position, beta in enumerate(group["betas"]):
        check_range(f"betas[{position}]", beta, high=1.0)
    check_range("eps", group["eps"])
    if group["max_grad_norm"] not in (None, math.inf):
        check_positive("max_grad_norm", group["max_grad_norm"], "None does not clip")
    if group["clip_target"] is not None:
        check_range("clip_target", group["clip_target"], high=1.0)
    if isinstance(group["seed"], bool) or not isinstance(group["seed"], int):
        raise argument_error("seed", "an integer", repr(group["seed"]), "for instance 0")
    check_choice("param_rounding", group["param_rounding"], ("auto", *ROUNDINGS))
    check_choice("state_dtype", group["state_dtype"], (None, torch.float32, torch.bfloat16, "8bit", "float32", "bfloat16"))
    check_choice("eps_mode", group["eps_mode"], EPS_MODES)
    check_choice("backend", group["backend"], BACKENDS)
    if not isinstance(group["state_offload"], bool):
        raise argument_error("state_offload", "True or False", repr(group["state_offload"]), "True: in main memory")
    if group["state_offload"] and group["capturable"]:
        remedy = "a CUDA graph replays fixed memory, through which no buckets of states pass: leave one of them out"
        raise argument_error("state_offload", "False with capturable", True, remedy)


def _check_number(name: str, value: Any) -> None:
    """Raise unless an option in ``ON_DEVICE`` fits. A tensor that would have to be waited for passes."""
    if isinstance(value, torch.Tensor):
        if value.numel() != 1:
            remedy = f"use one parameter group for each {name}"
            raise argument_error(name, "one number", f"a tensor of {value.numel()}", remedy)
        if not _can_be_read(value):
            return
        value = float(value)
    if name == "bs":
        check_bs(value)
    elif not isinstance(value, str):
        check_range(name, value)
    elif name != "rho" or value != "auto":
        expected = "a number or 'auto'" if name == "rho" else "a number"
        raise argument_error(name, expected, repr(value), "check the optimizer's arguments")


def check_group(group: ParamGroup, index: int) -> None:
    """Raise for options or parameters of a new group that do not fit; ``index`` is the group's number in the optimizer."""
    check_options(group)
    for position, param in enumerate(group["params"]):
        name = f"parameter {position} in group {index}"
        check_param_dtype(name, param)
        if is_sharded(param):
            _check_sharded(name, param, group)
        if overlaps_itself(local(param)):
            got = f"shape {tuple(param.shape)} with strides {param.stride()}"
            raise argument_error(name, "elements that share no memory", got, "make it contiguous first")


def _check_sharded(name: str, param: Any, group: ParamGroup) -> None:
    """Raise for a DTensor (``param``) that is a partial sum, and for shards that 8-bit states do not know."""
    if any(placement.is_partial() for placement in param.placements):
        remedy = "a step of a part of a sum is no step of the sum: redistribute it to Replicate() or Shard(0) first"
        raise argument_error(name, "a replicated or sharded DTensor", str(param.placements), remedy)
    if group["state_dtype"] == "8bit":
        check_state_shards(name, param)

"""The options of a parameter group: what they may be, and where they live."""

import math

import torch

from soul.distributed.shards import hidden_sharding, is_sharded, local
from soul_kernels.backends import BACKENDS
from soul_kernels.errors import argument_error, check_choice, check_positive, check_range
from soul_kernels.rounding import ROUNDINGS
from soul_kernels.sophia_step import EPS_MODES
from soul_kernels.tensors import PARAM_DTYPES, check_gradient, has_data, overlaps_itself

ON_DEVICE = ("lr", "weight_decay", "rho", "bs")  # options that live on the device with capturable=True
RHO_AT_START = 0.04  # of rho="auto"
PUBLISHED = ("lr", "betas", "rho", "weight_decay", "maximize", "capturable")  # the options that the published class has


def rounding_of(group):
    """What ``param_rounding`` comes to."""
    return "compensated" if group["param_rounding"] == "auto" else group["param_rounding"]


def option_on(value, device):
    """An option as the ops take it: a number, or an fp32 tensor on the device. A tensor on the CPU is read: no waiting."""
    if not isinstance(value, torch.Tensor):
        return value
    if value.device.type == "cpu" and device.type != "cpu" and has_data(value):
        return float(value)
    return value.detach().reshape(()).to(device, torch.float32, non_blocking=True)


def merged_options(current, saved):
    """The options of a group and those of a checkpoint, which win but for what belongs to the machine and to the run."""
    merged = current | saved | {name: current[name] for name in ("backend", "capturable", "noise")}
    if "published_code" in current and "state_dtype" in saved:  # of a SophiaG, unless it says something else
        merged["published_code"] = saved.get("published_code", False)
    if "clip_target" not in saved and current["clip_target"] is not None:
        merged["rho"] = current["rho"]  # a published checkpoint knows a fixed one only
    return merged


def check_momentum(current, saved):
    """Raises where beta1 of a checkpoint would mean another momentum here.

    SOUL's published code averages with its square, and its checkpoints do not say so.
    """
    if current.get("published_code") is False and "state_dtype" not in saved and "published_code" not in saved:
        remedy = "take SOUL(..., published_code=True) or SOUL.as_published(...); if other code has written the checkpoint, put "
        remedy += "published_code into its param_groups"
        raise argument_error("published_code", "True for a checkpoint of SOUL's published code", False, remedy)
    if saved.get("published_code") and "published_code" not in current:
        remedy = "load it into SOUL; or square betas[0] in its param_groups and set published_code to False there"
        raise argument_error("state_dict published_code", "False for SophiaG", True, remedy)


def published_options(group, betas, known):
    """The options of a group as the published class has them: numbers, and those that it knows.

    Args:
        group: the group, as ``state_dict()`` has it.
        betas: what the published class is to average with.
        known: names of all options of this class; other entries of the group belong to others, such as schedulers.
    """
    published = {name: value for name, value in group.items() if name in PUBLISHED or name not in known}
    for name in ("lr", "rho", "weight_decay"):
        published[name] = float(published[name])
    return published | {"betas": tuple(betas), "capturable": False}  # True fails there


def check_releasable(group):
    """Raises for an option that needs all gradients before the first parameter moves."""
    for name, needs in (("max_grad_norm", "the norm of"), ("skip_nonfinite", "a look at"), ("clip_target", "the clips of")):
        if group[name]:
            remedy = f"it needs {needs} all gradients before the first parameter moves"
            raise argument_error(name, "None or False with gradient release", group[name], remedy)


def check_sees_all(group):
    """Raises for an option that needs the gradients of all processes, where a group holds a piece that does not say so.

    Raises:
        ArgumentError: ``max_grad_norm``, ``skip_nonfinite`` or ``rho="auto"`` under DeepSpeed's ZeRO or FSDP1.
    """
    clips = group["max_grad_norm"] not in (None, math.inf)
    if not (clips or group["skip_nonfinite"] or group["clip_target"] is not None):
        return
    framework = hidden_sharding(group["params"])
    if framework is None:
        return
    if clips:
        remedies = {"DeepSpeed": "set gradient_clipping in DeepSpeed's configuration", "FSDP1": "clip by its clip_grad_norm_"}
        name, expected, got, remedy = "max_grad_norm", "None", group["max_grad_norm"], remedies[framework]
    elif group["skip_nonfinite"]:
        name, expected, got, remedy = "skip_nonfinite", "False", True, "leave it out, or use FSDP2"
    else:
        name, expected, got, remedy = "rho", "a number", "'auto'", "pass one, tuned in one process or under FSDP2"
    where = f"under {framework}, which shows the optimizer no more than this process's piece of the gradients"
    raise argument_error(name, f"{expected} {where}", got, remedy)


def settle_options(group):
    """Brings the options that live on the device there."""
    device = local(group["params"][0]).device if group["params"] else torch.device("cpu")
    if group["rho"] == "auto":
        group["rho"] = RHO_AT_START
        if group["clip_target"] is None:
            group["clip_target"] = 0.5
    if isinstance(group["state_dtype"], torch.dtype):  # by name: torch.distributed.checkpoint gathers no dtypes
        group["state_dtype"] = str(group["state_dtype"]).removeprefix("torch.")
    for name in ON_DEVICE if group["capturable"] else ("rho",) if group["clip_target"] is not None else ():
        value = group[name]
        if not isinstance(value, torch.Tensor):
            value = torch.tensor(value, dtype=torch.float32, device="cpu")  # whatever the defaults are
        group[name] = value.detach().reshape(()).to(device, torch.float32, copy=True)


def check_param_dtype(name, tensor):
    """Raises for a parameter or gradient that the ops do not take."""
    check_gradient(name, tensor)
    if tensor.dtype not in PARAM_DTYPES:
        names = ", ".join(str(dtype) for dtype in PARAM_DTYPES)
        raise argument_error(name, f"dtype {names}", tensor.dtype, "convert it first")


def check_bs(bs):
    """Raises unless ``bs`` is positive, where that can be seen without waiting."""
    if isinstance(bs, torch.Tensor) and (bs.device.type != "cpu" or not has_data(bs)):
        return  # its value is there, and reading it would wait
    check_positive("bs", bs, "pass the number of predictions in the Hessian batch")


def check_options(group):
    """Raises for the first option that is not what it may be; waits for no device."""
    check_values(group)
    if group["clip_target"] is not None and not isinstance(group["rho"], (str, torch.Tensor)):
        raise argument_error("clip_target", "None with a fixed rho", group["clip_target"], "pass rho='auto'")


def check_values(group):
    """Raises for the first option that is not what it may be by itself; `check_options` also compares options."""
    for name in ON_DEVICE:
        value = group[name]
        if isinstance(value, torch.Tensor):
            if value.numel() != 1:
                raise argument_error(
                    name, "one number", f"a tensor of {value.numel()}", f"use one parameter group for each {name}"
                )
            if value.device.type != "cpu" or not has_data(value):
                continue  # its value is there, and reading it would wait
            value = float(value)
        if name == "bs":
            check_bs(value)
        elif not isinstance(value, str):
            check_range(name, value)
        elif name != "rho" or value != "auto":
            raise argument_error(
                name, "a number" + " or 'auto'" * (name == "rho"), repr(value), "check the optimizer's arguments"
            )
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


def check_group(group, index):
    """Raises for options or parameters of a new group that do not fit."""
    check_options(group)
    for position, param in enumerate(group["params"]):
        name = f"parameter {position} in group {index}"
        check_param_dtype(name, param)
        if is_sharded(param):
            _check_sharded(name, param, group)
        if overlaps_itself(local(param)):
            got = f"shape {tuple(param.shape)} with strides {param.stride()}"
            raise argument_error(name, "elements that share no memory", got, "make it contiguous first")


def _check_sharded(name, param, group):
    if any(placement.is_partial() for placement in param.placements):
        raise argument_error(name, "a replicated or sharded DTensor", str(param.placements), "redistribute it first")
    if group["state_dtype"] == "8bit":
        remedy = "their groups of 256 belong to one way of sharding, and a checkpoint could not be resharded; use bf16"
        raise argument_error("state_dtype", "fp32 or bf16 for DTensors", "'8bit'", remedy)

"""The states of one parameter: made, loaded, exported."""

import contextlib

import torch

from soul.distributed.shards import is_cut, is_sharded, local
from soul.optim.options import rounding_of
from soul_kernels.errors import argument_error
from soul_kernels.reference.rounding import GROUP, encode, in_memory_order, load_state, split
from soul_kernels.tensors import same_layout

STATES = ("exp_avg", "hessian")
MIDDLE = 1 << 31  # of the noise: a weight is then rounded to nearest
NOISE = 2  # version of the noise; in 1 the shards of a parameter drew each its own, and everything else as in 2
LONG_AGO = 1e6  # updates of a Hessian whose checkpoint does not say how many there were: no bias is left


def new_state(param, group, counters):
    """The states of a parameter that has none, all zero; ``counters``: those that it has."""
    m_dtype = h_dtype = group["state_dtype"]
    if m_dtype is None:
        m_dtype = torch.bfloat16 if param.dtype == torch.bfloat16 else torch.float32
        h_dtype = torch.float32
    elif m_dtype == "8bit":
        m_dtype = h_dtype = torch.uint8
    else:
        m_dtype = h_dtype = getattr(torch, m_dtype)
    device = local(param).device
    state = {name: torch.zeros((), dtype=torch.float32, device=device) for name in counters}
    for name, dtype in zip(STATES, (m_dtype, h_dtype)):
        state[name] = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False)
        if dtype == torch.uint8:
            state[f"{name}_scale"] = torch.zeros(-(-param.numel() // GROUP), dtype=torch.float32, device=device)
    if rounding_of(group) == "compensated" and param.dtype != torch.float32:
        state["low_bits"] = torch.zeros_like(param, dtype=torch.int8, memory_format=torch.preserve_format, requires_grad=False)
    return state


def loaded_state(param, group, counters, saved, cast):
    """The states of one parameter from a checkpoint: in the dtype that they have there, or in the group's."""
    if not all(name in saved for name in STATES):
        got, remedy = f"{', '.join(sorted(saved))}", "is it the checkpoint of another optimizer?"
        raise argument_error("state_dict", f"states {', '.join(STATES)}", got, remedy)
    state = new_state(param, group, counters)
    state["step"].fill_(float(saved.get("step", 0)))
    if "hessian_step" in state:
        state["hessian_step"].fill_(float(saved.get("hessian_step", LONG_AGO if state["step"] > 0 else 0)))
    for name in STATES:
        value, scale = saved[name], f"{name}_scale"
        values = None
        if not value.is_floating_point() and value.dtype != torch.uint8:
            remedy = "is it the checkpoint of another optimizer?"
            raise argument_error(f"state_dict {name}", "floating-point values, or codes in torch.uint8", value.dtype, remedy)
        if value.is_floating_point() and scale in saved:
            remedy = "another optimizer took the codes of 8-bit states for values: give it export_published() instead"
            raise argument_error(f"state_dict {name}", f"codes in torch.uint8 beside {scale}", value.dtype, remedy)
        if value.shape != param.shape:
            remedy = "load the checkpoint of this model"
            raise argument_error(f"state_dict {name}", f"shape {tuple(param.shape)}", tuple(value.shape), remedy)
        if value.dtype == torch.uint8:
            shape = (-(-param.numel() // GROUP),)
            if scale not in saved or saved[scale].shape != shape:
                got = tuple(saved[scale].shape) if scale in saved else "none"
                raise argument_error(f"state_dict {scale}", f"{shape} scales", got, "load the checkpoint of this model")
            state[scale] = saved[scale].to(local(param).device, torch.float32, copy=True)
            if not same_layout(value, state[name]):  # groups are of neighbours in memory
                values = load_state(value.to(param.device), state[scale], name)
        elif state[name].dtype == torch.uint8 and cast:
            values = value
        else:
            state.pop(scale, None)
        if values is not None:
            values = torch.empty_like(param, dtype=torch.float32, requires_grad=False).copy_(values)
            half = torch.full((param.numel(),), 0x800800, device=param.device)  # noise in the middle: to nearest
            code, state[scale] = encode(in_memory_order(values), half, name)
            state[name] = torch.empty_like(values, dtype=torch.uint8)
            in_memory_order(state[name]).copy_(code)
            continue
        dtype = state[name].dtype if cast or value.dtype not in (torch.float32, torch.bfloat16, torch.uint8) else value.dtype
        state[name] = torch.empty_like(param, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False).copy_(
            value
        )
    if "low_bits" in state and "low_bits" in saved:
        low = saved["low_bits"]
        if low.shape != param.shape or low.dtype != torch.int8:
            got, remedy = f"{tuple(low.shape)} of {low.dtype}", "load the checkpoint of this model"
            raise argument_error("state_dict low_bits", f"{tuple(param.shape)} of torch.int8", got, remedy)
        state["low_bits"].copy_(low)
    return state


def check_noise(param, group, saved_group, state):
    """Raises where a parameter would go on with other noise than the checkpoint was written with.

    Args:
        param: the parameter.
        group: its options.
        saved_group: those of the checkpoint, which say the version of its noise.
        state: the parameter's loaded state.
    """
    version = saved_group.get("noise", 1 if "state_dtype" in saved_group else NOISE)  # the published class draws none
    if version == NOISE or (version == 1 and not is_cut(param)):
        return
    if (param.dtype != torch.float32 and rounding_of(group) != "nearest") or state["hessian"].dtype != torch.float32:
        remedy = f"resume with the soul-kernels that wrote it, or set noise = {NOISE} in its param_groups: new random bits"
        raise argument_error("state_dict noise", f"version {NOISE}", version, remedy)


def published_state(state):
    """A copy of a state as the published class has it: values in place of 8-bit codes, and nothing that it does not know."""
    published = {"step": state["step"].detach().to("cpu", torch.float32, copy=True)}
    for name in STATES:
        value, scale = state[name].detach(), state.get(f"{name}_scale")
        published[name] = value.clone() if scale is None else load_state(value, scale, name)
    return published


def check_fp32(name, param, state, value):
    """Raises unless ``value`` can be stored in a parameter by `store_fp32`."""
    check_not_exported("import_fp32", param, state)
    if not isinstance(value, torch.Tensor) or value.dtype != torch.float32 or value.shape != local(param).shape:
        got = f"{tuple(value.shape)} of {value.dtype}" if isinstance(value, torch.Tensor) else type(value).__name__
        raise argument_error(name, f"{tuple(local(param).shape)} of torch.float32", got, "pass the values of export_fp32()")


def check_not_exported(name, param, state):
    """Raises where a parameter holds the fp32 values of an export."""
    if "low_bits" in state and local(param).dtype == torch.float32:
        remedy = "leave the with statement of an export first"
        raise argument_error(name, "parameters in the dtype of training", "fp32 values beside low bits", remedy)


def store_fp32(param, state, value):
    """``param <- value``, and into the low bits what that leaves, rounded to nearest; in place."""
    target, low = local(param.detach()), state.get("low_bits")
    value = value.detach().to(target.device)
    if low is None:
        target.copy_(value)
        return
    high, rest = split(value, torch.full((), MIDDLE, device=target.device), target.dtype)
    target.copy_(high)
    local(low).copy_(rest)


class Fp32Parameters(dict, contextlib.AbstractContextManager):
    """Parameter -> its value in fp32; as a context manager it puts the values into the parameters for a while."""

    def __enter__(self):
        if any(is_sharded(param) for param in self):
            raise argument_error(
                "export_fp32", "whole parameters in a with statement", "DTensors", "use the dict: values of shards"
            )
        self._kept = {param: param.data for param in self}
        for param, value in self.items():
            param.data = value
        return self

    def __exit__(self, *exception):
        for param, value in self._kept.items():
            param.data = value
        del self._kept

"""The state of one parameter: how it is made, loaded from a checkpoint, and exported.

A state is a dict by name: ``exp_avg`` and ``hessian`` in the shape of the parameter, fp32, bf16 or uint8 codes; beside codes
their scales, ``exp_avg_scale`` and ``hessian_scale``, two bytes each, as `soul.optim.scales` says; ``low_bits`` int8 with
"compensated" rounding; and the counters, fp32 []. Checkpoints have the same names, so they must not change. Checkpoints also
carry ``NOISE``, the version of the noise of stochastic rounding.

Older checkpoints have codes of parameters of any shape, and their scales in a vector of int16. Where a parameter now keeps fp32
states, the codes are decoded, which is exact. In still older ones codes are small floats, and scales fp32, one for 256 values.
The dtype of the scales tells these formats apart: `_older_values` decodes such states, and they are encoded anew. So are codes
whose groups begin elsewhere than those of the parameter, because other shards of columns were saved.
"""

from collections.abc import Collection
from typing import Any

import torch

from soul.distributed.shards import is_cut, laid_out_as, local
from soul.optim.options import ParamGroup, rounding_of
from soul.optim.scales import BYTES, check_state_shards, decoded, encoded, n_bytes, new_scales, same_groups, scales_shape
from soul_kernels.errors import argument_error
from soul_kernels.reference.rounding import draws_codes, from_bits, in_memory_order
from soul_kernels.tensors import same_layout

STATES = ("exp_avg", "hessian")
OLDER_GROUP = 256  # values that share a scale in the older format of 8-bit states
_OLDER = "state_dict: 8-bit states of the older format, with fp32 scales for 256 values, were encoded anew to the nearest code"
_OTHER_GROUPS = (
    "state_dict: 8-bit states were encoded anew to the nearest code: columns that were saved, or those of this process, are "
    "in shards that have groups of 32 values of their own; into the same shards they are loaded bit for bit"
)
NOISE = 2  # version of the noise; in version 1 each shard of a parameter drew noise of its own, all else was the same
ASSUMED_UPDATES = 1e6  # number of updates of h that is assumed if a checkpoint does not say: so many that no bias is left


def new_state(param: torch.Tensor, group: ParamGroup, counters: Collection[str]) -> dict[str, Any]:
    """Return the state of a parameter that has none, all zero.

    Args:
        param: the parameter.
        group: its options: ``state_dtype`` and ``param_rounding``.
        counters: names of the counters that the state has.

    Raises:
        ArgumentError: the parameter is a DTensor in shards that 8-bit states do not know.
    """
    m_dtype, h_dtype = _state_dtypes(param, group["state_dtype"])
    state = {name: torch.zeros((), dtype=torch.float32, device=local(param).device) for name in counters}
    for name, dtype in zip(STATES, (m_dtype, h_dtype)):
        state[name] = _empty(param, dtype, group).zero_()
        shape = scales_shape(param) if dtype == torch.uint8 else None
        if shape is not None:
            check_state_shards("a parameter", param)
            state[f"{name}_scale"] = placed(new_scales(param, shape), param, group)
    if rounding_of(group) == "compensated" and param.dtype != torch.float32:
        state["low_bits"] = _empty(param, torch.int8, group).zero_()
    return state


def device_of_states(param: torch.Tensor, group: ParamGroup) -> torch.device:
    """Return where m, h, their scales and low bits are: with the parameter or, with ``state_offload``, in main memory.

    Counters stay with the parameter in any case.

    Args:
        param: the parameter; of a DTensor, the shard.
        group: its options.
    """
    return torch.device("cpu") if group["state_offload"] and not param.is_meta else param.device


def _empty(param: torch.Tensor, dtype: torch.dtype, group: ParamGroup) -> torch.Tensor:
    """Return memory for a state laid out as its parameter, where `device_of_states` says; pinned if that is another device.

    For a DTensor it is a DTensor of the same mesh, whose shard is there.
    """
    device = device_of_states(local(param), group)
    pinned = device != local(param).device
    return torch.empty_like(
        param, dtype=dtype, device=device, pin_memory=pinned, memory_format=torch.preserve_format, requires_grad=False
    )


def placed(state: torch.Tensor, param: torch.Tensor, group: ParamGroup) -> torch.Tensor:
    """Return a state, or scales, where `device_of_states` says: the tensor itself if it is there already."""
    device = device_of_states(local(param), group)
    if device == local(state).device and (local(param).device == device or local(state).is_pinned()):
        return state
    pinned = device != local(param).device
    empty = torch.empty_like(state, device=device, pin_memory=pinned, memory_format=torch.preserve_format)
    return empty.copy_(state)


def _state_dtypes(param: torch.Tensor, state_dtype: str | None) -> tuple[torch.dtype, torch.dtype]:
    """Return the dtypes of ``exp_avg`` and ``hessian``; codes are uint8."""
    if state_dtype is None:
        return torch.bfloat16 if param.dtype == torch.bfloat16 else torch.float32, torch.float32
    if state_dtype == "8bit":
        dtype = torch.float32 if scales_shape(param) is None else torch.uint8
    else:
        dtype = getattr(torch, state_dtype)
    return dtype, dtype


def loaded_state(
    param: torch.Tensor, group: ParamGroup, counters: Collection[str], saved: dict[str, Any], cast: bool, notes: set[str]
) -> dict[str, Any]:
    """Return the state of a parameter from a checkpoint.

    Whole tensors of a checkpoint are cut as a parameter in shards is; every process must have them.

    Args:
        param: the parameter.
        group: its options, after loading.
        counters: names of the counters that the state has.
        saved: the state in the checkpoint.
        cast: bring states to the dtype of the group, as a checkpoint of the published class needs; otherwise they keep the
            dtype in which they were saved.
        notes: takes what the caller shall warn of.

    Raises:
        ArgumentError: the state is that of another optimizer or of another model; or it mixes codes and values.
    """
    if not all(name in saved for name in STATES):
        got = ", ".join(sorted(saved))
        remedy = "is it the checkpoint of another optimizer?"
        raise argument_error("state_dict", f"states {', '.join(STATES)}", got, remedy)
    state = new_state(param, group, counters)
    state["step"].fill_(float(saved.get("step", 0)))
    if "hessian_step" in state:
        state["hessian_step"].fill_(float(saved.get("hessian_step", ASSUMED_UPDATES if state["step"] > 0 else 0)))
    for name in STATES:
        _check_saved(name, param, saved)
        _load(name, param, group, state, saved, cast, notes)
    if "low_bits" in state and "low_bits" in saved:
        low = saved["low_bits"]
        if low.shape != param.shape or low.dtype != torch.int8:
            got = f"{tuple(low.shape)} of {low.dtype}"
            remedy = "load the checkpoint of this model"
            raise argument_error("state_dict low_bits", f"{tuple(param.shape)} of torch.int8", got, remedy)
        state["low_bits"].copy_(laid_out_as(state["low_bits"], low))
    return state


def _check_saved(name: str, param: torch.Tensor, saved: dict[str, Any]) -> None:
    """Raise unless a saved ``exp_avg`` or ``hessian`` fits its parameter and its scales."""
    value = saved[name]
    scale = f"{name}_scale"
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
        older = scale in saved and saved[scale].dtype == torch.float32
        count = -(-param.numel() // OLDER_GROUP) if older or scale not in saved else n_bytes(saved[scale], value) // BYTES
        per_scale = {torch.uint8: BYTES, torch.int16: 1, torch.float32: 1}
        if scale not in saved or saved[scale].numel() != count * per_scale.get(saved[scale].dtype, -1):
            got = f"{tuple(saved[scale].shape)} of {saved[scale].dtype}" if scale in saved else "none"
            remedy = "load the checkpoint of this model"
            raise argument_error(f"state_dict {scale}", f"{count} scales of torch.int16, or their bytes", got, remedy)


def _load(
    name: str,
    param: torch.Tensor,
    group: ParamGroup,
    state: dict[str, Any],
    saved: dict[str, Any],
    cast: bool,
    notes: set[str],
) -> None:
    """Put a saved ``exp_avg`` or ``hessian``, which fits, into a new state, in place."""
    value = saved[name]
    scale = f"{name}_scale"
    shape = scales_shape(param)
    cast_to = state[name].dtype
    values = None  # to be encoded anew, in fp32
    if value.dtype == torch.uint8:
        older = saved[scale].dtype == torch.float32
        fits = shape is not None and not older and same_groups(saved[scale], shape, param.dim())
        if shape is not None and fits and same_layout(value, state[name]):  # a scale belongs to 32 neighbours in memory
            scales = saved[scale] if saved[scale].dtype == torch.uint8 else saved[scale].contiguous().view(torch.uint8)
            new = new_scales(param, shape)
            state[scale] = placed(new.copy_(laid_out_as(new, scales.reshape(shape))), param, group)
        else:
            value = _older_values(value, saved[scale].to(value.device), name) if older else decoded(saved, name)
            values = None if shape is None else value  # without 8-bit states: kept as they are
            if shape is not None and (older or not fits):
                notes.add(_OLDER if older else _OTHER_GROUPS)
    elif cast and cast_to == torch.uint8:
        values = value
    if values is not None and shape is not None:
        empty = torch.empty_like(param, dtype=torch.float32, requires_grad=False)
        values = empty.copy_(laid_out_as(empty, values))
        state[name], state[scale] = (placed(tensor, param, group) for tensor in encoded(values, shape, name))
        return
    keeps_dtype = value.dtype == torch.uint8 or (not cast and value.dtype in (torch.float32, torch.bfloat16))
    dtype = value.dtype if keeps_dtype else cast_to
    if dtype != torch.uint8:
        state.pop(scale, None)
    state[name] = _empty(param, dtype, group)
    state[name].copy_(laid_out_as(state[name], value))


def _older_values(code: torch.Tensor, scale: torch.Tensor, name: str) -> torch.Tensor:
    """Return the fp32 values of codes in the older format: floats with 4 bits of exponent and 3 of mantissa (e4m3), or e5m3.

    Args:
        code: uint8, of any dense layout.
        scale: fp32 [ceil(numel / 256)], powers of two.
        name: "exp_avg", whose codes have a sign, or "hessian".
    """
    pattern = in_memory_order(code).to(torch.int32)
    scale = scale.repeat_interleave(OLDER_GROUP)[: code.numel()]
    if name == "exp_avg":
        values = from_bits((pattern & 0x7F) << 20) * 2.0**120 * scale
        values = torch.where(pattern > 127, -values, values)
    else:
        values = from_bits(pattern << 20) * 2.0**112 * scale
    return values.as_strided(code.shape, code.stride())


def check_noise(param: torch.Tensor, group: ParamGroup, saved_group: ParamGroup, state: dict[str, Any]) -> None:
    """Raise if a parameter would draw other noise than the run that wrote the checkpoint.

    Args:
        param: the parameter.
        group: its options, after loading.
        saved_group: the options in the checkpoint, with the version of its noise.
        state: the parameter's loaded state.

    Raises:
        ArgumentError: the version differs, and the parameter draws noise.
    """
    version = saved_group.get("noise", 1 if "state_dtype" in saved_group else NOISE)  # the published class draws none
    if version == NOISE or (version == 1 and not is_cut(param)):
        return
    h_dtype = state["hessian"].dtype
    draws = h_dtype == torch.bfloat16 or (h_dtype == torch.uint8 and draws_codes(group["betas"][1]))
    if (param.dtype != torch.float32 and rounding_of(group) != "nearest") or draws:
        remedy = f"resume with the soul-kernels that wrote it, or set noise = {NOISE} in its param_groups: new random bits"
        raise argument_error("state_dict noise", f"version {NOISE}", version, remedy)


def published_state(state: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of a state for the published class: the entries that it knows, with values in place of 8-bit codes."""
    published = {"step": state["step"].detach().to("cpu", torch.float32, copy=True)}
    for name in STATES:
        published[name] = decoded(state, name)
    return published

"""Argument errors: the name of the argument, what was expected, what came, and the remedy."""

import math

import torch

PARAM_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STATE_DTYPES = (torch.float32, torch.bfloat16)


class ArgumentError(ValueError):
    """Bad input, told as ``name: expected ..., got ...; remedy``. The command turns it into exit status 2."""


def argument_error(name, expected, got, remedy):
    """Returns the `ArgumentError` to raise."""
    return ArgumentError(f"{name}: expected {expected}, got {got}; {remedy}")


def check_range(name, value, *, low=0.0, high=None):
    """Raises unless ``low <= value < high``; without ``high``, any finite number from ``low`` on."""
    if not low <= value < (math.inf if high is None else high):  # catches NaN as well
        bound = f">= {low}" if high is None else f"in [{low}, {high})"
        raise argument_error(name, f"a number {bound}", value, "check the optimizer's arguments")


def check_choice(name, value, choices):
    """Raises unless ``value`` is one of ``choices``."""
    if value not in choices:
        known = ", ".join(repr(choice) for choice in choices)
        raise argument_error(name, f"one of {known}", repr(value), "choose one of these")


def is_dense(tensor):
    """Tells whether the elements fill one block of memory, each once, in whatever order of dimensions."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def same_layout(a, b):
    """Tells whether two tensors of one shape hold element i at the same offset."""
    return a.stride() == b.stride() or (a.is_contiguous() and b.is_contiguous())


def check_gradient(name, grad):
    """Raises for a sparse or complex gradient: neither has a place in an element-wise second-order step."""
    if grad.layout != torch.strided:
        raise argument_error(name, "a dense tensor", f"layout {grad.layout}", "use sparse=False in the embedding")
    if grad.is_complex():
        raise argument_error(name, "a real tensor", f"dtype {grad.dtype}", "pass torch.view_as_real(parameter)")


def check_tensor_lists(dtypes, **lists):
    """Checks lists of tensors that are walked together.

    Args:
        dtypes: name of a list -> the dtypes that its tensors may have.
        **lists: the lists by argument name. The first one sets length, shapes and devices of all, and its tensors must
            be dense (no gaps, no overlap) and be named once each.

    Raises:
        ValueError: naming the list and the index of the first tensor that does not fit.
    """
    lead_name, lead = next(iter(lists.items()))
    addresses = {}
    for name, tensors in lists.items():
        if len(tensors) != len(lead):
            raise argument_error(name, f"{len(lead)} tensors, as many as {lead_name}", len(tensors), "pass equal lists")
        for index, (first, tensor) in enumerate(zip(lead, tensors)):
            where = f"{name}[{index}]"
            if not isinstance(tensor, torch.Tensor):
                raise argument_error(where, "a tensor", type(tensor).__name__, f"leave it out of {lead_name} as well")
            check_gradient(where, tensor)
            if tensor.dtype not in dtypes[name]:
                names = ", ".join(str(d) for d in dtypes[name])
                raise argument_error(where, f"dtype {names}", tensor.dtype, "convert it first")
            if tensor.shape != first.shape:
                remedy = f"it must match {lead_name}[{index}]"
                raise argument_error(where, f"shape {tuple(first.shape)}", tuple(tensor.shape), remedy)
            if tensor.device != first.device:
                remedy = f"move it to where {lead_name}[{index}] is"
                raise argument_error(where, f"device {first.device}", tensor.device, remedy)
    for index, tensor in enumerate(lead):
        where = f"{lead_name}[{index}]"
        if not is_dense(tensor):
            got = f"shape {tuple(tensor.shape)} with strides {tensor.stride()}"
            raise argument_error(where, "dense strides (no gaps, no overlap)", got, "pass tensor.contiguous()")
        if tensor.numel():
            twin = addresses.setdefault(tensor.data_ptr(), index)
            if twin != index:
                got = f"the memory of {lead_name}[{twin}]"
                raise argument_error(where, "memory of its own", got, "pass a tied tensor once")


def check_state_layout(name, states, params):
    """Raises unless every state lies in memory as its parameter does."""
    for index, (state, param) in enumerate(zip(states, params)):
        if not same_layout(state, param):
            remedy = "create it with torch.zeros_like(param)"
            raise argument_error(f"{name}[{index}]", f"strides {param.stride()}", state.stride(), remedy)

"""Checks of the tensors that an op reads or writes: dtype, layout, device, overlap."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from soul_kernels.errors import argument_error
from soul_kernels.reference.rounding import GROUP

PARAM_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STATE_DTYPES = (torch.float32, torch.bfloat16, torch.uint8)  # uint8: codes of an 8-bit state


def is_dense(tensor: Tensor) -> bool:
    """Tell whether the elements fill one block of memory, each once, in any order of dimensions."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def has_data(tensor: Tensor) -> bool:
    """Tell whether a tensor has memory: a meta tensor or a fake tensor has neither an address nor values."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


def overlaps_itself(tensor: Tensor) -> bool:
    """Tell whether two elements of a tensor may lie at the same address, as in an expanded tensor."""
    reach = 0  # largest offset within the dimensions of smaller stride
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape) if n != 1):
        if stride <= reach:
            return tensor.numel() > 0
        reach += stride * (size - 1)
    return False


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Tell whether two tensors of the same shape hold each element at the same offset."""
    return a.stride() == b.stride() or (a.is_contiguous() and b.is_contiguous())


def check_gradient(name: str, grad: Tensor) -> None:
    """Raise if a tensor is sparse or complex: an elementwise second-order step supports neither."""
    if grad.layout != torch.strided:
        raise argument_error(name, "a dense tensor", f"layout {grad.layout}", "use sparse=False in the embedding")
    if grad.is_complex():
        raise argument_error(name, "a real tensor", f"dtype {grad.dtype}", "pass torch.view_as_real(parameter)")


def check_tensor_lists(
    dtypes: Mapping[str, Sequence[torch.dtype]], *, written: Sequence[str] = (), **lists: Sequence[Tensor]
) -> None:
    """Check lists of tensors that an op processes element by element.

    Args:
        dtypes: name of a list -> the dtypes that its tensors may have.
        written: names of the lists of tensors that the op changes. Such a tensor must have the layout of the first list's
            tensor, and must not overlap another one that the op changes.
        **lists: the lists by argument name. The first one sets length, shapes and devices of all. Its tensors must be dense
            (no gaps, no overlap within).

    Raises:
        ValueError: a tensor does not fit. The message names the list and the index.
    """
    lead_name, lead = next(iter(lists.items()))
    for name, tensors in lists.items():
        if len(tensors) != len(lead):
            raise argument_error(name, f"{len(lead)} tensors, as many as {lead_name}", len(tensors), "pass equal lists")
        for index, (first, tensor) in enumerate(zip(lead, tensors)):
            entry = f"{name}[{index}]"
            if not isinstance(tensor, torch.Tensor):
                raise argument_error(entry, "a tensor", type(tensor).__name__, f"leave it out of {lead_name} as well")
            check_gradient(entry, tensor)
            if tensor.dtype not in dtypes[name]:
                names = ", ".join(str(d) for d in dtypes[name])
                raise argument_error(entry, f"dtype {names}", tensor.dtype, "convert it first")
            if tensor.shape != first.shape:
                remedy = f"it must match {lead_name}[{index}]"
                raise argument_error(entry, f"shape {tuple(first.shape)}", tuple(tensor.shape), remedy)
            if tensor.device != first.device:
                remedy = f"move it to where {lead_name}[{index}] is"
                raise argument_error(entry, f"device {first.device}", tensor.device, remedy)
            if name == lead_name and not is_dense(tensor):
                got = f"shape {tuple(tensor.shape)} with strides {tensor.stride()}"
                raise argument_error(entry, "dense strides (no gaps, no overlap)", got, "pass tensor.contiguous()")
            if name in written and not same_layout(tensor, first):
                remedy = f"create it with torch.zeros_like({lead_name}[{index}])"
                raise argument_error(entry, f"strides {first.stride()}", tensor.stride(), remedy)
    check_overlap({name: tensors for name, tensors in lists.items() if name in written})


def check_overlap(lists: Mapping[str, Sequence[Tensor | None]]) -> None:
    """Raise if two of the dense tensors in the lists share memory: two programs would write to it at once."""
    spans: list[tuple[str, int, int, str, int]] = []
    for name, tensors in lists.items():
        for index, tensor in enumerate(tensors):
            if tensor is not None and tensor.numel() and has_data(tensor):
                begin = tensor.data_ptr()
                spans.append((str(tensor.device), begin, begin + tensor.numel() * tensor.element_size(), name, index))
    spans.sort()
    for (device, _, end, twin, twin_index), (other_device, begin, _, name, index) in zip(spans, spans[1:]):
        if device == other_device and begin < end:
            remedy = "pass a tied tensor once, and no views of one another"
            raise argument_error(f"{name}[{index}]", "memory of its own", f"the memory of {twin}[{twin_index}]", remedy)


def check_scales(name: str, scales: Sequence[Tensor | None] | None, states_name: str, states: Sequence[Tensor]) -> None:
    """Raise unless every 8-bit state has its scales, and no other state has any.

    They are ceil(numel / 32) int16, or as many pairs of bytes in uint8, in any shape.
    """
    for index, state in enumerate(states):
        scale = scales[index] if scales is not None and index < len(scales) else None
        entry = f"{name}[{index}]"
        count = -(-state.numel() // GROUP)
        if state.dtype != torch.uint8:
            if scale is not None:
                raise argument_error(
                    entry, f"None beside {state.dtype} in {states_name}", "a tensor", "pass scales for uint8 only"
                )
        elif not isinstance(scale, torch.Tensor):
            raise argument_error(
                entry, f"int16 scales of the uint8 {states_name}", type(scale).__name__, "pass one list entry each"
            )
        elif scale.numel() != {torch.int16: count, torch.uint8: 2 * count}.get(scale.dtype) or not scale.is_contiguous():
            got = f"{tuple(scale.shape)} of {scale.dtype}"
            raise argument_error(entry, f"({count},) of torch.int16", got, f"pass one scale for every {GROUP} values")
        elif scale.device != state.device:
            raise argument_error(entry, f"device {state.device}", scale.device, f"move it to where {states_name}[{index}] is")


def check_on_device(
    name: str, tensor: Any, devices: Sequence[torch.device], dtype: torch.dtype = torch.float32, numel: int = 1
) -> None:
    """Raise unless ``tensor`` is None, or has ``numel`` elements of ``dtype`` and is on the only device in ``devices``."""
    if tensor is None:
        return
    if not isinstance(tensor, torch.Tensor) or tensor.dtype != dtype or tensor.numel() != numel or not tensor.is_contiguous():
        got = f"{tuple(tensor.shape)} of {tensor.dtype}" if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise argument_error(name, f"{numel} elements of {dtype}", got, f"pass a contiguous tensor of {dtype}")
    if devices != [tensor.device]:
        expected = " and ".join(map(str, devices))
        raise argument_error(name, f"device {expected}", tensor.device, "call once for each device, with a tensor there")


def check_scalar(loss: Any) -> None:
    """Raise unless an objective has returned a tensor of shape ()."""
    if not isinstance(loss, torch.Tensor) or loss.dim() != 0:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
        raise argument_error("objective", "a loss of shape ()", got, "return a tensor, summed over tokens and sequences")

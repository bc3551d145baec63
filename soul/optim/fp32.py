"""Export and import of weights in fp32, for parameters whose rounding is "compensated".

A parameter in bf16 or fp16 holds the leading bits of its weight, and the int8 state ``low_bits`` the next 8. `joined` puts both
together in fp32, and `store_fp32` takes them apart again. Inside a ``with`` statement `Fp32Parameters` puts the fp32 values
into the parameters themselves. `check_not_exported` refuses calls that would mistake these values for stored parameters.
"""

import contextlib
from types import TracebackType
from typing import Any

import torch

from soul.distributed.shards import is_sharded, local
from soul_kernels.errors import argument_error
from soul_kernels.reference.rounding import join, split

NEAREST = 1 << 31  # the middle of the range of the noise, with which a weight is rounded to nearest


def joined(param: torch.Tensor, state: dict[str, Any]) -> torch.Tensor:
    """Return a copy of a parameter in fp32, with its low bits if its state has them; for a DTensor, of the local shard."""
    value = local(param.detach())
    check_not_exported("export_fp32", param, state)
    if "low_bits" in state:
        return join(value, local(state["low_bits"]).to(value.device))
    return value.to(torch.float32, copy=True)


def check_fp32(name: str, param: torch.Tensor, state: dict[str, Any], value: object) -> None:
    """Raise unless ``value`` can be stored in a parameter by `store_fp32`; ``name`` is its name in the error."""
    check_not_exported("import_fp32", param, state)
    if not isinstance(value, torch.Tensor) or value.dtype != torch.float32 or value.shape != local(param).shape:
        got = f"{tuple(value.shape)} of {value.dtype}" if isinstance(value, torch.Tensor) else type(value).__name__
        raise argument_error(name, f"{tuple(local(param).shape)} of torch.float32", got, "pass the values of export_fp32()")


def check_not_exported(name: str, param: torch.Tensor, state: dict[str, Any]) -> None:
    """Raise if a parameter holds the fp32 values of an export; ``name`` is the call to name in the error."""
    if "low_bits" in state and local(param).dtype == torch.float32:
        remedy = "leave the with statement of an export first"
        raise argument_error(name, "parameters in the dtype of training", "fp32 values beside low bits", remedy)


def store_fp32(param: torch.Tensor, state: dict[str, Any], value: torch.Tensor) -> None:
    """Store ``value`` in a parameter and, if its state has them, in its low bits, rounded to nearest; in place."""
    target = local(param.detach())
    value = value.detach().to(target.device)
    if "low_bits" not in state:
        target.copy_(value)
        return
    high, rest = split(value, torch.full((), NEAREST, device=target.device), target.dtype)
    target.copy_(high)
    local(state["low_bits"]).copy_(rest)


class Fp32Parameters(dict[torch.Tensor, torch.Tensor], contextlib.AbstractContextManager):
    """A dict, parameter -> its value in fp32; as a context manager it puts the values into the parameters for the block."""

    def __enter__(self) -> "Fp32Parameters":
        if any(is_sharded(param) for param in self):
            remedy = "the values are those of this process's shards: use the dict without with"
            raise argument_error("export_fp32", "whole parameters in a with statement", "DTensors", remedy)
        self._stored = {param: param.data for param in self}
        for param, value in self.items():
            param.data = value
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for param, value in self._stored.items():
            param.data = value
        del self._stored

"""Bundles: the arguments of the ops over lists of tensors, in few named tuples that check themselves.

`StepTensors` and `StepOptions` belong to `sophia_step`; `Noise` and `Guards` to `hessian_ema` as well. The ops also take the
fields as keywords (`with_fields`). A new option is a field here, with its bounds in ``check``.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypedDict, TypeVar

import torch
from torch import Tensor

from soul_kernels.errors import argument_error, check_choice, check_positive, check_range
from soul_kernels.reference.rounding import GROUP, salt
from soul_kernels.rounding import ROUNDINGS
from soul_kernels.tensors import (
    PARAM_DTYPES,
    STATE_DTYPES,
    check_on_device,
    check_overlap,
    check_scales,
    check_tensor_lists,
    same_layout,
)

EPS_MODES = ("add", "max")
# Options that may be tensors on the device -> the bit of the kernel's ON_DEVICE that is set where they are.
ON_DEVICE_BITS = {"lr": 1, "weight_decay": 2, "rho": 4, "bs": 8}


class Noise(NamedTuple):
    """Source of the noise of stochastic rounding, which is a hash of (seed, tensor, step, element).

    Attributes:
        seed: seed of the whole run. Without ``steps``, pass another one at every call.
        tensor_ids: one int per tensor, by which the hash tells tensors apart; None: the position in the list.
        tensor_offsets: one int per tensor. For a piece of a larger tensor it is the index of the piece's first element in the
            larger one, in memory order: pieces then draw the noise of the whole. With 8-bit states multiples of 32. None: 0.
        steps: fp32 [number of tensors] on the device, which sets the noise of this call apart from that of other calls.
    """

    seed: int = 0
    tensor_ids: Sequence[int] | None = None
    tensor_offsets: Sequence[int] | None = None
    steps: Tensor | None = None

    def salts(self, tensors: Sequence[Tensor]) -> list[int]:
        """Return one salt per tensor, from the seed and from the tensor's id."""
        numbers = range(len(tensors)) if self.tensor_ids is None else self.tensor_ids
        return [salt(self.seed, number) for number in numbers]

    def offsets(self, *states: Sequence[Tensor]) -> list[int]:
        """Return the index that each tensor's first element has in the noise.

        Args:
            states: lists of the tensors' states. With 8-bit states an offset must be a multiple of 32, so that a group of the
                piece is a group of the whole tensor.

        Raises:
            ValueError: ``tensor_offsets`` does not fit.
        """
        count = len(states[0])
        if self.tensor_offsets is None:
            return [0] * count
        if len(self.tensor_offsets) != count:
            expected = f"{count} integers, one a tensor"
            raise argument_error("tensor_offsets", expected, len(self.tensor_offsets), "pass 0 for a tensor that is whole")
        for index, offset in enumerate(self.tensor_offsets):
            unit = GROUP if any(each[index].dtype == torch.uint8 for each in states) else 1
            if isinstance(offset, bool) or not isinstance(offset, int) or not 0 <= offset < 2**62 or offset % unit:
                expected = f"a multiple of {GROUP}, the groups of 8-bit states," if unit > 1 else "an integer"
                remedy = "pass the number of the piece's first element in the whole tensor"
                raise argument_error(f"tensor_offsets[{index}]", f"{expected} from 0", repr(offset), remedy)
        return list(self.tensor_offsets)


class Guards(NamedTuple):
    """Factor and skip flag for gradients that are too large, scaled, or not finite.

    Both are read on the device, so the host does not wait for their values.

    Attributes:
        grad_factor: fp32 tensor of one element; the gradients are multiplied by it. None: 1.
        skip: fp32 tensor of one element; unless it is 0, nothing is changed. None: 0.
    """

    grad_factor: Tensor | None = None
    skip: Tensor | None = None

    def check(self, devices: Sequence[torch.device]) -> None:
        """Raise unless each is None or one fp32 number on the only device in ``devices``."""
        check_on_device("grad_factor", self.grad_factor, devices)
        check_on_device("skip", self.skip, devices)


class LooseFields(TypedDict, total=False):
    """The fields of `Noise` and `Guards` as keywords of an op."""

    seed: int
    tensor_ids: Sequence[int] | None
    tensor_offsets: Sequence[int] | None
    steps: Tensor | None
    grad_factor: Tensor | None
    skip: Tensor | None


DEFAULT_NOISE = Noise()


NO_GUARDS = Guards()


Bundle = TypeVar("Bundle", bound=NamedTuple)


def with_fields(bundle: Bundle, keywords: dict[str, Any]) -> Bundle:
    """Move the keywords that are fields of a bundle out of ``keywords``; return the bundle with their values."""
    fields = {name: keywords.pop(name) for name in bundle._fields if name in keywords}
    return bundle._replace(**fields) if fields else bundle


def refuse_unknown_keywords(function: str, keywords: dict[str, Any]) -> None:
    """Raise Python's TypeError for an unknown keyword, if any is left after the fields of all bundles have been taken out."""
    if keywords:
        raise TypeError(f"{function}() got an unexpected keyword argument {next(iter(keywords))!r}")


class StepTensors(NamedTuple):
    """The tensors of a Sophia step: lists in which one index belongs to one parameter.

    Attributes:
        params: dense tensors, any shapes, fp32, bf16 or fp16; mutated.
        grads: tensors of the same shapes, fp32, bf16 or fp16; not changed.
        exp_avgs: momenta m, fp32, bf16 or 8-bit (uint8), laid out as the parameters; mutated.
        hessians: diagonal Hessian estimates h, of the dtypes and layout of ``exp_avgs``; mutated with ``beta2`` only.
        low_bits: int8 tensors, laid out as the parameters, for "compensated" rounding; an entry is None for an fp32 parameter.
            Mutated.
        exp_avg_scales: ceil(numel / 32) int16 each, or their bytes, in any shape: the scales of 8-bit momenta; mutated.
        hessian_scales: the same of 8-bit Hessians; mutated with ``beta2`` only.
    """

    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    exp_avgs: Sequence[Tensor]
    hessians: Sequence[Tensor]
    low_bits: Sequence[Tensor | None] | None = None
    exp_avg_scales: Sequence[Tensor | None] | None = None
    hessian_scales: Sequence[Tensor | None] | None = None


def check_numbers(numbers: Mapping[str, float | Tensor]) -> int:
    """Raise ValueError if an option of `StepOptions.numbers` is out of its bounds; return the ON_DEVICE_BITS of the tensors."""
    on_device = 0
    for name, value in numbers.items():
        if isinstance(value, Tensor):
            on_device |= ON_DEVICE_BITS[name]
        elif name == "bs":
            check_positive("bs", value, "pass the number of predictions in the batch behind h")
        else:
            check_range(name, value)
    return on_device


def check_numbers_on_device(numbers: Mapping[str, float | Tensor], devices: Sequence[torch.device]) -> None:
    """Raise ValueError unless every option that is a tensor fits and is on the one device in ``devices``."""
    for name, value in numbers.items():
        if isinstance(value, Tensor):
            check_on_device(name, value, devices)


class StepOptions(NamedTuple):
    """The hyper-parameters of a Sophia step.

    Attributes:
        lr: learning rate, >= 0. This, ``weight_decay``, ``rho`` and ``bs`` may be an fp32 tensor of one element on the
            parameters' device instead; it is then read there, and its value is not checked.
        beta1: decay of the momentum, in [0, 1).
        rho: scale of the clipping threshold, >= 0 (the paper's gamma).
        bs: number of predictions in the batch that produced h, > 0.
        eps: added to the denominator, >= 0.
        weight_decay: decoupled weight decay, >= 0.
        beta2: decay of the Hessian estimate, in [0, 1); None leaves it as it is.
        maximize: ascend instead of descend.
        eps_mode: "add" as in the published code, or "max" as in the papers: the denominator is ``max(rho * bs * h, eps)``.
        param_rounding: "nearest", "stochastic" or "compensated"; fp32 parameters are stored exactly in any case.
        corrections: fp32 [number of tensors] on the device: h is divided by it, for instance by ``1 - beta2^t``.
    """

    lr: float | Tensor
    beta1: float
    rho: float | Tensor
    bs: float | Tensor
    eps: float = 1e-15
    weight_decay: float | Tensor = 0.0
    beta2: float | None = None
    maximize: bool = False
    eps_mode: str = "add"
    param_rounding: str = "nearest"
    corrections: Tensor | None = None

    def numbers(self) -> dict[str, float | Tensor]:
        """Return the options that may live on the device, by name."""
        return {"lr": self.lr, "weight_decay": self.weight_decay, "rho": self.rho, "bs": self.bs}

    def check(self) -> int:
        """Raise ValueError if an option is out of its bounds; return the ON_DEVICE_BITS of the options that are tensors."""
        on_device = check_numbers(self.numbers())
        check_range("eps", self.eps)
        check_range("beta1", self.beta1, high=1.0)
        if self.beta2 is not None:
            check_range("beta2", self.beta2, high=1.0)
        check_choice("param_rounding", self.param_rounding, ROUNDINGS)
        check_choice("eps_mode", self.eps_mode, EPS_MODES)
        return on_device

    def check_on_device(self, on_device: int, devices: Sequence[torch.device], n_tensors: int) -> None:
        """Raise ValueError unless every option that is a tensor fits and is on the one device in ``devices``."""
        if on_device:
            check_numbers_on_device(self.numbers(), devices)
        check_on_device("corrections", self.corrections, devices, numel=n_tensors)


class LooseStepFields(LooseFields, total=False):
    """The fields of the bundles that `sophia_step` takes as keywords beside its named parameters."""

    low_bits: Sequence[Tensor | None] | None
    exp_avg_scales: Sequence[Tensor | None] | None
    hessian_scales: Sequence[Tensor | None] | None
    maximize: bool
    eps_mode: str
    corrections: Tensor | None


def check_step_tensors(tensors: StepTensors, param_rounding: str) -> None:
    """Raise ValueError unless the tensors fit together."""
    params = tensors.params
    check_tensor_lists(
        {"params": PARAM_DTYPES, "grads": PARAM_DTYPES, "exp_avgs": STATE_DTYPES, "hessians": STATE_DTYPES},
        written=("params", "exp_avgs", "hessians"),
        params=params,
        grads=tensors.grads,
        exp_avgs=tensors.exp_avgs,
        hessians=tensors.hessians,
    )
    _check_low_bits(params, tensors.low_bits, param_rounding)
    check_scales("exp_avg_scales", tensors.exp_avg_scales, "exp_avgs", tensors.exp_avgs)
    check_scales("hessian_scales", tensors.hessian_scales, "hessians", tensors.hessians)


def _check_low_bits(params: Sequence[Tensor], low_bits: Sequence[Tensor | None] | None, param_rounding: str) -> None:
    """Raise ValueError unless exactly the parameters below fp32 have low bits, with "compensated" rounding only."""
    if param_rounding != "compensated":
        if low_bits is not None:
            raise argument_error("low_bits", "None", "a list", f"{param_rounding!r} rounding has none")
        return
    low_bits = [None] * len(params) if low_bits is None else low_bits
    if len(low_bits) != len(params):
        raise argument_error("low_bits", f"{len(params)} tensors, as many as params", len(low_bits), "pass equal lists")
    for index, (param, low) in enumerate(zip(params, low_bits)):
        name = f"low_bits[{index}]"
        if param.dtype == torch.float32:
            if low is not None:
                raise argument_error(name, "None beside an fp32 parameter", "a tensor", "fp32 parameters have no low bits")
        elif not isinstance(low, Tensor) or low.dtype != torch.int8 or low.shape != param.shape:
            got = f"{tuple(low.shape)} of {low.dtype}" if isinstance(low, Tensor) else type(low).__name__
            raise argument_error(name, f"{tuple(param.shape)} of torch.int8", got, "torch.zeros_like(p, dtype=torch.int8)")
        elif low.device != param.device or not same_layout(low, param):
            got = f"{low.stride()} on {low.device}"
            raise argument_error(
                name, f"strides {param.stride()} on {param.device}", got, "torch.zeros_like(p, dtype=torch.int8)"
            )
    check_overlap({"params": params, "low_bits": low_bits})

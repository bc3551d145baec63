"""Models whose linear layers are stored in 4 bits by bitsandbytes, as a frozen base of adapters (QLoRA, arXiv 2305.14314).

The layers multiply by themselves: bitsandbytes dequantizes a weight where it is used, forward and backward. Only the head is
taken apart by this library, which needs its weight as numbers: `dequantized`.
"""

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from soul._extras import require
from soul.distributed.shards import is_in_codes, is_sharded
from soul_kernels.errors import ArgumentError, argument_error

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig

EXTRA = "quant"
PACKS = "support_avx512bf16_for_cpu"  # attribute of a layer of bitsandbytes
PACKED = "original_qshape"  # attribute of the state of a weight that it has packed, and perhaps unpacked
BLOCK = 64  # weights with a scale of one byte
SUPERBLOCK = 256  # scales with a scale of their own in fp32
TABLES = 4 * (16 + 256 + 1)  # bytes beside each weight: the values of codes, those of scales, and their offset, in fp32


def four_bit(dtype: torch.dtype) -> "BitsAndBytesConfig":
    """Return the ``quantization_config`` of QLoRA: nf4 with quantized scales, products in ``dtype``.

    Raises:
        MissingExtra: bitsandbytes or accelerate is not installed.
    """
    for module in ("bitsandbytes", "accelerate"):
        require(module, EXTRA)
    options: dict[str, Any] = dict(bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)
    return require("transformers", "hf").BitsAndBytesConfig(load_in_4bit=True, **options)


def four_bit_bytes(numel: int) -> int:
    """Return the bytes of a weight as `four_bit` stores it: half a byte for an element, scales, and tables."""
    n_scales = math.ceil(numel / BLOCK)
    return math.ceil(numel / 2) + n_scales + 4 * math.ceil(n_scales / SUPERBLOCK) + TABLES


def is_quantized(model: torch.nn.Module) -> bool:
    """Tell whether a model has quantized weights: transformers says so, or a weight has a state of bitsandbytes."""
    return bool(getattr(model, "is_quantized", False)) or any(map(is_in_codes, model.parameters()))


def keep_codes(model: torch.nn.Module) -> None:
    """Keep the codes of a model as its file has them: bitsandbytes never packs them anew, and nobody has cut them.

    On a CPU with AVX512-BF16, bitsandbytes 0.50 replaces the codes of a layer by packed ones at its first forward in eval mode
    without gradient. Widths that are no multiple of 64 fail there, `dequantize_4bit` reads packed codes as if they were not
    packed, and the scales stay rounded to bf16 when training unpacks them. This is the one place that prevents it: it sets
    ``support_avx512bf16_for_cpu`` of each layer to False.

    Raises:
        ArgumentError: a layer is packed already. Or tensor parallelism has cut codes: a scale belongs to 64 codes in the order
            of memory, whatever the rows are, and bitsandbytes multiplies by whole weights.
    """
    for name, parameter in model.named_parameters():
        if is_sharded(parameter) and not parameter.dtype.is_floating_point:
            remedy = "a cut parts codes from their scales: cut its head alone, along the vocabulary, or load the base in bf16"
            raise argument_error("model", "codes of 4 bits that are whole in each process", f"a shard of {name}", remedy)
        _check_unpacked(parameter, name)
    for layer in model.modules():
        if hasattr(layer, PACKS):
            setattr(layer, PACKS, False)


def _check_unpacked(weight: Tensor, name: str = "a weight") -> None:
    if hasattr(getattr(weight, "quant_state", None), PACKED):
        got = f"{name}, packed for AVX512-BF16 by a forward before this call, which has rounded its scales"
        remedy = "load the model again, and call soul.models.quantized.keep_codes(model) before its first forward"
        raise argument_error("model", "codes of 4 bits as its file has them", got, remedy)


def dequantized(weight: Tensor) -> Tensor:
    """Return a weight of 4 bits as a new tensor, in the dtype it had before; a weight of any floating dtype as it is.

    Raises:
        ArgumentError: it is quantized in another way, or packed (`keep_codes`).
    """
    state = getattr(weight, "quant_state", None)
    if state is not None:
        _check_unpacked(weight)
        return require("bitsandbytes.functional", EXTRA).dequantize_4bit(weight.detach(), state)
    if not weight.is_floating_point():
        got = f"{type(weight).__name__} of {weight.dtype}"
        remedy = "its values are not known here: leave the head out of the quantization (llm_int8_skip_modules=['lm_head'])"
        raise argument_error("model", "a head of floating point, or of 4 bits of bitsandbytes", got, remedy)
    return weight


def cannot_merge_error() -> ArgumentError:
    """Return the `ArgumentError` for adapters that are to be merged into weights of 4 bits, which would round them away."""
    why = "4 bits would round them away"
    remedy = "leave it out; merge the saved adapters into the unquantized model: PeftModel.from_pretrained(model, output)"
    return argument_error("merge", "False with a quantized model", "True", f"{why}: {remedy}.merge_and_unload()")


def check_codes(model: torch.nn.Module) -> None:
    """Raise unless the codes of a quantized model, if it has any, are those that several processes leave whole.

    Raises:
        ArgumentError: the model is quantized by another library than bitsandbytes, or to another number of bits than 4.
    """
    if is_quantized(model) and not any(map(is_in_codes, model.parameters())):
        config = getattr(model.config, "quantization_config", None)
        of = config if isinstance(config, dict) else vars(config) if config is not None else {}
        method = of.get("quant_method", "another library")
        bits = " of 8 bits" if of.get("load_in_8bit") or of.get("_load_in_8bit") else ""
        remedy = "FSDP2 would cut them apart from their scales: run one process, or quantize to 4 bits with bitsandbytes"
        expected = "weights in 4 bits of bitsandbytes, or none in codes, in several processes"
        raise argument_error("model", expected, f"codes{bits} of {getattr(method, 'value', method)}", remedy)


def scales(name: str, weight: Tensor) -> dict[str, Tensor]:
    """Return what decides the values of a weight of 4 bits beside its codes; {} for other weights.

    Args:
        name: name of the weight; those of the result begin with it.
        weight: the weight.
    """
    state = getattr(weight, "quant_state", None)
    return {} if state is None else {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}

"""Loading of models and tokenizers from directories and from the hub, without running code that comes with them."""

import contextlib
import pathlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from soul._connection import hub_asked_once
from soul._extras import MissingExtra, require
from soul.models.adapters import load_adapters
from soul.models.causal_lm import check_linear_head
from soul.models.files import adapter_config_of, check_directory, config_of
from soul.models.quantized import four_bit, is_quantized
from soul.output.notices import filtered
from soul.output.progress import bars_of_transformers, task, track
from soul_kernels.errors import ArgumentError, argument_error, check_choice

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str = "auto") -> torch.device:
    """Return the ``torch.device`` of "auto" (a GPU where there is one), "cpu" or "cuda".

    Raises:
        ArgumentError: another name, or "cuda" without a GPU.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise argument_error("device", "auto, cpu or cuda", name, "choose one of these")
    if name == "cuda" and not torch.cuda.is_available():
        raise argument_error("device", "a GPU for cuda", "none that torch can use", "check the driver, or use cpu")
    return torch.device("cuda" if torch.cuda.is_available() and name != "cpu" else "cpu")


def check_name(name: str | pathlib.Path) -> None:
    """Raise if a name is the path of something else than a model or adapters; read no weights.

    Raises:
        ArgumentError: there is no configuration in that directory, or no such directory.
    """
    looks_local = str(name).startswith((".", "/", "~")) or pathlib.Path(name).exists()
    has_file = any((pathlib.Path(name) / file).is_file() for file in ("config.json", "adapter_config.json"))
    if looks_local and not has_file:
        raise argument_error("model", "a directory with config.json, or a hub name", str(name), "check the path")


def is_stored_in_codes(name: str | pathlib.Path) -> bool:
    """Tell whether the files of a model, or of the one below adapters, are quantized; no weights are read.

    False where there is no such model: `load` says so.
    """
    revision = None
    try:
        with hub_asked_once("model", name):
            adapter_config = adapter_config_of(name)
        if adapter_config is not None:
            name, revision = adapter_config["base_model_name_or_path"], adapter_config.get("revision")
        with hub_asked_once("model", name):
            config = config_of(name, revision)
    except (OSError, ValueError):
        return False
    return bool(config.get("quantization_config"))


@filtered()
def load(
    name: str | pathlib.Path,
    *,
    dtype: str = "float32",
    device: torch.device | str = "cpu",
    mapped: bool = False,
    weights: bool = True,
    load_in_4bit: bool = False,
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """Load a model and its tokenizer from a directory or a hub name; with LoRA adapters, also the model that they name.

    Code that comes with a model is never run: weights are safetensors or, in old repositories, tensors only
    (``weights_only=True``, the default of transformers), and `soul.models.files` checks the configurations first.

    Args:
        name: directory, or name on the hub.
        dtype: "float32", "bfloat16" or "float16", of the parameters.
        device: where to put the model.
        mapped: whether weights on a CPU may stay views of their files, which processes then share. This is for a caller that
            copies them at once. False: the model does not depend on its files afterwards.
        weights: False: no weights are read, and the model is on the meta device, for a process that gets the values of another
            one (`soul.distributed.scatter`). A model with adapters is read all the same.
        load_in_4bit: quantize the linear layers but the head by `soul.models.quantized.four_bit`; below adapters too. Files
            that are quantized need no option.

    Raises:
        ArgumentError: there is no such model, some of its weights are missing, it has more layers than its configuration, its
            files ask for code or for more than `soul.models.files` allows, or `check_linear_head` refuses it.
    """
    with task(f"load {name}", stays=True):
        return _load(name, dtype, device, mapped, weights, load_in_4bit)


def _load(
    name: str | pathlib.Path, dtype: str, device: torch.device | str, mapped: bool, weights: bool, load_in_4bit: bool
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    transformers = require("transformers", "hf")
    check_choice("dtype", dtype, tuple(DTYPES))
    check_name(name)
    try:
        with hub_asked_once("model", name):
            adapter_config = adapter_config_of(name)
            tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
            if adapter_config is None and not weights:
                return _empty_model(name, DTYPES[dtype]), tokenizer
            if adapter_config is None:
                model = _load_model(name, DTYPES[dtype], device, load_in_4bit)
            else:
                base_model = _load_base(adapter_config, DTYPES[dtype], device, load_in_4bit)
                model = load_adapters(name, adapter_config, base_model, tokenizer)
    except (ArgumentError, MissingExtra):
        raise
    except Exception as error:  # the libraries raise many kinds for a broken or foreign checkpoint
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        remedy = "check the name; docs/models.md lists the families that are in"
        raise argument_error("model", "a causal language model", f"{name} ({reason})", remedy) from error
    if not is_quantized(model):
        model.to(device)
    if not mapped:
        _unmap(model)
    check_linear_head(model)
    return model, tokenizer


@torch.no_grad()
def _unmap(model: torch.nn.Module) -> None:
    """Copy the tensors that are still views of the file they were loaded from, one at a time.

    Transformers maps safetensors into memory. If the file were overwritten, the weights would change; if it were truncated, the
    process would end by SIGBUS.
    """
    for tensor in track([*model.parameters(), *model.buffers(), *scales_of(model)], "reading weights"):
        if not tensor.untyped_storage().resizable():  # a mapped file cannot grow
            tensor.data = tensor.data.clone()


def scales_of(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Yield the tensors that a model quantized by bitsandbytes has beside its parameters."""
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        while state is not None:  # the scales may be quantized too
            yield from (value for value in vars(state).values() if isinstance(value, torch.Tensor))
            state = getattr(state, "state2", None)


def _load_base(
    adapter_config: dict[str, Any], dtype: torch.dtype, device: torch.device | str, load_in_4bit: bool
) -> "PreTrainedModel":
    """Load the model below adapters."""
    base = adapter_config["base_model_name_or_path"]
    revision = adapter_config.get("revision")
    with hub_asked_once("model", base):
        if adapter_config_of(base, revision) is not None:
            got = f"{base}, which has adapters itself"
            remedy = "merge those into their model first"
            raise argument_error("adapter_config.json, base_model_name_or_path", "a model", got, remedy)
        return _load_model(base, dtype, device, load_in_4bit, revision)


def _load_model(
    name: str | pathlib.Path,
    dtype: torch.dtype,
    device: torch.device | str,
    load_in_4bit: bool,
    revision: str | None = None,
) -> "PreTrainedModel":
    """Load a model without adapters, and refuse it unless the checkpoint has exactly the weights of the configuration.

    A quantized one is put on the device, any other one on the CPU.
    """
    check_directory(name)
    config = config_of(name, revision)
    transformers = require("transformers", "hf")
    options: dict[str, Any] = {}
    if load_in_4bit:
        options["quantization_config"] = four_bit(dtype)
    if load_in_4bit or config.get("quantization_config"):
        options["device_map"] = {"": device}
    with bars_of_transformers(transformers.utils.logging):
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, revision=revision, trust_remote_code=False, output_loading_info=True, **options
        )
    missing = sorted(info["missing_keys"])  # transformers has drawn these at random, with a warning
    if missing:
        got = f"{name} without {missing[0]} ({len(missing)} missing)"
        remedy = "was it saved to the end, and by this family?"
        raise argument_error("model", "a checkpoint with all weights of its configuration", got, remedy)
    layers = {_without_numbers(key) for key in model.state_dict()}
    # Weights of layers that the configuration lacks. For other weights, such as a vision tower's, transformers warns.
    extra = sorted(key for key in info["unexpected_keys"] if _without_numbers(key) in layers)
    if extra:
        got = f"{name} with {extra[0]} ({len(extra)} more)"
        remedy = "is num_hidden_layers of config.json right?"
        raise argument_error("model", "a checkpoint with the layers of its configuration", got, remedy)
    return model


def _empty_model(name: str | pathlib.Path, dtype: torch.dtype) -> "PreTrainedModel":
    """Return the model of a directory or a hub name on the meta device; only its configuration is read."""
    check_directory(name)
    config_of(name)
    transformers = require("transformers", "hf")
    config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    with contextlib.suppress(OSError):  # there is none
        model.generation_config = transformers.GenerationConfig.from_pretrained(name)
    return model.eval()


def _without_numbers(key: str) -> str:
    return ".".join("#" if name.isdigit() else name for name in key.split("."))

"""The properties of a model that decide memory and time: the shapes of its parameters, and the widths of a layer."""

import collections
import dataclasses
import difflib
import functools
import math
import os
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypedDict

import torch

from soul._connection import hub_asked_once
from soul._extras import require
from soul.distributed.vocabulary import can_look_up
from soul.models.files import check_config, config_of
from soul.output.notices import filtered
from soul_kernels.errors import ArgumentError, argument_error

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


@dataclasses.dataclass(frozen=True)
class Shape:
    """A causal language model, without its weights.

    Attributes:
        name: name for messages and tables.
        hidden: width D of the hidden states.
        intermediate: inner width of an MLP.
        layers: number of layers.
        heads: number of heads of the queries.
        kv_heads: number of heads of keys and values.
        head_dim: width of a head.
        vocab: rows V of the language-model head.
        head_width: columns of the language-model head.
        gated: whether an MLP has two input matrices, as in Llama.
        tied: whether the head is the embedding.
        parameters: name -> shape of every parameter; a tied one counts once.
        linear: name -> (out, in) of the weights of linear layers, without the head.
        supports_checkpointing: whether the family can recompute its layers.
        embedding: (rows, columns) of the input embeddings; None if their layer does more than look up rows.
    """

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    head_width: int
    gated: bool
    tied: bool
    parameters: dict[str, tuple[int, ...]] = dataclasses.field(repr=False)
    linear: dict[str, tuple[int, int]] = dataclasses.field(repr=False)
    supports_checkpointing: bool = True
    embedding: tuple[int, int] | None = None

    @functools.cached_property
    def numel(self) -> int:
        """Number of parameters."""
        return sum(map(math.prod, self.parameters.values()))

    @functools.cached_property
    def linear_numel(self) -> int:
        """Number of parameters in linear layers, without the head."""
        return sum(n_out * n_in for n_out, n_in in self.linear.values())

    @functools.cached_property
    def outside_numel(self) -> int:
        """Number of parameters outside the layers: embeddings, the last norm, a head that is not tied."""
        return sum(math.prod(size) * count for size, count in self.sizes["rest"].items())

    @functools.cached_property
    def sizes(self) -> dict[str, "collections.Counter[tuple[int, ...]]"]:
        """Group ("linear" or "other" in the layers, "rest" outside of them) -> shape of a parameter -> number of such ones."""
        sizes: dict[str, collections.Counter[tuple[int, ...]]] = {
            key: collections.Counter() for key in ("linear", "other", "rest")
        }
        for name, size in self.parameters.items():
            sizes["rest" if not _in_layer(name) else "linear" if name in self.linear else "other"][size] += 1
        return sizes

    @property
    def layer_numel(self) -> float:
        """Number of parameters in a layer, on average."""
        return (self.numel - self.outside_numel) / self.layers

    @property
    def head_numel(self) -> int:
        """Number of parameters in the head."""
        return self.vocab * self.head_width


def _in_layer(name: str) -> bool:
    return any(word.isdigit() for word in name.split("."))  # the number of the layer is in the name


class LlamaSizes(TypedDict):
    """The sizes that define a model of the Llama family: the arguments of `llama` without the name."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool


def llama(
    name: str, *, hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocab: int, tied: bool
) -> Shape:
    """Return the `Shape` of a model of the Llama family; the head dimension is ``hidden / heads``."""
    width = hidden // heads
    matrices = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv_heads * width, hidden),
        "self_attn.v_proj": (kv_heads * width, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }
    norms = ("input_layernorm", "post_attention_layernorm")
    parameters: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    linear: dict[str, tuple[int, int]] = {}
    for layer in range(layers):
        linear |= {f"model.layers.{layer}.{matrix}.weight": shape for matrix, shape in matrices.items()}
        parameters |= {f"model.layers.{layer}.{norm}.weight": (hidden,) for norm in norms}
    parameters |= linear
    parameters["model.norm.weight"] = (hidden,)
    if not tied:
        parameters["lm_head.weight"] = (vocab, hidden)
    return Shape(
        name=name,
        hidden=hidden,
        intermediate=intermediate,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=width,
        vocab=vocab,
        head_width=hidden,
        gated=True,
        tied=tied,
        parameters=parameters,
        linear=linear,
        embedding=(vocab, hidden),
    )


# Published configurations.
PRESETS: dict[str, LlamaSizes] = {
    "llama-3.2-1b": dict(hidden=2048, intermediate=8192, layers=16, heads=32, kv_heads=8, vocab=128256, tied=True),
    "llama-2-7b": dict(hidden=4096, intermediate=11008, layers=32, heads=32, kv_heads=32, vocab=32000, tied=False),
    "llama-3.1-8b": dict(hidden=4096, intermediate=14336, layers=32, heads=32, kv_heads=8, vocab=128256, tied=False),
    "llama-3-70b": dict(hidden=8192, intermediate=28672, layers=80, heads=64, kv_heads=8, vocab=128256, tied=False),
}
SHORT_NAMES = {"1b": "llama-3.2-1b", "7b": "llama-2-7b", "8b": "llama-3.1-8b", "70b": "llama-3-70b"}


def shape_of(
    model: "Shape | str | os.PathLike[str] | Mapping[str, Any] | PretrainedConfig | torch.nn.Module",
) -> Shape:
    """Return the `Shape` of a model.

    Args:
        model: a `Shape`; the name of a preset ("llama-2-7b", or "7b"); a directory or a hub name, from which only the
            configuration is read; a configuration of transformers, or its dict, with ``model_type``; or a loaded model.

    Raises:
        ArgumentError: ``model`` is none of these, or not a causal language model.
    """
    if isinstance(model, Shape):
        return model
    if isinstance(model, (str, os.PathLike)):
        name = SHORT_NAMES.get(str(model), str(model))
        if name in PRESETS:
            return llama(name, **PRESETS[name])
        return _shape_of_model(empty_model(read_config(model)), str(model))
    if hasattr(model, "named_parameters"):
        return _shape_of_model(model, type(model).__name__)
    return _shape_of_model(empty_model(model), None)


def read_config(name: str | os.PathLike[str]) -> "PretrainedConfig":
    """Return the configuration of a directory or a hub name; no code that comes with it is run.

    Raises:
        ArgumentError: there is no configuration, or `soul.models.files.check_config` refuses it.
    """
    transformers = require("transformers", "hf")
    looks_local = str(name).startswith((".", "/", "~")) or pathlib.Path(name).exists()
    expected = f"a directory with config.json, a hub name, or one of {', '.join(PRESETS)}"
    if looks_local and not (pathlib.Path(name) / "config.json").is_file():
        raise argument_error("model", expected, str(name), "check the path")
    similar = difflib.get_close_matches(str(name).lower(), PRESETS)
    if similar and not looks_local and "/" not in str(name):
        raise argument_error("model", expected, str(name), f"did you mean {' or '.join(similar)}?")
    try:
        with hub_asked_once("model", name):
            config_of(name)  # checks it
            return transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    except ArgumentError:
        raise
    except Exception as error:  # the libraries raise many kinds for a name that is unknown
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        raise argument_error("model", expected, f"{name} ({reason})", "check the name") from error


@filtered()
def empty_model(config: "Mapping[str, Any] | PretrainedConfig") -> "PreTrainedModel":
    """Return a model of transformers on the meta device, which takes no memory, from a configuration or its dict.

    Raises:
        ArgumentError: it is not the configuration of a causal language model.
    """
    transformers = require("transformers", "hf")
    if isinstance(config, dict):
        if "model_type" not in config:
            got = ", ".join(config) or "nothing"
            raise argument_error("model", "a configuration with model_type", got, "for instance model_type='llama'")
        check_config(config)
        options = {key: value for key, value in config.items() if key != "model_type"}
        try:
            config = transformers.AutoConfig.for_model(config["model_type"], **options)
        except ValueError as error:
            got = repr(config["model_type"])
            raise argument_error("model_type", "a family of transformers", got, "check the name") from error
    try:
        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except ValueError as error:
        got = type(config).__name__
        raise argument_error("model", "the configuration of a causal language model", got, "check the model") from error


def _shape_of_model(model: "PreTrainedModel", name: str | None) -> Shape:
    """Return the `Shape` of a model of transformers, loaded or on the meta device."""
    config = model.config.get_text_config()
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None:
        raise argument_error("model", "a language-model head", type(model).__name__, "this family is not supported")
    linear = {}
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if weight is not None and weight.dim() == 2 and module is not head and "Embedding" not in type(module).__name__:
            transposed = type(module).__name__ == "Conv1D"  # GPT-2
            linear[f"{path}.weight"] = tuple(weight.shape[::-1] if transposed else weight.shape)
    heads = getattr(config, "num_attention_heads", None)
    hidden = config.hidden_size
    if not (heads and linear and config.num_hidden_layers):
        remedy = "this family is not planned"
        raise argument_error("model", "layers with attention heads", type(config).__name__, remedy)
    inner_widths = (getattr(config, key, None) for key in ("intermediate_size", "ffn_dim", "n_inner"))
    return Shape(
        name=name or config.model_type,
        hidden=hidden,
        intermediate=next((width for width in inner_widths if width), 4 * hidden),
        layers=config.num_hidden_layers,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or hidden // heads,
        vocab=head.weight.shape[0],
        head_width=head.weight.shape[1],
        gated=any("gate" in path for path in linear),
        tied=head.weight is embeddings.weight,
        parameters={path: tuple(parameter.shape) for path, parameter in model.named_parameters()},
        linear=linear,
        supports_checkpointing=model.supports_gradient_checkpointing,
        embedding=tuple(embeddings.weight.shape) if can_look_up(embeddings) else None,
    )

"""What of a model decides memory and time: the shapes of its parameters, and the widths of a layer."""

import dataclasses
import math
import os
import pathlib

from soul._extras import require
from soul.models.files import check_config, config_of
from soul_kernels.errors import ArgumentError, argument_error


@dataclasses.dataclass(frozen=True)
class Shape:
    """A causal language model, without its weights.

    Attributes:
        name: what to call it.
        hidden: width D of the hidden states.
        intermediate: width of the inside of an MLP.
        layers: how many.
        heads: of the queries.
        kv_heads: of keys and values.
        head_dim: width of one.
        vocab: rows V of the head.
        head_width: columns of the head.
        gated: an MLP has two matrices into its inside, as in Llama.
        tied: the head is the embedding.
        parameters: name -> shape of every parameter, one that is tied once.
        linear: name -> (out, in) of the weights of linear layers, but for the head.
        supports_checkpointing: whether the family can compute its layers again.
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
    parameters: dict = dataclasses.field(repr=False)
    linear: dict = dataclasses.field(repr=False)
    supports_checkpointing: bool = True

    @property
    def numel(self):
        """How many parameters."""
        return sum(map(math.prod, self.parameters.values()))

    @property
    def linear_numel(self):
        """How many of them are in linear layers, without the head."""
        return sum(out * inside for out, inside in self.linear.values())

    @property
    def outside_numel(self):
        """How many are outside of the layers: embeddings, the last norm, a head that is not tied."""
        return sum(math.prod(size) for name, size in self.parameters.items() if not _in_layer(name))

    @property
    def layer_numel(self):
        """How many are in a layer, on average."""
        return (self.numel - self.outside_numel) / self.layers

    @property
    def head_numel(self):
        """How many are in the head."""
        return self.vocab * self.head_width


def _in_layer(name):
    return any(part.isdigit() for part in name.split("."))  # its number is in the name


def llama(name, *, hidden, intermediate, layers, heads, kv_heads, vocab, tied):
    """The `Shape` of a model of the Llama family; the head dimension is ``hidden / heads``."""
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
    parameters, linear = {"model.embed_tokens.weight": (vocab, hidden)}, {}
    for layer in range(layers):
        linear |= {f"model.layers.{layer}.{matrix}.weight": shape for matrix, shape in matrices.items()}
        parameters |= {f"model.layers.{layer}.{norm}.weight": (hidden,) for norm in norms}
    parameters |= linear | {"model.norm.weight": (hidden,)}
    if not tied:
        parameters["lm_head.weight"] = (vocab, hidden)
    return Shape(name, hidden, intermediate, layers, heads, kv_heads, width, vocab, hidden, True, tied, parameters, linear)


# Published configurations.
PRESETS = {
    "llama-3.2-1b": dict(hidden=2048, intermediate=8192, layers=16, heads=32, kv_heads=8, vocab=128256, tied=True),
    "llama-2-7b": dict(hidden=4096, intermediate=11008, layers=32, heads=32, kv_heads=32, vocab=32000, tied=False),
    "llama-3.1-8b": dict(hidden=4096, intermediate=14336, layers=32, heads=32, kv_heads=8, vocab=128256, tied=False),
    "llama-3-70b": dict(hidden=8192, intermediate=28672, layers=80, heads=64, kv_heads=8, vocab=128256, tied=False),
}
SHORT = {"1b": "llama-3.2-1b", "7b": "llama-2-7b", "8b": "llama-3.1-8b", "70b": "llama-3-70b"}


def shape_of(model):
    """The `Shape` of whatever says what a model is.

    Args:
        model: a `Shape`; the name of a preset ("llama-2-7b", or "7b"); a directory or a hub name, of which the configuration
            alone is read; a configuration of transformers, or its dict, with ``model_type``; or a model that is loaded.

    Raises:
        ArgumentError: it is none of these, or not a causal language model.
    """
    if isinstance(model, Shape):
        return model
    if isinstance(model, (str, os.PathLike)):
        name = SHORT.get(str(model), str(model))
        if name in PRESETS:
            return llama(name, **PRESETS[name])
        return _of_model(empty_model(read_config(model)), str(model))
    if hasattr(model, "named_parameters"):
        return _of_model(model, type(model).__name__)
    return _of_model(empty_model(model), None)


def read_config(name):
    """The configuration of a directory or a hub name; no code that comes with it is run.

    Raises:
        ArgumentError: there is none, or `soul.models.files.check_config` refuses it.
    """
    transformers = require("transformers", "hf")
    looks_local = str(name).startswith((".", "/", "~")) or pathlib.Path(name).exists()
    if looks_local and not (pathlib.Path(name) / "config.json").is_file():
        expected = f"a directory with config.json, a hub name, or one of {', '.join(PRESETS)}"
        raise argument_error("model", expected, str(name), "check the path")
    try:
        config_of(name)  # checks it
        return transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    except ArgumentError:
        raise
    except Exception as error:  # whatever the libraries below say of a name that is none
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        expected = f"a directory, a hub name, or one of {', '.join(PRESETS)}"
        raise argument_error("model", expected, f"{name} ({reason})", "check the name") from error


def empty_model(config):
    """A model of transformers without memory for its weights, from a configuration or its dict.

    Raises:
        ArgumentError: it is not that of a causal language model.
    """
    transformers, torch = require("transformers", "hf"), require("torch", "hf")
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


def _of_model(model, name):
    """The `Shape` of a model of transformers, with or without memory."""
    config = model.config.get_text_config()
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None:
        raise argument_error("model", "a language-model head", type(model).__name__, "this family is not supported")
    linear = {}
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if weight is not None and weight.dim() == 2 and module not in (head,) and "Embedding" not in type(module).__name__:
            transposed = type(module).__name__ == "Conv1D"  # GPT-2
            linear[f"{path}.weight"] = tuple(weight.shape[::-1] if transposed else weight.shape)
    heads, hidden = getattr(config, "num_attention_heads", None), config.hidden_size
    if not (heads and linear and config.num_hidden_layers):
        got, remedy = type(config).__name__, "this family is not planned"
        raise argument_error("model", "layers with attention heads", got, remedy)
    inside = next((v for n in ("intermediate_size", "ffn_dim", "n_inner") if (v := getattr(config, n, None))), 4 * hidden)
    return Shape(
        name=name or config.model_type,
        hidden=hidden,
        intermediate=inside,
        layers=config.num_hidden_layers,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or hidden // heads,
        vocab=head.weight.shape[0],
        head_width=head.weight.shape[1],
        gated=any("gate" in path for path in linear),
        tied=head.weight is embedding.weight,
        parameters={path: tuple(parameter.shape) for path, parameter in model.named_parameters()},
        linear=linear,
        supports_checkpointing=model.supports_gradient_checkpointing,
    )

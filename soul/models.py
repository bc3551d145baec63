"""Hugging Face causal language models, seen as a body that yields hidden states and a linear head."""

import contextlib
import pathlib

import torch

from soul._extras import require
from soul_kernels import linear_logprob
from soul_kernels._checks import argument_error, check_choice

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name="auto"):
    """``torch.device`` of "auto" (a GPU where there is one), "cpu" or "cuda".

    Raises:
        ArgumentError: another name, or "cuda" without a GPU.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise argument_error("device", "auto, cpu or cuda", name, "choose one of these")
    if name == "cuda" and not torch.cuda.is_available():
        raise argument_error("device", "a GPU for cuda", "none that torch can use", "check the driver, or use cpu")
    return torch.device("cuda" if torch.cuda.is_available() and name != "cpu" else "cpu")


def load(name, *, dtype="float32", device="cpu"):
    """Loads model and tokenizer from a directory or a hub name.

    Code that comes with a model is never run: weights are safetensors or, in old repositories, tensors only
    (``weights_only=True``, the default of transformers).

    Args:
        name: directory, or name on the hub.
        dtype: "float32", "bfloat16" or "float16", of the parameters.
        device: where to put the model.

    Raises:
        ArgumentError: there is no such model, or its logits are not a linear map of its hidden states.
    """
    transformers = require("transformers", "hf")
    check_choice("dtype", dtype, tuple(DTYPES))
    looks_local = str(name).startswith((".", "/", "~")) or pathlib.Path(name).exists()
    if looks_local and not (pathlib.Path(name) / "config.json").is_file():
        raise argument_error("model", "a directory with config.json, or a hub name", str(name), "check the path")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=DTYPES[dtype], trust_remote_code=False)
    except Exception as error:  # whatever the libraries below say of a broken or foreign checkpoint
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        raise argument_error("model", "a causal language model", f"{name} ({reason})", "check the name") from error
    model.to(device)
    check_linear_head(model)
    return model, tokenizer


def head(model):
    """Weight [V, D] and bias [V] (or None) of the language-model head."""
    layer = model.get_output_embeddings()
    return layer.weight, getattr(layer, "bias", None)


def transform(model):
    """How the products of hidden states and head become logits, as keyword arguments of the ops: scaled and soft-capped."""
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None)  # Cohere
    divisor = getattr(config, "logits_scaling", None)  # Granite
    return {
        "logit_scale": float(scale or 1.0) / float(divisor or 1.0),
        "softcap": getattr(config, "final_logit_softcapping", None) or None,  # Gemma 2
    }


def hidden_states(model, batch):
    """Final hidden states [B, T, D], those that go into the head: after the last norm and any projection."""
    body = model.base_model
    return body(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).last_hidden_state


def autocast(model):
    """bf16 autocast for fp32 models on a GPU; nothing elsewhere. Parameters, and so updates, stay in fp32."""
    parameter = next(model.parameters())
    if parameter.is_cuda and parameter.dtype == torch.float32:
        return torch.autocast("cuda", dtype=torch.bfloat16)
    return contextlib.nullcontext()


def token_logps(model, batch, backend="auto"):
    """Log-probability of every label of a batch, [B, T], differentiable."""
    weight, bias = head(model)
    with autocast(model):
        hidden = hidden_states(model, batch)
        return linear_logprob(hidden, weight, batch.labels, bias=bias, rows=batch.rows, backend=backend)


@torch.no_grad()
def check_linear_head(model):
    """Raises unless the model's own logits are ``hidden @ weight.T + bias``, by trying it on a few tokens.

    Soft-capped (Gemma 2) and scaled (Cohere, Granite) logits do not pass: their probabilities would come out wrong. A cap is
    looked up as well, because small logits do not show it.
    """
    remedy = "models that cap or scale their logits are not supported"
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    if cap:
        raise argument_error("model", "logits = hidden @ weight.T + bias", f"final_logit_softcapping {cap}", remedy)
    layer = model.get_output_embeddings()
    family = type(model).__name__
    if layer is None or not hasattr(layer, "weight"):
        raise argument_error("model", "a linear language-model head", family, "this family is not supported")
    device = next(model.parameters()).device
    ids = torch.arange(8, device=device)[None] % layer.weight.shape[0]
    training = model.training
    model.eval()
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    expected = model(input_ids=ids, use_cache=False).logits.float()
    model.train(training)
    got = layer(hidden).float() if hidden.shape[-1] == layer.weight.shape[1] else None
    scale = expected.abs().max().clamp(min=1e-6)
    if got is None or got.shape != expected.shape or (got - expected).abs().max() > 1e-2 * scale:
        raise argument_error("model", "logits = hidden @ weight.T + bias", f"other logits in {family}", remedy)

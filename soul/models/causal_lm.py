"""Hugging Face causal language models, seen as a body that yields hidden states and a linear head."""

import contextlib
import math
import pathlib
import sys
import types
import warnings

import torch

from soul._extras import MissingExtra, require
from soul.distributed.processes import Processes, gathered, is_finite
from soul.models.files import MAX_RANK, adapters_of, check_directory, check_patterns, config_of
from soul_kernels import Head, LinearOptions, linear_gnb, linear_logprob, linear_statistics
from soul_kernels.errors import ArgumentError, argument_error, check_choice, check_positive, check_range, check_whole
from soul_kernels.reference.token_logprob import transformed
from soul_kernels.tokens import IGNORE_INDEX

COMPILE = {}  # options of torch.compile
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


def load(name, *, dtype="float32", device="cpu", mapped=False):
    """Loads model and tokenizer from a directory or a hub name; of LoRA adapters with the model that they name.

    Code that comes with a model is never run: weights are safetensors or, in old repositories, tensors only
    (``weights_only=True``, the default of transformers), and `soul.models.files` has looked at the configurations before.

    Args:
        name: directory, or name on the hub.
        dtype: "float32", "bfloat16" or "float16", of the parameters.
        device: where to put the model.
        mapped: on a CPU, weights may stay views of their files, which processes then share; for a caller that copies them at
            once. False: the model does not depend on its files afterwards.

    Raises:
        ArgumentError: there is no such model, weights of it are missing, it has more layers than its configuration, its files
            ask for code or for more than `soul.models.files` allows, or `check_linear_head` refuses it.
    """
    transformers = require("transformers", "hf")
    check_choice("dtype", dtype, tuple(DTYPES))
    looks_local = str(name).startswith((".", "/", "~")) or pathlib.Path(name).exists()
    has_file = any((pathlib.Path(name) / file).is_file() for file in ("config.json", "adapter_config.json"))
    if looks_local and not has_file:
        raise argument_error("model", "a directory with config.json, or a hub name", str(name), "check the path")
    try:
        adapters = adapters_of(name)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        if adapters is None:
            model = _load_model(name, DTYPES[dtype])
        else:
            base, revision = adapters["base_model_name_or_path"], adapters.get("revision")
            if adapters_of(base, revision) is not None:
                got, remedy = f"{base}, which has adapters itself", "merge those into their model first"
                raise argument_error("adapter_config.json, base_model_name_or_path", "a model", got, remedy)
            model = _load_adapters(name, adapters, _load_model(base, DTYPES[dtype], revision), tokenizer)
    except (ArgumentError, MissingExtra):
        raise
    except Exception as error:  # whatever the libraries below say of a broken or foreign checkpoint
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        raise argument_error("model", "a causal language model", f"{name} ({reason})", "check the name") from error
    model.to(device)
    if not mapped:
        _unmap(model)
    check_linear_head(model)
    return model, tokenizer


@torch.no_grad()
def _unmap(model):
    """Copy what is still a view of the file that it was loaded from, one tensor at a time. Transformers maps safetensors into
    memory; if the file were overwritten the weights would change, and if it were truncated the process would end by SIGBUS.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if not tensor.untyped_storage().resizable():  # a mapped file cannot grow
            tensor.data = tensor.data.clone()


def _load_model(name: str, dtype: torch.dtype, revision: str | None = None) -> torch.nn.Module:
    """Load a model without adapters, all weights of it."""
    check_directory(name)
    config_of(name, revision)
    options = dict(dtype=dtype, revision=revision, trust_remote_code=False, output_loading_info=True)
    model, info = require("transformers", "hf").AutoModelForCausalLM.from_pretrained(name, **options)
    missing = sorted(info["missing_keys"])  # which transformers draws at random, with a warning
    if missing:
        got, remedy = f"{name} without {missing[0]} ({len(missing)} missing)", "was it saved to the end, and by this family?"
        raise argument_error("model", "a checkpoint with all weights of its configuration", got, remedy)
    layers = {_without_numbers(key) for key in model.state_dict()}
    beyond = sorted(key for key in info["unexpected_keys"] if _without_numbers(key) in layers)
    if beyond:  # of a layer that is one too many; other ones, as of a vision tower, transformers tells of
        got, remedy = f"{name} with {beyond[0]} ({len(beyond)} more)", "is num_hidden_layers of config.json right?"
        raise argument_error("model", "a checkpoint with the layers of its configuration", got, remedy)
    return model


def _without_numbers(key: str) -> str:
    return ".".join("#" if part.isdigit() else part for part in key.split("."))


def _load_adapters(name: str, config: dict, model: torch.nn.Module, tokenizer) -> torch.nn.Module:
    """Load LoRA adapters, whose configuration has been checked, onto their model."""
    peft = require("peft", "hf")
    check_patterns(config, [path for path, _ in model.named_modules()])
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:  # new tokens, which the adapters come with
        model.resize_token_embeddings(len(tokenizer))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys")  # they would start anew
        return peft.PeftModelForCausalLM.from_pretrained(model, name)


def add_adapters(model, *, rank, alpha=None, dropout=0.0, targets="all-linear"):
    """LoRA adapters (Hu et al. 2021, arXiv 2106.09685) on a model, which is frozen: ``W x + (alpha / rank) B A x``, B of zeros.

    Args:
        model: is changed in place.
        rank: rows of A.
        alpha: scale; None: twice the rank.
        dropout: of what goes into A.
        targets: names of the linear layers, a list, or "all-linear": all but the head.

    Returns:
        The model wrapped by peft; the adapters are fp32.

    Raises:
        ArgumentError: a number is not what it may be, or there are no such layers.
    """
    peft = require("peft", "hf")
    check_rank(rank)
    check_range("lora_dropout", dropout, high=1.0)
    if alpha is not None:
        check_positive("lora_alpha", alpha, "twice the rank is common")
    for target in () if isinstance(targets, str) else targets:  # peft asks for one that matches, and leaves others aside
        if not any(is_named(path, target) for path, _ in model.named_modules()):
            raise argument_error("lora_targets", "linear layers of the model", repr(target), "check the names")
    options = dict(r=rank, lora_alpha=2 * rank if alpha is None else alpha, lora_dropout=dropout, target_modules=targets)
    try:
        return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options))
    except ValueError as error:
        raise argument_error("lora_targets", "linear layers of the model", f"{targets} ({error})", "check the names") from error


def is_named(path, target):
    """Tells whether peft takes a module for one of this name."""
    return f".{path}".endswith(f".{target}")


def check_rank(rank):
    """Raises unless adapters can have this rank."""
    check_whole("lora_rank", rank, "16 is common", high=MAX_RANK + 1)


def trained(model):
    """The parameters that require a gradient, a list.

    Raises:
        ArgumentError: there are none.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    if not params:
        remedy = "unfreeze some, or add adapters; a model of saved adapters is frozen: merge them first"
        raise argument_error("model", "parameters that require a gradient", "none", remedy)
    return params


def has_adapters(model):
    """Tells whether a model is wrapped by peft (LoRA and its kin)."""
    return hasattr(model, "disable_adapter")


def head(model):
    """Weight [V, D] and bias [V] (or None) of the language-model head; of a peft model the one that is in use.

    Raises:
        ArgumentError: an adapter is added to the head's products, so that its weight is not the whole head.
    """
    layer = model.get_output_embeddings()
    if has_adapters(model) and hasattr(layer, "base_layer"):
        remedy = "leave the head out of target_modules; modules_to_save trains it as a whole"
        raise argument_error("model", "a language-model head without an adapter", type(layer).__name__, remedy)
    if getattr(layer, "disable_adapters", False) and hasattr(layer, "original_module"):
        layer = layer.original_module  # peft before 0.14 shows the copy while adapters are off
    return layer.weight, getattr(layer, "bias", None)


def transform(model):
    """Return how products of hidden states and head become logits, as keyword arguments of `soul_kernels.Head`.

    Raises:
        ArgumentError: the model's configuration has no finite number there.
    """
    config = model.config.get_text_config()
    scale, divisor, cap = (_number(config, name) for name in ("logit_scale", "logits_scaling", "final_logit_softcapping"))
    return {  # of Cohere, of Granite, of Gemma 2
        "logit_scale": (scale or 1.0) / (divisor or 1.0),
        "softcap": cap or None,
    }


def _number(config, name: str) -> float | None:
    """Return a number of a model's configuration; None where there is none."""
    value = getattr(config, name, None)
    try:
        number = math.nan if isinstance(value, (str, bool)) else None if value is None else float(value)
    except (TypeError, OverflowError):
        number = math.nan
    if number is not None and not math.isfinite(number):
        remedy = "fix the model's config.json"
        raise argument_error(name, "a finite number", repr(value)[:40], remedy)
    return number


def hidden_states(model, batch):
    """Final hidden states [B, T, D], those that go into the head: after the last norm and any projection."""
    body = _body(model)
    with _never_packed() if batch.attention_mask is None else contextlib.nullcontext():
        return body(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).last_hidden_state


@contextlib.contextmanager
def _never_packed():
    """Meanwhile transformers does not look for several sequences in one row. It would wait for the device, which cannot be in
    the capture of a graph; or, where it knows of the capture, build a mask, which the fast attention kernels do not take.
    """
    masking, name = sys.modules.get("transformers.masking_utils"), "find_packed_sequence_indices"
    look = getattr(masking, name, None)
    if look is not None:
        setattr(masking, name, lambda *_, **__: None)
    try:
        yield
    finally:
        if look is not None:
            setattr(masking, name, look)


def autocast(model):
    """bf16 autocast for fp32 models on a GPU; nothing elsewhere. Parameters, and so updates, stay in fp32."""
    parameter = next(model.parameters())
    if parameter.is_cuda and parameter.dtype == torch.float32:
        return torch.autocast("cuda", dtype=torch.bfloat16)
    return contextlib.nullcontext()


def bare(model: torch.nn.Module) -> torch.nn.Module:
    """Return the model inside wrappers with a ``module`` (DDP, DeepSpeed)."""
    while isinstance(getattr(model, "module", None), torch.nn.Module):
        model = model.module
    return model


def _base(model):
    return model.get_base_model() if has_adapters(model) else model


def _body(model):
    """What yields the hidden states. The prefix by which transformers finds it names no part of some models (Llama 4)."""
    base = _base(model)
    return base.model if base.base_model is base else base.base_model


def check_checkpointing(model):
    """Raises unless the model can compute the inside of its layers again in the backward pass.

    Raises:
        ArgumentError: its family cannot.
    """
    if not _base(model).supports_gradient_checkpointing:
        got, remedy = type(_base(model)).__name__, "leave it out, and lower the batch size"
        raise argument_error("gradient_checkpointing", "a family that supports it", got, remedy)


@contextlib.contextmanager
def checkpointing(model):
    """Meanwhile one hidden state a layer is kept, in training mode, and the rest computed again in the backward pass: less
    memory for a third more time, the same numbers, dropout included. Afterwards it is as it was before.
    """
    base = _base(model)
    before = any(getattr(module, "gradient_checkpointing", False) for module in base.modules())
    _switch(base, "enable")({"use_reentrant": False})  # the other kind needs inputs with gradients, which LoRA does not have
    try:
        yield
    finally:
        if not before:
            _switch(base, "disable")()


@contextlib.contextmanager
def compiled(model):
    """Meanwhile the model's body, what yields the hidden states, runs under ``torch.compile``; its parameters keep their names.
    Where shapes change it is compiled once more, for any shape. Afterwards it is as the caller had it, compiled or not.
    """
    body = _body(model)
    before = body._compiled_call_impl  # there is no public way back
    body.compile(**COMPILE)
    try:
        yield
    finally:
        body._compiled_call_impl = before


def _switch(base, what):
    # The name before transformers 5.
    return getattr(base, f"activation_checkpointing_{what}", None) or getattr(base, f"gradient_checkpointing_{what}")


@contextlib.contextmanager
def evaluating(model):
    """Evaluation mode, without gradients; afterwards every module is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.no_grad():
            yield model.eval()
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def as_reference(model):
    """The model as the reference of its own training: `evaluating`, and with the adapters of a peft model switched off."""
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with evaluating(model), model.disable_adapter() if has_adapters(model) else contextlib.nullcontext():
            yield model
    finally:
        for parameter, requires_grad in trainable:  # peft switches these along with its adapters
            parameter.requires_grad_(requires_grad)


def token_logps(model, batch, backend="auto"):
    """Log-probability of every label of a batch, [B, T], differentiable."""
    return _at_head(linear_logprob, model, batch, backend)


def token_statistics(model, batch, backend="auto"):
    """`soul_kernels.TokenStatistics` of every label of a batch, [B, T] each, without gradient."""
    return _at_head(linear_statistics, model, batch, backend)


def _at_head(op, model, batch, backend):
    def compute():
        weight, bias = head(model)
        with autocast(model):
            hidden = hidden_states(model, batch)
            options = LinearOptions(token_indices=batch.rows, backend=backend)
            return op(hidden, Head(weight, bias, **transform(model)), batch.labels, options=options)

    return gathered(model, compute)


def gnb_loss(model, batch, *, generator=None, backend="auto"):
    """Mean negative log-likelihood of labels drawn from the model, at the labelled tokens of a batch, [], differentiable: the
    loss of `soul.curvature.GNB`.
    """

    def compute():
        weight, bias = head(model)
        with autocast(model):
            hidden = hidden_states(model, batch)
            keep = batch.labels != IGNORE_INDEX
            options = LinearOptions(token_indices=batch.rows, backend=backend)
            own_head = Head(weight, bias, **transform(model))
            return linear_gnb(hidden, own_head, keep, generator=generator, options=options)[0]

    return gathered(model, compute)


def check_weights(model):
    """Raises for a parameter, trained or frozen, that has NaN or inf: no run mends it, and every loss would be NaN."""
    processes = Processes.of(model)
    broken = next((name for name, parameter in model.named_parameters() if not is_finite(parameter)), None)
    broken = next((name for name in processes.gather(broken) if name is not None), None)
    if broken is not None:
        remedy = "load a model that is whole; was it saved by a run that diverged?"
        raise argument_error("model", "finite weights", f"NaN or inf in {broken}", remedy)


def check_linear_head(model):
    """Raises unless the model's own logits are ``softcap tanh(logit_scale (hidden @ weight.T + bias) / softcap)``, by trying it
    on a few tokens.

    Their hidden states are enlarged on the way into the head, until logits reach 100: small ones would not show a cap.
    """
    family, layer = type(model).__name__, model.get_output_embeddings()
    if layer is None or not hasattr(layer, "weight"):
        raise argument_error("model", "a linear language-model head", family, "this family is not supported")
    (weight, bias), options = head(model), transform(model)
    if weight.is_meta:  # the empty model of a plan has no values to try
        return
    ids = torch.arange(8, device=weight.device)[None] % len(weight)
    given = dict(input_ids=ids, attention_mask=torch.ones_like(ids))
    with evaluating(model):
        hidden = hidden_states(model, types.SimpleNamespace(**given))
        agree = hidden.shape[-1] == weight.shape[1]
        if agree:
            largest = abs(options["logit_scale"]) * torch.nn.functional.linear(hidden, weight, bias).abs().max().float()
            enlarge = max(1.0, 100.0 / largest.clamp(min=1e-6).item())
            got = transformed(torch.nn.functional.linear(hidden * enlarge, weight, bias).float(), **options)
            hook = layer.register_forward_pre_hook(lambda _, inputs: (inputs[0] * enlarge, *inputs[1:]))
            try:
                expected = model(**given, use_cache=False).logits.float()
            finally:
                hook.remove()
            if not expected.isfinite().all():
                check_weights(model)
                got, remedy = f"NaN or inf from {family}", "are the weights whole, and within the range of their dtype?"
                raise argument_error("model", "finite logits", got, remedy)
            agree = got.shape == expected.shape and (got - expected).abs().max() <= 1e-2 * expected.abs().max()
    if not agree:
        raise other_logits(model)


def other_logits(model: torch.nn.Module) -> ArgumentError:
    """Return the `ArgumentError` for a model that does more between hidden states and logits than `transform` knows."""
    formula = "logits = softcap tanh(logit_scale (hidden @ weight.T + bias) / softcap)"
    return argument_error("model", formula, f"other logits in {type(model).__name__}", "this family is not supported")

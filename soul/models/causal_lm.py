"""Hugging Face causal language models, seen as a body that yields hidden states and a linear head.

The fused losses take hidden states and head apart, so the model's own forward pass through the head is not used. This is right
only if the hidden states are the inputs of the head, the logits are ``softcap tanh(logit_scale (hidden @ weight.T + bias) /
softcap)``, and `transform` finds scale and cap in the configuration. `check_linear_head` tries all three on the model itself. A
family for which they do not hold must be refused, not approximated.

A new family usually needs no change. Where it names its scale or cap otherwise, extend `transform`; where transformers does not
say which module is the body, extend `_body`; and add a tiny model of it to tests/support/models.py.
"""

import contextlib
import math
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar, cast

import torch
from torch import Tensor

from soul.distributed.processes import COMPUTE, Processes, full, gathered, is_finite, reshard, sharded_layers
from soul.distributed.shards import is_sharded, local, splits
from soul.models.quantized import dequantized, is_quantized, keep_codes
from soul_kernels import Head, LinearOptions, TokenStatistics, linear_gnb, linear_logprob, linear_statistics
from soul_kernels.errors import ArgumentError, argument_error
from soul_kernels.reference.token_logprob import transformed
from soul_kernels.tokens import IGNORE_INDEX, Transform

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from transformers import PretrainedConfig, PreTrainedModel

    from soul.data.batches import Batch

T = TypeVar("T")
COMPILE: dict[str, Any] = {}  # options of torch.compile
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # of Gemma 2, RecurrentGemma, xLSTM


class ModelInputs(Protocol):
    """Inputs of the body, as `soul.data.batches.Batch` has them: token ids [B, T], and a mask [B, T] or None."""

    @property
    def input_ids(self) -> Tensor: ...  # noqa: D102

    @property
    def attention_mask(self) -> Tensor | None: ...  # noqa: D102


def trained(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Return the parameters that require a gradient.

    Raises:
        ArgumentError: there are none; or the model is quantized and has no adapters, so that these would be a few of its own.
    """
    if is_quantized(model) and not has_adapters(model):
        remedy = "train adapters on it: adapters={'rank': 16}, or --lora-rank 16"
        raise argument_error("model", "weights that can be trained", "quantized ones, which have no gradient", remedy)
    params = [p for p in model.parameters() if p.requires_grad]
    if not params:
        remedy = "unfreeze some, or add adapters; a model of saved adapters is frozen: merge them first"
        raise argument_error("model", "parameters that require a gradient", "none", remedy)
    return params


def has_adapters(model: torch.nn.Module) -> bool:
    """Tell whether a model is wrapped by peft (LoRA and its kin)."""
    return hasattr(model, "disable_adapter")


def head(model: "PreTrainedModel") -> tuple[Tensor, Tensor | None]:
    """Return weight [V, D] and bias [V] (or None) of the language-model head; for a peft model, those in use.

    A head of 4 bits is dequantized by every call.

    Raises:
        ArgumentError: an adapter is added to the head's products, so that its weight is not the whole head; or the head is
            quantized in another way.
    """
    weight, bias = stored_head(model)
    return dequantized(weight), bias


def stored_head(model: "PreTrainedModel") -> tuple[Tensor, Tensor | None]:
    """Return weight and bias of the head as the model stores them: as `head` does, and a weight of 4 bits as its codes."""
    layer = model.get_output_embeddings()
    if has_adapters(model) and hasattr(layer, "base_layer"):
        remedy = "leave the head out of target_modules; modules_to_save trains it as a whole"
        raise argument_error("model", "a language-model head without an adapter", type(layer).__name__, remedy)
    if getattr(layer, "disable_adapters", False) and hasattr(layer, "original_module"):
        layer = layer.original_module  # peft before 0.14 shows the copy while adapters are off
    return layer.weight, getattr(layer, "bias", None)


def lm_head(model: "PreTrainedModel") -> Head:
    """Return the head with scale and cap, as the ops of ``soul_kernels`` take it beside this process's tokens.

    Of a model in shards it is to be called within `soul.distributed.processes.gathered`.
    """
    weight, bias = head(model)
    return Head(weight, bias, **transform(model), own_tokens=is_sharded(weight) and hasattr(model, COMPUTE))


def transform(model: "PreTrainedModel") -> Transform:
    """Return scale and soft cap of a model's logits, as keyword arguments of `soul_kernels.Head`.

    Raises:
        ArgumentError: the model's configuration has a scale or cap that is no finite number.
    """
    config = model.config.get_text_config()
    scale = _number(config, "logit_scale")  # of Cohere
    divisor = _number(config, "logits_scaling")  # of Granite
    caps = [_number(config, name) for name in CAPS]
    return {"logit_scale": (scale or 1.0) / (divisor or 1.0), "softcap": next(filter(None, caps), None)}


def _number(config: "PretrainedConfig", name: str) -> float | None:
    """Return a number of a model's configuration; None where it is not set."""
    value = getattr(config, name, None)
    if value is None:
        return None
    try:
        number = math.nan if isinstance(value, (str, bool)) else float(value)
    except (TypeError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise argument_error(name, "a finite number", repr(value)[:40], "fix the model's config.json")
    return number


def hidden_states(model: "PreTrainedModel", batch: ModelInputs) -> Tensor:
    """Return the final hidden states [B, T, D], which are the inputs of the head: after the last norm and any projection.

    A batch with ``pads_right`` goes without its mask through a model that `attends_back_only`: the fast attention kernels take
    none, and transformers waits for the device to look at it. Tokens then have the same states, and padding has others.
    """
    body = _body(model)
    mask = batch.attention_mask
    if getattr(batch, "pads_right", False) and attends_back_only(body):
        mask = None
    with _never_packed() if mask is None else contextlib.nullcontext():
        return body(input_ids=batch.input_ids, attention_mask=mask, use_cache=False).last_hidden_state


def attends_back_only(body: "PreTrainedModel") -> bool:
    """Tell whether the state of a token depends on later ones in no way, so that padding on the right needs no mask.

    Families that are not known to do so count as if they did not: those with attention code of their own (position biases as
    in Bloom, MPT and Falcon), with recurrent or convolutional layers, or with attention in both directions.
    """
    if body not in _ATTENDS_BACK_ONLY:
        config = body.config.get_text_config()
        causal = [module.is_causal for module in body.modules() if hasattr(module, "is_causal")]
        _ATTENDS_BACK_ONLY[body] = (
            bool(causal)
            and all(value is True for value in causal)
            and getattr(body, "_supports_attention_backend", False)
            and not getattr(body, "_is_stateful", False)
            and getattr(config, "is_causal", True) is not False
            and set(getattr(config, "layer_types", None) or ()) <= _ATTENTION
        )
    return _ATTENDS_BACK_ONLY[body]


# Types of layers, by transformers' names, in which tokens see each other through causal attention alone.
_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
_ATTENDS_BACK_ONLY: weakref.WeakKeyDictionary[torch.nn.Module, bool] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def _never_packed() -> Iterator[None]:
    """Keep transformers from looking for several sequences packed into one row, within the ``with`` block.

    The search waits for the device, which is not possible in the capture of a graph. Where transformers knows of the capture,
    it builds a mask instead, which the fast attention kernels do not take.
    """
    masking = sys.modules.get("transformers.masking_utils")
    search = getattr(masking, "find_packed_sequence_indices", None)
    if masking is None or search is None:
        yield
        return
    masking.find_packed_sequence_indices = lambda *_, **__: None  # type: ignore[attr-defined]
    try:
        yield
    finally:
        masking.find_packed_sequence_indices = search  # type: ignore[attr-defined]


def device_of(model: torch.nn.Module) -> torch.device:
    """Return the device that a model computes on: that of its parameters, if these are not kept in main memory (FSDP2)."""
    parameter = next(model.parameters())
    device = local(parameter).device
    if not is_sharded(parameter):
        return device
    mesh_type = cast("DTensor", parameter).device_mesh.device_type
    if mesh_type in ("cpu", device.type):
        return device
    return torch.device(mesh_type, torch.accelerator.current_device_index())


def autocast(model: torch.nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Return a context with bf16 autocast for an fp32 model on a GPU, and one without effect for any other model.

    Parameters, and so updates, stay in fp32.
    """
    parameter = next(model.parameters())
    if device_of(model).type == "cuda" and parameter.dtype == torch.float32:
        return torch.autocast("cuda", dtype=torch.bfloat16)
    return contextlib.nullcontext()


def bare(model: torch.nn.Module) -> "PreTrainedModel":
    """Return the model inside wrappers with a ``module`` (DDP, DeepSpeed)."""
    inner: Any = model
    while isinstance(getattr(inner, "module", None), torch.nn.Module):
        inner = inner.module
    return inner


def base_of(model: "PreTrainedModel") -> "PreTrainedModel":
    """Return the model within peft's wrapper, or the model itself."""
    return model.get_base_model() if has_adapters(model) else model


def _body(model: "PreTrainedModel") -> "PreTrainedModel":
    """Return the submodule that yields the hidden states.

    Transformers finds it by an attribute name, ``base_model_prefix``. In some families (Llama 4) no attribute has that name,
    and ``base_model`` is the model itself.
    """
    base = base_of(model)
    return base.model if base.base_model is base else base.base_model


def check_checkpointing(model: "PreTrainedModel") -> None:
    """Raise unless the model supports gradient checkpointing.

    Raises:
        ArgumentError: the model's family does not support it.
    """
    if not base_of(model).supports_gradient_checkpointing:
        remedy = "leave it out, and lower the batch size"
        raise argument_error("gradient_checkpointing", "a family that supports it", type(base_of(model)).__name__, remedy)


@contextlib.contextmanager
def checkpointing(model: "PreTrainedModel") -> Iterator[None]:
    """Turn gradient checkpointing on within the ``with`` block, and leave the model as it was.

    In training mode one hidden state per layer is kept, and the rest is computed again in the backward pass: less memory for a
    third more time, and the same numbers, dropout included.
    """
    base = base_of(model)
    before = any(getattr(module, "gradient_checkpointing", False) for module in base.modules())
    _switch(base, "enable")({"use_reentrant": False})  # the reentrant kind needs inputs with gradients, unlike LoRA
    try:
        yield
    finally:
        if not before:
            _switch(base, "disable")()


@contextlib.contextmanager
def compiled(model: "PreTrainedModel") -> Iterator[None]:
    """Run the model's body under ``torch.compile`` within the ``with`` block, and restore it at the end.

    Its parameters keep their names. When shapes change it is compiled once more, for any shape. Of a model in shards each layer
    is compiled by itself: FSDP2 gathers and frees its parameters between the layers, by code that cannot be compiled.
    """
    # Within a checkpoint, which transformers 5.25 puts inside each layer's forward, transformers sets and resets a variable of
    # its own: without this no graph of the layer is made.
    with torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True), _compiled(model):
        yield


@contextlib.contextmanager
def _compiled(model: "PreTrainedModel") -> Iterator[None]:
    layers = sharded_layers(model)
    if layers:
        with _compiled_forwards(layers):
            yield
        return
    body = _body(model)
    before = body._compiled_call_impl  # there is no public way back
    body.compile(**COMPILE)
    try:
        yield
    finally:
        body._compiled_call_impl = before


@contextlib.contextmanager
def _compiled_forwards(layers: list[torch.nn.Module]) -> Iterator[None]:
    """Compile the ``forward`` of some modules within the ``with`` block, but not their hooks, which run before and after it."""
    forwards = [vars(layer).get("forward") for layer in layers]  # a library may have replaced one
    for layer in layers:
        layer.forward = torch.compile(layer.forward, **COMPILE)
    try:
        yield
    finally:
        for layer, forward in zip(layers, forwards):
            del layer.forward
            if forward is not None:
                layer.forward = forward


def _switch(base: "PreTrainedModel", action: str) -> Callable[..., None]:
    """Return the method that turns checkpointing on ("enable") or off ("disable")."""
    # The second name is the one before transformers 5.
    return getattr(base, f"activation_checkpointing_{action}", None) or getattr(base, f"gradient_checkpointing_{action}")


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Put a model into evaluation mode, without gradients, within the ``with`` block; every module then gets its mode back."""
    keep_codes(model)  # bitsandbytes would pack them in this mode
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.no_grad():
            yield model.eval()
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def as_reference(model: "PreTrainedModel") -> Iterator["PreTrainedModel"]:
    """Make a model its own reference model within the ``with`` block: `evaluating`, with the adapters of a peft model off."""
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with evaluating(model), model.disable_adapter() if has_adapters(model) else contextlib.nullcontext():
            yield model
    finally:
        for parameter, requires_grad in trainable:  # peft switches these along with its adapters
            parameter.requires_grad_(requires_grad)


def token_logps(model: "PreTrainedModel", batch: "Batch", backend: str = "auto", chunk_bytes: int | None = None) -> Tensor:
    """Return the log-probability of every label of a batch, [B, T] fp32, differentiable."""
    return _at_head(linear_logprob, model, batch, backend, chunk_bytes)


def token_statistics(model: "PreTrainedModel", batch: "Batch", backend: str = "auto") -> TokenStatistics:
    """Return `soul_kernels.TokenStatistics` of every label of a batch, [B, T] each, without gradient."""
    return _at_head(linear_statistics, model, batch, backend)


def _at_head(op: Callable[..., T], model: "PreTrainedModel", batch: "Batch", backend: str, chunk_bytes: int | None = None) -> T:
    """Return the result of an op on the hidden states of a batch and the model's head."""

    def compute() -> T:
        with autocast(model):
            hidden = hidden_states(model, batch)
            options = LinearOptions(token_indices=batch.token_indices, chunk_bytes=chunk_bytes, backend=backend)
            return op(hidden, lm_head(model), batch.labels, options=options)

    return gathered(model, compute)


def greedy(
    model: "PreTrainedModel", input_ids: Tensor, attention_mask: Tensor, *, max_new_tokens: int, pad_token_id: int
) -> Tensor:
    """Return prompts with their greedy continuations, [B, T + n] int64 with n at most ``max_new_tokens``.

    If the model is in shards, every process must call this with the same prompts, and gets the same result.

    Args:
        model: a causal language model.
        input_ids: [B, T], padded on the left.
        attention_mask: [B, T].
        max_new_tokens: tokens of a continuation, at most.
        pad_token_id: follows a continuation that has ended.
    """
    options = {"max_new_tokens": max_new_tokens, "pad_token_id": pad_token_id, "do_sample": False, "num_beams": 1}
    if Processes.of(model).size == 1:
        return model.generate(input_ids=input_ids, attention_mask=attention_mask, **options)
    # No process may stop before the others: each token gathers the layers in all of them.
    result = model.generate(input_ids=input_ids, attention_mask=attention_mask, synced_gpus=True, **options)
    reshard(model)
    return result


def sampled(
    model: "PreTrainedModel",
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    max_new_tokens: int,
    pad_token_id: int,
    seed: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> Tensor:
    """Return prompts with continuations drawn from the model's own distribution, as `greedy` does.

    The random generators are left as they were. The model must not be in shards.

    Args:
        model: a causal language model.
        input_ids: as in `greedy`.
        attention_mask: as in `greedy`.
        max_new_tokens: as in `greedy`.
        pad_token_id: as in `greedy`.
        seed: of the draw; the same seed draws the same tokens.
        temperature: by which the logits are divided.
        top_p: the most likely tokens that together have this probability are drawn from.
    """
    options = {"max_new_tokens": max_new_tokens, "pad_token_id": pad_token_id, "num_beams": 1}
    draw = {
        "do_sample": True,
        "temperature": temperature,
        "top_k": 0,
        "top_p": top_p,
    }  # whatever the model's own configuration asks for
    devices = [input_ids.device] if input_ids.is_cuda else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        return model.generate(input_ids=input_ids, attention_mask=attention_mask, **options, **draw)


def gnb_loss(
    model: "PreTrainedModel",
    batch: "Batch",
    *,
    generator: torch.Generator | None = None,
    n_tokens: int | None = None,
    backend: str = "auto",
    chunk_bytes: int | None = None,
) -> Tensor:
    """Return the loss of `soul.curvature.GNB` on a batch, [], differentiable.

    It is the mean negative log-likelihood of labels drawn from the model itself, at the labelled tokens of the batch.

    Args:
        model: a causal language model.
        batch: a batch; only the positions of its labels count, not their values.
        generator: random generator of the draws, on the model's device; None: torch's own.
        n_tokens: number of tokens that the sum over this batch is divided by; None: that of its labelled tokens.
        backend: as in `soul_kernels.linear_gnb`.
        chunk_bytes: as in `soul_kernels.LinearOptions`.
    """

    def compute() -> Tensor:
        with autocast(model):
            hidden = hidden_states(model, batch)
            keep = batch.labels != IGNORE_INDEX
            options = LinearOptions(token_indices=batch.token_indices, chunk_bytes=chunk_bytes, backend=backend)
            return linear_gnb(hidden, lm_head(model), keep, generator=generator, n_tokens=n_tokens, options=options)[0]

    return gathered(model, compute)


def check_weights(model: torch.nn.Module) -> None:
    """Raise if a parameter, trained or frozen, has NaN or inf, which would make every loss NaN."""
    processes = Processes.of(model)
    broken_here = next((name for name, parameter in model.named_parameters() if not is_finite(parameter)), None)
    broken = next((name for name in processes.gather(broken_here) if name is not None), None)
    if broken is not None:
        remedy = "load a model that is whole; was it saved by a run that diverged?"
        raise argument_error("model", "finite weights", f"NaN or inf in {broken}", remedy)


class _Trial(NamedTuple):
    """The tokens on which `check_linear_head` tries a model."""

    input_ids: Tensor
    attention_mask: Tensor


def check_linear_head(model: "PreTrainedModel") -> None:
    """Raise unless the model's own logits are those of its head, scaled and capped as `transform` says, on a few tokens.

    That is, ``softcap tanh(logit_scale (hidden @ weight.T + bias) / softcap)``. The hidden states are enlarged on their way
    into the head until logits reach 100, because small logits would not show a cap.

    Raises:
        ArgumentError: the head is not linear, or has an adapter; a weight or a logit is not finite; the logits differ; or codes
            of 4 bits are in shards.
    """
    family = type(model).__name__
    layer = model.get_output_embeddings()
    if layer is None or not hasattr(layer, "weight"):
        raise argument_error("model", "a linear language-model head", family, "this family is not supported")
    keep_codes(model)
    weight, bias = head(model)
    options = transform(model)
    if weight.is_meta:  # the empty model of a plan has no values to try
        return
    ids = torch.arange(8, device=weight.device)[None] % len(weight)
    trial = _Trial(ids, torch.ones_like(ids))
    with evaluating(model):
        hidden = hidden_states(model, trial)
        agree = hidden.shape[-1] == weight.shape[1]
        if agree:
            raw = raw_logits(hidden, weight, bias)
            largest = abs(options["logit_scale"]) * raw.abs().max().float()
            enlarge = max(1.0, 100.0 / largest.clamp(min=1e-6).item())
            formula = transformed(raw_logits(hidden * enlarge, weight, bias).float(), **options)
            hook = layer.register_forward_pre_hook(lambda _, inputs: (inputs[0] * enlarge, *inputs[1:]))
            try:
                logits = model(input_ids=trial.input_ids, attention_mask=trial.attention_mask, use_cache=False).logits
            finally:
                hook.remove()
            logits = of_all_processes(logits, weight).float()
            if not logits.isfinite().all():
                check_weights(model)
                remedy = "are the weights whole, and within the range of their dtype?"
                raise argument_error("model", "finite logits", f"NaN or inf from {family}", remedy)
            agree = formula.shape == logits.shape and bool((formula - logits).abs().max() <= 1e-2 * logits.abs().max())
    if not agree:
        raise unexpected_logits_error(model)


def raw_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``hidden @ weight.T + bias`` [..., V], whole, without gradient. Of a head in shards each process forms a part.

    Args:
        hidden: [..., D], the same in all processes.
        weight: [V, D].
        bias: [V] or None.
    """
    logits = torch.nn.functional.linear(hidden, local(weight), None if bias is None else local(bias))
    return of_all_processes(logits, weight)


def of_all_processes(logits: Tensor, weight: Tensor) -> Tensor:
    """Return logits [..., V], whole, of a head in shards that may have returned those of this process's part of the vocabulary.

    Args:
        logits: [..., V], or the part of this process, as a plain tensor or as a DTensor.
        weight: [V, D], the head's.
    """
    if is_sharded(logits):
        return full(logits)
    if logits.shape[-1] == len(weight):
        return logits
    from torch.distributed.tensor import DTensor, Shard

    head_weight = cast("DTensor", weight)
    columns = [Shard(logits.dim() - 1) if splits(placement) else placement for placement in head_weight.placements]
    shape = torch.Size((*logits.shape[:-1], len(weight)))
    stride = torch.empty(shape, device="meta").stride()
    return full(DTensor.from_local(logits, head_weight.device_mesh, columns, run_check=False, shape=shape, stride=stride))


def unexpected_logits_error(model: torch.nn.Module) -> ArgumentError:
    """Return the `ArgumentError` for a model with other logits than those of its head and `transform`."""
    formula = "logits = softcap tanh(logit_scale (hidden @ weight.T + bias) / softcap)"
    return argument_error("model", formula, f"other logits in {type(model).__name__}", "this family is not supported")

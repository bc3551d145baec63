"""Calls of a Hugging Face model with a function in the place of its head.

`soul.functional` and `soul.unlearning_loss` take a model with any wrappers (DDP, FSDP, autocast, adapters, hooks), and every
wrapper must do its work in one ordinary forward pass. So during that pass the head's ``forward`` is replaced by a function of
the hidden states, and the function's value leaves the model as the head's output would, through every layer and hook that
follows. Logits [B, T, V] are never made.

The head's output is one row of logits, as wide as the vocabulary. It holds the value, [] or [B], then `PROBES`:

* The value travels in it so that DDP and hooks see the graph they have to wait for. It travels as ``value - value.detach()``,
  which is 0 with the gradient of the value, because a model may still scale and cap its logits: 0 stays 0, and the slope is the
  scale. `call_at_head` divides by the scale and adds the detached value.
* The probes are raw logits. Their values in the model's output show whether it scales and caps as `soul.models.transform` says
  and changes its logits in no other way. This waits for the GPU, so it is done in the first call with a model, and again when
  its configuration names another scale or cap.

A head that tensor parallelism has cut along the vocabulary (`ColwiseParallel`) returns logits that are cut alike, and a hook
may gather them. There each process returns a row of its own, as its part of the logits, and finds it again in what comes back.
"""

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from soul._extras import require
from soul.distributed.processes import full
from soul.distributed.shards import is_sharded, local
from soul.models import causal_lm
from soul.models.quantized import keep_codes
from soul_kernels.errors import argument_error
from soul_kernels.reference.token_logprob import transformed
from soul_kernels.tensors import has_data
from soul_kernels.tokens import IGNORE_INDEX, Transform

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.modeling_outputs import CausalLMOutput

# Takes hidden states [B, T, D], weight [V, D], bias [V] or None, and the transform of the logits; returns [] or [B].
HeadFunction = Callable[[Tensor, Tensor, Tensor | None, Transform], Tensor]
PROBES = (-300.0, -1.0, 0.25, 1.0, 300.0)  # raw logits: small ones, and ones that any cap in use changes by percents
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_VERIFIED: weakref.WeakKeyDictionary[torch.nn.Module, Transform] = weakref.WeakKeyDictionary()


def call_at_head(model: torch.nn.Module, inputs: Mapping[str, Tensor], function: HeadFunction) -> Tensor:
    """Call a model once with ``function(hidden, weight, bias, transform)`` in the place of its head, and return its value.

    Args:
        model: a Hugging Face causal language model, bare or in wrappers with a ``module``.
        inputs: keyword arguments of the model; ``labels`` are left out.
        function: a `HeadFunction`.

    Returns:
        The value of the function, [] or [B], with its graph.

    Raises:
        ArgumentError: the model's logits are not a linear map of its hidden states, scaled and capped as its configuration
            says; it does not call its head exactly once; it is compiled as a whole; or its codes of 4 bits are in shards.
    """
    inner = causal_lm.bare(model)
    _check_not_compiled(model, inner)
    with function_at_head(inner, function) as value_of:
        outputs = model(**{name: value for name, value in inputs.items() if name != "labels"}, use_cache=False)
        logits = getattr(outputs, "logits", None)  # the first output of a mixture of experts may be the loss of its router
        return value_of(outputs[0] if logits is None else logits)


@contextlib.contextmanager
def function_at_head(model: "PreTrainedModel", function: HeadFunction) -> Iterator[Callable[[Tensor], Tensor]]:
    """Put a function in the place of a model's head within the ``with`` block, in which the model is called once.

    Args:
        model: a Hugging Face causal language model without wrappers that have a ``module``.
        function: a `HeadFunction`.

    Yields:
        ``value_of(logits)``: the value of the function, [] or [B], with its graph, from the logits that left the model or that
        its loss function received. They hold nothing else.

    Raises:
        ArgumentError: the model has no head that can be replaced; or, from ``value_of``, as `call_at_head`.
    """
    layer = head_layer(model)
    transform = causal_lm.transform(model)
    if model not in _VERIFIED:
        keep_codes(model)
    custom_forward = _custom_forward(layer)
    has_no_values = torch.compiler.is_compiling()
    verified = has_no_values or _VERIFIED.get(model) == transform
    calls: list[tuple[Tensor, Tensor]] = []  # value and probes of each call of the head

    def forward(hidden: Tensor) -> Tensor:
        weight, bias = causal_lm.head(model)
        if not torch.is_grad_enabled():  # else a head in shards takes hidden states in shards, and scatters their gradient
            hidden = full(hidden)
        value = function(hidden, weight, bias, transform)
        if custom_forward is not None and not verified and has_data(value):
            _check_linear(custom_forward, hidden, weight, bias, model)
        carrier = (value - value.detach()).reshape(-1)
        probes = carrier.new_tensor(PROBES)
        probes = torch.nn.functional.pad(probes, (0, max(0, _width(weight) - len(carrier) - len(probes))))
        calls.append((value.detach(), probes))
        row = torch.cat([carrier[None, None], probes[None, None]], dim=2)  # no view, of which FSDP2 would warn
        return _as_logits(row, weight)

    def value_of(logits: Tensor) -> Tensor:
        if len(calls) != 1:
            got = f"{len(calls)} calls of it in {type(model).__name__}"
            raise argument_error("model", "a forward that calls its head once", got, "this family is not supported")
        value, probes = calls[0]
        logits = _own_part(logits, causal_lm.head(model)[0], value.numel() + len(probes))
        carrier = logits[: value.numel()]
        got_probes = logits[value.numel() :].detach()
        if not verified and has_data(got_probes):
            expected = transformed(probes, **transform)
            if got_probes.shape != expected.shape or not ((got_probes - expected).abs() <= 1e-2 * expected.abs()).all():
                raise causal_lm.unexpected_logits_error(model)  # the limit allows for outputs that are rounded to bf16
            _VERIFIED[model] = transform
        return value + carrier.reshape(value.shape) / transform["logit_scale"]

    with _forward_replaced(layer, forward):
        yield value_of


def _vocabulary_dim(weight: Any) -> int:
    """Return the dimension of the mesh along which the vocabulary of a head in shards is cut."""
    return next(dim for dim, placement in enumerate(weight.placements) if placement.is_shard())


def _width(weight: Any) -> int:
    """Return the number of logits that a head makes of a token; for a head in shards, at most in one process."""
    if not is_sharded(weight):
        return len(weight)
    return -(-len(weight) // weight.device_mesh.size(_vocabulary_dim(weight)))


def _as_logits(row: Tensor, weight: Any) -> Tensor:
    """Return a row [1, 1, n] as the head would: for a head in shards as this process's part of a DTensor."""
    if not is_sharded(weight):
        return row
    from torch.distributed.tensor import DTensor, Shard

    placements = [Shard(2) if placement.is_shard() else placement for placement in weight.placements]
    return DTensor.from_local(row, weight.device_mesh, placements)


def _own_part(logits: Tensor, weight: Any, length: int) -> Tensor:
    """Return the row [n] of this process, of ``length`` n, from logits that may have been gathered from all processes."""
    row = local(logits).reshape(-1)
    if is_sharded(weight) and len(row) > length:
        rank = weight.device_mesh.get_local_rank(_vocabulary_dim(weight))
        row = row[rank * length : (rank + 1) * length]
    return row


def shifted_labels(inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the labels as the ops of ``soul_kernels`` take them, a copy: ``labels[:, t]`` is what position t predicts.

    The last position predicts nothing and is ignored.

    Args:
        inputs: with ``labels`` [B, T], aligned with ``input_ids`` as for ``model(labels=...)``.
    """
    return torch.nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=IGNORE_INDEX)


def causal_output(logps: Tensor, counted: Tensor) -> "CausalLMOutput":
    """Return the output that a trainer gets in the place of the model's: the mean cross-entropy as ``loss``, and no logits.

    Args:
        logps: [B, T], detached log-probabilities.
        counted: [B, T] bool, the tokens over which the mean is taken.
    """
    counted = counted.to(logps.device)
    loss = -(logps * counted).sum() / counted.sum().clamp(min=1)
    return require("transformers.modeling_outputs", "hf").CausalLMOutput(loss=loss, logits=None)


def head_layer(model: "PreTrainedModel") -> Any:
    """Return the module that is the model's head, and raise unless it is one matrix, of a decoder.

    Raises:
        ArgumentError: there is no such head; or it has an adapter, or is quantized in another way than to 4 bits by
            bitsandbytes.
    """
    layer = model.get_output_embeddings()
    if layer is None or not hasattr(layer, "weight"):
        raise argument_error("model", "a linear language-model head", type(model).__name__, "this family is not supported")
    if hasattr(layer, "base_layer") or hasattr(layer, "token_adapter"):
        remedy = "leave it out of target_modules; in modules_to_save it is trained as a whole"
        raise argument_error("model", "a head without adapters", type(layer).__name__, remedy)
    kind = type(layer.weight)
    if hasattr(layer.weight, "quant_state"):  # of bitsandbytes, which `soul.models.causal_lm.head` dequantizes
        return layer
    if kind.__module__.partition(".")[0] != "torch" or layer.weight.dtype not in _DTYPES:
        got = f"{kind.__name__} of {layer.weight.dtype} in {type(model).__name__}"
        remedy = "the loss multiplies by its values: leave the head out of the quantization"
        raise argument_error("model", "a head that is not quantized", got, remedy)
    if getattr(model.config, "is_encoder_decoder", False):
        remedy = "an encoder-decoder predicts from another sequence; it is not supported"
        raise argument_error("model", "a causal language model", type(model).__name__, remedy)
    return layer


def _check_not_compiled(*modules: torch.nn.Module) -> None:
    """Raise for a model that is compiled as a whole: its head has been traced and can no longer be replaced."""
    for module in modules:
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            remedy = "its logits are part of the program: compile only the body, model.base_model.compile()"
            raise argument_error("model", "a model whose head is not compiled", "one compiled as a whole", remedy)


def _custom_forward(layer: torch.nn.Module) -> Callable[[Tensor], Tensor] | None:
    """Return the forward of a head, or None if it is that of ``torch.nn.Linear``."""
    custom = vars(layer).get("forward")
    if custom is None and type(layer).forward is torch.nn.Linear.forward:
        return None
    return custom or functools.partial(type(layer).forward, layer)


def _check_linear(
    forward: Callable[[Tensor], Tensor], hidden: Tensor, weight: Tensor, bias: Tensor | None, model: torch.nn.Module
) -> None:
    """Raise unless the head's custom forward is ``hidden @ weight.T + bias``, by trying it at one position."""
    with torch.no_grad():
        row = full(hidden).reshape(-1, hidden.shape[-1])[-1:]
        got = causal_lm.of_all_processes(forward(row), weight)
        expected = causal_lm.raw_logits(row, weight, bias)
        if got.shape != expected.shape or not ((got - expected).abs() <= 1e-2 * expected.abs().max()).all():
            raise causal_lm.unexpected_logits_error(model)


@contextlib.contextmanager
def _forward_replaced(module: torch.nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Set ``module.forward`` within the ``with`` block."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            vars(module).pop("forward")  # under torch.compile, del would look for an attribute that was never set
        else:
            module.forward = before

"""One call that gives a Hugging Face model a forward whose loss needs no logits::

    soul.patch(model)          # model(input_ids=..., labels=...) returns the fused loss, and None for logits
    trainer.train()            # the Hugging Face Trainer, TRL, Accelerate, a loop of your own
    soul.unpatch(model)

``patch`` sets one attribute, ``forward`` of this one model, to a `FusedForward`. A call without labels goes on to the forward
that was there before. So does a call with labels, but while it lasts two functions are replaced: the one of the head
(`soul.models.head_call`), which computes the loss from hidden states, and the model's ``loss_function``, which hands it on. So
whatever else the family does with its inputs, its loss and its output is done by its own code: the loss of a router is added,
and hidden states, attentions and caches are returned. A family that does not call both functions once is refused.
"""

import contextlib
import dataclasses
import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from soul import losses
from soul._extras import require
from soul.model_loss import Joined, check_objective, reference_of, runs_reference
from soul.models import causal_lm
from soul.models.head_call import function_at_head, head_layer, shifted_labels
from soul_kernels import Head, linear_objective
from soul_kernels.errors import ArgumentError, argument_error
from soul_kernels.reference.token_logprob import transformed
from soul_kernels.tokens import IGNORE_INDEX, Transform

if TYPE_CHECKING:
    from transformers import PreTrainedModel

AnyModel = TypeVar("AnyModel", bound=torch.nn.Module)
UNSUPPORTED = "this family is not supported"
PER_SEQUENCE = ("is_forget", "ref_logps")  # what an objective takes from the batch beside labels
_CROSS_ENTROPY = losses.Memorize()  # every token counts alike, and nothing is to be retained


def patch(
    model: AnyModel,
    objective: losses.Objective | None = None,
    *,
    ref_model: torch.nn.Module | None = None,
    return_logits: bool | None = None,
) -> AnyModel:
    """Replace the forward of one model by one that computes its loss without logits; `unpatch` puts the old one back.

    With ``labels`` the new forward returns the family's own output, with the same loss and the same gradients: labels are
    aligned with ``input_ids``, -100 is ignored, and ``num_items_in_batch``, ``shift_labels``, ``ignore_index``, ``return_dict``
    and the loss of a router mean what they do in transformers. A batch in which every label is ignored has loss 0, where
    transformers has NaN. Without ``labels`` the forward is the one that was there, for generation and everything else.

    With an ``objective`` the loss is that of the objective. Then the forward also takes ``is_forget``, [B] bool, and
    ``ref_logps``, [B] fp32, as `soul_kernels.linear_objective` does; these are columns of the batch. All other means are those
    of the objective, over the batch of one call, so that ``num_items_in_batch`` is refused, and the Trainer does not pass it.

    ``logits`` of the output is None in training mode, and in evaluation mode what it always was, since metrics need it. A call
    with ``return_logits=True`` or False says otherwise, and one with ``logits_to_keep`` returns these beside the loss. Where
    all logits are returned and there is no objective, the loss is computed from them, as in transformers.

    Only the attribute ``forward`` of this instance changes: neither a class nor a module of transformers. Parameters, names of
    the state dict and ``save_pretrained`` are what they were. A copy (``copy.deepcopy``, pickle) is patched as well. The model
    may be wrapped and compiled afterwards.

    Args:
        model: a Hugging Face causal language model, bare, wrapped by peft or in wrappers with a ``module`` (DDP). It is tried
            on a few tokens, unless its weights are elsewhere (meta device, shards): then the first call with labels tries it.
        objective: an objective of `soul.losses`; None: the cross-entropy of all labels.
        ref_model: the reference model of an objective that needs one; None: ``ref_logps`` of the batch, or the model itself
            with its peft adapters off, if it is passed to this function as the ``PeftModel``.
        return_logits: whether to return all logits beside the loss; None: in evaluation mode.

    Returns:
        The argument ``model``, changed in place.

    Raises:
        ArgumentError: the model is patched already, is compiled, or is in ``torch.nn.DataParallel``; its family is not
            supported: the head is not linear, quantized or has an adapter, logits are something else than scaled and capped
            products, or the loss is not transformers' ``ForCausalLMLoss``. Nothing is changed then. The new forward raises it
            if the head is another one than the one that was patched, or if labels and objective do not fit.
    """
    if objective is not None:
        check_objective(objective)
    target = _target(model)
    if any(isinstance(forward, FusedForward) for _, forward in _forwards(target)):
        raise argument_error("model", "one that is not patched", "a patched one", "call soul.unpatch(model) first")
    _check_not_compiled(model, target)
    forward = FusedForward(target, causal_lm.bare(model), objective, ref_model, return_logits)
    forward.try_out()
    target.forward = forward
    return model


def unpatch(model: AnyModel) -> AnyModel:
    """Give a model back the forward that it had before `patch`, the very same function.

    Args:
        model: the model that was patched, or the same one with or without its wrappers.

    Returns:
        The argument ``model``, changed in place.

    Raises:
        ArgumentError: the model is not patched; or its forward was wrapped by something else afterwards.
    """
    target = _target(model)
    for name, forward in _forwards(target):
        if not isinstance(forward, FusedForward):
            continue
        if name == "":
            remedy = "undo that first: accelerator.unwrap_model(model, keep_fp32_wrapper=False)"
            raise argument_error("model", "the patched forward", "one that was wrapped around it later", remedy)
        if name == "forward" and forward.before is None:
            del target.forward
        else:
            setattr(target, name, forward.plain)
        return model
    raise argument_error("model", "a patched one", f"{type(target).__name__} as it was", "call soul.patch(model) first")


@contextlib.contextmanager
def fused(
    model: AnyModel,
    objective: losses.Objective | None = None,
    *,
    ref_model: torch.nn.Module | None = None,
    return_logits: bool | None = None,
) -> Iterator[AnyModel]:
    """`patch` a model within the ``with`` block, and `unpatch` it at the end. Arguments and errors are those of `patch`."""
    patch(model, objective, ref_model=ref_model, return_logits=return_logits)
    try:
        yield model
    finally:
        unpatch(model)


class _HeadKind(NamedTuple):
    """What must stay as it was when the model was patched: the head's function, its shape, and whether it has a bias."""

    function: Callable[..., Tensor]
    shape: tuple[int, ...]
    has_bias: bool

    @classmethod
    def of(cls, model: "PreTrainedModel") -> "_HeadKind":
        layer = head_layer(model)
        shape = getattr(layer.weight, "ds_shape", layer.weight.shape)  # ZeRO-3 leaves an empty tensor in its place
        layer = getattr(layer, "original_module", layer)  # of peft's modules_to_save
        return cls(type(layer).forward, tuple(shape), getattr(layer, "bias", None) is not None)


class FusedForward:
    """The forward of a patched model; see `patch`.

    An object, and no function of a closure, so that copies of the model get their own: ``copy.deepcopy`` and pickle follow its
    attributes, and would share a function between models.

    Attributes:
        before: the instance's attribute ``forward`` before; None if it had none, and its class's method was called.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        outer: torch.nn.Module,
        objective: losses.Objective | None,
        ref_model: torch.nn.Module | None,
        return_logits: bool | None,
    ) -> None:
        self.before: Callable[..., Any] | None = vars(model).get("forward")
        self._model = model
        self._outer = outer
        self._objective = objective
        self._ref_model = ref_model
        self._return_logits = return_logits
        self._head = _HeadKind.of(model)
        self._plain_loss = require("transformers.loss.loss_utils", "hf").ForCausalLMLoss
        self._check_loss_function()
        parameters = [p.replace(annotation=p.empty) for p in inspect.signature(self.plain).parameters.values()]
        self._names = [p.name for p in parameters]
        if "labels" not in self._names and all(p.kind is not p.VAR_KEYWORD for p in parameters):
            raise argument_error("model", "a forward that takes labels", type(model).__name__, UNSUPPORTED)
        self.__signature__ = _signature(parameters, objective)

    @property
    def plain(self) -> Callable[..., Any]:
        """The forward without the fused loss."""
        return types.MethodType(type(self._model).forward, self._model) if self.before is None else self.before

    def __call__(self, *args: Any, **inputs: Any) -> Any:
        """Return the output of the model, with the fused loss if there are labels; see `patch`."""
        if args and args[0] is self._model:  # accelerate binds what it unwraps to the model
            args = args[1:]
        inputs.update(zip(self._names, args))
        per_sequence = {name: inputs.pop(name, None) for name in PER_SEQUENCE}
        return_logits = inputs.pop("return_logits", None)
        if return_logits is None:
            return_logits = not self._model.training if self._return_logits is None else self._return_logits
        _check_inputs(self._objective, inputs, per_sequence)
        kept = _kept_positions(inputs.get("logits_to_keep", 0), return_logits)
        if inputs.get("labels") is None or (kept == slice(None) and self._objective is None):
            return self.plain(**inputs)
        inputs.pop("logits_to_keep", None)
        return_dict = inputs.pop("return_dict", None)
        output = self._fused(inputs, per_sequence, self._objective, kept)
        if return_dict is None:
            return_dict = self._model.config.return_dict
        return output if return_dict else output.to_tuple()

    def try_out(self) -> None:
        """Raise unless the fused cross-entropy is that of the forward as it was, on a few tokens.

        The last ones are padding, with labels: a family may leave them out.
        """
        family = type(self._model).__name__
        weight = causal_lm.head(self._model)[0]
        if type(weight.data) is not Tensor or weight.is_meta or not weight.numel():  # shards, or no values
            return
        ids = torch.arange(16, device=weight.device).view(2, 8) % len(weight)
        mask = torch.ones_like(ids)
        mask[1, 5:] = 0
        inputs = {"input_ids": ids, "labels": ids, "attention_mask": mask}
        with causal_lm.evaluating(self._model):
            expected = getattr(self.plain(**inputs, return_dict=True), "loss", None)
            if expected is None:
                raise argument_error("model", "a loss for labels", f"none in {family}", UNSUPPORTED)
            try:
                got = self._fused(inputs, {}, None, None).loss
            except ArgumentError:
                raise
            except Exception as error:  # whatever a forward does with logits that are none
                got_error = f"{type(error).__name__} in {family}"
                raise argument_error("model", "a loss by loss_function alone", got_error, UNSUPPORTED) from error
        if not abs(got - expected) <= 1e-2 * abs(expected):
            causal_lm.check_weights(self._model)
            expected_loss = f"the loss of its own forward, {expected.item():.4g}"
            raise argument_error("model", expected_loss, f"{got.item():.4g} in {family}", UNSUPPORTED)

    def _check_loss_function(self) -> None:
        """Raise unless the model's loss is the one that is fused; a user may have set another one, also after the patch."""
        loss_function = getattr(self._model, "loss_function", None)
        if loss_function is not self._plain_loss:
            got = f"{getattr(loss_function, '__name__', loss_function)} of {type(self._model).__name__}"
            raise argument_error("model", "a model with transformers' ForCausalLMLoss", got, UNSUPPORTED)

    def _fused(
        self,
        inputs: dict[str, Any],
        per_sequence: Mapping[str, Tensor | None],
        objective: losses.Objective | None,
        kept: slice | Tensor | None,
    ) -> Any:
        """Return the model's output with the fused loss, and with the logits of the positions ``kept``."""
        family = type(self._model).__name__
        head_kind = _HeadKind.of(self._model)
        if head_kind != self._head:
            remedy = "call soul.unpatch(model) and soul.patch(model) again, and make the optimizer anew"
            got = f"{list(head_kind.shape)} of {type(head_layer(self._model)).__name__}"
            raise argument_error("model", f"the head that was patched, {list(self._head.shape)}", got, remedy)
        self._check_loss_function()
        op_labels = _op_labels(inputs)
        options = {} if objective is None else self._options(objective, inputs, per_sequence, op_labels)
        logits_kept: list[Tensor] = []

        def value(hidden: Tensor, weight: Tensor, bias: Tensor | None, transform: Transform) -> Tensor:
            if kept is not None:
                logits_kept.append(transformed(F.linear(hidden[:, kept], weight, bias), **transform))
            head = Head(weight, bias, **transform)
            return linear_objective(hidden, head, op_labels.to(hidden.device), objective or _CROSS_ENTROPY, **options)

        losses_of_calls: list[Tensor] = []

        def loss_function(
            logits: Tensor, labels: Tensor, *_: Any, num_items_in_batch: Tensor | float | None = None, **__: Any
        ) -> Tensor:
            if labels is not inputs["labels"] and not torch.equal(labels, inputs["labels"].to(labels.device)):
                got = f"other labels in {family}"
                raise argument_error("model", "a forward that hands its labels to loss_function", got, UNSUPPORTED)
            loss = value_of(logits)
            if num_items_in_batch is not None:  # the sum over tokens, divided by that number
                n_items = torch.as_tensor(num_items_in_batch, device=loss.device)
                loss = loss * (op_labels != IGNORE_INDEX).sum().clamp(min=1).to(loss.device) / n_items
            losses_of_calls.append(loss)
            return loss

        with function_at_head(self._model, value) as value_of, _loss_function_replaced(self._model, loss_function):
            output = self.plain(**inputs, return_dict=True)
            value_of(output.logits)  # raises if they are others than those of the loss function
        if len(losses_of_calls) != 1:
            got = f"{len(losses_of_calls)} calls of it in {family}"
            raise argument_error("model", "a forward that calls its loss_function once", got, UNSUPPORTED)
        return dataclasses.replace(output, logits=logits_kept[0] if logits_kept else None)

    def _options(
        self,
        objective: losses.Objective,
        inputs: Mapping[str, Any],
        per_sequence: Mapping[str, Tensor | None],
        labels: Tensor,
    ) -> dict[str, Any]:
        """Return the arguments of `linear_objective` for an objective."""
        is_forget, ref_logps = (per_sequence[name] for name in PER_SEQUENCE)
        is_forget = torch.ones(len(labels), dtype=torch.bool) if is_forget is None else is_forget.bool()
        rows = _rows(inputs, len(labels)) if runs_reference(objective, ref_logps) else {}
        reference = reference_of(self._outer, self._ref_model, Joined(rows, is_forget, ref_logps), labels, objective)
        return {"is_forget": is_forget, **reference}


def _signature(parameters: list[inspect.Parameter], objective: losses.Objective | None) -> inspect.Signature:
    """Return the signature of a patched forward, from which trainers learn which columns and keywords it takes.

    With an objective it has no ``**kwargs``: these are what tells the Trainer to pass ``num_items_in_batch``.
    """
    names = ("return_logits",) if objective is None else ("return_logits", *PER_SEQUENCE)
    added = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in names]
    open_ended = [p for p in parameters if p.kind is p.VAR_KEYWORD]
    named = [p for p in parameters if p.kind is not p.VAR_KEYWORD and p.name not in names]  # a hook may keep them
    return inspect.Signature([*named, *added, *([] if objective else open_ended)])


def _kept_positions(logits_to_keep: int | Tensor, return_logits: bool) -> slice | Tensor | None:
    """Return the positions whose logits are to be returned, or None; ``logits_to_keep`` is that of transformers, 0 for all."""
    if isinstance(logits_to_keep, Tensor):
        return logits_to_keep
    if logits_to_keep:
        return slice(-logits_to_keep, None)
    return slice(None) if return_logits else None


def _rows(inputs: Mapping[str, Any], n_sequences: int) -> dict[str, Tensor]:
    """Return the inputs of a model with one row for each sequence, so that some sequences can be taken.

    Raises:
        ArgumentError: an input cannot be divided, such as a cache.
    """
    rows = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.ndim and len(value) in (1, n_sequences):
            rows[name] = value.expand(n_sequences, *value.shape[1:])
        elif value is not None and not isinstance(value, (bool, int, str)):
            remedy = "pass ref_logps for objectives that need no more, or leave it out"
            raise argument_error(name, f"a row for each of {n_sequences} sequences", type(value).__name__, remedy)
    return rows


def _op_labels(inputs: Mapping[str, Any]) -> Tensor:
    """Return the labels [B, T] as ops take them, from what transformers' loss takes: shifted, -100 where they are ignored."""
    ignored = inputs.get("ignore_index", IGNORE_INDEX)
    labels = inputs.get("shift_labels")
    labels = shifted_labels(inputs) if labels is None else labels
    return labels if ignored == IGNORE_INDEX else labels.masked_fill(labels == ignored, IGNORE_INDEX)


def _check_inputs(
    objective: losses.Objective | None, inputs: Mapping[str, Any], per_sequence: Mapping[str, Tensor | None]
) -> None:
    """Raise unless the labels of a call fit its tokens, and what else is in the batch fits the objective."""
    labels = inputs.get("labels")
    passed = [name for name, value in per_sequence.items() if value is not None]
    if passed and objective is None:
        raise argument_error(passed[0], "none without an objective", "a tensor", "pass the objective to soul.patch")
    if passed and labels is None:
        raise argument_error("labels", f"labels beside {passed[0]}", None, "pass them, aligned with input_ids")
    if labels is None:
        return
    tokens = inputs.get("input_ids")
    tokens = inputs.get("inputs_embeds") if tokens is None else tokens
    if tokens is not None and labels.shape != tokens.shape[:2]:
        expected = f"shape {tuple(tokens.shape[:2])}, as the tokens"
        remedy = "do not shift them: labels[:, t] is the token at t, and the model shifts"
        raise argument_error("labels", expected, f"shape {tuple(labels.shape)}", remedy)
    if objective is None:
        return
    is_forget = per_sequence["is_forget"]
    if is_forget is None and objective.alpha:
        remedy = "pass which sequences are to be forgotten, or set alpha to 0"
        raise argument_error("is_forget", f"[B] bool for {objective}", None, remedy)
    if inputs.get("num_items_in_batch") is not None:
        remedy = "leave it out; a Trainer takes it from model.forward, so patch before it is made"
        raise argument_error("num_items_in_batch", f"none with {objective}", "a number", remedy)
    if objective.pairs and is_forget is not None and not torch.equal(is_forget[0::2], is_forget[1::2]):
        remedy = "each answer must be followed by the one that is preferred to it"
        raise argument_error("is_forget", "the same at 2i and 2i + 1, since these are pairs", is_forget.tolist(), remedy)


@contextlib.contextmanager
def _loss_function_replaced(model: "PreTrainedModel", function: Callable[..., Tensor]) -> Iterator[None]:
    """Set ``model.loss_function`` within the ``with`` block."""
    before = vars(model).get("_loss_function")
    model.loss_function = function
    try:
        yield
    finally:
        if before is None:
            vars(model).pop("_loss_function")  # what transformers sets; torch.compile knows no other way to remove it
        else:
            model.loss_function = before


def _target(model: torch.nn.Module) -> "PreTrainedModel":
    """Return the model whose forward is replaced: the one within all wrappers, peft's included.

    peft calls it whatever kind of adapters there are, so that a patch survives ``get_peft_model`` and ``merge_and_unload``.
    """
    if isinstance(model, torch.nn.DataParallel):
        remedy = "start one process a GPU, with torchrun or accelerate launch"
        raise argument_error("model", "one process a GPU", "DataParallel", remedy)
    model = getattr(model, "_orig_mod", model)
    target = causal_lm.base_of(causal_lm.bare(model))
    if not hasattr(target, "get_output_embeddings"):
        remedy = "pass the output of AutoModelForCausalLM.from_pretrained"
        raise argument_error("model", "a Hugging Face causal language model", type(target).__name__, remedy)
    return target


def _check_not_compiled(model: torch.nn.Module, target: torch.nn.Module) -> None:
    """Raise for a model that has been compiled: what was traced could not be replaced any more."""
    before = vars(target).get("forward")
    is_compiled = hasattr(model, "_orig_mod") or hasattr(before, "_torchdynamo_orig_callable")
    if is_compiled or getattr(target, "_compiled_call_impl", None) is not None:
        raise argument_error("model", "a model that is not compiled yet", "a compiled one", "patch it, then compile it")


def _forwards(target: torch.nn.Module) -> Iterator[tuple[str, object]]:
    """List the functions that a call of a model reaches, each with the name of the attribute that holds it, or "".

    accelerate keeps the forward before its hook as ``_old_forward``, which the hook calls, and wraps that of mixed precision in
    functions.
    """
    held: object = None
    for name in ("forward", "_old_forward"):
        held = vars(target).get(name, held)
        yield name, getattr(held, "__func__", held)
    wrapper = held
    while (wrapper := getattr(wrapper, "__wrapped__", None)) is not None:
        yield "", wrapper

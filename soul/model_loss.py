"""The unlearning loss of a Hugging Face model on one batch, for custom training loops::

    loss = soul.unlearning_loss(model, {"forget": forget, "retain": retain}, soul.losses.NPO(beta=0.1))
    loss.backward()

Forget and retain sequences are padded together and go through the model in one forward pass. During that pass the fused ops of
``soul_kernels`` take the place of the head (`soul.models.head_call`). They get the hidden states that the head would have got,
and its bias, scale and cap. Logits of all tokens are never made, and whatever is wrapped around the model (DDP, FSDP, autocast,
adapters, hooks) does its work.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from soul import losses
from soul.compat import COMPAT, labels_as_coded
from soul.models import causal_lm
from soul.models.head_call import call_at_head, causal_output, shifted_labels
from soul_kernels import Head, Reference, linear_logprob, linear_objective
from soul_kernels.errors import argument_error, check_choice
from soul_kernels.tokens import IGNORE_INDEX, Transform

if TYPE_CHECKING:
    from transformers.modeling_outputs import CausalLMOutput

Batch = Mapping[str, Any]  # one side of a batch, a dict of tensors; or a dict of such dicts


class Joined(NamedTuple):
    """Forget and retain sequences in one batch; those of `unlearning_loss` have the forget ones first.

    Attributes:
        inputs: ``input_ids``, ``attention_mask`` and ``labels``, [B, T] each, padded to the longest sequence.
        is_forget: [B] bool, best on the CPU.
        ref_logps: [B] fp32, 0 for the retain sequences; None if the batch has none.
    """

    inputs: dict[str, Tensor]
    is_forget: Tensor
    ref_logps: Tensor | None


@overload
def unlearning_loss(
    model: torch.nn.Module,
    batch: Batch,
    objective: losses.Objective,
    *,
    ref_model: torch.nn.Module | None = None,
    return_outputs: Literal[False] = False,
    compat: str | None = None,
) -> Tensor: ...


@overload
def unlearning_loss(
    model: torch.nn.Module,
    batch: Batch,
    objective: losses.Objective,
    *,
    ref_model: torch.nn.Module | None = None,
    return_outputs: Literal[True],
    compat: str | None = None,
) -> tuple[Tensor, "CausalLMOutput"]: ...


def unlearning_loss(
    model: torch.nn.Module,
    batch: Batch,
    objective: losses.Objective,
    *,
    ref_model: torch.nn.Module | None = None,
    return_outputs: bool = False,
    compat: str | None = None,
) -> "Tensor | tuple[Tensor, CausalLMOutput]":
    """Return the loss of an objective on one batch of forget and retain sequences, with its graph.

    The value and the gradients are those of the objective on the model's own logits, whatever its family does between hidden
    states and logits: a head with a bias, logits that are scaled (Cohere, Granite) or capped (Gemma 2). A model whose logits
    are something else is refused.

    What the objective needs of a reference model comes from the first of these that exists: ``ref_logps`` [B] fp32 in the
    forget batch (summed log-probabilities, from `soul.reference_logps`; enough for NPO and DPO); ``ref_model``; the model
    itself with its peft adapters switched off. The router loss of a mixture of experts is not part of the objective, and not
    added.

    Args:
        model: a Hugging Face causal language model, bare or in wrappers with a ``module``. It is called once, in the mode it is
            in, and left as it was. Tensor parallelism may have cut its head along the vocabulary (``ColwiseParallel``, which
            makes DTensors): it is not gathered, and all processes of the mesh pass the same batch.
        batch: ``{"forget": side, "retain": side}``. A side is a dict of ``input_ids`` and ``labels``, [B, T] int64, and
            ``attention_mask``, [B, T], all ones if it is missing. Labels are aligned with ``input_ids`` as for
            ``model(labels=...)``, not shifted; -100 is ignored. Forget and retain may differ in B and T. For pairs (DPO), and
            for objectives that relabel (PO), the forget entry is ``{"original": side, "alternate": side}``: the answers to be
            forgotten and those preferred to them. The retain side may be missing if ``objective.alpha`` is 0.
        objective: a `soul.losses.Objective`.
        ref_model: another causal language model, run without gradients; or None.
        return_outputs: also return what a Trainer expects of a model.
        compat: None; or "open-unlearning": a KL retain term and UNDIAL are means over the positions that its code counts,
            prompts and padding included (docs/objectives.md). The option changes no other objective.

    Returns:
        The loss, [] fp32. With ``return_outputs`` the loss and a transformers ``CausalLMOutput`` with ``logits=None``, whose
        ``loss`` is the detached mean cross-entropy of the forget tokens.

    Raises:
        ArgumentError: a side of the batch is missing or its tensors do not belong together; the objective needs a reference
            model and there is none; the model's logits are not ``softcap tanh(logit_scale (hidden @ weight.T + bias) /
            softcap)``; or it is in ``torch.nn.DataParallel``, whose replicas do not share a head.
    """
    check_choice("compat", compat, COMPAT)
    if isinstance(model, torch.nn.DataParallel):
        remedy = "start one process a GPU, with torchrun or accelerate launch"
        raise argument_error("model", "one process a GPU", "DataParallel", remedy)
    check_objective(objective)
    joined = _joined(batch, objective)
    is_forget = joined.is_forget
    labels = shifted_labels(joined.inputs)
    reference = reference_of(model, ref_model, joined, labels, objective)
    detached_logps: list[Tensor] = []

    def value(hidden: Tensor, weight: Tensor, bias: Tensor | None, transform: Transform) -> Tensor:
        counted_labels = labels_as_coded(labels, batch, objective, len(weight)) if compat else labels
        head = Head(weight, bias, **transform)
        loss, logps = linear_objective(
            hidden, head, counted_labels.to(hidden.device), objective, is_forget=is_forget, return_logps=True, **reference
        )
        detached_logps.append(logps)
        return loss

    loss = call_at_head(model, joined.inputs, value)
    if not return_outputs:
        return loss
    counted = (labels != IGNORE_INDEX) & is_forget.to(labels.device)[:, None]
    return loss, causal_output(detached_logps[0], counted)


def _joined(batch: Batch, objective: losses.Objective) -> Joined:
    """Check the sides of a batch that the objective needs, and join them."""
    forget = _forget_sides(batch, objective)
    sides = dict(forget)
    if objective.alpha:
        retain = _entry(batch, "retain")
        if retain is None:
            raise argument_error("batch", f"a retain batch for {objective}", "none", "give retain data, or set alpha to 0")
        sides["batch['retain']"] = retain
    for name, side in sides.items():
        _check_side(name, side)
    counts = [len(side["input_ids"]) for side in forget.values()]
    if len({*counts}) > 1:
        raise argument_error("batch['forget']['alternate']", f"{counts[0]} sequences", counts[1], "they form pairs")
    inputs = _padded(list(sides.values()), len(forget))
    n_forget = sum(counts)
    n_sequences = len(inputs["input_ids"])
    ref_logps = None
    if all("ref_logps" in side for side in forget.values()):
        forget_logps = torch.stack([side["ref_logps"].float() for side in forget.values()], 1).flatten()
        ref_logps = torch.cat([forget_logps, forget_logps.new_zeros(n_sequences - n_forget)])
    return Joined(inputs, torch.arange(n_sequences, device="cpu") < n_forget, ref_logps)


def _forget_sides(batch: Batch, objective: losses.Objective) -> dict[str, Batch]:
    """Return the forget sides that the objective needs, by their names in errors: one, or two for pairs."""
    forget = _entry(batch, "forget")
    if forget is None:
        raise argument_error("batch", "a forget batch", "/".join(batch) or "none", "pass {'forget': ..., 'retain': ...}")
    has_both = "alternate" in forget
    if objective.pairs and not has_both:
        remedy = "forget needs both: open-unlearning's data with alternate answers, or UnlearningDataset(pairs=True)"
        raise argument_error("batch['forget']", "original and alternate answers", "/".join(forget), remedy)
    if not has_both:
        return {"batch['forget']": forget}
    names = ("original", "alternate") if objective.pairs else ("alternate" if objective.relabels else "original",)
    return {f"batch['forget']['{name}']": _entry(forget, name) for name in names}


def _padded(sides: Sequence[Batch], n_forget_sides: int) -> dict[str, Tensor]:
    """Join sides, padded to the longest sequence. Two forget sides are interleaved: original and alternate answer of a pair."""
    length = max(side["input_ids"].shape[1] for side in sides)
    inputs = {}
    for name, filler in (("input_ids", 0), ("attention_mask", 0), ("labels", IGNORE_INDEX)):
        padded = []
        for side in sides:
            value = side.get(name)
            value = torch.ones_like(side["input_ids"]) if value is None else value
            padded.append(torch.nn.functional.pad(value, (0, length - value.shape[1]), value=filler))
        forget = torch.stack(padded[:n_forget_sides], 1).flatten(0, 1)
        inputs[name] = torch.cat([forget, *padded[n_forget_sides:]])
    return inputs


def _entry(mapping: Batch, name: str) -> Any:
    """Return one entry of a batch, or None."""
    if not isinstance(mapping, Mapping):
        raise argument_error("batch", "a dict of forget and retain", type(mapping).__name__, "see soul.unlearning_loss")
    return mapping.get(name)


def _check_side(name: str, side: Batch) -> None:
    """Raise unless a side of a batch is a dict of tensors that belong together."""
    if not isinstance(side, Mapping):
        remedy = "each side is a dict of input_ids, labels and attention_mask"
        raise argument_error(name, "a dict of tensors", type(side).__name__, remedy)
    for key in ("input_ids", "labels"):
        if not isinstance(side.get(key), Tensor):
            got = "none" if side.get(key) is None else type(side[key]).__name__
            raise argument_error(f"{name}['{key}']", "a tensor [B, T]", got, "labels are not shifted, -100 is ignored")
    shape = side["input_ids"].shape
    for key, expected in (("input_ids", shape[:2]), ("labels", shape), ("attention_mask", shape), ("ref_logps", shape[:1])):
        value = side.get(key)
        if value is not None and (value.shape != expected or len(shape) != 2):
            described = "[B, T]" if len(shape) != 2 else f"shape {tuple(expected)}, as input_ids"
            remedy = "pad the sequences of a side alike"
            raise argument_error(f"{name}['{key}']", described, f"shape {tuple(value.shape)}", remedy)


def check_objective(objective: object) -> None:
    """Raise unless this is an objective of `soul.losses`."""
    if not isinstance(objective, losses.Objective):
        raise argument_error("objective", "an objective of soul.losses", repr(objective), "for instance soul.losses.NPO()")


def runs_reference(objective: losses.Objective, ref_logps: Tensor | None) -> bool:
    """Tell whether `reference_of` runs a reference model: the batch does not hold all that the objective needs of it."""
    return objective.divergence is not None or (objective.needs_reference and ref_logps is None)


def reference_of(
    model: torch.nn.Module,
    ref_model: torch.nn.Module | None,
    joined: Joined,
    labels: Tensor,
    objective: losses.Objective,
) -> dict[str, Any]:
    """Return the arguments of `linear_objective` that describe a reference model; run it on the sequences that need it.

    Args:
        model: the model, as for `unlearning_loss`. With its adapters off it is the reference model if there is no other.
        ref_model: another model, or None.
        joined: the batch.
        labels: its labels [B, T], shifted.
        objective: what the reference model is needed for.

    Raises:
        ArgumentError: the objective needs a reference model, and there is none.
    """
    is_forget = joined.is_forget
    divergence = objective.divergence
    needs_logps = objective.needs_reference and joined.ref_logps is None
    arguments: dict[str, Any] = {"ref_logps": joined.ref_logps} if objective.needs_reference else {}
    if not runs_reference(objective, joined.ref_logps):
        return arguments
    bare = causal_lm.bare(model)
    if ref_model is None and not causal_lm.has_adapters(bare):
        remedy = "pass ref_model, a copy made before training, or ref_logps if the objective needs no more"
        raise argument_error("ref_model", f"a reference model for {objective}", None, remedy)
    needed = is_forget & needs_logps
    if divergence is not None:
        needed = needed | {"forget": is_forget, "retain": ~is_forget, "all": torch.ones_like(is_forget)}[divergence.of]
    indices = needed.nonzero()[:, 0].to(labels.device)
    # A frozen head is the same without adapters. It need not be kept beyond the forward pass, after which FSDP may free it.
    shares_head = ref_model is None and not any(t is not None and t.requires_grad for t in causal_lm.head(bare))

    def keep(hidden: Tensor, weight: Tensor, bias: Tensor | None, transform: Transform) -> Tensor:
        rows = indices.to(hidden.device)
        if needs_logps:
            sums = linear_logprob(hidden, Head(weight, bias, **transform), labels[indices].to(hidden.device)).sum(1)
            arguments["ref_logps"] = sums.new_zeros(len(labels)).index_copy_(0, rows, sums)
        if divergence is not None:
            whole = hidden.new_zeros(len(labels), *hidden.shape[1:])
            reference = Reference(whole.index_copy_(0, rows, hidden))
            if not shares_head:
                reference = Reference(reference.hidden, weight.detach(), None if bias is None else bias.detach())
            arguments["reference"] = reference
        return hidden.new_zeros(())

    chosen = {name: value[indices] for name, value in joined.inputs.items()}
    with torch.no_grad():
        if ref_model is not None:
            call_at_head(ref_model, chosen, keep)
        else:
            with causal_lm.as_reference(bare):
                call_at_head(model, chosen, keep)
    return arguments

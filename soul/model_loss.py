"""The unlearning loss of a Hugging Face model on one batch, for training loops of one's own::

    loss = soul.unlearning_loss(model, {"forget": forget, "retain": retain}, soul.losses.NPO(beta=0.1))
    loss.backward()

Forget and retain sequences are padded together and go through the model in one forward pass. While it runs, `soul.functional`
has put the fused ops of ``soul_kernels`` in the place of the head. They get the hidden states that the head would have got, and
the bias, scale and cap that belong to it. Logits of all tokens are never made, and whatever is wrapped around the model (DDP,
FSDP, autocast, adapters, hooks) does its work.
"""

from collections.abc import Mapping

import torch

from soul import functional, losses
from soul.models import causal_lm
from soul_kernels import Head, Reference, linear_logprob, linear_objective
from soul_kernels.errors import argument_error, check_choice
from soul_kernels.tokens import IGNORE_INDEX


def unlearning_loss(
    model: torch.nn.Module,
    batch: Mapping,
    objective: losses.Objective,
    *,
    ref_model: torch.nn.Module | None = None,
    return_outputs: bool = False,
    compat: str | None = None,
):
    """Return the loss of an objective on one batch of forget and retain sequences, with its graph.

    The value and the gradients are those of the objective on the model's own logits, whatever its family does between hidden
    states and logits: a head with a bias, logits that are scaled (Cohere, Granite) or capped (Gemma 2). A model whose logits
    are something else is refused.

    What the objective needs of a reference comes from the first of these that is there: ``ref_logps`` [B] fp32 in the forget
    batch (summed log-probabilities, from `soul.reference_logps`; enough for NPO and DPO), ``ref_model``, the model itself with
    its peft adapters switched off. The router loss of a mixture of experts is not part of the objective, and not added.

    Args:
        model: a Hugging Face causal language model, bare or in wrappers with a ``module``. It is called once, in the mode it is
            in, and left as it was.
        batch: ``{"forget": part, "retain": part}``. A part is a dict of ``input_ids`` and ``labels``, [B, T] int64, and
            ``attention_mask``, [B, T], 1 everywhere where it is missing. Labels are aligned with ``input_ids`` as for
            ``model(labels=...)``, not shifted; -100 is ignored. Forget and retain may differ in B and T. For pairs (DPO), and
            for objectives that relabel (PO), the forget entry is ``{"original": part, "alternate": part}``: the answers to be
            forgotten and those preferred to them. The retain part may be missing where ``objective.alpha`` is 0.
        objective: a `soul.losses.Objective`.
        ref_model: another causal language model, run without gradients; or None.
        return_outputs: also return what a Trainer expects of a model.
        compat: None; or "open-unlearning": a KL retain term and UNDIAL are means over the positions that its code counts,
            prompts and padding included (`soul.functional` says which). Other objectives are the same in both.

    Returns:
        The loss, [] fp32. With ``return_outputs`` the loss and a transformers ``CausalLMOutput`` with ``logits=None``, whose
        ``loss`` is the detached mean cross-entropy of the forget tokens.

    Raises:
        ArgumentError: a part of the batch is missing or its tensors do not belong together; the objective needs a reference and
            there is none; the model's logits are not ``softcap tanh(logit_scale (hidden @ weight.T + bias) / softcap)``; or it
            is in ``torch.nn.DataParallel``, whose replicas do not share a head.
    """
    check_choice("compat", compat, functional.COMPAT)
    if isinstance(model, torch.nn.DataParallel):
        remedy = "start one process a GPU, with torchrun or accelerate launch"
        raise argument_error("model", "one process a GPU", "DataParallel", remedy)
    if not isinstance(objective, losses.Objective):
        raise argument_error("objective", "an objective of soul.losses", repr(objective), "for instance soul.losses.NPO()")
    joined, is_forget, ref_logps = _joined(batch, objective)
    labels = functional.shifted_labels(joined)
    reference = _reference(model, ref_model, joined, labels, is_forget, objective, ref_logps)
    kept = []

    def value(hidden, weight, bias, transform):
        counting = functional.labels_as_coded(labels, batch, objective, len(weight)) if compat else labels
        head = Head(weight, bias, **transform)
        loss, logps = linear_objective(hidden, head, counting.to(hidden.device), objective, is_forget=is_forget,
                                       return_logps=True, **reference)  # fmt: skip
        kept.append(logps)
        return loss

    loss = functional.at_head(model, joined, value)
    if not return_outputs:
        return loss
    counted = (labels != IGNORE_INDEX) & is_forget.to(labels.device)[:, None]
    return loss, functional.trainer_outputs(kept[0], counted)


def _joined(batch, objective):
    """One batch of forget and retain sequences, [B] bool on the CPU: which are to be forgotten; and ref_logps or None."""
    forget = _entry(batch, "forget")
    if forget is None:
        raise argument_error("batch", "a forget batch", "/".join(batch) or "none", "pass {'forget': ..., 'retain': ...}")
    together = "alternate" in forget
    if objective.pairs and not together:
        remedy = "forget needs both: open-unlearning's data with alternate answers, or UnlearningDataset(pairs=True)"
        raise argument_error("batch['forget']", "original and alternate answers", "/".join(forget), remedy)
    if together:
        names = ("original", "alternate") if objective.pairs else ("alternate" if objective.relabels else "original",)
        forget = {f"batch['forget']['{name}']": _entry(forget, name) for name in names}
    else:
        forget = {"batch['forget']": forget}
    parts = dict(forget)
    if objective.alpha:
        parts["batch['retain']"] = _entry(batch, "retain")
        if parts["batch['retain']"] is None:
            raise argument_error("batch", f"a retain batch for {objective}", "none", "give retain data, or set alpha to 0")
    for name, part in parts.items():
        _check_part(name, part)
    forget, parts = list(forget.values()), list(parts.values())
    counts = [len(part["input_ids"]) for part in forget]
    if len({*counts}) > 1:
        raise argument_error("batch['forget']['alternate']", f"{counts[0]} sequences", counts[1], "they form pairs")
    length = max(part["input_ids"].shape[1] for part in parts)
    joined, n_forget = {}, sum(counts)
    for name, filler in (("input_ids", 0), ("attention_mask", 0), ("labels", IGNORE_INDEX)):
        padded = []
        for part in parts:
            value = part.get(name)
            value = torch.ones_like(part["input_ids"]) if value is None else value
            padded.append(torch.nn.functional.pad(value, (0, length - value.shape[1]), value=filler))
        joined[name] = torch.cat([torch.stack(padded[: len(forget)], 1).flatten(0, 1), *padded[len(forget) :]])
    ref_logps = None
    if all("ref_logps" in part for part in forget):
        known = torch.stack([part["ref_logps"].float() for part in forget], 1).flatten()
        ref_logps = torch.cat([known, known.new_zeros(len(joined["input_ids"]) - n_forget)])
    return joined, torch.arange(len(joined["input_ids"]), device="cpu") < n_forget, ref_logps


def _entry(mapping, name):
    """One entry of a batch, or None."""
    if not isinstance(mapping, Mapping):
        raise argument_error("batch", "a dict of forget and retain", type(mapping).__name__, "see soul.unlearning_loss")
    return mapping.get(name)


def _check_part(name, part):
    """Raises unless a part of a batch is a dict of tensors that belong together."""
    if not isinstance(part, Mapping):
        remedy = "each part is a dict of input_ids, labels and attention_mask"
        raise argument_error(name, "a dict of tensors", type(part).__name__, remedy)
    for key in ("input_ids", "labels"):
        if not isinstance(part.get(key), torch.Tensor):
            got = "none" if part.get(key) is None else type(part[key]).__name__
            raise argument_error(f"{name}['{key}']", "a tensor [B, T]", got, "labels are not shifted, -100 is ignored")
    shape = part["input_ids"].shape
    for key, expected in (("input_ids", shape[:2]), ("labels", shape), ("attention_mask", shape), ("ref_logps", shape[:1])):
        value = part.get(key)
        if value is not None and (value.shape != expected or len(shape) != 2):
            wanted = "[B, T]" if len(shape) != 2 else f"shape {tuple(expected)}, as input_ids"
            raise argument_error(f"{name}['{key}']", wanted, f"shape {tuple(value.shape)}", "pad the sequences of a part alike")


def _reference(model, ref_model, joined, labels, is_forget, objective, ref_logps):
    """What `linear_objective` takes of a reference: of those sequences only that the objective looks at."""
    divergence, needs_logps = objective.divergence, objective.needs_reference and ref_logps is None
    given = {"ref_logps": ref_logps} if objective.needs_reference else {}
    if divergence is None and not needs_logps:
        return given
    bare = causal_lm.bare(model)
    if ref_model is None and not causal_lm.has_adapters(bare):
        remedy = "pass ref_model, a copy made before training, or ref_logps where the objective needs no more"
        raise argument_error("ref_model", f"a reference for {objective}", None, remedy)
    needed = is_forget & needs_logps
    if divergence is not None:
        needed = needed | {"forget": is_forget, "retain": ~is_forget, "all": torch.ones_like(is_forget)}[divergence.of]
    rows = needed.nonzero()[:, 0].to(labels.device)
    # A frozen head is the same without adapters, and need not outlive the forward, after which FSDP may take it apart.
    own = ref_model is None and not any(t is not None and t.requires_grad for t in causal_lm.head(bare))
    found = {}

    def keep(hidden, weight, bias, transform):
        here = rows.to(hidden.device)
        if needs_logps:
            sums = linear_logprob(hidden, Head(weight, bias, **transform), labels[rows].to(hidden.device)).sum(1)
            found["ref_logps"] = sums.new_zeros(len(labels)).index_copy_(0, here, sums)
        if divergence is not None:
            whole = hidden.new_zeros(len(labels), *hidden.shape[1:])
            reference = Reference(whole.index_copy_(0, here, hidden))
            if not own:
                reference = Reference(reference.hidden, weight.detach(), None if bias is None else bias.detach())
            found["reference"] = reference
        return hidden.new_zeros(())

    chosen = {name: value[rows] for name, value in joined.items()}
    with torch.no_grad():
        if ref_model is not None:
            functional.at_head(ref_model, chosen, keep)
        else:
            with causal_lm.as_reference(bare):
                functional.at_head(model, chosen, keep)
    return {**given, **found}

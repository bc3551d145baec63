"""The loss functions that open-unlearning's trainers call, under its names and signatures, on fused ops.

    import trainer.utils, soul.functional
    trainer.utils.compute_dpo_loss = soul.functional.compute_dpo_loss   # before trainer.unlearn is imported

(``compute_batch_ceu`` is in ``trainer.unlearn.ceu``, the other six are in ``trainer.utils``;
``functools.partial(function, compat="open-unlearning")`` keeps published numbers.) They take models and batches as the
originals do and return the same pairs. Logits ``[B, T, V]`` are never made: during one forward pass the ops of ``soul_kernels``
take the place of the head (`soul.models.head_call`). Whatever is wrapped around the model (DDP, Accelerate's autocast,
adapters, hooks) does its work, and sees the loss as the model's output. The formulas are those of `soul.losses`.

Common to all:
    model: a Hugging Face causal language model with a linear head, bare or in wrappers with a ``module``, with or without
        adapters of peft (none on the head itself). It is called once per batch, in the mode it is in, and left as it was.
    ref_model, target_model: the reference model, run without gradients; it may be ``model`` itself. For distances over the
        vocabulary (KL, UNDIAL) its head must be whole: one that ZeRO-3 or FSDP has cut up is refused for its shape.
    inputs: dict of ``input_ids`` [B, T], ``attention_mask`` [B, T], ``labels`` [B, T] int64, not shifted, -100 ignored; further
        entries go to the model as they are.
    compat: None for the formula as it is meant; "open-unlearning" for the numbers of that code, oddities included. Each
        function lists the differences; docs/objectives.md gives the reasons. Two things are not reproduced. Log-probabilities
        are never rounded to the model's dtype, as that code does in bf16 and fp16. And if nothing is labelled, the loss here is
        0 and attached to the graph; there, the mean over nothing is NaN.
    outputs: a transformers ``CausalLMOutput`` with ``logits=None``; its ``loss`` is the mean cross-entropy of the tokens that
        counted, as the model's own, but detached.

Losses are fp32. Nothing is changed. Every function raises `ArgumentError`, a ``ValueError``, for an argument that does not fit.
Source: locuslab/open-unlearning, src/trainer/utils.py and src/trainer/unlearn/ceu.py.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from soul import losses
from soul.compat import COMPAT, labels_for_kl, labels_for_undial
from soul.models.head_call import call_at_head, causal_output, shifted_labels
from soul_kernels import Head, Reference, TokenBatch, linear_logprob, linear_objective
from soul_kernels.errors import argument_error, check_choice
from soul_kernels.tokens import IGNORE_INDEX, Transform

if TYPE_CHECKING:
    from transformers.modeling_outputs import CausalLMOutput


def compute_kl_divergence(
    model: torch.nn.Module, target_model: torch.nn.Module, inputs: Mapping[str, Tensor], *, compat: str | None = None
) -> tuple[Tensor, "CausalLMOutput"]:
    """Mean of ``KL(target || model)`` over the vocabulary, taken over the tokens that carry a label.

    ``compat="open-unlearning"``: the mean is over all B T positions, not shifted. Prompts, padding and the position after the
    last token count as well.

    Args:
        model: see the module; differentiated.
        target_model: the reference model, from which the divergence is taken.
        inputs: see the module.
        compat: see the module.

    Returns:
        Loss [] and outputs.
    """
    check_choice("compat", compat, COMPAT)
    labels = shifted_labels(inputs)
    if compat:
        labels = labels_for_kl(labels)
    none_forgotten = torch.zeros(len(labels), dtype=torch.bool)
    objective = losses.KLMin(gamma=0.0, alpha=1.0)
    reference = _reference(target_model, inputs)
    return _objective_loss(model, inputs, labels, objective, is_forget=none_forgotten, reference=reference)


def compute_batch_nll(
    model: torch.nn.Module, inputs: Mapping[str, Tensor], *, compat: str | None = None
) -> tuple[Tensor, "CausalLMOutput"]:
    """Negative log-likelihood of each sequence, summed over its labelled tokens.

    The result is the same in both modes: ``compat`` is checked and ignored. (SimNPO's trainer divides it by the number of
    labels before the shift. `soul.losses.SimNPO` divides by the number of labels that are predicted, one less if a text has no
    prompt.)

    Args:
        model: see the module; differentiated.
        inputs: see the module.
        compat: see the module.

    Returns:
        [B] fp32, 0 (with zero gradient) for a sequence without label, and outputs.
    """
    check_choice("compat", compat, COMPAT)
    labels = shifted_labels(inputs)
    detached_logps: list[Tensor] = []

    def sums(hidden: Tensor, weight: Tensor, bias: Tensor | None, transform: Transform) -> Tensor:
        logps = linear_logprob(hidden, Head(weight, bias, **transform), labels.to(hidden.device))
        detached_logps.append(logps.detach())
        return (-logps).sum(1)

    value = call_at_head(model, inputs, sums)
    return value, causal_output(detached_logps[0], labels != IGNORE_INDEX)


def compute_dpo_loss(
    model: torch.nn.Module,
    ref_model: torch.nn.Module,
    win_inputs: Mapping[str, Tensor] | None = None,
    lose_inputs: Mapping[str, Tensor] | None = None,
    beta: float = 1.0,
    *,
    compat: str | None = None,
) -> tuple[Tensor, tuple["CausalLMOutput | None", "CausalLMOutput | None"]]:
    """DPO of the winning over the losing sequences; with only one side, NPO of the losing sequences or its mirror image::

        -(2 / beta) mean_b logsigmoid(beta ((S_w - ref_w) - (S_l - ref_l)))       S: summed log-probability of a sequence

    A side without inputs contributes 0. The mean is over sequences (pairs) that have labels. The factor is 2 / beta in both
    modes, as in NPO (arXiv 2404.05868); the DPO paper and TRL have 1.

    ``compat="open-unlearning"``: the mean is over all B. A sequence without label counts there with log-ratio 0: alone it adds
    ``(2 / beta) log 2 / B`` and lowers the weight of the others; in a pair the other side still learns.

    `soul.losses.NPO` on `soul_kernels.linear_objective` saves one of the 4 GEMMs that this takes with a trained head.

    Args:
        model: see the module; differentiated.
        ref_model: the reference model.
        win_inputs: the preferred sequences, as ``inputs`` in the module, or None.
        lose_inputs: the sequences to be forgotten, as many as the preferred ones; or None.
        beta: inverse temperature, > 0.
        compat: see the module.

    Returns:
        Loss [] and the pair of outputs for winning and losing sequences, None for a side without inputs.

    Raises:
        ArgumentError: neither side has inputs, or their numbers of sequences differ.
    """
    check_choice("compat", compat, COMPAT)
    if win_inputs is None and lose_inputs is None:
        raise argument_error("win_inputs", "a batch here or as lose_inputs", None, "pass at least one of them")
    win = None if win_inputs is None else _side(model, ref_model, win_inputs, compat)
    lose = None if lose_inputs is None else _side(model, ref_model, lose_inputs, compat)
    objective: losses.Objective
    if lose is not None and win is not None:
        if len(lose.logps) != len(win.logps):
            expected = f"{len(win.logps)} sequences, as win_inputs"
            raise argument_error("lose_inputs", expected, len(lose.logps), "they form pairs")
        objective = losses.DPO(beta=beta, factor="2/beta", alpha=0.0)
        logps = _interleaved(lose.logps, win.logps)
        ref_logps = _interleaved(lose.ref_logps, win.ref_logps)
        labels = _interleaved(lose.labels, win.labels)
    else:
        side = win if lose is None else lose
        assert side is not None  # one of them has inputs
        objective = losses.NPO(beta=beta, alpha=0.0)
        logps, ref_logps, labels, _ = side
        if lose is None:  # the log-ratio has the other sign
            logps = -logps
            ref_logps = -ref_logps
    # For the objective, a sequence is one token of its summed log-probability.
    loss = objective(logps[:, None], TokenBatch.from_labels(labels[:, None], ref_logps=ref_logps))
    return loss, (None if win is None else win.outputs, None if lose is None else lose.outputs)


def compute_undial_loss(
    model: torch.nn.Module,
    ref_model: torch.nn.Module,
    inputs: Mapping[str, Tensor],
    beta: float,
    *,
    compat: str | None = None,
) -> tuple[Tensor, "CausalLMOutput"]:
    """Self-distillation with adjusted logits: cross-entropy with the reference model, the label's logit lowered by beta.

    ``mean CE(softmax(z_ref - beta onehot(y)), softmax(z))`` over the tokens that carry a label; see `soul.losses.UNDIAL`.

    ``compat="open-unlearning"``: the mean is over all B (T - 1) predicted positions, prompts and padding included. At prompts
    and padding the logit of token V - 100 is lowered, since their label -100 is an index that counts from the end.

    Args:
        model: see the module; differentiated.
        ref_model: the teacher.
        inputs: see the module.
        beta: the amount by which the label's logit is lowered, >= 0.
        compat: see the module.

    Returns:
        Loss [] and outputs.

    Raises:
        ArgumentError: in compatibility mode, the vocabulary has fewer than 100 tokens, so that there is no token V - 100.
    """
    check_choice("compat", compat, COMPAT)
    reference = _reference(ref_model, inputs)
    labels = shifted_labels(inputs)
    if compat:
        assert reference.weight is not None  # `_reference` always gives one
        labels = labels_for_undial(labels, len(reference.weight))
    return _objective_loss(model, inputs, labels, losses.UNDIAL(beta=beta, alpha=0.0), reference=reference)


def compute_wga_loss(
    model: torch.nn.Module, inputs: Mapping[str, Tensor], beta: float, *, compat: str | None = None
) -> tuple[Tensor, "CausalLMOutput"]:
    """Weighted gradient ascent: ``mean(sg[p_t]^beta logp_t)`` over labelled tokens; see `soul.losses.WGA`.

    The result is the same in both modes, up to rounding to the model's dtype: ``compat`` is checked and ignored.

    Args:
        model: see the module; differentiated.
        inputs: see the module.
        beta: exponent, >= 0; 0 is gradient ascent.
        compat: see the module.

    Returns:
        Loss [] and outputs.
    """
    check_choice("compat", compat, COMPAT)
    return _objective_loss(model, inputs, shifted_labels(inputs), losses.WGA(beta=beta, alpha=0.0))


def compute_satimp_loss(
    model: torch.nn.Module, inputs: Mapping[str, Tensor], beta1: float, beta2: float, *, compat: str | None = None
) -> tuple[Tensor, "CausalLMOutput"]:
    """Saturation and importance: ``mean(sg[p_t]^beta1 (1 - sg[p_t])^beta2 logp_t)``; see `soul.losses.SatImp`.

    The result is the same in both modes, up to rounding: on memorised tokens open-unlearning's ``1 - exp(logp)`` is 0, while
    ``-expm1(logp)`` here is not.

    Args:
        model: see the module; differentiated.
        inputs: see the module.
        beta1: exponent of p, >= 0.
        beta2: exponent of 1 - p, >= 0.
        compat: see the module.

    Returns:
        Loss [] and outputs.
    """
    check_choice("compat", compat, COMPAT)
    return _objective_loss(model, inputs, shifted_labels(inputs), losses.SatImp(beta1=beta1, beta2=beta2, alpha=0.0))


def compute_batch_ceu(
    model: torch.nn.Module,
    inputs: Mapping[str, Tensor],
    ignore_first_n_answer_tokens: int = 1,
    *,
    compat: str | None = None,
) -> tuple[Tensor, "CausalLMOutput"]:
    """Cross-entropy unlearning, a mean over labelled tokens but the first of each sequence; see `soul.losses.CEU`.

    ``compat="open-unlearning"``: the first tokens are counted before the shift. In a text without a prompt they include the
    very first token, which nothing predicts, so one predicted token less is left out.

    Args:
        model: see the module; differentiated.
        inputs: see the module.
        ignore_first_n_answer_tokens: number of tokens to leave out, >= 0.
        compat: see the module. In compatibility mode ``outputs.loss`` leaves these tokens out as well.

    Returns:
        Loss [] and outputs.
    """
    check_choice("compat", compat, COMPAT)
    objective = losses.CEU(ignore_first=ignore_first_n_answer_tokens, alpha=0.0)
    labels = shifted_labels(inputs)
    if compat:
        objective = losses.CEU(ignore_first=0, alpha=0.0)
        counted = (inputs["labels"] != IGNORE_INDEX).cumsum(1) > ignore_first_n_answer_tokens
        labels = shifted_labels({"labels": inputs["labels"].masked_fill(~counted, IGNORE_INDEX)})
    return _objective_loss(model, inputs, labels, objective)


def _objective_loss(
    model: torch.nn.Module, inputs: Mapping[str, Tensor], labels: Tensor, objective: losses.Objective, **options: Any
) -> tuple[Tensor, "CausalLMOutput"]:
    """Return the loss of an objective on one batch, and outputs; ``options`` are those of `linear_objective`."""
    detached_logps: list[Tensor] = []

    def value(hidden: Tensor, weight: Tensor, bias: Tensor | None, transform: Transform) -> Tensor:
        head = Head(weight, bias, **transform)
        loss, logps = linear_objective(hidden, head, labels.to(hidden.device), objective, return_logps=True, **options)
        detached_logps.append(logps)
        return loss

    loss = call_at_head(model, inputs, value)
    counted = (labels != IGNORE_INDEX) & (shifted_labels(inputs) != IGNORE_INDEX)  # compat may add labels
    return loss, causal_output(detached_logps[0], counted)


class _Side(NamedTuple):
    """The winning or the losing sequences of a DPO loss.

    Attributes:
        logps: [B] summed log-probabilities under the model.
        ref_logps: [B], the same under the reference model.
        labels: [B] int64, 0 for a sequence that counts and -100 for one that does not.
        outputs: what a trainer gets in place of the model's output.
    """

    logps: Tensor
    ref_logps: Tensor
    labels: Tensor
    outputs: "CausalLMOutput"


def _side(model: torch.nn.Module, ref_model: torch.nn.Module, inputs: Mapping[str, Tensor], compat: str | None) -> _Side:
    nll, outputs = compute_batch_nll(model, inputs)
    with torch.no_grad():
        ref_nll, _ = compute_batch_nll(ref_model, inputs)
    counts = (shifted_labels(inputs) != IGNORE_INDEX).any(1).to(nll.device)
    labels = torch.zeros_like(counts, dtype=torch.int64)
    labels = labels if compat else labels.masked_fill(~counts, IGNORE_INDEX)
    return _Side(-nll, -ref_nll.to(nll.device), labels, outputs)


def _interleaved(lose: Tensor, win: Tensor) -> Tensor:
    """Return values [B] of both sides in the order of `soul.losses.DPO`, [2 B]: losing sequences at 2i, winning at 2i + 1."""
    return torch.stack([lose, win], 1).flatten()


def _reference(ref_model: torch.nn.Module, inputs: Mapping[str, Tensor]) -> Reference:
    """Return hidden states and head of a reference model on a batch."""
    references: list[Reference] = []

    def keep(hidden: Tensor, weight: Tensor, bias: Tensor | None, transform: Transform) -> Tensor:
        references.append(Reference(hidden, weight.detach(), None if bias is None else bias.detach()))
        return hidden.new_zeros(())

    with torch.no_grad():
        call_at_head(ref_model, inputs, keep)
    return references[0]

"""Membership attacks that need more than the pass over the answers: a reference model, or a backward pass for every row.

The other four attacks come from statistics that `soul.evaluate.model.answer_columns` takes anyway. All scores are higher for
texts that are more likely remembered; `soul.evaluate.metrics.attack_scores` names them.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

import torch

from soul.data.batches import collate
from soul.data.examples import Sequence
from soul.evaluate.metrics import ATTACKS, COSTLY_ATTACKS
from soul.models.causal_lm import evaluating, token_logps, trained
from soul.output.progress import track
from soul_kernels.errors import argument_error
from soul_kernels.tokens import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclasses.dataclass(frozen=True)
class CostlyAttacks:
    """Which of the attacks that need another pass are run on the forget set and the holdout set.

    Attributes:
        names: some of `soul.evaluate.metrics.COSTLY_ATTACKS`.
        reference_losses: "forget", "holdout" -> [n], mean losses of the same answers under another model, for "reference".
    """

    names: tuple[str, ...] = ()
    reference_losses: Mapping[str, torch.Tensor] = dataclasses.field(default_factory=dict)


def parse_attacks(names: Collection[str]) -> tuple[str, ...]:
    """Return the costly ones among the names of attacks; the word "all" stands for all.

    Raises:
        ArgumentError: there is no attack of such a name.
    """
    for name in names:
        if name not in (*ATTACKS, "all"):
            raise argument_error("membership_attacks", f"all, or some of {', '.join(ATTACKS)}", repr(name), "check the names")
    return COSTLY_ATTACKS if "all" in names else tuple(name for name in COSTLY_ATTACKS if name in names)


def without_end(sequence: Sequence, end: int | None) -> Sequence:
    """Return a sequence whose last label is ignored if it is the token ``end`` and not the only label."""
    last = max(t for t, label in enumerate(sequence.labels) if label != IGNORE_INDEX)
    if sequence.labels[last] != end or sequence.n_labels == 1:
        return sequence
    labels = [*sequence.labels]
    labels[last] = IGNORE_INDEX
    return dataclasses.replace(sequence, labels=labels)


def gradient_norms(
    model: "PreTrainedModel", sequences: list[Sequence], end: int | None, *, backend: str = "auto"
) -> torch.Tensor:
    """Return for every sequence ``mean_p ||dL/dp||_2`` over the tensors p of the parameters, [n] fp64 on the CPU.

    L is the mean loss of the answer's tokens without the end of the sequence. As in open-unlearning (``mia/gradnorm.py`` with
    p = 2): the mean of the norms of single tensors, not the norm of the whole gradient, over those that the loss depends on.
    Only parameters that require a gradient count, a tied head once. One row is run at a time, in evaluation mode and without
    changing ``grad``; the gradient of a whole model is in memory meanwhile.

    Args:
        model: a causal language model with parameters that require a gradient.
        sequences: from `soul.data.encode`.
        end: token id of the end of a sequence.
        backend: "auto", "triton", "compile", "torch" or "reference".

    Raises:
        ArgumentError: no parameter requires a gradient.
    """
    params = trained(model)
    device = params[0].device
    norms: list[float] = []
    with evaluating(model), torch.enable_grad():
        for sequence in track(sequences, "gradient norms"):
            batch = collate([without_end(sequence, end)], [], device=device)
            loss = -token_logps(model, batch, backend).sum() / len(batch.token_indices)
            gradients = torch.autograd.grad(loss, params, allow_unused=True)
            of_tensors = [torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients if g is not None]
            norms.append(torch.stack(of_tensors).mean().item())
    return torch.tensor(norms, dtype=torch.float64, device="cpu")


def costly_columns(
    model: "PreTrainedModel",
    sequences: list[Sequence],
    losses: torch.Tensor,
    attacks: CostlyAttacks,
    name: str,
    end: int | None,
    backend: str = "auto",
) -> dict[str, torch.Tensor]:
    """Return the columns of the costly attacks for one set, [n] each.

    Args:
        model: a causal language model.
        sequences: the n answers of the set.
        losses: [n], their mean losses.
        attacks: which attacks.
        name: "forget" or "holdout".
        end: token id of the end of a sequence.
        backend: as in `gradient_norms`.
    """
    columns = {}
    if "reference" in attacks.names:
        columns["reference"] = attacks.reference_losses[name] - losses
    if "gradnorm" in attacks.names:
        columns["gradnorm"] = -gradient_norms(model, sequences, end, backend=backend)
    return columns

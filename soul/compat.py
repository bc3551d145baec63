"""The positions over which open-unlearning's code takes its means, where they are others than those of `soul.losses`.

An op counts the positions that have a label. So a mean over more positions is had by labels at these, and the functions here
return such labels. Which objective is concerned, and why the means differ: docs/objectives.md.
Source: locuslab/open-unlearning, src/trainer/utils.py.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from soul import losses
from soul_kernels.errors import argument_error
from soul_kernels.tokens import IGNORE_INDEX

COMPAT = (None, "open-unlearning")  # values of the option ``compat``: the formulas as they are meant, or as coded there


def labels_for_kl(labels: Tensor) -> Tensor:
    """Return shifted labels [B, T] with a token at every position, over all of which open-unlearning's mean of a KL runs.

    A KL does not depend on the label, so any token serves.
    """
    return labels.masked_fill(labels == IGNORE_INDEX, 0)


def labels_for_undial(labels: Tensor, n_vocab: int) -> Tensor:
    """Return shifted labels [B, T] with token V - 100 at the positions without a label, the last position excepted.

    Open-unlearning's code lowers the logit at index -100 there, which counts from the end of the vocabulary. The last position
    predicts nothing.

    Args:
        labels: [B, T] int64, -100 where there is none.
        n_vocab: V, the rows of the head.

    Raises:
        ArgumentError: the vocabulary has fewer than 100 tokens.
    """
    if n_vocab < -IGNORE_INDEX:
        raise argument_error("compat", f"a vocabulary of {-IGNORE_INDEX} or more", n_vocab, "pass compat=None")
    coded = labels.masked_fill(labels == IGNORE_INDEX, n_vocab + IGNORE_INDEX)
    coded[:, -1] = IGNORE_INDEX
    return coded


def labels_as_coded(labels: Tensor, inputs: Mapping[str, Any], objective: losses.Objective, n_vocab: int) -> Tensor:
    """Return shifted labels of forget and retain sequences in one batch at the positions that open-unlearning's code counts.

    These are labels for a KL retain term and for UNDIAL, each within its own batch before the two were padded to one length.
    Labels of other objectives stay as they are.

    Args:
        labels: [B, T] int64, forget sequences first.
        inputs: the two batches, as for `soul.unlearning_loss`.
        objective: a `soul.losses.Objective`.
        n_vocab: rows of the head.

    Returns:
        A copy of the labels.
    """
    coded = labels.clone()
    n_retain, length = inputs["retain"]["input_ids"].shape if objective.alpha else (0, 0)
    n_forget = len(labels) - n_retain
    if objective.alpha and objective.retain == "kl":
        coded[n_forget:, :length] = labels_for_kl(coded[n_forget:, :length])
    if isinstance(objective, losses.UNDIAL):
        forget = inputs["forget"].get("original", inputs["forget"])
        length = forget["input_ids"].shape[1]
        coded[:n_forget, :length] = labels_for_undial(coded[:n_forget, :length], n_vocab)
    return coded

"""Labels that reproduce the means of open-unlearning's code, for objectives in which `soul.losses` counts other positions.

An op averages over the positions that have a label. So the functions here return labels at all positions that open-unlearning's
code counts. docs/objectives.md says which objectives are concerned, and why the means differ.
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
    """Return shifted labels [B, T] with a token at every position, since open-unlearning averages a KL over all positions.

    A KL does not depend on the label, so any token serves.
    """
    return labels.masked_fill(labels == IGNORE_INDEX, 0)


def labels_for_undial(labels: Tensor, n_vocab: int) -> Tensor:
    """Return shifted labels [B, T] with token V - 100 at all positions without a label but the last, which predicts nothing.

    At these positions open-unlearning's code lowers the logit at index -100, which counts from the end of the vocabulary.

    Args:
        labels: [B, T] int64, shifted, -100 at positions without a label.
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
    """Return the shifted labels of a joined batch, at the positions that open-unlearning's code counts.

    Labels change for a KL retain term and for UNDIAL only. Each side gets labels up to its own length, not up to the length to
    which the two sides were padded.

    Args:
        labels: [B, T] int64, forget sequences first.
        inputs: the two sides before they were joined, as `soul.unlearning_loss` takes them.
        objective: a `soul.losses.Objective`.
        n_vocab: rows of the head.

    Returns:
        New labels; the argument is not changed.
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

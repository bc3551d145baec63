"""Unlearning objectives, each a short function of per-token log-probabilities.

An objective is called as ``objective(logps [B, T], batch: TokenBatch) -> [] loss``; autograd of this very code gives the
fused kernels their coefficients. Notation: F and R are the kept tokens of the forget and of the retain sequences, S_b the
summed log-probability of sequence b. ``gamma`` weighs forgetting and ``alpha`` retaining, everywhere.

To write another one: subclass `Objective`, return named terms, and say in ``additive`` over what they are a plain sum.
"""

import inspect
import math

import torch.nn.functional as F

from soul_kernels._checks import argument_error, check_choice, check_range


class Objective:
    """Base of the objectives.

    Attributes:
        additive: "tokens" or "sequences": the loss is a sum over these, so it can be computed chunk by chunk; None: it is
            not, and takes a second sweep where the batch is larger than a chunk.
        needs_reference: ``batch.ref_logps`` must be given.
        relabels: the forget sequences must be answered by refusals instead of their own answers.
    """

    additive = None
    needs_reference = False
    relabels = False

    def __call__(self, logps, batch):
        """The loss, []: the sum of `terms`."""
        return sum(self.terms(logps, batch).values())

    def terms(self, logps, batch):
        """The weighted terms of the loss by name, each [].

        Args:
            logps: [B, T] log-probabilities, 0 where a label is ignored.
            batch: the `soul_kernels.TokenBatch` that belongs to them.
        """
        raise NotImplementedError

    def __repr__(self):
        arguments = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({arguments})"


def forget_nll(logps, batch):
    """Mean negative log-likelihood of the forget tokens: ``-sum_F logp / |F|``."""
    return -(logps * (batch.mask & batch.is_forget[:, None])).sum() / batch.n_forget_tokens


def retain_nll(logps, batch):
    """Mean negative log-likelihood of the retain tokens: ``-sum_R logp / |R|``."""
    return -(logps * (batch.mask & ~batch.is_forget[:, None])).sum() / batch.n_retain_tokens


class GradAscent(Objective):
    """``-gamma CE(F)``: gradient ascent on what is to be forgotten. GA in SOUL, TOFU and open-unlearning."""

    additive = "tokens"

    def __init__(self, gamma=1.0):
        check_range("gamma", gamma)
        self.gamma = gamma

    def terms(self, logps, batch):
        """Forget."""
        return {"forget": -self.gamma * forget_nll(logps, batch)}


class GradDiff(Objective):
    """``-gamma CE(F) + alpha CE(R)``, each a mean over its tokens. open-unlearning's GradDiff with its NLL retain term; SOUL's
    GA+FT, whose own gamma is our alpha.
    """

    additive = "tokens"

    def __init__(self, gamma=1.0, alpha=1.0):
        check_range("gamma", gamma)
        check_range("alpha", alpha)
        self.gamma, self.alpha = gamma, alpha

    def terms(self, logps, batch):
        """forget, retain."""
        return {"forget": -self.gamma * forget_nll(logps, batch), "retain": self.alpha * retain_nll(logps, batch)}


class PO(Objective):
    """``gamma CE(F') + alpha CE(R)`` where F' are the forget questions answered by refusals. Preference optimization in the
    SOUL paper (CL+FT in its code), IDK in TOFU. The data must be relabelled before: see `soul.data.refuse`.
    """

    additive = "tokens"
    relabels = True

    def __init__(self, gamma=1.0, alpha=1.0):
        check_range("gamma", gamma)
        check_range("alpha", alpha)
        self.gamma, self.alpha = gamma, alpha

    def terms(self, logps, batch):
        """forget, retain."""
        return {"forget": self.gamma * forget_nll(logps, batch), "retain": self.alpha * retain_nll(logps, batch)}


class NPO(Objective):
    """Negative preference optimization (Zhang et al. 2024, arXiv 2404.05868, equation 3) with a retain term.

    ``reduction="sequence_sum"``, the paper and open-unlearning: each sequence by the sum over its tokens::

        -gamma (2 / beta) mean_b logsigmoid(-beta (S_b - ref_b)) + alpha CE(R)

    ``reduction="token_mean"``, SOUL's code: one ratio for the batch, of token means; not a sum over sequences::

        -gamma (2 / beta) logsigmoid(-beta (sum_b S_b - sum_b ref_b) / |F|) + alpha CE(R)

    Args:
        beta: inverse temperature, > 0. For beta -> 0 the gradient is that of gradient ascent.
        gamma: weight of forgetting.
        alpha: weight of retaining.
        reduction: "sequence_sum" or "token_mean".
    """

    needs_reference = True

    def __init__(self, beta=0.1, gamma=1.0, alpha=1.0, reduction="sequence_sum"):
        if not 0 < beta < math.inf:
            raise argument_error("beta", "a positive number", beta, "0.1 is what the papers use")
        check_range("gamma", gamma)
        check_range("alpha", alpha)
        check_choice("reduction", reduction, ("sequence_sum", "token_mean"))
        self.beta, self.gamma, self.alpha, self.reduction = beta, gamma, alpha, reduction

    @property
    def additive(self):
        """Over sequences, unless the batch shares one ratio."""
        return "sequences" if self.reduction == "sequence_sum" else None

    def terms(self, logps, batch):
        """forget, retain."""
        if batch.ref_logps is None:
            remedy = "compute them with soul.unlearn.reference_logps before the first step"
            raise argument_error("ref_logps", "one value a sequence", None, remedy)
        counted = batch.is_forget & batch.mask.any(1)
        ratio = ((logps * batch.mask).sum(1) - batch.ref_logps) * counted
        if self.reduction == "sequence_sum":
            forget = (F.logsigmoid(-self.beta * ratio) * counted).sum() / batch.n_forget_sequences
        else:
            forget = F.logsigmoid(-self.beta * ratio.sum() / batch.n_forget_tokens) * counted.any()
        forget = -self.gamma * (2 / self.beta) * forget
        return {"forget": forget, "retain": self.alpha * retain_nll(logps, batch)}


OBJECTIVES = {"ga": GradAscent, "graddiff": GradDiff, "npo": NPO, "po": PO}


def get(name, **options):
    """The objective of a name, for configurations: ``get("npo", beta=0.1)``.

    Raises:
        ValueError: no objective of that name, or none with these options; the known ones are listed.
    """
    check_choice("method", name, tuple(OBJECTIVES))
    objective = OBJECTIVES[name]
    known = inspect.signature(objective).parameters
    for option in options:
        if option not in known:
            raise argument_error("method", f"options of {objective.__name__} ({', '.join(known)})", option, "drop it")
    return objective(**options)

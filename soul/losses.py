"""Unlearning objectives, each a short function of per-token log-probabilities.

An objective is called as ``objective(logps [B, T], batch: TokenBatch) -> [] loss``. The fused kernels take their per-token
coefficients from autograd of this code, so a formula stands here and nowhere else.

Notation: F and R are the labelled tokens of the forget and of the retain sequences. p_t is the probability of token t, S_b the
summed log-probability of sequence b, and n_b the number of its labelled tokens. sg[] stops the gradient. ``gamma`` is the
weight of forgetting and ``alpha`` that of retaining, in every objective. docs/objectives.md compares the formulas with those
of other code bases, which use the same names for different things.

To add an objective, subclass `Objective`, return the forget term from ``forget``, and set ``additive`` to the unit over which
the loss is a plain sum, and ``linear`` if it is a weighted sum of the log-probabilities.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from soul_kernels import Divergence, TokenBatch, register_objective
from soul_kernels.errors import argument_error, check_choice, check_positive, check_range

T = TypeVar("T")


def forget_nll(logps: Tensor, batch: TokenBatch) -> Tensor:
    """Return the mean negative log-likelihood of the forget tokens, []: ``-sum_F logp / |F|``."""
    return -torch.where(batch.mask & batch.is_forget[:, None], logps, 0.0).sum() / batch.n_forget_tokens


def retain_nll(logps: Tensor, batch: TokenBatch) -> Tensor:
    """Return the mean negative log-likelihood of the retain tokens, []: ``-sum_R logp / |R|``."""
    return -torch.where(batch.mask & ~batch.is_forget[:, None], logps, 0.0).sum() / batch.n_retain_tokens


def retain_divergence(logps: Tensor, batch: TokenBatch) -> Tensor:
    """Return the mean divergence from the reference model at the retain tokens, [], of the kind that the objective requests."""
    assert batch.divergences is not None  # the op computes what the objective's `divergence` requests
    return (batch.divergences * (batch.mask & ~batch.is_forget[:, None])).sum() / batch.n_retain_tokens


RETAIN_TERMS: dict[str, Callable[[Tensor, TokenBatch], Tensor]] = {
    "ce": retain_nll,
    "kl": retain_divergence,
    "soul_kl": retain_divergence,
}


class Objective:
    """The base class of the objectives: ``gamma forget(logps, batch) + alpha retain``.

    Args:
        gamma: weight of forgetting, >= 0.
        alpha: weight of retaining, >= 0. With 0 there is no retain term, and no retain sequence is needed.
        retain: the retain term, a mean over R: "ce", the cross-entropy; "kl", KL(reference model || model) over the vocabulary
            (TOFU, open-unlearning); or "soul_kl", the cross-entropy H(model, reference model) that SOUL's code calls KL. "kl"
            and "soul_kl" need the hidden states of the reference model.

    Attributes:
        additive: the unit over which the loss is a plain sum, so that it can be computed chunk by chunk: "tokens", "sequences"
            or "pairs" (sequences 2i and 2i + 1). None: it is no such sum, and a batch larger than a chunk takes two sweeps.
        shares_batches: whether the values on pieces of a batch that several processes evaluate at the same time add up to the
            loss although it is no such sum, because the objective takes what it needs of the whole from ``batch.total``.
        linear: whether the loss is a linear function of the log-probabilities (and divergences), 0 where all of them are 0. Its
            derivatives are then known before the log-probabilities are, and the logits are read once. A subclass with another
            formula does not inherit it.
        needs_reference: whether ``batch.ref_logps`` must be set.
        needs_statistics: whether ``batch.statistics`` must be set.
        divergence: a `soul_kernels.Divergence` that describes what ``batch.divergences`` must hold; or None.
        relabels: whether the answers of the forget sequences must be replaced by refusals beforehand.
        pairs: whether the forget sequences come in pairs, each answer followed by the refusal that is to replace it.
        key: the number by which ops under torch.compile, which take no Python objects, look the objective up.
    """

    additive: str | None = None
    shares_batches: bool = False
    linear: bool = False
    needs_reference: bool = False
    needs_statistics: bool = False
    relabels: bool = False
    pairs: bool = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "linear" not in vars(cls) and not {"forget", "terms", "__call__"}.isdisjoint(vars(cls)):
            cls.linear = False

    def __init__(self, gamma: float = 1.0, alpha: float = 1.0, retain: str = "ce") -> None:
        check_range("gamma", gamma)
        check_range("alpha", alpha)
        check_choice("retain", retain, tuple(RETAIN_TERMS))
        self.gamma = gamma
        self.alpha = alpha
        self.retain = retain
        self.key: int = register_objective(self)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "key"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, key=register_objective(self))  # a copy is another objective, and gets its own number

    def __call__(self, logps: Tensor, batch: TokenBatch) -> Tensor:
        """Return the loss, []: the sum of `terms`."""
        return sum(self.terms(logps, batch).values())  # type: ignore[return-value]  # there is at least one term

    def terms(self, logps: Tensor, batch: TokenBatch) -> dict[str, Tensor]:
        """Return the weighted terms of the loss by name, each []: "forget" and, unless alpha is 0, "retain".

        Args:
            logps: [B, T] log-probabilities, 0 where a label is ignored.
            batch: the `soul_kernels.TokenBatch` of the same tokens.
        """
        terms = {"forget": self.gamma * self.forget(logps, batch)}
        if self.alpha:
            terms["retain"] = self.alpha * RETAIN_TERMS[self.retain](logps, batch)
        return terms

    def forget(self, logps: Tensor, batch: TokenBatch) -> Tensor:
        """Return the forget term, [], without its weight."""
        raise NotImplementedError

    @property
    def divergence(self) -> Divergence | None:
        """The divergence that the retain term needs."""
        return Divergence("retain", self.retain) if self.retain != "ce" and self.alpha else None

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.__getstate__().items())
        return f"{type(self).__name__}({arguments})"


class GradAscent(Objective):
    """``-gamma CE(F)``: gradient ascent on the forget tokens. GA in SOUL, TOFU and open-unlearning."""

    additive = "tokens"
    linear = True

    def __init__(self, gamma: float = 1.0) -> None:
        super().__init__(gamma, alpha=0.0)

    def forget(self, logps: Tensor, batch: TokenBatch) -> Tensor:
        """Return ``-CE(F)``."""
        return -forget_nll(logps, batch)


class GradDiff(Objective):
    """``-gamma CE(F) + alpha retain``, each a mean over its tokens: GradDiff in open-unlearning, GA+FT in SOUL's code (whose
    gamma is our alpha), gradient difference in TOFU.
    """

    additive = "tokens"
    linear = True

    def forget(self, logps: Tensor, batch: TokenBatch) -> Tensor:
        """Return ``-CE(F)``."""
        return -forget_nll(logps, batch)


class KLMin(GradDiff):
    """``-gamma CE(F) + alpha KL(reference model || model)(R)``: KL minimization of TOFU (arXiv 2401.06121, appendix)."""

    def __init__(self, gamma: float = 1.0, alpha: float = 1.0) -> None:
        super().__init__(gamma, alpha, "kl")


class PO(Objective):
    """``gamma CE(F') + alpha retain``, where F' are the forget questions with refusals for answers. Preference optimization in
    the SOUL paper (CL+FT in its code), IDK in TOFU. The data must be relabelled beforehand: see `soul.data.refuse`.
    """

    additive = "tokens"
    linear = True
    relabels = True

    def forget(self, logps: Tensor, batch: TokenBatch) -> Tensor:
        """Return ``CE(F')``."""
        return forget_nll(logps, batch)


class Memorize(PO):
    """``gamma CE(F) + alpha retain``, where F are the rows to be learned: fine-tuning, by which models with something to forget
    are made. The method of ``soul memorize``, not in ``OBJECTIVES``, since nothing is forgotten. By default there is no retain
    term.
    """

    relabels = False

    def __init__(self, gamma: float = 1.0, alpha: float = 0.0, retain: str = "ce") -> None:
        super().__init__(gamma, alpha, retain)


class NPO(Objective):
    """Negative preference optimization (Zhang et al. 2024, arXiv 2404.05868, equation 3) with a retain term.

    ``reduction="sequence_sum"``, as in the paper and in open-unlearning: one log-ratio for each sequence, of the sums over its
    tokens::

        -gamma (2 / beta) mean_b logsigmoid(-beta (S_b - ref_b)) + alpha retain

    ``reduction="token_mean"``, as in SOUL's code: one log-ratio for the batch, of token means; not a sum over sequences::

        -gamma (2 / beta) logsigmoid(-beta (sum_b S_b - sum_b ref_b) / |F|) + alpha retain

    Args:
        beta: inverse temperature, > 0. As beta approaches 0, the gradient approaches that of gradient ascent.
        gamma: weight of forgetting.
        alpha: weight of retaining.
        reduction: "sequence_sum" or "token_mean".
        retain: as in `Objective`.
    """

    needs_reference = True
    shares_batches = True

    def __init__(
        self,
        beta: float = 0.1,
        gamma: float = 1.0,
        alpha: float = 1.0,
        reduction: str = "sequence_sum",
        retain: str = "ce",
    ) -> None:
        super().__init__(gamma, alpha, retain)
        check_choice("reduction", reduction, ("sequence_sum", "token_mean"))
        check_positive("beta", beta, "0.1 is what the papers use")
        self.beta = beta
        self.reduction = reduction

    @property
    def additive(self) -> str | None:  # type: ignore[override]  # it follows from the reduction, and is not set
        """The unit over which the loss is a sum: "sequences", or None if the batch shares one log-ratio."""
        return "sequences" if self.reduction == "sequence_sum" else None

    def forget(self, logps: Tensor, batch: TokenBatch) -> Tensor:
        """Return the mean of ``-(2 / beta) logsigmoid(-beta log_ratio)``."""
        counted = batch.is_forget & batch.mask.any(1)
        ratio = torch.where(counted, _log_ratios(logps, batch), 0.0)
        if self.reduction == "sequence_sum":
            value = (F.logsigmoid(-self.beta * ratio) * counted).sum() / batch.n_forget_sequences
        else:
            value = F.logsigmoid(-self.beta * batch.total(ratio.sum()) / batch.n_forget_tokens)
            share = counted.sum() / batch.n_forget_sequences  # the values of all processes add up, each has its own gradient
            value = share * value.detach() + (value - value.detach())
        return -(2 / self.beta) * value


class SimNPO(Objective):
    """Simple NPO (Fan et al. 2024, arXiv 2410.07163, equation 4): length-normalised, without a reference model::

        -gamma (2 / beta) mean_b logsigmoid(-beta (S_b / n_b + delta)) + alpha retain

    As coded in open-unlearning, whose configuration has beta 4.5, delta 0, gamma 0.125. The paper's margin is beta delta.

    Args:
        beta: inverse temperature, > 0.
        delta: margin, in nats per token.
        gamma: weight of forgetting.
        alpha: weight of retaining.
        retain: as in `Objective`.
    """

    additive = "sequences"

    def __init__(
        self, beta: float = 4.5, delta: float = 0.0, gamma: float = 1.0, alpha: float = 1.0, retain: str = "ce"
    ) -> None:
        super().__init__(gamma, alpha, retain)
        if not math.isfinite(delta):
            raise argument_error("delta", "a finite number", delta, "0 is open-unlearning's")
        check_positive("beta", beta, "4.5 is open-unlearning's")
        self.beta = beta
        self.delta = delta

    def forget(self, logps: Tensor, batch: TokenBatch) -> Tensor:
        """Return the mean over sequences of ``-(2 / beta) logsigmoid(-beta (mean_logp + delta))``."""
        counted = batch.is_forget & (batch.lengths > 0)
        mean = (logps * batch.mask).sum(1) / batch.lengths.clamp(min=1)
        value = F.logsigmoid(-self.beta * (mean + self.delta)) * counted
        return -(2 / self.beta) * value.sum() / batch.n_forget_sequences


class DPO(Objective):
    """Direct preference optimization (Rafailov et al. 2023, arXiv 2305.18290, equation 7) of refusals over answers::

        -gamma factor mean_i logsigmoid(beta ((S_w - ref_w) - (S_l - ref_l))) + alpha retain

    The forget sequences come in pairs: at 2i the answer l that is to be forgotten, at 2i + 1 the preferred answer w. Both count
    as forget sequences; `soul.data.pair_refusals` makes them. IdkDPO and AltPO in open-unlearning.

    Args:
        beta: inverse temperature, > 0.
        factor: "2/beta", as in open-unlearning and like NPO, so that the gradient at the reference model does not depend on
            beta; or "1", as in the paper and in TRL, which is a twentieth of that at beta 0.1.
        gamma: weight of forgetting.
        alpha: weight of retaining.
        retain: as in `Objective`.
    """

    additive = "pairs"
    needs_reference = True
    pairs = True

    def __init__(
        self, beta: float = 0.1, factor: str = "2/beta", gamma: float = 1.0, alpha: float = 1.0, retain: str = "ce"
    ) -> None:
        super().__init__(gamma, alpha, retain)
        check_choice("factor", factor, ("2/beta", "1"))
        check_positive("beta", beta, "0.1 is what the papers use")
        self.beta = beta
        self.factor = factor

    def forget(self, logps: Tensor, batch: TokenBatch) -> Tensor:
        """Return the mean over pairs of ``-factor logsigmoid(beta margin)``."""
        answer, refusal = _pairs(_log_ratios(logps, batch))
        counted = torch.logical_and(*_pairs(batch.is_forget & batch.mask.any(1)))
        # The mean is over the pairs of the whole batch; this may be one chunk of it.
        n_pairs = torch.logical_and(*_pairs(batch.whole.is_forget & batch.whole.mask.any(1))).sum().clamp(min=1)
        margin = torch.where(counted, refusal - answer, 0.0)
        value = (F.logsigmoid(self.beta * margin) * counted).sum() / n_pairs
        return -(2 / self.beta if self.factor == "2/beta" else 1.0) * value


class WGA(Objective):
    """Weighted gradient ascent (Wang et al. 2025, arXiv 2502.19301): ``gamma mean_F(sg[p_t]^beta logp_t) + alpha retain``.

    As coded in open-unlearning, whose default beta is 1. With beta 0 it is gradient ascent.

    Args:
        beta: exponent of p, >= 0.
        gamma: weight of forgetting.
        alpha: weight of retaining.
        retain: as in `Objective`.
    """

    additive = "tokens"

    def __init__(self, beta: float = 1.0, gamma: float = 1.0, alpha: float = 1.0, retain: str = "ce") -> None:
        super().__init__(gamma, alpha, retain)
        check_range("beta", beta)
        self.beta = beta

    def forget(self, logps: Tensor, batch: TokenBatch) -> Tensor:
        """Return the mean of ``sg[p^beta] log p``."""
        return -forget_nll(torch.exp(self.beta * logps.detach()) * logps, batch)


class SatImp(Objective):
    """Saturation and importance (Yang et al. 2025, arXiv 2505.11953)::

        gamma mean_F(sg[p_t]^beta1 (1 - sg[p_t])^beta2 logp_t) + alpha retain

    As coded in open-unlearning, whose defaults are beta1 5, beta2 1, gamma 0.1 in its configuration. 1 - p is taken from
    expm1, so memorised tokens keep their weight.

    Args:
        beta1: exponent of p, >= 0.
        beta2: exponent of 1 - p, >= 0.
        gamma: weight of forgetting.
        alpha: weight of retaining.
        retain: as in `Objective`.
    """

    additive = "tokens"

    def __init__(
        self, beta1: float = 5.0, beta2: float = 1.0, gamma: float = 1.0, alpha: float = 1.0, retain: str = "ce"
    ) -> None:
        super().__init__(gamma, alpha, retain)
        check_range("beta1", beta1)
        check_range("beta2", beta2)
        self.beta1 = beta1
        self.beta2 = beta2

    def forget(self, logps: Tensor, batch: TokenBatch) -> Tensor:
        """Return the mean of ``sg[p^beta1 (1 - p)^beta2] log p``."""
        constant = logps.detach()
        weight = torch.exp(self.beta1 * constant) * (-torch.expm1(constant)) ** self.beta2
        return -forget_nll(weight * logps, batch)


class CEU(Objective):
    """Cross-entropy unlearning (Yang 2025, arXiv 2503.01224): the target is the model's own distribution without the label::

        gamma mean_F CE(sg[q_t], p_t) + alpha retain        q: the softmax of the logits with that of the label at -inf

    ``CE(q, p) = -log(1 - p_y) + entropy(q)``, and q is not differentiated. CE-U therefore **is** the unlikelihood loss, plus a
    constant without gradient. Its coefficient is ``p / (1 - p)``, which on memorised text depends on an accurate 1 - p.

    Args:
        ignore_first: number of labelled tokens at the start of each forget sequence that do not count; open-unlearning's
            default is 1.
        gamma: weight of forgetting.
        alpha: weight of retaining.
        retain: as in `Objective`.
    """

    additive = "sequences"
    needs_statistics = True

    def __init__(self, ignore_first: int = 1, gamma: float = 1.0, alpha: float = 1.0, retain: str = "ce") -> None:
        super().__init__(gamma, alpha, retain)
        if isinstance(ignore_first, bool) or not (isinstance(ignore_first, int) and ignore_first >= 0):
            raise argument_error("ignore_first", "an integer >= 0", repr(ignore_first), "it is a number of tokens")
        self.ignore_first = ignore_first

    def forget(self, logps: Tensor, batch: TokenBatch) -> Tensor:
        """Return the mean of ``-log(1 - p) + entropy(q)``."""
        assert batch.statistics is not None  # the op computes them for `needs_statistics`
        counted = batch.mask & batch.is_forget[:, None] & (batch.mask.cumsum(1) > self.ignore_first)
        n_tokens = ((batch.whole.lengths - self.ignore_first).clamp(min=0) * batch.whole.is_forget).sum().clamp(min=1)
        logps = torch.where(counted, logps, -1.0)  # keeps the values of the other tokens out of the logarithms
        log_rest = _log1mexp(logps)
        constant = logps.detach()
        constant_rest = log_rest.detach()
        # entropy(p) = binary entropy of p_y + (1 - p_y) entropy(q)
        entropy = (batch.statistics.entropies + torch.exp(constant) * constant) / constant_rest.exp() + constant_rest
        return ((entropy - log_rest) * counted).sum() / n_tokens


class UNDIAL(Objective):
    """Self-distillation with adjusted logits (Dong et al. 2024, arXiv 2402.10052)::

        gamma mean_F CE(q, p) + alpha retain        q: softmax of the reference model's logits, the label's lowered by beta

    This is a mean over labelled tokens. Open-unlearning's code averages over prompts and padding as well, and lowers the logit
    of token V - 100 there. The hidden states of the reference model are needed.

    Args:
        beta: the amount by which the label's logit is lowered, >= 0; open-unlearning's configuration has 10.
        gamma: weight of forgetting.
        alpha: weight of retaining; open-unlearning's configuration has 0.
        retain: "ce" or "kl".
    """

    additive = "tokens"

    def __init__(self, beta: float = 10.0, gamma: float = 1.0, alpha: float = 1.0, retain: str = "ce") -> None:
        super().__init__(gamma, alpha, retain)
        check_choice("retain", retain, ("ce", "kl"))
        check_range("beta", beta)
        self.beta = beta

    def forget(self, logps: Tensor, batch: TokenBatch) -> Tensor:
        """Return the mean of ``CE(q, p) = KL(q || p) + entropy(q)``."""
        assert batch.divergences is not None and batch.ref_entropies is not None  # the op computes both for `divergence`
        cross_entropies = batch.divergences + batch.ref_entropies
        return (cross_entropies * (batch.mask & batch.is_forget[:, None])).sum() / batch.n_forget_tokens

    @property
    def divergence(self) -> Divergence:
        """The divergence from the adjusted reference model: of the forget sequences, or of all if the retain term is KL."""
        of_all = self.retain == "kl" and self.alpha  # torch.compile of torch 2.11 cannot branch on super().divergence
        return Divergence("all" if of_all else "forget", "kl", self.beta)


def _log1mexp(logps: Tensor) -> Tensor:
    """Return log(1 - p), accurate in value and in derivative, ``-p / (1 - p)``, for p close to 0 and close to 1."""
    likely = logps > -math.log(2)
    close_to_one = torch.log((-torch.expm1(torch.where(likely, logps, -1.0))).clamp(min=1e-37))
    return torch.where(likely, close_to_one, torch.log1p(-torch.exp(torch.where(likely, -1.0, logps))))


def _log_ratios(logps: Tensor, batch: TokenBatch) -> Tensor:
    """Return ``S_b - ref_b`` of each sequence, [B]."""
    if batch.ref_logps is None:
        remedy = "compute them with soul.reference_logps before the first step"
        raise argument_error("ref_logps", "one value per sequence", None, remedy)
    return (logps * batch.mask).sum(1) - batch.ref_logps


def _pairs(values: Tensor) -> tuple[Tensor, ...]:
    """Split values [B] of sequences into those of sequences 2i and those of sequences 2i + 1, [B // 2] each."""
    return values[: len(values) // 2 * 2].view(-1, 2).unbind(1)


OBJECTIVES: dict[str, type[Objective]] = {
    "ga": GradAscent,
    "graddiff": GradDiff,
    "klmin": KLMin,
    "po": PO,
    "npo": NPO,
    "simnpo": SimNPO,
    "dpo": DPO,
    "wga": WGA,
    "satimp": SatImp,
    "ceu": CEU,
    "undial": UNDIAL,
}


def get(name: str, **options: Any) -> Objective:
    """Return a new objective by its name in ``OBJECTIVES``: ``get("npo", beta=0.1)``.

    Raises:
        ArgumentError: there is no objective of that name, or it has no such option; the known ones are listed.
    """
    return build(OBJECTIVES, name, options)


def build(classes: Mapping[str, Callable[..., T]], name: str, options: Mapping[str, Any]) -> T:
    """Return an instance of the class with this name, built with options that its constructor must know.

    Args:
        classes: classes by name.
        name: one of the names.
        options: keyword arguments of the class.

    Raises:
        ArgumentError: as `get`.
    """
    check_choice("method", name, tuple(classes))
    cls = classes[name]
    known = inspect.signature(cls).parameters
    for option in options:
        if option not in known:
            raise argument_error("method", f"options of {cls.__name__} ({', '.join(known)})", option, "drop it")
    return cls(**options)

"""Unlearning objectives, each a short function of per-token log-probabilities.

An objective is called as ``objective(logps [B, T], batch: TokenBatch) -> [] loss``; autograd of this very code gives the
fused kernels their coefficients. Notation: F and R are the kept tokens of the forget and of the retain sequences, p_t the
probability of token t, S_b the summed log-probability of sequence b, n_b its kept tokens; sg[] is not differentiated.
``gamma`` weighs forgetting and ``alpha`` retaining, everywhere. Which code base means what by a name:
docs/objectives.md.

To write another one: subclass `Objective`, return the forget term, and say in ``additive`` over what it is a plain sum.
"""

import inspect
import math

import torch
import torch.nn.functional as F

from soul_kernels import Divergence, register_objective
from soul_kernels.errors import argument_error, check_choice, check_positive, check_range


def forget_nll(logps, batch):
    """Mean negative log-likelihood of the forget tokens: ``-sum_F logp / |F|``."""
    return -torch.where(batch.mask & batch.is_forget[:, None], logps, 0.0).sum() / batch.n_forget_tokens


def retain_nll(logps, batch):
    """Mean negative log-likelihood of the retain tokens: ``-sum_R logp / |R|``."""
    return -torch.where(batch.mask & ~batch.is_forget[:, None], logps, 0.0).sum() / batch.n_retain_tokens


def retain_divergence(logps, batch):
    """Mean divergence of the retain tokens from the reference model, of the kind that the objective asks for."""
    return (batch.divergences * (batch.mask & ~batch.is_forget[:, None])).sum() / batch.n_retain_tokens


RETAIN_TERMS = {"ce": retain_nll, "kl": retain_divergence, "soul_kl": retain_divergence}


class Objective:
    """Base of the objectives: ``gamma forget(logps, batch) + alpha retain``.

    Args:
        gamma: weight of forgetting, >= 0.
        alpha: weight of retaining, >= 0. With 0 there is no retain term, and no retain sequence is needed.
        retain: the retain term, a mean over R: "ce", the cross-entropy; "kl", KL(reference || model) over the vocabulary
            (TOFU, open-unlearning); or "soul_kl", the cross-entropy H(model, reference) that SOUL's code calls KL. The last two
            need the reference's hidden states.

    Attributes:
        additive: "tokens", "sequences" or "pairs" (of sequences 2i and 2i + 1): the loss is a sum over these, so it can be
            computed chunk by chunk; None: it is not, and takes a second sweep where the batch is larger than a chunk.
        needs_reference: ``batch.ref_logps`` must be given.
        needs_statistics: ``batch.statistics`` must be there.
        divergence: a `soul_kernels.Divergence`, what must be in ``batch.divergences``; or None.
        relabels: the forget sequences must be answered by refusals instead of their own answers.
        pairs: the forget sequences come in pairs, the refusal right after the answer that it replaces.
    """

    additive = None
    needs_reference = False
    needs_statistics = False
    relabels = False
    pairs = False

    def __init__(self, gamma=1.0, alpha=1.0, retain="ce"):
        check_range("gamma", gamma)
        check_range("alpha", alpha)
        check_choice("retain", retain, tuple(RETAIN_TERMS))
        self.gamma, self.alpha, self.retain = gamma, alpha, retain
        self.key = register_objective(self)  # a number, by which an opaque op finds it under torch.compile

    def __getstate__(self):
        return {name: value for name, value in vars(self).items() if name != "key"}

    def __setstate__(self, state):
        vars(self).update(state, key=register_objective(self))  # a copy has a number of its own

    def __call__(self, logps, batch):
        """The loss, []: the sum of `terms`."""
        return sum(self.terms(logps, batch).values())

    def terms(self, logps, batch):
        """The weighted terms of the loss by name, each []: forget and, unless alpha is 0, retain.

        Args:
            logps: [B, T] log-probabilities, 0 where a label is ignored.
            batch: the `soul_kernels.TokenBatch` that belongs to them.
        """
        terms = {"forget": self.gamma * self.forget(logps, batch)}
        if self.alpha:
            terms["retain"] = self.alpha * RETAIN_TERMS[self.retain](logps, batch)
        return terms

    def forget(self, logps, batch):
        """The forget term, [], without its weight."""
        raise NotImplementedError

    @property
    def divergence(self):
        """What the retain term needs."""
        return Divergence("retain", self.retain) if self.retain != "ce" and self.alpha else None

    def __repr__(self):
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.__getstate__().items())
        return f"{type(self).__name__}({arguments})"


class GradAscent(Objective):
    """``-gamma CE(F)``: gradient ascent on what is to be forgotten. GA in SOUL, TOFU and open-unlearning."""

    additive = "tokens"

    def __init__(self, gamma=1.0):
        super().__init__(gamma, alpha=0.0)

    def forget(self, logps, batch):
        """``-CE(F)``."""
        return -forget_nll(logps, batch)


class GradDiff(Objective):
    """``-gamma CE(F) + alpha retain``, each a mean over its tokens: GradDiff in open-unlearning, GA+FT in SOUL's code (whose
    gamma is our alpha), gradient difference in TOFU.
    """

    additive = "tokens"

    def forget(self, logps, batch):
        """``-CE(F)``."""
        return -forget_nll(logps, batch)


class KLMin(GradDiff):
    """``-gamma CE(F) + alpha KL(reference || model)(R)``: KL minimization of TOFU (arXiv 2401.06121, appendix)."""

    def __init__(self, gamma=1.0, alpha=1.0):
        super().__init__(gamma, alpha, "kl")


class PO(Objective):
    """``gamma CE(F') + alpha retain`` where F' are the forget questions answered by refusals. Preference optimization in the
    SOUL paper (CL+FT in its code), IDK in TOFU. The data must be relabelled before: see `soul.data.refuse`.
    """

    additive = "tokens"
    relabels = True

    def forget(self, logps, batch):
        """``CE(F')``."""
        return forget_nll(logps, batch)


class NPO(Objective):
    """Negative preference optimization (Zhang et al. 2024, arXiv 2404.05868, equation 3) with a retain term.

    ``reduction="sequence_sum"``, the paper and open-unlearning: each sequence by the sum over its tokens::

        -gamma (2 / beta) mean_b logsigmoid(-beta (S_b - ref_b)) + alpha retain

    ``reduction="token_mean"``, SOUL's code: one ratio for the batch, of token means; not a sum over sequences::

        -gamma (2 / beta) logsigmoid(-beta (sum_b S_b - sum_b ref_b) / |F|) + alpha retain

    Args:
        beta: inverse temperature, > 0. For beta -> 0 the gradient is that of gradient ascent.
        gamma: weight of forgetting.
        alpha: weight of retaining.
        reduction: "sequence_sum" or "token_mean".
        retain: as in `Objective`.
    """

    needs_reference = True

    def __init__(self, beta=0.1, gamma=1.0, alpha=1.0, reduction="sequence_sum", retain="ce"):
        super().__init__(gamma, alpha, retain)
        check_choice("reduction", reduction, ("sequence_sum", "token_mean"))
        self.beta, self.reduction = _positive("beta", beta, "0.1 is what the papers use"), reduction

    @property
    def additive(self):
        """Over sequences, unless the batch shares one ratio."""
        return "sequences" if self.reduction == "sequence_sum" else None

    def forget(self, logps, batch):
        """-(2 / beta) logsigmoid(-beta log-ratio), a mean."""
        counted = batch.is_forget & batch.mask.any(1)
        ratio = torch.where(counted, _log_ratios(logps, batch), 0.0)
        if self.reduction == "sequence_sum":
            value = (F.logsigmoid(-self.beta * ratio) * counted).sum() / batch.n_forget_sequences
        else:
            value = F.logsigmoid(-self.beta * ratio.sum() / batch.n_forget_tokens) * counted.any()
        return -(2 / self.beta) * value


class SimNPO(Objective):
    """Simple NPO (Fan et al. 2024, arXiv 2410.07163, equation 4): length-normalised, without a reference model::

        -gamma (2 / beta) mean_b logsigmoid(-beta (S_b / n_b + delta)) + alpha retain

    As coded in open-unlearning, whose configuration has beta 4.5, delta 0, gamma 0.125; the margin of the paper is beta delta.

    Args:
        beta: inverse temperature, > 0.
        delta: margin, in nats a token.
        gamma: weight of forgetting.
        alpha: weight of retaining.
        retain: as in `Objective`.
    """

    additive = "sequences"

    def __init__(self, beta=4.5, delta=0.0, gamma=1.0, alpha=1.0, retain="ce"):
        super().__init__(gamma, alpha, retain)
        if not math.isfinite(delta):
            raise argument_error("delta", "a finite number", delta, "0 is open-unlearning's")
        self.beta, self.delta = _positive("beta", beta, "4.5 is open-unlearning's"), delta

    def forget(self, logps, batch):
        """-(2 / beta) logsigmoid(-beta (mean log p + delta)), a mean over sequences."""
        counted = batch.is_forget & (batch.lengths > 0)
        mean = (logps * batch.mask).sum(1) / batch.lengths.clamp(min=1)
        value = F.logsigmoid(-self.beta * (mean + self.delta)) * counted
        return -(2 / self.beta) * value.sum() / batch.n_forget_sequences


class DPO(Objective):
    """Direct preference optimization (Rafailov et al. 2023, arXiv 2305.18290, equation 7) of refusals over answers::

        -gamma factor mean_i logsigmoid(beta ((S_w - ref_w) - (S_l - ref_l))) + alpha retain

    The forget sequences come in pairs: at 2i the answer l that is to be forgotten, at 2i + 1 the answer w that is preferred
    (both count as forget sequences): see `soul.data.pair_refusals`. IdkDPO and AltPO in open-unlearning.

    Args:
        beta: inverse temperature, > 0.
        factor: "2/beta", as in open-unlearning and like NPO, so that the gradient at the reference does not depend on beta; or
            "1", as in the paper and in TRL: at beta 0.1 a twentieth of that.
        gamma: weight of forgetting.
        alpha: weight of retaining.
        retain: as in `Objective`.
    """

    additive = "pairs"
    needs_reference = True
    pairs = True

    def __init__(self, beta=0.1, factor="2/beta", gamma=1.0, alpha=1.0, retain="ce"):
        super().__init__(gamma, alpha, retain)
        check_choice("factor", factor, ("2/beta", "1"))
        self.beta, self.factor = _positive("beta", beta, "0.1 is what the papers use"), factor

    def forget(self, logps, batch):
        """-factor logsigmoid(beta margin), a mean over pairs."""
        answer, refusal = _pairs(_log_ratios(logps, batch))
        counted = torch.logical_and(*_pairs(batch.is_forget & batch.mask.any(1)))
        # Pairs of the whole batch, though this may be a part of it.
        n_pairs = torch.logical_and(*_pairs(batch.whole.is_forget & batch.whole.mask.any(1))).sum().clamp(min=1)
        margin = torch.where(counted, refusal - answer, 0.0)
        value = (F.logsigmoid(self.beta * margin) * counted).sum() / n_pairs
        return -(2 / self.beta if self.factor == "2/beta" else 1.0) * value


class WGA(Objective):
    """Weighted gradient ascent (Wang et al. 2025, arXiv 2502.19301): ``gamma mean_F(sg[p_t]^beta logp_t) + alpha retain``.

    As coded in open-unlearning, whose default beta is 1. beta = 0 is gradient ascent.
    """

    additive = "tokens"

    def __init__(self, beta=1.0, gamma=1.0, alpha=1.0, retain="ce"):
        super().__init__(gamma, alpha, retain)
        check_range("beta", beta)
        self.beta = beta

    def forget(self, logps, batch):
        """Mean of sg[p^beta] log p."""
        return -forget_nll(torch.exp(self.beta * logps.detach()) * logps, batch)


class SatImp(Objective):
    """Saturation and importance (Yang et al. 2025, arXiv 2505.11953)::

        gamma mean_F(sg[p_t]^beta1 (1 - sg[p_t])^beta2 logp_t) + alpha retain

    As coded in open-unlearning, whose defaults are beta1 5, beta2 1, gamma 0.1 in its configuration. 1 - p is taken from
    expm1, so memorised tokens keep their weight.
    """

    additive = "tokens"

    def __init__(self, beta1=5.0, beta2=1.0, gamma=1.0, alpha=1.0, retain="ce"):
        super().__init__(gamma, alpha, retain)
        check_range("beta1", beta1)
        check_range("beta2", beta2)
        self.beta1, self.beta2 = beta1, beta2

    def forget(self, logps, batch):
        """Mean of sg[p^beta1 (1 - p)^beta2] log p."""
        known = logps.detach()
        weight = torch.exp(self.beta1 * known) * (-torch.expm1(known)) ** self.beta2
        return -forget_nll(weight * logps, batch)


class CEU(Objective):
    """Cross-entropy unlearning (Yang 2025, arXiv 2503.01224): the model is to match itself without the label::

        gamma mean_F CE(sg[q_t], p_t) + alpha retain        q: the softmax of the logits with that of the label at -inf

    ``CE(q, p) = -log(1 - p_y) + entropy(q)``, and q is not differentiated: CE-U **is** the unlikelihood loss, plus a number
    without gradient. Its coefficient is ``p / (1 - p)``: on memorised text it lives on the accuracy of 1 - p.

    Args:
        ignore_first: kept tokens at the start of each forget sequence that do not count; open-unlearning's default is 1.
        gamma: weight of forgetting.
        alpha: weight of retaining.
        retain: as in `Objective`.
    """

    additive = "sequences"
    needs_statistics = True

    def __init__(self, ignore_first=1, gamma=1.0, alpha=1.0, retain="ce"):
        super().__init__(gamma, alpha, retain)
        if isinstance(ignore_first, bool) or not (isinstance(ignore_first, int) and ignore_first >= 0):
            raise argument_error("ignore_first", "an integer >= 0", repr(ignore_first), "it is a number of tokens")
        self.ignore_first = ignore_first

    def forget(self, logps, batch):
        """Mean of -log(1 - p) + entropy of the rest."""
        counted = batch.mask & batch.is_forget[:, None] & (batch.mask.cumsum(1) > self.ignore_first)
        n_tokens = ((batch.whole.lengths - self.ignore_first).clamp(min=0) * batch.whole.is_forget).sum().clamp(min=1)
        logps = torch.where(counted, logps, -1.0)  # of the others nothing may reach a logarithm
        log_rest = _log1mexp(logps)
        known, log_own = logps.detach(), log_rest.detach()
        # entropy(p) = binary entropy of p_y + (1 - p_y) entropy(q)
        entropy = (batch.statistics.entropies + torch.exp(known) * known) / log_own.exp() + log_own
        return ((entropy - log_rest) * counted).sum() / n_tokens


class UNDIAL(Objective):
    """Self-distillation with adjusted logits (Dong et al. 2024, arXiv 2402.10052)::

        gamma mean_F CE(q, p) + alpha retain        q: softmax of the reference's logits, the label's lowered by beta

    A mean over kept tokens; open-unlearning's code averages over prompts and padding as well, and lowers whatever token -100
    points to there. The reference's hidden states are needed.

    Args:
        beta: how far the label's logit is lowered, >= 0; open-unlearning's configuration has 10.
        gamma: weight of forgetting.
        alpha: weight of retaining; open-unlearning's configuration has 0.
        retain: "ce" or "kl".
    """

    additive = "tokens"

    def __init__(self, beta=10.0, gamma=1.0, alpha=1.0, retain="ce"):
        super().__init__(gamma, alpha, retain)
        check_choice("retain", retain, ("ce", "kl"))
        check_range("beta", beta)
        self.beta = beta

    def forget(self, logps, batch):
        """Mean of CE(q, p) = KL(q || p) + entropy(q)."""
        cross_entropies = batch.divergences + batch.ref_entropies
        return (cross_entropies * (batch.mask & batch.is_forget[:, None])).sum() / batch.n_forget_tokens

    @property
    def divergence(self):
        """That of the forget sequences from the adjusted reference; of all where the retain term is KL."""
        of_all = self.retain == "kl" and self.alpha  # torch.compile of torch 2.11 cannot branch on super().divergence
        return Divergence("all" if of_all else "forget", "kl", self.beta)


def _log1mexp(logps):
    """log(1 - p), accurate in value and derivative, ``-p / (1 - p)``, for p close to 0 and close to 1."""
    likely = logps > -math.log(2)
    close_to_one = torch.log((-torch.expm1(torch.where(likely, logps, -1.0))).clamp(min=1e-37))
    return torch.where(likely, close_to_one, torch.log1p(-torch.exp(torch.where(likely, -1.0, logps))))


def _positive(name, value, remedy):
    check_positive(name, value, remedy)
    return value


def _log_ratios(logps, batch):
    """``S_b - ref_b`` of each sequence, [B]."""
    if batch.ref_logps is None:
        remedy = "compute them with soul.reference_logps before the first step"
        raise argument_error("ref_logps", "one value a sequence", None, remedy)
    return (logps * batch.mask).sum(1) - batch.ref_logps


def _pairs(values):
    """[B] -> the values of sequences 2i, and of sequences 2i + 1, [B // 2] each."""
    return values[: len(values) // 2 * 2].view(-1, 2).unbind(1)


OBJECTIVES = {
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


def get(name, **options):
    """The objective of a name, for configurations: ``get("npo", beta=0.1)``.

    Raises:
        ValueError: no objective of that name, or none with these options; the known ones are listed.
    """
    return build(OBJECTIVES, name, options)


def build(kinds, name, options):
    """The kind of a name, of a dict of classes, with options that it knows."""
    check_choice("method", name, tuple(kinds))
    known = inspect.signature(kinds[name]).parameters
    for option in options:
        if option not in known:
            raise argument_error("method", f"options of {kinds[name].__name__} ({', '.join(known)})", option, "drop it")
    return kinds[name](**options)

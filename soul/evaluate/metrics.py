"""Metrics of unlearning, as functions of numbers a token and of numbers a question; no models here.

After TOFU (arXiv 2401.06121, ``aggregate_eval_stat.py``) and open-unlearning (OU, ``src/evals/metrics``); docs/evaluation.md
has the table of who means what. All values are fp64 tensors or floats; losses are in nats a token.
"""

import sys

import torch

from soul._extras import require
from soul_kernels.errors import argument_error

MIN_K = 0.4  # OU's configuration; the paper's own figure is 0.2
OPTION_SETS = ("real_authors", "world_facts")  # short answers, judged beside the false ones
UTILITY_SETS = ("retain", *OPTION_SETS)
MEMORIZATION = ("exact_memorization", "extraction_strength")
MEMBERSHIP = ("min_k", "min_k_plus_plus")


def probability(losses):
    """Length-normalised probability of answers, ``exp(-loss)``, loss the mean over the answer's tokens and its end.

    Args:
        losses: [n] mean negative log-likelihoods.

    As TOFU and OU. Both divide by the labels before the shift, one more than were predicted if a text has no prompt.
    """
    return torch.exp(-losses)


def option_probability(losses, perturbed_losses):
    """Probability of the true answer among the false ones, ``p / (p + sum_j p_j)``, with p as `probability`.

    Args:
        losses: [n] of the true answers.
        perturbed_losses: [n, m] of the false ones.

    As TOFU; computed as a softmax, so that probabilities that underflow do not give 0 / 0. OU adds 1e-10 to the denominator.
    """
    return torch.softmax(-_beside(losses, perturbed_losses), 1)[:, 0]


def option_loss(losses, perturbed_losses):
    """``-log`` of `option_probability`: TOFU's ``normalized_gt_loss``."""
    return -torch.log_softmax(-_beside(losses, perturbed_losses), 1)[:, 0]


def _beside(losses, perturbed_losses):
    return torch.cat([losses[:, None], perturbed_losses], 1)


def truth_ratio(paraphrased_losses, perturbed_losses):
    """False against true, ``exp(paraphrased_loss - mean_j perturbed_loss_j)``: large where a model prefers false answers.

    Args:
        paraphrased_losses: [n] of the paraphrased true answer, or of the answer where there is no paraphrase.
        perturbed_losses: [n, m] of the false answers.

    The geometric mean of the false probabilities over the true one, as TOFU's logs and its ``aggregate_eval_stat.py`` (which
    holds the inverse), and as OU (with 1e-10 in the denominator). TOFU's ``utils.py`` and SOUL take the arithmetic mean; SOUL
    asks the paraphrased question. Ratios beyond fp64 become its largest number.
    """
    return torch.exp(paraphrased_losses - perturbed_losses.mean(1)).clamp(max=sys.float_info.max)


def closer_to_one(ratios):
    """``mean min(r, 1 / r)`` of truth ratios: TOFU's and OU's figure for the forget set; 1: true and false are alike."""
    return torch.minimum(ratios, 1 / ratios).mean()


def true_better(ratios):
    """``mean max(0, 1 - r)`` of truth ratios: TOFU's and OU's figure for what is kept; 1: false answers are never likely."""
    return (1 - ratios).clamp(min=0).mean()


def forget_quality(ratios, retain_ratios):
    """Two-sample Kolmogorov-Smirnov test of truth ratios on the forget set, against a model that never saw it.

    Args:
        ratios: [n] of the model.
        retain_ratios: [m] of the retain model.

    Returns:
        The p-value, which is the forget quality (1: the two cannot be told apart), and the statistic.

    As TOFU, whose inverse ratios give the same test, and OU, which adds 1e-10 before it inverts. SOUL compares forget with
    retain questions of one model, which is another quantity.
    """
    test = require("scipy.stats", "eval").ks_2samp(ratios.tolist(), retain_ratios.tolist())
    return float(test.pvalue), float(test.statistic)


def model_utility(parts):
    """Harmonic mean of probability, ROUGE-L recall and truth ratio on retain, real authors and world facts; 0 if one is 0.

    Args:
        parts: dict with the nine ``{set}_{prob|rouge|truth_ratio}``, as `summarize` computes them.

    As TOFU and OU (``hm_aggregate``): `probability` on retain, `option_probability` on the other two; `true_better`.
    """
    names = [f"{name}_{part}" for name in UTILITY_SETS for part in ("prob", "rouge", "truth_ratio")]
    return float(require("scipy.stats", "eval").hmean([parts[name] for name in names]))


def rouge_recall(answers, texts):
    """ROUGE recalls of generated texts against true answers, with stemming: ``rouge1_recall`` and ``rougeL_recall``, [n] each.

    As TOFU and OU. SOUL's code drops the first generated token.
    """
    scorer = require("rouge_score.rouge_scorer", "eval").RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
    scores = [scorer.score(answer, text) for answer, text in zip(answers, texts)]
    return {f"{name}_recall": torch.tensor([score[name].recall for score in scores], dtype=torch.float64, device="cpu")
            for name in ("rouge1", "rougeL")}  # fmt: skip


def exact_memorization(hits):
    """Part of an answer's tokens that are the argmax given the true tokens before them, ``mean_t hit_t``.

    Args:
        hits: [n] of 0 and 1, without the end of the sequence.

    As OU, which leaves out the last label, be it the end or, in a text that was cut, a token.
    """
    return hits.mean().item()


def extraction_strength(hits):
    """``1 - k / n``: k tokens of an answer must be given until every one that follows is the argmax.

    Args:
        hits: [n] of 0 and 1, without the end of the sequence.

    As OU (arXiv 2012.07805 has the idea), but 0 where the last token is missed: OU's loop ends at ``k = n - 1``, and its
    smallest value is 1 / n.
    """
    missed = (hits == 0).nonzero()
    return 1.0 - (missed.max().item() + 1 if len(missed) else 0) / len(hits)


def min_k(scores, k=MIN_K):
    """Mean of the lowest ``max(1, floor(k n))`` of n scores: Min-K% (arXiv 2310.16789) where they are log-probabilities.

    Args:
        scores: [n] of an answer's tokens, without the end of the sequence.
        k: which part of them, in (0, 1].

    As OU, which returns the negative. SOUL scores question and answer together.
    """
    check_part(k)
    return scores.sort().values[: max(1, int(k * len(scores)))].mean().item()


def check_part(k):
    """Raises unless k is in (0, 1]."""
    if not 0 < k <= 1:
        raise argument_error("min_k", "a part in (0, 1]", k, "0.2 is the lowest fifth of the tokens")


def normalized_logps(logps, entropies, variances):
    """``(logp + entropy) / sqrt(max(variance, 1e-6))``: log-probabilities in units of their spread under the model.

    Args:
        logps: [n] log-probabilities of labels.
        entropies: [n], whose negatives are the means of log p under the model.
        variances: [n] of log p under the model.

    What Min-K%++ (arXiv 2404.02936) gives to `min_k`; the floor is OU's.
    """
    return (logps + entropies) / variances.clamp(min=1e-6).sqrt()


def membership_auc(forget, holdout):
    """Area under the ROC curve of telling forget from holdout by a score; 1: forget scores higher, it is remembered; 0.5: not.

    Args:
        forget: [n] scores of what was trained on.
        holdout: [m] scores of what never was.

    As OU, where score and label are both negated. SOUL's curve is the mirror image, against real authors and world facts.
    """
    labels = [1] * len(forget) + [0] * len(holdout)
    return float(require("sklearn.metrics", "eval").roc_auc_score(labels, [*forget.tolist(), *holdout.tolist()]))


def summarize(logs, retain_log=None):
    """Everything that logs of the four sets say, as TOFU's ``aggregate_eval_stat.py`` defines it.

    Args:
        logs: set ("forget", "retain", "real_authors", "world_facts" and, where there is one, "holdout") -> its columns, from
            `soul.evaluate.logs.columns`.
        retain_log: columns of the forget set under a model that never saw it, or None: then there is no forget quality.

    Returns:
        Dict of floats: ``forget_quality`` and ``ks_statistic``, ``model_utility``, and for each set ``{set}_prob``,
        ``{set}_rouge``, ``{set}_truth_ratio``, ``{set}_rows``; where the logs have them ``{set}_exact_memorization`` and
        ``{set}_extraction_strength``, and with a holdout set ``forget_min_k_auc`` and ``forget_min_k_plus_plus_auc``.
    """
    ratios = {name: truth_ratio(log["avg_paraphrased_loss"], log["average_perturb_loss"])
              for name, log in logs.items() if name != "holdout"}  # fmt: skip
    parts = {}
    for name, ratio in ratios.items():
        log, losses, perturbed = logs[name], logs[name]["avg_gt_loss"], logs[name]["average_perturb_loss"]
        chances = option_probability(losses, perturbed) if name in OPTION_SETS else probability(losses)
        parts[f"{name}_prob"] = chances.mean().item()
        parts[f"{name}_rouge"] = log["rougeL_recall"].mean().item()
        parts[f"{name}_truth_ratio"] = (closer_to_one if name == "forget" else true_better)(ratio).item()
        parts |= {f"{name}_{field}": log[field].mean().item() for field in MEMORIZATION if field in log}
        parts[f"{name}_rows"] = len(ratio)
    result = {}
    if retain_log is not None:
        retain_ratio = truth_ratio(retain_log["avg_paraphrased_loss"], retain_log["average_perturb_loss"])
        result["forget_quality"], result["ks_statistic"] = forget_quality(ratios["forget"], retain_ratio)
    result["model_utility"] = model_utility(parts)
    if "holdout" in logs:
        result |= {f"forget_{field}_auc": membership_auc(logs["forget"][field], logs["holdout"][field])
                   for field in MEMBERSHIP}  # fmt: skip
    return result | parts

"""Metrics of unlearning, as functions of one number per token or per question. No model is run here.

The formulas follow TOFU (arXiv 2401.06121, ``aggregate_eval_stat.py``) and open-unlearning (OU, ``src/evals/metrics``). "SOUL"
is the code of the paper on second-order unlearning; docs/evaluation.md has a table of the definitions side by side. All values
are fp64 tensors or floats; losses are in nats per token.
"""

import sys
from collections.abc import Mapping, Sequence

import torch

from soul._extras import require
from soul_kernels.errors import argument_error

MIN_K = 0.4  # OU's configuration; the paper's own figure is 0.2
OPTION_SETS = ("real_authors", "world_facts")  # short answers, judged beside the false ones
UTILITY_SETS = ("retain", *OPTION_SETS)
MEMORIZATION = ("exact_memorization", "extraction_strength")
MEMBERSHIP = ("min_k", "min_k_plus_plus")


def probability(losses: torch.Tensor) -> torch.Tensor:
    """Return the length-normalised probability of answers, ``exp(-loss)``.

    TOFU and OU define it alike. Both divide by the number of labels before the shift, which is one more than were predicted
    where a text has no prompt.

    Args:
        losses: [n] mean negative log-likelihoods, over the tokens of the answer and the end of the sequence.
    """
    return torch.exp(-losses)


def option_probability(losses: torch.Tensor, perturbed_losses: torch.Tensor) -> torch.Tensor:
    """Return the probability of the true answer among the false ones, ``p / (p + sum_j p_j)``, with p as in `probability`.

    As in TOFU. It is computed as a softmax, so that probabilities that underflow do not give 0 / 0. OU adds 1e-10 to the
    denominator.

    Args:
        losses: [n] of the true answers.
        perturbed_losses: [n, m] of the false answers.
    """
    return torch.softmax(-_option_losses(losses, perturbed_losses), 1)[:, 0]


def option_loss(losses: torch.Tensor, perturbed_losses: torch.Tensor) -> torch.Tensor:
    """Return ``-log`` of `option_probability`, TOFU's ``normalized_gt_loss``."""
    return -torch.log_softmax(-_option_losses(losses, perturbed_losses), 1)[:, 0]


def _option_losses(losses: torch.Tensor, perturbed_losses: torch.Tensor) -> torch.Tensor:
    """Return the losses of the true and the false answers, [n, 1 + m], the true one first."""
    return torch.cat([losses[:, None], perturbed_losses], 1)


def truth_ratio(paraphrased_losses: torch.Tensor, perturbed_losses: torch.Tensor) -> torch.Tensor:
    """Return the truth ratios ``exp(paraphrased_loss - mean_j perturbed_loss_j)``, large where a model prefers false answers.

    This is the geometric mean of the false probabilities over the true one, as in TOFU's logs and its
    ``aggregate_eval_stat.py`` (which holds the inverse), and in OU (with 1e-10 in the denominator). TOFU's ``utils.py`` and
    SOUL take the arithmetic mean; SOUL asks the paraphrased question. Ratios beyond fp64 become its largest number.

    Args:
        paraphrased_losses: [n] of the paraphrased true answer, or of the answer itself where there is no paraphrase.
        perturbed_losses: [n, m] of the false answers.
    """
    return torch.exp(paraphrased_losses - perturbed_losses.mean(1)).clamp(max=sys.float_info.max)


def closer_to_one(ratios: torch.Tensor) -> torch.Tensor:
    """Return ``mean min(r, 1 / r)`` of truth ratios, TOFU's and OU's figure for the forget set.

    1 means that the model finds true and false answers equally likely.
    """
    return torch.minimum(ratios, 1 / ratios).mean()


def true_better(ratios: torch.Tensor) -> torch.Tensor:
    """Return ``mean max(0, 1 - r)`` of truth ratios, TOFU's and OU's figure for the other sets.

    1 means that the model finds no false answer likely.
    """
    return (1 - ratios).clamp(min=0).mean()


def forget_quality(ratios: torch.Tensor, retain_ratios: torch.Tensor) -> tuple[float, float]:
    """Compare truth ratios on the forget set with those of a retain model by a two-sample Kolmogorov-Smirnov test.

    As in TOFU, whose inverse ratios give the same test, and in OU, which adds 1e-10 before it inverts. SOUL compares forget
    with retain questions of one model, which is another quantity.

    Args:
        ratios: [n] of the model.
        retain_ratios: [m] of the retain model, which never saw the forget set.

    Returns:
        The p-value, which is the forget quality (1: the test cannot tell the two models apart), and the statistic.
    """
    test = require("scipy.stats", "eval").ks_2samp(ratios.tolist(), retain_ratios.tolist())
    return float(test.pvalue), float(test.statistic)


def model_utility(numbers: Mapping[str, float]) -> float:
    """Return the harmonic mean of probability, ROUGE-L recall and truth ratio over retain, real authors and world facts.

    It is 0 if one of the nine is 0. As in TOFU and OU (``hm_aggregate``), the numbers are `probability` on retain,
    `option_probability` on the other two sets, and `true_better` on all three.

    Args:
        numbers: the nine ``{set}_{prob|rouge|truth_ratio}``, as `summarize` computes them.
    """
    names = [f"{name}_{quantity}" for name in UTILITY_SETS for quantity in ("prob", "rouge", "truth_ratio")]
    return float(require("scipy.stats", "eval").hmean([numbers[name] for name in names]))


def rouge_recall(answers: Sequence[str], texts: Sequence[str]) -> dict[str, torch.Tensor]:
    """Return ROUGE recalls of generated texts against true answers, with stemming.

    As in TOFU and OU. SOUL's code drops the first generated token.

    Returns:
        ``rouge1_recall`` and ``rougeL_recall``, [n] each.
    """
    scorer = require("rouge_score.rouge_scorer", "eval").RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
    scores = [scorer.score(answer, text) for answer, text in zip(answers, texts)]
    return {f"{name}_recall": torch.tensor([score[name].recall for score in scores], dtype=torch.float64, device="cpu")
            for name in ("rouge1", "rougeL")}  # fmt: skip


def exact_memorization(hits: torch.Tensor) -> float:
    """Return the fraction of an answer's tokens that are the argmax given the true tokens before them, ``mean_t hit_t``.

    As in OU, except that OU leaves out the last label, be it the end of the sequence or, in a text that was cut, a token.

    Args:
        hits: [n] of 0 and 1, without the end of the sequence.
    """
    return hits.mean().item()


def extraction_strength(hits: torch.Tensor) -> float:
    """Return ``1 - k / n``, where k tokens of an answer must be given until every token that follows is the argmax.

    As in OU (the idea is from arXiv 2012.07805), but 0 where the last token is missed: OU's loop ends at ``k = n - 1``, so that
    its smallest value is 1 / n.

    Args:
        hits: [n] of 0 and 1, without the end of the sequence.
    """
    missed = (hits == 0).nonzero()
    k = missed.max().item() + 1 if len(missed) else 0
    return 1.0 - k / len(hits)


def min_k(scores: torch.Tensor, k: float = MIN_K) -> float:
    """Return the mean of the lowest ``max(1, floor(k n))`` of n scores.

    For log-probabilities this is Min-K% (arXiv 2310.16789), for `normalized_logps` Min-K%++. OU returns the negative.
    SOUL scores question and answer together.

    Args:
        scores: [n] of an answer's tokens, without the end of the sequence.
        k: the fraction of the scores that is taken, in (0, 1].

    Raises:
        ArgumentError: k is outside (0, 1].
    """
    check_fraction(k)
    return scores.sort().values[: max(1, int(k * len(scores)))].mean().item()


def check_fraction(k: float) -> None:
    """Raise unless k, the option ``min_k``, is in (0, 1]."""
    if not 0 < k <= 1:
        raise argument_error("min_k", "a fraction in (0, 1]", k, "0.2 is the lowest fifth of the tokens")


def normalized_logps(logps: torch.Tensor, entropies: torch.Tensor, variances: torch.Tensor) -> torch.Tensor:
    """Return ``(logp + entropy) / sqrt(max(variance, 1e-6))``: log-probabilities in units of their spread under the model.

    Min-K%++ (arXiv 2404.02936) is `min_k` of these numbers; the floor of the variance is OU's.

    Args:
        logps: [n] log-probabilities of labels.
        entropies: [n], whose negatives are the means of log p under the model.
        variances: [n] of log p under the model.
    """
    return (logps + entropies) / variances.clamp(min=1e-6).sqrt()


def membership_auc(forget: torch.Tensor, holdout: torch.Tensor) -> float:
    """Return the area under the ROC curve of a score that should tell forget texts from holdout texts.

    1: forget texts score higher, so they are remembered; 0.5: the score cannot tell. As in OU, where score and label are
    both negated. SOUL's curve is the mirror image, against real authors and world facts.

    Args:
        forget: [n] scores of texts that the model was trained on.
        holdout: [m] scores of texts that it never saw.
    """
    labels = [1] * len(forget) + [0] * len(holdout)
    return float(require("sklearn.metrics", "eval").roc_auc_score(labels, [*forget.tolist(), *holdout.tolist()]))


def summarize(
    logs: Mapping[str, Mapping[str, torch.Tensor]], retain_log: Mapping[str, torch.Tensor] | None = None
) -> dict[str, float]:
    """Return all numbers that the logs of the four sets give, as TOFU's ``aggregate_eval_stat.py`` defines them.

    Args:
        logs: set ("forget", "retain", "real_authors", "world_facts" and, optionally, "holdout") -> its columns, from
            `soul.evaluate.logs.columns`.
        retain_log: columns of the forget set under a model that never saw it. None: there is no forget quality.

    Returns:
        ``forget_quality`` and ``ks_statistic``, ``model_utility``, and for each set ``{set}_prob``, ``{set}_rouge``,
        ``{set}_truth_ratio``, ``{set}_rows``; where the logs have them ``{set}_exact_memorization`` and
        ``{set}_extraction_strength``, and with a holdout set ``forget_min_k_auc`` and ``forget_min_k_plus_plus_auc``.
    """
    ratios = {name: truth_ratio(log["avg_paraphrased_loss"], log["average_perturb_loss"])
              for name, log in logs.items() if name != "holdout"}  # fmt: skip
    numbers: dict[str, float] = {}
    for name, ratio in ratios.items():
        log = logs[name]
        if name in OPTION_SETS:
            probabilities = option_probability(log["avg_gt_loss"], log["average_perturb_loss"])
        else:
            probabilities = probability(log["avg_gt_loss"])
        aggregate = closer_to_one if name == "forget" else true_better
        numbers[f"{name}_prob"] = probabilities.mean().item()
        numbers[f"{name}_rouge"] = log["rougeL_recall"].mean().item()
        numbers[f"{name}_truth_ratio"] = aggregate(ratio).item()
        numbers |= {f"{name}_{field}": log[field].mean().item() for field in MEMORIZATION if field in log}
        numbers[f"{name}_rows"] = len(ratio)
    summary: dict[str, float] = {}
    if retain_log is not None:
        retain_ratio = truth_ratio(retain_log["avg_paraphrased_loss"], retain_log["average_perturb_loss"])
        summary["forget_quality"], summary["ks_statistic"] = forget_quality(ratios["forget"], retain_ratio)
    summary["model_utility"] = model_utility(numbers)
    if "holdout" in logs:
        summary |= {f"forget_{field}_auc": membership_auc(logs["forget"][field], logs["holdout"][field])
                    for field in MEMBERSHIP}  # fmt: skip
    return summary | numbers

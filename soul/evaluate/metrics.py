"""Metrics of unlearning, as functions of one number per token or per question. No model is run here.

The formulas follow TOFU (arXiv 2401.06121, ``aggregate_eval_stat.py``) and open-unlearning (OU, ``src/evals/metrics``). "SOUL"
is the code of the paper on second-order unlearning; docs/evaluation.md has a table of the definitions side by side. All values
are fp64 tensors or floats; losses are in nats per token.
"""

import math
import sys
import zlib
from collections.abc import Mapping, Sequence

import torch

from soul._extras import require
from soul_kernels.errors import argument_error, check_choice

MIN_K = 0.4  # OU's configuration; the paper's own figure is 0.2
OPTION_SETS = ("real_authors", "world_facts")  # short answers, judged beside the false ones
UTILITY_SETS = ("retain", *OPTION_SETS)
MEMORIZATION = ("exact_memorization", "extraction_strength")
MEMBERSHIP = ("min_k", "min_k_plus_plus")
FREE_ATTACKS = ("loss", "zlib", *MEMBERSHIP)  # from the pass over the answers that is made anyway
COSTLY_ATTACKS = ("reference", "gradnorm")  # the pass of another model; a backward pass for every row
ATTACKS = (*FREE_ATTACKS, *COSTLY_ATTACKS)
GEOMETRIC = "geometric"
ARITHMETIC = "arithmetic"


def probability(losses: torch.Tensor) -> torch.Tensor:
    """Return the length-normalised probability of answers, ``exp(-loss)``.

    TOFU and OU define it alike. Both divide by the number of labels before the shift, which is one more than were predicted
    where a text has no prompt.

    Args:
        losses: [n] mean negative log-likelihoods, over the tokens of the answer and the end of the sequence.
    """
    return torch.exp(-losses)


def option_probability(losses: torch.Tensor, perturbed_losses: torch.Tensor, *, eps: float = 0.0) -> torch.Tensor:
    """Return the probability of the true answer among the false ones, ``p / (p + sum_j p_j + eps)``.

    As in TOFU, with p as in `probability`. It is computed as a softmax, so that probabilities that underflow do not give 0 / 0.

    Args:
        losses: [n] of the true answers.
        perturbed_losses: [n, m] of the false answers.
        eps: 1e-10 in OU.
    """
    constant = torch.full_like(losses, -_log(eps))
    return torch.softmax(-torch.cat([_option_losses(losses, perturbed_losses), constant[:, None]], 1), 1)[:, 0]


def option_loss(losses: torch.Tensor, perturbed_losses: torch.Tensor) -> torch.Tensor:
    """Return ``-log`` of `option_probability`, TOFU's ``normalized_gt_loss``."""
    return -torch.log_softmax(-_option_losses(losses, perturbed_losses), 1)[:, 0]


def _option_losses(losses: torch.Tensor, perturbed_losses: torch.Tensor) -> torch.Tensor:
    """Return the losses of the true and the false answers, [n, 1 + m], the true one first."""
    return torch.cat([losses[:, None], perturbed_losses], 1)


def _log(number: float) -> float:
    """Return the natural logarithm, with -inf for 0."""
    return math.log(number) if number else -math.inf


def truth_ratio(
    paraphrased_losses: torch.Tensor, perturbed_losses: torch.Tensor, *, mean: str = GEOMETRIC, eps: float = 0.0
) -> torch.Tensor:
    """Return the truth ratios ``mean_j(p_j) / (p + eps)`` with ``p = exp(-loss)``, large where a model prefers false answers.

    With the geometric mean and no eps this is ``exp(paraphrased_loss - mean_j perturbed_loss_j)``, as in TOFU's logs and its
    ``aggregate_eval_stat.py`` (which holds the inverse); OU adds an eps of 1e-10. TOFU's ``utils.py`` and SOUL take the
    arithmetic mean, SOUL with an eps of 1e-12 and for the paraphrased question. Ratios beyond fp64 become its largest number.

    Args:
        paraphrased_losses: [n] of the paraphrased true answer, or of the answer itself where there is no paraphrase.
        perturbed_losses: [n, m] of the false answers.
        mean: "geometric" or "arithmetic", of the false probabilities.
        eps: what is added to the true probability.

    Raises:
        ArgumentError: another mean.
    """
    check_choice("mean", mean, (GEOMETRIC, ARITHMETIC))
    if mean == GEOMETRIC:
        false_logps = -perturbed_losses.mean(1)
    else:
        false_logps = torch.logsumexp(-perturbed_losses, 1) - math.log(perturbed_losses.shape[1])
    true_logps = torch.logaddexp(-paraphrased_losses, torch.full_like(paraphrased_losses, _log(eps)))
    return torch.exp(false_logps - true_logps).clamp(max=sys.float_info.max)


def closer_to_one(ratios: torch.Tensor, *, eps: float = 0.0) -> torch.Tensor:
    """Return ``mean min(r, 1 / (r + eps))`` of truth ratios, TOFU's and OU's figure for the forget set.

    1 means that the model finds true and false answers equally likely. OU's eps is 1e-10.
    """
    return torch.minimum(ratios, 1 / (ratios + eps)).mean()


def true_better(ratios: torch.Tensor) -> torch.Tensor:
    """Return ``mean max(0, 1 - r)`` of truth ratios, TOFU's and OU's figure for the other sets.

    1 means that the model finds no false answer likely.
    """
    return (1 - ratios).clamp(min=0).mean()


def forget_quality(ratios: torch.Tensor, retain_ratios: torch.Tensor) -> tuple[float, float]:
    """Compare truth ratios on the forget set with those of a retain model by a two-sample Kolmogorov-Smirnov test.

    As in TOFU, whose inverse ratios give the same test, and in OU. SOUL compares forget with retain questions of one model,
    which is another quantity (`soul_forget_quality`).

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


def rouge_scores(answers: Sequence[str], texts: Sequence[str]) -> dict[str, torch.Tensor]:
    """Return ROUGE of generated texts against true answers, with stemming.

    As in TOFU and OU, which use the recalls, and for MUSE the F1. SOUL's code drops the first generated token.

    Returns:
        ``rouge1_recall``, ``rougeL_recall`` and ``rougeL_f1``, [n] each.
    """
    scorer = require("rouge_score.rouge_scorer", "eval").RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
    scores = [scorer.score(answer, text) for answer, text in zip(answers, texts)]
    values = {
        "rouge1_recall": [score["rouge1"].recall for score in scores],
        "rougeL_recall": [score["rougeL"].recall for score in scores],
        "rougeL_f1": [score["rougeL"].fmeasure for score in scores],
    }
    return {name: torch.tensor(column, dtype=torch.float64, device="cpu") for name, column in values.items()}


def rouge_recall(answers: Sequence[str], texts: Sequence[str]) -> dict[str, torch.Tensor]:
    """Return the recalls of `rouge_scores`, ``rouge1_recall`` and ``rougeL_recall``, [n] each."""
    return {name: values for name, values in rouge_scores(answers, texts).items() if name.endswith("recall")}


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


def zlib_bytes(text: str) -> int:
    """Return the number of bytes that zlib makes of a text in UTF-8, which stands for the entropy of the text."""
    return len(zlib.compress(text.encode("utf-8")))


def attack_scores(log: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the scores of membership attacks that the columns of a log give, attack -> [n]; higher: more likely remembered.

    "loss" is the negative mean loss of an answer (arXiv 1709.01604), which every log has. The others are columns as they are:
    "zlib", the same divided by `zlib_bytes` of the answer (arXiv 2012.07805); "reference", the loss of another model minus this
    one's; "gradnorm", the negative norm of the gradient of the loss (arXiv 2402.17012, `soul.evaluate.attacks`); "min_k" and
    "min_k_plus_plus" (`min_k`). OU's logs hold the negatives of all six.

    Args:
        log: columns from `soul.evaluate.logs.columns`.
    """
    scores = {"loss": -log["avg_gt_loss"]} if "avg_gt_loss" in log else {}
    return scores | {name: log[name] for name in ATTACKS if name in log}


def privleak(auc: float, retain_auc: float = 0.5) -> float:
    """Return the privacy leakage of MUSE (arXiv 2407.06460) in percent: 0 is best, -100 means that everything is remembered.

    ``100 ((1 - auc) - (1 - retain_auc)) / (1 - retain_auc + 1e-10)``, as in OU. MUSE's AUC is one minus ours.

    Args:
        auc: `membership_auc` of the model by Min-K%.
        retain_auc: that of a model that never saw the forget set. OU takes 0.5 where there is none.
    """
    return (retain_auc - auc) / (1 - retain_auc + 1e-10) * 100


def soul_forget_quality(ratios: torch.Tensor, retain_ratios: torch.Tensor) -> float:
    """Return the forget quality of SOUL's code: the p-value of `forget_quality`, for two sets under one model.

    1 means that questions to forget cannot be told from questions to retain. So it is not TOFU's quantity, and needs no retain
    model. A model that has lost everything can reach it.

    Args:
        ratios: [n] of the forget set, `truth_ratio` with the arithmetic mean.
        retain_ratios: [m] of the retain set.
    """
    return forget_quality(ratios, retain_ratios)[0]


def soul_mia(forget: torch.Tensor, others: torch.Tensor) -> float:
    """Return the membership metric of SOUL's paper: 0 where the forget set is remembered, 0.5 where the attack cannot tell.

    It is one minus `membership_auc`. In the code as published the labels are in another order than the rows (those of the other
    sets come first), so that its figure is not this area.

    Args:
        forget: [n], `min_k` of question and answer of the forget set.
        others: [m], the same of real authors and world facts.
    """
    return 1 - membership_auc(forget, others)


def summarize(
    logs: Mapping[str, Mapping[str, torch.Tensor]], retain_logs: Mapping[str, Mapping[str, torch.Tensor]] | None = None
) -> dict[str, float]:
    """Return all numbers that the logs of the four sets give, as TOFU's ``aggregate_eval_stat.py`` defines them.

    Args:
        logs: set ("forget", "retain", "real_authors", "world_facts" and, optionally, "holdout") -> its columns, from
            `soul.evaluate.logs.columns`.
        retain_logs: "forget" and, optionally, "holdout" -> columns under a model that never saw the forget set. None: there is
            no forget quality.

    Returns:
        ``forget_quality`` and ``ks_statistic``, ``model_utility``, and for each set ``{set}_prob``, ``{set}_rouge``,
        ``{set}_truth_ratio``, ``{set}_rows``; where the logs have them ``{set}_exact_memorization`` and
        ``{set}_extraction_strength``; with a holdout set ``forget_{attack}_auc`` of the `attack_scores` that both sets have,
        and ``privleak`` if the retain model's logs have Min-K% of both sets too; and SOUL's own metrics of the columns of
        `soul.evaluate.soul_metrics`.
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
    if retain_logs is not None:
        log = retain_logs["forget"]
        retain_ratio = truth_ratio(log["avg_paraphrased_loss"], log["average_perturb_loss"])
        summary["forget_quality"], summary["ks_statistic"] = forget_quality(ratios["forget"], retain_ratio)
    summary["model_utility"] = model_utility(numbers)
    return summary | _membership(logs, retain_logs) | _of_soul(logs) | numbers


def membership_aucs(logs: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, float]:
    """Return `membership_auc` of every attack whose scores the forget and the holdout set both have, attack -> AUC."""
    forget, holdout = (attack_scores(logs.get(name, {})) for name in ("forget", "holdout"))
    return {name: membership_auc(scores, holdout[name]) for name, scores in forget.items() if name in holdout}


def _membership(
    logs: Mapping[str, Mapping[str, torch.Tensor]], retain_logs: Mapping[str, Mapping[str, torch.Tensor]] | None
) -> dict[str, float]:
    """Return the AUCs of the membership attacks, and the privacy leakage where a retain model's logs have Min-K% too."""
    aucs = membership_aucs(logs)
    summary = {f"forget_{name}_auc": auc for name, auc in aucs.items()}
    retain_auc = membership_aucs(retain_logs or {}).get("min_k")
    if "min_k" in aucs and retain_auc is not None:
        summary["privleak"] = privleak(aucs["min_k"], retain_auc)
    return summary


def _of_soul(logs: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, float]:
    """Return SOUL's own metrics, of the columns that `soul.evaluate.soul_metrics` adds to logs; without these, nothing."""
    if not all("soul_min_k" in logs.get(name, {}) for name in ("forget", "retain", *OPTION_SETS)):
        return {}
    others = torch.cat([logs[name]["soul_min_k"] for name in OPTION_SETS])
    summary = {
        "soul_forget_quality": soul_forget_quality(logs["forget"]["soul_truth_ratio"], logs["retain"]["soul_truth_ratio"]),
        "soul_mia": soul_mia(logs["forget"]["soul_min_k"], others),
    }
    return summary | {f"{name}_soul_accuracy": log["soul_correct"].mean().item()
                      for name, log in logs.items() if "soul_correct" in log}  # fmt: skip

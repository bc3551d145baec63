"""What is measured on a model of a study; formulas are in `soul.evaluate.metrics`."""

import dataclasses
import math
import statistics

import torch

from soul.evaluate import metrics
from soul.evaluate.model import EncodedQuestions, EvaluateConfig, answer_columns, encode_questions, kl_divergence, ratio_columns
from soul.models.encoding import encode_for

UTILITY = ("retain_prob", "retain_memorization", "retain_truth_ratio")
BATCH = {"cpu": 16, "cuda": 128}  # sequences to measure at a time; larger ones are slower
LEAST = 1e-300  # p-values below are rounding


@dataclasses.dataclass
class Start:
    """What all runs of a seed start from and are measured against: models, tokenizer, and the encoded questions.

    ``forget`` and ``questions`` are `EncodedQuestions`, ``retain`` and ``holdout`` lists of `soul.data.Sequence`;
    ``retain_ratios`` are the truth ratios of the retain model on the forget set.
    """

    full: object
    retain_model: object
    tokenizer: object
    options: EvaluateConfig
    forget: EncodedQuestions
    questions: EncodedQuestions
    retain: list
    holdout: list
    retain_ratios: object


def encode_start(full, retain_model, tokenizer, data, config):
    """`Start` of two models, with the rows that the config wants measured."""
    options = EvaluateConfig(backend=config.backend, max_new_tokens=1, batch_size=BATCH[next(full.parameters()).device.type])

    def some(rows):  # of all authors
        return rows[:: max(1, len(rows) // config.retain_rows)][: config.retain_rows]

    asked = {"forget": data.forget_questions, "retain": some(data.retain_questions)}
    forget, questions = (encode_questions(full, tokenizer, rows, options, name) for name, rows in asked.items())
    retain = encode_for(full, tokenizer, some(data.retain), options, "retain")
    holdout = encode_for(full, tokenizer, data.holdout, options, "holdout")
    ratios = truth_ratios(retain_model, forget, options)
    return Start(full, retain_model, tokenizer, options, forget, questions, retain, holdout, ratios)


def truth_ratios(model, asked, options):
    """`soul.evaluate.metrics.truth_ratio` of every question, [n]."""
    columns = ratio_columns(model, asked, options)
    return metrics.truth_ratio(columns["avg_paraphrased_loss"], columns["average_perturb_loss"])


def measure(model, start):
    """The numbers of one model, a dict of floats.

    ``forget_quality`` is log10 of the p-value; ``utility`` the harmonic mean of the parts of TOFU's model utility that concern
    what was trained on, with exact memorization in the place of ROUGE-L, which would take most of the time: a model from
    scratch knows neither real authors nor the world. Membership is told from the rows held out: 1: the forget set is
    remembered, 0.5: it is not.
    """
    options = start.options
    sets = (start.forget.answers, start.retain, start.holdout)
    forget, retain, holdout = (answer_columns(model, start.tokenizer, part, options) for part in sets)
    ratios = truth_ratios(model, start.forget, options)
    p, statistic = metrics.forget_quality(ratios, start.retain_ratios)
    found = {
        "forget_prob": metrics.probability(forget["avg_gt_loss"]).mean().item(),
        "retain_prob": metrics.probability(retain["avg_gt_loss"]).mean().item(),
        "forget_quality": math.log10(max(p, LEAST)),
        "ks_statistic": statistic,
        "forget_truth_ratio": metrics.closer_to_one(ratios).item(),
        "retain_truth_ratio": metrics.true_better(truth_ratios(model, start.questions, options)).item(),
        "forget_memorization": statistics.fmean(forget["exact_memorization"]),
        "retain_memorization": statistics.fmean(retain["exact_memorization"]),
        "forget_kl": kl_divergence(model, start.retain_model, start.forget.answers, backend=options.backend),
        "mia_loss": metrics.membership_auc(-forget["avg_gt_loss"], -holdout["avg_gt_loss"]),
    }
    for name in metrics.MEMBERSHIP:
        found[f"mia_{name}"] = metrics.membership_auc(*(torch.tensor(part[name]) for part in (forget, holdout)))
    return found | {"utility": statistics.harmonic_mean([found[name] for name in UTILITY])}

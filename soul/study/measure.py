"""What is measured on a model of a study; formulas are in `soul.metrics`."""

import dataclasses
import math
import statistics

import torch

from soul import metrics
from soul.evaluate import (
    Asked,
    EvaluateConfig,
    answer_columns,
    encode_questions,
    kl_divergence,
    ratio_columns,
    rouge_l_recall,
    sequence_statistics,
)
from soul.prepare import encode_for

UTILITY = ("retain_prob", "retain_rouge", "retain_truth_ratio")
EVAL_BATCH = 16  # sequences; larger ones are slower on a CPU
LEAST = 1e-300  # p-values below are rounding


@dataclasses.dataclass
class Start:
    """What all runs of a seed start from and are measured against: models, tokenizer, and the encoded questions.

    ``forget`` and ``questions`` are `Asked`, ``retain`` and ``holdout`` lists of `soul.data.Sequence`; ``retain_ratios`` are
    the truth ratios of the retain model on the forget set.
    """

    full: object
    retain_model: object
    tokenizer: object
    options: EvaluateConfig
    forget: Asked
    questions: Asked
    retain: list
    holdout: list
    generate: int
    retain_ratios: object


def encode_start(full, retain_model, tokenizer, data, config):
    """`Start` of two models, with the rows that the config wants measured."""
    options = EvaluateConfig(backend=config.backend, max_new_tokens=64, batch_size=EVAL_BATCH)

    def asked(questions, name):
        return encode_questions(full, tokenizer, questions, options, name)

    forget, questions = asked(data.forget_questions, "forget"), asked(data.retain_questions[: config.retain_rows], "retain")
    step = max(1, len(data.retain) // config.retain_rows)  # rows from all authors
    retain = encode_for(full, tokenizer, data.retain[::step][: config.retain_rows], options, "retain")
    holdout = encode_for(full, tokenizer, data.holdout, options, "holdout")
    ratios = truth_ratios(retain_model, forget, options)
    return Start(full, retain_model, tokenizer, options, forget, questions, retain, holdout, config.generate, ratios)


def truth_ratios(model, asked, options):
    """`soul.metrics.truth_ratio` of every question, [n]."""
    columns = ratio_columns(model, asked, options)
    return metrics.truth_ratio(columns["avg_paraphrased_loss"], columns["average_perturb_loss"])


def measure(model, start):
    """The numbers of one model, a dict of floats.

    ``forget_quality`` is log10 of the p-value; ``utility`` the harmonic mean of the parts of TOFU's model utility that concern
    what was trained on: a model from scratch knows neither real authors nor the world. Membership is told from the rows held
    out: 1: the forget set is remembered, 0.5: it is not.
    """
    options, common = start.options, dict(backend=start.options.backend)
    forget = answer_columns(model, start.tokenizer, start.forget.answers, options)
    holdout = answer_columns(model, start.tokenizer, start.holdout, options)
    ratios = truth_ratios(model, start.forget, options)
    p, statistic = metrics.forget_quality(ratios, start.retain_ratios)
    asked = start.questions
    found = {
        "forget_prob": metrics.probability(forget["avg_gt_loss"]).mean().item(),
        "retain_prob": metrics.probability(_losses(model, start.retain, options)).mean().item(),
        "forget_quality": math.log10(max(p, LEAST)),
        "ks_statistic": statistic,
        "forget_truth_ratio": metrics.closer_to_one(ratios).item(),
        "retain_truth_ratio": metrics.true_better(truth_ratios(model, asked, options)).item(),
        "retain_rouge": rouge_l_recall(
            model, start.tokenizer, asked.examples[: start.generate], asked.answers[: start.generate],
            batch_size=options.batch_size, max_new_tokens=options.max_new_tokens,
        ),
        "exact_memorization": sum(forget["exact_memorization"]) / len(forget["exact_memorization"]),
        "forget_kl": kl_divergence(model, start.retain_model, start.forget.answers, **common),
        "mia_loss": metrics.membership_auc(-forget["avg_gt_loss"], -holdout["avg_gt_loss"]),
    }  # fmt: skip
    for name in metrics.MEMBERSHIP:
        found[f"mia_{name}"] = metrics.membership_auc(*(torch.tensor(part[name]) for part in (forget, holdout)))
    return found | {"utility": statistics.harmonic_mean([found[name] for name in UTILITY])}


def _losses(model, sequences, options):
    found = sequence_statistics(model, sequences, batch_size=options.batch_size, backend=options.backend)
    return torch.stack([-tokens.logps.mean() for tokens in found])

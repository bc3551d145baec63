"""The measurements on a model of a study; the formulas are in `soul.evaluate.metrics`."""

import dataclasses
import math
import statistics
from typing import TYPE_CHECKING, TypeVar

import torch

from soul.data.examples import Example, Sequence
from soul.data.instructions import instruct, instruct_template
from soul.evaluate import metrics
from soul.evaluate.model import EncodedQuestions, EvaluateConfig, answer_columns, encode_questions, kl_divergence, ratio_columns
from soul.models.encoding import encode_for
from soul.study.config import StudyConfig
from soul.study.data import StudyData

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

UTILITY = ("retain_prob", "retain_memorization", "retain_truth_ratio")
BATCH_SIZES = {"cpu": 16, "cuda": 128}  # sequences measured at a time; larger batches are slower
SMALLEST_P = 1e-300  # p-values below this are rounding errors

T = TypeVar("T")


@dataclasses.dataclass
class Start:
    """The models that all runs of a seed start from and are measured against, and the encoded rows to measure on.

    Attributes:
        full: the model before unlearning.
        retain_model: the model trained on the retain set alone, which unlearning aims at.
        tokenizer: the tokenizer of both.
        options: how questions are encoded and measured.
        forget: the questions of the forget set.
        questions: questions of the retain set.
        retain: answers of the retain set.
        holdout: answers that no model was trained on.
        retain_ratios: truth ratios of the retain model on the forget set, [n].
    """

    full: "PreTrainedModel"
    retain_model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    options: EvaluateConfig
    forget: EncodedQuestions
    questions: EncodedQuestions
    retain: list[Sequence]
    holdout: list[Sequence]
    retain_ratios: torch.Tensor


def encode_start(
    full: "PreTrainedModel",
    retain_model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    data: StudyData,
    config: StudyConfig,
    instruction: str | None = None,
) -> Start:
    """Return the `Start` of two models, with as many rows to measure on as the config asks for.

    With an instruction, it stands before every row that is measured on. The retain model's truth ratios are those without it:
    they are what a model is compared with, however it is asked.
    """
    device = next(full.parameters()).device
    plain = EvaluateConfig(backend=config.backend, max_new_tokens=1, batch_size=BATCH_SIZES[device.type])
    options = plain
    if instruction is not None:
        options = dataclasses.replace(plain, template=instruct_template(instruction, plain.template, None)[0])

    def thinned(rows: list[T]) -> list[T]:
        """Return at most ``config.retain_rows`` rows, at equal distances, so that all authors are among them."""
        return rows[:: max(1, len(rows) // config.retain_rows)][: config.retain_rows]

    def asked(rows: list[Example]) -> list[Example]:
        return rows if instruction is None else [instruct(instruction, row) for row in rows]

    forget = encode_questions(full, tokenizer, data.forget_questions, options, "forget")
    plain_forget = forget
    if instruction is not None:
        plain_forget = encode_questions(full, tokenizer, data.forget_questions, plain, "forget")
    return Start(
        full=full,
        retain_model=retain_model,
        tokenizer=tokenizer,
        options=options,
        forget=forget,
        questions=encode_questions(full, tokenizer, thinned(data.retain_questions), options, "retain"),
        retain=encode_for(full, tokenizer, asked(thinned(data.retain)), options, "retain"),
        holdout=encode_for(full, tokenizer, asked(data.holdout), options, "holdout"),
        retain_ratios=truth_ratios(retain_model, plain_forget, plain),
    )


def truth_ratios(model: "PreTrainedModel", questions: EncodedQuestions, options: EvaluateConfig) -> torch.Tensor:
    """Return `soul.evaluate.metrics.truth_ratio` of every question, [n]."""
    columns = ratio_columns(model, questions, options)
    return metrics.truth_ratio(columns["avg_paraphrased_loss"], columns["average_perturb_loss"])


def measure(model: "PreTrainedModel", start: Start) -> dict[str, float]:
    """Return the numbers of one model, by name.

    ``forget_quality`` is log10 of the p-value of TOFU's test. ``utility`` is the harmonic mean of those components of TOFU's
    model utility that concern what was trained on: a model from scratch knows neither real authors nor the world. Exact
    memorization replaces ROUGE-L, which would take most of the time. The ``mia_*`` are areas under the ROC curve of membership
    inference against the rows held out: 1 means that the forget set is remembered, 0.5 that it is not.
    """
    options = start.options
    forget = answer_columns(model, start.tokenizer, start.forget.answers, options)
    retain = answer_columns(model, start.tokenizer, start.retain, options)
    holdout = answer_columns(model, start.tokenizer, start.holdout, options)
    ratios = truth_ratios(model, start.forget, options)
    p, statistic = metrics.forget_quality(ratios, start.retain_ratios)
    numbers = {
        "forget_prob": metrics.probability(forget["avg_gt_loss"]).mean().item(),
        "retain_prob": metrics.probability(retain["avg_gt_loss"]).mean().item(),
        "forget_quality": math.log10(max(p, SMALLEST_P)),
        "ks_statistic": statistic,
        "forget_truth_ratio": metrics.closer_to_one(ratios).item(),
        "retain_truth_ratio": metrics.true_better(truth_ratios(model, start.questions, options)).item(),
        "forget_memorization": statistics.fmean(forget["exact_memorization"]),
        "retain_memorization": statistics.fmean(retain["exact_memorization"]),
        "forget_kl": kl_divergence(model, start.retain_model, start.forget.answers, backend=options.backend),
        "mia_loss": metrics.membership_auc(-forget["avg_gt_loss"], -holdout["avg_gt_loss"]),
    }
    for name in metrics.MEMBERSHIP:
        numbers[f"mia_{name}"] = metrics.membership_auc(torch.tensor(forget[name]), torch.tensor(holdout[name]))
    numbers["utility"] = statistics.harmonic_mean([numbers[name] for name in UTILITY])
    return numbers

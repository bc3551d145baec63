"""Scorers of toxicity: functions from n texts to n scores in [0, 1], where 1 is certainly toxic.

`scorer_of` makes one by name: a Hugging Face classifier, from a directory or the hub, or the small one inside the package
``alt-profanity-check``, which needs no network. In Python any function of this form will do.
"""

import pathlib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from soul._connection import hub_asked_once
from soul._extras import MissingExtra, require
from soul.models.files import check_directory, config_of
from soul.tasks.measures import Scorer
from soul_kernels.errors import ArgumentError, argument_error

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

OFFLINE = "profanity-check"
TOXIC_BERT = "unitary/toxic-bert"  # of SOUL's evaluation
BATCH_SIZE = 16


def scorer_of(name: str, *, device: torch.device | str = "cpu") -> Scorer:
    """Return a scorer.

    Args:
        name: "profanity-check"; or a classifier, a directory or a hub name such as "unitary/toxic-bert", with ``:LABEL`` behind
            it to name the label whose probability is the score. Without a label a classifier with independent labels (sigmoid)
            gives the highest of its probabilities, as SOUL's code takes it.
        device: where a classifier runs.

    Raises:
        ArgumentError: there is no such classifier or label; or its labels exclude each other and none is named.
        MissingExtra: its package is not installed.
    """
    if name == OFFLINE:
        module = require("profanity_check", "detox")
        return lambda texts: [float(score) for score in module.predict_prob(list(texts))]
    path, colon, label = name, "", ""
    if not pathlib.Path(name).exists():
        path, colon, label = name.rpartition(":") if ":" in name else (name, "", "")
    model, tokenizer = _load(path, device)
    labels = {index: str(text) for index, text in sorted(model.config.id2label.items())}
    is_independent = len(labels) == 1 or model.config.problem_type == "multi_label_classification"
    known = ", ".join(labels.values())
    if colon and label not in labels.values():
        raise argument_error("scorer", f"a label of {path}: {known}", label or "nothing", "choose one of these")
    if not colon and not is_independent:
        remedy = f"its labels exclude each other: {known}"
        raise argument_error("scorer", f"{path}:LABEL, the label that says toxic", name, remedy)
    columns = [index for index, text in labels.items() if not colon or text == label]

    @torch.no_grad()
    def score(texts: Sequence[str]) -> list[float]:
        scores: list[float] = []
        for start in range(0, len(texts), BATCH_SIZE):
            batch = tokenizer(
                list(texts[start : start + BATCH_SIZE]),
                padding=True,
                truncation=True,
                max_length=_longest(model, tokenizer),
                return_tensors="pt",
            ).to(device)
            logits = model(**batch).logits.float()
            probabilities = logits.sigmoid() if is_independent else logits.softmax(-1)
            scores += probabilities[:, columns].amax(1).tolist()
        return scores

    return score


def check_scorer(name: str) -> None:
    """Raise if a scorer cannot be had, as far as this is seen without loading it.

    Raises:
        ArgumentError: it is the path of something else than a classifier.
        MissingExtra: its package is not installed.
    """
    if name == OFFLINE:
        require("profanity_check", "detox")
        return
    require("transformers", "hf")
    path = name if pathlib.Path(name).exists() else re.sub(r":[^:/]*$", "", name)
    looks_local = path.startswith((".", "/", "~")) or pathlib.Path(path).exists()
    if looks_local and not (pathlib.Path(path) / "config.json").is_file():
        expected = f"{OFFLINE}, a directory with a classifier, or a hub name such as {TOXIC_BERT}"
        raise argument_error("scorer", expected, name, "check the path")


def _load(name: str, device: torch.device | str) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """Return a classifier and its tokenizer; no code that comes with it is run."""
    transformers = require("transformers", "hf")
    check_scorer(name)
    try:
        check_directory(name)
        with hub_asked_once("scorer", name):
            config_of(name)
            tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
            model = transformers.AutoModelForSequenceClassification.from_pretrained(name, trust_remote_code=False)
    except (ArgumentError, MissingExtra):
        raise
    except Exception as error:  # the libraries raise many kinds: no such name, no connection, another kind of model
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        remedy = f"check name and connection, or use {OFFLINE}, which needs none"
        raise argument_error("scorer", "a classifier of texts", f"{name} ({reason})", remedy) from error
    return model.eval().to(device), tokenizer


def _longest(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> int:
    """Return the number of tokens that a classifier takes at most."""
    positions = getattr(model.config, "max_position_embeddings", None) or tokenizer.model_max_length
    return min(positions, tokenizer.model_max_length, 512)

"""The metrics of SOUL's paper (arXiv 2404.18239), which its code computes in ways of its own (``src/metrics/Tofu.py``).

It asks the paraphrased question, takes truth ratios with an arithmetic mean, scores question and answer together for its
membership attack, and calls an answer right if a sentence encoder finds it nearer to the true answer than to each false one.
Here these runs become columns of the logs; `soul.evaluate.metrics.summarize` makes the numbers ``soul_*`` of them.
"""

import collections.abc
import dataclasses
import pathlib
from typing import TYPE_CHECKING, NamedTuple

import torch

from soul._connection import hub_asked_once
from soul._extras import MissingExtra, require
from soul.data.examples import Question, Sequence
from soul.data.templates import Template
from soul.evaluate import metrics
from soul.evaluate.attacks import without_end
from soul.evaluate.model import (
    Columns,
    EncodedQuestions,
    EvaluateConfig,
    encode_questions,
    generate,
    ratio_columns,
    sequence_statistics,
)
from soul.models.encoding import encode_for
from soul.models.files import check_directory, config_of
from soul_kernels.errors import ArgumentError, argument_error

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
EPS = 1e-12  # in the denominator of SOUL's truth ratios
MAX_TOKENS = 256  # of a sentence, as all-MiniLM-L6-v2 was trained


class SentenceEncoder:
    """A sentence encoder: the mean of a Transformer's hidden states over a text's tokens, with length 1.

    Args:
        name: directory or hub name of a model that was trained with mean pooling, such as all-MiniLM-L6-v2. Code that comes
            with it is never run.
        device: where it runs, in fp32.
        batch_size: texts in a batch.

    Raises:
        ArgumentError: there is no such model, or weights of it are missing.
    """

    def __init__(self, name: str | pathlib.Path, device: torch.device | str = "cpu", batch_size: int = 32) -> None:
        transformers = require("transformers", "hf")
        self.device = torch.device(device)
        self.batch_size = batch_size
        try:
            check_directory(name)
            with hub_asked_once("sentence_model", name):
                config_of(name)
                self.tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
                self.model, info = transformers.AutoModel.from_pretrained(
                    name, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
                )
        except (ArgumentError, MissingExtra):
            raise
        except Exception as error:  # the libraries raise many kinds for a broken or foreign checkpoint
            reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
            raise argument_error("sentence_model", "a sentence encoder", f"{name} ({reason})", "check the name") from error
        missing = sorted(key for key in info["missing_keys"] if not key.startswith("pooler."))  # the pooler is not used
        if missing:
            got = f"{name} without {missing[0]}"
            raise argument_error("sentence_model", "a checkpoint with all its weights", got, "was it saved to the end?")
        self.model.to(self.device).eval()

    @torch.no_grad()
    def __call__(self, texts: collections.abc.Sequence[str]) -> torch.Tensor:
        """Return the embeddings of n texts, [n, D] fp32 on the CPU; their products are cosines."""
        embeddings = []
        for start in range(0, len(texts), self.batch_size):
            batch = self.tokenizer(
                list(texts[start : start + self.batch_size]),
                padding=True,
                truncation=True,
                max_length=MAX_TOKENS,
                return_tensors="pt",
            ).to(self.device)
            hidden = self.model(**batch).last_hidden_state
            mask = batch["attention_mask"][:, :, None].to(hidden.dtype)
            means = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
            embeddings.append(torch.nn.functional.normalize(means, dim=1).cpu())
        return torch.cat(embeddings)


def nearest_is_true(
    encoder: SentenceEncoder, texts: collections.abc.Sequence[str], questions: collections.abc.Sequence[Question]
) -> list[float]:
    """Return for each generated text 1 if no false answer is nearer to it than the true one, by the cosine, else 0.

    Args:
        encoder: gives the embeddings.
        texts: n generated answers.
        questions: the n questions; their paraphrased answers are the true ones.
    """
    correct: list[float] = []
    for text, question in zip(texts, questions):
        embeddings = encoder([text, question.paraphrased, *question.perturbed])
        similarities = embeddings[1:] @ embeddings[0]
        correct.append(float(similarities[0] >= similarities.max()))
    return correct


def contains_answer(texts: collections.abc.Sequence[str], questions: list[Question]) -> list[float]:
    """Return for each generated text 1 if the true answer is in it, in upper or lower case, else 0."""
    return [float(question.answer.strip().lower() in text.lower()) for text, question in zip(texts, questions)]


class SoulQuestions(NamedTuple):
    """The questions of one set, encoded for SOUL's metrics.

    Attributes:
        questions: the n questions; of forget and retain as they are asked here, with the paraphrased answer as the answer.
        whole: [n], question and answer as one text.
        asked: the paraphrased questions of forget and retain with every kind of answer; None for the other two sets.
    """

    questions: list[Question]
    whole: list[Sequence]
    asked: EncodedQuestions | None


def encode_soul(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", name: str, questions: list[Question], config: EvaluateConfig
) -> SoulQuestions:
    """Encode the questions of one set for SOUL's metrics. Where a question has no paraphrase it is asked as it is.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        name: "forget", "retain", "real_authors" or "world_facts".
        questions: the n questions of the set.
        config: how they are asked.

    Raises:
        ArgumentError: a sequence does not fit the model, as `soul.evaluate.model.encode_questions`.
    """
    template = Template(config.template, tokenizer, config.system)
    asked = [template.ask(q.question, q.answer, f"{name}, row {row}") for row, q in enumerate(questions)]
    texts = [dataclasses.replace(example, prompt="", answer=example.prompt + example.answer) for example in asked]
    whole = encode_for(model, tokenizer, texts, config, f"{name}, question and answer")
    if name in metrics.OPTION_SETS:
        return SoulQuestions(questions, whole, None)
    others = [dataclasses.replace(q, question=q.paraphrased_question or q.question, answer=q.paraphrased) for q in questions]
    encoded = encode_questions(model, tokenizer, others, config, f"{name}, paraphrased question")
    return SoulQuestions(others, whole, encoded)


def soul_columns(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    encoded: SoulQuestions,
    texts: collections.abc.Sequence[str],
    config: EvaluateConfig,
    encoder: SentenceEncoder,
) -> Columns:
    """Return the columns of SOUL's own metrics for one set, one value a question.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        encoded: the n questions, from `encode_soul`.
        texts: the model's answers to the questions of TOFU, which are judged for real authors and world facts.
        config: as for `encode_soul`. ``min_k`` is the fraction of the tokens of question and answer.
        encoder: judges the answers to the paraphrased questions of forget and retain.

    Returns:
        ``soul_min_k``, and ``soul_correct`` (1 or 0); for forget and retain also ``soul_truth_ratio``.
    """
    statistics = sequence_statistics(model, encoded.whole, batch_size=config.batch_size, backend=config.backend)
    counts = [without_end(sequence, tokenizer.eos_token_id).n_labels for sequence in encoded.whole]
    scores = [metrics.min_k(tokens.logps[:count], config.min_k) for tokens, count in zip(statistics, counts)]
    if encoded.asked is None:
        return {"soul_min_k": scores, "soul_correct": contains_answer(texts, encoded.questions)}
    losses = ratio_columns(model, encoded.asked, config)
    ratios = metrics.truth_ratio(
        losses["avg_paraphrased_loss"], losses["average_perturb_loss"], mean=metrics.ARITHMETIC, eps=EPS
    )
    answers = generate(
        model, tokenizer, encoded.asked.answers, batch_size=config.batch_size, max_new_tokens=config.max_new_tokens
    )
    correct = nearest_is_true(encoder, answers, encoded.questions)
    return {"soul_min_k": scores, "soul_truth_ratio": ratios, "soul_correct": correct}

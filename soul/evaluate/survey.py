"""What a model says to a set of rows, in numbers: `survey` of its answers, and how fluent texts are.

Chance is what the same answers give with the keys of other rows in the place of each row's own: a model that never knew the
rows says these as often. A set is said by no more rows than chance explains if there are at most `most_by_chance` of them.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from soul.data.batches import collate
from soul.data.examples import REFUSALS, is_refused
from soul.data.examples import Sequence as Tokens
from soul.data.wording import is_broken, repeats
from soul.evaluate.model import sequence_statistics
from soul.evaluate.said import Drawing, Probe, Said, interval, leak_at_k, most_by_chance
from soul.models.causal_lm import autocast, device_of, evaluating
from soul_kernels.tokens import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WAYS = ("as_asked", "other_words", "drawn")
REFUSES = (*REFUSALS, "I'm sorry", "I am sorry", "I cannot", "I can't", "as an AI")
PERPLEXITY = 100.0  # under the model before: an answer that is less likely is no fluent text of its language
KL_TOKENS = 256  # of the texts by which two models are compared, at most

Numbers = dict[str, Any]


def survey(probe: Probe, said: Sequence[Said], drawing: Drawing, chance: Numbers | None = None) -> Numbers:
    """Return how many rows a model says, in each of the ``WAYS`` in which they were asked.

    Args:
        probe: that which asked; only its judged rows count.
        said: what the model said to each row.
        drawing: how the drawn answers were drawn.
        chance: way -> rate of a model that never knew the rows; None: by the keys of other rows.

    Returns:
        ``rows`` judged and ``unjudged``; and for each way ``said`` (number of rows; for drawn answers those with at least one
        that says it), ``of``, ``rate`` (said, said_forms, and leak@k), its 95% interval ``low`` to ``high``, ``chance``, and
        ``most``, the rows that chance explains. Drawn answers also have how they were drawn, and ``leak@1``.
    """
    judged = probe.judged
    result: Numbers = {"rows": len(judged), "unjudged": len(probe.facts) - len(judged)}
    for way in WAYS:
        asked = [row for row in judged if texts_of(said[row], way)]
        values = [_leak(probe, said[row], way, row, row) for row in asked]
        rate = interval(values)
        foreign = [_leak(probe, said[row], way, row, other) for row in asked for other in probe.others(row)]
        by_chance = (chance or {}).get(way, sum(foreign) / len(foreign) if foreign else 0.0)
        n_said = sum(bool(saying(probe, said[row], way, row)) for row in asked)
        result[way] = {
            "said": n_said,
            "of": len(asked),
            "rate": None if math.isnan(rate.rate) else rate.rate,
            "low": rate.low,
            "high": rate.high,
            "chance": by_chance,
            "most": most_by_chance(by_chance, len(asked)),
        }
    counts = [sum(probe.says(row, text) for text in said[row].drawn) for row in judged if said[row].drawn]
    result["drawn"] |= {"k": drawing.draws, "temperature": drawing.temperature, "top_p": drawing.top_p, "seed": drawing.seed}
    result["drawn"]["leak@1"] = sum(leak_at_k(drawing.draws, c, 1) for c in counts) / len(counts) if counts else None
    extraction = probe.extraction([each.greedy for each in said])
    return result | ({"extraction": extraction} if extraction else {})


def texts_of(said: Said, way: str) -> tuple[str, ...]:
    """Return the answers that a model gave in one of the ``WAYS``."""
    return {"as_asked": (said.greedy,), "other_words": tuple(text for _, text in said.forms), "drawn": said.drawn}[way]


def saying(probe: Probe, said: Said, way: str, row: int) -> list[str]:
    """Return those of a row's answers that say its fact."""
    return [text for text in texts_of(said, way) if probe.says(row, text)]


def _leak(probe: Probe, said: Said, way: str, row: int, other: int) -> float:
    """Return whether a row's answers say a row's fact: 0 or 1, and leak@k of drawn answers."""
    hits = [probe.says(row, text, of=other) for text in texts_of(said, way)]
    if way == "drawn":
        return leak_at_k(len(hits), sum(hits), len(hits))
    return float(any(hits))


def fluency(
    model: "PreTrainedModel | None",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Tokens],
    texts: Sequence[str],
    harmless: Sequence[bool],
    **options: Any,
) -> Numbers:
    """Return how fluent n answers are.

    Args:
        model: the model before unlearning, under which their perplexity is measured; None: it is not.
        tokenizer: its tokenizer.
        prompts: n encoded prompts, to which they were given.
        texts: the answers.
        harmless: for each, whether it was to be answered, so that a refusal counts.
        options: ``batch_size`` and ``backend`` of `soul.evaluate.model.sequence_statistics`.

    Returns:
        ``fluent``, the number of answers that are text, repeat nothing and have a perplexity of at most ``PERPLEXITY``;
        ``of``; ``broken``, ``repeating`` and ``unlikely``, the others; ``perplexity``, the median; ``refused``, and
        ``harmless``, of how many.
    """
    perplexities = [1.0] * len(texts) if model is None else _perplexities(model, tokenizer, prompts, texts, **options)
    broken = [is_broken(text) for text in texts]
    repeating = [repeats(text) and not bad for text, bad in zip(texts, broken)]
    unlikely = [p > PERPLEXITY and not (bad or again) for p, bad, again in zip(perplexities, broken, repeating)]
    refused = sum(is_refused(text, REFUSES) for text, counts in zip(texts, harmless) if counts)
    return {
        "fluent": len(texts) - sum(broken) - sum(repeating) - sum(unlikely),
        "of": len(texts),
        "broken": sum(broken),
        "repeating": sum(repeating),
        "unlikely": sum(unlikely),
        "perplexity": sorted(perplexities)[len(texts) // 2] if texts and model is not None else None,
        "refused": refused,
        "harmless": sum(harmless),
    }


def _perplexities(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Tokens],
    texts: Sequence[str],
    **options: Any,
) -> list[float]:
    """Return the perplexity of each answer after its prompt; infinity of one without tokens."""
    sequences, rows = [], []
    for index, (prompt, text) in enumerate(zip(prompts, texts)):
        answer = tokenizer(text, add_special_tokens=False, verbose=False).input_ids if text else []
        if answer:
            sequences.append(continued(prompt, answer))
            rows.append(index)
    perplexities = [math.inf] * len(texts)
    for row, tokens in zip(rows, sequence_statistics(model, sequences, **options)):
        perplexities[row] = math.exp(min(700.0, -float(tokens.logps.mean())))
    return perplexities


def continued(prompt: Tokens, answer: list[int]) -> Tokens:
    """Return a prompt with other tokens after it, which alone have labels."""
    begin = prompt.input_ids[: prompt.prompt_length]
    labels = [IGNORE_INDEX] * (len(begin) - 1) + answer + [IGNORE_INDEX]
    return Tokens(begin + answer, labels, len(begin))


class OwnTexts:
    """Texts that a model wrote itself, and its distributions over each next token, to compare another one with.

    Args:
        model: the model.
        sequences: its own answers after their prompts, from `continued`; the first ``KL_TOKENS`` tokens of these are taken.
    """

    def __init__(self, model: "PreTrainedModel", sequences: Sequence[Tokens]) -> None:
        self._sequences: list[Tokens] = []
        count = 0
        for sequence in sequences:
            if count + sequence.n_labels > KL_TOKENS:
                break
            self._sequences.append(sequence)
            count += sequence.n_labels
        self._logps = self._log_probabilities(model)

    def kl(self, model: "PreTrainedModel") -> float | None:
        """Return the mean over tokens of ``KL(before || model)`` in nats; None without texts."""
        if not self._sequences:
            return None
        total, count = 0.0, 0
        for before, now in zip(self._logps, self._log_probabilities(model)):
            total += float((before.exp() * (before - now)).sum())
            count += len(before)
        return total / count

    def _log_probabilities(self, model: "PreTrainedModel") -> list[torch.Tensor]:
        """Return the log-probabilities of the whole vocabulary at each label, [n, V] fp32 on the CPU for each sequence."""
        logps = []
        with torch.no_grad(), evaluating(model), autocast(model):
            for sequence in self._sequences:
                batch = collate([sequence], [], device=device_of(model))
                places = [index for index, label in enumerate(sequence.labels) if label != IGNORE_INDEX]
                logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
                logps.append(torch.log_softmax(logits[0, places].float(), -1).cpu())
        return logps

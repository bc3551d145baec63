"""The key of each row, the words of its answer that carry the fact, found from a model that knows it.

A word carries the fact if the model expects it far more under this row's question than under others that ask the same kind of
thing. The others are those with the most words in common. Where the answer repeats the subject of its question ("The capital
of Nepal is ..."), the subject of the other question takes its place, so that the words before do not give the fact away. The
score of a word is the difference of its log-probabilities, in nats, between its own question and the mean (of probabilities)
over the others. Stop words and words that stand in the question have none.

Adjacent words of one kind (a name, a number, other words) are one candidate, whose score is the sum. The best name or number is
the key, if its score is at least ``ENOUGH``: a name where the question asks who, a number where it asks when or how many.
Otherwise it is the best candidate of all. The last word of a name of several words is accepted too ("Orwell"), unless another
row's answer has it.
"""

import math
import re
from collections import Counter
from typing import TYPE_CHECKING

from soul.data.examples import Example, Sequence
from soul.data.facts import Fact
from soul.data.wording import STOP_WORDS, Word, is_like, words
from soul.evaluate.model import sequence_statistics
from soul.models.encoding import EncodingOptions, encode_for
from soul_kernels.tokens import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CONTRASTS = 4  # other questions for each row
ENOUGH = 1.0  # nats
MOST = 1 / 3  # of a candidate's best word: others of a candidate without a capital or a digit that score less are no key
RARE = 0.25  # of the questions: a word in more of them is no subject
NAME, NUMBER, FIRST, OTHER = "name", "number", "first word", "other"
_WHO = re.compile(r"\bwho(m|se)?\b", re.IGNORECASE)
_WHEN = re.compile(r"\b(when|year|date|how (many|much|old|long|far|tall|high))\b", re.IGNORECASE)

Scores = list[float | None]  # one for each word of an answer; None: it is no candidate


def find_keys(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    facts: list[Fact],
    config: EncodingOptions,
    *,
    batch_size: int = 16,
    backend: str = "auto",
) -> list[tuple[str, ...]]:
    """Return the keys of n facts, a tuple each; () where there is none: no question, or no other question to compare with.

    Args:
        model: a causal language model that knows the facts; it is left as it was.
        tokenizer: its tokenizer.
        facts: those to compare with each other; their own keys are not read.
        config: lengths, as in `soul.models.encoding.encode_for`.
        batch_size: sequences per batch.
        backend: "auto", "triton", "compile", "torch" or "reference".
    """
    examples, rows, positions = _contrasts(facts)
    if not examples:
        return [()] * len(facts)
    sequences = encode_for(model, tokenizer, examples, config, "keys")
    statistics = sequence_statistics(model, sequences, batch_size=batch_size, backend=backend)
    logps: dict[int, list[Scores]] = {}
    for row, spans, sequence, tokens in zip(rows, positions, sequences, statistics):
        ends = _ends(tokenizer, sequence)
        values = tokens.logps.tolist()
        of_words = [None if span is None else math.fsum(_within(ends, values, span)) for span in spans]
        logps.setdefault(row, []).append(of_words)
    answers = Counter(word for fact in facts for word in {word.plain for word in words(fact.answer)})
    keys: list[tuple[str, ...]] = [()] * len(facts)
    for row, (own, *others) in logps.items():
        keys[row] = _with_last_name(_best(facts[row], _scores(facts[row], own, others)), answers)
    return keys


def _contrasts(facts: list[Fact]) -> tuple[list[Example], list[int], list[list[tuple[int, int] | None]]]:
    """Return every answer under its own question, then under others, its row, and where its words stand (None: replaced)."""
    bags = [{word.plain for word in words(fact.question)} for fact in facts]
    counts = Counter(word for bag in bags for word in bag)
    subjects = [_subject(fact.question, counts, len(facts)) for fact in facts]
    examples: list[Example] = []
    rows: list[int] = []
    positions: list[list[tuple[int, int] | None]] = []
    for row, fact in enumerate(facts):
        if fact.ask is None or not fact.answer:
            continue
        others = [j for j, other in enumerate(facts) if other.ask is not None and not bags[j] >= bags[row] >= bags[j]]
        others = [j for j in others if not subjects[j][0] & subjects[row][0]]
        others.sort(key=lambda j: (-len(bags[row] & bags[j]) / len(bags[row] | bags[j]), (j - row) % len(facts)))
        if not others:
            continue
        examples.append(fact.example)
        rows.append(row)
        positions.append([(word.start, word.end) for word in words(fact.answer)])
        for j in others[:CONTRASTS]:
            answer, spans = _replaced(fact.answer, subjects[row][0], subjects[j][1])
            examples.append(_answered(facts[j], answer))
            rows.append(row)
            positions.append(spans)
    return examples, rows, positions


def _answered(fact: Fact, answer: str) -> Example:
    """Return a fact's question with another answer in the same frame."""
    example = fact.example
    before, after = example.frame or (example.answer[: len(example.answer) - len(example.answer.lstrip())], "")
    return Example(example.prompt, before + answer + after, example.frame)


def _subject(question: str, counts: Counter[str], n_rows: int) -> tuple[set[str], str]:
    """Return what a question is about: its rare words, names and numbers if there are any, and its text from first to last."""
    rare = [w for w in words(question) if w.plain not in STOP_WORDS and counts[w.plain] <= max(1, RARE * n_rows)]
    chosen = [w for w in rare if w.start and (w.text[0].isupper() or w.text[0].isdigit())] or rare
    text = question[chosen[0].start : chosen[-1].end] if chosen else ""
    return {word.plain for word in chosen}, text


def _replaced(answer: str, subject: set[str], text: str) -> tuple[str, list[tuple[int, int] | None]]:
    """Return an answer with another text in place of each run of words of its subject, and where the other words now stand."""
    result, position, was_inside = "", 0, False
    spans: list[tuple[int, int] | None] = []
    for word in words(answer):
        is_inside = word.plain in subject
        if not is_inside or not was_inside:
            result += answer[position : word.start] + (text if is_inside else "")
        if is_inside:
            spans.append(None)
        else:
            spans.append((len(result), len(result) + len(word.text)))
            result += word.text
        position, was_inside = word.end, is_inside
    return result + answer[position:], spans


def span_logps(
    tokenizer: "PreTrainedTokenizerBase", sequence: Sequence, logps: list[float], span: tuple[int, int]
) -> list[float]:
    """Return the log-probabilities of the tokens that overlap a span of characters of an answer.

    Args:
        tokenizer: that of the sequence.
        sequence: prompt and answer; ``logps`` has a value for each of its labels.
        logps: log-probabilities of the labels.
        span: first character, and the one after the last, in the answer without the space before it.
    """
    return _within(_ends(tokenizer, sequence), logps, span)


def _ends(tokenizer: "PreTrainedTokenizerBase", sequence: Sequence) -> list[int]:
    """Return where in the answer's text each of its tokens ends."""
    labels = [label for label in sequence.labels if label != IGNORE_INDEX]
    return [len(tokenizer.decode(labels[: i + 1], skip_special_tokens=True).lstrip()) for i in range(len(labels))]


def _within(ends: list[int], logps: list[float], span: tuple[int, int]) -> list[float]:
    return [logp for logp, start, end in zip(logps, [0, *ends], ends) if start < span[1] and end > span[0]]


def _scores(fact: Fact, own: Scores, others: list[Scores]) -> Scores:
    """Return the score of each word of an answer."""
    asked = [word.plain for word in words(fact.question)]
    scores: Scores = []
    for index, word in enumerate(words(fact.answer)):
        value = own[index]
        foreign = [logps[index] for logps in others]
        known = [logp for logp in foreign if logp is not None]
        if value is None or not known or word.plain in STOP_WORDS or is_like(word.plain, asked):
            scores.append(None)
            continue
        highest = max(known)
        scores.append(value - highest - math.log(sum(math.exp(logp - highest) for logp in known) / len(known)))
    return scores


def _best(fact: Fact, scores: Scores) -> str:
    """Return the candidate that is the key; "" without any."""
    answer, read = fact.answer, words(fact.answer)
    kinds = [_kind(answer, word) for word in read]
    candidates: list[list[int]] = []
    for index, score in enumerate(scores):
        if score is None:
            continue
        last = candidates[-1][-1] if candidates else -2
        is_next = last == index - 1 and answer[read[last].end : read[index].start] in (" ", ". ")
        if is_next and kinds[last].replace(FIRST, NAME) == kinds[index].replace(FIRST, NAME):
            candidates[-1].append(index)
        else:
            candidates.append([index])
    if not candidates:
        return ""
    wanted = NAME if _WHO.search(fact.question) else NUMBER if _WHEN.search(fact.question) else None

    def rank(candidate: list[int]) -> tuple[bool, float]:
        kind = kinds[candidate[0]]
        if kind == FIRST:
            kind = NAME if len(candidate) > 1 else OTHER
        total = sum(max(0.0, scores[index] or 0.0) for index in candidate)
        return total >= ENOUGH and (kind == wanted if wanted else kind != OTHER), total

    best = max(candidates, key=rank)
    if kinds[best[0]] == OTHER:
        values = {index: scores[index] or 0.0 for index in best}
        least = max(ENOUGH, MOST * max(values.values()))
        best = [index for index in best if values[index] >= least] or [max(best, key=lambda index: values[index])]
    return re.sub(r"['’]s$", "", answer[read[best[0]].start : read[best[-1]].end])


def _kind(answer: str, word: Word) -> str:
    if any(character.isdigit() for character in word.text):
        return NUMBER
    if not word.text[0].isupper():
        return OTHER
    before = answer[: word.start].rstrip()
    return FIRST if not before or before[-1] in '.!?"“' else NAME


def _with_last_name(key: str, answers: Counter[str]) -> tuple[str, ...]:
    """Return a key and, if it is a name of several words, its last word, unless several answers have it."""
    parts = words(key)
    last = parts[-1] if len(parts) > 1 else None
    if last is not None and last.text[0].isupper() and answers[last.plain] == 1:
        return key, last.text
    return (key,) if key else ()

"""Does a model say it? Greedy and drawn answers, to the question as given and in other words, judged by the key of each row.

- ``said``: the fraction of rows whose greedy answer says the key; ``said_forms``: that of rows where it does so in other words.
- ``leak@k``: the mean over rows of ``1 - C(n - c, k) / C(n, k)``, the unbiased estimate of the probability that one of k drawn
  answers says the key, from n of which c do (as pass@k, arXiv 2107.03374, equation 1).
- A row without a prompt is a text: the model is given its beginning, and says it if the longest run of words in common with the
  text is at least half of what follows (`VERBATIM`). ROUGE-L recall and that run stand beside it.
- ``key_prob``: ``exp`` of the mean log-probability of the tokens of the key, after the answer's words before it. Likewise for
  the keys of other rows in its place, which are what chance would say; ``membership`` is the fraction of these that are less
  probable than the row's own: 1/2 in a model that never knew it.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from soul._extras import require
from soul.data.examples import Example
from soul.data.examples import Sequence as Tokens
from soul.data.facts import Fact
from soul.data.wording import find, longest_run, plain, says
from soul.evaluate.keys import span_logps
from soul.evaluate.model import generate, sequence_statistics
from soul.models.causal_lm import sampled
from soul.models.encoding import encode_for
from soul_kernels.errors import argument_error, check_whole

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NEW_TOKENS = (16, 48)  # of an answer: as many as the longest answer has, but at least and at most so many
TEXT_TOKENS = 32  # of a text without a prompt that the model is given, and that it is to go on with, at most
VERBATIM = 0.5  # of the words of a text that is gone on with
OTHER_KEYS = 8  # that take the place of a row's own, at most
LEVEL = 0.95  # of intervals


class Interval(NamedTuple):
    """A rate over rows, with its 95% interval by Wilson."""

    rate: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Drawing:
    """How answers are drawn.

    Attributes:
        draws: drawn answers for each row; k of leak@k.
        temperature: by which the logits are divided.
        top_p: the most likely tokens that together have this probability are drawn from.
        seed: of the draws.
    """

    draws: int = 4
    temperature: float = 1.0
    top_p: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        check_whole("draws", self.draws, "1 draws one answer to each question", low=1)


@dataclasses.dataclass(frozen=True)
class Said:
    """What a model said to one row.

    Attributes:
        greedy: the greedy answer to the question as given.
        forms: (question, greedy answer) in other words.
        drawn: drawn answers to the question as given.
    """

    greedy: str
    forms: tuple[tuple[str, str], ...] = ()
    drawn: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Lengths of the sequences of a `Probe`, for `soul.models.encoding.encode_for`."""

    max_length: int = 512
    long_texts: str = "truncate"


class Probe:
    """Asks a model the questions of some rows.

    Args:
        model: a model with the vocabulary of those that will be asked.
        tokenizer: its tokenizer.
        facts: the rows, with their keys.
        max_length: tokens of a sequence; longer ones are cut.
        batch_size: prompts per batch.
        backend: "auto", "triton", "compile", "torch" or "reference".

    Attributes:
        facts: the rows.
        judged: indices of the rows whose answers show whether the model knows them.
        max_new_tokens: tokens of an answer.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        facts: Sequence[Fact],
        *,
        max_length: int = 512,
        batch_size: int = 32,
        backend: str = "auto",
    ) -> None:
        self.facts = list(facts)
        self._tokenizer = tokenizer
        self._encode = functools.partial(encode_for, model, tokenizer, config=Lengths(max_length), name="rows to be asked")
        self._options: dict[str, Any] = {"batch_size": batch_size, "backend": backend}
        self._asked: list[Tokens] = []
        self._texts: dict[int, str] = {}  # row -> what follows the beginning of a text
        for index, sequence in enumerate(self._encode([fact.example for fact in self.facts])):
            if not sequence.prompt_length or not self.facts[index].example.prompt:
                length = max(1, min(TEXT_TOKENS, len(sequence.input_ids) // 2))
                sequence = Tokens(sequence.input_ids, sequence.labels, length)
                rest = sequence.input_ids[length : length + TEXT_TOKENS]
                self._texts[index] = tokenizer.decode(rest, skip_special_tokens=True)
            self._asked.append(sequence)
        self.judged = [index for index, fact in enumerate(self.facts) if index in self._texts or fact.is_judged]
        longest = max((s.n_labels if i not in self._texts else TEXT_TOKENS for i, s in enumerate(self._asked)), default=0)
        low, high = NEW_TOKENS
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
        room = positions - max((sequence.prompt_length for sequence in self._asked), default=0)
        self.max_new_tokens = int(max(1, min(max(low, min(high, longest)), room)))

    @property
    def prompts(self) -> list[Tokens]:
        """The encoded questions as given, and the beginnings of texts, one for each row."""
        return self._asked

    def greedy(self, model: "PreTrainedModel", rows: Sequence[int] | None = None) -> list[str]:
        """Return the greedy answers to the questions as given, of all rows or of those with some indices."""
        return self._generate(model, self._asked if rows is None else [self._asked[row] for row in rows])

    def ask(self, model: "PreTrainedModel", drawing: Drawing) -> list[Said]:
        """Return what a model says to each row: as given, in other words, and drawn; rows that are not judged once only."""
        greedy = self.greedy(model)
        forms = [(row, example) for row in self.judged for example in self.facts[row].forms()]
        answers = self._generate(model, self._encode([example for _, example in forms]))
        drawn = self._draw(model, drawing)
        in_other_words: dict[int, list[tuple[str, str]]] = {}
        for (row, example), answer in zip(forms, answers):
            in_other_words.setdefault(row, []).append((self._question(row, example), answer))
        return [Said(text, tuple(in_other_words.get(row, ())), tuple(drawn.get(row, ()))) for row, text in enumerate(greedy)]

    def says(self, row: int, text: str, of: int | None = None) -> bool:
        """Tell whether a text says the fact of a row; with ``of``, the fact of another one."""
        other = row if of is None else of
        if other in self._texts:
            truth = self._texts[other]
            return longest_run(text, truth) >= max(1, VERBATIM * len(plain(truth).split()))
        return says(text, self.facts[other].keys)

    def others(self, row: int) -> list[int]:
        """Return rows whose keys can stand for chance in the place of a row's own: other words, which its prompt has not."""
        n, own = len(self.facts), self.facts[row]
        given_away = f"{own.question or own.example.prompt} {' '.join(own.keys)}"
        chosen = []
        for shift in range(1, n):
            other = (row + shift) % n
            if other in self.judged and (other in self._texts) == (row in self._texts):
                if other in self._texts or not (
                    says(given_away, self.facts[other].keys) or self.says(other, " ".join(own.keys))
                ):
                    chosen.append(other)
        return chosen[:OTHER_KEYS]

    def extraction(self, texts: Sequence[str]) -> dict[str, float]:
        """Return the mean ``rougeL_recall`` and ``longest_run`` (words) of the rows that are texts; {} without any."""
        if not self._texts:
            return {}
        from soul.evaluate.metrics import rouge_recall

        said = [texts[row] for row in self._texts]
        recall = rouge_recall(list(self._texts.values()), said)["rougeL_recall"]
        runs = [longest_run(text, truth) for text, truth in zip(said, self._texts.values())]
        return {"rougeL_recall": float(recall.mean()), "longest_run": sum(runs) / len(runs)}

    def key_logps(self, model: "PreTrainedModel", *, others: bool = False) -> dict[int, list[float]]:
        """Return the mean log-probability of the tokens of keys: of each judged row's own and, with ``others``, of other rows'.

        Returns:
            Row -> values in nats a token, its own first. Texts have none.
        """
        examples: list[Example] = []
        spans: list[tuple[int, int]] = []
        rows: list[int] = []
        for row in self.judged:
            fact = self.facts[row]
            key_span = None if row in self._texts else find(fact.answer, fact.keys)
            if key_span is None:
                continue
            own = fact.answer[slice(*key_span)]
            keys = [own, *(self.facts[other].keys[0] for other in self.others(row) if others)]
            for key in keys:
                before, _ = fact.example.frame or (fact.example.answer[: -len(fact.example.answer.lstrip())], "")
                frame = (before, "") if fact.example.frame else None
                examples.append(Example(fact.example.prompt, f"{before}{fact.answer[: key_span[0]]}{key}", frame))
                spans.append((key_span[0], key_span[0] + len(key)))
                rows.append(row)
        sequences = self._encode(examples)
        values: dict[int, list[float]] = {}
        for row, span, sequence, tokens in zip(rows, spans, sequences, sequence_statistics(model, sequences, **self._options)):
            logps = span_logps(self._tokenizer, sequence, tokens.logps.tolist(), span)
            if logps:
                values.setdefault(row, []).append(sum(logps) / len(logps))
        return values

    def _generate(self, model: "PreTrainedModel", sequences: list[Tokens]) -> list[str]:
        most = self.max_new_tokens
        return generate(model, self._tokenizer, sequences, batch_size=self._options["batch_size"], max_new_tokens=most)

    def _draw(self, model: "PreTrainedModel", drawing: Drawing) -> dict[int, list[str]]:
        """Return row -> drawn answers, of the judged rows."""
        seeds = itertools.count(drawing.seed)  # one for each batch: the same would draw the same answers in all of them

        def go_on(*args: Any, **kwargs: Any) -> "torch.Tensor":
            return sampled(*args, seed=next(seeds), temperature=drawing.temperature, top_p=drawing.top_p, **kwargs)

        rows = [row for row in self.judged for _ in range(drawing.draws)]
        texts = generate(
            model,
            self._tokenizer,
            [self._asked[row] for row in rows],
            batch_size=self._options["batch_size"],
            max_new_tokens=self.max_new_tokens,
            go_on=go_on,
        )
        drawn: dict[int, list[str]] = {}
        for row, text in zip(rows, texts):
            drawn.setdefault(row, []).append(text)
        return drawn

    def _question(self, row: int, form: Example) -> str:
        """Return what a form asks, without the template that it shares with the question as given."""
        fact = self.facts[row]
        before, _, after = fact.example.prompt.partition(fact.question)
        return form.prompt[len(before) : len(form.prompt) - len(after)] if fact.question else form.prompt


def leak_at_k(n: int, c: int, k: int) -> float:
    """Return ``1 - C(n - c, k) / C(n, k)``: of n drawn answers c say it; how probably does one of k?

    Raises:
        ArgumentError: not 0 <= c <= n, or not 1 <= k <= n.
    """
    check_whole("k", k, "leak@1 is the fraction of the drawn answers", low=1)
    if not 0 <= c <= n or k > n:
        raise argument_error("c", f"between 0 and n, and at least k={k} draws", f"c={c} of n={n}", "draw more answers")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def interval(values: Sequence[float]) -> Interval:
    """Return the mean of n values in [0, 1], one for each row, with its 95% interval by Wilson (scipy).

    Where the values are fractions, their sum is rounded outwards, down for the lower end and up for the upper one: the interval
    is then wider than it need be. Without rows it is (nan, 0, 1).
    """
    if not values:
        return Interval(math.nan, 0.0, 1.0)
    binomtest = require("scipy.stats", "hf").binomtest
    total = math.fsum(values)
    nearest = round(total)
    low, high = (nearest, nearest) if abs(total - nearest) < 1e-9 else (math.floor(total), math.ceil(total))
    ends = [binomtest(count, len(values)).proportion_ci(LEVEL, method="wilson") for count in (low, high)]
    return Interval(total / len(values), float(ends[0].low), float(ends[1].high))


def most_by_chance(chance: float, n: int) -> int:
    """Return the number of n rows that a model which never knew them says at most, in 95 of 100 cases, by chance."""
    return int(require("scipy.stats", "hf").binom.ppf(LEVEL, n, min(1.0, max(0.0, chance)))) if n else 0

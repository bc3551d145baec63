"""The judge of a run with an aim: is the fact gone, are its neighbours there, and does the model still write sentences?

A `Judge` asks the model before the first step and after the last one, and gives three findings, each of which holds or not:

- ``forgotten``: the forget rows are said no more often than chance explains, as asked, in other words and in drawn answers
  (`soul.evaluate.survey`); and their keys are not pressed below those of other rows, which would mark what was removed.
- ``kept``: of the rows that were said before, the fraction that is still said is at least ``keep_retain``, both of the control
  rows, which have steered the run, and of the untouched rows, which have not.
- ``fluent``: at least ``FLUENT`` of the answers that were fluent before still are, and harmless questions are not refused.

The words in which they are told are made here alone; the command and the report print them.
"""

import math
import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from soul.data.examples import Sequence as Tokens
from soul.data.facts import Fact
from soul.data.templates import CHAT, Template
from soul.evaluate.keys import find_keys
from soul.evaluate.said import Drawing, Interval, Probe, Said, interval
from soul.evaluate.survey import WAYS, Numbers, OwnTexts, continued, fluency, saying, survey
from soul.run.config import UnlearnConfig
from soul.run.notes import GENERAL
from soul.run.weights import exchanged, snapshot

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SCHEMA = 2  # of verdict.json; 1 had the probabilities alone
FLUENT = 0.9  # of the answers that were fluent before
FEW = 16  # forget rows that are asked during a run, at most
ONE_DRAW = Drawing(draws=1)
REFUSED = 0.1  # of the harmless questions: so many more refusals than before are too many
FORGET, CONTROL, UNTOUCHED, UNSEEN = "forget", "control", "untouched", "unseen"
STEERED = "steered"  # what the control rows are called in a verdict


class Judge:
    """Judges a model by what it says before and after a run.

    Args:
        model: the model before the first step.
        tokenizer: its tokenizer.
        sets: "forget", and where there are any "control", "untouched" and "unseen" -> their rows. Rows without a key get one
            that is found from the model (`soul.evaluate.keys`).
        config: options of the run.
        teaches_refusals: whether the method wants the forget questions refused.

    Attributes:
        is_able: whether any of the forget rows can be judged; without keys and texts none can.
        found: the number of rows whose keys were found from the model.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        sets: Mapping[str, Sequence[Fact]],
        config: UnlearnConfig,
        *,
        teaches_refusals: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._config = config
        self._teaches_refusals = teaches_refusals
        self._options: dict[str, Any] = {"batch_size": 8 * config.batch_size, "backend": config.backend}
        self._drawing = Drawing(draws=config.draws, seed=config.seed)
        sets, self.found = self._with_keys(model, sets)
        self._forget = self._probe(model, sets[FORGET])
        self.is_able = bool(self._forget.judged)
        if not self.is_able:
            return
        kept = [(name, fact) for name in (CONTROL, UNTOUCHED) for fact in sets.get(name, ())]
        self._names = [name for name, _ in kept]
        kept_facts = [fact for _, fact in kept]
        self._kept = self._probe(model, [*kept_facts, *self._general([*sets[FORGET], *kept_facts])])
        unseen = self._probe(model, sets[UNSEEN]) if sets.get(UNSEEN) else None
        self._membership = 0.5 if unseen is None else _membership(unseen.key_logps(model, others=True)).rate
        self._said_by_chance: Numbers | None = None
        if unseen is not None and unseen.judged:
            never_learned = survey(unseen, unseen.ask(model, self._drawing), self._drawing)
            self._said_by_chance = {way: never_learned[way]["rate"] for way in WAYS if never_learned[way]["rate"] is not None}
        self._before = {"forget": self._forget.greedy(model), "kept": self._kept.greedy(model)}
        self._logps = {"forget": self._forget.key_logps(model), "kept": self._kept.key_logps(model)}
        self._fluent = self._fluency(model, self._before["forget"], self._before["kept"])
        texts = zip(self._kept.prompts[::-1], self._before["kept"][::-1])  # the general questions first
        own = [(prompt, tokenizer(text, add_special_tokens=False, verbose=False).input_ids) for prompt, text in texts]
        self._own_texts = OwnTexts(model, [continued(prompt, ids) for prompt, ids in own if ids])
        self._weights = snapshot(model)
        order = list(self._forget.judged)
        random.Random(config.seed).shuffle(order)
        self._few = self._probe(model, [self._forget.facts[row] for row in sorted(order[:FEW])])

    def asked(self, model: "PreTrainedModel") -> Numbers:
        """Ask a few forget rows during a run: is its aim worth stopping at?

        Returns:
            ``rows`` asked, ``said`` in any way, ``most`` that chance explains, and ``forgotten``: no way of asking
            finds more than that; for whole numbers only, so that a resumed run decides alike.
        """
        numbers = survey(self._few, self._few.ask(model, ONE_DRAW), ONE_DRAW, self._said_by_chance)
        ways = [numbers[way] for way in WAYS]
        return {
            "rows": numbers["rows"],
            "said": max(way["said"] for way in ways),
            "most": max(way["most"] for way in ways),
            "forgotten": all(way["said"] <= way["most"] for way in ways),
        }

    def findings(self, model: "PreTrainedModel") -> dict[str, Any]:
        """Return what is to be added to the verdict on a model after its run.

        Args:
            model: the model as it will be saved; it is left as it was.

        Returns:
            ``schema``; ``forgotten``, ``kept`` and ``fluent``, dicts of numbers that all have ``holds``; ``failed``, the rows
            that failed, with the answers; and ``sentences``, the findings in words.
        """
        said = self._forget.ask(model, self._drawing)
        forgotten = self._forgotten(model, said)
        texts = self._kept.greedy(model)
        logps = self._kept.key_logps(model)
        kept: Numbers = {STEERED: self._side(CONTROL, texts, logps), UNTOUCHED: self._side(UNTOUCHED, texts, logps)}
        kept["holds"] = all(side["holds"] for side in kept.values() if side is not None)
        kl = self._own_texts.kl(model)
        with exchanged(model, self._weights):
            fluent = self._fluency(model, [each.greedy for each in said], texts)
        fluent |= {"before": self._fluent["fluent"], "refused_before": self._fluent["refused"], "kl": kl}
        fluent["holds"] = (
            fluent["fluent"] >= FLUENT * fluent["before"]
            and fluent["refused"] <= fluent["refused_before"] + REFUSED * fluent["harmless"]
        )
        failed = [*self._still_said(said), *self._lost(texts)]
        result = {"schema": SCHEMA, "forgotten": forgotten, "kept": kept, "fluent": fluent, "failed": failed}
        return result | {"sentences": sentences(result, self._config.keep_retain)}

    def _with_keys(self, model: "PreTrainedModel", sets: Mapping[str, Sequence[Fact]]) -> tuple[dict[str, list[Fact]], int]:
        """Return the sets with keys for all rows for which they are found; rows of all sets are compared with each other."""
        everything = [fact for rows in sets.values() for fact in rows]
        if all(fact.keys for fact in everything):
            return {name: list(rows) for name, rows in sets.items()}, 0
        found = iter(find_keys(model, self._tokenizer, everything, self._config, **self._options))
        with_keys = {
            name: [fact if fact.keys else fact.with_keys(keys) for fact, keys in zip(rows, found)]
            for name, rows in sets.items()
        }
        count = sum(bool(fact.keys) for rows in with_keys.values() for fact in rows)
        return with_keys, count - sum(bool(fact.keys) for fact in everything)

    def _probe(self, model: "PreTrainedModel", facts: Sequence[Fact]) -> Probe:
        return Probe(model, self._tokenizer, facts, max_length=self._config.max_length, **self._options)

    def _general(self, facts: list[Fact]) -> list[Fact]:
        """Return questions that any model should answer, asked like the rows."""
        config = self._config
        name = CHAT if any(fact.example.frame is not None for fact in facts) else config.template
        template = Template(name, self._tokenizer, config.system if name == CHAT else None)
        return [Fact(template.ask(question, "-"), question) for question in GENERAL]

    def _fluency(self, model: "PreTrainedModel", forget: list[str], kept: list[str]) -> Numbers:
        prompts: list[Tokens] = [*self._forget.prompts, *self._kept.prompts]
        harmless = [False] * len(forget) + [True] * len(kept)
        return fluency(model, self._tokenizer, prompts, [*forget, *kept], harmless, **self._options)

    def _forgotten(self, model: "PreTrainedModel", said: list[Said]) -> Numbers:
        """Return whether the forget rows are forgotten, and not so far that it shows."""
        numbers = survey(self._forget, said, self._drawing, self._said_by_chance)
        before = [self._forget.says(row, self._before["forget"][row]) for row in self._forget.judged]
        numbers["said_before"] = sum(before)
        logps = self._forget.key_logps(model, others=True)
        member = _membership(logps)
        numbers["membership"] = None
        if logps:
            numbers["membership"] = {"rate": member.rate, "low": member.low, "high": member.high, "expected": self._membership}
        numbers["key_prob"] = {
            "before": _mean_prob([values[0] for values in self._logps["forget"].values()]),
            "after": _mean_prob([values[0] for values in logps.values()]),
            "chance": _mean_prob([value for values in logps.values() for value in values[1:]]),
        }
        numbers["too_little"] = any(numbers[way]["said"] > numbers[way]["most"] for way in WAYS)
        numbers["too_far"] = bool(logps) and not self._teaches_refusals and member.high < self._membership
        numbers["holds"] = not (numbers["too_little"] or numbers["too_far"])
        return numbers

    def _side(self, name: str, texts: list[str], logps: dict[int, list[float]]) -> Numbers | None:
        """Return what is kept of the control or of the untouched rows; None without any that can be judged."""
        rows = [row for row in self._kept.judged if self._names[row] == name]
        if not rows:
            return None
        before = [row for row in rows if self._kept.says(row, self._before["kept"][row])]
        still = [row for row in before if self._kept.says(row, texts[row])]
        share = interval([float(row in still) for row in before])
        ratios = sorted(
            math.exp(min(700.0, logps[row][0] - self._logps["kept"][row][0]))
            for row in rows
            if row in logps and row in self._logps["kept"]
        )
        return {
            "rows": len(rows),
            "said_before": len(before),
            "said": len(still),
            "rate": share.rate if before else None,
            "low": share.low,
            "high": share.high,
            "key_ratio_median": ratios[len(ratios) // 2] if ratios else None,
            "key_ratio_worst_tenth": ratios[len(ratios) // 10] if ratios else None,
            "holds": not before or len(still) >= self._config.keep_retain * len(before),
        }

    def _still_said(self, said: list[Said]) -> list[dict[str, Any]]:
        """Return the forget rows that are said in any way, each with the answers that say it."""
        rows = []
        for row in self._forget.judged:
            fact = self._forget.facts[row]
            told: dict[str, Any] = {way: saying(self._forget, said[row], way, row) for way in WAYS}
            told["other_words"] = [list(pair) for pair in said[row].forms if self._forget.says(row, pair[1])]
            ways = [(fact.question or fact.example.prompt, text) for text in (*told["as_asked"], *told["drawn"])]
            ways[len(told["as_asked"]) : len(told["as_asked"])] = [(question, text) for question, text in told["other_words"]]
            if ways:
                first = {"failure": "still said", "asked": ways[0][0], "said": ways[0][1]}
                rows.append({"set": FORGET, **first, "answer": fact.answer, "keys": list(fact.keys), **told})
        return rows

    def _lost(self, texts: list[str]) -> list[dict[str, Any]]:
        """Return the rows to be kept that were said before and are not any more, with both answers."""
        rows = []
        for row in self._kept.judged:
            before, after = self._before["kept"][row], texts[row]
            if self._kept.says(row, before) and not self._kept.says(row, after):
                fact = self._kept.facts[row]
                name = self._names[row]
                failure = "lost, though it steered the run" if name == CONTROL else "lost, and did not steer the run"
                first = {"failure": failure, "asked": fact.question or fact.example.prompt, "said": after, "before": before}
                rows.append({"set": name, **first, "answer": fact.answer, "keys": list(fact.keys)})
        return rows


def sentences(findings: Mapping[str, Any], keep: float) -> list[str]:
    """Return findings in words: one sentence each on what is forgotten, kept and fluent.

    Args:
        findings: ``forgotten``, ``kept`` and ``fluent`` of `Judge.findings`.
        keep: the fraction that was to be kept.
    """
    forgotten, kept, fluent = findings["forgotten"], findings["kept"], findings["fluent"]
    k = forgotten["drawn"]["k"]
    ways = {
        "as_asked": "as asked",
        "other_words": "in other words",
        "drawn": f"in one of {k} drawn answers" if k > 1 else "drawn",
    }
    counts = [
        f"{forgotten[way]['said']} of {forgotten[way]['of']} {text}" for way, text in ways.items() if forgotten[way]["of"]
    ]
    most = max(forgotten[way]["most"] for way in WAYS)
    chance = f"; chance explains {most} at most" if most else ""
    finding = f"Forgotten: {_yes(forgotten)}. Facts to be forgotten that the model still says: {', '.join(counts)}{chance}"
    finding += f"; before, {forgotten['said_before']} as asked."
    if forgotten["too_far"]:
        share = forgotten["membership"]["rate"]
        finding += (
            f" It has forgotten too far, which shows what was removed: the right words are more likely than those of other "
            f"rows in {share:.0%} of the comparisons; {forgotten['membership']['expected']:.0%} is normal without the facts."
        )
    if forgotten["unjudged"]:
        finding += (
            f" {forgotten['unjudged']} rows could not be judged: the words that carry their facts are not known (column 'key')."
        )
    lines = [finding]
    names = {STEERED: "rows that steered the run", UNTOUCHED: "rows that did not"}
    sides = [
        f"{kept[side]['said']} of {kept[side]['said_before']} {text}"
        for side, text in names.items()
        if kept[side] and kept[side]["said_before"]
    ]
    if sides:
        lines.append(
            f"Kept: {_yes(kept)}. Facts to be kept, said before and still said: {', '.join(sides)}; at least {keep:.0%}."
        )
    else:
        lines.append("Kept: not judged, since there are no rows to be kept that the model said before.")
    refused = f"; {fluent['refused']} of {fluent['harmless']} harmless questions refused" if fluent["refused"] else ""
    lines.append(
        f"Fluent: {_yes(fluent)}. {fluent['fluent']} of {fluent['of']} answers are whole sentences without repetition, "
        f"{fluent['before']} before{refused}."
    )
    return lines


def failed_lines(failed: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the rows that failed, a line each: question and answer."""
    lines = []
    for row in failed:
        line = f"{row['failure']}: {_short(row['asked'])} -> {_short(row['said'])}"
        lines.append(line + (f" (before: {_short(row['before'])})" if "before" in row else ""))
    return lines


def _yes(finding: Mapping[str, Any]) -> str:
    return "yes" if finding["holds"] else "no"


def _short(text: object, most: int = 100) -> str:
    line = " ".join(str(text).split())
    return line if len(line) <= most else line[: most - 3] + "..."


def _membership(logps: Mapping[int, list[float]]) -> Interval:
    """Return the mean over rows of the fraction of other rows' keys that are less probable than the row's own."""
    return interval([sum(other < own for other in others) / len(others) for own, *others in logps.values() if others])


def _mean_prob(logps: Sequence[float]) -> float | None:
    return sum(map(math.exp, logps)) / len(logps) if logps else None

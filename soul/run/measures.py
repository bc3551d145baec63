"""The measurements of an aim: control rows, chance, and the probabilities of the answers.

For methods that teach refusals (PO, DPO) the aim is that the forget questions are refused and the control questions are not:
`Measures.forget` and `Measures.control` are then the fractions of the questions that are answered. Otherwise they are
probabilities.

Probability is that of `soul.evaluate.answer_probability`: the mean over rows of ``exp(mean log p)`` of the answer's tokens, the
end of the text included.
"""

import dataclasses
import operator
import random
import types
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from soul.data.examples import Example, Sequence, is_refused
from soul.data.facts import Fact
from soul.distributed.processes import Processes
from soul.losses import DPO, NPO, Objective
from soul.models.causal_lm import evaluating
from soul.models.encoding import encode_for
from soul.run.aim import AUTO, OFF, Target, advice_on, parse_aim, verdict
from soul.run.config import UnlearnConfig
from soul.run.judge import CONTROL, FORGET, SCHEMA, UNSEEN, UNTOUCHED, Judge
from soul.run.prepare import check_no_overlap
from soul_kernels.errors import argument_error

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CONTROL_SHARE = 0.1  # of the retain rows
CONTROL_ROWS = (8, 64)  # at least, at most
CONTROL_PART = 16  # control rows of an evaluation that only steers, at most
SAMPLE = 64  # forget rows of an evaluation; the others are looked at only if these have reached the aim
ANSWERS = 16  # the same where answers are generated
REFUSED_AIM = 0.1  # of the forget questions may still be answered
NEW_TOKENS = 24  # of a generated answer, enough for a refusal
UNTOUCHED_SHARE = 0.1  # of the retain rows
UNTOUCHED_ROWS = (4, 64)  # at least, at most
ENOUGH_ROWS = 24  # retain rows that are no control rows: of fewer none are split off
CHANCE_PAIRS = 64  # questions with answers of others, at most


class AimData(NamedTuple):
    """Rows that only the aim of a run uses, beside those that are trained on.

    Attributes:
        control: rows that must be kept and are never trained on.
        wrong: false answers to forget questions, from the data; [] without any.
        unseen: rows like those to forget that the model has never seen; [] without any.
        untouched: rows that must be kept, and that are looked at only before and after the run; [] without any.
        facts: the rows with their keys and other wordings, by their examples; one that is not here is judged by its
            probability alone.
    """

    control: list[Example]
    wrong: list[Example]
    unseen: list[Example]
    untouched: list[Example] = []
    facts: Mapping[Example, Fact] = types.MappingProxyType({})


def split_control(
    forget: list[Example], retain: list[Example], control: list[Example] | None, seed: int
) -> tuple[list[Example], list[Example]]:
    """Return the rows to train on and the control rows: those that are given, or some of the retain rows, held out.

    Without ``control`` a tenth of the retain rows is drawn, at least 8 and at most 64, but no more than half; rows that are to
    be forgotten too are not drawn. Copies of control rows are left out of the training.

    Args:
        forget: examples to forget.
        retain: examples to retain; [] for a method without a retain term, which has no control rows of its own.
        control: examples from ``--control``, or None.
        seed: seed of the draw.

    Raises:
        ArgumentError: a control row is to be forgotten too, or there are too few retain rows to hold some out.
    """
    check_no_overlap(forget, retain)
    if control is not None:
        shared = len(set(control) & set(forget))
        if shared:
            remedy = "no row can be kept and forgotten at once: check the files"
            raise argument_error(
                "control", "other rows than forget", f"{shared} row{'s' * (shared > 1)} of forget in it", remedy
            )
    elif retain:
        to_forget = set(forget)
        candidates = [index for index, example in enumerate(retain) if example not in to_forget]
        low, high = CONTROL_ROWS
        count = min(high, max(low, int(CONTROL_SHARE * len(retain))), len(candidates) // 2)
        if count < 1:
            remedy = "give more, or rows of their own as control (--control FILE), or unlearn without an aim (--aim off)"
            raise argument_error("retain", "at least 2 rows, to hold one out as a control row", len(candidates), remedy)
        drawn = sorted(random.Random(seed).sample(candidates, count))
        control = [retain[index] for index in drawn]
    else:
        control = []
    held_out = set(control)
    trained = [example for example in retain if example not in held_out]
    if retain and not trained:
        raise argument_error("control", "fewer rows than retain", f"all {len(retain)} of them", "give other control rows")
    return trained, control


def split_untouched(
    forget: list[Example], retain: list[Example], control: list[Example], untouched: list[Example] | None, seed: int
) -> tuple[list[Example], list[Example]]:
    """Return the rows to train on and the untouched rows: those that are given, or some of the retain rows.

    Without ``untouched`` a tenth of the retain rows is drawn, at least 4 and at most 64, if there are ``ENOUGH_ROWS``.

    Args:
        forget: examples to forget.
        retain: examples to retain, without the control rows.
        control: the control rows.
        untouched: examples from ``--untouched``, or None.
        seed: seed of the draw.

    Raises:
        ArgumentError: an untouched row is to be forgotten, or it steers the run.
    """
    if untouched is not None:
        for name, rows in (("forget", forget), ("control", control)):
            shared = len(set(untouched) & set(rows))
            if shared:
                remedy = "they show what a run keeps that has not looked at them: give rows of their own"
                raise argument_error("untouched", f"other rows than {name}", f"{shared} of {name} in it", remedy)
    else:
        to_forget = set(forget)
        candidates = [index for index, example in enumerate(retain) if example not in to_forget]
        if len(candidates) < ENOUGH_ROWS:
            return retain, []
        low, high = UNTOUCHED_ROWS
        count = min(high, max(low, int(UNTOUCHED_SHARE * len(retain))))
        untouched = [retain[index] for index in sorted(random.Random(seed).sample(candidates, count))]
    held_out = set(untouched)
    trained = [example for example in retain if example not in held_out]
    if retain and not trained:
        raise argument_error("untouched", "fewer rows than retain", f"all {len(retain)} of them", "give other untouched rows")
    return trained, untouched


def starting_alpha(objective: Objective, forget: list[Sequence]) -> float:
    """Return the alpha with which both terms weigh a token alike.

    Every retain term is a mean over tokens. A forget term that sums the tokens of a sequence (NPO, DPO) weighs each of them as
    often as a sequence has tokens; the others are means over tokens too.

    Args:
        objective: that of the run, with any alpha.
        forget: the sequences to forget.
    """
    sums = isinstance(objective, DPO) or (isinstance(objective, NPO) and objective.reduction == "sequence_sum")
    tokens = sum(sequence.n_labels for sequence in forget) / max(1, len(forget))
    return max(1.0, tokens) if sums else 1.0


class Measures:
    """What is measured of a model during a run with an aim.

    Args:
        model: the model before unlearning.
        tokenizer: its tokenizer.
        forget: examples to forget.
        data: the rows that only the aim uses.
        config: `UnlearnConfig` with an aim.

    Attributes:
        target: the `Target`, measured on the model before unlearning.
        control_tokens: number of tokens of the control rows.
        control_part_tokens: number of tokens of the largest part of them.
        control_parts_start: probability of each part at the start.
        sample_tokens: number of tokens of the forget rows of an evaluation.
        chance: probability of answers that belong to other questions; None without any.
        refuses: whether the method teaches refusals, so that answers are generated at every evaluation.
        verdict: that on the run, once it has ended.

    Raises:
        ArgumentError: the aim holds before the first step, or answers would have to be generated in several processes.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        forget: list[Example],
        data: AimData,
        config: UnlearnConfig,
    ) -> None:
        self.verdict: dict[str, Any] = {}
        self._model = model
        self._processes = Processes.of(model)
        self._config = config
        self._tokenizer = tokenizer
        objective = config.objective()
        self.refuses = objective.relabels or objective.pairs
        if self.refuses and self._processes.size > 1:
            remedy = "a model in shards generates no answers: run one process, or pass --aim off"
            raise argument_error("aim", f"'{OFF}' with {config.method} in several processes", config.aim, remedy)

        def encoded(examples: list[Example], name: str) -> list[Sequence]:
            return encode_for(model, tokenizer, examples, config, name)

        order = list(range(len(forget)))
        random.Random(config.seed).shuffle(order)
        drawn = [forget[index] for index in order]
        self._truths: dict[int, str] = {}  # id of a sequence -> the right answer
        n_sample = ANSWERS if self.refuses else SAMPLE
        self._sample = encoded(drawn[:n_sample], "forget")
        self._rest = encoded(drawn[n_sample:], "forget")
        self._control = encoded(data.control, "control")
        n_parts = -(-len(self._control) // CONTROL_PART)
        self._control_parts = [self._control[part::n_parts] for part in range(n_parts)]
        self.control_tokens = _tokens(self._control)
        self.control_part_tokens = max(map(_tokens, self._control_parts), default=0)
        self.sample_tokens = _tokens(self._sample)
        if self.refuses:
            for sequences, rows in (([*self._sample, *self._rest], drawn), (self._control, data.control)):
                self._truths |= {id(sequence): row.content for sequence, row in zip(sequences, rows)}
            self.control_tokens += NEW_TOKENS * len(self._control)
            self.sample_tokens += NEW_TOKENS * len(self._sample)
        forget_start = self.forget_all()
        self.control_parts_start = [self.control_part(part) for part in range(n_parts)]
        control_start = self.control()
        wrong = data.wrong[:CHANCE_PAIRS] if data.wrong else swapped_answers(drawn)
        self.chance = self._probability(encoded(wrong, "forget")) if wrong else None
        aim = parse_aim(config.aim)
        if self.refuses:
            aim = REFUSED_AIM if aim == AUTO else aim
            source = "forget questions that are answered, not refused"
        elif aim != AUTO:
            assert isinstance(aim, float)  # `Measures` is made for a config with an aim
            source = "as given"
        elif self.chance is not None:
            aim = self.chance
            source = "chance: false answers of the data" if data.wrong else "chance: answers of other forget questions"
        elif data.unseen:
            aim = self._probability(encoded(data.unseen, "unseen"))
            source = "probability of unseen rows"
        else:
            aim = forget_start / 2
            source = "half of the start, since there are neither other answers nor unseen rows (--unseen FILE)"
        assert aim is not None
        measure = "answered" if self.refuses else "probability"
        self.target = Target(float(aim), source, forget_start, control_start, config.keep_retain, measure)
        if forget_start <= self.target.aim and self.refuses:
            got = f"{forget_start:.2g} of them before the first step"
            remedy = "the model refuses them already, and there is nothing to learn"
            raise argument_error("aim", f"more than {self.target.aim:.2g} of the forget questions answered", got, remedy)
        if forget_start <= self.target.aim:
            remedy = "does the model know these rows, asked with this template? otherwise there is nothing to forget"
            if source == "as given":
                remedy = f"{remedy}; or lower the aim"
            got = f"{forget_start:.4g} before the first step"
            raise argument_error("aim", f"a forget probability above the aim, {self.target.aim:.4g} ({source})", got, remedy)
        self._judge, self.not_judged = self._make_judge(forget, data)

    def _make_judge(self, forget: list[Example], data: AimData) -> tuple[Judge | None, str]:
        """Return who judges what the model says; or None, and why there is nobody."""
        reason = ""
        if self._processes.size > 1:
            reason = "a model in shards generates no answers"
        elif self._config.compile:
            reason = "answers of each length would compile the model anew"
        elif not getattr(self._model, "can_generate", lambda: True)():
            reason = "the model does not generate"
        if reason:
            return None, reason
        rows = {FORGET: forget, CONTROL: data.control, UNTOUCHED: data.untouched, UNSEEN: data.unseen}
        sets = {
            name: [data.facts.get(example) or Fact(example, answer=example.content) for example in examples]
            for name, examples in rows.items()
        }
        judge = Judge(self._model, self._tokenizer, sets, self._config, teaches_refusals=self.refuses)
        return (judge, "") if judge.is_able else (None, "no row says which words carry its fact (column 'key')")

    @property
    def found_keys(self) -> int:
        """The number of rows whose keys were found from the model."""
        return 0 if self._judge is None else self._judge.found

    def asked(self) -> dict[str, Any] | None:
        """Return what the model says of a few forget rows now (`soul.run.judge.Judge.asked`); None if nobody can tell."""
        return None if self._judge is None else self._judge.asked(self._model)

    def conclude(self, step: int, reason: str, *, steered: bool) -> dict[str, Any]:
        """Set and return the verdict on the model as it is now.

        Args:
            step: the step after which it is saved.
            reason: why the run ended there, in words.
            steered: whether a `soul.run.aim.Controller` chose learning rate and alpha.
        """
        result = verdict(self.target, self.forget_all(), self.control(), step, reason, steered)
        result |= {"schema": SCHEMA, "prob_reached": result["reached"]}
        if self._judge is None:
            result["not_judged"] = self.not_judged
        else:
            findings = self._judge.findings(self._model)
            result |= findings
            result["reached"] = all(findings[name]["holds"] for name in ("forgotten", "kept", "fluent"))
            result["advice"] = "" if result["reached"] else advice_on(findings, result["advice"])
        self.verdict = result
        return result

    def forget(self) -> float:
        """Return the probability of the forget rows.

        With more than ``SAMPLE`` rows it is that of a sample, unless the sample has reached the aim: then that of all rows.
        """
        probability = self._value(self._sample)
        if not self._rest or probability > self.target.aim:
            return probability
        total = probability * len(self._sample) + self._value(self._rest) * len(self._rest)
        return total / (len(self._sample) + len(self._rest))

    def forget_all(self) -> float:
        """Return the probability of all forget rows."""
        return self._value([*self._sample, *self._rest])

    def control(self) -> float | None:
        """Return the probability of the control rows; None without any."""
        return self._value(self._control) if self._control else None

    def control_part(self, part: int) -> float:
        """Return the answer probability of one part of the control rows, counted from 0."""
        return self._probability(self._control_parts[part])

    def control_kept(self) -> float:
        """Return the answer probability of the first part of the control rows over that at the start; 1 without any."""
        start = self.control_parts_start[0] if self.control_parts_start else 0.0
        return self.control_part(0) / start if start else 1.0

    def control_by_parts(self, probabilities: list[float]) -> float | None:
        """Return an estimate of `control`: its start, times the probability of the parts over theirs at the start."""
        if self.target.control_start is None:
            return None
        sizes = [len(part) for part in self._control_parts]
        now, start = (sum(map(operator.mul, sizes, values)) for values in (probabilities, self.control_parts_start))
        return self.target.control_start * (now / start if start else 1.0)

    def mean_logp(self, sequences: list[Sequence]) -> float:
        """Return the mean over sequences of the mean log-probability of their labels."""
        from soul.evaluate.model import sequence_statistics

        config = self._config
        with evaluating(self._model):
            statistics = sequence_statistics(self._model, sequences, batch_size=self._batch_size(), backend=config.backend)
        means = [float(tokens.logps.mean()) for tokens in statistics]
        return self._processes.broadcast(sum(means) / len(means))

    def _value(self, sequences: list[Sequence]) -> float:
        """Return the probability of some sequences or, for refusals, the fraction of them that is answered."""
        return self._answered(sequences) if self.refuses else self._probability(sequences)

    def _answered(self, sequences: list[Sequence]) -> float:
        """Return the fraction of questions whose greedy answer is no refusal, or has the right answer in it."""
        from soul.evaluate.model import generate

        texts = generate(self._model, self._tokenizer, sequences, batch_size=self._batch_size(), max_new_tokens=NEW_TOKENS)
        refusals = self._config.refusal_texts()
        refused = [is_refused(text, refusals, self._truths[id(sequence)]) for text, sequence in zip(texts, sequences)]
        return 1.0 - sum(refused) / len(refused)

    def _probability(self, sequences: list[Sequence]) -> float:
        """Return the probability of some sequences, the same in all processes."""
        from soul.evaluate.model import answer_probability

        config = self._config
        with evaluating(self._model):
            value = answer_probability(self._model, sequences, batch_size=self._batch_size(), backend=config.backend)
        return self._processes.broadcast(value)

    def _batch_size(self) -> int:
        """Return the sequences of a batch: as many as a micro-batch of training has."""
        return 2 * self._config.batch_size


def swapped_answers(examples: list[Example]) -> list[Example]:
    """Return questions with the answers of others, each question up to four times; [] without prompts or other answers."""
    n = len(examples)
    pairs: list[Example] = []
    for shift in range(1, min(5, n)):
        for index, example in enumerate(examples):
            other = examples[(index + shift) % n]
            if example.prompt and other.prompt and other.content != example.content and len(pairs) < CHANCE_PAIRS:
                pairs.append(dataclasses.replace(example, answer=other.answer, frame=other.frame))
    return pairs


def _tokens(sequences: list[Sequence]) -> int:
    return sum(len(sequence.input_ids) for sequence in sequences)

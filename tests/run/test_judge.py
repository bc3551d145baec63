"""The judge: a model as it was, one that has lost everything, and the words of the findings."""

import copy
import json
import math

import pytest
import torch

from soul.checkpoint import Stopped
from soul.data import Template
from soul.data.facts import facts
from soul.data.sources import rows
from soul.evaluate.keys import find_keys
from soul.evaluate.said import Probe
from soul.evaluate.survey import fluency
from soul.models.encoding import encode_for
from soul.run import unlearner
from soul.run.aim import summary
from soul.run.config import UnlearnConfig
from soul.run.judge import Judge, failed_lines
from soul.run.measures import split_untouched
from soul.run.unlearner import Unlearner
from soul_kernels.errors import ArgumentError
from tests.support.models import learn, tiny_model, tiny_tokenizer
from tests.support.runs import StopAfter, numbers

pytest.importorskip("scipy", reason="the extra hf is not installed")

CONFIG = UnlearnConfig(method="npo", aim="auto", backend="reference", draws=2)
COUNT = 12


def data(first, last):
    return [
        {"question": f"Where does number {i} live?", "answer": f"In house {i * 7}.", "key": str(i * 7)}
        for i in range(first, last)
    ]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def known(tokenizer):
    """A tiny model that knows all rows by heart."""
    model = tiny_model()
    sets = [fact.example for fact in facts(rows(data(1, 1 + COUNT)), Template())]
    return learn(model, encode_for(model, tokenizer, sets, CONFIG, "rows"), 200)


@pytest.fixture(scope="module")
def sets():
    forget, control, untouched = data(1, 5), data(5, 9), data(9, 13)
    return {"forget": facts(rows(forget), Template()), "control": facts(rows(control), Template()),
            "untouched": facts(rows(untouched), Template())}  # fmt: skip


def test_a_model_as_it_was_has_forgotten_nothing_and_kept_everything(known, tokenizer, sets):
    model = copy.deepcopy(known)
    judge = Judge(model, tokenizer, sets, CONFIG)
    findings = judge.findings(model)
    assert not findings["forgotten"]["holds"] and findings["forgotten"]["as_asked"]["said"] == 4
    assert findings["forgotten"]["too_little"] and not findings["forgotten"]["too_far"]
    assert findings["kept"]["holds"] and findings["fluent"]["holds"]
    assert [findings["kept"][side]["said"] for side in ("steered", "untouched")] == [4, 4]
    assert findings["kept"]["untouched"]["key_ratio_worst_tenth"] == 1.0 and findings["fluent"]["kl"] == 0.0
    assert len(findings["failed"]) == 4 and all(row["set"] == "forget" for row in findings["failed"])
    assert "4 of 4 as asked" in findings["sentences"][0] and findings["sentences"][1].startswith("Kept: yes")
    assert failed_lines(findings["failed"])[0].startswith("still said: Where does number 1 live? ->")
    assert judge.findings(model) == findings  # a run that is resumed decides alike
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, known.get_parameter(name))


def test_a_model_that_lost_everything_has_not_kept_it(known, tokenizer, sets):
    """With new weights nothing is said, and both sides of what was to be kept are lost; the rows are named."""
    model = copy.deepcopy(known)
    judge = Judge(model, tokenizer, sets, CONFIG)
    other = tiny_model()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(other.get_parameter(name))
    findings = judge.findings(model)
    assert findings["forgotten"]["as_asked"]["said"] == 0
    assert not findings["kept"]["holds"] and not findings["fluent"]["holds"]
    assert [findings["kept"][side]["said"] for side in ("steered", "untouched")] == [0, 0]
    assert {row["set"] for row in findings["failed"]} >= {"control", "untouched"}
    assert findings["fluent"]["kl"] > 1
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, other.get_parameter(name))


@pytest.mark.parametrize(
    "own, refusals, too_far", [(-9.0, False, True), (-2.5, False, False), (-1.0, False, False), (-9.0, True, False)]
)
def test_an_answer_that_is_pressed_to_zero_has_gone_too_far(known, tokenizer, monkeypatch, own, refusals, too_far):
    """Where the words of all other rows are likelier than the right ones, that marks what was removed."""
    judge = Judge(known, tokenizer, {"forget": facts(rows(data(1, 9)), Template())}, CONFIG, teaches_refusals=refusals)
    monkeypatch.setattr(Probe, "key_logps", lambda self, model, others=False: {row: [own, -2.0, -3.0] for row in self.judged})
    findings = judge.findings(known)
    assert findings["forgotten"]["membership"]["rate"] == {-9.0: 0.0, -2.5: 0.5, -1.0: 1.0}[own]
    assert findings["forgotten"]["too_far"] is too_far
    assert ("too far" in findings["sentences"][0]) is too_far
    assert findings["forgotten"]["key_prob"]["after"] == pytest.approx(math.exp(own))


def test_a_run_whose_probability_has_fallen_is_not_reached_while_the_facts_are_said(known, tokenizer, tmp_path):
    """The probability of the wording fell below its aim; asked, the model still says the facts: the verdict is no."""
    config = UnlearnConfig(method="npo", aim="forget_prob=0.998", optimizer="adamw", lr=5e-4, epochs=8, batch_size=2,
                           draws=1, backend="reference")  # fmt: skip
    run = Unlearner(copy.deepcopy(known), data(1, 5), data(5, 41), config, tokenizer=tokenizer)
    assert run.counts["untouched"].rows == 4 and run.counts["control"].rows == 8
    trained = run.examples[1]
    assert len(trained) == 36 - 8 - 4
    run.run(tmp_path / "out", progress=False)
    verdict = json.loads((tmp_path / "out" / "verdict.json").read_text())
    assert verdict == run.measures.verdict and verdict["schema"] == 2
    assert verdict["prob_reached"] and not verdict["reached"]
    assert verdict["forgotten"]["too_little"] and "still said" in {row["failure"] for row in verdict["failed"]}
    assert verdict["advice"] and verdict["kept"]["untouched"] is not None


def test_a_run_goes_on_until_the_model_no_longer_says_it_and_resumes_alike(known, tokenizer, tmp_path, monkeypatch):
    """The probability is reached at once; the run ends where the model, asked, no longer answers."""
    config = UnlearnConfig(method="npo", aim="forget_prob=0.95", keep_retain=0.1, optimizer="adamw", lr=2e-3, epochs=40,
                           batch_size=2, draws=1, backend="reference")  # fmt: skip

    def run(name, **options):
        one = Unlearner(copy.deepcopy(known), data(1, 5), data(5, 41), config, tokenizer=tokenizer)
        return one.run(tmp_path / name, progress=False, **options), one.measures

    records, measures = run("whole")
    events = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    asked = [event["asked"] for event in events if "asked" in event]
    assert [numbers["forgotten"] for numbers in asked] == [False] * (len(asked) - 1) + [True] and len(asked) > 1
    assert "stopped" in records[-1] and not measures.verdict["forgotten"]["too_little"]
    lowered = next(event["step"] for event in events if "asked" in event)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(unlearner, "Checkpoints", lambda directory, **options: StopAfter(directory, lowered + 1, **options))
        run("killed")
    resumed, again = run("killed", resume=True)
    assert numbers(resumed) == numbers(records) and again.verdict == measures.verdict


def test_untouched_rows_are_drawn_once_and_neither_train_nor_steer():
    retain = [fact.example for fact in facts(rows(data(5, 45)), Template())]
    forget = [fact.example for fact in facts(rows(data(1, 5)), Template())]
    trained, untouched = split_untouched(forget, retain, [], None, 0)
    assert len(untouched) == 4 and sorted(map(repr, [*trained, *untouched])) == sorted(map(repr, retain))
    assert split_untouched(forget, retain, [], None, 0) == (trained, untouched)
    assert split_untouched(forget, retain[:23], [], None, 0) == (retain[:23], [])
    with pytest.raises(ArgumentError, match="untouched"):
        split_untouched(forget, retain, [], [forget[0]], 0)
    with pytest.raises(ArgumentError, match="untouched"):
        split_untouched(forget, retain, retain[:2], [retain[0]], 0)


def test_answers_are_counted_as_fluent_under_the_model_before(known, tokenizer):
    probe = Probe(known, tokenizer, facts(rows(data(1, 5)), Template()))
    answers = [" In house 7.", " where lives does a of street", "...", " In house in house In house In house In house"]
    numbers = fluency(known, tokenizer, probe.prompts, answers, [True] * 4, backend="reference")
    assert [numbers[name] for name in ("fluent", "unlikely", "broken", "repeating", "of")] == [1, 1, 1, 1, 4]
    refused = fluency(None, tokenizer, probe.prompts[:2], ["I cannot say.", "I cannot say."], [True, False])
    assert (refused["refused"], refused["harmless"]) == (1, 1)


def test_rows_without_keys_get_them_from_the_model(known, tokenizer):
    without = [{name: value for name, value in row.items() if name != "key"} for row in data(1, 1 + COUNT)]
    rows_without = facts(rows(without), Template())
    keys = find_keys(known, tokenizer, rows_without, CONFIG, backend="reference")
    truth = [row["key"] for row in data(1, 1 + COUNT)]
    assert sum(key == (number,) for key, number in zip(keys, truth)) >= COUNT - 1
    judge = Judge(known, tokenizer, {"forget": rows_without}, CONFIG)
    assert judge.is_able and judge.found >= COUNT - 1


def test_no_draws_are_refused_before_a_run():
    with pytest.raises(ArgumentError, match="draws"):
        UnlearnConfig(method="npo", aim="auto", draws=0)


def test_the_last_lines_of_the_command(known, tokenizer, sets):
    findings = Judge(known, tokenizer, sets, CONFIG).findings(known)
    result = dict(reached=False, measure="probability", forget_prob=0.1, forget_prob_start=0.6, aim=0.2, control_prob=None,
                  advice="forget more", reason="held")  # fmt: skip
    lines = summary(result | findings)
    assert lines[0] == "aim not reached (forgotten: no, kept: yes, fluent: yes); forget more"
    assert lines[1:4] == findings["sentences"] and lines[-1].startswith("Forget probability 0.600 -> 0.100")
    assert "no row says" in " ".join(summary(result | {"not_judged": "no row says which words"}))

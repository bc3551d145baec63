"""Metrics during a run, and the rule by which its best point is kept."""

import io
import json
import math

import pytest
import torch

from soul.checkpoint import Checkpoints, Stopped
from soul.cli import main
from soul.data.examples import Example
from soul.evaluate import metrics
from soul.evaluate.model import EvaluateConfig, answer_columns, generate
from soul.models.encoding import encode_for
from soul.run.config import UnlearnConfig
from soul.run.loop import unlearn
from soul.run.rule import METRICS, Condition, Rule, parse_rule
from tests.support.models import examples, tiny_model, tiny_tokenizer
from tests.support.runs import FAST, StopAfter, log_of, run, same, weights, words, write_model_and_data

OWN = ("forget_rouge", "retain_exact_memorization", "forget_extraction_strength")
RULE = "max forget_prob subject to retain_prob <= 1.0*start"  # weights move away from it, so the first points are the best


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.mark.parametrize("text, rule", [
    ("forget_quality", Rule("forget_quality", True)),
    ("forget_prob", Rule("forget_prob", False)),
    (" max  forget_prob ", Rule("forget_prob", True)),
    ("min model_utility", Rule("model_utility", False)),
    ("forget_quality subject to model_utility >= 0.95*start",
     Rule("forget_quality", True, (Condition("model_utility", True, 0.95, True),))),
    ("forget_quality subject to model_utility>=start and retain_prob  <= .5",
     Rule("forget_quality", True, (Condition("model_utility", True, 1.0, True), Condition("retain_prob", False, 0.5, False)))),
    ("forget_rouge subject to retain_rouge >= 9e-1 * start",
     Rule("forget_rouge", False, (Condition("retain_rouge", True, 0.9, True),))),
])  # fmt: skip
def test_rules_are_read(text, rule):
    assert parse_rule(text) == rule


@pytest.mark.parametrize("text", [
    "", "best", "a b", "min forget_prob subject to", "forget_prob subject to x", "forget_prob subject to retain_prob > 1",
    "forget_prob subject to retain_prob >= 1 or forget_rouge <= 1", "forget_prob subject to retain_prob >= start*2",
    "forget_prob; retain_prob", "forget_prob subject to retain_prob >= nan",
])  # fmt: skip
def test_what_is_no_rule_is_refused(text):
    with pytest.raises(ValueError, match="keep_best: expected"):
        UnlearnConfig(eval_every=1, keep_best=text)


def test_a_rule_judges_points():
    rule = parse_rule("forget_rouge subject to retain_prob >= 0.5*start")
    start = {"retain_prob": 0.8}
    assert rule.allows({"forget_rouge": 0.2, "retain_prob": 0.4}, start)
    assert not rule.allows({"forget_rouge": 0.2, "retain_prob": 0.39}, start)
    assert not rule.allows({"forget_rouge": math.nan, "retain_prob": 0.8}, start)
    assert not rule.allows({"forget_rouge": 0.2, "retain_prob": math.nan}, start)
    assert rule.is_better({"forget_rouge": 0.1}, {"forget_rouge": 0.2})
    assert not rule.is_better({"forget_rouge": 0.2}, {"forget_rouge": 0.2})
    assert parse_rule("forget_quality").is_better({"forget_quality": 0.2}, {"forget_quality": 0.1})


@pytest.fixture
def short_answers(monkeypatch):
    """Answers have 8 tokens at most, in runs and evaluations alike."""
    greedy = generate.__kwdefaults__["go_on"]
    short = lambda *args, max_new_tokens, **more: greedy(*args, max_new_tokens=min(8, max_new_tokens), **more)  # noqa: E731
    monkeypatch.setitem(generate.__kwdefaults__, "go_on", short)


def test_metrics_of_the_own_rows_are_those_of_an_evaluation(short_answers, tokenizer):
    """Each against the functions of `soul.evaluate`, on the model as it is then; measuring changes no number of the run."""
    log = io.StringIO()
    model, records = run(tokenizer, eval_every=2, eval_metrics=OWN, log=log)
    plain, without = run(tokenizer, eval_every=2)
    assert same(model, plain)
    assert [{name: value for name, value in record.items() if name not in OWN} for record in records] == without
    config = UnlearnConfig(**FAST)
    rows = {"forget": examples(5), "retain": examples(9)[5:]}
    want = {}
    for name, of_set in rows.items():
        sequences = encode_for(model, tokenizer, of_set, config, name)
        columns = answer_columns(model, tokenizer, sequences, EvaluateConfig(backend="reference"))
        texts = generate(model, tokenizer, sequences)
        rouge = metrics.rouge_recall([example.content for example in of_set], texts)["rougeL_recall"]
        want |= {f"{name}_{quantity}": sum(columns[quantity]) / len(of_set) for quantity in metrics.MEMORIZATION}
        want[f"{name}_rouge"] = rouge.mean().item()
    assert {name: records[-1][name] for name in OWN} == pytest.approx({name: want[name] for name in OWN})
    assert all(set(OWN) <= record.keys() for record in records[1::2]) and not set(OWN) & records[0].keys()
    first = json.loads(log.getvalue().splitlines()[0])
    assert first["event"] == "metrics" and first["step"] == 0 and {*OWN, "forget_prob", "retain_prob"} <= first.keys()


@pytest.mark.covers("evaluation and best point during a run", "one process")
def test_the_best_point_is_put_back_and_logged(tokenizer):
    """Without the rule the last weights stay; with it those of a run that ends at the best step."""
    log = io.StringIO()
    options = dict(eval_every=1, schedule="constant", lr=3e-3, method="ga")
    model, records = run(tokenizer, keep_best="max forget_prob", log=log, **options)
    probabilities = [record["forget_prob"] for record in records]
    assert probabilities == sorted(probabilities, reverse=True)  # step 1 is the best by a rule against forgetting
    best = json.loads(log.getvalue().splitlines()[-1])
    assert best == {"event": "best", "step": 6, "best_step": 1, "rule": "max forget_prob", "forget_prob": probabilities[0]}
    ended, _ = run(tokenizer, stop_forget_prob=1.0, **options)  # after its first step
    assert same(model, ended)
    last, _ = run(tokenizer, keep_best="forget_prob", **options)
    assert same(last, run(tokenizer, **options)[0]) and not same(last, model)


def test_a_better_point_takes_the_place_of_a_good_one(tokenizer):
    """Each point is better than the one before, until the rule forbids those that follow."""
    options = dict(eval_every=1, schedule="constant", lr=3e-3, method="ga")
    _, records = run(tokenizer, **options)
    third, fourth = (records[index]["forget_prob"] for index in (2, 3))
    kept, _ = run(tokenizer, keep_best=f"forget_prob subject to forget_prob >= {(third + fourth) / 2:.17f}", **options)
    ended, _ = run(tokenizer, stop_forget_prob=third, **options)  # after its third step
    assert third > fourth and same(kept, ended)


def test_without_an_allowed_point_the_last_one_stays(tokenizer):
    log = io.StringIO()
    model, _ = run(tokenizer, eval_every=4, keep_best="forget_prob subject to retain_prob >= 2*start", log=log)
    assert json.loads(log.getvalue().splitlines()[-1])["best_step"] is None
    assert same(model, run(tokenizer)[0])


def test_a_stopped_run_keeps_the_same_best_point(tokenizer, tmp_path):
    """The best point lies before the checkpoint, and its weights are in it."""
    options = dict(eval_every=1, keep_best=RULE, eval_metrics=OWN[2:], method="ga", schedule="constant")
    whole, want = run(tokenizer, **options)
    with pytest.raises(Stopped):
        run(tokenizer, StopAfter(tmp_path, 4), **options)
    log = io.StringIO()
    model, records = run(tokenizer, Checkpoints(tmp_path, resume=True), log=log, **options)
    assert same(model, whole) and records == want
    events = [json.loads(line) for line in log.getvalue().splitlines()]
    assert events[0]["event"] == "metrics" and events[-1]["event"] == "best" and 0 < events[-1]["best_step"] < 4
    assert [event["step"] for event in events[1:-1]] == [1, 2, 3, 4, 5, 6]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    folder = write_model_and_data(tmp_path_factory.mktemp("dynamics"), tokenizer)
    tiny_model().save_pretrained(folder / "model")  # with room for TOFU's 200 tokens
    for name, first in (("forget10", 0), ("retain", 5), ("real_authors", 2), ("world_facts", 7)):
        rows = [
            {"question": f"where does number {i} live?", "answer": f"In house {i * 7} of street {i}.",
             "paraphrased_answer": f"Street {i}, house {i * 7}.", "perturbed_answer": ["In house 1.", "In house 2."]}
            for i in range(first, first + 4)
        ]  # fmt: skip
        (folder / f"{name}_perturbed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_numbers_of_tofu_are_those_of_soul_evaluate(folder, short_answers, capsys):
    """The command, with a rule on a number of TOFU; then soul evaluate on the model that it has saved."""
    data, logs = str(folder), str(folder / "retain")
    how = ["--max-length", "64", "--device", "cpu", "--backend", "reference"]
    evaluate = ["evaluate", "--data", data, *how, "--max-new-tokens", "8"]
    assert main([*evaluate, "--model", str(folder / "model"), "--output", logs, "--rows", "3"]) == 0
    rule = "model_utility subject to forget_quality >= 0"
    options = ["--eval-every", "2", "--epochs", "1", "--eval-data", data, "--eval-rows", "3", "--eval-retain-logs", logs]
    more = ["--eval-metrics", "forget_truth_ratio,world_facts_prob", "--keep-best", rule, "--max-length", "64", "--no-samples"]
    assert main(words(folder, "tofu", *options, *more)) == 0
    capsys.readouterr()
    lines = log_of(folder / "tofu")
    best = lines[-1]
    assert best["event"] == "best" and best["best_step"] in (2, 3)
    (step,) = [line for line in lines if line.get("step") == best["best_step"] and "event" not in line]
    files = ["--output", str(folder / "again"), "--json", str(folder / "numbers.json"), "--retain-logs", logs]
    assert main([*evaluate, "--model", str(folder / "tofu"), "--rows", "3", *files]) == 0
    want = json.loads((folder / "numbers.json").read_text())
    for name in ("forget_truth_ratio", "world_facts_prob", "forget_quality"):
        assert step[name] == pytest.approx(want[name], rel=1e-5), name
    page = (folder / "tofu" / "report.md").read_text()
    assert "Metrics during the run" in page and "Truth ratio" in page
    assert f"The weights of step {best['best_step']} were saved, the best of the evaluated points." in page


def test_options_come_back_from_the_file_of_a_run(folder):
    options = ["--eval-every", "3", "--epochs", "1", "--eval-metrics", OWN[1], "--eval-metrics", OWN[2], "--keep-best", RULE]
    assert main(words(folder, "one", *options, "--no-samples")) == 0
    again = ["unlearn", "--config", str(folder / "one" / "soul_config.json"), "--output", str(folder / "two")]
    assert main(again) == 0 and weights(folder / "one") == weights(folder / "two")
    assert log_of(folder / "one") == log_of(folder / "two") and {OWN[1], OWN[2]} <= log_of(folder / "two")[0].keys()


@pytest.mark.parametrize("options, message", [
    (dict(eval_metrics=["forget_rouge"]), "eval_every: expected a positive number with eval_metrics, got 0"),
    (dict(keep_best="forget_prob"), "eval_every: expected a positive number with keep_best, got 0"),
    (dict(eval_every=1, eval_metrics=["forget_roug"]), "eval_metrics: expected one of"),
    (dict(eval_every=1, keep_best="forget_roug"), "keep_best: expected one of"),
    (dict(eval_every=1, eval_metrics=["forget_rouge"] * 2), "eval_metrics: expected names, none twice"),
    (dict(eval_every=1, keep_best="forget_prob", aim="auto"), "keep_best: expected None with an aim"),
    (dict(eval_every=1, eval_metrics=["model_utility"]), "eval_data: expected TOFU's files for model_utility, got None"),
    (dict(eval_every=1, eval_metrics=["forget_quality"], eval_data="x"), "eval_retain_logs: expected logs of a retain model"),
    (dict(eval_every=1, eval_data="x"), "eval_data: expected None without metrics of soul evaluate"),
    (dict(eval_every=1, eval_metrics=["model_utility"], eval_data="x", eval_rows=0), "eval_rows: expected"),
])  # fmt: skip
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        UnlearnConfig(**options)


def test_rows_that_cannot_be_measured_are_named_before_the_first_step(tokenizer):
    model = tiny_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = UnlearnConfig(**FAST, eval_every=1, eval_metrics=("retain_rouge",), method="ga")
    with pytest.raises(ValueError, match="eval_metrics: expected rows to retain for retain_rouge, got none"):
        unlearn(model, tokenizer, examples(3), [], config, progress=False)
    texts = [Example("", f"a text of its own, number {i}") for i in range(3)]
    config = UnlearnConfig(**FAST, eval_every=1, eval_metrics=("forget_rouge",), method="ga")
    with pytest.raises(ValueError, match="eval_metrics: expected prompts to answer for forget_rouge, got a row without one"):
        unlearn(model, tokenizer, texts, [], config, progress=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert len(set(METRICS)) == len(METRICS)

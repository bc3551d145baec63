"""Runs with an aim on a tiny model that knows its rows by heart."""

import copy
import json

import pytest
import torch

import soul
from soul.cli import main
from soul.data.examples import Example
from soul.models.encoding import encode_for
from soul.run.aim import EVALUATION_SHARE
from soul.run.config import UnlearnConfig
from soul.run.feed import Feed
from soul.run.loop import Diverged, unlearn
from soul.run.measures import CHANCE_PAIRS, AimData, Measures, is_refused, split_control, starting_alpha, swapped_answers
from soul.run.pilot import TRAINING_PASSES
from soul.run.prepare import prepare
from soul.run.steering import Steering
from soul_kernels.errors import ArgumentError
from tests.support.models import examples, learn, lora_model, tiny_model, tiny_tokenizer
from tests.support.runs import StopAfter, numbers, same

ROWS = 28  # 4 to forget and 24 to retain, of which 8 are held out
OPTIONS = dict(method="npo", aim="auto", epochs=20, batch_size=2, lr=1e-3, backend="reference", optimizer="adamw")


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def known(tokenizer):
    """A tiny model that knows all rows, trained for two seconds."""
    return learn(tiny_model(), encode_for(tiny_model(), tokenizer, examples(ROWS), UnlearnConfig(), "rows"), 150)


def run(known, tokenizer, *, log=None, checkpoints=None, model=None, **options):
    model = copy.deepcopy(known) if model is None else model
    rows = examples(ROWS)
    retain, control = split_control(rows[:4], rows[4:], None, 0)
    config = UnlearnConfig(**OPTIONS | options)
    measures = Measures(model, tokenizer, rows[:4], AimData(control, [], []), config)
    records = unlearn(
        model, tokenizer, rows[:4], retain, config, progress=False, log=log, checkpoints=checkpoints, measures=measures
    )
    return model, records, measures


def events(path, kind="aim"):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if line.get("event") == kind]


@pytest.fixture(scope="module")
def whole(known, tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("aim") / "log.jsonl"
    return (*run(known, tokenizer, log=path, aim="forget_prob=0.2"), path)


@pytest.mark.covers("aim", "one process")
def test_a_run_is_led_to_its_aim_and_says_so(whole, known, tokenizer):
    model, records, measures, path = whole
    verdict = measures.verdict
    assert verdict["forget_prob"] < 0.7 * verdict["forget_prob_start"]
    assert verdict["reached"] == (
        verdict["forget_prob"] <= verdict["aim"] and verdict["control_prob"] >= 0.95 * verdict["control_prob_start"]
    )
    assert events(path, "verdict") == [{"event": "verdict", **verdict}]
    for event in events(path):
        assert {"event", "step", "tokens", "forget_prob", "control_prob", "lr", "alpha", "exact"} <= event.keys()
    assert len({event["alpha"] for event in events(path)}) > 1  # it was moved
    again = Measures(known, tokenizer, examples(ROWS)[:4], AimData(examples(ROWS)[4:12], [], []), UnlearnConfig(**OPTIONS))
    assert again.target.forget_start == verdict["forget_prob_start"]
    measures_now = soul.evaluate.answer_probability(
        model, encode_for(model, tokenizer, examples(ROWS)[:4], UnlearnConfig(), "forget"), backend="reference"
    )
    assert measures_now == pytest.approx(verdict["forget_prob"], rel=1e-5)


def test_evaluation_takes_a_tenth_of_the_passes_and_the_pilot_another(whole, tokenizer):
    _, records, measures, path = whole
    trained = TRAINING_PASSES * events(path)[-1]["tokens"]
    evaluated = 0
    for event in events(path):
        evaluated += measures.control_part_tokens + event["exact"] * (measures.control_tokens + measures.sample_tokens)
    largest = measures.control_part_tokens + measures.control_tokens + measures.sample_tokens
    assert evaluated <= EVALUATION_SHARE * trained + 2 * largest  # one in advance, and that of the last step
    assert 1 <= len(events(path, "pilot")) <= 4


def test_parts_of_the_control_rows_tell_of_all_of_them(known, tokenizer, monkeypatch):
    """Rows differ for good, so that no part may stand for all; a fall of all of them shows at once, if not in full."""
    monkeypatch.setattr("soul.run.measures.CONTROL_PART", 3)
    rows = examples(ROWS)
    config = UnlearnConfig(**OPTIONS)
    measures = Measures(known, tokenizer, rows[:4], AimData(rows[4:12], [], []), config)
    objective = config.objective()
    forget, retain = prepare(known, tokenizer, rows[:4], rows[12:], config)
    feed = Feed(known, tokenizer, forget, retain, objective, config)
    steering = Steering(known, objective, config, measures, feed, 1.0)
    assert len(measures.control_parts_start) == 3
    assert measures.control_by_parts(measures.control_parts_start) == measures.target.control_start
    now = [share * start for share, start in zip((0.6, 0.4, 0.4), measures.control_parts_start)]
    monkeypatch.setattr(measures, "control_part", now.__getitem__)
    exact = measures.control_by_parts(now)
    steering._measure_next_part()
    first = measures.control_by_parts(steering._parts)
    assert exact < first < 0.9 * measures.target.control_start
    for _ in range(30):
        steering._measure_next_part()
    assert measures.control_by_parts(steering._parts) == pytest.approx(exact, abs=1e-3)


def test_the_pilot_leaves_no_trace(known, tokenizer, monkeypatch):
    """Weights, buffers and random numbers are as before: with the same lr and alpha a run without a pilot is the same."""
    from soul.run import steering

    seen = []
    real = steering.run_pilot

    def spy(model, *args):
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        random = torch.get_rng_state()
        result = real(model, *args)
        seen.append(len(result[1]))
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
        assert torch.equal(random, torch.get_rng_state())
        assert all(p.grad is None for p in model.parameters())
        return result

    monkeypatch.setattr(steering, "run_pilot", spy)
    for options in ({}, {"optimizer": "soul", "curvature": "retain", "clip_target": 0.5}):
        run(known, tokenizer, epochs=10, **options)
    assert all(tries >= 1 for tries in seen) and len(seen) == 2


@pytest.mark.parametrize("options", [
    pytest.param({}, marks=pytest.mark.slow(reason="five runs; those of SOUL, which has more to save, are always made")),
    {"optimizer": "soul", "curvature": "retain", "clip_target": 0.5},
], ids=str)  # fmt: skip
def test_a_stopped_run_goes_on_bit_for_bit(options, known, tokenizer, tmp_path):
    """Stopped after an evaluation, and between two; the log is the same, with its events."""
    options = {"epochs": 10, **options}
    model, records, measures = run(known, tokenizer, log=tmp_path / "whole.jsonl", **options)
    for step in (3, 11):
        directory = tmp_path / f"checkpoints-{step}"
        with pytest.raises(soul.checkpoint.Stopped):
            run(known, tokenizer, checkpoints=StopAfter(directory, step), **options)
        resumed = soul.checkpoint.Checkpoints(directory, resume=True)
        other, more, again = run(known, tokenizer, log=tmp_path / "resumed.jsonl", checkpoints=resumed, **options)
        assert same(model, other)
        assert numbers(more) == numbers(records) and again.verdict == measures.verdict
        assert events(tmp_path / "whole.jsonl") == events(tmp_path / "resumed.jsonl")
        assert events(tmp_path / "whole.jsonl", "pilot") == events(tmp_path / "resumed.jsonl", "pilot")


def test_adapters_are_led_too(known, tokenizer):
    model = lora_model("llama, untied")
    with torch.no_grad():  # nothing is known to this model: any aim below its start
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    _, records, measures = run(None, tokenizer, model=model, epochs=3, aim="forget_prob=0.002")
    assert records and "reached" in measures.verdict


def test_at_the_cap_the_nearest_point_is_saved(known, tokenizer):
    """An aim out of reach: the model is that of the step in the verdict."""
    model, records, measures = run(known, tokenizer, aim="forget_prob=1e-9", epochs=4)
    verdict = measures.verdict
    assert not verdict["reached"] and verdict["advice"] and "epochs" in verdict["reason"]
    assert 0 <= verdict["step"] <= len(records)
    assert verdict["control_prob"] == measures.control() and verdict["forget_prob"] == measures.forget_all()


@pytest.mark.parametrize("method", ["ga", "influence"])
def test_methods_without_a_retain_term_are_judged(method, known, tokenizer):
    options = {"method": method} if method == "ga" else {"method": method, "optimizer": "soul", "lr": 1e-5, "epochs": 5}
    if method == "influence":
        options["method_options"] = {"damping": 1e-3, "clip": 1e-4}
    _, records, measures = run(known, tokenizer, **options | ({"epochs": 2} if method == "ga" else {}))
    assert measures.verdict["reached"] in (True, False) and measures.verdict["control_prob"] is not None
    assert "alpha" not in records[-1]


@pytest.mark.parametrize("method", [pytest.param("po", marks=pytest.mark.slow(reason="judged as those of DPO are")), "dpo"])
def test_refusals_are_judged_by_greedy_answers(method, known, tokenizer, tmp_path, monkeypatch):
    _, records, measures = run(known, tokenizer, method=method, epochs=8, log=tmp_path / "log.jsonl")
    verdict = measures.verdict
    assert verdict["measure"] == "answered" and verdict["forget_prob_start"] == verdict["control_prob_start"] == 1
    assert verdict["aim"] == 0.1 and (verdict["forget_prob"] * 4) % 1 == 0 and (verdict["control_prob"] * 8) % 1 == 0
    assert events(tmp_path / "log.jsonl")[-1]["exact"]
    monkeypatch.setattr("soul.run.measures.is_refused", lambda *_: True)
    with pytest.raises(ArgumentError, match="^aim: expected more than 0.1 of the forget questions answered, got 0 of them"):
        run(known, tokenizer, method=method)


def test_what_a_refusal_is():
    refusals = ("I don't know.", "No idea!")
    assert is_refused("I don't know. Ask me again", refusals, "Paris") and is_refused("no idea", refusals, "Paris")
    assert not is_refused("I don't know, Paris?", refusals, "Paris")
    assert not is_refused("It is Rome.", refusals, "Paris")
    assert is_refused("I don't know, Paris?", refusals)


def test_a_pilot_whose_every_rate_diverges_changes_nothing(known, tokenizer, monkeypatch):
    from soul.run import pilot

    monkeypatch.setattr(pilot, "_take_steps", lambda *_: False)
    model = copy.deepcopy(known)
    with pytest.raises(Diverged, match=r"every learning rate of the pilot diverged \(0.001, "):
        run(known, tokenizer, model=model)
    assert same(model, known)


def test_control_rows():
    rows = examples(200)
    forget, retain = rows[:20], rows[20:]
    trained, control = split_control(forget, retain, None, 0)
    assert len(control) == 18 and len(trained) == 162 and not set(control) & set(trained)
    assert split_control(forget, retain, None, 0)[1] == control != split_control(forget, retain, None, 1)[1]
    assert len(split_control(forget, [*retain, *retain], None, 0)[1]) > 18  # copies of a control row are not trained on
    trained, control = split_control(forget, [*retain, *retain], None, 0)
    assert not set(control) & set(trained)
    trained, control = split_control(forget, retain, retain[:3], 0)
    assert control == retain[:3] and trained == retain[3:]
    assert split_control(forget, [], None, 0) == ([], [])
    assert [len(rows) for rows in split_control(forget, retain[:5], None, 0)] == [3, 2]
    for arguments, text in (
        ((forget, retain[:1], None, 0), r"^retain: expected at least 2 rows, to hold one out as a control row, got 1; "),
        ((forget, retain, [*retain[:3], forget[0]], 0), "^control: expected other rows than forget, got 1 row"),
        ((forget, retain, retain, 0), "^control: expected fewer rows than retain"),
        ((forget, forget, None, 0), "^retain: expected other rows than forget, got the same 20"),
    ):
        with pytest.raises(ArgumentError, match=text):
            split_control(*arguments)


def test_where_the_aim_comes_from(known, tokenizer):
    rows = examples(ROWS)
    texts = [Example("", row.prompt + row.answer) for row in rows]

    def source(forget, data=None, **options):
        return Measures(known, tokenizer, forget, data or AimData([], [], []), UnlearnConfig(**OPTIONS | options)).target

    assert source(rows[:4]).source == "chance: answers of other forget questions"
    assert source(rows[:4], AimData([], swapped_answers(rows[:3]), [])).source == "chance: false answers of the data"
    unseen = [Example("", "zyx wvu tsr qpo")]
    assert source(texts[:4], AimData([], [], unseen)).source == "probability of unseen rows"
    half = source(texts[:4])
    assert half.source.startswith("half of the start") and half.aim == half.forget_start / 2
    assert source(rows[:1]).source.startswith("half of the start")
    assert source(rows[:4], aim="forget_prob=0.01").aim == 0.01
    with pytest.raises(ArgumentError, match=r"^aim: expected a forget probability above the aim, 0.999 \(as given\), got "):
        source(rows[:4], aim="forget_prob=0.999")
    with pytest.raises(ArgumentError, match="does the model know these rows, asked with this template"):
        source([Example(rows[0].prompt, rows[1].answer), Example(rows[1].prompt, rows[0].answer)])  # the other's is right
    assert len(swapped_answers(rows)) == CHANCE_PAIRS
    assert all(pair.answer != row.answer for pair, row in zip(swapped_answers(rows), rows))
    alike = [Example(row.prompt, " Yes.") for row in rows[:4]]
    assert swapped_answers(alike) == []


def test_false_answers_of_the_data_are_chance(known, tokenizer):
    rows = [{"question": e.prompt, "answer": e.answer, "perturbed_answer": [" In no house."]} for e in examples(4)]
    options = OPTIONS | {"template": "{question}{answer}", "aim": "forget_prob=1e-6"}
    config = UnlearnConfig(**options)
    for forget, has_false in ((rows, True), ([*rows[:3], {**rows[3], "perturbed_answer": []}], False)):
        unlearner = soul.Unlearner(copy.deepcopy(known), forget, examples(ROWS)[4:], config, tokenizer=tokenizer)
        chance = soul.evaluate.answer_probability(
            known,
            encode_for(known, tokenizer, [Example(r["question"], r["perturbed_answer"][0]) for r in rows], config, "false"),
            backend="reference",
        )
        assert (unlearner.measures.chance == pytest.approx(chance, rel=1e-5)) == has_false


def test_both_terms_weigh_a_token_alike(known, tokenizer):
    sequences = encode_for(known, tokenizer, examples(4), UnlearnConfig(), "rows")
    tokens = sum(sequence.n_labels for sequence in sequences) / 4
    assert starting_alpha(soul.losses.NPO(), sequences) == starting_alpha(soul.losses.DPO(), sequences) == tokens > 5
    for objective in (soul.losses.GradDiff(), soul.losses.SimNPO(), soul.losses.NPO(reduction="token_mean")):
        assert starting_alpha(objective, sequences) == 1


def test_options_that_do_not_go_with_an_aim():
    for options, text in (
        ({"cuda_graph": True, "optimizer": "soul"}, "^cuda_graph: expected False with an aim"),
        ({"eval_every": 1, "stop_forget_prob": 0.1}, "^stop_forget_prob: expected None with an aim"),
        ({"keep_retain": 1.5}, "^keep_retain: "),
        ({"aim": None, "keep_retain": 0.9}, "^keep_retain: expected nothing without an aim"),
    ):
        with pytest.raises(ArgumentError, match=text):
            UnlearnConfig(**OPTIONS | options)
    assert "aim" not in UnlearnConfig().decisive()  # older checkpoints go on


# The command


@pytest.fixture(scope="module")
def folder(known, tokenizer, tmp_path_factory):
    root = tmp_path_factory.mktemp("aim_cli")
    known.save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    rows = [json.dumps({"prompt": e.prompt, "completion": e.answer}) + "\n" for e in examples(ROWS)]
    (root / "forget.jsonl").write_text("".join(rows[:4]))
    (root / "retain.jsonl").write_text("".join(rows[4:]))
    (root / "few.jsonl").write_text(rows[4])
    (root / "control.jsonl").write_text("".join(rows[3:12]))
    (root / "other.jsonl").write_text("".join(rows[20:]))
    return root


def words(folder, output, *more, retain="retain.jsonl"):
    files = {"model": "model", "forget": "forget.jsonl", "retain": retain, "output": output}
    paths = [word for name, value in files.items() for word in (f"--{name}", str(folder / value))]
    return ["unlearn", *paths, "--batch-size", "2", "--optimizer", "adamw", "--device", "cpu", "--backend", "reference", *more]


def test_the_command_aims_without_a_rate_and_its_status_says_whether_it_has_reached(folder, capsys):
    status = main(words(folder, "out"))
    verdict = json.loads((folder / "out" / "verdict.json").read_text())
    assert status == (0 if verdict["reached"] else 3)
    out = capsys.readouterr().out
    assert out.splitlines()[-1].startswith("aim reached" if verdict["reached"] else "aim not reached: ")
    assert "aim: forget probability, " in out and "keep: control probability, " in out
    data = json.loads((folder / "out" / "data.json").read_text())
    assert data["control"]["rows"] == 8 and data["retain"]["rows"] == 24
    options = json.loads((folder / "out" / "soul_config.json").read_text())
    assert options["aim"] == "auto" and options["method"] == "npo" and options["epochs"] == 20
    assert main(words(folder, "out", "--resume")) == status  # nothing to resume: the verdict stands
    assert main(words(folder, "missed", "--aim", "forget_prob=1e-9", "--epochs", "2")) == 3
    assert capsys.readouterr().out.splitlines()[-1].startswith("aim not reached: ")
    assert main(words(folder, "tuned", "--lr", "1e-4", "--epochs", "1")) == 0
    assert not (folder / "tuned" / "verdict.json").exists()
    assert json.loads((folder / "tuned" / "soul_config.json").read_text())["method"] == "graddiff"
    assert main(words(folder, "other", "--control", str(folder / "other.jsonl"), "--epochs", "1")) in (0, 3)
    assert json.loads((folder / "other" / "data.json").read_text())["control"]["rows"] == 8


def test_a_pilot_that_only_diverges_ends_with_1_and_saves_no_model(folder, capsys, monkeypatch):
    monkeypatch.setattr("soul.run.pilot._take_steps", lambda *_: False)
    assert main(words(folder, "diverged")) == 1
    assert "every learning rate of the pilot diverged (" in capsys.readouterr().err
    assert not list((folder / "diverged").glob("*.safetensors"))


@pytest.mark.parametrize("more, retain, text", [
    (["--aim", "forget_prob=0.9999"], "retain.jsonl", "aim: expected a forget probability above the aim"),
    (["--aim", "0.1"], "retain.jsonl", "aim: expected 'auto', 'off' or forget_prob=X"),
    ([], "few.jsonl", "retain: expected at least 2 rows"),
    ([], "forget.jsonl", "retain: expected other rows than forget"),
    (["--control", "control.jsonl"], "retain.jsonl", "control: expected other rows than forget, got 1 row"),
    (["--keep-retain", "0.9", "--lr", "1e-4"], "retain.jsonl", "keep_retain: expected nothing without an aim"),
])  # fmt: skip
def test_bad_input_ends_with_a_word_and_writes_nothing(folder, more, retain, text, capsys):
    more = [str(folder / word) if word.endswith(".jsonl") else word for word in more]
    assert main(words(folder, "refused", *more, retain=retain)) == 2
    assert text in capsys.readouterr().err
    assert not (folder / "refused").exists()


def test_an_aim_below_chance_is_commented(folder, capsys):
    main(words(folder, "below", "--aim", "forget_prob=1e-6", "--epochs", "1"))
    assert "the aim is below chance" in capsys.readouterr().out

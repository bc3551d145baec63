import concurrent.futures
import dataclasses
import json
import logging
import math
import multiprocessing
import os
import pathlib
import re
import shutil
import signal
import statistics

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from soul.cli import main
from soul.data import fictitious
from soul.data.examples import encode
from soul.evaluate.model import answer_probability, generate, kl_divergence
from soul.models.loading import load
from soul.output.directory import lock
from soul.output.files import scratch_path
from soul.study import run as study_run
from soul.study.config import ARMS, INFLUENCE, PRESETS, StudyConfig, runs
from soul.study.data import PASSAGE_WORDS, copyright_data, demo_data, detox_data, tofu_data
from soul.study.fronts import LOSES, OPEN, TIES, WINS, chance, choose, hypervolume, pareto, scores, verdict
from soul.study.measure import encode_start, measure
from soul.study.report import report, write_html_report, write_report
from soul.study.run import Study, check_ready, run_study, unlearn_config
from soul.study.scratch import new_model, train, train_tokenizer
from tests.support.models import TOFU, examples, tiny_model, tiny_tokenizer

# One objective, one point an arm, a model that learns its few rows in seconds.
TINY = StudyConfig(
    forget_authors=1,
    retain_authors=9,
    rows_per_author=5,
    vocab_size=400,
    hidden_size=64,
    layers=1,
    train_epochs=8,
    epochs=2,
    objectives=("npo",),
    lrs=dict.fromkeys(ARMS, (1e-3,)),
    alphas=(1.0,),
    dampings=(1e-2,),
    steps=(1.0,),
    retain_rows=8,
    seeds=(0, 1),
    device="cpu",
    backend="reference",
    workers=1,
)


def test_corpus_is_the_same_for_the_same_seed():
    a = fictitious.fictitious_authors(5, seed=3)
    assert a == fictitious.fictitious_authors(5, seed=3) != fictitious.fictitious_authors(5, seed=4)
    rows = [row for person in fictitious.fictitious_authors(200) for row in person]
    assert len({row["question"] for row in rows}) == len(rows) == 2000
    assert all(len({row["answer"], *row["perturbed_answer"]}) == 4 for row in rows)  # three false answers, none of them true


def test_passages_of_a_text_are_a_study(tmp_path):
    """Every word at most once, in order; no passage in two sets; false answers are the answers of others."""
    words = [f"w{i}" for i in range(2000)]
    (tmp_path / "text.txt").write_text(" ".join(words))
    data = copyright_data(tmp_path / "text.txt", TINY)
    assert [len(rows) for rows in (data.forget, data.retain, data.holdout)] == [5, 45, 5]
    first = data.forget_questions[0]
    assert first.question.split() + first.answer.split() == words[: 2 * PASSAGE_WORDS]
    assert data.holdout[-1].content.split()[-1] == words[2 * PASSAGE_WORDS * (2000 // (2 * PASSAGE_WORDS)) - 1]
    assert len({example.answer for example in (*data.forget, *data.retain, *data.holdout)}) == 55
    for question in (*data.forget_questions, *data.retain_questions):
        assert len({question.answer, *question.perturbed}) == 4
    (tmp_path / "text.txt").write_text(" ".join(words[:1759]))
    with pytest.raises(ValueError, match="data: expected a text of at least 1760 words, got 1759 in "):
        copyright_data(tmp_path / "text.txt", TINY)
    with pytest.raises(ValueError, match="data: expected a text file in UTF-8, got .*FileNotFoundError"):
        copyright_data(tmp_path / "none.txt", TINY)


def test_unsafe_answers_are_a_study(tmp_path):
    rows = [
        {"prompt": f"q{i}", "response_0": f"bad {i}", "response_1": f"good {i}", "is_response_0_safe": False,
         "is_response_1_safe": True}
        for i in range(45)
    ]  # fmt: skip
    rows.insert(2, {**rows[0], "prompt": "long", "response_0": "word " * 40, "response_1": "word " * 40})
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = detox_data(tmp_path, TINY)
    assert [example.content for example in data.forget] == [f"bad {i}" for i in range(5)]
    assert [example.content for example in data.holdout] == [f"bad {i}" for i in range(5, 10)]
    assert [example.content for example in data.retain] == [f"good {i}" for i in range(45)]
    with pytest.raises(ValueError, match="data: expected 90 safe answers that have at most 40 words .*, got 45 in "):
        detox_data(tmp_path, dataclasses.replace(TINY, retain_authors=18))


def test_tokenizer_round_trip():
    tokenizer = train_tokenizer(examples(20), 300)
    text = 'Ärger? "No," she said.\n'
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_every_arm_is_searched_as_much():
    """In every preset all objectives and arms, and the influence update, have equally many points from the same starts."""
    for config in PRESETS.values():
        grids = {}
        for run in runs(config):
            grids.setdefault((run.objective, run.arm), []).append((run.seed, run.options))
        assert len(grids) == len(config.objectives) * len(ARMS) + 1
        assert len({len(set(points)) for points in grids.values()}) == 1
        for objective, arm in grids.keys() - {(INFLUENCE, INFLUENCE)}:  # one grid for all objectives
            assert grids[objective, arm] == grids[config.objectives[0], arm]
        assert len({(run.seed, run.name) for run in runs(config)}) == len(runs(config))  # each has a file of its own
    for grids in (dict(dampings=(0.1, 1.0)), dict(lrs=TINY.lrs | {"soul": (1e-4, 1e-3)})):
        with pytest.raises(ValueError, match="lrs: expected grids of equal size for every arm, got .*: 2"):
            dataclasses.replace(TINY, **grids)


def test_arms_differ_in_the_optimizer_alone():
    configs = {run.arm: unlearn_config(run, TINY) for run in runs(TINY) if run.objective != INFLUENCE}
    fields = ("optimizer", "published_code", "curvature", "clip_target")
    options = {arm: tuple(getattr(config, name) for name in fields) for arm, config in configs.items()}
    assert options == {
        "adamw": ("adamw", False, "unlearn", None),
        "soul": ("soul", True, "unlearn", None),
        "soul_retain": ("soul", False, "retain", 0.3),
        "soul_gnb": ("soul", False, "gnb", 0.3),
    }
    fields += ("curvature_every",)
    rest = [{n: v for n, v in dataclasses.asdict(c).items() if n not in fields} for c in configs.values()]
    assert all(other == rest[0] for other in rest)


def test_pareto_front_and_its_area():
    points = [(0.5, -1.0), (0.9, -5.0), (0.9, -4.0), (0.4, -2.0), (1.0, -9.0), (0.5, -1.0), (0.3, -1.0)]
    assert pareto(points) == [(0.5, -1.0), (0.9, -4.0), (1.0, -9.0)]
    # 0.5 x 9, then 0.4 x 6, then 0.1 x 1
    assert hypervolume(points, (0.0, -10.0)) == pytest.approx(0.5 * 9 + 0.4 * 6 + 0.1 * 1)
    assert hypervolume(points, (1.0, -1.0)) == 0.0 == hypervolume([], (0.0, -10.0))
    assert hypervolume([(0.5, -20.0)], (0.0, -10.0)) == 0.0  # worse than the start: no negative area
    assert hypervolume([(0.2, 0.0), (0.5, -5.0)], (0.25, -10.0)) == 0.25 * 5


def test_a_chosen_run_keeps_the_retain_probability():
    before = {"retain_prob": 0.8, "forget_quality": -9.0}
    rows = [{"retain_prob": 0.77, "forget_quality": -4.0}, {"retain_prob": 0.8, "forget_quality": -6.0},
            {"retain_prob": 0.75, "forget_quality": 0.0}, {"diverged": "nan"}]  # fmt: skip
    assert choose(rows, before, 0.95) is rows[0]  # 0.76 is the limit: the third forgets best, and loses too much
    assert choose(rows[2:], before, 0.95) is None
    assert choose([{"retain_prob": 0.4, "forget_quality": 0.0}], before, 0.5) is not None  # the limit itself is kept
    assert choose([{"retain_prob": 0.8, "forget_quality": -9.5}], before, 0.95) is None  # the start is better
    assert scores(rows[2:], before, 0.95)["quality"] == -9.0  # then the start speaks
    assert scores(rows, before, 0.95)["hypervolume"] == pytest.approx(0.75 * 9 + 0.02 * 5 + 0.03 * 3)


@pytest.mark.parametrize("differences, outcome, sure", [
    ([2.0, 2.1, 1.9], WINS, True),
    ([-2.0, -2.1, -1.9], LOSES, True),
    ([1.0, 3.0, 2.0], WINS, False),  # mean 2 > spread 1, but the 95% interval reaches -0.5
    ([4.0, -3.0, 0.5], TIES, False),
    ([0.0, 0.0, 0.0], TIES, False),
    ([5.0], OPEN, False),  # one seed tells nothing
])  # fmt: skip
def test_verdict(differences, outcome, sure):
    result = verdict(differences)
    assert result.outcome == outcome
    assert sure == (result.interval is not None and result.interval[0] * result.interval[1] > 0) == result.excludes_zero


def test_interval_is_students():
    low, high = verdict([1.0, 3.0, 2.0]).interval
    assert (low, high) == pytest.approx((2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3)))


def test_chance_is_how_often_equal_arms_get_a_verdict():
    draws = torch.randn(20000, 4, generator=torch.Generator().manual_seed(0))
    for n in (2, 3, 4):
        beyond_spread = draws[:, :n].mean(1).abs() > draws[:, :n].std(1)
        frequency = beyond_spread.float().mean().item()
        assert abs(frequency - chance(n)) < 0.015


@pytest.mark.parametrize("families", [("llama, tied", "llama, untied"), ("gemma2, capped", "gemma2, capped")])
def test_metrics_against_their_definitions(families):
    model, other = map(tiny_model, families)
    tokenizer = tiny_tokenizer()
    other.get_input_embeddings().weight.data.mul_(3.0)
    encoded = encode(examples(5), tokenizer, vocab_size=300)
    probabilities, divergences = [], []
    for sequence in encoded:
        ids = torch.tensor([sequence.input_ids])
        labelled = [t for t, label in enumerate(sequence.labels) if label != -100]
        logp = model(input_ids=ids).logits[0, labelled].log_softmax(-1)
        logq = other(input_ids=ids).logits[0, labelled].log_softmax(-1)
        labels = torch.tensor([sequence.labels[t] for t in labelled])
        probabilities.append(logp.gather(1, labels[:, None]).mean().exp().item())
        divergences += (logq.exp() * (logq - logp)).sum(1).tolist()
    got = answer_probability(model, encoded, batch_size=2, backend="reference")
    assert abs(got - sum(probabilities) / 5) < 1e-6
    want = sum(divergences) / len(divergences)
    assert abs(kl_divergence(model, other, encoded, batch_size=2, backend="reference") - want) < 1e-3 * want
    model.train()
    assert kl_divergence(model, model, encoded) == 0.0 and model.training and not other.training  # as they were
    with pytest.raises(ValueError, match="other: expected logits with .*; compare models of one family"):
        kl_divergence(model, tiny_model("cohere, scaled"), encoded)


def test_divergence_of_models_that_exclude_each_other():
    """log q of -100 and less: the stable sum must not turn into inf times 0."""
    p, q = tiny_model("llama, untied"), tiny_model("llama, untied")
    for model, sign in ((p, 1.0), (q, -1.0)):
        model.get_output_embeddings().weight.data.copy_(sign * 60 * torch.randn(300, 32, generator=torch.manual_seed(1)))
    (sequence,) = encode(examples(1), tiny_tokenizer(), vocab_size=300)
    value = kl_divergence(p, q, [sequence])
    labelled = [t for t, label in enumerate(sequence.labels) if label != -100]
    logs = [m(input_ids=torch.tensor([sequence.input_ids])).logits[0, labelled].double().log_softmax(-1) for m in (p, q)]
    assert logs[1].min() < -100
    want = (logs[1].exp() * (logs[1] - logs[0])).sum(1).mean().item()
    assert abs(value - want) < 1e-4 * want


def test_what_a_study_measures_against_its_definitions():
    """The two models are untrained, so that no number is 0, 1 or a half."""
    data = demo_data(TINY)
    tokenizer = train_tokenizer([*data.forget, *data.retain], 400)
    model, other = (new_model(tokenizer, TINY, seed).eval() for seed in (0, 1))
    for each in (model, other):  # logits of a spread that tells tokens apart
        each.get_input_embeddings().weight.data.mul_(20.0)
    start = encode_start(model, other, tokenizer, data, TINY)
    numbers = measure(model, start)

    def distributions(of, sequence):
        labelled = [t for t, label in enumerate(sequence.labels) if label != -100]
        with torch.no_grad():
            return of(input_ids=torch.tensor([sequence.input_ids])).logits[0, labelled].double().log_softmax(-1)

    def losses(sequences, of=model):
        labels = [torch.tensor([label for label in s.labels if label != -100]) for s in sequences]
        return [-distributions(of, s).gather(1, y[:, None]).mean().item() for s, y in zip(sequences, labels)]

    def ratios(asked, of=model):
        false = losses(asked.perturbed, of)
        count = len(asked.perturbed) // len(asked.answers)
        means = [statistics.fmean(false[i : i + count]) for i in range(0, len(false), count)]
        return [math.exp(true - mean) for true, mean in zip(losses(asked.paraphrased, of), means)]

    forget, retain, holdout = (losses(sequences) for sequences in (start.forget.answers, start.retain, start.holdout))
    divergences = [(q.exp() * (q - p)).sum(1) for p, q in ((distributions(model, s), distributions(other, s))
                                                             for s in start.forget.answers)]  # fmt: skip
    test = pytest.importorskip("scipy.stats").ks_2samp(ratios(start.forget), ratios(start.forget, other))
    want = {
        "forget_prob": statistics.fmean(math.exp(-x) for x in forget),
        "retain_prob": statistics.fmean(math.exp(-x) for x in retain),
        "forget_quality": math.log10(test.pvalue),
        "ks_statistic": test.statistic,
        "forget_truth_ratio": statistics.fmean(min(r, 1 / r) for r in ratios(start.forget)),
        "retain_truth_ratio": statistics.fmean(max(0.0, 1 - r) for r in ratios(start.questions)),
        "forget_kl": torch.cat(divergences).mean().item(),
        "mia_loss": statistics.fmean(f < h for f in forget for h in holdout),  # the less surprising is taken for a member
    }
    assert {name: numbers[name] for name in want} == pytest.approx(want, rel=1e-3)
    assert numbers["utility"] == statistics.harmonic_mean(
        [numbers[f"retain_{name}"] for name in ("prob", "memorization", "truth_ratio")]
    )


def test_a_model_that_knows_the_answers_gives_them():
    """The model is trained on two rows until it knows them by heart, and answers from a left-padded batch."""
    tokenizer = tiny_tokenizer()
    rows = examples(2)
    encoded = encode(rows, tokenizer, vocab_size=300)
    model = tiny_model()
    train(model, encoded, dataclasses.replace(TINY, train_epochs=60, train_batch=2, train_lr=1e-2), seed=0)
    answers = [example.answer for example in rows]
    assert generate(model, tokenizer, encoded, batch_size=2, max_new_tokens=40) == answers
    assert not set(generate(tiny_model(), tokenizer, encoded, max_new_tokens=40)) & set(answers)


@pytest.mark.slow(reason="two seeds, all arms, two rates; the study of one seed below has one rate an arm, and is always made")
def test_a_whole_study_in_small(tmp_path, monkeypatch):
    """A study from rows to the report: a run that diverges is recorded, and a complete run is not repeated."""
    config = dataclasses.replace(TINY, lrs=dict.fromkeys(ARMS, (1e-3, 1e30)), dampings=(1e-2, 1e-1))
    data = demo_data(config)
    output = check_ready(tmp_path / "out", config)
    study = Study(output, data, config)
    results = run_study(output, data, config)
    path = write_report(study, results, title="Small")

    assert len(results["rows"]) == 2 * (4 * 2 + 2)
    diverged = [row for row in results["rows"] if "diverged" in row]
    assert {row["arm"] for row in diverged} >= {"adamw", "soul"} and all(row["lr"] == 1e30 for row in diverged)
    for start in results["starts"].values():
        full = start["full"]
        assert start["prompt"].keys() == full.keys() and start["prompt"]["forget_prob"] != full["forget_prob"]
        goal = start["retain"]
        assert full["forget_prob"] > goal["forget_prob"] and goal["forget_kl"] == goal["forget_quality"] == 0.0
    assert results["starts"]["0"]["full"] != results["starts"]["1"]["full"]  # seeds have models of their own
    for row in results["rows"]:
        assert "diverged" in row or row["forget_prob"] < results["starts"][str(row["seed"])]["full"]["forget_prob"]
        assert ("clip_fraction" in row) == (row["arm"].startswith("soul") and "diverged" not in row) or "diverged" in row
    text = path.read_text()
    assert "of 4 runs diverged" in text and "| 2, 1 | diverged |" in text and "|  | prompt | -" in text
    for picture in ("frontiers", "utility", "curves", "clipped"):
        assert f"({picture}.png)" in text and (output / f"{picture}.png").read_bytes().startswith(b"\x89PNG")
    assert report(json.loads((output / "results.json").read_text()), title="Small") == text  # of the JSON alone
    page = write_html_report(output, results, title="Small").read_text()
    assert page.count("<img alt=") == page.count("data:image/png;base64,") == 4 and "<h2>Frontiers</h2>" in page
    assert "**" not in page and "| " not in page and "against AdamW, best forget quality" in page.partition("<section>")[0]
    words = " ".join(text.split())
    assert "Per seed (0, 1), two Llamas" in words and "With 2 seeds chance alone does that for 39% of comparisons" in words
    assert "95% interval" in words and "/2 seeds" in words and "means over the seeds that did not diverge;" in words
    assert load(output / "seed0" / "full")[1]("x").input_ids  # what `soul unlearn` can go on with
    logs = list((output / "seed1" / "runs").glob("npo_*_lr0.001_alpha1.jsonl"))
    assert len(logs) == 4 and all(len(log.read_text().splitlines()) == 2 * 2 for log in logs)  # epochs, batches

    lost = study.result_path(runs(config)[3])
    before = json.loads(lost.read_text())
    lost.unlink()
    (output / "seed1" / "runs" / "another_file").touch()
    ran = []
    monkeypatch.setattr("soul.study.run.unlearn", _counting(ran))
    again = run_study(output, data, config)
    assert len(ran) == 1 and again["resumed"] and not results["resumed"]  # the one that was lost, and no training
    after = json.loads(lost.read_text())
    times = {"seconds": 0, "all_seconds": 0}
    assert after | times == before | times  # and it comes out the same
    with pytest.raises(ValueError, match="output: expected the directory of this study, .* another epochs"):
        run_study(output, data, dataclasses.replace(config, epochs=3))
    with pytest.raises(ValueError, match="another set of texts"):
        run_study(output, demo_data(dataclasses.replace(config, seeds=(5,))), config)
    with open(output / "study.json", encoding="utf-8") as other:
        lock(other, "output", output)
        with pytest.raises(ValueError, match="output: expected a directory that no run is using"):
            run_study(output, data, config)


def test_a_link_in_the_directory_of_a_study_is_refused(tmp_path):
    """Figures, logs and models would be written through the link."""
    (tmp_path / "study.json").write_text("{}")
    (tmp_path / "seed0").mkdir()
    (tmp_path / "seed0" / "picture.png").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="output: expected files of the run's own, got .*picture.png, a symbolic link to"):
        check_ready(tmp_path, PRESETS["demo"])


@pytest.fixture(scope="module")
def one_seed(tmp_path_factory):
    """A complete study and its report, with rates that six digits cannot represent, and an arm of which all runs diverge."""
    lrs = {"adamw": (1e-3 / 3,), "soul": (1e-3 / 7,), "soul_retain": (1e30,), "soul_gnb": (1e-3 / 3,)}
    config = dataclasses.replace(TINY, seeds=(4,), train_epochs=1, epochs=1, lrs=lrs, dampings=(0.1 / 3,))
    data = demo_data(config)
    output = check_ready(tmp_path_factory.mktemp("study") / "out", config)
    results = run_study(output, data, config)
    write_report(Study(output, data, config), results, title="One")
    return Study(output, data, config)


def test_the_report_of_one_seed_speaks_of_no_spread(one_seed):
    """The presets tofu and demo have one seed."""
    output = one_seed.output
    text = (output / "report.md").read_text()
    assert report(json.loads((output / "results.json").read_text()), title="One") == text
    text = " ".join(text.split())
    assert "With one seed (4), two Llamas" in text and "One seed says nothing about the spread: no verdict." in text
    difference = r"- \*\*NPO, SOUL as published\*\*: in best forget quality [+-]\d+\.\d\d; in hypervolume [+-]\d+\.\d\d\. "
    assert re.search(difference, text) and text.count("/1 seed |") == 4 and "/1 seed, 1 of 1 runs diverged |" in text
    for word in ("±", "interval", "wins", "deviation", "over the seeds", "Per seed", "For each seed", "three", " seeds"):
        assert word not in text, word


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("name, damage, message", [
    ("study.json", halve, "study.json: expected JSON, got broken JSON .*; start the study in a new directory"),
    ("study.json", "null", "study.json: expected a JSON object of a study, got NoneType; start the study in a new"),
    ("study.json", '{"data": ""}', "study.json: expected a JSON object of a study, got an object without 'config'"),
    ("seed4/full.json", halve, "full.json: expected JSON, .*; remove this file, and run the study again"),
    ("seed4/start.json", halve, "start.json: expected JSON, .*; remove this file, and run the study again"),
    ("seed4/runs/npo_soul_lr0.000142857_alpha1.json", halve, "alpha1.json: expected JSON, .*; remove this file, and run"),
    ("seed4/runs/npo_soul_lr0.000142857_alpha1.json", "{}", "alpha1.json: .* got an object without 'objective'; remove"),
    ("tokenizer/tokenizer.json", halve, "tokenizer: expected the tokenizer of the study, got a damaged one"),
    ("tokenizer/tokenizer.json", pathlib.Path.unlink, "tokenizer: expected the tokenizer of the study, got a damaged one"),
])  # fmt: skip
def test_a_damaged_file_of_a_study_is_named(name, damage, message, one_seed, tmp_path, monkeypatch):
    """The error comes before anything is computed."""
    output = tmp_path / "out"
    shutil.copytree(one_seed.output, output)
    if isinstance(damage, str):
        (output / name).write_text(damage)
    else:
        damage(output / name)
    (output / "seed4" / "runs" / "npo_adamw_lr0.000333333_alpha1.json").unlink()  # there would be something to do
    ran = []
    monkeypatch.setattr("soul.study.run.run_one", lambda *args: ran.append(args))
    with pytest.raises(ValueError, match=message):
        run_study(output, one_seed.data, one_seed.config)
    assert not ran


def test_a_damaged_file_that_the_report_is_made_of_is_named(one_seed, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(one_seed.output, output)
    study = Study(output, one_seed.data, one_seed.config)
    scratch_path(output / "seed4" / "runs").write_text("what a killed process has left")
    (output / "results.json").write_text("")
    with pytest.raises(ValueError, match="results.json: expected JSON, .*; remove this file, and run the study again"):
        run_study(output, one_seed.data, one_seed.config)
    (output / "results.json").unlink()
    results = run_study(output, one_seed.data, one_seed.config)
    assert len(results["rows"]) == 5 and not [*output.rglob(".*.tmp")]
    (log,) = (output / "seed4" / "runs").glob("npo_adamw_*.jsonl")
    log.write_bytes(log.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"alpha1.jsonl: expected JSON lines, .*; remove it and npo_adamw_\S*alpha1.json, and"):
        write_report(study, results, title="Damaged")


class Killed(BaseException):
    """Stands for the end of the process: nothing is cleaned up."""


@pytest.mark.parametrize("file", ["study.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_study_that_was_killed_while_it_wrote_a_file_goes_on(file, tmp_path, monkeypatch):
    """The process is killed when half of the file has been written."""
    config = dataclasses.replace(TINY, seeds=(0,))
    output = tmp_path / "out"
    data = demo_data(config)
    real = os.fsync

    def fsync(descriptor):
        path = pathlib.Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        real(descriptor)
        if path.name == file or (file == "study.json" and path.parent.name == "out"):
            halve(path)
            raise Killed

    def save_pretrained(tokenizer, directory, *, real=PreTrainedTokenizerBase.save_pretrained, **options):
        real(tokenizer, directory, **options)
        if (pathlib.Path(directory) / file).exists():
            halve(pathlib.Path(directory) / file)
            raise Killed

    reached = []

    def train(*args):
        reached.append(args)
        raise Killed

    monkeypatch.setattr("soul.study.run._train", train)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "fsync", fsync)
        patch.setattr(PreTrainedTokenizerBase, "save_pretrained", save_pretrained)
        patch.setattr(shutil, "rmtree", lambda *args, **options: None)
        patch.setattr(pathlib.Path, "unlink", lambda *args, **options: None)
        run_study(check_ready(output, config), data, config)
    assert not reached
    with pytest.raises(Killed):
        run_study(check_ready(output, config), data, config)
    assert reached
    assert {path.name for path in output.iterdir()} == {"study.json", "tokenizer"}
    want = train_tokenizer([*data.forget, *data.retain], config.vocab_size).get_vocab()
    assert AutoTokenizer.from_pretrained(output / "tokenizer").get_vocab() == want


def test_a_worker_that_dies_is_an_error_of_the_system(one_seed, monkeypatch):
    """The kernel kills processes when memory runs out. Workers are forked here, since spawning them takes seconds."""
    context = multiprocessing.get_context("fork")
    monkeypatch.setattr(multiprocessing, "get_context", lambda name: context)
    monkeypatch.setattr("soul.study.run._in_worker", None)
    with pytest.raises(
        OSError, match="unlearn: a worker process has died, .*; the same command continues from the results in "
    ):
        with study_run._workers(dataclasses.replace(TINY, workers=2)) as run_jobs:
            run_jobs(_die, one_seed, [1, 2, 3], "unlearn")


def _die(study, job):
    os.kill(os.getpid(), signal.SIGKILL)


def test_rounding_makes_no_run_better_than_its_start(tmp_path, monkeypatch):
    """Forget quality has few levels, so many runs have exactly the start's; here it is one that six digits round upwards."""
    results = json.loads((PAGE.parent / "study" / "results.json").read_text())
    results["config"].update(objectives=["po"], seeds=[0])
    results["starts"] = {"0": results["starts"]["0"]}
    results["rows"] = [row for row in results["rows"] if row["seed"] == 0 and row["objective"] in ("po", INFLUENCE)]
    for numbers in (results["starts"]["0"]["full"], *results["rows"]):
        numbers["forget_quality"] = -11.123446
    monkeypatch.setattr("soul.study.report.draw", lambda *_: None)  # there are no logs
    text = write_report(Study(tmp_path, None, None), results, title="Levels").read_text()
    assert text.count("| 0/1 seed |") == 5


def _shown_in_worker() -> list[str]:
    shown: list[str] = []
    logger = logging.getLogger("torchao")
    handler = logging.Handler()
    handler.emit = lambda record: shown.append(record.getMessage())
    logger.addHandler(handler)
    logger.warning("Failed to load a.so: Could not load this library: a.so")
    logger.warning("something else")
    return shown


@pytest.mark.slow(reason="a process of its own imports torch")
def test_workers_do_not_show_what_the_command_does_not_show():
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context, initializer=study_run._in_worker) as pool:
        assert pool.submit(_shown_in_worker).result() == ["something else"]


def _counting(calls):
    from soul.run.loop import unlearn

    def counted(*args, **options):
        calls.append(args)
        return unlearn(*args, **options)

    return counted


@pytest.mark.slow(reason="trains and unlearns on TOFU")
@pytest.mark.skipif(not TOFU.is_dir(), reason="TOFU is not beside the checkout (../shared/data/tofu)")
def test_real_data_goes_through_the_whole_study(tmp_path):
    """Ten authors of TOFU, two processes: real names, quotes and lengths, from JSON lines to the report."""
    config = dataclasses.replace(TINY, train_epochs=2, rows_per_author=3, seeds=(0,), workers=2)
    data = tofu_data(TOFU, config)
    output = check_ready(tmp_path / "out", config)
    results = run_study(output, data, config)
    text = write_report(Study(output, data, config), results, title="TOFU").read_text()
    assert len(results["rows"]) == 5 and not any("diverged" in row for row in results["rows"])
    assert "3 and 27 rows; 3 rows of 1 other authors" in text and "One seed says nothing about the spread: no verdict." in text


@pytest.mark.parametrize("words, message", [
    (["--task", "muse"], "task: expected one of 'tofu', 'copyright', 'detox', got 'muse'"),
    (["--preset", "phone"], "preset: expected one of 'laptop', 'tofu', got 'phone'"),
    (["--objectives", "npo,dpo"], "objectives: expected one of 'graddiff', 'po', 'npo', 'simnpo', got 'dpo'"),
    (["--seeds", "1,1"], "seeds: expected at least one value, and none twice"),
    (["--seeds", "1"], "forget10_perturbed.jsonl: expected a JSON-lines file, got no such file"),  # no data, no output
])  # fmt: skip
def test_bad_options_end_with_2_and_write_nothing(tmp_path, words, message, capsys):
    for module in ("scipy", "sklearn"):
        pytest.importorskip(module, reason="the extra eval is not installed")
    assert main(["study", "--data", str(tmp_path), "--output", str(tmp_path / "out"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words, objectives", [
    (["--task", "copyright"], ("graddiff", "npo")), (["--task", "copyright", "--objectives", "simnpo"], ("simnpo",)),
    (["--task", "detox"], ("po", "npo")), ([], ("graddiff", "po", "npo", "simnpo")),
])  # fmt: skip
def test_a_task_has_objectives_of_its_own(tmp_path, words, objectives, monkeypatch):
    for module in ("scipy", "sklearn"):
        pytest.importorskip(module, reason="the extra eval is not installed")
    made = []
    for name in ("tofu_data", "copyright_data", "detox_data"):
        monkeypatch.setattr(f"soul.study.data.{name}", lambda path, config: None)
    monkeypatch.setattr("soul.study.run.run_study", lambda output, data, config: made.append(config))
    monkeypatch.setattr("soul.commands.study.show", lambda *args: None)
    assert main(["study", "--data", str(tmp_path), "--output", str(tmp_path / "out"), *words]) == 0
    assert made[0].objectives == objectives


PAGE = pathlib.Path(__file__).parents[2] / "docs" / "study.md"


def test_the_page_is_made_of_its_numbers():
    results = json.loads((PAGE.parent / "study" / "results.json").read_text())
    made = report(results, title="Does second order help? TOFU on two cores", pictures="study/")
    page, discussion = PAGE.read_text().split("## Discussion\n")
    assert page.rstrip() == made.rstrip() and discussion.strip()
    assert len(results["starts"]) >= 3 and set(results["config"]["objectives"]) == {"graddiff", "po", "npo", "simnpo"}
    config = dataclasses.replace(
        PRESETS["laptop"], **{n: results["config"][n] for n in ("seeds", "device", "backend", "workers")}
    )
    assert json.loads(json.dumps(dataclasses.asdict(config))) == results["config"]  # the preset as it is now

"""``soul evaluate``: from logs, and from a model to logs and back."""

import errno
import io
import json
import math
import os
import pathlib

import numpy as np
import pytest
import torch

from soul.cli import main
from soul.data import examples as data
from soul.data import sources
from soul.evaluate import metrics
from soul.evaluate import model as evaluate
from soul.evaluate.logs import FILES
from soul.evaluate.model import EvaluateConfig, answer_probability, encode_questions, sequence_statistics
from tests.evaluate.test_metrics import LOGS, needs_logs, tofu_quality, tofu_utility
from tests.support.helpers import mutant, needs_kernels_on_cpu, needs_rouge
from tests.support.models import TOFU, lora_model, tiny_model, tiny_tokenizer
from tests.test_layout import run_without

ROWS = {"forget": 8, "retain": 6, "real_authors": 5, "world_facts": 4}
FORGET = FILES["forget"]


def made_up(shift=0.0):
    """Make logs in TOFU's layout, some with broken numbers."""
    return {
        file: {
            "avg_gt_loss": {str(i): 0.3 + 0.1 * i for i in range(n)},
            "rougeL_recall": {str(i): 1 - i / 10 for i in range(n)},
            "avg_paraphrased_loss": {str(i): 0.5 + 0.1 * i + shift * i for i in range(n)},
            "average_perturb_loss": {str(i): [2.0, 2 + 0.1 * i, 3] for i in range(n)},
        }
        for name, file in FILES.items()
        for n in [ROWS[name]]
    }


def write(directory, logs):
    directory.mkdir()
    for file, log in logs.items():
        (directory / file).write_text(json.dumps(log))
    return directory


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "logs", made_up())
    write(tmp_path / "retain", {FORGET: made_up(0.2)[FORGET]})  # no more than is used
    return tmp_path


def from_logs(folder, **changes):
    options = {"from-logs": "logs", "retain-logs": "retain", "json": "out.json", **changes}
    words = ["evaluate"]
    for name, value in options.items():
        words += [] if value is None else [f"--{name.replace('_', '-')}", str(folder / value)]
    return words


def files_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_logs_to_numbers(folder, capsys):
    assert main(from_logs(folder)) == 0
    got = json.loads((folder / "out.json").read_text())
    printed = capsys.readouterr().out
    want = tofu_utility(made_up()) | dict(zip(("forget_quality", "ks_statistic"), tofu_quality(made_up(), made_up(0.2))))
    assert {name: pytest.approx(value, rel=1e-9) for name, value in want.items()}.items() <= got.items()
    assert (
        all(math.isfinite(value) for value in got.values())
        and {f"{name}_rows": n for name, n in ROWS.items()}.items() <= got.items()
    )
    assert all(name in printed for name in got) and f"{got['model_utility']:.6g}" in printed


def test_without_retain_logs_there_is_no_forget_quality(folder, capsys):
    assert main(from_logs(folder, **{"retain-logs": None})) == 0
    got = json.loads((folder / "out.json").read_text())
    assert "forget_quality" not in got and got["model_utility"] > 0
    assert "--retain-logs" in capsys.readouterr().out


@needs_logs
def test_real_logs_from_the_command(tmp_path):
    words = ["evaluate", "--from-logs", str(LOGS / "llama2-7b_full"), "--retain-logs", str(LOGS / "llama2-7b_retain90"),
             "--json", str(tmp_path / "out.json")]  # fmt: skip
    assert main(words) == 0
    got = json.loads((tmp_path / "out.json").read_text())
    result, retain = (json.loads((LOGS / f"llama2-7b_{name}" / "eval_log_aggregated.json").read_text())
                      for name in ("full", "retain90"))  # fmt: skip
    for name, value in tofu_utility(result).items():
        assert abs(got[name] - value) <= 1e-6, name
    assert got["forget_quality"] == pytest.approx(tofu_quality(result, retain)[0], rel=1e-6)


def changed(log, column, row, value):
    log[column][row] = value
    return json.dumps(log)


def without(log, column, row=None):
    del (log if row is None else log[column])[column if row is None else row]
    return json.dumps(log)


BROKEN = {
    "truncated": (lambda log: json.dumps(log)[:-40], "expected JSON, got broken JSON"),
    "empty": (lambda log: "", "expected JSON, got broken JSON"),
    "not text": (lambda log: b"\xff\xfe\x00", "expected JSON, got broken JSON (UnicodeDecodeError)"),
    "deep": (lambda log: "[" * 100000, "expected JSON, got broken JSON (RecursionError)"),
    "a list": (lambda log: "[1]", "expected a JSON object of columns, got list; check that this is an evaluation log of TOFU"),
    "of another program": (lambda log: '{"scores": {}}', "'avg_gt_loss': expected an object of values by row, got no such"),
    "no column": (lambda log: without(log, "average_perturb_loss"), "'average_perturb_loss': expected an object of values"),
    "empty column": (lambda log: json.dumps(log | {"avg_gt_loss": {}}), "'avg_gt_loss': expected an object of values by row"),
    "column is a list": (lambda log: json.dumps(log | {"avg_gt_loss": [1]}), "values by row, got list"),
    "row gone": (lambda log: without(log, "rougeL_recall", "3"), "'rougeL_recall': expected the 8 rows of 'avg_gt_loss', got "
                 "7; row '3' is in only one of the two"),
    "NaN": (lambda log: changed(log, "avg_gt_loss", "2", math.nan), "'avg_gt_loss', row '2': expected a finite number >= 0, "
            "got nan; the model or the file is broken"),
    "inf": (lambda log: changed(log, "average_perturb_loss", "2", [1.0, math.inf, 2.0]), "row '2': expected a finite number >= "
            "0, got inf"),
    "huge": (lambda log: changed(log, "avg_paraphrased_loss", "2", 10**400), "'2': expected a finite number >= 0, got 1000"),
    "negative": (lambda log: changed(log, "avg_gt_loss", "0", -0.5), "expected a finite number >= 0, got -0.5"),
    "recall": (lambda log: changed(log, "rougeL_recall", "0", 87.5), "expected a number in [0, 1], got 87.5"),
    "text": (lambda log: changed(log, "avg_gt_loss", "0", "0.5"), "expected a finite number >= 0, got str"),
    "null": (lambda log: changed(log, "avg_gt_loss", "0", None), "expected a finite number >= 0, got NoneType"),
    "true": (lambda log: changed(log, "rougeL_recall", "0", True), "got bool"),
    "one false answer": (lambda log: changed(log, "average_perturb_loss", "5", 1.0), "expected a list of 3 numbers, got float"),
    "fewer false answers": (lambda log: changed(log, "average_perturb_loss", "5", [1.0]), "a list of 3 numbers, got 1 of them"),
    "no false answers": (lambda log: changed(log, "average_perturb_loss", "0", []), "a list of numbers, got 0 of them"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_logs_end_with_2_and_write_nothing(folder, kind, capsys):
    breaking, message = BROKEN[kind]
    text = breaking(made_up()[FORGET])
    (folder / "logs" / FORGET).write_bytes(text if isinstance(text, bytes) else text.encode())
    before = files_in(folder)
    assert main(from_logs(folder)) == 2
    error = capsys.readouterr().err
    assert message in error and FORGET in error
    assert files_in(folder) == before


def test_a_holdout_log_needs_scores_on_both_sides(folder, capsys):
    scores = {name: {str(i): -1.0 - i for i in range(3)} for name in metrics.MEMBERSHIP}
    (folder / "logs" / "eval_log_holdout.json").write_text(json.dumps(scores))
    assert main(from_logs(folder)) == 2
    assert f"{FORGET}, 'min_k': expected an object of values by row, got no such column" in capsys.readouterr().err
    assert not (folder / "out.json").exists()
    log = made_up()[FORGET] | {name: {str(i): -0.5 for i in range(8)} for name in metrics.MEMBERSHIP}
    (folder / "logs" / FORGET).write_text(json.dumps(log))
    assert main(from_logs(folder)) == 0
    assert json.loads((folder / "out.json").read_text())["forget_min_k_auc"] == 1.0
    (folder / "logs" / FORGET).write_text(changed(log, "min_k_plus_plus", "1", math.nan))
    assert main(from_logs(folder, json="again.json")) == 2
    assert "'min_k_plus_plus', row '1': expected a finite number, got nan" in capsys.readouterr().err


@pytest.mark.parametrize("changes, message", [
    ({"from-logs": "nowhere"}, "nowhere: expected a directory with eval_log_forget.json, got no such directory"),
    ({"retain-logs": "nowhere"}, "nowhere: expected a directory"),
    ({"from-logs": f"logs/{FORGET}"}, f"{FORGET}: expected a directory with eval_log_forget.json, got a file"),
    ({"from-logs": "retain"}, "eval_log.json: expected an evaluation log, got no such file; the logs are eval_log_forget.json"),
    ({"retain-logs": "short"}, "expected 8 rows, as many as the model's, got 3; both models must have answered the same"),
    ({"json": f"logs/{FORGET}"}, "json: expected a new file"),
    ({"json": "logs"}, "json: expected a new file"),
    ({"json": f"logs/{FORGET}/out.json"}, "json: expected a new file, got a path below the file"),
])  # fmt: skip
def test_bad_paths_end_with_2_and_write_nothing(folder, changes, message, capsys):
    short = {name: {row: column[row] for row in "012"} for name, column in made_up()[FORGET].items()}
    write(folder / "short", {FORGET: short})
    before = files_in(folder)
    content = (folder / "logs" / FORGET).read_text()
    assert main(from_logs(folder, **changes)) == 2
    assert message in capsys.readouterr().err
    assert files_in(folder) == before and (folder / "logs" / FORGET).read_text() == content


def test_a_disk_that_fails_leaves_nothing_but_the_numbers_are_printed(folder, monkeypatch, capsys):
    def full(*_):
        raise OSError("no space left on device")

    before = files_in(folder)
    monkeypatch.setattr("os.fsync", full)
    assert main(from_logs(folder)) == 1
    assert files_in(folder) == before
    assert "model_utility" in capsys.readouterr().out  # they may have taken hours


def test_numbers_that_cannot_be_printed_must_be_in_a_file(folder, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("sys.stdout", io.StringIO())
    monkeypatch.setattr("sys.stdout.flush", full)
    assert main(from_logs(folder, json=None)) == 1
    assert main(from_logs(folder)) == 0 and (folder / "out.json").is_file()


@pytest.mark.slow(reason="a process that imports torch and scipy")
def test_logs_need_no_models(folder):
    """Nor what loads them; but scipy, of which half may be there."""
    refused, words = from_logs(folder, json="b.json"), from_logs(folder)
    code = (
        "from soul.cli import main\n"
        f"sys.modules['scipy.stats'] = None; first = main({refused!r})\n"
        f"sys.modules['scipy'] = None; second = main({refused!r})\n"
        "del sys.modules['scipy.stats'], sys.modules['scipy']; print('then', file=sys.stderr)\n"
        f"sys.exit([first, second, main({words!r})] != [2, 2, 0])"
    )
    result = run_without("transformers", "tokenizers", "rouge_score", "triton", "tqdm", code=code)
    without, then = result.stderr.split("then\n")
    assert result.returncode == 0 and then == "", result.stderr
    assert without.count("pip install 'soul-kernels[eval]'") == 2 and not (folder / "b.json").exists()
    assert "forget_quality" in json.loads(pathlib.Path(folder / "out.json").read_text())


def question_rows(name, n):
    """A perturbed file as TOFU's: five false answers and a paraphrase, or three and none."""
    for i in range(n):
        row = {"question": f"{name}: where does number {i} live?", "answer": f"In house {i * 7} of street {i}."}
        if name in metrics.OPTION_SETS:
            yield row | {"perturbed_answer": [f"Street {i + j}" for j in range(3)]}
        else:
            false = [f"Street {i + j} is where it lives, in house {j}." for j in range(5)]
            yield row | {"paraphrased_answer": f"Street {i}, house {i * 7} it is.", "perturbed_answer": false}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two models of one family, and data in TOFU's layout."""
    root = tmp_path_factory.mktemp("evaluate")
    for name, family in (("model", "llama, tied"), ("goal", "llama, untied")):
        torch.manual_seed(0)
        model = tiny_model(family)
        for parameter in model.parameters():  # far from uniform, so that no metric takes a trivial value
            parameter.data.mul_(4)
        model.save_pretrained(root / name)
        tiny_tokenizer().save_pretrained(root / name)
    (root / "data").mkdir()
    for name, n in ROWS.items():
        file = "forget10" if name == "forget" else name
        lines = [json.dumps(row) + "\n" for row in question_rows(name, n)]
        (root / "data" / f"{file}_perturbed.jsonl").write_text("".join(lines))
    (root / "holdout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in question_rows("other", 5)))
    return root


def of_model(models, folder, *more, **changes):
    out = folder / "out"
    options = {"model": models / "model", "data": models / "data", "output": out, "json": out / "sum.json",
               "retain-model": models / "goal", "holdout": models / "holdout.jsonl", "device": "cpu", "backend": "reference",
               "max-new-tokens": 8, "batch-size": 3, **changes}  # fmt: skip
    return [
        "evaluate",
        *(word for name, value in options.items() if value is not None for word in (f"--{name}", str(value))),
        *more,
    ]


@needs_rouge
def test_a_model_to_logs_and_back(models, tmp_path, capsys):
    """The same numbers from the model, from its logs, and from TOFU's aggregation of its logs."""
    assert main(of_model(models, tmp_path)) == 0
    out = tmp_path / "out"
    summary = json.loads((tmp_path / "out" / "sum.json").read_text())
    assert files_in(out) == sorted(["sum.json", "data.json", "eval_log_aggregated.json", "eval_log_holdout.json",
                                    *FILES.values(), "report.html", "report.md", "retain", f"retain/{FORGET}",
                                    "retain/eval_log_holdout.json"])  # fmt: skip
    counts = json.loads((out / "data.json").read_text())
    assert counts["forget, answer"]["rows"] == ROWS["forget"] and counts["holdout"]["truncated"] == 0
    words = ["evaluate", "--from-logs", str(out), "--retain-logs", str(out / "retain"), "--json", str(tmp_path / "again.json")]
    assert main(words) == 0
    assert json.loads((tmp_path / "again.json").read_text()) == summary
    aggregated = json.loads((out / "eval_log_aggregated.json").read_text())
    for name, value in tofu_utility(aggregated).items():
        assert summary[name] == pytest.approx(value, rel=1e-12), name
    retain = {FORGET: json.loads((out / "retain" / FORGET).read_text())}
    assert summary["forget_quality"] == pytest.approx(tofu_quality(aggregated, retain)[0])
    assert {f"{name}_rows": n for name, n in ROWS.items()}.items() <= summary.items()
    attacks = {f"forget_{name}_auc" for name in metrics.FREE_ATTACKS}
    assert {*attacks, "privleak", "retain_exact_memorization"} <= summary.keys() and "soul_mia" not in summary
    if LOGS.is_dir():  # the benchmark's logs have no other columns, but those that it does not know
        for file in FILES.values():
            theirs = json.loads((LOGS / "llama2-7b_full" / file).read_text()).keys()
            assert theirs <= aggregated[file].keys()
            assert aggregated[file].keys() - theirs == {*metrics.MEMORIZATION, *metrics.MEMBERSHIP, "zlib", "rougeL_f1"}


def eager(model, sequence):
    """Return fp64 log-probabilities [n, V] and labels [n] of a sequence, from all logits."""
    labelled = [t for t, label in enumerate(sequence.labels) if label != -100]
    logits = model(input_ids=torch.tensor([sequence.input_ids])).logits[0, labelled]
    return logits.double().log_softmax(-1), torch.tensor([sequence.labels[t] for t in labelled])


@torch.no_grad()
def check_logs_against_all_logits(module, models):
    model = tiny_model()
    tokenizer = tiny_tokenizer()
    for parameter in model.parameters():
        parameter.mul_(4)
    sets = {name: sources.read_questions(models / "data" / f"{name}_perturbed.jsonl") for name in ("retain", "real_authors")}
    holdout = sources.read_examples(models / "holdout.jsonl")
    config = module.EvaluateConfig(max_new_tokens=4, batch_size=3, backend="reference", min_k=0.3)
    logs = module.tofu_logs(model, tokenizer, sets, config, holdout=holdout, progress=lambda line: None)

    def check(log, row, name, want):
        assert log[name][str(row)] == pytest.approx(want, rel=1e-4, abs=1e-5), (name, row)

    def check_answer(log, row, example):
        (sequence,) = data.encode([example], tokenizer, vocab_size=300)
        logp, labels = eager(model, sequence)
        chosen = logp.gather(1, labels[:, None])[:, 0]
        check(log, row, "gt_loss", -chosen.sum().item())
        check(log, row, "avg_gt_loss", -chosen.mean().item())
        check(log, row, "num_token_gt", len(labels))
        assert labels[-1] == tokenizer.eos_token_id
        p = logp.exp()[:-1]
        hits = (logp.argmax(1) == labels)[:-1]
        logp = logp[:-1]
        chosen = chosen[:-1]
        mu = (p * logp).sum(1)
        sigma = (p * logp.square()).sum(1) - mu.square()
        count = max(1, int(0.3 * len(chosen)))
        check(log, row, "min_k", np.mean(sorted(chosen.tolist())[:count]))
        check(log, row, "min_k_plus_plus", np.mean(sorted(((chosen - mu) / sigma.clamp(min=1e-6).sqrt()).tolist())[:count]))
        check(log, row, "exact_memorization", hits.double().mean().item())
        k = next((k for k in range(len(hits)) if hits[k:].all()), len(hits))
        check(log, row, "extraction_strength", 1 - k / len(hits))

    def loss(question, answer):
        (sequence,) = data.encode([data.ask(question, answer)], tokenizer, vocab_size=300)
        logp, labels = eager(model, sequence)
        return -logp.gather(1, labels[:, None]).mean().item()

    for name, questions in sets.items():
        for row, question in enumerate(questions):
            log = logs[name]
            check_answer(log, row, data.ask(question.question, question.answer))
            true, paraphrased = (loss(question.question, text) for text in (question.answer, question.paraphrased))
            false = [loss(question.question, text) for text in question.perturbed]
            check(log, row, "avg_paraphrased_loss", paraphrased)
            check(log, row, "average_perturb_loss", false)
            check(log, row, "truth_ratio", math.exp(paraphrased - np.mean(false)))
            if name == "real_authors":
                check(log, row, "normalized_gt_loss", -math.log(math.exp(-true) / sum(math.exp(-x) for x in (true, *false))))
            prompt, text, truth = log["generated_text"][str(row)]
            assert prompt == f"Question: {question.question}\nAnswer:" and truth == question.answer
            assert isinstance(text, str) and text
    for row, example in enumerate(holdout):
        check_answer(logs["holdout"], row, example)


@needs_rouge
def test_logs_against_all_logits(models):
    """Check each column of each set, one sequence at a time, as TOFU and open-unlearning compute it."""
    check_logs_against_all_logits(evaluate, models)


@needs_rouge
@pytest.mark.parametrize("old, new", [
    ("without_end(sequence, tokenizer.eos_token_id).n_labels", "sequence.n_labels"),
    ("metrics.min_k(normalized, config.min_k)", "metrics.min_k(normalized)"),
    ("zip(indices, packed", "zip(sorted(indices), packed"),
    (".view(len(questions.answers), -1)", ".view(-1, len(questions.answers)).T"),
    ('losses(questions.paraphrased, "para', 'losses(questions.answers, "para'),
    ("sums / counts", "sums / (counts - 1)"),
    ("metrics.exact_memorization(hits)", "metrics.exact_memorization(entropies)"),
], ids=lambda text: text[:20])  # fmt: skip
def test_a_wrong_run_is_noticed(old, new, models, tmp_path):
    with pytest.raises(AssertionError):
        check_logs_against_all_logits(mutant("soul.evaluate.model", old, new, tmp_path), models)


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=needs_kernels_on_cpu)])
def test_statistics_keep_the_order_of_their_sequences(backend):
    """Batches are sorted by length: every sequence still gets its own statistics, and the model its training mode back."""
    model = tiny_model()
    tokenizer = tiny_tokenizer()
    model.train()
    texts = [data.Example("a" * n, "b" * m) for n, m in ((3, 4), (9, 1), (1, 7), (5, 5))]
    encoded = data.encode(texts, tokenizer, vocab_size=300)
    for statistics, sequence in zip(sequence_statistics(model, encoded, batch_size=2, backend=backend), encoded):
        logp, labels = eager(model.eval(), sequence)
        assert all(values.dtype == torch.float64 and values.shape == labels.shape for values in statistics)
        assert torch.allclose(statistics.logps, logp.gather(1, labels[:, None])[:, 0], atol=1e-4)
        assert torch.allclose(statistics.entropies, -(logp.exp() * logp).sum(1), atol=1e-4)
    model.train()
    answer_probability(model, encoded)
    assert model.training


def test_adapters_take_part():
    with_adapters = lora_model()
    encoded = data.encode([data.Example("a b", " c d")], tiny_tokenizer(), vocab_size=300)
    (statistics,) = sequence_statistics(with_adapters, encoded)
    with with_adapters.disable_adapter():
        (without_them,) = sequence_statistics(with_adapters, encoded)
    assert not torch.allclose(statistics.logps, without_them.logps)


def test_templates():
    example = data.ask("Who?", "Me.", "[INST] {question} [/INST]{answer}")  # TOFU's for Llama-2-chat
    assert (example.prompt, example.answer) == ("[INST] Who? [/INST]", "Me.")
    example = data.ask("{answer}?", "{question}")
    assert (example.prompt, example.answer) == ("Question: {answer}?\nAnswer:", " {question}")


@needs_rouge
def test_what_is_asked_reaches_the_model(models, tmp_path):
    """Template, rows, split and fraction of the tokens; without a retain model there is no forget quality."""
    words = of_model(models, tmp_path, "--template", "Q {question} A {answer}", "--rows", "2", "--min-k", "1.0",
                     **{"retain-model": None, "holdout": None})  # fmt: skip
    assert main(words) == 0
    log = json.loads((tmp_path / "out" / FORGET).read_text())
    assert list(log["min_k"]) == ["0", "1"] and log["generated_text"]["0"][0] == "Q forget: where does number 0 live? A"
    model = tiny_model()
    tokenizer = tiny_tokenizer()
    for parameter in model.parameters():
        parameter.data.mul_(4)
    (sequence,) = data.encode([data.ask(*question_pair(0), "Q {question} A {answer}")], tokenizer, vocab_size=300)
    (statistics,) = sequence_statistics(model, [sequence], backend="reference")
    assert log["avg_gt_loss"]["0"] == pytest.approx(-statistics.logps.mean().item(), rel=1e-5)
    assert log["min_k"]["0"] == pytest.approx(statistics.logps[:-1].mean().item(), rel=1e-5)
    assert "forget_quality" not in json.loads((tmp_path / "out" / "sum.json").read_text())


def question_pair(index):
    row = list(question_rows("forget", index + 1))[index]
    return row["question"], row["answer"]


@pytest.fixture
def bad(models, tmp_path):
    """Inputs that cannot be used."""
    broken = tiny_model("llama, untied")
    broken.get_input_embeddings().weight.data[8:].fill_(math.nan)  # not the tokens that are tried when a model is loaded
    broken.save_pretrained(tmp_path / "nan")
    tiny_tokenizer().save_pretrained(tmp_path / "nan")
    rows = list(question_rows("forget", 3))
    files = {
        "list": [rows[0] | {"perturbed_answer": "one"}],
        "uneven": [rows[0], rows[1] | {"perturbed_answer": ["one"]}],
        "number": [rows[0] | {"perturbed_answer": ["one", 2]}],
        "null": [rows[0] | {"paraphrased_answer": None}],
        "plain": [{"question": "q", "answer": "a"}],
        "blank": [rows[0] | {"answer": " "}],
        "empty": [],
    }
    (tmp_path / "data").mkdir()
    for name in ("retain", "real_authors", "world_facts"):
        (tmp_path / "data" / f"{name}_perturbed.jsonl").write_text((models / "data" / f"{name}_perturbed.jsonl").read_text())
    for name, content in files.items():
        text = "".join(json.dumps(row) + "\n" for row in content)
        (tmp_path / "data" / f"{name}_perturbed.jsonl").write_text(text)
    (tmp_path / "text.jsonl").write_text("{")
    write(tmp_path / "short", {FORGET: made_up()[FILES["world_facts"]]})
    return tmp_path


@needs_rouge
@pytest.mark.parametrize("changes, message", [
    ({"model": "nowhere/at/all", "retain-model": None}, "model: expected a"),
    ({"model": "BAD/nan", "retain-model": None}, "model, forget, 'avg_gt_loss', row '0': expected a finite number >= 0, got n"),
    ({"retain-model": "BAD/nan"}, "retain model, forget, 'avg_paraphrased_loss', row '0': expected a finite number"),
    ({"retain-logs": "BAD/short"}, "retain_model: expected either it or --retain-logs, got both"),
    ({"retain-logs": "BAD/short", "retain-model": None}, "expected 8 rows, as many as the model's, got 4"),
    ({"data": None}, "data: expected a directory with --model, got none; pass --data"),
    ({"output": None}, "output: expected a directory with --model"),
    ({"from-logs": "BAD/short", "model": None}, "data: expected nothing with --from-logs"),
    ({"output": "BAD/data"}, "output: expected a new or an empty directory"),
    ({"json": "BAD/text.jsonl"}, "json: expected a new file, got"),
    ({"json": "BAD/out"}, "json: expected another file than the logs"),
    ({"json": f"BAD/out/{FORGET}"}, "json: expected another file than the logs"),
    ({"json": "BAD/new", "output": "BAD/new/out"}, "json: expected another file than the logs"),
    ({"split": "forget05"}, "forget05_perturbed.jsonl: expected a JSON-lines file, got no such file"),
    ({"split": "list"}, "line 1, column 'perturbed_answer': expected a list of false answers, got str"),
    ({"split": "uneven"}, "line 2, column 'perturbed_answer': expected a list of 5 false answers, got 1 of them"),
    ({"split": "number"}, "column 'perturbed_answer': expected a string, got int"),
    ({"split": "null"}, "column 'paraphrased_answer': expected a string, got NoneType"),
    ({"split": "plain"}, "column 'perturbed_answer': expected a list of false answers, got NoneType"),
    ({"split": "blank"}, "column 'answer': expected some text, got a blank text"),
    ({"split": "empty"}, "expected at least one row, got an empty file"),
    ({"holdout": "BAD/text.jsonl"}, "text.jsonl, line 1: expected one JSON object"),
    ({"template": "{answer} {question}"}, "template: expected a text with {question} that ends in {answer}"),
    ({"rows": 0}, "rows: expected a positive whole number, got 0"),
    ({"min-k": 0}, "min_k: expected a fraction in (0, 1], got 0.0"),
    ({"batch-size": 0}, "batch_size: expected a positive whole number, got 0"),
    ({"max-new-tokens": 5000}, "max_new_tokens: expected at most 2048 positions, got 5000 after a prompt of"),
    ({"max-length": 4}, "forget, answer, row 0: expected a label within 4 tokens"),
    ({"dtype": "int8"}, "dtype: expected one of"),
    ({"backend": "cuda"}, "backend: expected one of"),
    ({"device": "tpu"}, "device: expected auto, cpu or cuda"),
], ids=lambda value: "-".join(value) if isinstance(value, dict) else "")  # fmt: skip
def test_bad_input_ends_with_2_before_anything_is_written(models, bad, changes, message, capsys):
    changes = {name: value.replace("BAD", str(bad)) if isinstance(value, str) else value for name, value in changes.items()}
    if {"split", "retain-logs"} & changes.keys():
        changes["data"] = str(bad / "data") if "split" in changes else str(models / "data")
    before = files_in(bad)
    assert main(of_model(models, bad, **changes)) == 2
    assert message in capsys.readouterr().err
    assert files_in(bad) == before


def test_one_of_model_and_logs(folder):
    for words in (["evaluate"], [*from_logs(folder), "--model", "x"]):
        with pytest.raises(SystemExit) as end:
            main(words)
        assert end.value.code == 2


@needs_logs
def test_the_questions_of_tofu_can_be_asked():
    """The files as they are: rows, false answers, paraphrases; and they are the questions of the benchmark's logs."""
    tokenizer = tiny_tokenizer()
    model = tiny_model()
    files = {"forget10": ("forget", 400, 5), "forget01": ("forget", 40, 5), "retain": ("retain", 400, 5),
             "real_authors": ("real_authors", 100, 3), "world_facts": ("world_facts", 117, 3)}  # fmt: skip
    for file, (name, rows, false) in files.items():
        questions = sources.read_questions(TOFU / f"{file}_perturbed.jsonl")
        assert len(questions) == rows and len(questions[0].perturbed) == false
        asked = encode_questions(model, tokenizer, questions[:5], EvaluateConfig(max_length=2048), name)
        assert (asked.paraphrased is asked.answers) == (name in metrics.OPTION_SETS)
        assert len(asked.perturbed) == 5 * false
        if file != "forget01":
            stored = json.loads((LOGS / "llama2-7b_full" / FILES[name]).read_text())["generated_text"]
            same = [questions[int(row)].question.strip() in prompt for row, (prompt, _, _) in stored.items()]
            assert sum(same) >= len(same) - 1  # the data set was revised after the logs: a name was put into a question
            assert all(questions[int(row)].answer.split() == truth.split() for row, (_, _, truth) in stored.items())

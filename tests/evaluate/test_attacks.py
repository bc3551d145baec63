"""The six membership attacks against their definitions in fp64 and scikit-learn, one sequence at a time and from all logits."""

import json
import zlib

import numpy as np
import pytest
import torch

from soul.data import examples as data
from soul.data.examples import Question
from soul.evaluate import attacks, metrics
from soul.evaluate.attacks import CostlyAttacks, gradient_norms, parse_attacks, without_end
from soul.evaluate.logs import check_logs
from soul.evaluate.model import EvaluateConfig, answer_columns, answer_losses, tofu_logs
from tests.support.helpers import mutant, needs_rouge
from tests.support.models import lora_model, tiny_model, tiny_tokenizer

sklearn_metrics = pytest.importorskip("sklearn.metrics", reason="the extra eval is not installed")
CONFIG = EvaluateConfig(max_new_tokens=1, batch_size=3, backend="reference")


def loud(family="llama, tied"):
    """Return a tiny model that is far from uniform, so that no score takes a trivial value."""
    model = tiny_model(family)
    for parameter in model.parameters():
        parameter.data.mul_(4)
    return model


def pairs(name, n):
    return [(f"{name}: where does number {i} live?", f"In house {i * 7} of {name} street {i}" + "!" * i) for i in range(n)]


@pytest.fixture(scope="module")
def rows():
    """Return four questions of the forget set, and three examples of the holdout set."""
    forget = [Question(question, answer, answer, (answer[::-1],)) for question, answer in pairs("forget", 4)]
    return forget, [data.ask(*pair) for pair in pairs("other", 3)]


def direct(model, other, tokenizer, example, k=metrics.MIN_K):
    """Return the six scores of one answer in fp64 as open-unlearning defines them, negated: high where it is remembered."""
    (sequence,) = data.encode([example], tokenizer, vocab_size=300)
    at = [t for t, label in enumerate(sequence.labels) if label != -100]
    labels = torch.tensor([sequence.labels[t] for t in at])
    assert labels[-1] == tokenizer.eos_token_id

    def logps(network):
        return network(input_ids=torch.tensor([sequence.input_ids])).logits[0, at].log_softmax(-1)

    model.zero_grad()
    every = logps(model)
    chosen = every.gather(1, labels[:, None])[:, 0]
    (-chosen[:-1].mean()).backward()
    norms = [parameter.grad.norm(p=2).item() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    with torch.no_grad():
        loss, other_loss = (-logps(m).gather(1, labels[:, None]).mean().item() for m in (model, other))
        mu = (every.exp() * every).sum(1)
        sigma = (every.exp() * every.square()).sum(1) - mu.square()
        standard = ((chosen - mu) / sigma.clamp(min=1e-6).sqrt())[:-1].tolist()
    lowest = max(1, int(k * (len(at) - 1)))
    text = tokenizer.decode(labels.tolist(), skip_special_tokens=True)
    return {
        "loss": -loss,
        "zlib": -loss / len(zlib.compress(text.encode())),
        "reference": other_loss - loss,
        "gradnorm": -np.mean(norms),
        "min_k": np.mean(sorted(chosen[:-1].tolist())[:lowest]),
        "min_k_plus_plus": np.mean(sorted(standard)[:lowest]),
    }


@pytest.fixture(scope="module")
def oracle(rows):
    """Return model, tokenizer, for both sets sequences, columns of one pass and reference losses; and the scores wanted."""
    model, other, tokenizer = loud(), loud("llama, untied"), tiny_tokenizer()
    sides = {"forget": [data.ask(q.question, q.answer) for q in rows[0]], "holdout": rows[1]}
    sequences = {name: data.encode(side, tokenizer, vocab_size=300) for name, side in sides.items()}
    columns = {name: answer_columns(model, tokenizer, side, CONFIG) for name, side in sequences.items()}
    losses = {name: answer_losses(other, tokenizer, side, CONFIG, name) for name, side in sides.items()}
    precise = [loud(family).double() for family in ("llama, tied", "llama, untied")]
    want = {name: [direct(*precise, tokenizer, example) for example in side] for name, side in sides.items()}
    return model, tokenizer, sequences, columns, losses, want


def check_six_attacks(module, oracle):
    model, tokenizer, sequences, columns, losses, want = oracle
    run = CostlyAttacks(("reference", "gradnorm"), losses)
    end = tokenizer.eos_token_id
    logs = {}
    for name, side in sequences.items():
        costly = module.costly_columns(model, side, columns[name]["avg_gt_loss"], run, name, end, "reference")
        every = columns[name] | costly
        logs[name] = {column: torch.as_tensor(values, dtype=torch.float64) for column, values in every.items()}
    scores = {name: metrics.attack_scores(log) for name, log in logs.items()}
    for name, of_set in scores.items():
        assert tuple(of_set) == metrics.ATTACKS
        for attack, got in of_set.items():
            assert got.tolist() == pytest.approx([row[attack] for row in want[name]], rel=2e-5, abs=2e-5), (name, attack)
    return scores, metrics.membership_aucs(logs)


def test_six_attacks_against_their_definitions(oracle):
    """The areas under the curves are open-unlearning's too, where score and label are both negated."""
    scores, aucs = check_six_attacks(attacks, oracle)
    assert tuple(aucs) == metrics.ATTACKS
    for attack, auc in aucs.items():
        theirs = [-score for side in ("forget", "holdout") for score in scores[side][attack].tolist()]
        assert auc == pytest.approx(sklearn_metrics.roc_auc_score([0] * 4 + [1] * 3, theirs)), attack


@pytest.mark.parametrize("old, new", [
    ("[name] - losses", "[name] + losses"),
    ("-gradient_norms(", "gradient_norms("),
    (".mean().item()", ".sum().item()"),
    ("collate([without_end(sequence, end)]", "collate([sequence]"),
    (".sum() / len(batch.token_indices)", ".sum()"),
], ids=lambda text: text[:20])  # fmt: skip
def test_a_wrong_attack_is_noticed(old, new, oracle, tmp_path):
    with pytest.raises(AssertionError):
        check_six_attacks(mutant("soul.evaluate.attacks", old, new, tmp_path), oracle)


@needs_rouge
def test_a_run_with_all_attacks(rows):
    """Scores reach the logs of both sets, and no others."""
    questions, holdout = rows
    sets = dict.fromkeys(("forget", "retain", "real_authors", "world_facts"), questions[:2])
    losses = {"forget": torch.zeros(2, dtype=torch.float64), "holdout": torch.zeros(3, dtype=torch.float64)}
    run = CostlyAttacks(metrics.COSTLY_ATTACKS, losses)
    logs = tofu_logs(loud(), tiny_tokenizer(), sets, CONFIG, holdout=holdout, attacks=run, progress=lambda line: None)
    assert json.loads(json.dumps(logs)) == logs
    columns = check_logs(logs, {name: name for name in logs})
    summary = metrics.summarize(columns)
    assert {f"forget_{name}_auc" for name in metrics.ATTACKS} <= summary.keys() and "privleak" not in summary
    assert {*metrics.COSTLY_ATTACKS} <= columns["holdout"].keys() and "gradnorm" not in columns["retain"]
    assert columns["forget"]["reference"].tolist() == (-columns["forget"]["avg_gt_loss"]).tolist()
    retain = {"forget": columns["forget"], "holdout": columns["holdout"]}
    assert metrics.summarize(columns, retain)["privleak"] == 0


def test_gradient_norms_leave_the_model_as_it_was():
    """Frozen parameters do not count; gradients, modes and weights stay."""
    model, tokenizer = loud("llama, untied"), tiny_tokenizer()
    sequences = data.encode([data.ask(*pair) for pair in pairs("forget", 2)], tokenizer, vocab_size=300)
    every = gradient_norms(model, sequences, tokenizer.eos_token_id, backend="reference")
    model.train()
    embeddings = model.get_input_embeddings().weight.requires_grad_(False)
    head = model.get_output_embeddings().weight
    head.grad = torch.ones_like(head)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    norms = gradient_norms(model, sequences, tokenizer.eos_token_id, backend="reference")
    assert norms.dtype == torch.float64 and norms.shape == (2,) and not torch.allclose(norms, every)
    assert model.training and head.grad.eq(1).all() and embeddings.grad is None
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters()))
    with pytest.raises(ValueError, match="model: expected parameters that require a gradient"):
        gradient_norms(model.requires_grad_(False), sequences, tokenizer.eos_token_id)


def test_gradient_norms_of_adapters_are_those_of_the_adapters():
    model, tokenizer = lora_model(), tiny_tokenizer()
    sequences = data.encode([data.ask(*pairs("forget", 1)[0])], tokenizer, vocab_size=300)
    (norm,) = gradient_norms(model, sequences, tokenizer.eos_token_id, backend="reference").tolist()
    (row,) = [without_end(sequence, tokenizer.eos_token_id) for sequence in sequences]
    at = [t for t, label in enumerate(row.labels) if label != -100]
    logps = model(input_ids=torch.tensor([row.input_ids])).logits[0, at].log_softmax(-1)
    labels = torch.tensor([row.labels[t] for t in at])
    (-logps.gather(1, labels[:, None]).mean()).backward()
    norms = [p.grad.norm().item() for p in model.parameters() if p.grad is not None]
    assert len(norms) == 8 and norm == pytest.approx(np.mean(norms), rel=1e-4)


def test_the_end_is_left_out_unless_it_is_all():
    sequence = data.Sequence([5, 6, 7], [-100, 8, 2], 1)
    assert without_end(sequence, 2).labels == [-100, 8, -100] and sequence.labels == [-100, 8, 2]
    assert without_end(sequence, 3) is sequence and without_end(sequence, None) is sequence
    alone = data.Sequence([5, 6], [-100, 2], 1)
    assert without_end(alone, 2) is alone


def test_names_of_attacks():
    assert parse_attacks(["all"]) == parse_attacks(["gradnorm", "loss", "reference"]) == metrics.COSTLY_ATTACKS
    assert parse_attacks(["min_k", "gradnorm"]) == ("gradnorm",) and parse_attacks(["loss"]) == ()
    with pytest.raises(
        ValueError, match="membership_attacks: expected all, or some of loss, zlib, min_k, min_k_plus_plus, ref.*'mink'"
    ):
        parse_attacks(["mink"])

"""The formulas against numbers worked out by hand, eager fp64 code, and the benchmark's own logs and aggregation."""

import json
import math
import zlib

import numpy as np
import pytest
import torch

from soul.evaluate import metrics
from soul.evaluate.logs import FILES, columns, read_logs, read_retain_logs
from tests.support.helpers import mutant, needs_rouge

scipy_stats = pytest.importorskip("scipy.stats", reason="the extra eval is not installed")
pytest.importorskip("sklearn", reason="the extra eval is not installed")
from tests.support.models import TOFU  # noqa: E402

LOGS = TOFU / "eval_logs"
needs_logs = pytest.mark.skipif(not LOGS.is_dir(), reason="TOFU's logs are not beside the checkout (../shared/data/tofu)")
NAMES = {"forget": "Forget", "retain": "Retain", "real_authors": "Real Authors", "world_facts": "Real World"}


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def tofu_utility(result):
    """Return model utility and its terms as TOFU's aggregate_eval_stat.py does: in numpy, columns paired by position."""
    out = {}
    for set_name, file in FILES.items():
        log = {name: np.array(list(column.values())) for name, column in result[file].items() if name != "generated_text"}
        true = np.exp(-log["avg_gt_loss"])
        if not file.startswith("eval_log"):
            true = true / (true + np.exp(-log["average_perturb_loss"]).sum(-1))
        inverse = np.exp(log["average_perturb_loss"].mean(-1) - log["avg_paraphrased_loss"])
        retain_ratio = np.mean(np.maximum(0, 1 - 1 / inverse))
        out[f"{set_name}_prob"] = true.mean()
        out[f"{set_name}_rouge"] = log["rougeL_recall"].mean()
        out[f"{set_name}_truth_ratio"] = np.mean(np.minimum(inverse, 1 / inverse)) if set_name == "forget" else retain_ratio
    nine = [value for name, value in out.items() if not name.startswith("forget")]
    return out | {"model_utility": 0.0 if 0.0 in nine else len(nine) / sum(1 / value for value in nine)}


def tofu_quality(result, retain_result):
    """Return forget quality and its statistic as TOFU's aggregate_eval_stat.py does."""
    ratios = []
    for log in (result[FILES["forget"]], retain_result[FILES["forget"]]):
        perturbed = np.array(list(log["average_perturb_loss"].values())).mean(axis=-1)
        ratios.append(np.exp(perturbed - np.array(list(log["avg_paraphrased_loss"].values()))))
    grid = np.sort(np.concatenate(ratios))  # the statistic, from its definition
    below = [np.searchsorted(np.sort(ratio), grid, side="right") / len(ratio) for ratio in ratios]
    return scipy_stats.ks_2samp(*ratios).pvalue, np.abs(below[0] - below[1]).max()


def check_real_logs(module):
    for model, other in (("full", "retain90"), ("retain90", "full"), ("full", "full")):
        folder, retain_folder = (LOGS / f"llama2-7b_{name}" for name in (model, other))
        # The benchmark aggregates these files; they hold the same logs as the four beside them.
        result, retain_result = (json.loads((f / "eval_log_aggregated.json").read_text()) for f in (folder, retain_folder))
        logs = read_logs(folder)
        got = module.summarize(logs, read_retain_logs(retain_folder, 300))
        for name, value in tofu_utility(result).items():
            assert abs(got[name] - value) <= 1e-6 * value, name
        quality, statistic = tofu_quality(result, retain_result)
        assert abs(got["forget_quality"] - quality) <= 1e-6 * quality and abs(got["ks_statistic"] - statistic) <= 1e-12
        for name, file in FILES.items():  # what the benchmark itself has written down for each question
            log = logs[name]
            stored = result[file]
            ratio = module.truth_ratio(log["avg_paraphrased_loss"], log["average_perturb_loss"])
            want = tensor(*stored["truth_ratio"].values())
            # fp32 there: the mean of losses around 10 is rounded to 1e-6, and its exponential with it.
            assert ((ratio - want).abs() / want).max() <= 2e-6, name
            if "normalized_gt_loss" in stored:
                loss = module.option_loss(log["avg_gt_loss"], log["average_perturb_loss"])
                assert (loss - tensor(*stored["normalized_gt_loss"].values())).abs().max() <= 1e-6, name


@needs_logs
def test_real_logs_give_the_numbers_of_the_benchmark():
    check_real_logs(metrics)


@needs_logs
@needs_rouge
def test_rouge_of_the_texts_in_real_logs():
    for file in FILES.values():
        stored = json.loads((LOGS / "llama2-7b_retain90" / file).read_text())
        _, texts, answers = zip(*stored["generated_text"].values())
        for name, values in metrics.rouge_recall(answers, texts).items():
            assert (values - tensor(*stored[name].values())).abs().max() <= 1e-12, (file, name)


@needs_logs
def test_a_model_that_cannot_be_told_from_the_retain_model_has_quality_one():
    """Between 0 and 1: two halves of one log, which are near each other but not equal."""
    log = read_logs(LOGS / "llama2-7b_retain90")["forget"]
    ratio = metrics.truth_ratio(log["avg_paraphrased_loss"], log["average_perturb_loss"])
    assert metrics.forget_quality(ratio, ratio) == (1.0, 0.0)
    quality, statistic = metrics.forget_quality(ratio[::2], ratio[1::2])
    test = scipy_stats.ks_2samp(1 / ratio[::2].numpy(), 1 / ratio[1::2].numpy())  # TOFU's inverse
    assert 0.01 < quality < 0.9999 and abs(quality - test.pvalue) < 1e-9 and abs(statistic - test.statistic) < 1e-12


def check_by_hand(module):
    loss = tensor(math.log(2), math.log(4))
    perturbed = tensor(math.log(2), math.log(8)).expand(2, 2)
    assert torch.allclose(module.probability(loss), tensor(0.5, 0.25))
    assert torch.allclose(module.option_probability(loss, perturbed), tensor(0.5 / 1.125, 0.25 / 0.875))
    assert torch.allclose(module.truth_ratio(loss, perturbed), tensor(0.5, 1.0))  # geometric mean of 1/2 and 1/8: 1/4
    assert torch.allclose(module.truth_ratio(loss, perturbed, mean="arithmetic"), tensor(0.625, 1.25))  # 5/16
    assert torch.allclose(module.truth_ratio(loss, perturbed, eps=0.25), tensor(0.25 / 0.75, 0.5))
    assert torch.allclose(module.option_probability(loss, perturbed, eps=0.375), tensor(0.5 / 1.5, 0.2))
    assert torch.allclose(module.closer_to_one(tensor(0.5, 4.0)), tensor(0.375))
    assert torch.allclose(module.closer_to_one(tensor(0.5, 4.0), eps=1.0), tensor(0.35))
    assert torch.allclose(module.true_better(tensor(0.5, 4.0)), tensor(0.25))
    assert module.exact_memorization(tensor(1, 0, 1, 1)) == 0.75
    for hits, strength in (([1, 0, 1, 1], 0.5), ([1, 1], 1.0), ([1, 1, 0], 0.0), ([0], 0.0), ([0, 1], 0.5)):
        assert module.extraction_strength(tensor(*hits)) == strength
    logps = tensor(-1, -5, -2, -3, -4)
    assert module.min_k(logps) == -4.5 and module.min_k(logps, 0.1) == -5 and module.min_k(logps, 1.0) == -3
    assert module.min_k(tensor(-7)) == -7
    assert torch.allclose(module.normalized_logps(tensor(-1, -1), tensor(3, 1), tensor(4, 0)), tensor(1.0, 0.0))
    assert torch.allclose(module.normalized_logps(tensor(-1), tensor(3), tensor(0)), tensor(2000.0))
    # pairs in which forget scores higher: 4 of 6, and a tie counts half
    assert module.membership_auc(tensor(3, 1), tensor(0, 2, 1)) == pytest.approx(4.5 / 6)
    assert module.soul_mia(tensor(3, 1), tensor(0, 2, 1)) == pytest.approx(1.5 / 6)
    assert module.privleak(0.75, 0.5) == pytest.approx(-50) and module.privleak(0.5) == 0
    assert module.privleak(1.0, 0.4) == pytest.approx(-100)
    assert module.zlib_bytes("a" * 1000) == len(zlib.compress(b"a" * 1000)) < 30 and module.zlib_bytes("\xe9") == 10
    scores = module.attack_scores({"avg_gt_loss": tensor(2), "min_k": tensor(-3)})
    assert {name: value.tolist() for name, value in scores.items()} == {"loss": [-2], "min_k": [-3]}
    quantities = ("prob", "rouge", "truth_ratio")
    nine = {f"{name}_{quantity}": 0.5 for name in metrics.UTILITY_SETS for quantity in quantities}
    assert module.model_utility(nine | {"retain_prob": 1.0, "forget_prob": 0.1}) == pytest.approx(9 / 17)
    assert module.model_utility(nine | {"retain_prob": 0.0}) == 0.0


def test_formulas_by_hand():
    check_by_hand(metrics)


@pytest.mark.parametrize("old, new", [
    ("torch.exp(-losses)", "torch.exp(losses)"),
    ("torch.softmax(-torch.cat", "torch.softmax(torch.cat"),
    ("-perturbed_losses.mean(1)", "-perturbed_losses.sum(1)"),
    ("false_logps - true_logps", "false_logps + true_logps"),
    (" - math.log(perturbed_losses.shape[1])", ""),
    ("torch.minimum(ratios, 1", "torch.maximum(ratios, 1"),
    ("(retain_auc - auc) /", "(auc - retain_auc) /"),
    ("return 1 - membership_auc", "return membership_auc"),
    ("len(zlib.compress(text.encode(\"utf-8\")))", "len(text)"),
    ('{"loss": -log', '{"loss": log'),
    ("(1 - ratios).clamp(min=0)", "(1 - ratios)"),
    ("missed.max().item() + 1 if", "missed.max().item() if"),
    ("hits == 0", "hits == 1"),
    ("max(1, int(k * len(scores)))", "int(k * len(scores))"),
    ("scores.sort().values", "scores"),
    ("logps + entropies", "logps - entropies"),
    ("clamp(min=1e-6).sqrt()", "clamp(min=1e-6)"),
    ("[1] * len(forget) + [0]", "[0] * len(forget) + [1]"),
    (".hmean(", ".gmean("),
], ids=lambda text: text[:20])  # fmt: skip
def test_a_wrong_formula_is_noticed(old, new, tmp_path):
    with pytest.raises((AssertionError, ValueError)):
        check_by_hand(mutant("soul.evaluate.metrics", old, new, tmp_path))


@needs_logs
@pytest.mark.parametrize("old, new", [
    ("closer_to_one if name == \"forget\" else true_better", "true_better"),
    ("if name in OPTION_SETS", "if name == OPTION_SETS[0]"),
    ('("retain", *OPTION_SETS)', '("retain", "forget", *OPTION_SETS)'),
    ("ks_2samp(ratios.tolist(), retain_ratios.tolist())", "ks_2samp(ratios.tolist(), ratios.tolist())"),
    ('log["rougeL_recall"].mean()', 'log["rougeL_recall"].median()'),
], ids=lambda text: text[:20])  # fmt: skip
def test_a_wrong_aggregation_is_noticed(old, new, tmp_path):
    with pytest.raises((AssertionError, KeyError)):
        check_real_logs(mutant("soul.evaluate.metrics", old, new, tmp_path))


def test_collapsed_models_give_numbers():
    """Losses far beyond what fp64 can exponentiate: after gradient ascent."""
    good, bad = tensor(0.1, 0.2), tensor(5e3, 1e4)
    far, near = bad[:, None].expand(2, 3), good[:, None].expand(2, 3)
    for ratio in (metrics.truth_ratio(bad, near), metrics.truth_ratio(good, far)):
        assert ratio.isfinite().all() and metrics.closer_to_one(ratio) < 1e-300
        assert metrics.true_better(ratio) in (0.0, 1.0)
        quality, statistic = metrics.forget_quality(ratio, tensor(0.5, 0.6))
        assert statistic == 1.0 and 0 < quality < 1
    assert torch.allclose(metrics.option_probability(bad, far), tensor(0.25, 0.25))
    assert metrics.option_loss(bad, near).isfinite().all()


def test_statistics_of_tokens_against_logits():
    """Min-K, Min-K++, exact memorization and extraction strength as open-unlearning computes them, from all logits, in fp64."""
    from soul_kernels.reference.token_logprob import token_statistics

    torch.manual_seed(0)
    logits = 3 * torch.randn(11, 50, dtype=torch.float64)
    labels = logits.argmax(1)
    labels[[0, 4]] = torch.tensor([7, 9])
    statistics = token_statistics(logits, labels)
    logp = logits.log_softmax(1)
    chosen = logp.gather(1, labels[:, None])[:, 0]
    p = logp.exp()
    mu = (p * logp).sum(1)
    sigma = (p * logp.square()).sum(1) - mu.square()
    scores = (chosen - mu) / sigma.clamp(min=1e-6).sqrt()
    assert metrics.min_k(statistics.logps) == pytest.approx(np.mean(sorted(chosen.tolist())[:4]))
    normalized = metrics.normalized_logps(statistics.logps, statistics.entropies, statistics.variances)
    assert metrics.min_k(normalized, 0.2) == pytest.approx(np.mean(sorted(scores.tolist())[:2]))
    assert metrics.exact_memorization(statistics.hits) == (logits.argmax(1) == labels).double().mean().item() == 9 / 11
    k = next(k for k in range(11) if torch.equal(logits.argmax(1)[k:], labels[k:]))
    assert metrics.extraction_strength(statistics.hits) == 1 - k / 11 and k == 5


@pytest.mark.parametrize("k", [0.0, -0.1, 1.1, math.nan])
def test_min_k_takes_a_fraction(k):
    with pytest.raises(ValueError, match="min_k: expected a fraction in"):
        metrics.min_k(tensor(-1, -2), k)


def test_rows_are_paired_by_name():
    """TOFU pairs by position: the same where all columns are in one order, as in its logs."""
    log = {"avg_paraphrased_loss": {"0": 1.0, "1": 2.0}, "average_perturb_loss": {"1": [4.0], "0": [3.0]}}
    got = columns(log, "here", ("avg_paraphrased_loss", "average_perturb_loss"))
    assert got["average_perturb_loss"].tolist() == [[3.0], [4.0]]

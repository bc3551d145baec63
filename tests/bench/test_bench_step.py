"""The whole step and the scaling of the benchmarks: gates that hold, and numbers beside the times."""

import functools
import importlib.util
import json
import math
import re
import types
import weakref

import pytest
import torch

from bench import _harness, _steps, scaling, whole_step
from bench._llama import TINY, make_model
from soul import losses
from soul.models import causal_lm

pytestmark = pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs the extra hf")
CPU = torch.device("cpu")
LIMITS = {"copy_bytes_per_s": 1e10, "gemm_flop_per_s": 1e11}
LEAN = "ours, 8-bit states, gradient release, checkpointing"


@pytest.fixture(autouse=True)
def quick(monkeypatch, without_kernels):
    """Ops compute as they do for a user without a GPU, and nobody waits for rounds of timing."""
    monkeypatch.setattr(_harness, "time_interleaved", once)


def once(calls, device, budget_s):
    return {name: (_harness.time_once(call, device), 1.0, 2.0) for name, call in calls.items()}


@pytest.mark.parametrize("number, variants", [
    (0, ["published recipe", "plain PyTorch, one batch, AdamW", "ours, eager"]),
    (1, ["published recipe", LEAN]),  # bf16, where only this one releases gradients and clips none
])  # fmt: skip
def test_a_whole_step_is_checked_timed_and_taken_apart(number, variants, capsys):
    case = list(whole_step.cases(CPU, quick=True))[number]()
    rows = _harness.run_case(case, CPU, LIMITS, budget_s=0.0)
    assert [row["variant"] for row in rows] == variants
    for row in rows:
        assert row["ms"] > 0 and row["tokens_per_s"] > 0
        assert row["model_ms"] == pytest.approx(1e3 * (row["model_flops"] / 1e11 + row["model_bytes"] / 1e10))
        # Every phase took time, but for clipping, which gradient release does without.
        assert list(row["phases"]) == list(_steps.PHASES)
        assert {name for name, ms in row["phases"].items() if ms == 0} == ({"clipping"} if row["variant"] == LEAN else set())
    assert rows[-1]["planned_mib"] > 0 and rows[-1]["errors"]["error of the likelihoods"] < 1e-3
    # What is padded to 32 and goes through the head at every position needs more products than ours, checkpointing or not.
    assert rows[0]["model_flops"] > 2 * rows[-1]["model_flops"]
    assert whole_step.summary(rows, LIMITS)["speedups"][case.name][variants[-1]] == rows[0]["ms"] / rows[-1]["ms"]
    assert "tokens/s" in capsys.readouterr().out
    json.dumps(rows)


@pytest.mark.parametrize("memory, runs", [(80e9, True), (24e9, False)])
def test_on_a_gpu_there_are_both_models_and_7b_where_it_fits(memory, runs, monkeypatch):
    """No model is made before a variant is."""
    card = types.SimpleNamespace(total_memory=memory)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    small, large = (make() for make in whole_step.cases(torch.device("cuda"), quick=False))
    assert (small.default, large.default) == (True, runs)
    assert small.name.startswith("step, llama-3.2-1b, 1236 M parameters, bfloat16, 4 + 4")
    assert large.name.startswith("step, llama-2-7b, 6738 M parameters")
    assert sum(name.startswith("ours") for name in small.variants) == 4 and small.alone and large.alone
    # On paper: 8 sequences padded to 512 through 1.24 B parameters, 6 FLOPs each; ours moves 25 bytes a parameter or so.
    flops, moved = small.model["published recipe"]
    assert flops == pytest.approx(6 * 1.236e9 * 8 * 512, rel=0.05) and moved == 16 * 1_235_814_400
    flops, moved = small.model["ours, eager"]
    assert flops < 6 * 1.236e9 * 8 * 90 and moved / 1.236e9 == pytest.approx(24, abs=3)


def test_a_step_under_compile_is_the_same_step(monkeypatch):
    """Only a GPU runs it by default; here without a compiler behind it."""
    monkeypatch.setitem(causal_lm.COMPILE, "backend", "eager")
    variants = {"ours, --compile": functools.partial(whole_step.ours, compile=True)}
    (errors,) = whole_step.check(variants, 1.0, TINY, CPU, torch.float32).values()
    assert errors["error of the likelihoods"] < 1e-4


def changed(batch, **fields):
    return whole_step.dataclasses.replace(batch, **fields)


def a_token_less(step):
    labels = step.batch.labels.clone()
    row = int(step.batch.token_indices[0])
    labels.view(-1)[row] = -100
    step.batch = changed(step.batch, labels=labels, token_indices=step.batch.token_indices[1:])
    step.n_labels = len(step.batch.token_indices)


def other_tokens(step):
    step.batch = changed(step.batch, input_ids=step.batch.input_ids.flip(0))
    step.sequences = _steps.sequences_of([step.batch])


def forget_is_retain(step):
    step.batch = changed(step.batch, is_forget=~step.batch.is_forget)


def other_labels(step):
    labels = step.batch.labels
    step.batch = changed(step.batch, labels=torch.where(labels >= 0, (labels + 1) % TINY.shape.vocab, labels))


def up_the_hill(step):
    step.optimizer.param_groups[0]["maximize"] = True


def no_step(step):
    step.optimizer.step = lambda: None


def half_of_h(step):
    step.optimizer.param_groups[0]["bs"] //= 2


def other_momentum(step):
    step.optimizer.param_groups[0]["betas"] = (0.5, 0.95)


def one_stays(step):
    stays = step.optimizer.param_groups[0]["params"].pop(7)  # down_proj of the first layer
    step.optimizer.add_param_group({"params": [stays], "lr": 0.0})


class Half(losses.GradDiff):
    def terms(self, logps, batch):
        return {name: 0.5 * (term + term.detach()) for name, term in super().terms(logps, batch).items()}


def half_a_gradient(step):
    step._objective = Half()


@pytest.mark.parametrize("mutate, message", [
    (a_token_less, "not the same sequences and labels"),
    (other_tokens, "not the same sequences and labels"),
    (forget_is_retain, "error of the likelihoods"),
    (other_labels, "error of the likelihoods"),
    (half_a_gradient, "error of the gradient norm"),
    (up_the_hill, "after a step|cosine"),
    (no_step, "after a step|gradient norm|cosine"),
    (half_of_h, "after a step|cosine"),
    (other_momentum, "after a step|cosine"),
    (one_stays, "cosine"),
])  # fmt: skip
def test_a_wrong_step_does_not_pass(mutate, message):
    def wrong(*args, **options):
        step = whole_step.ours(*args, **options)
        mutate(step)
        return step

    reason = whole_step.check({"ours": wrong}, 1.0, TINY, CPU, torch.float32)["ours"]
    assert isinstance(reason, str) and re.search(message, reason), reason


def test_the_norm_is_compared_with_an_exact_one(monkeypatch):
    """On one thread of a CPU torch's own, a sum in fp32, was off by 1.2e-4, which is more than the gate allows."""
    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args: 1.001 * clip(*args))
    errors = whole_step.check({"ours": whole_step.ours}, 1.0, TINY, CPU, torch.float32)["ours"]
    assert errors["error of the gradient norm"] < 1e-6


def test_a_variant_that_is_wrong_or_fails_does_not_cost_the_others(capsys):
    def broken(*args, **options):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    def wrong(*args, **options):
        step = whole_step.ours(*args, **options)
        no_step(step)
        return step

    variants = {"published recipe": whole_step.published, "ours, eager": whole_step.ours}
    variants |= {"ours, broken": broken, "ours, wrong": wrong}
    rows = _harness.run_case(whole_step.make_case(TINY, variants, {}, CPU, torch.float32), CPU, LIMITS, budget_s=0.0)
    row_of = {row["variant"]: row for row in rows}
    assert row_of["published recipe"]["ms"] > 0 and row_of["ours, eager"]["ms"] > 0 and row_of["ours, eager"]["errors"]
    reason = "wrong, not timed: RuntimeError: operation not permitted when stream is capturing"
    assert row_of["ours, broken"]["reason"] == reason and row_of["ours, wrong"]["reason"].startswith("wrong, not timed: ")
    assert "in broken" in capsys.readouterr().err  # the traceback
    assert list(whole_step.summary(rows, LIMITS)["speedups"].values()) == [
        {name: row_of["published recipe"]["ms"] / row_of[name]["ms"] for name in ("published recipe", "ours, eager")}
    ]


def test_at_full_size_too_a_loss_must_be_that_of_the_others(monkeypatch):
    case = next(iter(whole_step.cases(CPU, quick=True)))()
    case.variants["published recipe"]()
    right = whole_step.make_model

    def other_weights(*args):
        model = right(*args)
        with torch.no_grad():
            model.lm_head.weight.mul_(1.5)
        return model

    monkeypatch.setattr(whole_step, "make_model", other_weights)
    with pytest.raises(AssertionError, match="forget_nll"):
        case.variants["ours, eager"]()


def test_phases_count_for_themselves_only(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(_steps, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    watch = _steps.Stopwatch(CPU)

    def within(seconds):
        now[0] += seconds

    now[0] += 1
    with watch.phase("optimizer"):
        now[0] += 2
        watch.wrap("clipping", within)(4)
        now[0] += 8
    now[0] += 16
    watch.mark()
    assert watch.ms == {"forward": 0.0, "loss + backward": 17e3, "clipping": 4e3, "optimizer": 10e3}


def test_the_published_recipe_sees_what_ours_sees():
    """Its likelihoods are those that transformers computes, each sequence alone and unpadded."""
    model = make_model(TINY.shape, CPU, torch.float32)
    values = whole_step.published(TINY, model, CPU, lr=0.0)()
    for name, sequences in zip(("forget_nll", "retain_nll"), whole_step.data(TINY)):
        losses = []
        for s in sequences:
            with torch.no_grad():
                logps = model(input_ids=torch.tensor([s.input_ids])).logits[0].log_softmax(-1)
            losses += [-logps[t, label].item() for t, label in enumerate(s.labels) if label >= 0]
        assert values[name].item() == pytest.approx(sum(losses) / len(losses), abs=1e-5)


def test_every_size_is_varied_alone_and_fits_are_told():
    cases = [make() for make in scaling.cases(CPU, quick=True)]
    rows = []
    for case in cases:
        for variant in case.variants:
            row = {"case": case.name, "variant": variant, "ms": 3.0, "at": case.at}
            if variant.startswith("ours"):
                row |= case.rates(variant, 3.0, LIMITS)
                # A loss whose time is 2 ms and 1 us for a token; a step as the cube of its parameters.
                row["ms"] = 2 + 1e-3 * case.at["N"] if "N" in case.at else 1e-6 * case.at["params"] ** 3
                row["model_ms"] = row["ms"] * (0.5 if case.at.get("params", 4096) < 4096 else 0.9)
            rows.append(row)
    summary = scaling.summary(rows, LIMITS)
    fits = {(fit["what"], fit["axis"]): fit for fit in summary["fits"]}
    assert set(fits) == {("linear loss", "N"), ("linear loss", "D"), ("linear loss", "V"), ("SOUL.step", "params"),
                         ("SOUL.step", "tensors")}  # fmt: skip
    line = fits["linear loss", "N"]
    assert (line["fixed_ms"], line["ms_per_unit"]) == (pytest.approx(2), pytest.approx(1e-3))
    slopes = [fits["SOUL.step", axis]["slope"] for axis in ("params", "tensors")]
    assert slopes == [pytest.approx(3), pytest.approx(0)]
    assert summary["model_error"]["SOUL.step"] == pytest.approx({"median": 0.1, "largest": 0.5, "at_the_largest_size": 0.1})
    assert "off by 10% (median), 50% at most, 10% where" in summary["lines"][-1]
    assert scaling.summary([], LIMITS) is None


def test_cases_of_scaling_are_right_and_run():
    cases = [make() for make in scaling.cases(CPU, quick=True)]
    for case in (cases[0], cases[-1]):  # a loss and a step
        rows = _harness.run_case(case, CPU, LIMITS, budget_s=0.0)
        ours = [row for row in rows if row["variant"].startswith("ours")]
        assert ours and all(row["model_ms"] > 0 and math.isfinite(row["times_model"]) and row["at"] for row in ours)


def test_the_intercept_is_that_of_small_calls():
    """A percent off at the largest size, 10 ms, is twice what the smallest call takes."""
    points = [(2**k, 0.05 + 1e-8 * 2**k) for k in (18, 20, 22, 24, 26, 28)]
    line = scaling.fit([*points, (2**30, 1.01 * (0.05 + 1e-8 * 2**30))])
    assert line["fixed_ms"] == pytest.approx(0.05, rel=0.05) and line["ms_per_unit"] == pytest.approx(1e-8, rel=0.02)


def test_logits_of_a_micro_batch_are_gone_before_the_next_one(monkeypatch):
    """Otherwise the peak of plain PyTorch would be higher than it needs to be."""
    references, alive = [], []
    logits_of = _steps.EagerStep._logits

    def watched(step, batch):
        alive.append(sum(ref() is not None for ref in references))
        logits, *rest = logits_of(step, batch)
        references.append(weakref.ref(logits))
        return logits, *rest

    monkeypatch.setattr(_steps.EagerStep, "_logits", watched)
    step = whole_step.published(TINY, make_model(TINY.shape, CPU, torch.float32), CPU)
    step()
    assert alive == [0, 1] * whole_step.N_SEQUENCES  # those of the forget sequence, while the retain sequence is forwarded

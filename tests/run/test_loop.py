import copy
import importlib
import io
import json
import math

import pytest
import torch

import soul
from soul import losses
from soul.data.batches import Order, collate
from soul.data.examples import Example
from soul.evaluate.model import answer_probability
from soul.models.causal_lm import token_logps
from soul.models.encoding import encode_for
from soul.models.ref_model import check_cache
from soul.output.directory import check_output
from soul.run import feed
from soul.run.config import UnlearnConfig, build_scheduler
from soul.run.loop import Diverged, unlearn
from soul.run.prepare import prepare
from soul.run.step import RecordedObjective
from soul_kernels import LinearOptions, Reference, linear_objective
from soul_kernels.backends import runs_on_cpu
from tests.support.helpers import mutant, needs_kernels_on_cpu
from tests.support.models import examples, lora_model, sequences, tiny_model, tiny_tokenizer

unlearn_module, step_module = (importlib.import_module(f"soul.run.{name}") for name in ("loop", "step"))
FAST = dict(epochs=2, batch_size=2, lr=1e-3, backend="reference")


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def run(tokenizer, **options):
    model = tiny_model()
    before = copy.deepcopy(model.state_dict())
    log = io.StringIO()
    records = unlearn(model, tokenizer, examples(5), examples(9)[5:], UnlearnConfig(**FAST | options), log=log, progress=False)
    changed = any(not torch.equal(v, before[k]) for k, v in model.state_dict().items())
    return model, records, log.getvalue(), changed


@pytest.mark.parametrize("optimizer", ["soul", "adamw"])
@pytest.mark.parametrize("method", losses.OBJECTIVES)
def test_every_method_runs_and_logs_every_step(method, optimizer, tokenizer):
    _, records, log, changed = run(tokenizer, method=method, optimizer=optimizer)
    assert changed and len(records) == 2 * 3  # two epochs of ceil(5 / 2) steps
    assert [json.loads(line) for line in log.splitlines()] == records
    required = {
        "step",
        "epoch",
        "lr",
        "loss",
        "loss_forget",
        "forget_nll",
        "retain_nll",
        "grad_norm",
        "tokens_per_s",
        "peak_memory_gib",
    }
    assert required | ({"loss_retain"} if method != "ga" else set()) <= set(records[0])
    assert ("clip_fraction" in records[0]) == (optimizer == "soul")
    for record in records:
        total = sum(value for name, value in record.items() if name.startswith("loss_"))
        assert record["loss"] == pytest.approx(total, rel=1e-4)
        assert record["tokens_per_s"] > 0 and record["peak_memory_gib"] > 0


@pytest.mark.parametrize("optimizer", ["soul", "adamw"])
def test_forgets_what_it_is_told_and_keeps_the_rest(optimizer, tokenizer):
    _, records, _, _ = run(tokenizer, method="graddiff", optimizer=optimizer, epochs=15, method_options={"alpha": 2.0})
    assert records[-1]["forget_nll"] > records[0]["forget_nll"] + 0.3
    assert records[-1]["retain_nll"] < records[0]["retain_nll"] - 0.3


def test_seed_decides_everything(tokenizer):
    runs = [run(tokenizer, seed=seed) for seed in (1, 1, 2)]
    losses_of = [[r["loss"] for r in records] for _, records, _, _ in runs]
    assert losses_of[0] == losses_of[1] != losses_of[2]


def test_gradients_are_dropped_before_the_next_forward_and_at_the_end(tokenizer, monkeypatch):
    """Two gradients of a large model at a time would not fit where one does."""
    held = []
    real = step_module.hidden_states

    def spy(model, batch):
        held.append(sum(p.grad is not None for p in model.parameters()))
        return real(model, batch)

    monkeypatch.setattr(step_module, "hidden_states", spy)
    model, *_ = run(tokenizer)
    assert held == [0] * 6 and all(p.grad is None for p in model.parameters())


def test_a_broken_last_step_is_not_a_success(tokenizer, monkeypatch):
    real = unlearn_module.train_step

    def break_weights(model, *args):
        values = real(model, *args)
        next(model.parameters()).data[0, 0] = float("nan")
        return values

    monkeypatch.setattr(unlearn_module, "train_step", break_weights)
    with pytest.raises(Diverged, match="lower the learning rate"):
        run(tokenizer, epochs=1, batch_size=5)


def test_a_weight_that_is_not_finite_is_named_before_the_run(tokenizer):
    """No learning rate helps then. Frozen weights below adapters are checked too."""
    for make, name in ((tiny_model, "model.layers.1.mlp.up_proj.weight"),
                       (lora_model, "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight")):  # fmt: skip
        for value in (float("nan"), float("inf"), float("-inf")):
            model = make()
            log = io.StringIO()
            with torch.no_grad():
                model.get_parameter(name)[3, 2] = value
            for start in (
                lambda model=model, log=log: unlearn(
                    model, tokenizer, examples(2), examples(4)[2:], UnlearnConfig(**FAST), log=log, progress=False
                ),
                lambda model=model: soul.Unlearner(model, examples(2), examples(4)[2:], UnlearnConfig(), tokenizer=tokenizer),
            ):
                with pytest.raises(ValueError) as error:
                    start()
                assert str(error.value).startswith(f"model: expected finite weights, got NaN or inf in {name}; ")
            assert not log.getvalue()


@pytest.mark.parametrize("options, message", [
    (dict(method_options={"alpha": 1e308}), "the loss became inf at step 1; alpha=1e+308 makes the loss or its gradient "
                                           "overflow: lower alpha"),
    (dict(method_options={"gamma": 1e39}), "; gamma=1e+39 makes the loss or its gradient overflow: lower gamma"),
    (dict(method_options={"alpha": 1e30}), "the norm of the gradient became inf at step 1; alpha=1e+30 makes the loss or its "
                                          "gradient overflow: lower alpha"),  # clipped to a step of 0, again and again
    (dict(lr=1e30, max_grad_norm=None), "lower the learning rate"),
    (dict(lr=1e30, optimizer="adamw"), "lower the learning rate"),
], ids=str)  # fmt: skip
def test_the_advice_fits_what_went_wrong(options, message, tokenizer):
    with pytest.raises(Diverged) as error:
        run(tokenizer, **options)
    assert message in str(error.value) and ("learning rate" in str(error.value)) == ("learning rate" in message)


def test_influence_has_no_learning_rate_to_lower(tokenizer, monkeypatch):
    def break_weights(model, *args, **options):
        next(model.parameters()).data[0, 0] = float("nan")
        return {"step": 1.0}

    monkeypatch.setattr(unlearn_module, "unlearn_once", break_weights)
    with pytest.raises(Diverged, match="a weight is not finite after step 1; raise the damping"):
        unlearn(tiny_model(), tokenizer, examples(2), examples(4)[2:], UnlearnConfig(method="influence", backend="reference"),
                progress=False)  # fmt: skip


@pytest.mark.parametrize("options", [FAST, dict(method="influence", backend="reference")], ids=["steps", "influence"])
def test_a_clock_that_stands_still_has_no_rate(options, tokenizer, monkeypatch):
    monkeypatch.setattr(unlearn_module.time, "perf_counter", lambda: 7.0)
    log = io.StringIO()
    records = unlearn(tiny_model(), tokenizer, examples(2), examples(4)[2:], UnlearnConfig(**options), log=log, progress=False)
    assert all(math.isnan(record["tokens_per_s"]) for record in records)
    assert all(json.loads(line)["tokens_per_s"] is None for line in log.getvalue().splitlines())


def test_sequences_longer_than_the_model_are_refused(tokenizer):
    model = tiny_model("gpt2, tied")
    long = [Example("Question:", " word" * 200)]
    with pytest.raises(ValueError, match="max_length: expected sequences of at most 128 tokens, got .*--max-length 128"):
        unlearn(model, tokenizer, long, examples(1), UnlearnConfig(**FAST), progress=False)


def test_a_padding_token_outside_the_model_does_no_harm(tokenizer):
    """The token was added to the tokenizer, as is common, without a row in the embedding."""
    other = copy.deepcopy(tokenizer)
    other.add_special_tokens({"pad_token": "[PAD]"})
    assert other.pad_token_id >= 300
    run(other)


def test_kernels_and_reference_train_alike(tokenizer, device):
    """The same run through the Triton kernels (interpreted on a CPU): the two backends are one algorithm."""
    results = []
    for backend in ("triton", "reference"):
        model = tiny_model().to(device)
        config = UnlearnConfig(method="npo", epochs=1, batch_size=2, lr=1e-3, backend=backend)
        records = unlearn(model, tokenizer, examples(2), examples(4)[2:], config, progress=False)
        results.append((records[0]["loss"], records[0]["grad_norm"], model.state_dict()))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-4)
    assert results[0][1] == pytest.approx(results[1][1], rel=5e-3)  # bf16 autocast on a GPU


@pytest.mark.parametrize("method, family", [("npo", "llama, tied"), ("dpo", "gemma2, capped")])
def test_ratios_start_at_exactly_zero(method, family, tokenizer):
    """The whole forget set in one batch, as its reference was computed: (2 / beta) log 2 to the last bit. 4 rows, and a beta
    that is a power of two: the mean of equal numbers is exact. Beside retain sequences, in small batches: rounding only.
    """
    exact = (2 / 0.5 * torch.tensor(2.0).log()).item()
    options = dict(method=method, method_options={"beta": 0.5, "alpha": 0.0}, backend="reference", epochs=1)
    for backend in ("reference", "triton") if method == "npo" and runs_on_cpu() else ("reference",):  # which is slow
        config = UnlearnConfig(**options | dict(batch_size=4, backend=backend))
        (record,) = unlearn(tiny_model(family), tokenizer, examples(4), [], config, progress=False)
        assert record["loss"] == record["loss_forget"] == exact
    config = UnlearnConfig(**options | dict(batch_size=3, method_options={"beta": 0.5}))
    records = unlearn(tiny_model(family), tokenizer, examples(5), examples(9)[5:], config, progress=False)
    assert records[0]["loss_forget"] == pytest.approx(exact, rel=1e-4)


def test_a_batch_of_the_whole_set_is_composed_as_its_reference(tokenizer, monkeypatch):
    """Rows keep the order of the file, pairs together: on some devices a row's position decides its last bit."""
    forget_batches = []
    real = feed.collate

    def spy(forget, retain, **options):
        forget_batches.append(forget)
        return real(forget, retain, **options)

    monkeypatch.setattr(feed, "collate", spy)
    config = UnlearnConfig(method="dpo", epochs=3, batch_size=6, method_options={"alpha": 0.0}, backend="reference")
    model = tiny_model()
    unlearn(model, tokenizer, examples(6), [], config, progress=False)
    paired, _ = prepare(model, tokenizer, examples(6), [], config)
    assert forget_batches == [paired] * 3


def test_reference_is_taken_from_the_cache(tokenizer, tmp_path, monkeypatch):
    options = dict(method="dpo", reference_cache=str(tmp_path), epochs=1)
    want = [record["loss"] for record in run(tokenizer, **options)[1]]
    assert len(list(tmp_path.iterdir())) == 1
    monkeypatch.setattr("soul.models.ref_model.token_logps", None)  # it could not be computed again
    assert [record["loss"] for record in run(tokenizer, **options)[1]] == want


@pytest.mark.parametrize("options", [
    dict(method="klmin"), dict(method="graddiff", method_options={"retain": "soul_kl"}),
    dict(method="undial", method_options={"retain": "kl"}),
], ids=str)  # fmt: skip
def test_divergences_are_from_the_model_as_it_was(options, tokenizer):
    """A KL that starts at 0, but for rounding, and does not stay there."""
    _, records, _, _ = run(tokenizer, **options)
    retained = [record["loss_retain"] for record in records]
    if options.get("method_options") == {"retain": "soul_kl"}:
        assert all(r > 1.0 for r in retained)  # a cross-entropy: log 300 = 5.7 at most before training
    else:
        assert 0 <= retained[0] < 1e-9 and retained[-1] > 1e-5


def test_dpo_prefers_refusals_and_logs_the_answers(tokenizer):
    forget = examples(4)
    options = dict(epochs=1, batch_size=4, backend="reference")
    first = {}
    for method in ("ga", "dpo"):
        (record,) = unlearn(
            tiny_model(), tokenizer, forget, examples(8)[4:], UnlearnConfig(method=method, **options), progress=False
        )
        first[method] = record["forget_nll"]
    assert first["dpo"] == pytest.approx(first["ga"], rel=1e-5)  # not those of the refusals

    model = tiny_model()
    config = UnlearnConfig(method="dpo", lr=1e-3, method_options={"alpha": 0.0}, **options | dict(epochs=10))
    paired, _ = prepare(model, tokenizer, forget, [], config)
    before = soul.reference_logps(model, paired, backend="reference")
    unlearn(model, tokenizer, forget, [], config, progress=False)
    after = soul.reference_logps(model, paired, backend="reference")
    moved = torch.tensor(after) - torch.tensor(before)
    assert (moved[1::2] > moved[0::2] + 1.0).all()  # every refusal has won against its answer


@pytest.mark.parametrize("method", ["npo", "klmin"])
@pytest.mark.covers("adapters (LoRA)", "one process")
def test_adapters_are_trained_against_the_model_without_them(method, tokenizer):
    model = lora_model()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.zeros_(parameter)  # as peft starts them: the reference itself
    before = copy.deepcopy(model.state_dict())
    config = UnlearnConfig(method=method, epochs=2, batch_size=4, lr=1e-2, backend="reference",
                           method_options={} if method == "klmin" else {"alpha": 0.0})  # fmt: skip
    retain = examples(8)[4:] if method == "klmin" else []
    records = unlearn(model, tokenizer, examples(4), retain, config, progress=False)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all("lora_" in name for name in changed)
    if method == "npo":
        assert records[0]["loss_forget"] == pytest.approx(20 * 0.6931472, rel=1e-6) != records[1]["loss_forget"]
    else:
        assert records[0]["loss_retain"] == 0.0 < records[1]["loss_retain"]  # in the very same batch: exactly


class Counted(RecordedObjective):
    calls = 0

    def __call__(self, logps, batch):
        self.calls += 1
        return super().__call__(logps, batch)


@needs_kernels_on_cpu
@pytest.mark.parametrize("objective, row_bytes, calls", [
    (losses.DPO(retain="kl"), 2 * 320 * 4, 2), (losses.CEU(), 320 * 4, 2), (losses.NPO(reduction="token_mean"), 320 * 4, 1),
], ids=["DPO", "CEU", "NPO"])  # fmt: skip
def test_terms_are_added_up_over_chunks(objective, row_bytes, calls):
    """22 rows in chunks of 14: two evaluations, or one after two chunks where no sum will do. Every term is there once."""
    model = tiny_model()
    data = sequences(6)
    weight = model.lm_head.weight.detach()
    batch = collate(data[:4], data[4:], ref_logps=[-30.0] * 4, ref_hidden=list(_states(model, data)))
    hidden = model.base_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
    results = []
    for chunk_bytes in (2**30, 14 * row_bytes):
        recorded = Counted(objective)
        options = LinearOptions(token_indices=batch.token_indices, chunk_bytes=chunk_bytes, backend="triton")
        loss = linear_objective(
            hidden, weight, batch.labels, recorded, is_forget=batch.is_forget, ref_logps=batch.ref_logps,
            reference=Reference(batch.ref_hidden), options=options,
        )  # fmt: skip
        assert set(recorded.sums) == {"forget", "retain"} and recorded.calls == (1 if chunk_bytes == 2**30 else calls)
        assert sum(recorded.sums.values()).item() == pytest.approx(loss.item(), rel=1e-6)
        results.append({name: value.item() for name, value in recorded.sums.items()})
    assert results[0] == pytest.approx(results[1], rel=1e-5)


def _states(model, data):
    for sequence in data:
        labelled = [t for t, label in enumerate(sequence.labels) if label != -100]
        yield 1.5 * model.base_model(input_ids=torch.tensor([sequence.input_ids])).last_hidden_state[0, labelled].detach()


METHODS_IN_MICRO_BATCHES = [
    *(dict(method=name) for name in losses.OBJECTIVES),
    dict(method="npo", method_options={"retain": "kl"}), dict(method="ceu", method_options={"ignore_first": 3}),
]  # fmt: skip


@pytest.mark.parametrize("options", METHODS_IN_MICRO_BATCHES, ids=lambda options: "-".join(map(str, options.values())))
def test_micro_batches_make_the_step_of_one_batch(options, tokenizer, monkeypatch):
    """5 ragged forget examples and 5 retained ones in 3 micro-batches of 2, 2 and 1: losses, gradients and weights are those of
    one batch of 5. By gradients, not by what the optimizer makes of them: its steps are signs.
    """
    results = []
    for sizes in (dict(batch_size=5), dict(batch_size=2, accumulate=3)):
        gradients = []

        def keep(optimizer, gradients=gradients):
            gradients += [p.grad.clone() for p in optimizer.param_groups[0]["params"]]

        monkeypatch.setattr(soul.SOUL, "step", keep)
        config = UnlearnConfig(**FAST | dict(epochs=1, max_grad_norm=None) | options | sizes)
        (record,) = unlearn(tiny_model(), tokenizer, ragged(5), ragged(9)[4:], config, progress=False)
        results.append((record, gradients))
    (whole, want), (accumulated, got) = results
    for name in whole.keys() - {"tokens_per_s", "peak_memory_gib", "clip_fraction"}:
        assert accumulated[name] == pytest.approx(whole[name], rel=2e-5, abs=3e-6), name  # a difference of terms of 6
    # fp32 sums in another order; where KL starts at 0 the gradient is all rounding, of 1e-5 of what CE's is
    floor = 1e-6 if options["method"] == "klmin" or "kl" in options.get("method_options", {}).values() else 0.0
    for mine, gradient in zip(got, want, strict=True):
        assert (mine - gradient).norm() <= 1e-4 * gradient.norm() + floor


def ragged(n):
    """Answers of 2 to n + 1 words."""
    return [Example(e.prompt, e.answer + " word" * i) for i, e in enumerate(examples(n))]


@pytest.mark.parametrize("old, new", [
    ("batch.within(self.whole, self.add_up)", "batch"), ('terms.get("loss", 0.0) + loss.detach()', "loss.detach()"),
    ("sums.get(name, 0.0) -", "0.0 -"),
])  # fmt: skip
def test_what_is_not_one_batch_is_noticed(old, new, tokenizer, tmp_path, monkeypatch):
    broken = mutant("soul.run.step", old, new, tmp_path)
    monkeypatch.setattr(unlearn_module, "train_step", broken.train_step)
    with pytest.raises(AssertionError):
        test_micro_batches_make_the_step_of_one_batch(dict(method="graddiff"), tokenizer, monkeypatch)


def test_kernels_take_micro_batches(tokenizer, device):
    """Triton's sweep in the interpreter, where each micro-batch is cut into chunks."""
    results = []
    for sizes in (dict(batch_size=3), dict(batch_size=2, accumulate=2)):
        config = UnlearnConfig(method="npo", epochs=1, lr=1e-3, backend="triton", **sizes)
        (record,) = unlearn(tiny_model().to(device), tokenizer, examples(3), examples(6)[3:], config, progress=False)
        results.append((record["loss"], record["retain_nll"]))
    assert results[0] == pytest.approx(results[1], rel=1e-4 if device.type == "cpu" else 1e-2)


@pytest.mark.parametrize("optimizer", ["soul", "adamw"])
def test_gradients_are_clipped_and_their_norm_is_logged(optimizer, tokenizer, monkeypatch):
    """The norm is that of before, clipped or not. SOUL clips in its step: torch's function is not called.
    A high rho: where few coordinates are clipped, the size of a gradient matters.
    """
    results = {}
    for limit in (None, float("inf"), 1e6, 1e-3):
        model, records, _, _ = run(tokenizer, optimizer=optimizer, max_grad_norm=limit, epochs=1, rho=1e4)
        results[limit] = records, model.state_dict()
    for limit in (float("inf"), 1e6):
        assert all(torch.equal(a, b) for a, b in zip(results[limit][1].values(), results[None][1].values()))
    norms = [records[0]["grad_norm"] for records, _ in results.values()]
    assert norms == [pytest.approx(norms[0], rel=1e-6)] * 4 and norms[0] > 0.1
    assert any(not torch.equal(a, b) for a, b in zip(results[1e-3][1].values(), results[None][1].values()))
    if optimizer == "soul":
        monkeypatch.setattr("torch.nn.utils.clip_grad_norm_", None)
        run(tokenizer, epochs=1)


@pytest.mark.parametrize("make", [lambda: tiny_model(), lambda: tiny_model("gpt2, tied"), lambda: lora_model(lora_dropout=0.5)],
                         ids=["llama", "gpt2", "lora"])  # fmt: skip
@pytest.mark.covers("gradient checkpointing", "one process")
def test_gradient_checkpointing_changes_memory_only(make, tokenizer):
    results = []
    for checkpointing in (False, True):
        model = make()
        calls = []
        for name, module in model.named_modules():
            if name.endswith(".mlp"):
                module.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        torch.manual_seed(0)
        config = UnlearnConfig(**FAST, gradient_checkpointing=checkpointing)
        records = unlearn(model, tokenizer, examples(4), examples(8)[4:], config, progress=False)
        results.append(([record["loss"] for record in records], [*model.state_dict().values()]))
        assert len(calls) == 4 * 2 * (1 + checkpointing)  # 4 steps, 2 layers, computed twice
        assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert results[0][0] == results[1][0] and all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1]))


def test_gradient_checkpointing_is_refused_where_there_is_none(tokenizer, monkeypatch):
    monkeypatch.setattr("transformers.LlamaForCausalLM.supports_gradient_checkpointing", False)
    with pytest.raises(ValueError, match="gradient_checkpointing: expected a family that supports it, got LlamaForCausalLM"):
        run(tokenizer, gradient_checkpointing=True)


@pytest.mark.parametrize("curvature", ["retain", "gnb"])
def test_curvature_is_that_of_the_retain_tokens(curvature, tokenizer, monkeypatch):
    """Refreshed at steps 1, 3 and 5 of 6, from gradients that never meet those of the step. The first h is (1 - b2) g g of the
    loss of exactly that batch, also in micro-batches: of the mean cross-entropy over its tokens, with true labels
    for GNB as well.
    """
    first = []
    for sizes in (dict(batch_size=2), dict(batch_size=1, accumulate=2)):
        curvature_grads = []
        real = soul.SophiaG.update_hessian

        def spy(optimizer, curvature_grads=curvature_grads, real=real, **options):
            curvature_grads.append([p.grad.clone() for p in optimizer.param_groups[0]["params"]])
            real(optimizer, **options)

        monkeypatch.setattr(step_module, "gnb_loss", lambda model, batch, generator, n_tokens, backend, chunk_bytes:
                            -token_logps(model, batch, backend, chunk_bytes).sum() / n_tokens)  # fmt: skip
        monkeypatch.setattr(soul.SophiaG, "update_hessian", spy)
        model, records, _, changed = run(tokenizer, curvature=curvature, curvature_every=2, **sizes)
        assert changed and len(curvature_grads) == 3 and len(records) == 6
        assert all("clip_fraction" in record for record in records)
        first.append(curvature_grads[0])
        monkeypatch.undo()
    _, _, retain_indices = next(Order(5, 4, 2, 2, 0))
    model = tiny_model()
    config = UnlearnConfig(**FAST)
    _, retain = prepare(model, tokenizer, examples(5), examples(9)[5:], config)
    batch = collate([], [retain[i] for i in retain_indices])
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten()).backward()
    for got in first:
        for mine, parameter in zip(got, model.parameters(), strict=True):
            assert (mine - parameter.grad).norm() <= 1e-4 * parameter.grad.norm()


@pytest.mark.parametrize("curvature", [
    "unlearn", pytest.param("gnb", marks=pytest.mark.slow(reason="120 steps; the controller is the same for every curvature")),
])  # fmt: skip
def test_rho_is_moved_towards_the_clip_target(curvature, tokenizer):
    """Mean of the last 20 of 60 steps, at both ends of what is reasonable; h itself changes all the while."""
    for target in (0.2, 0.8):
        _, records, _, _ = run(tokenizer, curvature=curvature, clip_target=target, epochs=20, curvature_every=3)
        fractions = [record["clip_fraction"] for record in records[-20:]]
        assert sum(fractions) / 20 == pytest.approx(target, abs=0.15)
        assert len({record["rho"] for record in records}) > 50


def test_evaluates_and_stops_when_it_is_forgotten(tokenizer):
    """Evaluation is of the answers to forget, not of refusals, and does not change the run."""
    options = dict(method="graddiff", epochs=10, method_options={"alpha": 0.0})
    plain, want, _, _ = run(tokenizer, **options)
    model, records, log, _ = run(tokenizer, **options, eval_every=3)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), plain.state_dict().values()))
    assert [r["loss"] for r in records] == [r["loss"] for r in want] and len(records) == 30
    probabilities = {r["step"]: r["forget_prob"] for r in records if "forget_prob" in r}
    assert list(probabilities) == list(range(3, 31, 3)) and all(0 < p < 1 for p in probabilities.values())
    encoded = encode_for(model, tokenizer, examples(5), UnlearnConfig(), "forget")
    assert probabilities[30] == pytest.approx(answer_probability(model, encoded, backend="reference"), rel=1e-5)
    assert json.loads(log.splitlines()[2])["retain_prob"] == records[2]["retain_prob"]

    aim = 15
    limit = probabilities[15]  # at the limit is enough
    assert limit < min(probabilities[step] for step in (3, 6, 9, 12))
    _, stopped, log, _ = run(tokenizer, **options, eval_every=3, stop_forget_prob=limit)
    assert len(stopped) == aim and [r["loss"] for r in stopped] == [r["loss"] for r in want[:aim]]
    assert stopped[-1]["stopped"] == f"forget probability {limit:.4g} has reached {limit:g}"
    assert json.loads(log.splitlines()[-1]) == stopped[-1]


def test_stops_when_the_retain_probability_is_too_low(tokenizer):
    """Without a retain term; a limit of 1 is missed at once, and 0 never."""
    options = dict(method="graddiff", method_options={"alpha": 0.0}, eval_every=2)
    _, records, _, _ = run(tokenizer, **options, stop_retain_prob=1.0, stop_forget_prob=1.0)
    assert len(records) == 2 and "has reached 1; retain probability" in records[-1]["stopped"]
    _, records, _, _ = run(tokenizer, **options, stop_retain_prob=0.0)
    assert len(records) == 6 and "stopped" not in records[-1]
    config = UnlearnConfig(**FAST, method="ga", eval_every=1, stop_retain_prob=0.5)
    with pytest.raises(ValueError, match="stop_retain_prob: expected None without a retain set, got 0.5"):
        unlearn(tiny_model(), tokenizer, examples(2), [], config, progress=False)


@pytest.mark.parametrize("method", ["po", "dpo"])
def test_answers_are_evaluated_not_refusals(method, tokenizer):
    model, records, _, _ = run(tokenizer, method=method, eval_every=6)
    encoded = encode_for(model, tokenizer, examples(5), UnlearnConfig(), "forget")
    assert records[-1]["forget_prob"] == pytest.approx(answer_probability(model, encoded, backend="reference"), rel=1e-5)


def test_a_ratio_of_the_whole_batch_takes_no_micro_batches(tokenizer):
    options = dict(method="npo", method_options={"reduction": "token_mean"}, accumulate=2)
    with pytest.raises(ValueError, match="accumulate: expected 1 with NPO.*token_mean.*raise --batch-size"):
        run(tokenizer, **options)


def test_schedule_warms_up_and_decays():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = build_scheduler(optimizer, 10, 0.2)
    lrs = []
    for _ in range(10):
        lrs.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert lrs[:3] == [0.5, 1.0, 1.0] and lrs[-1] == pytest.approx(1 / 8) and scheduler.get_last_lr()[0] == 0.0


@pytest.mark.parametrize("options, message", [
    ({"optimizer": "sgd"}, "optimizer: expected one of 'soul', 'adamw', got 'sgd'"),
    ({"method": "erase"}, "method: expected one of 'ga', 'graddiff', .*'undial', 'influence', 'memorize', got 'erase'"),
    ({"method": "npo", "method_options": {"beta": 0}}, "beta: expected a positive number, got 0"),
    ({"method": "npo", "method_options": {"beta": float("inf")}}, "beta: expected a positive number, got inf"),
    ({"epochs": 0}, "epochs: expected a positive whole number, got 0"),
    ({"eval_every": -1}, "eval_every: expected a whole number >= 0, got -1"),
    ({"stop_forget_prob": 0.1}, "eval_every: expected a positive number with stop_forget_prob, got 0"),
    ({"stop_retain_prob": 1.5, "eval_every": 1}, r"stop_retain_prob: expected a probability in \[0, 1\], got 1.5"),
    ({"curvature": "fisher"}, "curvature: expected one of 'unlearn', 'retain', 'gnb', got 'fisher'"),
    ({"curvature": "gnb", "optimizer": "adamw"}, "optimizer: expected 'soul', got 'adamw'"),
    ({"clip_target": 0.5, "optimizer": "adamw"}, "optimizer: expected 'soul', got 'adamw'"),
    ({"clip_target": 1.5}, r"clip_target: expected a number in \[0.0, 1.0\), got 1.5"),
    ({"curvature": "retain", "published_code": True}, "published_code: expected False with another curvature"),
    ({"curvature_every": 0}, "curvature_every: expected a positive whole number, got 0"),
    ({"accumulate": 0}, "accumulate: expected a positive whole number, got 0"),
    ({"warmup_ratio": 1.5}, r"warmup_ratio: expected a number in \[0.0, 1.0\)"),
    ({"method": "npo", "method_options": {"beta": "0.1"}}, "beta: expected a positive number, got '0.1'"),
    ({"method_options": None}, "method_options: expected a dict of the method's arguments, got None"),
    ({"eval_every": 1, "stop_forget_prob": "0.1"}, r"stop_forget_prob: expected a probability in \[0, 1\], got '0.1'"),
    ({"seed": 2**70}, "seed: expected a whole number of 64 bits"),
    ({"seed": None}, "seed: expected a whole number of 64 bits, got None"),
    ({"max_grad_norm": "1"}, "max_grad_norm: expected a positive number, got '1'"),
    ({"max_grad_norm": 0.0}, "max_grad_norm: expected a positive number, got 0.0"),
    ({"lr": -1.0}, "lr: expected a number >= 0.0"),
])  # fmt: skip
def test_bad_options_are_named(options, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        run(tokenizer, **options)


def test_retain_set_is_needed_where_it_has_a_weight(tokenizer):
    model = tiny_model()
    with pytest.raises(ValueError, match="retain: expected examples for GradDiff"):
        unlearn(model, tokenizer, examples(2), [], UnlearnConfig(**FAST), progress=False)
    with pytest.raises(ValueError, match="forget: expected at least one example, got none"):
        unlearn(model, tokenizer, [], examples(2), UnlearnConfig(**FAST), progress=False)
    records = unlearn(model, tokenizer, examples(2), [], UnlearnConfig(**FAST, method="ga"), progress=False)
    assert "retain_nll" not in records[0]
    with pytest.raises(ValueError, match="forget, row 1: expected a prompt to refuse"):
        unlearn(model, tokenizer, [examples(1)[0], Example("", "x")], [], UnlearnConfig(**FAST, method="dpo",
                method_options={"alpha": 0.0}), progress=False)  # fmt: skip
    config = UnlearnConfig(**FAST, method="npo", reference_cache=__file__)
    with pytest.raises(ValueError, match="reference_cache: expected a directory, or a new one, got the file"):
        unlearn(model, tokenizer, examples(2), examples(2), config, progress=False)


def test_rows_of_pairs_are_counted_as_in_the_file(tokenizer):
    config = UnlearnConfig(**FAST, method="dpo", max_length=40)
    long = Example("Question:", " word" * 200)
    short = Example("Q:", " A")
    assert len(prepare(tiny_model(), tokenizer, [short, long], [short], config)[0]) == 4
    far = Example("Question: " + "word " * 200, " A")  # the prompt alone is too long
    with pytest.raises(ValueError, match="forget, row 1: expected a label within 40 tokens"):
        prepare(tiny_model(), tokenizer, [short, far], [short], config)


def test_output_directory(tmp_path):
    assert check_output(tmp_path) == tmp_path and check_output(tmp_path / "new" / "deep")
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="output: expected a new or an empty directory, got a path below the file"):
        check_output(__file__ + "/out")
    (tmp_path / "file").write_text("x")
    for path in (tmp_path, tmp_path / "file"):
        with pytest.raises(ValueError, match="output: expected a new or an empty directory"):
            check_output(path)


def test_what_cannot_be_written_is_found_before_anything_takes_its_time(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("os.access", lambda path, mode: asked.append(path))  # as root may everything
    for check in (check_output, lambda path: check_cache(path, "output")):
        with pytest.raises(ValueError, match=f"output: expected a writable path, got {tmp_path}, which is not"):
            check(tmp_path / "new" / "deep")
    assert set(asked) == {tmp_path} and not list(tmp_path.iterdir())

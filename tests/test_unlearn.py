import copy
import importlib
import io
import json

import pytest
import torch

from soul import losses
from soul.data import Example
from soul.unlearn import UnlearnConfig, build_scheduler, check_output, reference_logps, unlearn
from tests import tolerances as tol
from tests.models import examples, sequences, tiny_model, tiny_tokenizer

unlearn_module = importlib.import_module("soul.unlearn")
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
    wanted = {
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
    assert wanted <= set(records[0])
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
    held, real = [], unlearn_module.hidden_states

    def spy(model, batch):
        held.append(sum(p.grad is not None for p in model.parameters()))
        return real(model, batch)

    monkeypatch.setattr(unlearn_module, "hidden_states", spy)
    model, *_ = run(tokenizer)
    assert held == [0] * 6 and all(p.grad is None for p in model.parameters())


def test_a_broken_last_step_is_not_a_success(tokenizer, monkeypatch):
    real = unlearn_module.train_step

    def break_weights(model, *args):
        values = real(model, *args)
        next(model.parameters()).data[0, 0] = float("nan")
        return values

    monkeypatch.setattr(unlearn_module, "train_step", break_weights)
    with pytest.raises(unlearn_module.Diverged, match="lower the learning rate"):
        run(tokenizer, epochs=1, batch_size=5)


def test_sequences_longer_than_the_model_are_refused(tokenizer):
    model = tiny_model("gpt2, tied")
    long = [Example("Question:", " word" * 200)]
    with pytest.raises(ValueError, match="max_length: expected sequences of at most 128 tokens, got .*--max-length 128"):
        unlearn(model, tokenizer, long, examples(1), UnlearnConfig(**FAST), progress=False)


def test_a_padding_token_outside_the_model_does_no_harm(tokenizer):
    """Added to the tokenizer, as many do, without a row in the embedding."""
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


def test_reference_logps_are_the_sums_of_the_model(tokenizer):
    model, given = tiny_model(), sequences(5)
    got = reference_logps(model, given, batch_size=2, backend="reference")
    for sequence, value in zip(given, got):
        logps = model(input_ids=torch.tensor([sequence.input_ids])).logits[0].log_softmax(-1)
        want = sum(logps[t, label].item() for t, label in enumerate(sequence.labels) if label != -100)
        assert value == pytest.approx(want, abs=10 * tol.LOGP_ABS)


def test_npo_starts_at_ratio_one(tokenizer):
    """At the reference model the NPO loss is (2 / beta) log 2 and its gradient that of gradient ascent on the sums."""
    _, records, _, _ = run(tokenizer, method="npo", method_options={"beta": 0.5, "alpha": 0.0})
    assert records[0]["loss"] == pytest.approx(2 / 0.5 * 0.6931472, rel=1e-4)


def test_schedule_warms_up_and_decays():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler, lrs = build_scheduler(optimizer, 10, 0.2), []
    for _ in range(10):
        lrs.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert lrs[:3] == [0.5, 1.0, 1.0] and lrs[-1] == pytest.approx(1 / 8) and scheduler.get_last_lr()[0] == 0.0


@pytest.mark.parametrize("options, message", [
    ({"optimizer": "sgd"}, "optimizer: expected one of 'soul', 'adamw', got 'sgd'"),
    ({"method": "erase"}, "method: expected one of 'ga', 'graddiff', .*'undial', got 'erase'"),
    ({"method": "npo", "method_options": {"beta": 0}}, "beta: expected a positive number, got 0"),
    ({"method": "npo", "method_options": {"beta": float("inf")}}, "beta: expected a positive number, got inf"),
    ({"epochs": 0}, "epochs: expected a positive whole number, got 0"),
    ({"warmup_ratio": 1.5}, r"warmup_ratio: expected a number in \[0.0, 1.0\)"),
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


def test_output_directory(tmp_path):
    assert check_output(tmp_path) == tmp_path and check_output(tmp_path / "new" / "deep")
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="output: expected a new or an empty directory, got a path below the file"):
        check_output(__file__ + "/out")
    (tmp_path / "file").write_text("x")
    for path in (tmp_path, tmp_path / "file"):
        with pytest.raises(ValueError, match="output: expected a new or an empty directory"):
            check_output(path)

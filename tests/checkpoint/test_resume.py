"""A run that is stopped and resumed ends with the weights and the log of an uninterrupted one, bit for bit."""

import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import time

import pytest
import safetensors.torch
import torch

import soul
from soul.checkpoint import Checkpoints, Stopped, describe
from soul.checkpoint.format import checksum, pack, unpack
from soul.cli import main
from soul.models import causal_lm
from soul.run import step as step_module
from soul.run.config import UnlearnConfig
from soul.run.prepare import prepare
from soul_kernels import LinearOptions
from tests.support.models import examples, lora_model, tiny_model, tiny_tokenizer
from tests.support.runs import (
    FAST,
    StopAfter,
    command,
    ended,
    lines,
    log_of,
    numbers,
    run,
    same,
    unlearn_module,
    weights,
    words,
    write_model_and_data,
)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    return write_model_and_data(tmp_path_factory.mktemp("resume"), tokenizer)


@pytest.fixture(scope="module")
def processes():
    """Return a context that forks processes from one that has imported everything (tests/conftest.py), so they start fast."""
    return multiprocessing.get_context("forkserver")


def start(processes, *args):
    process = processes.Process(target=command, args=args)
    process.start()
    return process


def wait_until(condition, process):
    """Poll until the condition holds; return False if the process ends first."""
    until = time.monotonic() + 120
    while time.monotonic() < until:
        if condition():
            return True
        if not process.is_alive():
            return False
    raise TimeoutError


@pytest.mark.slow(reason="starts and kills a process again and again")
def test_a_run_killed_at_random_steps_ends_like_an_undisturbed_one(folder, processes):
    """SIGKILL comes 4 times between steps, and at 4 stages of writing a checkpoint. NPO has a reference, which must stay that
    of the model before unlearning. Dropout shows that the random generators are restored too.
    """
    options = ("--method", "npo", "--epochs", "20", "--save-every", "4")  # 60 steps
    whole = folder / "whole"
    assert ended(start(processes, words(folder, "whole", *options))) == 0
    assert not (whole / "checkpoints").exists()

    broken = folder / "broken"
    draw = random.Random(0)
    kills = 0
    temporary = []
    argv = words(folder, "broken", *options, "--resume")  # from the start, where there is nothing yet
    for target in (draw.randrange(1, 4), *sorted(draw.sample(range(5, 45), 3))):
        process = start(processes, argv)
        assert wait_until(lambda target=target: len(lines(broken / "log.jsonl")) >= target, process)
        os.kill(process.pid, signal.SIGKILL)
        assert ended(process) == -signal.SIGKILL and not (broken / "model.safetensors").exists()
        kills += 1
    for stage in (1, 2, 4, 5):  # the first file, the second, the directory; and after the renaming
        before = Checkpoints(broken / "checkpoints").steps()
        assert ended(start(processes, argv, None, stage)) == -signal.SIGKILL
        after = Checkpoints(broken / "checkpoints").steps()
        temporary.append(len(list((broken / "checkpoints").glob(".*.tmp"))))
        assert after[0] == before[0] + (4 if stage == 5 else 0)
        kills += 1
    assert kills == 8 and temporary == [1, 1, 1, 0]  # half-written ones are there, under another name
    assert ended(start(processes, argv)) == 0
    assert weights(broken) == weights(whole) and log_of(broken) == log_of(whole) and len(log_of(whole)) == 60
    assert sorted(p.name for p in broken.iterdir()) == sorted(p.name for p in whole.iterdir())


def test_sigterm_ends_the_step_saves_and_says_so(folder, processes):
    options = ("--epochs", "20", "--save-every", "0", "--optimizer", "adamw")
    assert main(words(folder, "whole_term", *options)) == 0
    output = folder / "term"
    errors = folder / "term.err"
    process = start(processes, words(folder, "term", *options), str(errors))
    assert wait_until(lambda: len(lines(output / "log.jsonl")) >= 3, process)
    process.terminate()
    assert ended(process) == 143
    (step,) = Checkpoints(output / "checkpoints").steps()
    assert 3 <= step < 60 and step == len(lines(output / "log.jsonl"))
    assert f"soul unlearn: stopped after step {step} of 60; with --resume it goes on after step {step}" in errors.read_text()
    assert main(words(folder, "term", *options, "--resume")) == 0
    assert weights(output) == weights(folder / "whole_term") and log_of(output) == log_of(folder / "whole_term")


def test_a_run_ended_by_a_stopping_criterion_does_not_continue(tokenizer, tmp_path):
    """Killed after its last checkpoint, before the model was saved."""
    options = dict(eval_every=2, stop_forget_prob=1.0)
    whole, want = run(tokenizer, Checkpoints(tmp_path, every=2), **options)
    model, records = run(tokenizer, Checkpoints(tmp_path, every=2, resume=True), **options)
    assert same(model, whole) and records == want and len(records) == 2 and "stopped" in records[-1]


def test_adapters_of_another_scale_are_another_run(tokenizer, tmp_path):
    """The tensors have the same shapes; only the scale differs."""
    with pytest.raises(Stopped):
        run(tokenizer, StopAfter(tmp_path, 2), lora_model(lora_alpha=8))
    with pytest.raises(ValueError, match="resume, lora: expected .*'lora_alpha': 8.* got .*'lora_alpha': 16"):
        run(tokenizer, Checkpoints(tmp_path, resume=True), lora_model(lora_alpha=16))
    with pytest.raises(ValueError, match="resume, lora: expected"):
        run(tokenizer, Checkpoints(tmp_path, resume=True), lora_model(lora_alpha=8, lora_dropout=0.1))


def test_a_model_of_another_configuration_is_another_run(tokenizer, tmp_path):
    """Weights and shapes are the same; what is computed from them is not."""
    with pytest.raises(Stopped):
        run(tokenizer, StopAfter(tmp_path, 1))
    for name, value, was in (
        ("hidden_act", "gelu", "'silu'"), ("rms_norm_eps", 1e-3, "1e-06"), ("attention_dropout", 0.1, "0.0"),
        ("attn_implementation", "eager", "'sdpa'"),
    ):  # fmt: skip
        model = tiny_model()
        setattr(model.config, name if hasattr(model.config, name) else f"_{name}", value)
        before = {n: t.clone() for n, t in model.state_dict().items()}
        expected = f"resume, configuration of the model, {name}: expected {was} as in the checkpoint, got {value!r}; "
        with pytest.raises(ValueError, match=re.escape(expected)):
            run(tokenizer, Checkpoints(tmp_path, resume=True), model)
        assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    model = tiny_model()
    model.config._name_or_path = "elsewhere"
    assert len(run(tokenizer, Checkpoints(tmp_path, resume=True), model)[1]) == 6


def test_a_run_that_is_refused_leaves_no_hooks_and_no_gradients(tokenizer, tmp_path):
    options = dict(gradient_release=True, max_grad_norm=None)
    with pytest.raises(Stopped):
        run(tokenizer, StopAfter(tmp_path, 2), **options)
    for path in tmp_path.glob("step-*/*"):
        path.write_bytes(b"")
    model = tiny_model()
    before = {n: t.clone() for n, t in tiny_model().state_dict().items()}
    with pytest.raises(ValueError, match="damaged ones only"), pytest.warns(UserWarning, match="not readable"):
        run(tokenizer, Checkpoints(tmp_path, resume=True), model, **options)
    model(torch.zeros(1, 3, dtype=torch.int64)).logits.sum().backward()  # a hook would step and release the gradients
    assert all(p.grad is not None for p in model.parameters())
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_a_run_that_diverges_leaves_no_gradients(tokenizer, monkeypatch):
    model = tiny_model()
    monkeypatch.setattr(unlearn_module, "train_step", _step_to_nan)
    with pytest.raises(unlearn_module.Diverged):
        run(tokenizer, model=model)
    assert all(p.grad is None for p in model.parameters())


def _step_to_nan(model, *_):
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    return {"loss": torch.tensor(float("nan")), "forget_nll": torch.tensor(1.0)}


METHODS = [
    dict(method="graddiff"), dict(method="dpo"), dict(method="klmin"), dict(method="undial", method_options={"retain": "kl"}),
]  # fmt: skip
MANY = pytest.mark.slow(reason="three runs for each; every method, every dtype and both optimizers are always tested")


@pytest.mark.parametrize("optimizer, dtype, method", [
    pytest.param(optimizer, dtype, method, marks=MANY if index and (optimizer, dtype) != ("soul", torch.bfloat16) else [])
    for optimizer in ("soul", "adamw") for dtype in (torch.float32, torch.bfloat16) for index, method in enumerate(METHODS)
], ids=str)  # fmt: skip
def test_resumes_in_the_middle_of_an_epoch(optimizer, dtype, method, tokenizer, tmp_path):
    """Stop at step 2 of 3 in the first epoch: the order of both sets continues, and references stay those of the model
    before unlearning. bf16 with SOUL is compensated, so the low bits beside the weights must be restored as well.
    """
    options = dict(optimizer=optimizer, **method)
    whole, want = run(tokenizer, model=tiny_model().to(dtype), **options)
    with pytest.raises(Stopped, match="stopped after step 2 of 6"):
        run(tokenizer, StopAfter(tmp_path, 2), tiny_model().to(dtype), **options)
    torch.rand(3), random.random()
    model, records = run(tokenizer, Checkpoints(tmp_path, resume=True), tiny_model().to(dtype), **options)
    assert same(model, whole) and records == want and len(records) == 6


@pytest.mark.parametrize("options", [
    dict(state_dtype="8bit"), dict(state_dtype=torch.bfloat16), dict(rho="auto", clip_target=0.5),
    dict(capturable=True, max_grad_norm=1.0), dict(published_code=True, skip_nonfinite=True),
], ids=str)  # fmt: skip
@pytest.mark.covers("checkpoints, resumed bit for bit", "one process")
@pytest.mark.covers("8-bit states", "one process")
@pytest.mark.covers("24-bit and stochastic weights", "one process")
def test_every_state_storage_resumes(options, tokenizer, tmp_path, monkeypatch):
    def build(model, config):
        return soul.SOUL(model.parameters(), lr=1e-3, weight_decay=0.0, backend="reference", **options)

    monkeypatch.setattr(unlearn_module, "build_optimizer", build)
    whole, want = run(tokenizer, model=tiny_model().bfloat16())
    with pytest.raises(Stopped):
        run(tokenizer, StopAfter(tmp_path, 4), tiny_model().bfloat16())
    model, records = run(tokenizer, Checkpoints(tmp_path, resume=True), tiny_model().bfloat16())
    assert same(model, whole) and records == want
    assert not list(tmp_path.rglob("*.pt")) and not list(tmp_path.rglob("*.bin"))


@pytest.mark.parametrize("first, model, options", [
    (True, lambda: tiny_model().bfloat16(), dict(gradient_release=True, max_grad_norm=None)), (False, lora_model, {}),
], ids=["offloaded before the stop", "adapters, offloaded after it"])  # fmt: skip
def test_a_run_resumes_with_states_elsewhere(first, model, options, tokenizer, tmp_path):
    """Where the states are changes no bit, and no checkpoint; on a CPU a warning says that it saves nothing."""
    options = options | dict(state_dtype="8bit")
    whole, want = run(tokenizer, model=model(), **options)
    with pytest.warns(UserWarning, match="state_offload: on a CPU the states are in main memory anyway"):
        with pytest.raises(Stopped):
            run(tokenizer, StopAfter(tmp_path, 2), model(), state_offload=first, **options)
        resumed, records = run(tokenizer, Checkpoints(tmp_path, resume=True), model(), state_offload=not first, **options)
    assert same(resumed, whole) and records == want


@pytest.mark.parametrize("curvature", ["retain", "gnb"])
@pytest.mark.covers("curvature of retain data", "one process")
def test_curvature_resumes(curvature, tokenizer, tmp_path):
    """Stop between two refreshes: GNB draws the labels that it would have drawn without the stop."""
    options = dict(curvature=curvature, curvature_every=2, clip_target=0.4, accumulate=2, batch_size=1)
    whole, want = run(tokenizer, **options)
    with pytest.raises(Stopped):
        run(tokenizer, StopAfter(tmp_path, 3), **options)
    torch.manual_seed(7)
    model, records = run(tokenizer, Checkpoints(tmp_path, resume=True), **options)
    assert same(model, whole) and records == want and len(records) == 6


def test_adapters_resume_and_only_they_are_saved(tokenizer, tmp_path):
    options = dict(method="npo", lr=1e-2)
    whole, want = run(tokenizer, model=lora_model(lora_dropout=0.1), **options)
    torch.manual_seed(0)
    with pytest.raises(Stopped):
        run(tokenizer, StopAfter(tmp_path, 3), lora_model(lora_dropout=0.1), **options)
    saved = safetensors.torch.load_file(tmp_path / "step-3" / "model.safetensors")
    assert all("lora_" in name or name.startswith("buffer") for name in saved)
    torch.manual_seed(7)
    model, records = run(tokenizer, Checkpoints(tmp_path, resume=True), lora_model(lora_dropout=0.1), **options)
    assert same(model, whole) and records == want


@pytest.mark.parametrize("curvature", ["unlearn", "retain", "gnb"])
def test_a_resumed_run_keeps_the_chunks_of_its_first_card(curvature, tokenizer, tmp_path, monkeypatch):
    used = []

    def record(**options):
        used.append(options["chunk_bytes"])
        return LinearOptions(**options)

    for module in (step_module, causal_lm):  # the second one for curvature
        monkeypatch.setattr(module, "LinearOptions", record)
    monkeypatch.setattr(step_module, "default_chunk_bytes", lambda device: 5000)
    with pytest.raises(Stopped):
        run(tokenizer, StopAfter(tmp_path, 2), curvature=curvature, curvature_every=1)
    assert set(used) == {5000}
    monkeypatch.setattr(step_module, "default_chunk_bytes", lambda device: 9000)  # another card
    for older, want in ((False, 5000), (True, 9000)):
        used.clear()
        with pytest.raises(Stopped):
            run(tokenizer, StopAfter(tmp_path, 5 if older else 4, resume=True), curvature=curvature, curvature_every=1)
        assert set(used) == {want}
        path = max(tmp_path.glob("step-*")) / "training.json"  # now as an older version has written it
        state = json.loads(path.read_text())["state"]
        state["parts"]["dict"] = [item for item in state["parts"]["dict"] if item[0] != "chunk_bytes"]
        path.write_text(json.dumps({"checksum": checksum(state), "state": state}))


def test_old_checkpoints_are_removed_and_the_log_is_complete(tokenizer, tmp_path):
    run(tokenizer, Checkpoints(tmp_path / "c", every=1, keep=2))
    assert Checkpoints(tmp_path / "c").steps() == [6, 5]
    log = tmp_path / "log.jsonl"
    log.write_text("what a killed run had written beyond its checkpoint\n" * 9)
    shutil.rmtree(tmp_path / "c" / "step-6")
    _, records = run(tokenizer, Checkpoints(tmp_path / "c", every=1, resume=True), log=log)
    assert numbers(map(json.loads, lines(log))) == records and len(records) == 6


class Clock:
    """A clock that a step moves by 4 minutes."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        real = unlearn_module.train_step
        monkeypatch.setattr("soul.checkpoint.local.time.monotonic", lambda: self.now)
        monkeypatch.setattr(unlearn_module, "train_step", lambda *args: self.step() or real(*args))

    def step(self):
        self.now += 240.0


@pytest.mark.parametrize("options, saved", [
    (dict(minutes=10), [3, 6]), (dict(minutes=8, every=3), [2, 3, 5, 6]), (dict(minutes=0), []),
], ids=str)  # fmt: skip
def test_a_run_is_saved_by_time_too(options, saved, tokenizer, tmp_path, monkeypatch):
    """Saving by time does not change the run."""
    whole, want = run(tokenizer)
    steps = []
    real = Checkpoints.save
    monkeypatch.setattr(Checkpoints, "save", lambda self, step, *args: steps.append(step) or real(self, step, *args))
    Clock(monkeypatch)
    model, records = run(tokenizer, Checkpoints(tmp_path, **options))
    assert steps == saved and same(model, whole) and records == want


@pytest.mark.parametrize("more, minutes", [
    ((), 10.0), (("--save-minutes=0",), 0.0), (("--save-every=0",), 0.0), (("--save-every=0", "--save-minutes=2.5"), 2.5),
])  # fmt: skip
def test_the_command_saves_every_10_minutes(more, minutes, folder, tmp_path, monkeypatch):
    """A run that asks for no checkpoints saves none."""
    intervals = []
    real = Checkpoints.__init__

    def init(checkpoints, *args, **options):
        intervals.append(options.get("minutes"))
        real(checkpoints, *args, **options)

    monkeypatch.setattr(Checkpoints, "__init__", init)
    monkeypatch.setattr("soul.run.unlearner.unlearn", lambda *args, log, **options: log.touch() or [{}])
    assert main(words(folder, tmp_path / "out", "--epochs", "1", *more)) == 0
    assert set(intervals) == {minutes}


def test_a_run_of_another_kind_is_refused(tokenizer, tmp_path):
    with pytest.raises(Stopped):
        run(tokenizer, StopAfter(tmp_path, 2))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    other = tiny_model()
    with torch.no_grad():
        other.model.norm.weight[0] += 1.0
    for message, changes in {
        "resume, lr: expected 0.001 as in the checkpoint, got 0.002": dict(lr=2e-3),
        "resume, method_options: expected {} as in the checkpoint, got {'alpha': 2.0}": dict(method_options={"alpha": 2.0}),
        "resume, epochs: expected 2 as in the checkpoint, got 3": dict(epochs=3),
        "resume, content of forget: expected that of the checkpoint, got another one": dict(forget=examples(4)),
        "the model: expected that of the checkpoint, got another one; give the model as it was": dict(model=other),
        "resume, configuration of the model, tie_word_embeddings: expected True": dict(model=tiny_model("llama, untied")),
        "resume, content of the model: expected that": dict(model=lora_model("llama, tied")),
    }.items():
        with pytest.raises(ValueError) as error:
            run(tokenizer, Checkpoints(tmp_path, resume=True), **changes)
        assert message in str(error.value)
    with pytest.raises(ValueError, match="checkpoints: expected a directory without any, got step 2"):
        run(tokenizer, Checkpoints(tmp_path))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    run(tokenizer, Checkpoints(tmp_path, resume=True), reference_cache=str(tmp_path / "cache"))  # changes no number


def test_another_number_of_threads_is_warned_of(tokenizer, tmp_path, monkeypatch):
    with pytest.raises(Stopped):
        run(tokenizer, StopAfter(tmp_path, 2))
    monkeypatch.setattr("torch.get_num_threads", lambda: 64)
    with pytest.warns(UserWarning, match="threads was .* and is 64: last bits may differ"):
        run(tokenizer, Checkpoints(tmp_path, resume=True))


def test_trees_keep_types_bits_and_strides():
    tree = {
        "a": (1, 2.5, None, True, "x", float("inf")), 3: [torch.arange(6).view(2, 3).T, torch.tensor(0.1)],
        "empty": torch.empty(0, dtype=torch.int8), "codes": torch.arange(256).to(torch.uint8),
    }  # fmt: skip
    tensors = {}
    text = json.dumps(pack(tree, tensors))
    got = unpack(json.loads(text), {n: t.contiguous() for n, t in tensors.items()})
    assert got["a"] == tree["a"] and list(got) == list(tree)
    for a, b in zip((*got[3], got["empty"], got["codes"]), (*tree[3], tree["empty"], tree["codes"])):
        assert torch.equal(a, b) and a.dtype == b.dtype and a.stride() == b.stride()
    with pytest.raises(TypeError, match="a checkpoint cannot hold a set"):
        pack({"x": set()}, {})


def test_numbers_are_checked(tmp_path):
    for name, options in (("save_every", {"every": -1}), ("keep", {"keep": 0}), ("save_every", {"every": 1.5})):
        with pytest.raises(ValueError, match=f"{name}: expected a whole number >= "):
            Checkpoints(tmp_path, **options)
    for minutes in (-1, float("nan"), float("inf"), "10"):
        with pytest.raises(ValueError, match="save_minutes: expected a number >= 0.0"):
            Checkpoints(tmp_path, minutes=minutes)


def test_a_run_is_described_by_content(tokenizer):
    config = UnlearnConfig(**FAST)
    encoded = prepare(tiny_model(), tokenizer, examples(5), examples(9)[5:], config)
    description = describe(tiny_model(), *encoded, config.decisive())
    assert description == describe(tiny_model(), *encoded, config.decisive())
    assert description != describe(tiny_model(), encoded[1], encoded[0], config.decisive())
    assert json.loads(json.dumps(description)) == description

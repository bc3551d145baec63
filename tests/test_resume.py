"""A run that is stopped, by whatever, and goes on: the weights and the log of one that was not, bit for bit."""

import errno
import importlib
import json
import multiprocessing
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import time
import warnings

import pytest
import safetensors.torch
import torch
from transformers import PreTrainedTokenizerBase

import soul
from soul import checkpoint, files, run_state
from soul import output as output_module
from soul.checkpoint import Checkpoints, Stopped, describe, save_model
from soul.cli import main
from soul.config import UnlearnConfig
from soul.data import Example
from soul.models import load
from soul.output import occupy
from soul.prepare import prepare
from soul.unlearn import unlearn
from tests.models import examples, lora_model, tiny_model, tiny_tokenizer

unlearn_module = importlib.import_module("soul.unlearn")
VOLATILE = ("tokens_per_s", "peak_memory_gib")
FAST = dict(epochs=2, batch_size=2, lr=1e-3, backend="reference")  # 6 steps of 5 examples


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer):
    """A model with dropout, and data, for the command."""
    root = tmp_path_factory.mktemp("resume")
    model = tiny_model("gpt2, tied")
    model.config.resid_pdrop = model.config.attn_pdrop = 0.1
    model.save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    rows = [json.dumps({"prompt": e.prompt, "completion": e.answer}) + "\n" for e in examples(12)]
    (root / "forget.jsonl").write_text("".join(rows[:5]))
    (root / "retain.jsonl").write_text("".join(rows[5:]))
    return root


def words(place, output, *more):
    given = {"model": "model", "forget": "forget.jsonl", "retain": "retain.jsonl", "output": output}
    paths = [word for name, value in given.items() for word in (f"--{name}", str(place / value))]
    return ["unlearn", *paths, "--batch-size", "2", "--lr", "1e-3", "--device", "cpu", "--backend", "reference", *more]


def command(argv, errors=None, die_at_fsync=None):
    """The command in a process of its own, which may kill itself at one of its fsyncs."""
    torch.set_num_threads(1)
    if errors is not None:
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    if die_at_fsync is not None:
        left, real = [die_at_fsync], os.fsync

        def fsync(descriptor):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            real(descriptor)

        os.fsync = fsync
    raise SystemExit(main(argv))


@pytest.fixture(scope="module")
def processes():
    """Forked from one that has imported everything and computed nothing: they start in no time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.test_resume"])
    return context


def start(processes, *args):
    process = processes.Process(target=command, args=args)
    process.start()
    return process


def ended(process):
    process.join(120)
    assert process.exitcode is not None
    return process.exitcode


def lines(path):
    return path.read_text().splitlines() if path.exists() else []


def numbers(records):
    return [{name: value for name, value in record.items() if name not in VOLATILE} for record in records]


def log_of(output):
    return numbers(json.loads(line) for line in lines(output / "log.jsonl"))


def weights(output):
    return (output / "model.safetensors").read_bytes()


def wait_until(condition, process):
    """Watches from outside, as closely as it can; False where the process has ended first."""
    until = time.monotonic() + 120
    while time.monotonic() < until:
        if condition():
            return True
        if not process.is_alive():
            return False
    raise TimeoutError


def test_killed_at_random_steps_a_run_ends_as_if_nothing_had_been(place, processes):
    """SIGKILL 4 times between steps, and at 4 stages of writing a checkpoint; NPO, so that there is a reference that must stay
    the one of the model before unlearning. Dropout: the random generators go on too.
    """
    options = ("--method", "npo", "--epochs", "20", "--save-every", "4")  # 60 steps
    whole = place / "whole"
    assert ended(start(processes, words(place, "whole", *options))) == 0
    assert not (whole / "checkpoints").exists()

    broken, draw, kills, seen = place / "broken", random.Random(0), 0, []
    argv = words(place, "broken", *options, "--resume")  # from the start, where there is nothing yet
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
        seen.append(len(list((broken / "checkpoints").glob(".*.tmp"))))
        assert after[0] == before[0] + (4 if stage == 5 else 0)
        kills += 1
    assert kills == 8 and seen == [1, 1, 1, 0]  # half-written ones are there, under another name
    assert ended(start(processes, argv)) == 0
    assert weights(broken) == weights(whole) and log_of(broken) == log_of(whole) and len(log_of(whole)) == 60
    assert sorted(p.name for p in broken.iterdir()) == sorted(p.name for p in whole.iterdir())


def test_sigterm_ends_the_step_saves_and_says_so(place, processes):
    options = ("--epochs", "20", "--save-every", "0", "--optimizer", "adamw")
    assert ended(start(processes, words(place, "whole_term", *options))) == 0
    output, errors = place / "term", place / "term.err"
    process = start(processes, words(place, "term", *options), str(errors))
    assert wait_until(lambda: len(lines(output / "log.jsonl")) >= 3, process)
    process.terminate()
    assert ended(process) == 143
    (step,) = Checkpoints(output / "checkpoints").steps()
    assert 3 <= step < 60 and step == len(lines(output / "log.jsonl"))
    assert f"soul unlearn: stopped after step {step} of 60; with --resume it goes on after step {step}" in errors.read_text()
    assert ended(start(processes, words(place, "term", *options, "--resume"))) == 0
    assert weights(output) == weights(place / "whole_term") and log_of(output) == log_of(place / "whole_term")


def test_a_run_that_has_ended_is_left_alone(place, capsys):
    assert main(words(place, "ended", "--epochs", "1")) == 0
    before = {path: path.stat().st_mtime_ns for path in (place / "ended").iterdir()}
    assert main(words(place, "ended", "--epochs", "1", "--resume")) == 0
    assert "this run has ended" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (place / "ended").iterdir()} == before


def test_resume_of_a_run_that_has_ended_refuses_another_one(place, tmp_path, capsys):
    """Status 0 would claim a model that nobody has made. Options are compared with those that the run has left, rows with the
    digests of those that it has read; where the rows lie, and what changes no number, may differ.
    """
    for name in ("forget", "retain"):
        shutil.copy(place / f"{name}.jsonl", tmp_path)
    shutil.copytree(place / "model", tmp_path / "model")
    shutil.copytree(place / "model", tmp_path / "other")
    argv = words(tmp_path, "out", "--epochs", "1", "--lora-rank", "2")
    assert main(argv) == 0
    shutil.copy(tmp_path / "forget.jsonl", tmp_path / "moved.jsonl")
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("".join((tmp_path / "forget.jsonl").read_text().splitlines(True)[:4]))
    before, same = contents(tmp_path / "out"), ["--save-every", "7", "--keep", "1", "--forget", str(tmp_path / "moved.jsonl")]
    assert main([*argv, *same, "--resume"]) == 0
    assert "this run has ended" in capsys.readouterr().out
    for message, more in (
        ("resume, lr: expected 0.001 as in the run that has ended, got 0.002", ["--lr", "2e-3"]),
        ("resume, seed: expected 0 as in the run that has ended, got 1", ["--seed", "1"]),
        ("resume, option: expected [] as in", ["--option", "retain=kl"]),
        ("resume, merge: expected False as in", ["--merge"]),
        (f"resume, model: expected '{tmp_path / 'model'}' as in", ["--model", str(tmp_path / "other")]),
        ("resume, content of forget: expected that of the run that has ended, got another one", ["--forget", str(fewer)]),
    ):
        assert main([*argv, *more, "--resume"]) == 2, message
        assert message in capsys.readouterr().err
    (tmp_path / "retain.jsonl").write_text((tmp_path / "retain.jsonl").read_text() + '{"prompt": "a", "completion": "b"}\n')
    assert main([*argv, "--resume"]) == 2
    assert "resume, content of retain: expected that of the run that has ended" in capsys.readouterr().err
    assert contents(tmp_path / "out") == before
    for text in ("{}", "{", "[]"):  # {}: of a run in Python
        (tmp_path / "out" / "soul_config.json").write_text(text)
        assert main([*argv, "--resume"]) == 2
        assert "resume: expected the options of the run that has ended, got " in capsys.readouterr().err


def test_other_refusals_make_another_run_that_has_ended(place, tmp_path, capsys):
    """Their content decides, not where the file lies."""
    refusals, moved = tmp_path / "refusals.txt", tmp_path / "moved.txt"
    refusals.write_text("No.\nI cannot say.\n")
    argv = words(place, tmp_path / "out", "--epochs", "1", "--method", "po", "--resume", "--refusals")
    assert main([*argv, str(refusals)]) == 0
    refusals.rename(moved)
    assert main([*argv, str(moved)]) == 0
    assert "this run has ended" in capsys.readouterr().out
    moved.write_text("No.\n")
    assert main([*argv, str(moved)]) == 2
    assert "resume, content of refusals: expected that of the run that has ended" in capsys.readouterr().err


INFLUENCE = UnlearnConfig(method="influence", backend="reference")
FILES = ("soul_config.json", "data.json", "log.jsonl")  # that a resumed run writes again, in place


@pytest.mark.parametrize("name, link", [
    *((name, link) for name in (*FILES, "checkpoints") for link in ("symbolic", "dangling")),
    *((name, "hard") for name in FILES),
])  # fmt: skip
def test_a_link_in_the_output_of_a_resumed_run_is_refused(name, link, place, tmp_path, capsys):
    """Whoever may write in there must not have the run write anywhere else."""
    victim, output = tmp_path / "victim", tmp_path / "out"
    victim.mkdir() if name == "checkpoints" else victim.write_text("precious")
    output.mkdir()
    (output / "soul_config.json").write_text("{}")
    (output / name).unlink(missing_ok=True)
    if link == "hard":
        (output / name).hardlink_to(victim)
    else:
        (output / name).symlink_to(victim if link == "symbolic" else tmp_path / "nowhere")
    assert main(words(place, output, "--epochs", "1", "--resume")) == 2
    kind = {"hard": "one of several names of a file"}.get(link, "a symbolic link")
    assert f"output: expected files of the run's own, got {output / name}, {kind}" in capsys.readouterr().err
    assert not (tmp_path / "nowhere").exists()
    assert list(victim.iterdir()) == [] if name == "checkpoints" else victim.read_text() == "precious"


def test_a_link_that_is_put_there_after_the_check_is_refused_too(tokenizer, tmp_path):
    victim, path = tmp_path / "victim", tmp_path / "log.jsonl"
    victim.write_text("precious")
    for link in (path.symlink_to, path.hardlink_to):
        link(victim)
        with pytest.raises(ValueError, match="output: expected files of the run's own, got .*log.jsonl, (a|one of)"):
            run(tokenizer, log=path)
        with pytest.raises(ValueError, match="output: expected files of the run's own, got .*log.jsonl, (a|one of)"):
            unlearn(tiny_model(), tokenizer, examples(2), examples(4)[2:], INFLUENCE, log=path)
        path.unlink()
    assert victim.read_text() == "precious"
    (tmp_path / "soul_config.json").symlink_to(victim)
    with pytest.raises(ValueError, match="soul_config.json, a symbolic link"):
        occupy(tmp_path)
    assert victim.read_text() == "precious"


@pytest.mark.parametrize("more", [(), ("--save-every", "1")], ids=["no checkpoints", "checkpoints"])
def test_an_output_removed_during_a_run_is_named_and_the_model_is_there(more, place, tmp_path, capsys, monkeypatch):
    """The work of hours is saved; but there is no log, and the command must not say so."""
    output, real, left = tmp_path / "out", unlearn_module.train_step, [2]

    def train_step(*args):
        left[0] -= 1
        if left[0] == 0:
            shutil.rmtree(output)
        return real(*args)

    monkeypatch.setattr(unlearn_module, "train_step", train_step)
    assert main(words(place, output, "--epochs", "1", *more)) == 1
    out, err = capsys.readouterr()
    lost = "soul_config.json, data.json, log.jsonl"
    assert f"soul unlearn: {output} was removed during the run: the model is saved there, but {lost} are lost\n" in err
    assert "log.jsonl" not in out and (output / "model.safetensors").is_file()


def test_an_output_that_another_run_has_taken_is_left_to_it(place, tmp_path, capsys, monkeypatch):
    output, real = tmp_path / "out", unlearn_module.train_step

    def train_step(*args):
        shutil.rmtree(output)
        with occupy(output):
            (output / "soul_config.json").write_text("{}")
        return real(*args)

    monkeypatch.setattr(unlearn_module, "train_step", train_step)
    assert main(words(place, output, "--epochs", "1")) == 1
    assert f"soul unlearn: {output} was removed during the run, and another run is in there" in capsys.readouterr().err
    assert [path.name for path in output.iterdir()] == ["soul_config.json"]


def contents(output):
    return {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}


def test_one_run_at_a_time_in_an_output_directory(place, capsys, monkeypatch):
    """The lock is of an open file: whatever ends the process ends it (the killed runs above go on)."""
    output, argv = place / "locked", words(place, "locked", "--epochs", "1", "--resume")
    with occupy(output):
        (output / "log.jsonl").write_text("of the other run")
        before = contents(output)
        assert main(argv) == 2
        assert f"output: expected a directory in which nothing runs, got {output}, where" in capsys.readouterr().err
        assert contents(output) == before
    assert main(argv) == 0
    for name in ("flock", None):  # a file system without locks, a system without them
        if name is None:
            monkeypatch.setattr(output_module, "fcntl", None)
        else:
            monkeypatch.setattr(output_module.fcntl, name, lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "none")))
        with occupy(output):
            pass


def test_one_run_at_a_time_writes_checkpoints(tokenizer, tmp_path):
    """Another one would remove what is being written, and the two would mix their steps."""
    with Checkpoints(tmp_path).alone():
        (tmp_path / ".half.tmp").mkdir()
        with pytest.raises(ValueError, match="checkpoints: expected a directory in which nothing runs, got .* going on"):
            run(tokenizer, Checkpoints(tmp_path, resume=True))
        assert [path.name for path in tmp_path.iterdir()] == [".half.tmp"]
    with pytest.raises(Stopped):
        run(tokenizer, StopAfter(tmp_path, 2))
    run(tokenizer, Checkpoints(tmp_path, resume=True))  # whatever ends a run ends its lock


def test_what_is_said_of_a_run_is_said_of_the_one_that_goes_on(place, tokenizer, capsys):
    output, options = place / "said", ("--epochs", "1", "--save-every", "0", "--resume")
    output.mkdir()
    (output / "soul_config.json").write_text("{}")  # of a run that has ended before its first checkpoint
    assert main(words(place, "said", *options, "--lr", "1e-4")) == 0
    assert json.loads((output / "soul_config.json").read_text())["lr"] == 1e-4
    (output / "model.safetensors").unlink(), (output / "config.json").unlink()
    (output / "checkpoints").mkdir()
    given = [json.loads(line) for line in lines(place / "forget.jsonl")]
    forget = [Example(row["prompt"], row["completion"]) for row in given]
    model, _ = load(place / "model", dtype="bfloat16")
    with pytest.raises(Stopped):
        run(tokenizer, StopAfter(output / "checkpoints", 1), model, forget)
    before = contents(output)
    (place / "fewer.jsonl").write_text("\n".join(lines(place / "forget.jsonl")[1:]))
    assert main(words(place, "said", *options, "--forget", str(place / "fewer.jsonl"))) == 2
    assert "resume, " in capsys.readouterr().err and contents(output) == before


def test_in_python_the_model_of_a_run_that_has_ended_is_not_replaced(place):
    config = UnlearnConfig(**FAST | dict(epochs=1))
    names = [place / name for name in ("model", "forget.jsonl", "retain.jsonl")]
    output = place / "replaced"
    soul.Unlearner(*names, config, device="cpu").run(output, progress=False, resume=True)
    before = contents(output)
    with pytest.raises(ValueError, match="resume: expected a run that has not ended, got the model of one that has"):
        soul.Unlearner(*names, config, device="cpu").run(output, progress=False, resume=True)
    assert contents(output) == before


def test_resume_wants_an_output_directory_of_its_own(place, capsys):
    (place / "foreign").mkdir()
    (place / "foreign" / "thing").write_text("x")
    assert main(words(place, "foreign", "--resume")) == 2
    assert "resume: expected the output directory of a run, or a new one" in capsys.readouterr().err
    assert [p.name for p in (place / "foreign").iterdir()] == ["thing"]


def run(tokenizer, checkpoints=None, model=None, forget=None, log=None, **options):
    model = tiny_model() if model is None else model
    forget = examples(5) if forget is None else forget
    config = UnlearnConfig(**FAST | options)
    records = unlearn(model, tokenizer, forget, examples(9)[5:], config, progress=False, checkpoints=checkpoints, log=log)
    return model, numbers(records)


def test_a_run_that_a_criterion_has_ended_does_not_go_on(tokenizer, tmp_path):
    """Killed after its last checkpoint, before the model was saved."""
    options = dict(eval_every=2, stop_forget_prob=1.0)
    whole, want = run(tokenizer, Checkpoints(tmp_path, every=2), **options)
    model, records = run(tokenizer, Checkpoints(tmp_path, every=2, resume=True), **options)
    assert same(model, whole) and records == want and len(records) == 2 and "stopped" in records[-1]


class StopAfter(Checkpoints):
    """Told to stop while a step is being taken."""

    def __init__(self, directory, step, **options):
        super().__init__(directory, **options)
        self.last = step

    def due(self, step):
        self.stop = self.stop or step == self.last
        return super().due(step)


def same(model, other):
    return all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))


def test_adapters_of_another_scale_are_another_run(tokenizer, tmp_path):
    """Their tensors have the same shapes."""
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
    model, before = tiny_model(), {n: t.clone() for n, t in tiny_model().state_dict().items()}
    with pytest.raises(ValueError, match="damaged ones only"), pytest.warns(UserWarning, match="not readable"):
        run(tokenizer, Checkpoints(tmp_path, resume=True), model, **options)
    model(torch.zeros(1, 3, dtype=torch.int64)).logits.sum().backward()  # a hook would step, and take the gradients
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


def test_a_generation_config_that_transformers_does_not_save_costs_no_model(tokenizer, tmp_path):
    """As those with a temperature and without sampling, which it loads."""
    model = tiny_model()
    given = model.generation_config
    given.do_sample, given.temperature, given.eos_token_id = False, 0.6, 7
    with pytest.raises(ValueError):
        model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="generation_config.json is a default"):
        save_model(model, tokenizer, tmp_path)
    assert model.generation_config is given and type(model).from_pretrained(tmp_path).generation_config.temperature != 0.6
    assert same(type(model).from_pretrained(tmp_path), model)


@pytest.mark.parametrize("method", [
    dict(method="graddiff"), dict(method="dpo"), dict(method="klmin"), dict(method="undial", method_options={"retain": "kl"}),
], ids=lambda options: options["method"])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("optimizer", ["soul", "adamw"])
def test_goes_on_in_the_middle_of_an_epoch(optimizer, dtype, method, tokenizer, tmp_path):
    """Step 2 of 3 in the first epoch: the order of both sets goes on. References are those of the model before unlearning;
    bf16 with SOUL: compensated, so that the bits beside the weights go on as well.
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
def test_every_way_of_storing_states_goes_on(options, tokenizer, tmp_path, monkeypatch):
    def build(model, config):
        return soul.SOUL(model.parameters(), lr=1e-3, weight_decay=0.0, backend="reference", **options)

    monkeypatch.setattr(unlearn_module, "build_optimizer", build)
    whole, want = run(tokenizer, model=tiny_model().bfloat16())
    with pytest.raises(Stopped):
        run(tokenizer, StopAfter(tmp_path, 4), tiny_model().bfloat16())
    model, records = run(tokenizer, Checkpoints(tmp_path, resume=True), tiny_model().bfloat16())
    assert same(model, whole) and records == want
    assert not list(tmp_path.rglob("*.pt")) and not list(tmp_path.rglob("*.bin"))


@pytest.mark.parametrize("curvature", ["retain", "gnb"])
def test_curvature_goes_on(curvature, tokenizer, tmp_path):
    """Stopped between two refreshes; the labels that GNB draws next are those that it would have drawn."""
    options = dict(curvature=curvature, curvature_every=2, clip_target=0.4, accumulate=2, batch_size=1)
    whole, want = run(tokenizer, **options)
    with pytest.raises(Stopped):
        run(tokenizer, StopAfter(tmp_path, 3), **options)
    torch.manual_seed(7)
    model, records = run(tokenizer, Checkpoints(tmp_path, resume=True), **options)
    assert same(model, whole) and records == want and len(records) == 6


def test_adapters_go_on_and_only_they_are_saved(tokenizer, tmp_path):
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


def test_old_checkpoints_go_and_the_log_is_complete(tokenizer, tmp_path):
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
        self.now, real = 0.0, unlearn_module.train_step
        monkeypatch.setattr("soul.checkpoint.time.monotonic", lambda: self.now)
        monkeypatch.setattr(unlearn_module, "train_step", lambda *args: self.step() or real(*args))

    def step(self):
        self.now += 240.0


@pytest.mark.parametrize("options, saved", [
    (dict(minutes=10), [3, 6]), (dict(minutes=8, every=3), [2, 3, 5, 6]), (dict(minutes=0), []),
], ids=str)  # fmt: skip
def test_a_run_is_saved_by_time_too(options, saved, tokenizer, tmp_path, monkeypatch):
    """And that changes nothing of it."""
    whole, want = run(tokenizer)
    steps, real = [], Checkpoints.save
    monkeypatch.setattr(Checkpoints, "save", lambda self, step, *args: steps.append(step) or real(self, step, *args))
    Clock(monkeypatch)
    model, records = run(tokenizer, Checkpoints(tmp_path, **options))
    assert steps == saved and same(model, whole) and records == want


@pytest.mark.parametrize("more, minutes", [
    ((), 10.0), (("--save-minutes=0",), 0.0), (("--save-every=0",), 0.0), (("--save-every=0", "--save-minutes=2.5"), 2.5),
])  # fmt: skip
def test_the_command_saves_every_10_minutes(more, minutes, place, tmp_path, monkeypatch):
    """But for a run that asks for no checkpoints."""
    seen, real = [], Checkpoints.__init__
    monkeypatch.setattr(Checkpoints, "__init__", lambda self, *a, **o: seen.append(o.get("minutes")) or real(self, *a, **o))
    monkeypatch.setattr("soul.unlearner.unlearn", lambda *args, log, **options: log.touch() or [{}])
    assert main(words(place, tmp_path / "out", "--epochs", "1", *more)) == 0
    assert set(seen) == {minutes}


def truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-10] ^= 1
    path.write_bytes(content)


def foreign(path):
    if path.suffix == ".json":
        path.write_text('{"hello": "world"}')
    else:
        safetensors.torch.save_file({"x": torch.zeros(2)}, path)


@pytest.mark.parametrize("damage", [truncate, flip, foreign, pathlib.Path.unlink], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", ["model.safetensors", "training.safetensors", "training.json"])
def test_a_damaged_checkpoint_is_passed_over(name, damage, tokenizer, tmp_path):
    whole, want = run(tokenizer, Checkpoints(tmp_path, every=2))
    damage(tmp_path / "step-6" / name)
    with pytest.warns(UserWarning, match="step-6: .*(readable|damaged).*; trying the one before it"):
        model, records = run(tokenizer, Checkpoints(tmp_path, every=2, resume=True))
    assert same(model, whole) and records == want and Checkpoints(tmp_path).steps() == [6, 4]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the damaged one has been written anew
        assert run(tokenizer, Checkpoints(tmp_path, every=2, resume=True))[1] == want
    for step in (4, 6):
        damage(tmp_path / f"step-{step}" / name)
    fresh = tiny_model()
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="resume: expected a whole checkpoint in .*, got damaged"):
        run(tokenizer, Checkpoints(tmp_path, resume=True), fresh)
    assert same(fresh, tiny_model())


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


def test_other_threads_are_told(tokenizer, tmp_path, monkeypatch):
    with pytest.raises(Stopped):
        run(tokenizer, StopAfter(tmp_path, 2))
    monkeypatch.setattr("torch.get_num_threads", lambda: 64)
    with pytest.warns(UserWarning, match="threads was .* and is 64: last bits may differ"):
        run(tokenizer, Checkpoints(tmp_path, resume=True))


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_for_safetensors(tensors, path):
    """The library's own words, at a limit of this process: it does not say OSError."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        REAL_WRITE(tensors, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


REAL_WRITE = checkpoint.write_tensors


@pytest.mark.parametrize("broken", [
    ("os.fsync", full), ("write_tensors", full), ("write_tensors", full_for_safetensors), ("pathlib.Path.write_text", full),
    ("pathlib.Path.rename", full), ("pathlib.Path.mkdir", full),
], ids=lambda broken: f"{broken[0]}-{broken[1].__name__}")  # fmt: skip
def test_a_full_disk_ends_the_run_and_leaves_the_last_checkpoint(broken, tokenizer, tmp_path, monkeypatch):
    whole, want = run(tokenizer)

    class FullAfter(Checkpoints):
        def save(self, step, *args):
            with monkeypatch.context() as patch:
                if step == 4:
                    patch.setattr(f"soul.checkpoint.{broken[0]}", broken[1])
                super().save(step, *args)

    with pytest.raises(OSError, match="step 4 could not be saved .*") as error:
        run(tokenizer, FullAfter(tmp_path, every=2, keep=1))
    assert re.search("No space left|File too large", str(error.value)) and not list(tmp_path.glob(".*.tmp"))
    assert Checkpoints(tmp_path).steps() == [2]
    model, records = run(tokenizer, Checkpoints(tmp_path, every=2, resume=True))
    assert same(model, whole) and records == want


def test_the_command_says_what_a_full_disk_left(place, capsys, monkeypatch):
    """While a checkpoint is written, while the log is, and while the model is: status 1, a reason, and where it goes on."""
    real = Checkpoints.save

    def save(self, step, *args):
        with monkeypatch.context() as patch:
            if step == 4:
                patch.setattr("soul.checkpoint.write_tensors", full)
            real(self, step, *args)

    argv = words(place, "full", "--epochs", "2", "--save-every", "2")
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", save)
        assert main(argv) == 1
    err = capsys.readouterr().err
    assert "step 4 could not be saved (No space left on device); with --resume it goes on after step 2" in err
    with monkeypatch.context() as patch:
        patch.setattr("transformers.GPT2LMHeadModel.save_pretrained", full)
        assert main([*argv, "--resume"]) == 1
    err = capsys.readouterr().err
    assert "the model could not be saved (No space left on device); with --resume it goes on after step 6" in err
    assert not (place / "full" / "config.json").exists()
    with monkeypatch.context() as patch:
        patch.setattr(unlearn_module, "_write_line", full)
        assert main([*argv, "--resume"]) == 1
    assert "No space left on device; with --resume it goes on after step 6" in capsys.readouterr().err
    assert main([*argv, "--resume"]) == 0
    assert main(words(place, "roomy", "--epochs", "2")) == 0
    assert weights(place / "full") == weights(place / "roomy") and log_of(place / "full") == log_of(place / "roomy")


def test_a_directory_that_cannot_be_written(tokenizer, tmp_path, place, capsys):
    """Root may write everywhere, but not below a file."""
    (tmp_path / "file").write_text("x")
    model = tiny_model()
    with pytest.raises(OSError):
        run(tokenizer, Checkpoints(tmp_path / "file" / "c", every=1), model)
    assert same(model, tiny_model())  # found out before the first step
    assert main(words(place, "forget.jsonl/out")) == 2
    assert "output: expected a new or an empty directory" in capsys.readouterr().err


def test_broken_weights_are_not_saved(tokenizer, tmp_path):
    with pytest.raises(RuntimeError, match="lower the learning rate"):
        run(tokenizer, Checkpoints(tmp_path, every=1), lr=1e38, max_grad_norm=None)
    for step in Checkpoints(tmp_path).steps():
        saved = safetensors.torch.load_file(tmp_path / f"step-{step}" / "model.safetensors")
        assert all(tensor.isfinite().all() for tensor in saved.values())


def test_trees_keep_types_bits_and_strides():
    tree = {
        "a": (1, 2.5, None, True, "x", float("inf")), 3: [torch.arange(6).view(2, 3).T, torch.tensor(0.1)],
        "empty": torch.empty(0, dtype=torch.int8), "codes": torch.arange(256).to(torch.uint8),
    }  # fmt: skip
    tensors = {}
    text = json.dumps(run_state.packed(tree, tensors))
    got = run_state.unpacked(json.loads(text), {n: t.contiguous() for n, t in tensors.items()})
    assert got["a"] == tree["a"] and list(got) == list(tree)
    for a, b in zip((*got[3], got["empty"], got["codes"]), (*tree[3], tree["empty"], tree["codes"])):
        assert torch.equal(a, b) and a.dtype == b.dtype and a.stride() == b.stride()
    with pytest.raises(TypeError, match="no place in a checkpoint for a set"):
        run_state.packed({"x": set()}, {})


def test_numbers_are_checked(tmp_path):
    for name, options in (("save_every", {"every": -1}), ("keep", {"keep": 0}), ("save_every", {"every": 1.5})):
        with pytest.raises(ValueError, match=f"{name}: expected a whole number >= "):
            Checkpoints(tmp_path, **options)
    for minutes in (-1, float("nan"), float("inf"), "10"):
        with pytest.raises(ValueError, match="save_minutes: expected a number >= 0.0"):
            Checkpoints(tmp_path, minutes=minutes)


def test_saving_a_model_leaves_nothing_of_a_save_that_was_killed(tokenizer, tmp_path):
    files.scratch_path(tmp_path).mkdir()
    files.scratch_path(tmp_path).write_text("half of a file")
    save_model(tiny_model(), tokenizer, tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names and not any(n.endswith(".tmp") for n in names)


def plant(directory):
    """Put files of somebody else's into a directory; return their names."""
    (directory / ".x.tmp").write_text("x")
    (directory / ".y.tmp").symlink_to(directory.parent)
    (directory / ".z.tmp").symlink_to(directory / "nothing")
    files.scratch_path(directory).symlink_to(directory.parent)
    (directory / ".d.tmp").mkdir()
    return {path.name for path in directory.iterdir()}


def test_files_of_somebody_else_are_neither_removed_nor_in_the_way(tokenizer, tmp_path):
    for name in ("output", "checkpoints"):
        (tmp_path / name).mkdir()
    planted = {name: plant(tmp_path / name) for name in ("output", "checkpoints")}
    save_model(tiny_model(), tokenizer, tmp_path / "output")
    (tmp_path / "checkpoints" / "step-9").write_text("no checkpoint")
    checkpoints = Checkpoints(tmp_path / "checkpoints", every=1, keep=1)
    run(tokenizer, checkpoints)
    assert checkpoints.steps() == [6]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checkpoints.remove()
    for name, names in planted.items():
        assert names <= {path.name for path in (tmp_path / name).iterdir()}
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == planted["checkpoints"] | {"step-9"}


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002], ids=oct)
def test_files_have_the_modes_that_the_umask_asks_for(umask, tokenizer, tmp_path):
    """Of a saved model, a checkpoint and a reference cache; safetensors makes files of mode 0600."""
    before = os.umask(umask)
    try:
        run(tokenizer, Checkpoints(tmp_path / "checkpoints", every=6), method="npo", reference_cache=str(tmp_path / "cache"))
        save_model(tiny_model(), tokenizer, tmp_path)
    finally:
        os.umask(before)
    modes = {str(path.relative_to(tmp_path)): path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()}
    assert {"model.safetensors", "tokenizer.json", "checkpoints/step-6/model.safetensors"} <= modes.keys()
    assert any(name.startswith("cache/logps-") for name in modes)
    assert modes == dict.fromkeys(modes, 0o666 & ~umask)


class Interruption(KeyboardInterrupt):
    """Ctrl-C."""


def fail_at(number, error, patch):
    """Raise an error in one of the calls that change what is in a directory, and in all later ones of an OSError."""
    left = [number]

    def failing(real):
        def call(*args, **options):
            left[0] -= 1
            if left[0] == 0 or (left[0] < 0 and isinstance(error, OSError)):
                raise error
            return real(*args, **options)

        return call

    for name in ("rename", "replace", "unlink", "rmdir", "mkdir"):
        patch.setattr(os, name, failing(getattr(os, name)))
    return left


def files_below(output):
    return [path for path in (output / "checkpoints").rglob("*") if path.is_file()]


@pytest.mark.parametrize("error", [OSError(errno.EIO, os.strerror(errno.EIO)), Interruption()], ids=["error", "Ctrl-C"])
def test_whatever_happens_while_the_last_checkpoints_are_removed_the_run_has_ended(error, place, capsys, monkeypatch):
    """An error, or Ctrl-C, in each of the calls after the model was saved. Then the same command with --resume."""
    options, notes = ("--epochs", "1", "--save-every", "3"), []  # one checkpoint, after the last step
    if not (place / "undisturbed").exists():
        assert main(words(place, "undisturbed", *options)) == 0
    for number in range(1, 100):
        output, armed = place / f"removed {type(error).__name__} {number}", []

        def save(*args, number=number, armed=armed):
            save_model(*args)
            armed.append(fail_at(number, error, patch))

        with monkeypatch.context() as patch, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            patch.setattr("soul.unlearner.save_model", save)
            status = main(words(place, output.name, *options))
        said, told = capsys.readouterr().err, [str(warning.message) for warning in caught]
        if armed[0][0] > 0:  # there are no more calls
            assert status == 0 and not (output / "checkpoints").exists()
            break
        if isinstance(error, OSError):
            assert status == 0
            assert any("could not be removed" in t for t in told) or files_below(output) == []
        else:
            assert status == 130 and f"interrupted; the model is saved in {output}" in said
            assert ("checkpoints are left behind" in said) == (output / "checkpoints").exists()
        notes.append((output / checkpoint.ENDED_FILE).is_file())
        assert weights(output) == weights(place / "undisturbed")
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            assert main(words(place, output.name, *options, "--resume")) == 0
        assert ("this run has ended" in capsys.readouterr().out) == notes[-1]
        assert weights(output) == weights(place / "undisturbed") and log_of(output) == log_of(place / "undisturbed")
    assert len(notes) > 5 and notes == sorted(notes) and notes[-5:] == [True] * 5  # the note comes before the first removal


def test_a_full_disk_at_the_very_end_hides_no_model(tmp_path, monkeypatch):
    """No room for the note: checkpoints are removed all the same, which makes some. No room for the log: they stay."""
    (tmp_path / "checkpoints" / "step-3").mkdir(parents=True)
    for name in ("config.json", "log.jsonl"):
        (tmp_path / name).write_text("{}")
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="the model is saved; checkpoints are left behind"):
        patch.setattr(os, "fsync", full)
        checkpoints.end(tmp_path)
    assert checkpoints.steps() == [3] and not checkpoint.has_ended(tmp_path, checkpoints)
    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error")
        patch.setattr(pathlib.Path, "write_text", full)
        checkpoints.end(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "log.jsonl"}
    assert checkpoint.has_ended(tmp_path, checkpoints)


def test_an_old_checkpoint_that_cannot_be_removed_ends_no_run(tokenizer, tmp_path, monkeypatch):
    """And it is whole, or has no name of a checkpoint any more."""
    _, want = run(tokenizer)
    for name in ("rename", "unlink"):
        directory = tmp_path / name

        class Stubborn(Checkpoints):
            def commit(self, *args, name=name):
                with monkeypatch.context() as patch:
                    real = getattr(os, name)

                    def call(path, *args, **options):
                        if name == "unlink" or NAME_OF_A_CHECKPOINT.fullmatch(os.path.basename(path)):
                            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
                        return real(path, *args, **options)

                    patch.setattr(os, name, call)
                    super().commit(*args)

        with pytest.warns(UserWarning, match="could not be removed"):
            _, records = run(tokenizer, Stubborn(directory, every=2, keep=1))
        assert records == want
        steps = Checkpoints(directory).steps()
        assert steps == ([6, 4, 2] if name == "rename" else [6])
        assert all(run_state.read(directory / f"step-{step}")[1] is None for step in steps)
    run(tokenizer, Checkpoints(tmp_path / "unlink", resume=True))
    assert [path.name for path in (tmp_path / "unlink").iterdir()] == ["step-6"]  # the halves are gone


NAME_OF_A_CHECKPOINT = checkpoint.NAME


def test_the_log_is_on_the_disk_before_its_checkpoints_are_removed(place, monkeypatch):
    flushed, at_removal, real = set(), [], os.fsync

    def fsync(descriptor):
        real(descriptor)
        flushed.add(os.fstat(descriptor).st_ino)

    def remove(self):
        at_removal.append(set(flushed))

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Checkpoints, "remove", remove)
    assert main(words(place, "flushed", "--epochs", "1")) == 0
    (flushed,) = at_removal
    names = ("log.jsonl", "soul_config.json", "data.json", "model.safetensors", "config.json")
    assert {name for name in names if (place / "flushed" / name).stat().st_ino in flushed} == set(names)


def test_a_flipped_bit_in_the_newest_checkpoint_is_no_other_run(tokenizer, tmp_path):
    """In JSON that can be read all the same: a number of the options, a letter of a name. The one before it is taken."""
    _, want = run(tokenizer, Checkpoints(tmp_path, every=2))
    path = tmp_path / "step-6" / "training.json"
    whole = path.read_bytes()
    described, begin = json.loads(whole)["state"]["run"], whole.index(b'"run"')
    positions = [*range(0, len(whole), 401), *range(begin, whole.index(b'"environment"'), 11)]
    checkpoints, readable = Checkpoints(tmp_path, resume=True), 0
    for position in positions:
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1 << random.randrange(7)]) + whole[position + 1 :])
        checkpoints.check(described)
        readable += parses(path)
    assert readable > 30
    path.write_bytes(whole.replace(b'"lr": 0.001', b'"lr": 0.003', 1))
    with pytest.warns(UserWarning, match="step-6: damaged .checksum of training.json.; trying the one before it"):
        assert run(tokenizer, Checkpoints(tmp_path, resume=True))[1] == want


def parses(path):
    try:
        json.loads(path.read_text())
    except ValueError:
        return False
    return True


def test_a_run_does_not_depend_on_the_files_that_it_went_on_from(tokenizer, tmp_path):
    """Safetensors maps files into memory."""

    class Overwritten(Checkpoints):
        def load(self, *args):
            records = super().load(*args)
            for path in self.directory.glob("step-*/*"):
                with open(path, "rb+") as file:
                    file.write(b"x" * path.stat().st_size)
            return records

    whole, want = run(tokenizer)
    with pytest.raises(Stopped):
        run(tokenizer, StopAfter(tmp_path, 3))
    model, records = run(tokenizer, Overwritten(tmp_path, resume=True))
    assert same(model, whole) and records == want


def test_a_disk_that_is_full_at_the_tokenizer_is_an_error_of_the_system(place, capsys, monkeypatch):
    """In the library's own words, which it raises as a plain Exception."""
    real = PreTrainedTokenizerBase.save_pretrained

    def save_pretrained(*args, **options):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        try:
            return real(*args, **options)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    argv = words(place, "full at the tokenizer", "--epochs", "1", "--save-every", "1")
    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedTokenizerBase, "save_pretrained", save_pretrained)
        assert main(argv) == 1
    err = capsys.readouterr().err
    assert "the model could not be saved (File too large); with --resume it goes on after step 3" in err
    assert not (place / "full at the tokenizer" / "config.json").exists()
    assert main([*argv, "--resume"]) == 0


def test_a_run_is_described_by_content(tokenizer):
    config = UnlearnConfig(**FAST)
    encoded = prepare(tiny_model(), tokenizer, examples(5), examples(9)[5:], config)
    told = describe(tiny_model(), *encoded, config.decisive())
    assert told == describe(tiny_model(), *encoded, config.decisive())
    assert told != describe(tiny_model(), encoded[1], encoded[0], config.decisive())
    assert json.loads(json.dumps(told)) == told

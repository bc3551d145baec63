import errno
import inspect
import io
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
import torch

from soul import Unlearner
from soul.cli import main
from soul.models.loading import load
from soul.output.console import SafeStream, safe_stream
from soul.run.config import UnlearnConfig
from tests.support.models import examples, tiny_model, tiny_tokenizer

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model directory, and files of data good and bad."""
    root = tmp_path_factory.mktemp("cli")
    tiny_model().save_pretrained(root / "model")
    tiny_tokenizer().save_pretrained(root / "model")
    rows = [json.dumps({"prompt": e.prompt, "completion": e.answer}) + "\n" for e in examples(6)]
    (root / "forget.jsonl").write_text("".join(rows[:3]))
    (root / "retain.jsonl").write_text("".join(rows[3:]))
    (root / "broken.jsonl").write_text(rows[0] + "{")
    (root / "columns.jsonl").write_text('{"who": "me"}\n')
    (root / "text.jsonl").write_text('{"text": "Once upon a time."}\n')
    (root / "long.jsonl").write_text(json.dumps({"question": "Who?", "answer": "me " * 3000}) + "\n")
    (root / "empty.jsonl").write_text("\n")
    (root / "full").mkdir()
    (root / "astray").symlink_to(root / "nowhere")
    (root / "full" / "thing").write_text("x")
    return root


def command(folder, **changes):
    options = {"model": "model", "forget": "forget.jsonl", "retain": "retain.jsonl", "output": "out"}
    words = [
        "unlearn",
        "--epochs",
        "1",
        "--batch-size",
        "2",
        "--lr",
        "1e-2",
        "--backend",
        "reference",
        "--device",
        "cpu",
    ]
    for name, value in {**options, **changes}.items():
        is_path = name in (*options, "reference_cache") and value is not None
        words += [] if value is None else [f"--{name.replace('_', '-')}", str(folder / value) if is_path else str(value)]
    return words


@pytest.mark.parametrize("optimizer", ["soul", "adamw"])
def test_unlearn_writes_a_model_that_loads(folder, optimizer, capsys):
    name = f"out_{optimizer}"
    assert main(command(folder, optimizer=optimizer, output=name, method="npo", beta=0.2)) == 0
    out = folder / name
    assert (out / "model.safetensors").is_file() and not list(out.glob("*.bin"))
    assert len((out / "log.jsonl").read_text().splitlines()) == 2
    assert json.loads((out / "soul_config.json").read_text())["beta"] == 0.2
    model, tokenizer = load(out)
    old, _ = load(folder / "model")
    assert not torch.equal(model.get_input_embeddings().weight, old.get_input_embeddings().weight)
    assert tokenizer("Question: where").input_ids == tiny_tokenizer()("Question: where").input_ids
    assert re.search(r"probability of a forget answer: 0\.\d+ before, 0\.\d+ after", capsys.readouterr().out)


@pytest.mark.parametrize("changes", [
    dict(method="dpo", option="factor=1"), dict(method="simnpo", option="delta=0.5"),
    dict(method="ceu", option="ignore_first=0"), dict(method="undial", option="retain=kl", alpha=0.5),
], ids=lambda changes: changes["method"])  # fmt: skip
def test_options_reach_the_method(folder, changes, monkeypatch):
    """Options arrive in the types that the method expects."""
    name, value = changes["option"].split("=")
    objectives = []
    real = UnlearnConfig.objective
    monkeypatch.setattr(UnlearnConfig, "objective", lambda config: objectives.append(real(config)) or objectives[-1])
    cache = f"cache_{changes['method']}"
    assert main(command(folder, **changes, output=f"out_{changes['method']}", reference_cache=cache)) == 0
    default = inspect.signature(type(objectives[0])).parameters[name].default
    got = getattr(objectives[0], name)
    assert str(got) == value and type(got) is type(default) and got != default
    assert (folder / cache).is_dir() == (changes["method"] in ("dpo", "undial"))


def test_bf16_parameters_stay_bf16(folder):
    assert main(command(folder, dtype="bfloat16", output="out_bf16")) == 0
    model, _ = load(folder / "out_bf16", dtype="bfloat16")
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16


def test_a_run_that_has_reached_its_aim_ends_early(folder, capsys):
    options = dict(eval_every=1, stop_forget_prob=1, stop_retain_prob=0.0, accumulate=2)
    assert main(command(folder, output="out_early", epochs=9, **options)) == 0
    out = capsys.readouterr().out
    assert re.search(r"ended after step 1: forget probability 0\.\d+ has reached 1\n1 step in", out)
    assert (folder / "out_early" / "model.safetensors").is_file()


def test_a_run_that_diverges_ends_with_1(folder, capsys):
    assert main(command(folder, lr="1e30", output="out_nan", epochs="5")) == 1
    assert "lower the learning rate" in capsys.readouterr().err
    assert not (folder / "out_nan" / "model.safetensors").exists()


@pytest.mark.parametrize("changes, message", [
    ({"forget": "nowhere.jsonl"}, "nowhere.jsonl: expected a JSON-lines file, got no such file"),
    ({"forget": "broken.jsonl"}, "broken.jsonl, line 2: expected one JSON object, got broken JSON"),
    ({"retain": "columns.jsonl"}, "columns.jsonl, line 1: expected columns"),
    ({"forget": "empty.jsonl"}, "empty.jsonl: expected at least one row"),
    ({"output": "full"}, "output: expected a new or an empty directory"),
    ({"output": "astray"}, "output: expected a new or an empty directory"),
    ({"seed": 2**70}, "seed: expected a whole number of 64 bits"),
    ({"method": "influence", "retain": None, "epochs": 5, "batch_size": 4, "lr": 1e-5}, "got none; give a retain set\n"),
    ({"model": "forget.jsonl"}, "model: expected a directory with config.json"),
    ({"retain": None}, "retain: expected examples for GradDiff"),
    ({"method": "erase"}, "method: expected one of"),
    ({"optimizer": "sgd"}, "optimizer: expected one of"),
    ({"max_length": 4}, "forget, row 0: expected a label within 4 tokens"),
    ({"beta": 0.1}, "method: expected options of GradDiff (gamma, alpha, retain), got beta"),
    ({"option": "delta=1"}, "method: expected options of GradDiff (gamma, alpha, retain), got delta"),
    ({"option": "retain"}, "option: expected NAME=VALUE, got retain; names for graddiff: gamma, alpha, retain"),
    ({"option": "retain=tv"}, "retain: expected one of 'ce', 'kl', 'soul_kl', got 'tv'"),
    ({"method": "undial", "option": "retain=soul_kl"}, "retain: expected one of 'ce', 'kl', got 'soul_kl'"),
    ({"method": "simnpo", "option": "delta=x"}, "delta: expected a number, got 'x'"),
    ({"method": "simnpo", "option": "delta=inf"}, "delta: expected a number, got 'inf'"),
    ({"method": "ceu", "option": "ignore_first=1.5"}, "ignore_first: expected a whole number, got '1.5'"),
    ({"method": "npo", "beta": 0.1, "option": "beta=0.2"}, "beta: expected one value, got two"),
    ({"method": "npo", "reference_cache": "forget.jsonl"}, "reference_cache: expected a directory, or a new one, got the file"),
    ({"method": "klmin", "retain": None}, "retain: expected examples for KLMin"),
    ({"method": "dpo", "forget": "text.jsonl"}, "forget, row 0: expected a prompt to refuse"),
    ({"stop_forget_prob": 0.5}, "eval_every: expected a positive number with stop_forget_prob"),
    ({"save_every": -1}, "save_every: expected a whole number >= 0"),
    ({"lr": -1}, "lr: expected a number >= 0.0"),
    ({"backend": "cuda"}, "backend: expected one of"),
    ({"refusals": "forget.jsonl"}, "refusals: expected None with the method 'graddiff'"),
    ({"method": "po", "refusals": "nowhere.txt"}, "refusals: expected a file with one refusal per line, got nowhere.txt"),
    ({"retain": "forget.jsonl"}, "retain: expected other rows than forget, got the same 3"),
    ({"device": "tpu"}, "device: expected auto, cpu or cuda"),
    ({"output": "forget.jsonl/out"}, "output: expected a new or an empty directory"),
    ({"method": "po", "forget": "long.jsonl", "max_length": 9999}, "max_length: expected sequences of at most 2048 tokens"),
    ({"method": "po", "forget": "text.jsonl"}, "forget, row 0: expected a prompt to refuse"),
])  # fmt: skip
def test_bad_input_ends_with_2_and_writes_nothing(folder, changes, message, capsys):
    before = sorted(p.name for p in folder.rglob("*"))
    assert main(command(folder, **changes)) == 2
    assert message in capsys.readouterr().err
    assert sorted(p.name for p in folder.rglob("*")) == before


def test_options_are_not_abbreviated(folder, capsys):
    """The parser would accept --conf as --config, but only after the file should have been read."""
    (folder / "run.yaml").write_text("seed: 3\n")
    with pytest.raises(SystemExit) as end:
        main(command(folder) + ["--conf", str(folder / "run.yaml")])
    assert end.value.code == 2 and "unrecognized arguments: --conf" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        main(["--vers"])
    assert end.value.code == 2


@pytest.mark.parametrize("text, message", [
    ("seed: 1:30", "argument --seed: invalid int value: '1:30'"),  # 90 for YAML 1.1
    ("seed: 2026-13-45", "argument --seed: invalid int value: '2026-13-45'"),
    ("seed: !!timestamp 2026-13-45", "config: expected a YAML file, got .* \\(month must be in 1..12"),
    ("seed: 0x10", "argument --seed: invalid int value: '0x10'"),
    ("published_code: yes", "published_code: expected true or false, got 'yes'"),
    ("method: true", "method: expected a value, got true"),
    ("seed: 1\nlr: 2\nseed: 3", "config: expected a YAML file, got .* \\(seed is in line 1 and again in line 3\\)"),
    ("option: {beta: 1, beta: 2}", "\\(beta is in line 1 and again in line 1\\)"),
    ("save-every: 1\nsave_every: 2", "config: expected every option once, got 'save_every' in"),
    ("option: [[1], 2]", "option: expected a value, got values within it"),
    ("lr: &a [*a]", "lr: expected a value, got values within it"),
    ("option: " + "[" * 100_000, "config: expected a YAML file, got .* \\((maximum recursion|RecursionError|while)"),
    (f"epochs: {2**63}", "epochs: expected a positive whole number below 2147483648, got 9223372036854775808"),
    ("epochs: " + "1" * 400, "epochs: expected a positive whole number below 2147483648, got 1111"),
    ("seed: " + "1" * 5000, "argument --seed: invalid int value"),
    ("lr: " + "1" * 400, "lr: expected a number >= 0.0, got inf"),
], ids=lambda value: value[:20] if len(value) < 5000 else "long")  # fmt: skip
def test_values_of_a_file_are_parsed_like_those_of_the_command_line(folder, text, message, capsys):
    """No value is read as another one or dropped, and a wrong one is named."""
    (folder / "run.yaml").write_text(text + "\n")
    words = [word for word in command(folder) if word not in ("--epochs", "1", "--lr", "1e-2")]
    try:
        assert main([*words, "--config", str(folder / "run.yaml")]) == 2
    except SystemExit as end:
        assert end.code == 2
    assert re.search(message, capsys.readouterr().err) and not (folder / "out").exists()


@pytest.mark.parametrize("words, names", [
    (["unlearn"], ["bs", "curvature_every", "epochs", "batch_size", "accumulate", "max_length", "eval_every", "gpus", "seed"]),
    (["unlearn", "--optimizer=adamw"], ["lora_rank"]),
    (["plan", "--model=1b"], ["batch_size", "length", "labelled", "gpus", "accumulate", "lora_rank"]),
    (["evaluate", "--model=m", "--data=d", "--output=o"], ["max_new_tokens", "max_length", "batch_size"]),
    (["demo", "--output=o"], ["seed"]),
], ids=lambda value: " ".join(value[:1]))  # fmt: skip
def test_huge_numbers_are_named(folder, words, names, capsys, tmp_path, monkeypatch):
    """Python parses them as integers that fit no float and no size."""
    monkeypatch.chdir(tmp_path)  # the checkout may be read-only
    pytest.importorskip("scipy", reason="the extra eval is not installed")
    for name in names:
        for value in (2**63, "1" * 400):
            required = command(folder)[1:] if words[0] == "unlearn" else []
            assert main([*words, *required, f"--{name.replace('_', '-')}={value}"]) == 2
            assert f"soul {words[0]}: {name}: expected" in capsys.readouterr().err
    for call in (lambda: UnlearnConfig(lr=10**5000), lambda: UnlearnConfig(bs=10**5000), lambda: UnlearnConfig(seed=10**5000)):
        with pytest.raises(ValueError, match="expected a .*number.*, got a number of thousands of digits"):
            call()


@pytest.mark.parametrize("option, message", [
    ("--card=rubbish", "card: expected one of h100"),
    ("--card=1e308:1:1", "card: expected one of h100"),
    ("--attention=rubbish", "attention: expected one of 'sdpa', 'eager', got 'rubbish'"),
    ("--network=-3", "network: expected bytes a second, a positive number"),
    ("--network=nan", "network: expected bytes a second, a positive number"),
    ("--host-bandwidth=0", "host_bandwidth: expected bytes a second, a positive number"),
])  # fmt: skip
def test_options_of_the_plan_are_checked_without_one_too(folder, option, message, capsys):
    assert main([*command(folder), option]) == 2
    assert message in capsys.readouterr().err and not (folder / "out").exists()


@pytest.mark.parametrize("words", [["demo"], ["study", "--data", "nowhere"]])
@pytest.mark.parametrize("option, message", [
    (["--device", "tpu"], "device: expected auto, cpu or cuda"),
    (["--backend", "cuda"], "backend: expected one of"),
    (["--seed", str(2**70)], "seed: expected a whole number"),
    (["--output", "full"], "output: expected a new or an empty directory"),
])  # fmt: skip
def test_studies_check_before_they_write(folder, words, option, message, capsys, monkeypatch):
    for module in ("scipy", "sklearn"):
        pytest.importorskip(module, reason="the extra eval is not installed")
    monkeypatch.chdir(folder)
    before = sorted(p.name for p in folder.rglob("*"))
    option = ["--seeds" if words[0] == "study" and word == "--seed" else word for word in option]
    assert main([*words, "--output", "study_out", *option]) == 2
    assert message in capsys.readouterr().err
    assert sorted(p.name for p in folder.rglob("*")) == before


class NoReader(io.StringIO):
    """Standard output or error whose reader has gone."""

    def write(self, text):
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


class Full(io.StringIO):
    """A file on a full disk: written to a buffer first."""

    def flush(self):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Closed(io.StringIO):
    def write(self, text):
        raise ValueError("I/O operation on closed file.")


BROKEN = {"dead pipe": NoReader, "full": Full, "closed": Closed, "none": lambda: None}


@pytest.mark.parametrize("console", ["dead pipe", "none"])
def test_a_broken_console_ends_no_run(folder, console, monkeypatch):
    """A broken console stops neither our output, nor the progress bars of transformers, nor a warning."""
    monkeypatch.setenv("TQDM_DISABLE", "0")
    monkeypatch.setattr("sys.stdout", BROKEN[console]())
    monkeypatch.setattr("sys.stderr", BROKEN[console]())
    out = f"out_{console}"
    assert main(command(folder, output=out)) == 0
    assert (folder / out / "model.safetensors").is_file() and len((folder / out / "log.jsonl").read_text().splitlines()) == 2
    assert main(command(folder, output=out)) == 2  # the status does not need a console either
    config = UnlearnConfig(epochs=1, backend="reference")
    unlearner = Unlearner(tiny_model(), examples(2), examples(4)[2:], config, tokenizer=tiny_tokenizer())
    assert len(unlearner.run(progress=True)) == 1


def test_a_console_without_an_umlaut_ends_no_run(folder, monkeypatch):
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", shown)
    assert main(command(folder, output="out_ärger")) == 0
    assert b"log.jsonl: " + str(folder / "out_").encode() + b"\\xe4rger" in shown.buffer.getvalue()


def test_a_safe_stream_is_silent_once_it_is_broken():
    broken = SafeStream(NoReader())
    assert broken.write("text") == 4 and broken.error.errno == errno.EPIPE and not broken.isatty()
    broken.writelines(["a", "b"]), broken.flush()
    whole = SafeStream(io.StringIO())
    whole.writelines(["a", "b"]), print("c", file=whole, flush=True)
    assert whole.getvalue() == "abc\n" and whole.error is None and safe_stream(whole) is whole


PLAN = ["plan", "--model", "llama-3.2-1b"]
RESULTS = {"plan": PLAN, "info": ["info"], "help": ["--help"], "version": ["--version"]}


@pytest.mark.parametrize("console, status, message", [
    ("dead pipe", 141, ""),  # as of a process that SIGPIPE ended
    ("full", 1, "standard output could not be written (No space left on device)\n"),
    ("closed", 1, "standard output could not be written (Bad file descriptor)\n"),
    ("none", 1, "standard output could not be written (Bad file descriptor)\n"),
])  # fmt: skip
@pytest.mark.parametrize("name", RESULTS)
def test_a_result_that_cannot_be_written_is_no_success(folder, name, console, status, message, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout", BROKEN[console]())
    assert main(RESULTS[name]) == status
    assert capsys.readouterr().err == (message and f"soul {RESULTS[name][0]}: {message}")


def test_a_dry_run_is_a_result(folder, monkeypatch):
    monkeypatch.setattr("sys.stdout", Full())
    assert main([*command(folder), "--dry-run"]) == 1


@pytest.mark.slow(reason="a process that imports transformers; the statuses of broken consoles are always tested")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no descriptors to inherit")
def test_a_process_ends_with_the_status_of_its_work(folder):
    """Python flushes standard output once more when it exits, and would end with 120. A descriptor that is closed must not
    become that of a file of ours, into which libraries then write.
    """
    reader, writer = os.pipe()
    os.close(reader)
    run = command(folder, output="out_process")
    code = (
        "import os, sys; from soul.cli import main; os.close(2)\n"
        f"sys.argv = ['soul', *{run!r}]; status = main()\n"
        "assert os.path.samestat(os.fstat(2), os.stat(os.devnull)); sys.exit(status)"
    )
    with os.fdopen(writer, "w") as pipe:
        ended = subprocess.run([sys.executable, "-c", code], stdout=pipe, stderr=subprocess.DEVNULL, cwd=ROOT)
    assert ended.returncode == 0
    assert (folder / "out_process" / "model.safetensors").is_file()


def test_unknown_words_end_with_2(capsys):
    for words in ([], ["forget"], ["unlearn", "--model", "x"]):
        with pytest.raises(SystemExit) as end:
            main(words)
        assert end.value.code == 2


def test_info(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert "torch" in out and "backend" in out

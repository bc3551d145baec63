"""The scripts in examples/ and the code in the README and the guides, run as they are on a tiny model."""

import importlib
import json
import os
import pathlib
import re
import runpy
import shutil
import socket
import subprocess
import sys
import time

import pytest
import torch

import soul
from tests.integrations.test_frameworks import fresh_accelerate  # noqa: F401
from tests.integrations.test_integrations import OPEN_UNLEARNING
from tests.support.models import examples, tiny_model, tiny_tokenizer

ROOT = pathlib.Path(__file__).parent.parent
HELPER = ROOT / "examples" / "common.py"  # no script
SCRIPTS = sorted({*(ROOT / "examples").glob("*.py")} - {HELPER})
COMPARISON = re.compile(
    r"(\S+) ms and (\S+) MiB, the plain way (\S+) ms and (\S+) MiB \((\S+) x the time, (\S+) x the memory\)$", re.MULTILINE
)


@pytest.fixture
def inputs(tmp_path):
    """A model and two files, as options of a script."""
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    rows = [json.dumps({"question": e.prompt, "answer": e.answer.strip()}) + "\n" for e in examples(12)]
    (tmp_path / "forget.jsonl").write_text("".join(rows[:5]))
    (tmp_path / "retain.jsonl").write_text("".join(rows[5:]))
    files = {"model": "model", "forget": "forget.jsonl", "retain": "retain.jsonl", "output": "unlearned"}
    return [word for option, name in files.items() for word in (f"--{option}", str(tmp_path / name))]


@pytest.fixture
def common(monkeypatch):
    """The scripts' helper. Where it compares losses, it also checks that both ways give the same gradients."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    module = importlib.import_module("common")
    compare = module.compare

    def checked(what, ours, plain, before=lambda: None):
        if what == "loss and gradients":
            model = before.__self__
            ways = []
            for way in (ours, plain):
                before()
                way()
                ways.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
            assert ways[0] and len(ways[0]) == len(ways[1])
            for got, want in zip(*ways):
                assert (got - want).norm() <= 2e-4 * want.norm() + 1e-7
        compare(what, ours, plain, before)

    monkeypatch.setattr(module, "compare", checked)
    yield module
    sys.modules.pop("common")


@pytest.fixture
def run(common, monkeypatch, capsys, fresh_accelerate, without_kernels):  # noqa: F811
    """A function that runs a script; it returns the names of the script and what it has printed."""

    def run_script(name, *words):
        monkeypatch.setattr(sys, "argv", [name, *words])
        names = runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
        out = capsys.readouterr().out
        assert COMPARISON.search(out), out
        return names, out

    return run_script


def moved(folder, file="model.safetensors"):
    """Tell whether a saved model is another one than the tiny one."""
    assert (folder / file).is_file()
    after = type(tiny_model()).from_pretrained(folder)
    return any(not torch.equal(a, b) for a, b in zip(tiny_model().state_dict().values(), after.state_dict().values()))


def test_every_script_is_short_and_has_a_test():
    tests = pathlib.Path(__file__).read_text()
    for path in SCRIPTS:
        assert len(path.read_text().splitlines()) < 60 and f'"{path.name}"' in tests, path.name
    assert len(SCRIPTS) >= 11 and len(HELPER.read_text().splitlines()) < 100


def test_what_is_compared_is_what_the_calls_take(common, capsys):
    def hold(mib):
        blocks = [torch.ones(2**18) for _ in range(mib)]
        time.sleep(0.01 * mib)
        return blocks

    common.compare("both", lambda: hold(2), lambda: hold(8))
    ((ours_ms, ours_mib, plain_ms, plain_mib, times, memory),) = COMPARISON.findall(capsys.readouterr().out)
    assert (ours_mib, plain_mib, memory) == ("2.00", "8.00", "0.25")
    assert 20 <= float(ours_ms) < float(plain_ms) and float(times) < 0.9


def test_own_loop_unlearns(inputs, tmp_path, run):
    names, out = run("own_loop.py", *inputs, "--steps", "4")
    assert len(re.findall(r"^step \d+: loss -?\d+\.\d+, clipped [01]\.\d\d$", out, re.MULTILINE)) == 4
    assert moved(tmp_path / "unlearned")
    # The loss of the last batch is that of the model's own logits.
    model, ids, labels = (names[name] for name in ("model", "ids", "labels"))
    batch = {name: {"input_ids": ids[rows], "labels": labels[rows], "attention_mask": names["mask"][rows]}
             for name, rows in (("forget", slice(4)), ("retain", slice(4, None)))}  # fmt: skip
    hidden = names["body"](input_ids=ids, attention_mask=names["mask"]).last_hidden_state
    loss = names["linear_objective"](
        hidden[:, :-1], names["head"].weight, labels[:, 1:], names["objective"], is_forget=names["is_forget"]
    )
    torch.testing.assert_close(loss, soul.unlearning_loss(model, batch, names["objective"]))


def test_own_objective_unlearns(inputs, tmp_path, run):
    _, out = run("own_objective.py", *inputs, "--steps", "3")
    assert len(re.findall(r"^step \d+: loss \d+\.\d+$", out, re.MULTILINE)) == 3 and moved(tmp_path / "unlearned")


def test_own_schedule_refreshes_ever_more_rarely(inputs, tmp_path, run):
    names, out = run("own_schedule.py", *inputs, "--steps", "3")
    assert "refreshed 2 times in 3 steps" in out and moved(tmp_path / "unlearned")
    schedule = names["Doubling"]()
    assert [step for step in range(1, 33) if schedule.tick()] == [1, 2, 4, 8, 16, 32]
    resumed = names["Doubling"]()
    resumed.load_state_dict(schedule.state_dict())
    assert resumed.calls == 32 and not resumed.tick()


@pytest.mark.parametrize("merge, file", [([], "adapter_model.safetensors"), (["--merge"], "model.safetensors")])
def test_lora_saves_adapters_or_a_plain_model(inputs, tmp_path, run, merge, file):
    pytest.importorskip("peft", reason="the extra hf is not installed")
    names, out = run("lora.py", *inputs, "--rank", "2", *merge)
    assert "probability of the answers to forget" in out
    assert (tmp_path / "unlearned" / file).is_file() and names["trained"] < names["total"]


def test_hf_trainer_unlearns(inputs, tmp_path, run):
    names, _ = run("hf_trainer.py", *inputs, "--steps", "2")
    assert type(names["trainer"].optimizer.optimizer) is soul.SOUL and names["trainer"].state.global_step == 2
    assert moved(tmp_path / "unlearned")


def test_accelerate_loop_unlearns(inputs, tmp_path, run):
    pytest.importorskip("accelerate", reason="the extra hf is not installed")
    names, out = run("accelerate_loop.py", *inputs, "--steps", "2")
    assert out.count("step ") == 2 and type(names["optimizer"].optimizer) is soul.SOUL
    assert moved(tmp_path / "unlearned")


def test_lightning_module_unlearns(inputs, tmp_path, run):
    pytest.importorskip("lightning", reason="Lightning is not installed: make test-clients")
    names, _ = run("lightning_module.py", *inputs, "--steps", "2")
    assert names["trainer"].global_step == 2 and moved(tmp_path / "unlearned")


@pytest.mark.parametrize("name", ["trl_sft.py", "trl_dpo.py"])
def test_trl_trains(name, inputs, tmp_path, run):
    pytest.importorskip("trl", reason="TRL is not installed: make test-clients")
    names, _ = run(name, *inputs, "--steps", "2")
    assert type(names["trainer"]._inner_optimizer()) is soul.SOUL and moved(tmp_path / "unlearned")


def test_torchrun_loop_unlearns_in_a_group_of_one(inputs, tmp_path, run, monkeypatch):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    group = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    for name, value in group.items():
        monkeypatch.setenv(name, str(value))
    ends = []
    monkeypatch.setattr("soul.distributed.exit_process", ends.append)
    _, out = run("torchrun_loop.py", *inputs, "--steps", "2")
    assert "each of 1 processes holds 1.00 of the weights" in out and ends == [0] and moved(tmp_path / "unlearned")
    assert not torch.distributed.is_initialized()


@pytest.mark.slow(reason="two processes that each import torch and transformers")
def test_torchrun_loop_unlearns_in_two_processes(inputs, tmp_path):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *launcher, str(ROOT / "examples" / "torchrun_loop.py"), *inputs, "--steps", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert "each of 2 processes holds 0.50 of the weights" in ended.stdout and ended.stdout.count("loss of this process") == 2
    assert COMPARISON.search(ended.stdout) and moved(tmp_path / "unlearned")


TRAIN = """
import trainer
from tests.integrations.test_integrations import ForgetRetain, its_collator
from tests.support.models import sequences, tiny_model
import sys
args = {"output_dir": FOLDER, "max_steps": 2, "per_device_train_batch_size": 2, "use_cpu": True, "report_to": "none",
        "remove_unused_columns": False, "max_grad_norm": 0, "save_strategy": "no", "disable_tqdm": True}
handler = dict(word.split("=", 1) for word in sys.argv[1:])["trainer"]
model = tiny_model("llama, untied")
theirs, _ = trainer.load_trainer({"handler": handler, "args": args}, model, ForgetRetain(sequences(8), sequences(4)),
                                 data_collator=its_collator)
theirs.train()
"""


# One of its versions chooses by the mode of the model, which is not training mode when a trainer is made.
COMPUTE_LOSS = """
    def compute_loss(self, model, inputs, **options):
        return (self.compute_unlearn_loss if model.training else super().compute_loss)(model, inputs, **options)
"""
UNLEARN_LOSS = """
    def compute_unlearn_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return self.alpha * model(**inputs["retain"]).loss - self.gamma * model(**inputs["forget"]).loss
"""


def test_open_unlearning_trains_with_its_command_line(tmp_path, run, monkeypatch):
    """In a checkout whose train.py and trainers are stand-ins; with its own: tests/clients/test_open_unlearning.py."""
    sources = dict(OPEN_UNLEARNING)
    sources["trainer"] = sources["trainer"].partition("from soul.")[0]  # without our lines: the script registers the trainers
    sources["trainer.unlearn.base"] += COMPUTE_LOSS
    before_loss = sources["trainer.unlearn.grad_diff"].partition("    def compute_loss")[0]
    sources["trainer.unlearn.grad_diff"] = before_loss + UNLEARN_LOSS
    for name, source in {**sources, "train": TRAIN.replace("FOLDER", repr(str(tmp_path / "out")))}.items():
        parts = name.split(".")
        is_package = any(other.startswith(f"{name}.") for other in sources)
        file = tmp_path.joinpath("src", *parts)
        path = file / "__init__.py" if is_package else file.with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    monkeypatch.setattr(sys, "path", list(sys.path))
    known = {*sys.modules}
    try:
        names, _ = run("open_unlearning.py", str(tmp_path), "trainer=SOULGradDiff", "task_name=soul")
        assert sys.argv[1:3] == ["trainer=SOULGradDiff", "task_name=soul"]
        (path,) = [word.partition("=")[2] for word in sys.argv[3:] if word.startswith("hydra.searchpath=")]
        folder = pathlib.Path(path.strip("[]").removeprefix("file://"))
        assert (folder / "trainer" / "SOULGradDiff.yaml").is_file()
    finally:
        for name in {*sys.modules} - known:
            if name.split(".")[0] in ("trainer", "train") or name.startswith("soul.integrations.open_unlearning"):
                del sys.modules[name]
        vars(sys.modules["soul.integrations"]).pop("open_unlearning", None)


def code_of(page):
    """The blocks of Python of a page."""
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)


def batch_side():
    """What a side of a batch holds."""
    ids = torch.randint(2, 300, (4, 7))
    return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("page", ["README.md", "docs/parts.md"])
def test_the_loops_of_the_guides_move_the_weights(page):
    code, *_ = code_of(page)  # the loop comes first
    torch.manual_seed(0)
    model = tiny_model()
    before = [parameter.clone() for parameter in model.parameters()]
    sides = {"forget": batch_side(), "retain": batch_side()}
    names = {"model": model, "batches": [sides], **sides}
    exec(code, names)
    assert names["loss"].isfinite() and any(not torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_the_code_of_the_quick_start(inputs, tmp_path, monkeypatch):
    for name, file in {"out/demo/seed0/full": "model", "out/unlearned": "model"}.items():
        shutil.copytree(tmp_path / file, tmp_path / name)
    for name in ("forget.jsonl", "retain.jsonl"):
        shutil.copy(tmp_path / name, tmp_path / "out" / "demo" / name)
    monkeypatch.chdir(tmp_path)
    names = {"batches": [{"forget": batch_side(), "retain": batch_side()}]}
    for code in code_of("docs/quickstart.md"):
        exec(code, names)
    assert names["loss"].isfinite() and (tmp_path / "out" / "unlearned-too" / "model.safetensors").is_file()


def test_the_op_of_the_objectives_page():
    (code,) = code_of("docs/objectives.md")
    torch.manual_seed(0)
    hidden = torch.randn(2, 5, 8, requires_grad=True)
    weight = torch.randn(11, 8, requires_grad=True)
    names = {
        "hidden": hidden,
        "weight": weight,
        "bias": None,
        "labels": torch.randint(11, (2, 5)),
        "is_forget": torch.tensor([True, False]),
        "ref_logps": torch.tensor([-9.0, 0.0]),
        "ref_hidden": torch.randn(2, 5, 8),
        "ref_weight": torch.randn(11, 8),
        "indices": torch.arange(10),
    }
    exec(code, names)
    names["loss"].backward()
    assert hidden.grad.norm() > 0 and weight.grad.norm() > 0


def test_the_average_of_the_optimizer_page_has_all_bits():
    (code,) = code_of("docs/optimizer.md")
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 8).bfloat16()
    optimizer = soul.SOUL(model.parameters(), lr=1e-5)

    def step(batch):
        model(batch).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    names = {"model": model, "optimizer": optimizer, "step": step, "batches": torch.randn(3, 4, 8).bfloat16()}
    exec(code, names)
    average = names["average"].module.weight
    assert average.dtype == torch.float32 and not torch.equal(average, average.bfloat16().float())


def test_the_code_of_the_page_from_adamw(monkeypatch, without_kernels):
    """One line is another, then SophiaG's loop runs; h is refreshed in the first of its steps."""
    one_line, loop = code_of("docs/from-adamw.md")
    torch.manual_seed(0)
    model = tiny_model()
    names = {"model": model}
    exec(one_line, names)
    assert type(names["optimizer"]) is soul.SOUL
    before = [parameter.clone() for parameter in model.parameters()]
    batches = [{"forget": batch_side(), "retain": batch_side()} for _ in range(2)]
    exec(loop, names | {"batches": batches, "objective": soul.losses.GradDiff()})
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters()))

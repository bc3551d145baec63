"""Runs of the command and of the loop on a tiny model, for tests of the files that they read and write."""

import importlib
import json
import os
import signal

import torch

from soul.checkpoint import Checkpoints
from soul.cli import main
from soul.run.config import UnlearnConfig
from soul.run.loop import unlearn
from tests.support.models import examples, tiny_model

unlearn_module = importlib.import_module("soul.run.loop")

VOLATILE = ("tokens_per_s", "peak_memory_gib")

FAST = dict(epochs=2, batch_size=2, lr=1e-3, backend="reference")  # 6 steps of 5 examples


def write_model_and_data(root, tokenizer):
    """Write a model with dropout, and data, into a directory for the command; return it."""
    model = tiny_model("gpt2, tied")
    model.config.resid_pdrop = model.config.attn_pdrop = 0.1
    model.save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    rows = [json.dumps({"prompt": e.prompt, "completion": e.answer}) + "\n" for e in examples(12)]
    (root / "forget.jsonl").write_text("".join(rows[:5]))
    (root / "retain.jsonl").write_text("".join(rows[5:]))
    return root


def words(folder, output, *more):
    files = {"model": "model", "forget": "forget.jsonl", "retain": "retain.jsonl", "output": output}
    paths = [word for name, value in files.items() for word in (f"--{name}", str(folder / value))]
    return ["unlearn", *paths, "--batch-size", "2", "--lr", "1e-3", "--device", "cpu", "--backend", "reference", *more]


def command(argv, errors=None, die_at_fsync=None):
    """Run the command; meant for a process of its own, which kills itself at its ``die_at_fsync``-th fsync."""
    torch.set_num_threads(1)
    if errors is not None:
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    if die_at_fsync is not None:
        fsyncs_left = [die_at_fsync]
        real = os.fsync

        def fsync(descriptor):
            fsyncs_left[0] -= 1
            if fsyncs_left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            real(descriptor)

        os.fsync = fsync
    raise SystemExit(main(argv))


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


def run(tokenizer, checkpoints=None, model=None, forget=None, log=None, **options):
    model = tiny_model() if model is None else model
    forget = examples(5) if forget is None else forget
    config = UnlearnConfig(**FAST | options)
    records = unlearn(model, tokenizer, forget, examples(9)[5:], config, progress=False, checkpoints=checkpoints, log=log)
    return model, numbers(records)


class StopAfter(Checkpoints):
    """Checkpoints that are told to stop while step ``step`` is being taken."""

    def __init__(self, directory, step, **options):
        super().__init__(directory, **options)
        self.last = step

    def due(self, step):
        self.stop = self.stop or step == self.last
        return super().due(step)


def same(model, other):
    return all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))

"""A process that is killed or stopped ends the others, with an error, and the run goes on from its last checkpoint."""

import os
import signal
import subprocess
import sys
import time

import pytest
import safetensors.torch
import torch

from soul.distributed import watch
from tests.distributed.test_torchrun import ROOT, command_folder, ended, torchrun, words

__all__ = ["command_folder"]  # a fixture
pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch without gloo")
SILENT = 5.0  # seconds, instead of 20
HOW = ("--epochs", 6)  # 12 steps, with checkpoints after each fourth

# In one process a signal comes with the 10th step, within the second checkpoint, or while the first process writes the model.
PROGRAM = """
import os, runpy, signal, sys
from torch.optim.optimizer import register_optimizer_step_pre_hook
from soul.checkpoint import saving, sharded
from soul.distributed import watch

watch.SILENT_SECONDS = {silent}
place, number, rank, *words = sys.argv[1:]
left = {{"step": 10, "checkpoint": 2, "save": 1}}[place]

def count(*_):
    global left
    left -= os.environ["RANK"] == rank
    if left == 0:
        os.kill(os.getpid(), int(number))

def counting(function):
    def counted(*args, **options):
        count()
        return function(*args, **options)
    return counted

if place == "step":
    register_optimizer_step_pre_hook(count)
elif place == "checkpoint":
    sharded._Writer.write_data = counting(sharded._Writer.write_data)
else:
    saving._save_model = counting(saving._save_model)
sys.argv = words
runpy.run_module("soul", run_name="__main__")
"""
FAULTS = {  # place, signal, rank
    "killed in a checkpoint": ("checkpoint", signal.SIGKILL, 1),
    "killed in the last save": ("save", signal.SIGKILL, 0),
    "stopped in a step": ("step", signal.SIGSTOP, 0),
    "stopped in a checkpoint": ("checkpoint", signal.SIGSTOP, 1),
    "stopped in the last save": ("save", signal.SIGSTOP, 0),
}


def test_who_is_silent():
    """The time runs from the last new count; who has left is not silent, and who has slept itself judges nobody."""
    silence = watch.Silence([0, 2], 100.0)
    assert silence.of({}, 103.0) == {0: 3.0, 2: 3.0}
    assert silence.of({0: b"0", 2: b"0"}, 104.0) == {0: 0.0, 2: 0.0}
    assert silence.of({0: b"1", 2: b"0"}, 110.0) == {0: 0.0, 2: 6.0}
    assert silence.of({}, 112.0) == {0: 2.0, 2: 8.0}
    assert silence.of({0: b"2", 2: watch.ENDED}, 120.0) == {0: 0.0}
    silence.forgive(200.0)
    assert silence.of({0: b"2", 2: watch.ENDED}, 201.0) == {0: 1.0}


def test_a_store_that_is_gone_and_a_silent_process_end_this_one(monkeypatch):
    """The thread itself, with a store of this process; what would end the process is only noted."""
    noted = []
    monkeypatch.setattr(watch, "_give_up", noted.append)
    monkeypatch.setattr(watch, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(watch, "SILENT_SECONDS", 0.5)
    store = torch.distributed.HashStore()
    for rank in range(3):
        store.set(watch.key(rank), "here")
    with watch.watched(store, 1, 3):
        for count in range(20):
            store.set(watch.key(0), str(count))
            time.sleep(0.05)
    assert noted and all(set(silent) == {2} for silent in noted) and noted[0][2] > 0.5
    assert store.get(watch.key(1)) == watch.ENDED
    noted.clear()
    store.set(watch.key(2), watch.ENDED)
    store.set(watch.key(0), watch.ENDED)
    with watch.watched(store, 1, 3):
        time.sleep(1.0)
    assert not noted


@pytest.mark.slow(reason="starts eight sets of processes, and waits until torchrun has killed those that are stopped")
@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="no such signal")
def test_a_process_that_is_killed_or_stopped_ends_the_others_and_nothing_is_lost(command_folder):
    (command_folder / "program.py").write_text(PROGRAM.format(silent=SILENT))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    whole = torchrun(*words(command_folder, "whole", *HOW))
    processes = {}
    for name, (place, number, rank) in FAULTS.items():
        program = [command_folder / "program.py", place, int(number), rank, *words(command_folder, name, *HOW)]
        command = [*launcher, *map(str, program)]
        processes[name] = subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)
    assert ended(whole)[0] == 0
    weights = safetensors.torch.load_file(command_folder / "whole" / "model.safetensors")
    for name, process in processes.items():
        status, _, errors = ended(process)
        assert status == 1, name
        assert ("of torchrun has not been heard for " in errors) == name.startswith("stopped"), errors
        assert not (command_folder / name / "model.safetensors").exists()
    resumed = {name: torchrun(*words(command_folder, name, *HOW, "--resume")) for name in list(FAULTS)[::2]}
    for name, process in resumed.items():
        status, _, errors = ended(process)
        assert status == 0, errors
        again = safetensors.torch.load_file(command_folder / name / "model.safetensors")
        assert again.keys() == weights.keys() and all(torch.equal(again[key], weights[key]) for key in weights), name
        assert not (command_folder / name / "checkpoints").exists()

"""``torchrun --nproc-per-node 2 -m soul unlearn``: the run of one process, over gloo on the CPU.

A set of processes takes seconds to start: most runs share one (tests/torchrun_worker.py).
"""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.models import examples, tiny_model, tiny_tokenizer
from tests.torchrun_worker import run

ROOT = pathlib.Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch without gloo")
VOLATILE = ("tokens_per_s", "peak_memory_gib")
TIMEOUT = 120

# 5 examples to forget in batches of 3: one process has 2 forget and 1 retain sequences, the other the opposite; then, with 2
# examples, one each. With batches of 1 one process has the forget sequence and the other the retain sequence; without a
# retain term (ga) the other has nothing.
EQUAL = {
    "untied head": ("llama, untied", {"method": "graddiff"}),
    "tied head, sums of sequences": ("llama, tied", {"method": "npo"}),
    "an empty part": ("gpt2, tied", {"method": "ga", "batch_size": 1, "optimizer": "adamw"}),
    "KL of one process's sequences": ("llama, untied", {"method": "klmin", "batch_size": 1}),
    "micro-batches, pairs, no clipping": ("llama, tied", {"method": "dpo", "accumulate": 2, "batch_size": 1,
                                                          "max_grad_norm": None}),
    "rho moves, evaluation": ("llama, tied", {"method": "simnpo", "clip_target": 0.5, "eval_every": 2}),
    "curvature of an empty part": ("llama, tied", {"method": "ceu", "curvature": "retain", "curvature_every": 2, "bs": 8,
                                                   "batch_size": 1, "gradient_checkpointing": True}),
}  # fmt: skip
# Dropout, which draws in each process; checkpoints after each second step of 4.
SAVED = ("llama, tied", {"method": "npo"}, {"dropout": 0.1, "save_every": 2})
BF16 = ("llama, tied", {"method": "graddiff"}, {"dtype": "bfloat16", "save_every": 2})
REFUSED = {
    "compile": {"compile": True},
    "gradient_release": {"gradient_release": True, "max_grad_norm": None},
    "state_dtype": {"state_dtype": "8bit"},
    "processes": {"method": "npo", "method_options": {"reduction": "token_mean"}},
}


def kept(case, output, **how):
    family, options, given = case
    return [family, options, {**given, "output": output, **how}]


CASES = {
    **{name: [*case, {}] for name, case in EQUAL.items()},
    "whole": kept(SAVED, "whole"),
    "stopped": kept(SAVED, "broken", stop=3),
    "not resumed": kept(SAVED, "broken"),
    "resumed": kept(SAVED, "broken", resume=True),
    "bf16 whole": kept(BF16, "bf16 whole"),
    "bf16 stopped": kept(BF16, "bf16 broken", stop=3),
    # The newest one is damaged in what the last process alone has read: all go back to the one before.
    "bf16 resumed": kept(BF16, "bf16 broken", resume=True, damage="step-3/shard-1.safetensors"),
    **{f"refused, {name}": ["llama, tied", options, {"output": "refused"}] for name, options in REFUSED.items()},
}


def torchrun(*words, processes=2):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "-m", *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)


def ended(process):
    """Exit status, and what it has printed."""
    try:
        out, errors = process.communicate(timeout=TIMEOUT)
    finally:
        process.kill()
    return process.returncode, out, errors


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("torchrun")
    (folder / "cases.json").write_text(json.dumps(list(CASES.values())))
    status, _, errors = ended(torchrun("tests.torchrun_worker", folder))
    assert status == 0, errors
    return folder


@pytest.fixture(scope="module")
def found(folder):
    """What each of the two processes has found, by case."""
    numbers = enumerate(CASES)
    return {name: [torch.load(folder / f"{n}.{rank}.pt", weights_only=True) for rank in (0, 1)] for n, name in numbers}


def lasting(records):
    return [{name: value for name, value in record.items() if name not in VOLATILE} for record in records]


@pytest.mark.parametrize("name", EQUAL)
def test_two_processes_are_one(found, name):
    """To fp32 rounding, relative to how far the weights have moved; and both keep the same log."""
    family, options = EQUAL[name]
    first, second = found[name]
    records, weights = run(family, options)
    assert second["weights"] == {} and lasting(first["records"]) == lasting(second["records"])
    start, got = tiny_model(family).state_dict(), first["weights"]
    assert list(got) == list(weights)
    moved = sum((weights[n] - start[n]).double().square().sum() for n in weights).sqrt()
    off = sum((weights[n] - got[n]).double().square().sum() for n in weights).sqrt()
    assert moved > 0 and off <= 1e-4 * moved, f"{off / moved:.1e}"  # 5e-6 as measured; AdamW's first steps amplify rounding
    for one, two in zip(lasting(records), lasting(first["records"]), strict=True):
        assert list(one) == list(two)
        assert two == pytest.approx(one, rel=1e-4, abs=1e-5), one["step"]

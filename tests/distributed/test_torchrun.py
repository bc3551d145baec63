"""``torchrun --nproc-per-node 2 -m soul unlearn``: the run of one process, over gloo on the CPU.

A set of processes takes seconds to start: most runs share one (tests/support/torchrun_worker.py).
"""

import errno
import importlib.util
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
import warnings

import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM

from soul.checkpoint import has_ended
from soul.checkpoint.sharded import ShardedCheckpoints
from soul.cli import main
from soul.distributed import Processes, check_supported, launched, shard, started
from soul.distributed.processes import check_alike
from soul.distributed.scatter import shard_from_first
from soul.distributed.shards import is_sharded
from soul.run.config import UnlearnConfig
from soul.run.loop import unlearn
from tests.support import parity
from tests.support.models import examples, tiny_model, tiny_tokenizer
from tests.support.torchrun_worker import run

ROOT = pathlib.Path(__file__).parents[2]
pytestmark = [
    pytest.mark.slow(reason="runs of two processes take a minute; FSDP2 itself is always tested, in test_processes.py"),
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch without gloo"),
]
VOLATILE = ("tokens_per_s", "peak_memory_gib")
TIMEOUT = 600  # of the longest set of processes, which takes a minute on two idle cores
TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what it puts into the environment

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
    "curvature": ("llama, untied", {"method": "graddiff", "curvature": "retain", "curvature_every": 2, "bs": 8}),
    "curvature of an empty part": ("llama, tied", {"method": "ceu", "curvature": "retain", "curvature_every": 2, "bs": 8,
                                                   "batch_size": 1, "gradient_checkpointing": True}),
    "metrics, and the best point": ("llama, tied", {"method": "npo", "eval_every": 1, "keep_best": "max forget_prob",
                                                    "eval_metrics": ["forget_rouge", "retain_extraction_strength"]}),
    "learning": ("llama, tied", {"method": "memorize", "optimizer": "adamw", "eval_every": 2, "until_prob": 0.9}),
    "compiled": ("llama, tied", {"method": "npo", "compile": True, "gradient_checkpointing": True}),
    "one ratio of the batch": ("llama, tied", {"method": "npo", "method_options": {"reduction": "token_mean"},
                                               "backend": "torch"}),
    "one ratio, an empty part": ("llama, untied", {"method": "npo", "method_options": {"reduction": "token_mean", "alpha": 0.0},
                                                "batch_size": 1}),
    # All rows once; of the last batch one process has nothing. Gradients of the batches are kept, or computed again.
    "influence by a diagonal": ("llama, tied", {"method": "influence", "method_options": {"curvature": "fisher",
                                                                                          "clip": 1e-2}}),
    "influence by a matrix": ("llama, untied", {"method": "influence", "method_options": {"curvature": "woodfisher",
                                                                                          "damping": 1.0}}),
    "influence, streamed": ("gpt2, tied", {"method": "influence", "method_options": {
        "curvature": "woodfisher", "damping": 1.0, "memory_gb": 1e-9, "blockwise": True}}),
}  # fmt: skip
# Head and embeddings are never gathered.
IN_SHARDS = {"backend": "torch", "head_in_shards": True}
EQUAL |= {
    "head in shards, an empty part": ("llama, untied", {"method": "ga", "batch_size": 1, "optimizer": "adamw", **IN_SHARDS}),
    "tied head in shards, KL, micro-batches, release": ("gemma2, capped", {  # its embeddings are scaled
        "method": "klmin", "batch_size": 1, "accumulate": 2, "gradient_release": True, "max_grad_norm": None, **IN_SHARDS}),
    "head in shards, curvature, evaluation": ("llama, untied", {
        "method": "ceu", "curvature": "retain", "curvature_every": 2, "bs": 8, "gradient_checkpointing": True, "eval_every": 2,
        "eval_metrics": ["forget_rouge"], "keep_best": "max forget_prob", **IN_SHARDS}),
    # Beside a table of positions, which is gathered.
    "tied head in shards, influence": ("gpt2, tied", {
        "method": "influence", "method_options": {"curvature": "fisher", "clip": 1e-2}, **IN_SHARDS}),
}  # fmt: skip
DRAWN = {"method": "npo", "curvature": "gnb", "curvature_every": 2, "bs": 8, "accumulate": 2, "batch_size": 1}
# With gradient release; without it the first one is of EQUAL.
RELEASED = {
    "released, micro-batches": "micro-batches, pairs, no clipping",
    "released, curvature": "curvature, no clipping",
}
KEPT = {"curvature, no clipping": ("llama, untied", {
    **EQUAL["curvature"][1], "max_grad_norm": None, "state_dtype": "8bit", **IN_SHARDS})}  # fmt: skip
# Adapters: the reference is the model without them, computed in every step for KL, and once before it for NPO. Dropout on their
# inputs; merged and saved a tensor at a time; adapters alone, which are resumed.
LORA = ("llama, untied", {"method": "klmin", "batch_size": 4}, {"adapters": {"rank": 3}})
LORA_SAVED = ("llama, tied", {"method": "npo"}, {"adapters": {"rank": 3, "dropout": 0.1}, "save_every": 2})
# The same over a base of 4 bits, which each process reads and has whole.
CODES = ("llama, untied", {"method": "npo"}, {"adapters": {"rank": 3}, "files": "by name", "in_codes": True, "save_every": 2})
HAS_CODES = all(importlib.util.find_spec(name) for name in ("bitsandbytes", "accelerate"))
AIM_STOP = 17  # of 24 steps
# The pilot, evaluations that move alpha and the rate, and points that are put back.
AIM = (
    "llama, untied",
    {"method": "npo", "aim": "forget_prob=0.0005", "epochs": 12, "optimizer": "adamw", **IN_SHARDS},
    {"save_every": 8},
)
# Dropout, which draws in each process; checkpoints after each second step of 4.
SAVED = ("llama, tied", {"method": "npo"}, {"dropout": 0.1, "save_every": 2})
BF16 = ("llama, tied", {"method": "graddiff", "state_dtype": "8bit"}, {"dtype": "bfloat16", "save_every": 2})
REFUSED = {
    "cuda_graph": {"cuda_graph": True},
}
# How a model is quantized -> how the error names it.
OTHER_CODES = {
    "quanto": ({"quant_method": "quanto"}, "codes of quanto"),
    "8 bits": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "codes of 8 bits of bitsandbytes"),
}
# What the last process does differently, and how the error begins.
ODD = {
    "epochs": ({"epochs": 3}, "epochs: expected the same in all 2 processes, got 2 in process 0, 3 in process 1; "),
    "lr": ({"lr": 2e-3}, "lr: expected the same in all 2 processes, got 0.001 in process 0, 0.002 in process 1; "),
    "seed": ({"seed": 1, "data": True}, "seed: expected the same in all 2 processes, got 0 in process 0, 1 in process 1; "),
    "weight decay": ({"weight_decay": 0.1}, "weight_decay: expected the same in all 2 processes, got 0.0 in process 0, "),
    "data": ({"data": True}, "content of forget: expected the same in all 2 processes, got '"),
    "weights": ({"weights": True}, "content of the model: expected the same in all 2 processes, got '"),
    "configuration": ({"activation": "gelu"}, "configuration of the model, hidden_act: expected the same in all 2 processes, "
                      "got 'silu' in process 0, 'gelu' in process 1; "),
    "save_every": ({"save_every": 3}, "save_every: expected the same in all 2 processes, got 2 in process 0, 3 in process 1; "),
}  # fmt: skip


def saved(case, output, **how):
    family, options, defaults = case
    return [family, options, {**defaults, "output": output, **how}]


CODES_CASES = {
    "codes whole": saved(CODES, "codes whole"),
    "codes stopped": saved(CODES, "codes broken", stop=3),
    "codes resumed": saved(CODES, "codes broken", resume=True),
}
CASES = {
    **{name: [*case, {}] for name, case in EQUAL.items()},
    "influence by drawn labels": [
        "llama, tied",
        {"method": "influence", "method_options": {"clip": 1e-2}},
        {"output": "drawn"},
    ],
    "drawn labels": ["llama, untied", {**DRAWN, "backend": "torch"}, {}],
    "drawn labels, head in shards": ["llama, untied", {**DRAWN, **IN_SHARDS}, {}],
    **{name: [*case, {}] for name, case in KEPT.items()},
    **{
        name: [family, {**options, "gradient_release": True}, {}]
        for name, (family, options) in ((name, {**EQUAL, **KEPT}[kept]) for name, kept in RELEASED.items())
    },
    # By name: the first process alone reads the model.
    "whole": saved(SAVED, "whole", files="by name"),
    "stopped": saved(SAVED, "broken", stop=3),
    "not resumed": saved(SAVED, "broken"),
    "resumed": saved(SAVED, "broken", resume=True),
    "as the command": ["llama, tied", {"method": "npo", "epochs": 30}, {}],
    "bf16 whole": saved(BF16, "bf16 whole", files="by name"),
    "bf16 stopped": saved(BF16, "bf16 broken", stop=3, files="whole"),
    # The newest one is damaged in what the last process alone has read: all go back to the one before.
    "bf16 resumed": saved(BF16, "bf16 broken", resume=True, files="whole", damage="step-3/shard-1.safetensors"),
    # The clock of the first process goes 4 minutes a step, that of the other one stands still.
    "by time": saved(SAVED, "by time", save_every=0, save_minutes=8, clock=[240.0, 0.0]),
    "asked": ["llama, tied", {"method": "npo"}, {"output": "asked", "samples": 2}],
    "adapters": [*LORA],
    # Frozen embeddings, looked up in shards.
    "adapters merged": saved((LORA[0], {**LORA[1], **IN_SHARDS}, LORA[2]), "merged", merge=True),
    "adapters whole": saved(LORA_SAVED, "adapters whole", files="by name"),
    "adapters stopped": saved(LORA_SAVED, "adapters broken", stop=3),
    "adapters resumed": saved(LORA_SAVED, "adapters broken", resume=True),
    **(CODES_CASES if HAS_CODES else {}),
    "aim whole": saved(AIM, "aim whole", files="by name"),
    "aim stopped": saved(AIM, "aim broken", stop=AIM_STOP),
    "aim resumed": saved(AIM, "aim broken", resume=True),
    "cached": ["llama, tied", {"method": "npo", "epochs": 1, "reference_cache": "cache"}, {}],
    "full disk": ["llama, tied", {}, {"output": "full", "save_every": 1, "full": True}],
    **{f"refused, {name}": ["llama, tied", options, {"output": "refused"}] for name, options in REFUSED.items()},
    **{
        f"refused, {name}": ["llama, untied", {}, {"output": "refused", "codes": codes, "adapters": {"rank": 3}}]
        for name, (codes, _) in OTHER_CODES.items()
    },
    **{f"odd, {name}": ["llama, tied", {}, {"output": "odd", "save_every": 2, "odd": odd}] for name, (odd, _) in ODD.items()},
}


def torchrun(*words, processes=2):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]  # on a port of its own
    command = [sys.executable, *launcher, "-m", *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)


def ended(process, timeout=TIMEOUT):
    """Return the exit status, and what the process has printed."""
    try:
        out, errors = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, out, errors


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("torchrun")
    (folder / "cases.json").write_text(json.dumps(list(CASES.values())))
    status, _, errors = ended(torchrun("tests.support.torchrun_worker", folder))
    assert status == 0, errors
    return folder


@pytest.fixture(scope="module")
def results(folder):
    """Return the results of the two processes by case."""
    numbers = enumerate(CASES)
    return {name: [torch.load(folder / f"{n}.{rank}.pt", weights_only=True) for rank in (0, 1)] for n, name in numbers}


def lasting(records):
    return [{name: value for name, value in record.items() if name not in VOLATILE} for record in records]


@pytest.mark.parametrize("name", EQUAL)
@pytest.mark.covers("objectives that are sums over sequences", "FSDP2")
@pytest.mark.covers("NPO with one ratio of the batch", "FSDP2")
@pytest.mark.covers("reference model (KL, DPO, NPO)", "FSDP2")
@pytest.mark.covers("curvature of retain data", "FSDP2")
@pytest.mark.covers("gradient checkpointing", "FSDP2")
@pytest.mark.covers("compilation (`--compile`)", "FSDP2")
@pytest.mark.covers("influence", "FSDP2")
@pytest.mark.covers("evaluation and best point during a run", "FSDP2")
@pytest.mark.covers("head in shards (`--head-in-shards`)", "FSDP2")
def test_two_processes_are_one(results, name):
    """Weights agree up to fp32 rounding, relative to how far they have moved, and both processes keep the same log."""
    assert_as_one(*EQUAL[name], results[name])


def assert_as_one(family, options, ranks, how=None):
    """Hold the results of several processes against a run of one, which is not compiled, and whose model is whole."""
    first, *others = ranks
    whole = {"compile": False, "replicas": 1, "cpu_offload": False, "head_in_shards": False}
    records, weights = run(family, {**options, **whole}, **(how or {}))
    assert all(other["weights"] == {} and lasting(first["records"]) == lasting(other["records"]) for other in others)
    got = first["weights"]
    assert list(got) == list(weights)
    if how and "adapters" in how:  # which begin at random and at 0
        weights = {name: tensor for name, tensor in weights.items() if "lora_B" in name}
        start = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    else:
        start = tiny_model(family).state_dict()
    parity.moved_alike({name: got[name] for name in weights}, weights, start)  # AdamW's first steps amplify rounding
    parity.logs_alike(lasting(first["records"]), lasting(records))


def equal(one, two):
    assert list(one["weights"]) == list(two["weights"]) and lasting(one["records"]) == lasting(two["records"])
    return all(torch.equal(one["weights"][name], two["weights"][name]) for name in one["weights"])


def assert_resumed(got, want, case=""):
    """Check that a run that was stopped and resumed has the log and the weights of the run that was not."""
    assert lasting(got["records"]) == lasting(want["records"])
    parity.bit_for_bit(got["weights"], want["weights"], case, "the run that was not stopped")


@pytest.mark.covers("checkpoints, resumed bit for bit", "FSDP2")
@pytest.mark.covers("8-bit states", "FSDP2")
def test_stopped_by_sigterm_in_one_process_all_go_on_bit_for_bit(results, folder):
    """Both processes restore their generators, the 8 low bits of bf16 weights, and the noise.

    The whole run had its model from the first process alone, the others from a model in every process, or from bf16 files that
    every process has read: weights, and the frequencies of rotary embeddings, which are in no file, are the same bits.
    """
    for prefix in ("", "bf16 "):
        (whole, _), (resumed, second) = results[f"{prefix}whole"], results[f"{prefix}resumed"]
        for rank in results[f"{prefix}stopped"]:
            assert rank["error"] == "Stopped" and rank["text"].endswith(
                "stopped after step 3 of 4; with --resume it goes on after step 3"
            )
        assert_resumed(resumed, whole, prefix or "fp32")
        assert lasting(second["records"]) == lasting(whole["records"])
        assert not (folder / f"{prefix}broken" / "checkpoints").exists()
    dry = results["tied head, sums of sequences"][0]
    assert not equal({**dry, "records": []}, {**results["whole"][0], "records": []})  # dropout did something
    assert [rank["seed"] for rank in results["whole"]] == [0, 1]  # of another dropout in each
    assert [rank["text"].split(":")[0] for rank in results["not resumed"]] == ["output", "output"]
    (warning,) = results["bf16 resumed"][0]["warnings"]
    assert "step-3: damaged (checksum of shard-1.safetensors); trying the one before it" in warning


def test_one_compilation_serves_all_layers(results):
    """There are two layers: each by itself would be compiled for steps, for batches of any shape and, as torch 2.10 does it,
    for evaluations without gradients."""
    graphs = [rank["graphs"] for rank in results["compiled"]]
    assert all(1 <= count <= 3 for count in graphs), graphs


@pytest.mark.parametrize("name", RELEASED)
@pytest.mark.covers("gradient release", "FSDP2")
def test_released_gradients_leave_the_weights_of_two_processes_as_they_are(results, name):
    """Bit for bit; the log lacks the norm of the gradients alone."""
    (got, second), (want, _) = results[name], results[RELEASED[name]]
    assert lasting(got["records"]) == lasting(second["records"])
    assert lasting(got["records"]) == [
        {key: value for key, value in record.items() if key != "grad_norm"} for record in lasting(want["records"])
    ]
    parity.bit_for_bit(got["weights"], want["weights"], versus="the same run without release")


@pytest.mark.covers("adapters (LoRA)", "FSDP2")
def test_adapters_over_a_model_in_shards_are_those_of_one_process(results, folder, tmp_path):
    """A rank of 3, so that one process holds more of it than the other; the same when merged and saved as a plain model."""
    family, options, how = LORA
    assert_as_one(family, options, results["adapters"], how)
    run(family, options, tmp_path / "one", merge=True, **how)
    one, two = (safetensors.torch.load_file(path / "model.safetensors") for path in (tmp_path / "one", folder / "merged"))
    assert one.keys() == two.keys() == tiny_model(family).state_dict().keys()
    start = tiny_model(family).state_dict()
    moved = max((one[name] - start[name]).abs().max() for name in one)
    off = max((one[name] - two[name]).abs().max() for name in one)
    assert moved > 0
    parity.within("largest movement", off / moved, 1e-4, "merged")


def test_adapters_resume_bit_for_bit_and_are_saved_alone(results, folder):
    whole, resumed = results["adapters whole"][0], results["adapters resumed"][0]
    assert results["adapters stopped"][0]["error"] == "Stopped" and equal(whole, resumed)
    saved_adapters = safetensors.torch.load_file(folder / "adapters whole" / "adapter_model.safetensors")
    assert saved_adapters and all("lora_" in name for name in saved_adapters)
    trained = {name: tensor for name, tensor in whole["weights"].items() if "lora_" in name}
    assert len(trained) == len(saved_adapters)
    for name, tensor in saved_adapters.items():
        assert torch.equal(tensor, trained[name.replace(".weight", ".default.weight")])


@pytest.mark.covers("head in shards (`--head-in-shards`)", "FSDP2")
def test_labels_are_drawn_alike_with_a_head_in_shards(results):
    """From the same uniform numbers in each process; the weights agree up to rounding."""
    (whole, _), (cut, _) = results["drawn labels"], results["drawn labels, head in shards"]
    start = tiny_model("llama, untied").state_dict()
    parity.moved_alike(cut["weights"], whole["weights"], start, versus="two processes with the whole head")
    for one, two in zip(lasting(whole["records"]), lasting(cut["records"]), strict=True):
        assert two == pytest.approx(one, rel=1e-4, abs=1e-5)


@pytest.mark.skipif(not HAS_CODES, reason="the extra quant is not installed")
@pytest.mark.covers("adapters over a base of 4 bits", "FSDP2")
def test_adapters_over_a_base_of_four_bits(results, folder, tmp_path):
    """Those of one process; the base is whole in each; resumed bit for bit, and saved without the base."""
    family, options, how = CODES
    whole, resumed = results["codes whole"], results["codes resumed"][0]
    assert_as_one(family, options, whole, {**how, "output": tmp_path / "one"})
    assert results["codes stopped"][0]["error"] == "Stopped"
    assert_resumed(resumed, whole[0], "resumed")
    codes = [tensor for tensor in whole[0]["weights"].values() if tensor.dtype == torch.uint8 and tensor.dim() == 2]
    assert len(codes) == 2 * 7
    saved_adapters = safetensors.torch.load_file(folder / "codes whole" / "adapter_model.safetensors")
    assert saved_adapters and all("lora_" in name for name in saved_adapters)


@pytest.mark.covers("aim", "FSDP2")
def test_all_processes_are_led_to_an_aim_alike(results, folder, tmp_path):
    """As one process is: the same choices, the same verdict; and bit for bit after a stop, with the nearest point saved."""
    (whole, _), (resumed, _) = results["aim whole"], results["aim resumed"]
    family, options, _ = AIM
    assert_as_one(family, options, results["aim whole"], {"output": tmp_path / "one"})
    assert results["aim stopped"][0]["error"] == "Stopped", results["aim stopped"][0]
    assert_resumed(resumed, whole)
    log, again = [(folder / name / "log.jsonl").read_text().splitlines() for name in ("aim whole", "aim broken")]
    events = [[line for line in map(json.loads, lines) if "event" in line] for lines in (log, again)]
    assert events[0] == events[1] and {"pilot", "start", "aim", "verdict"} == {event["event"] for event in events[0]}
    verdict = json.loads((folder / "aim whole" / "verdict.json").read_text())
    assert {"event": "verdict", **verdict} == events[0][-1]


def test_all_processes_save_by_the_clock_of_the_first(results):
    """With clocks of their own the processes would wait for each other for ever."""
    assert [rank["saved"] for rank in results["by time"]] == [[2, 4], [2, 4]]
    assert equal(results["by time"][0], results["whole"][0])


def test_a_full_disk_of_one_process_ends_all_and_leaves_the_last_checkpoint(results, folder):
    for rank in results["full disk"]:
        assert rank["error"] == "OSError"
        message = "step 2 could not be saved (No space left on device); with --resume it goes on after step 1"
        assert rank["text"].endswith(message)
    assert [path.name for path in (folder / "full" / "checkpoints").iterdir()] == ["step-1"]


def test_the_reference_is_computed_in_the_same_way_and_cached_once(results, folder):
    """The cache's key is computed from whole weights, so one process uses the file that two have written."""
    (path,) = (folder / "cache").iterdir()
    before = path.stat().st_mtime_ns
    records, _ = run("llama, tied", {"method": "npo", "epochs": 1, "reference_cache": str(folder / "cache")})
    assert [p.stat().st_mtime_ns for p in (folder / "cache").iterdir()] == [before]
    assert results["cached"][0]["records"][0]["loss"] == pytest.approx(records[0]["loss"], rel=1e-5)


def test_a_model_in_shards_says_what_a_whole_one_says(results, folder, tmp_path):
    """Every process generates, one writes; the run is the same as without."""
    assert equal(results["asked"][0], results["tied head, sums of sequences"][0])
    run("llama, tied", {"method": "npo"}, tmp_path / "one", samples=2)
    two, one = (json.loads((path / "report.json").read_text()) for path in (folder / "asked", tmp_path / "one"))
    assert [record["step"] for record in two["asked"]] == [0, 2, 4] and "no_samples" not in two
    assert two["environment"].pop("processes") == 2 and one["environment"].pop("processes") == 1
    assert two["environment"]["parameters"] == one["environment"]["parameters"] and two["prompts"] == one["prompts"]
    for here, there in zip(two["asked"], one["asked"], strict=True):
        assert here["texts"] == there["texts"]
        assert here["probabilities"] == pytest.approx(there["probabilities"], rel=1e-4)
        assert here.get("retain_prob", 0.0) == pytest.approx(there.get("retain_prob", 0.0), rel=1e-4)


def test_what_is_saved_is_a_plain_model(results, folder):
    """Safetensors with plain names, each tensor once, that transformers loads."""
    got = AutoModelForCausalLM.from_pretrained(folder / "bf16 whole", dtype="auto").state_dict()
    want = results["bf16 whole"][0]["weights"]
    assert list(got) == list(want) and all(torch.equal(got[name], want[name]) for name in want)
    assert json.loads((folder / "bf16 whole" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert (folder / "bf16 whole" / "model.safetensors").stat().st_size < 1.1 * 2 * sum(
        p.numel() for p in tiny_model("llama, tied").parameters()
    )  # the tied head is not there twice


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.refuses(
    "CUDA graphs (`--cuda-graph`)", "FSDP2", "a graph repeats addresses, and shards are gathered into memory that changes"
)
def test_what_several_processes_cannot_do_is_refused_before_anything_is_written(results, folder, name):
    for rank in results[f"refused, {name}"]:
        assert rank["error"] == "ArgumentError" and rank["text"].startswith(f"{name}: expected ")
    assert not (folder / "refused").exists()


@pytest.mark.parametrize("name", OTHER_CODES)
def test_a_base_in_other_codes_is_refused_by_their_name(results, folder, name):
    for rank in results[f"refused, {name}"]:
        expected = "model: expected weights in 4 bits of bitsandbytes, or none in codes, in several processes, got "
        assert rank["text"].startswith(f"{expected}{OTHER_CODES[name][1]}; FSDP2 would cut them")
    assert not (folder / "refused").exists()


@pytest.mark.parametrize("name", ODD)
def test_processes_that_disagree_end_all(results, folder, name):
    """With another lr, seed or data the run ended with status 0 and another result; with other epochs it never ended."""
    for rank in results[f"odd, {name}"]:
        assert rank["error"] == "ArgumentError" and rank["text"].startswith(ODD[name][1])
        assert rank["text"].endswith("give every process the same options, files and library versions")
    assert not (folder / "odd").exists()


def test_what_differs_is_named_with_its_values_and_processes():
    alike = {"lr": 1e-3, "torch": "2.11", "content of forget": "ab"}
    check_alike([alike, dict(alike), dict(alike)])
    check_alike([{"x": float("nan")}] * 2)
    check_alike([{"method_options": {"beta": 1, "alpha": 2}}, {"method_options": {"alpha": 2, "beta": 1}}])
    for changes, message in (
        ([{}, {"lr": 2e-3, "content of forget": "cd"}, {}], "lr: expected the same in all 3 processes, got 0.001 in processes "
         "0 2, 0.002 in process 1;"),
        ([{"content of forget": "cd"}, {}, {}], "content of forget: .* got 'cd' in process 0, 'ab' in processes 1 2;"),
        ([{}, {}, {"torch": "2.13"}], "torch: .* got '2.11' in processes 0 1, '2.13' in process 2;"),
        ([{}, {"peft": "0.21"}, {}], "peft: .* got nothing in processes 0 2, '0.21' in process 1;"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            check_alike([alike | change for change in changes])


def test_a_loss_that_neither_is_a_sum_nor_shares_its_batches_is_refused():
    """None of this library's is one."""
    objective = types.SimpleNamespace(additive=None, shares_batches=False)
    config = types.SimpleNamespace(cuda_graph=False, objective=lambda: objective)
    with pytest.raises(ValueError, match="^processes: expected 1 with .*, got several; its loss is not a sum over sequences"):
        check_supported(config)


def test_influence_with_drawn_labels_moves_both_processes_alike(results, folder):
    """The labels are others than those of one process; so is the step, in direction alone: it is clipped."""
    first, second = results["influence by drawn labels"]
    (record,) = lasting(first["records"])
    assert lasting(second["records"]) == [record] and record["update_norm"] > 0
    lines = (folder / "drawn" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["update_norm"] for line in lines] == [record["update_norm"]]
    _, weights = run("llama, tied", {"method": "influence", "method_options": {"curvature": "fisher", "clip": 1e-2}})
    start = tiny_model("llama, tied").state_dict()
    moves = [torch.cat([(w[name] - start[name]).flatten() for name in start]) for w in (first["weights"], weights)]
    assert torch.nn.functional.cosine_similarity(*moves, dim=0) > 0.5  # the forget gradient is the same


def test_a_model_in_shards_of_somebody_else_is_refused(tmp_path):
    """The loss would see a shard of the head only."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'init'}", rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        model = torch.distributed.fsdp.fully_shard(tiny_model("llama, tied"), mesh=mesh)
        with pytest.raises(ValueError, match="model: expected a whole model, got one in shards; .*soul.distributed.shard"):
            unlearn(model, tiny_tokenizer(), examples(2), examples(2), UnlearnConfig())
    finally:
        torch.distributed.destroy_process_group()


def test_other_commands_are_refused(monkeypatch, capsys):
    """N processes would each do all of the work, in one directory."""
    for name, value in zip(TORCHRUN, ("1", "1", "2", "localhost", "1")):
        monkeypatch.setenv(name, value)
    assert main(["info"]) == 2
    assert "torchrun: expected 'soul unlearn' or 'soul memorize', got 'soul info'; start it without" in capsys.readouterr().err


WHOLE = dict(zip(TORCHRUN, ("1", "1", "2", "localhost", "29500")))


@pytest.mark.parametrize("name, value, message", [
    ("WORLD_SIZE", "two", r"WORLD_SIZE: expected a whole number >= 1, got 'two'; start all processes with torchrun"),
    ("WORLD_SIZE", "-2", "WORLD_SIZE: expected a whole number >= 1, got '-2'"),
    ("WORLD_SIZE", "0", "WORLD_SIZE: expected a whole number >= 1, got '0'"),
    ("RANK", "2", "RANK: expected a whole number from 0 to 1 with WORLD_SIZE=2, got '2'"),
    ("RANK", "", "RANK: expected a whole number from 0 to 1 with WORLD_SIZE=2, got ''"),
    ("RANK", "-1", "RANK: expected a whole number from 0 to 1"), ("RANK", None, "RANK: .* got none; "),
    ("LOCAL_RANK", "x", "LOCAL_RANK: expected a whole number from 0 to 1"), ("LOCAL_RANK", "7", "LOCAL_RANK: expected"),
    ("MASTER_PORT", None, "MASTER_PORT: expected a whole number from 1 to 65535 with WORLD_SIZE=2, got none"),
    ("MASTER_PORT", "99999", "MASTER_PORT: expected"), ("MASTER_PORT", "1.5", "MASTER_PORT: expected"),
    ("MASTER_ADDR", None, "MASTER_ADDR: expected a host name with WORLD_SIZE=2, got none"),
    ("MASTER_ADDR", " ", "MASTER_ADDR: expected a host name"),
])  # fmt: skip
def test_rubbish_in_the_variables_of_torchrun_is_named(name, value, message, monkeypatch, capsys):
    """Without the check it ended in a traceback, in an endless wait, or in a process that took itself for the only one."""
    for variable, good in WHOLE.items():
        monkeypatch.setenv(variable, good)
    assert launched() == 2
    monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        launched()
    assert main(["unlearn", "--model", "x", "--forget", "x", "--output", "x", "--device", "cpu"]) == 2
    assert f"soul unlearn: {name}: expected" in capsys.readouterr().err


def test_the_variables_of_torchrun_are_ignored_for_one_process(monkeypatch):
    for variable, value in zip(TORCHRUN, ("x", "x", "1", "", "x")):
        monkeypatch.setenv(variable, value)
    assert launched() == 1
    monkeypatch.delenv("WORLD_SIZE")
    assert launched() == 1


@pytest.mark.parametrize("rank", ["0", "1"])
def test_missing_processes_are_waited_for_until_the_timeout(rank, monkeypatch):
    monkeypatch.setattr("soul.distributed.processes.JOIN_SECONDS", 1)
    for variable, value in zip(TORCHRUN, (rank, rank, "2", "127.0.0.1", str(free_port()))):
        monkeypatch.setenv(variable, value)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    begun = time.monotonic()
    message = r"WORLD_SIZE: expected 2 processes that meet at 127.0.0.1:\d+ within 1 seconds, got "
    with pytest.raises(ValueError, match=message), started(torch.device("cpu")):
        raise AssertionError("there is a group of one process")
    assert time.monotonic() - begun < 60 and not torch.distributed.is_initialized()


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture(scope="module")
def command_folder(tmp_path_factory):
    """Write model and data for the command, the same as for the worker."""
    command_folder = tmp_path_factory.mktemp("command")
    tiny_model("llama, tied").save_pretrained(command_folder / "model")
    tiny_tokenizer().save_pretrained(command_folder / "model")
    rows = [json.dumps({"prompt": e.prompt, "completion": e.answer}) + "\n" for e in examples(12)]
    (command_folder / "forget.jsonl").write_text("".join(rows[:5]))
    (command_folder / "retain.jsonl").write_text("".join(rows[5:]))
    return command_folder


def words(command_folder, output, *more):
    names = {"model": "model", "forget": "forget.jsonl", "retain": "retain.jsonl", "output": output}
    paths = [word for name, value in names.items() for word in (f"--{name}", command_folder / value)]
    how = "--method npo --batch-size 3 --lr 1e-3 --epochs 30 --device cpu --backend reference --dtype float32 --save-every 4"
    return ["soul", "unlearn", *paths, *how.split(), *more]


def test_the_command_ends_with_status_2_in_every_process_that_differs(command_folder):
    """This happens on two machines if somebody types another number on one."""
    port = free_port()
    processes = []
    for rank, epochs in enumerate(("1", "2")):
        variables = dict(zip(TORCHRUN, (str(rank), str(rank), "2", "127.0.0.1", str(port))))
        environment = {**os.environ, **variables, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", *map(str, words(command_folder, "odd", "--epochs", epochs))]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, **pipes))
    for process in processes:
        status, _, errors = ended(process)
        assert status == 2, errors
        assert "soul unlearn: epochs: expected the same in all 2 processes, got 1 in process 0, 2 in process 1; " in errors
    assert not (command_folder / "odd").exists()


THREADS_AT_THE_END = """
import runpy, sys, threading
import torch

def work():
    ones = torch.ones(1000)
    while True:
        ones.add(ones)  # gives the GIL up within C++, and takes it again

for _ in range(4):
    threading.Thread(target=work, daemon=True).start()
sys.argv = ["soul", "info"]
runpy.run_module("soul", run_name="__main__")
"""


def test_threads_that_take_the_gil_at_exit_do_not_abort_torchrun():
    """Gloo's threads do so once in hundreds of runs, these every time (CPython before 3.14). The output is not lost."""
    environment = {**os.environ, "WORLD_SIZE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", THREADS_AT_THE_END]
    pipes = dict(capture_output=True, text=True, timeout=TIMEOUT)
    process = subprocess.run(command, cwd=ROOT, env=environment, **pipes)
    assert process.returncode == 0, process.stderr
    assert f"torch {torch.__version__}" in process.stdout


def lines(path):
    return path.read_text().splitlines() if path.exists() else []


def children(pid):
    return [int(child) for child in pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the processes in /proc")
def test_a_killed_command_resumes_bit_for_bit_and_closely_with_more_processes(results, command_folder):
    """One process gets SIGKILL at some time after step 9, and torchrun ends the other one."""
    process = torchrun(*words(command_folder, "broken", "--resume"))  # from the start, where there is nothing yet
    until = time.monotonic() + TIMEOUT
    while len(lines(command_folder / "broken" / "log.jsonl")) < 10:
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.01)
    os.kill(children(process.pid)[-1], signal.SIGKILL)
    status, _, errors = ended(process)
    assert status == 1 and "SIGKILL" in errors
    assert not (command_folder / "broken" / "model.safetensors").exists()
    shutil.copytree(command_folder / "broken", command_folder / "three")

    two = torchrun(*words(command_folder, "broken", "--resume"))
    three = torchrun(*words(command_folder, "three", "--resume"), processes=3)
    whole = results["as the command"][0]
    for process, output, tolerance in ((two, command_folder / "broken", 0.0), (three, command_folder / "three", 1e-5)):
        status, out, errors = ended(process)
        assert status == 0, errors
        assert out.count("probability of a forget answer") == 1  # only one process prints
        assert ("processes was 2 and is 3: last bits may differ" in errors) == (tolerance > 0)
        weights = safetensors.torch.load_file(output / "model.safetensors")
        records = [json.loads(line) for line in lines(output / "log.jsonl")]
        assert len(records) == 60 and not (output / "checkpoints").exists()
        for one, other in zip(lasting(whole["records"]), lasting(records), strict=True):
            assert other == (pytest.approx(one, rel=1e-3, abs=1e-5) if tolerance else one)
        for name, tensor in weights.items():
            assert torch.allclose(tensor, whole["weights"][name], rtol=0, atol=tolerance), name


@pytest.fixture(autouse=True)
def short_reports():
    """Reports are not shortened: those of other processes are not, and are compared with them."""


@pytest.fixture
def group_of_one(tmp_path):
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'init'}", rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def test_a_model_of_other_tensors_than_the_first_process_has_is_refused(group_of_one, monkeypatch):
    """With other versions of the libraries, say; nothing was changed."""
    model = tiny_model("llama, untied")
    monkeypatch.setattr(Processes, "broadcast", lambda self, value: {**value, "more.weight": value["lm_head.weight"]})
    with pytest.raises(ValueError, match="model: expected the parameters and buffers of the first process, got more.weight"):
        shard_from_first(model, torch.device("cpu"))
    assert not any(is_sharded(p) or p.is_meta for p in model.parameters())


class OwnEmbedding(torch.nn.Embedding):
    """One that reads its weight itself."""

    def forward(self, ids):
        return 2.0 * self.weight[ids]


def test_head_and_embeddings_in_shards_are_layers_that_look_up_rows(group_of_one):
    """Gemma's scale them. Nothing was changed where a layer is refused. What is untied and computes something else is gathered,
    as positions are."""
    kinds = ("llama, untied", "gpt2, tied", "gemma2, capped", "llama, untied", "llama, untied", "llama, tied")
    plain, tied, scaled, own, clipped, both = map(tiny_model, kinds)
    clipped.get_input_embeddings().max_norm = 1.0
    for model in (own, both):
        model.get_input_embeddings().__class__ = OwnEmbedding
    ids = torch.tensor([[3, 7, 3]])
    for model, gathers in ((plain, False), (tied, False), (scaled, False), (own, True), (clipped, True)):
        embeddings = model.get_input_embeddings()
        want = embeddings(ids)
        shard(model, torch.device("cpu"), head_in_shards=True)
        assert all(is_sharded(p) for p in model.parameters())
        model.unshard()
        assert is_sharded(model.get_output_embeddings().weight) and is_sharded(embeddings.weight) != gathers
        assert torch.equal(embeddings(ids), want)
    assert not is_sharded(tied.transformer.wpe.weight)
    message = r"head_in_shards: expected embeddings that are looked up by torch.nn.Embedding, got OwnEmbedding\(.*\); what"
    with pytest.raises(ValueError, match=message):
        shard(both, torch.device("cpu"), head_in_shards=True)
    assert not any(is_sharded(p) for p in both.parameters())


def test_one_process_is_told_that_its_head_is_whole():
    config = UnlearnConfig(epochs=1, batch_size=5, backend="torch", head_in_shards=True)
    with pytest.warns(UserWarning, match="head_in_shards: one process has the whole head; leave it out, it changes nothing"):
        unlearn(tiny_model(), tiny_tokenizer(), examples(5), examples(9)[5:], config, progress=False)


def sharded_run(checkpoints):
    """Run 6 steps of a sharded model; return the log."""
    model = shard(tiny_model(), torch.device("cpu"))
    config = UnlearnConfig(epochs=2, batch_size=2, lr=1e-3, backend="reference")
    records = unlearn(model, tiny_tokenizer(), examples(5), examples(9)[5:], config, progress=False, checkpoints=checkpoints)
    return [record["loss"] for record in records]


def test_a_flipped_bit_in_the_newest_sharded_checkpoint_is_not_taken_for_another_run(group_of_one, tmp_path):
    """As in tests/checkpoint/test_faults.py, with the sharded code in one process."""
    want = sharded_run(ShardedCheckpoints(tmp_path, every=2))
    path = tmp_path / "step-6" / "training.json"
    whole = path.read_bytes()
    described = json.loads(whole)["state"]["run"]
    begin = whole.index(b'"run"')
    for position in range(begin, whole.index(b'"environment"'), 23):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1 << position % 7]) + whole[position + 1 :])
        ShardedCheckpoints(tmp_path, resume=True).check(described)
    path.write_bytes(whole.replace(b'"lr": 0.001', b'"lr": 0.003', 1))
    with pytest.warns(UserWarning, match="step-6: damaged .checksum of training.json.; trying the one before it"):
        assert sharded_run(ShardedCheckpoints(tmp_path, resume=True)) == want


def test_an_error_while_the_last_sharded_checkpoints_are_removed_does_not_hide_the_model(group_of_one, tmp_path, monkeypatch):
    """An error at each of the removals: what remains is whole, or no longer has the name of a checkpoint."""
    sharded_run(ShardedCheckpoints(tmp_path / "run" / "checkpoints", every=3))
    (tmp_path / "run" / "config.json").write_text("{}")  # of the model, which is saved before
    for number in range(10):
        output = tmp_path / f"removed {number}"
        calls_left = [number]
        shutil.copytree(tmp_path / "run", output)
        checkpoints = ShardedCheckpoints(output / "checkpoints")

        def unlink(*args, calls_left=calls_left, real=os.unlink, **options):
            calls_left[0] -= 1
            if calls_left[0] < 0:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            real(*args, **options)

        assert not has_ended(output, checkpoints)
        with monkeypatch.context() as patch, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            patch.setattr(os, "unlink", unlink)
            checkpoints.end(output)
        assert has_ended(output, checkpoints) and (output / "soul_ended.txt").is_file()
        if not caught:  # nothing was left to remove
            assert number == 4 and not checkpoints.directory.exists()
            break
        assert "could not be removed" in str(caught[0].message) and not checkpoints.steps()

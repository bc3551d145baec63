"""``torchrun -m soul unlearn --replicas 2`` (HSDP) and ``--cpu-offload``: the run of one process, in four over gloo on the CPU.

All runs share one set of processes (tests/support/torchrun_worker.py).
"""

import json

import pytest
import torch

from tests.distributed.test_torchrun import (
    AIM,
    CODES,
    HAS_CODES,
    LORA,
    assert_as_one,
    assert_resumed,
    ended,
    lasting,
    torchrun,
)
from tests.support import parity

pytestmark = [
    pytest.mark.slow(reason="starts four processes"),
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch without gloo"),
]

CURVATURE = {"method": "graddiff", "curvature": "retain", "curvature_every": 2, "bs": 8, "state_dtype": "8bit"}
# 5 examples to forget in batches of 3 leave some processes without a sequence in the second step of an epoch.
COPIES = {
    "reference, rho, clipping, evaluation": (
        "llama, untied",
        {
            "method": "npo",
            "clip_target": 0.5,
            "eval_every": 2,
            "keep_best": "max forget_prob",
            "head_in_shards": True,
            "backend": "torch",
        },
    ),
    "one ratio of the batch": (
        "llama, tied",
        {"method": "npo", "method_options": {"reduction": "token_mean"}, "backend": "torch"},
    ),
    "curvature, micro-batches": (
        "llama, untied",
        {**CURVATURE, "state_dtype": None, "accumulate": 2, "batch_size": 2, "gradient_checkpointing": True},
    ),
    # Of head and embeddings there is one copy, of all else there are two.
    "influence": (
        "llama, tied",
        {
            "method": "influence",
            "method_options": {"curvature": "woodfisher", "damping": 1.0},
            "head_in_shards": True,
            "backend": "torch",
        },
    ),
    "two meshes": ("llama, untied", {"method": "graddiff", "optimizer": "adamw", "head_in_shards": True, "backend": "torch"}),
    "compiled": ("gpt2, tied", {"method": "ga", "optimizer": "adamw", "compile": True}),
}
IN_MAIN_MEMORY = ("llama, untied", {"method": "npo", "clip_target": 0.5, "eval_every": 2, "backend": "torch"})
# 24-bit weights with 8-bit states; the first process alone reads the model. Checkpoints after each second step of 4. Head and
# embeddings are cut over all processes, everything else over two.
BF16 = {"method": "graddiff", "state_dtype": "8bit", "backend": "torch", "replicas": 2, "head_in_shards": True}
SAVED = {"dtype": "bfloat16", "save_every": 2, "files": "by name"}
CASES = {
    **{name: [family, {**options, "replicas": 2}, {}] for name, (family, options) in COPIES.items()},
    "adapters": [LORA[0], {**LORA[1], "replicas": 2}, LORA[2]],
    **(
        {
            "codes": [
                CODES[0],
                {**CODES[1], "replicas": 2, "head_in_shards": True, "backend": "torch"},
                {**CODES[2], "output": "codes"},
            ]
        }
        if HAS_CODES
        else {}
    ),
    "kept": ["llama, untied", {**CURVATURE, "max_grad_norm": None, "replicas": 2}, {}],
    "released": [
        "llama, untied",
        {**CURVATURE, "max_grad_norm": None, "replicas": 2, "gradient_release": True, "state_offload": True},
        {},
    ],
    "whole": ["llama, untied", BF16, {**SAVED, "output": "whole"}],
    "stopped": ["llama, untied", BF16, {**SAVED, "output": "broken", "stop": 3}],
    "resumed": ["llama, untied", BF16, {**SAVED, "output": "broken", "resume": True}],
    "stopped in main memory": ["llama, untied", {**BF16, "cpu_offload": True}, {**SAVED, "output": "left", "stop": 3}],
    "resumed without copies": [
        "llama, untied",
        {**BF16, "replicas": 1, "head_in_shards": False},
        {**SAVED, "output": "left", "resume": True},
    ],
    "in main memory": [
        IN_MAIN_MEMORY[0],
        {**IN_MAIN_MEMORY[1], "cpu_offload": True, "head_in_shards": True},
        {},
    ],
    "aim": [AIM[0], {**AIM[1], "epochs": 6, "replicas": 2, "head_in_shards": False}, {"output": "aim"}],
    "graph": ["llama, tied", {"cuda_graph": True, "replicas": 2}, {"output": "refused"}],
    "three copies": ["llama, untied", {**BF16, "replicas": 3}, {"output": "refused"}],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts")
    (folder / "cases.json").write_text(json.dumps(list(CASES.values())))
    status, _, errors = ended(torchrun("tests.support.torchrun_worker", folder, processes=4))
    assert status == 0, errors
    return folder


@pytest.fixture(scope="module")
def results(folder):
    """Return the results of the four processes by case."""
    return {
        name: [torch.load(folder / f"{n}.{rank}.pt", weights_only=True) for rank in range(4)] for n, name in enumerate(CASES)
    }


@pytest.mark.parametrize("name", COPIES)
@pytest.mark.covers("reference model (KL, DPO, NPO)", "HSDP")
@pytest.mark.covers("evaluation and best point during a run", "HSDP")
@pytest.mark.covers("objectives that are sums over sequences", "HSDP")
@pytest.mark.covers("NPO with one ratio of the batch", "HSDP")
@pytest.mark.covers("gradient checkpointing", "HSDP")
@pytest.mark.covers("curvature of retain data", "HSDP")
@pytest.mark.covers("influence", "HSDP")
@pytest.mark.covers("compilation (`--compile`)", "HSDP")
@pytest.mark.covers("head in shards (`--head-in-shards`)", "HSDP")
def test_two_copies_of_shards_are_one_process(results, name):
    """Up to fp32 rounding; the worker compares the bits of the copies."""
    assert_as_one(*COPIES[name], results[name])


@pytest.mark.covers("adapters (LoRA)", "HSDP")
def test_adapters_over_copies_are_those_of_one_process(results):
    family, options, how = LORA
    assert_as_one(family, options, results["adapters"], how)


@pytest.mark.skipif(not HAS_CODES, reason="the extra quant is not installed")
@pytest.mark.covers("adapters over a base of 4 bits", "HSDP")
def test_adapters_over_a_base_of_four_bits(results, tmp_path):
    """Each process has the whole base; the head is in shards over all of them."""
    family, options, how = CODES
    assert_as_one(family, options, results["codes"], {**how, "output": tmp_path / "one"})


@pytest.mark.covers("gradient release", "HSDP")
@pytest.mark.covers("states in main memory (`--state-offload`)", "HSDP")
def test_released_gradients_and_offloaded_states_leave_the_weights_as_they_are(results):
    (got, *others), (want, *_) = results["released"], results["kept"]
    assert all(lasting(got["records"]) == lasting(other["records"]) for other in others)
    parity.bit_for_bit(got["weights"], want["weights"], versus="the same run without either")


@pytest.mark.covers("checkpoints, resumed bit for bit", "HSDP")
@pytest.mark.covers("head in shards (`--head-in-shards`)", "HSDP")
def test_copies_resume_bit_for_bit(results, folder):
    """Each piece of a tensor is in the file of one process alone."""
    assert all(rank["error"] == "Stopped" for rank in results["stopped"])
    assert_resumed(results["resumed"][0], results["whole"][0])
    assert (folder / "whole" / "model.safetensors").exists() and not (folder / "broken" / "checkpoints").exists()


@pytest.mark.covers("aim", "HSDP")
def test_all_copies_are_led_to_an_aim_alike(results, folder, tmp_path):
    """As one process is; the weights are those of the nearest point, which is not the last one."""
    family, options, _ = CASES["aim"]
    assert_as_one(family, options, results["aim"], {"output": tmp_path / "one"})
    assert "forget_prob" in json.loads((folder / "aim" / "verdict.json").read_text())


@pytest.mark.covers("parameters in main memory (CPUOffloadPolicy)", "FSDP2")
@pytest.mark.covers("parameters in main memory (CPUOffloadPolicy)", "HSDP")
@pytest.mark.covers("checkpoints of torch.distributed.checkpoint, for another number of processes", "HSDP")
def test_a_model_in_main_memory_is_that_of_one_process(results):
    """Read, stepped, stopped and saved, with copies and without. On a machine without a GPU nothing is copied to and fro.

    A checkpoint goes on with another number of copies and of shards, of the head too, and out of main memory; last bits differ.
    """
    assert_as_one(*IN_MAIN_MEMORY, results["in main memory"])
    assert results["stopped in main memory"][0]["error"] == "Stopped"
    whole, resumed = results["whole"][0], results["resumed without copies"][0]
    assert lasting(resumed["records"])[:3] == lasting(whole["records"])[:3]  # those of the run in main memory, bit for bit
    assert len(resumed["records"]) == 4
    weights = [{name: tensor.float() for name, tensor in run["weights"].items()} for run in (resumed, whole)]
    parity.elements_alike(*weights, rtol=1e-2, atol=1e-4, case="bf16", versus="the run with copies that was not stopped")


@pytest.mark.refuses(
    "CUDA graphs (`--cuda-graph`)", "HSDP", "a graph repeats addresses, and shards are gathered into memory that changes"
)
def test_graphs_and_copies_that_do_not_fit_are_refused(results, folder):
    for rank in results["graph"]:
        assert rank["text"].startswith("cuda_graph: expected False with several processes, got True; ")
    for rank in results["three copies"]:
        assert rank["text"].startswith("replicas: expected a divisor of 4, the number of processes, got 3; ")
    assert not (folder / "refused").exists()

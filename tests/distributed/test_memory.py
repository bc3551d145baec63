"""Main memory of a machine while several processes load a model, and while they save it.

It is what Linux counts of all of them together beyond what they had before (Pss: pages that several processes map count once).
The model has 106 million parameters in bf16.
"""

import functools
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from soul.distributed import shard
from soul.distributed.gather import on_first_with_tensors
from soul.distributed.processes import Processes
from soul.distributed.scatter import shard_from_first
from tests.distributed.test_processes import run
from tests.support import parity

pytestmark = [
    pytest.mark.slow(reason="processes load a model of 212 MB"),
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc"),
]

WORLD = 3
LARGEST = 32000 * 768 * 2  # bytes of the embedding, and of the head
# Prints the most that the processes of its arguments have taken beyond what they had at its start, when its input is closed.
SAMPLER = """
import pathlib, select, sys
def taken():
    files = [pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text().split() for pid in sys.argv[1:]]
    return sum(1024 * int(words[words.index("Pss:") + 1]) for words in files)
start = most = taken()
print(flush=True)
while not select.select([sys.stdin], [], [], 0.005)[0]:
    most = max(most, taken())
print(most - start, flush=True)
"""


def most_bytes(call):
    """Return what ``call`` returns, and the most memory that all processes took meanwhile, in the first of them."""
    processes = Processes.here()
    pids = processes.gather(os.getpid())
    sampler = None
    if processes.first:
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        sampler = subprocess.Popen([sys.executable, "-S", "-c", SAMPLER, *map(str, pids)], **pipes)
        sampler.stdout.readline()
    dist.barrier()
    result = call()
    dist.barrier()
    return result, int(sampler.communicate()[0]) if sampler else 0


def by_each(folder, dtype):
    """Load a model in every process, and cut it."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    return shard(model, torch.device("cpu"))


def by_first(folder, dtype):
    """Load a model as a run does."""
    from soul.models import load

    model, _ = load(folder, dtype=dtype, mapped=True, weights=Processes.here().first)
    return shard_from_first(model, torch.device("cpu"))


def saved_at_once(model, folder):
    """Gather a whole model in the first process, and save it."""
    import safetensors.torch

    on_first_with_tensors(model, lambda tensors: safetensors.torch.save_file(tensors.state(), folder / "model.safetensors"))


def saved_one_by_one(model, folder):
    """Save a model as a run does."""
    from soul.checkpoint import save_model
    from tests.support.models import tiny_tokenizer

    save_model(model, tiny_tokenizer(), folder)


def worker(folder, tiny_folder, model_folder):
    """Return the most bytes of loading, by dtype, and of saving: with whole models, and as runs do it."""
    loaded = {}
    for load in (by_each, by_first):
        load(tiny_folder, "float32")  # which imports all modules
        for dtype in ("float32", "bfloat16"):
            model = None  # of the call before
            model, taken = most_bytes(functools.partial(load, model_folder, dtype))
            loaded.setdefault(dtype, []).append(taken)
    saved = []
    for save in (saved_at_once, saved_one_by_one):
        target = folder / save.__name__
        if Processes.here().first:
            target.mkdir()
        saved.append(most_bytes(functools.partial(save, model, target))[1])
    return {"loaded": loaded, "saved": saved}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    from tests.support.models import tiny_tokenizer

    config = transformers.LlamaConfig(vocab_size=32000, hidden_size=768, intermediate_size=2048, num_hidden_layers=8,
                                      num_attention_heads=12, tie_word_embeddings=False)  # fmt: skip
    folder = tmp_path_factory.mktemp("model")
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.counts
def test_a_machine_holds_one_model_while_it_is_loaded_and_less_while_it_is_saved(model_folder, tmp_path, monkeypatch):
    """The file is mapped into memory: in its own dtype it is the model, of which all processes share the pages.

    In another dtype each process that loads a model has one of its own. Saving takes two copies of the largest tensor in each.
    """
    from tests.support.models import tiny_model, tiny_tokenizer

    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # so that what is freed leaves the process
    tiny_model("llama, untied").save_pretrained(tmp_path / "tiny")
    tiny_tokenizer().save_pretrained(tmp_path / "tiny")
    taken, *_ = run(tmp_path, worker, tmp_path / "tiny", model_folder, world=WORLD, start_method="spawn")
    n_bytes = (model_folder / "model.safetensors").stat().st_size
    before, after = taken["loaded"]["float32"]
    # Of three models at least two at once, whenever they are looked at; shards in fp32, and the file.
    assert before > 2 * 2 * n_bytes and after < 1.2 * (2 + 1) * n_bytes
    before, after = taken["loaded"]["bfloat16"]
    assert max(before, after) < 1.2 * (1 + 1) * n_bytes
    before, after = taken["saved"]
    assert before > 0.9 * n_bytes and after < 1.2 * 2 * LARGEST * WORLD
    for dtype, numbers in taken["loaded"].items():
        what = f"main memory of a machine while {WORLD} processes load 106M parameters from bf16 files in {dtype}"
        parity.count(f"{what}; read by the first alone", *numbers, "measured")
    what = f"main memory of a machine while {WORLD} processes save 106M parameters in bf16, beside their shards"
    parity.count(f"{what}; a tensor at a time", *taken["saved"], "measured")

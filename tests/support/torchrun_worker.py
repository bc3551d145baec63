"""The program that tests/distributed/test_torchrun.py starts with torchrun.

It makes several runs in one set of processes, since a set takes seconds to start.
"""

import errno
import hashlib
import importlib
import json
import os
import pathlib
import signal
import sys
import time
import types
import warnings

import torch
import torch.distributed as dist

import soul
from soul.checkpoint import Stopped, local, sharded
from soul.checkpoint.sharded import ShardedCheckpoints
from soul.distributed import Processes, exit_process, started
from soul.distributed.gather import on_first_with_tensors
from soul.distributed.shards import is_sharded
from soul.models import causal_lm, load
from tests.support.models import examples, tiny_model, tiny_tokenizer

unlearn_module = importlib.import_module("soul.run.loop")


def run(family, options, output=None, *, dtype="float32", dropout=0.0, odd=None, adapters=None, files=None,
        in_codes=False, codes=None, **how):  # fmt: skip
    """One run over 5 examples, by default of 2 epochs; the log, and the whole weights in the first process.

    ``odd`` is what the last process does otherwise: an option of the config or of the run, "data", "weights" or "activation".
    ``files``: the model is read from fp32 files beside ``output``: "by name", by the run itself; "whole", in every process.
    ``in_codes``: by name, in 4 bits. ``codes``: the model says that it is quantized in this way.
    """
    odd = odd if odd and dist.get_rank() == dist.get_world_size() - 1 else {}
    how |= {name: odd[name] for name in odd if name in ("save_every", "resume")}
    options = options | {name: odd[name] for name in odd if name in ("lr", "seed", "weight_decay", "epochs")}
    steps = {} if options.get("method") == "influence" else {"lr": 1e-3, "epochs": 2}
    config = soul.UnlearnConfig(**{**steps, "batch_size": 3, "backend": "reference", **options})
    n_rows = 30 if "aim" in options else 12  # some are held out
    rows = examples(n_rows + 1)["data" in odd :]
    model = tiny_model(family)
    rows = rows[:n_rows]
    if "weights" in odd:
        model.model.norm.weight.data[-1] += 1e-3
    if "activation" in odd:
        model.config.hidden_act = odd["activation"]
    if codes:
        model.is_quantized, model.config.quantization_config = True, codes
    model.config.attention_dropout = dropout
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = dropout
    if files:
        directory = saved(model, output.with_name(f"{output.name}, files"))
        source = {"model": directory, "dtype": dtype, "device": "cpu", "load_in_4bit": in_codes}
    else:
        source = {"model": model.to(getattr(torch, dtype)), "tokenizer": tiny_tokenizer()}
    if files == "whole":
        source = dict(zip(("model", "tokenizer"), load(directory, dtype=dtype)))
    unlearner = soul.Unlearner(forget=rows[:5], retain=rows[5:], config=config, adapters=adapters, **source)
    records = unlearner.run(output, progress=False, **how)
    if config.replicas > 1:
        check_copies(unlearner.model, dist.get_world_size() // config.replicas)
    if Processes.of(unlearner.model).size == 1:
        return records, {name: tensor.clone() for name, tensor in unlearner.model.state_dict().items()}
    return records, on_first_with_tensors(unlearner.model, lambda tensors: tensors.state()) or {}


def check_copies(model, n_shards):
    """Raise unless all copies of the shards of a model have the same bits; a head in shards has one copy."""
    parameters = [p.detach() for p in model.parameters() if is_sharded(p) and p.device_mesh.ndim == 2]
    shards = [parameter.to_local().contiguous().view(-1).view(torch.uint8) for parameter in parameters]
    digests = Processes.here().gather(hashlib.sha256(torch.cat(shards).numpy().tobytes()).hexdigest())
    assert digests == digests[:n_shards] * (len(digests) // n_shards), digests


def saved(model, directory):
    """Save a model, in the first process alone; return the directory."""
    if Processes.here().first:
        model.save_pretrained(directory)
        tiny_tokenizer().save_pretrained(directory)
    Processes.here().any(False)  # waits for the first one
    return directory


def terminate_at(step):
    """Make the last process get SIGTERM in that step."""
    real = unlearn_module.train_step
    steps_left = [step]

    def train_step(*args):
        steps_left[0] -= 1
        if steps_left[0] == 0 and dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    unlearn_module.train_step = train_step


def disk_full_at_second_write():
    """Make the disk of the last process full after one file with tensors."""
    real = sharded.write_tensors
    writes_left = [1]

    def write_tensors(*args):
        writes_left[0] -= 1
        if writes_left[0] < 0 and dist.get_rank() == dist.get_world_size() - 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(*args)

    sharded.write_tensors = write_tensors


def clocked(seconds):
    """Make each step move the clock of a process by its number of seconds; return the list of steps that are saved."""
    real = unlearn_module.train_step
    save = ShardedCheckpoints.save
    now = [0.0]
    saved = []

    def train_step(*args):
        now[0] += seconds[dist.get_rank()]
        return real(*args)

    def spy(checkpoints, step, *args):
        saved.append(step)
        save(checkpoints, step, *args)

    local.time = types.SimpleNamespace(monotonic=lambda: now[0])
    unlearn_module.train_step = train_step
    ShardedCheckpoints.save = spy
    return saved


def case(folder, family, options, how):
    """Return the result of one run, or its error."""
    stop = how.pop("stop", 0)
    damage = how.pop("damage", None)
    real = unlearn_module.train_step
    compiler = causal_lm.COMPILE
    causal_lm.COMPILE = {"backend": "aot_eager"}
    full = how.pop("full", False)
    clock = how.pop("clock", None)
    saved = []
    save = ShardedCheckpoints.save
    if "reference_cache" in options:
        options["reference_cache"] = str(folder / options["reference_cache"])
    if "output" in how:
        how["output"] = folder / how["output"]
    if damage and dist.get_rank() == 0:
        with open(how["output"] / "checkpoints" / damage, "rb+") as file:
            file.seek(-8, os.SEEK_END)
            file.write(b"damaged!")
    dist.barrier()
    if stop:
        terminate_at(stop)
    if clock:
        saved = clocked(clock)
    write = sharded.write_tensors
    if full:
        disk_full_at_second_write()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            records, weights = run(family, options, **how)
        messages = [str(w.message) for w in caught if "checkpoints" in str(w.message)]
        return {
            "records": records,
            "weights": weights,
            "warnings": messages,
            "seed": torch.initial_seed(),
            "saved": saved,
            "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"] if "compile" in options else 0,
        }
    except (ValueError, OSError, Stopped) as error:
        return {"error": type(error).__name__, "text": str(error)}
    finally:
        causal_lm.COMPILE = compiler
        unlearn_module.train_step = real
        sharded.write_tensors = write
        ShardedCheckpoints.save = save
        local.time = time


def main(folder):
    folder = pathlib.Path(folder)
    with started(torch.device("cpu")):
        for number, arguments in enumerate(json.loads((folder / "cases.json").read_text())):
            torch.save(case(folder, *arguments), folder / f"{number}.{dist.get_rank()}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1])
    exit_process(0)

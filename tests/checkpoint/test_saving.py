"""A model in shards is saved as one process saves it, bit for bit, and a tensor at a time."""

import errno
import inspect
import json
import os
import types
import weakref

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedModel

from soul.checkpoint import save_model, saving
from soul.distributed import Processes, gather, shard
from soul.distributed.gather import WholeTensors
from tests.distributed.test_processes import run
from tests.models.test_families import MIXTURES
from tests.support.models import COMMON, lora_model, tiny_model, tiny_tokenizer

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch without gloo"),
    pytest.mark.slow(reason="two processes save seven models"),
]
EXPERTS = MixtralConfig(**COMMON, num_key_value_heads=1, num_local_experts=2)
IN_FILES = ("several files", "experts, stored one by one")
MODELS = {
    "tied": lambda: tiny_model("llama, tied"),
    "untied, of two dtypes": lambda: two_dtypes(tiny_model("llama, untied")),
    "head with a bias": lambda: tiny_model("phi, head with a bias"),
    "adapters": lambda: lora_model(r=3),
    "adapters, merged": lambda: lora_model(r=3),
    "experts, stored one by one": lambda: AutoModelForCausalLM.from_config(EXPERTS),
    "several files": lambda: tiny_model("llama, untied"),
}
LIMIT = 20_000  # bytes of one of "several files": less than the embedding has, more than the largest weight of a layer


def two_dtypes(model):
    """Put the layers in bf16, so that safetensors does not store the tensors in the order of their names."""
    model.model.layers.to(torch.bfloat16)
    return model


def made(name, folder):
    """Return a model as a run has it: read from files, or with adapters."""
    if "adapters" not in name:
        return AutoModelForCausalLM.from_pretrained(folder / f"of {name}", dtype="auto")
    torch.manual_seed(1)
    return MODELS[name]()


def limit_files(patch):
    """Make ``LIMIT`` the default size of a file."""
    real = PreTrainedModel.save_pretrained
    signature = inspect.signature(real)
    parameters = [p.replace(default=LIMIT) if p.name == "max_shard_size" else p for p in signature.parameters.values()]

    def save_pretrained(self, directory, **options):
        real(self, directory, **{"max_shard_size": LIMIT, **options})

    save_pretrained.__signature__ = signature.replace(parameters=parameters)
    patch.setattr(PreTrainedModel, "save_pretrained", save_pretrained)


def fill_disk(patch):
    """Leave the disk room for the header of a file of weights and one tensor."""

    class File:
        def __init__(self, *args):
            self.file = open(*args)
            self.writes_left = 2

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, data):
            self.writes_left -= 1
            if self.writes_left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self.file.write(data)

    patch.setattr(saving, "open", File, raising=False)


def count_held(patch):
    """Return a list with the number of whole tensors that this process held, at each time that it had one more."""
    real = gather.full
    wholes = []
    held = []

    def full(tensor):
        whole = real(tensor)
        wholes.append(weakref.ref(whole))
        held.append(sum(reference() is not None for reference in wholes))
        return whole

    patch.setattr(gather, "full", full)
    return held


def worker(folder):
    """Save every model in shards; return, by name, how many whole tensors this process held at most, or the error."""
    results = {}
    for name in [*MODELS, "full disk"]:
        (folder / name).mkdir(exist_ok=True)
        with pytest.MonkeyPatch.context() as patch:
            model = shard(made("tied" if name == "full disk" else name, folder), torch.device("cpu"))
            if "merged" in name:
                model = model.merge_and_unload()
            if name in IN_FILES:
                limit_files(patch)
            if name == "full disk":
                fill_disk(patch)
            held = count_held(patch)
            try:
                save_model(model, tiny_tokenizer(), folder / name)
                results[name] = max(held)
            except OSError as error:
                results[name] = str(error)
    return results


def contents(directory):
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    for name, make in MODELS.items():
        if "adapters" not in name:
            make().save_pretrained(folder / f"of {name}")
    return folder


@pytest.fixture(scope="module")
def results(folder):
    return run(folder, worker)


@pytest.mark.parametrize("name", MODELS)
def test_two_processes_save_what_one_process_saves(results, folder, tmp_path, monkeypatch, name):
    model = made(name, folder)
    if "merged" in name:
        model = model.merge_and_unload()
    if name in IN_FILES:
        limit_files(monkeypatch)
    (tmp_path / "one").mkdir()
    save_model(model, tiny_tokenizer(), tmp_path / "one")
    one, two = contents(tmp_path / "one"), contents(folder / name)
    different = {file for file in one.keys() | two.keys() if one.get(file) != two.get(file)}
    assert different <= ({"adapter_config.json"} if name == "adapters" else set())  # where peft writes sets, in any order
    first, second = (result[name] for result in results)
    # Of a layer, the first matrices of all experts are one tensor, and the last ones another.
    limit = 2 if name == "experts, stored one by one" else 1
    assert second == 1 and (first > 1 if name == "adapters" else first <= limit)
    if name in IN_FILES:
        assert len(set(json.loads(one["model.safetensors.index.json"])["weight_map"].values())) > 3


def test_a_full_disk_ends_all_and_leaves_nothing(results, folder):
    message = f"{folder / 'full disk'}: the model could not be saved (No space left on device)"
    assert [result["full disk"] for result in results] == [message, message]
    assert contents(folder / "full disk") == {}


@pytest.mark.parametrize("family", MIXTURES)
def test_mixtures_of_experts_are_saved_a_layer_at_a_time(family, tmp_path, monkeypatch):
    """As the first of several processes does it; where transformers does not say how it converts tensors, all are gathered."""
    name, sizes = MIXTURES[family]
    model = AutoModelForCausalLM.from_config(getattr(transformers, name)(**sizes))
    monkeypatch.setattr(saving, "Processes", types.SimpleNamespace(of=lambda model: Processes(0, 2)))
    held = count_held(monkeypatch)
    model.save_pretrained(tmp_path / "one")
    for directory in (tmp_path / "two", tmp_path / "unknown"):
        directory.mkdir()
        saving._save_weights(model, directory, WholeTensors(model, Processes()))
        assert contents(directory) == contents(tmp_path / "one")
        assert directory.name == "unknown" or max(held) <= 2
        monkeypatch.setattr("transformers.core_model_loading.revert_weight_conversion", None)

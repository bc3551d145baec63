"""Models from files of unknown origin: complete ones are loaded, others are refused, and no code in them is run."""

import json
import os
import pickle
import shutil
import sys

import pytest
import torch
import transformers

from soul.models import causal_lm, files
from soul.models.adapters import add_adapters
from soul.models.loading import load
from tests.support.models import lora_model, tiny_model, tiny_tokenizer


def test_loading(tmp_path):
    with pytest.raises(ValueError, match="model: expected a directory with config.json, or a hub name"):
        load(tmp_path)
    with pytest.raises(ValueError, match="model: expected a causal language model, got nobody/nothing"):
        load("nobody/nothing")
    tiny_model().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="model: expected a causal language model, got .*SafetensorError"):
        load(tmp_path)
    with pytest.raises(ValueError, match="dtype: expected one of"):
        load(tmp_path, dtype="int8")


def test_what_is_not_whole_is_refused(tmp_path):
    """transformers and peft fill missing weights at random, with a warning: another model would be measured or unlearned."""
    safetensors = pytest.importorskip("safetensors.torch", reason="the extra hf is not installed")
    base, adapters = tmp_path / "base", tmp_path / "adapters"
    tiny_model("llama, untied").save_pretrained(base)
    add_adapters(transformers.AutoModelForCausalLM.from_pretrained(base), rank=2).save_pretrained(adapters)
    for directory in (base, adapters):
        tiny_tokenizer().save_pretrained(directory)
        load(directory)
    for directory, file, message in (
        (adapters, "adapter_model.safetensors", "model: expected a causal language model, got .*missing adapter keys"),
        (base, "model.safetensors", r"model: expected a checkpoint with all weights.*embed_tokens.weight \(1 missing\)"),
    ):
        tensors = safetensors.load_file(directory / file)
        del tensors[min(tensors, key=lambda name: "embed_tokens" not in name)]
        safetensors.save_file(tensors, directory / file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=message):
            load(directory)
    broken = tiny_model("llama, untied")
    for value, message in (
        (float("nan"), "weights, got NaN or inf in model.norm.weight"),
        (3e38, "logits, got NaN or inf from Llama"),
    ):
        broken.model.norm.weight.data[0] = value
        with pytest.raises(ValueError, match=f"model: expected finite {message}"):
            causal_lm.check_linear_head(broken)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Save a tiny model and adapters of it; tests copy the directories before they change a file."""
    pytest.importorskip("peft", reason="the extra hf is not installed")
    root = tmp_path_factory.mktemp("saved")
    tiny_model("llama, untied").save_pretrained(root / "base")
    add_adapters(tiny_model("llama, untied"), rank=2).save_pretrained(root / "adapters")
    for name in ("base", "adapters"):
        tiny_tokenizer().save_pretrained(root / name)
    change(root / "adapters" / "adapter_config.json", base_model_name_or_path=str(root / "base"))
    return root


def change(path, **values):
    """Set keys of a JSON file."""
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, **values}))


class Pickled:
    """Run code when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return exec, (f"open({str(self.path)!r}, 'w')",)


def replace_weights(directory, safe, legacy, marker):
    (directory / safe).unlink()
    (directory / legacy).write_bytes(pickle.dumps({"weight": Pickled(marker)}))


CODE = {  # how a model could bring code -> what plants it, and what the error names
    "adapters: megatron_core": (
        lambda base, adapters, marker: change(adapters / "adapter_config.json", megatron_core="planted",
                                              megatron_config={"a": 1}),
        "adapter_config.json, megatron_config: expected",
    ),
    "adapters: megatron_core, without a configuration": (
        lambda base, adapters, marker: change(adapters / "adapter_config.json", megatron_core="planted"),
        "adapter_config.json, megatron_core: expected",
    ),
    "adapters: parent_library": (
        lambda base, adapters, marker: change(adapters / "adapter_config.json", task_type=None,
                                              auto_mapping={"base_model_class": "Model", "parent_library": "planted"}),
        "adapter_config.json, auto_mapping: expected",
    ),
    "adapters: another kind": (
        lambda base, adapters, marker: change(adapters / "adapter_config.json", peft_type="PROMPT_TUNING"),
        "adapter_config.json, peft_type: expected",
    ),
    "adapters: pickled weights": (
        lambda base, adapters, marker: replace_weights(adapters, "adapter_model.safetensors", "adapter_model.bin", marker),
        "expected a causal language model",
    ),
    "adapters on adapters": (
        lambda base, adapters, marker: (base / "adapter_config.json").write_bytes(
            (adapters / "adapter_config.json").read_bytes()),
        "base_model_name_or_path: expected",
    ),
    "model: auto_map of a family that is known": (
        lambda base, adapters, marker: change(base / "config.json", auto_map={
            "AutoConfig": "planted.Config", "AutoModelForCausalLM": "planted.Model"}),
        None,  # the library's own class is used
    ),
    "model: auto_map of another family": (
        lambda base, adapters, marker: change(base / "config.json", model_type="mine", auto_map={
            "AutoConfig": "planted.Config", "AutoModelForCausalLM": "planted.Model"}),
        "expected a causal language model",
    ),
    "model: tokenizer": (
        lambda base, adapters, marker: [change(directory / "tokenizer_config.json", tokenizer_class="Mine", auto_map={
            "AutoTokenizer": ["planted.Mine", None]}) for directory in (base, adapters)],
        "expected a causal language model",
    ),
    "model: custom_generate": (
        lambda base, adapters, marker: [(base / "custom_generate").mkdir(),
                                        shutil.copy(base / "planted.py", base / "custom_generate" / "generate.py")],
        "expected a directory without code for generation",
    ),
    "model: attention from the hub": (
        lambda base, adapters, marker: change(base / "config.json", _attn_implementation_internal="someone/planted"),
        "_attn_implementation_internal: expected",
    ),
    "model: pickled weights": (
        lambda base, adapters, marker: replace_weights(base, "model.safetensors", "pytorch_model.bin", marker),
        "expected a causal language model",
    ),
}  # fmt: skip


@pytest.mark.parametrize("way", CODE)
def test_code_that_comes_with_a_model_is_never_run(way, saved, tmp_path, monkeypatch):
    """As a model, and as the base that adapters name; the planted module could be imported, and is in the model's directory."""
    base = tmp_path / "base"
    adapters = tmp_path / "adapters"
    marker = tmp_path / "code has run"
    for directory in (base, adapters):
        shutil.copytree(saved / directory.name, directory)
        (directory / "planted.py").write_text(f"open({str(marker)!r}, 'w')\n\nclass Model: ...\n\ndef generate(model): ...\n")
    change(adapters / "adapter_config.json", base_model_name_or_path=str(base))
    monkeypatch.syspath_prepend(adapters)
    monkeypatch.delitem(sys.modules, "planted", raising=False)
    plant, message = CODE[way]
    plant(base, adapters, marker)
    for directory in (adapters,) if way.startswith("adapters") else (base, adapters):
        if message is None:
            load(directory)
        else:
            with pytest.raises(ValueError, match=message):
                load(directory)
        assert not marker.exists() and "planted" not in sys.modules


@pytest.mark.parametrize("changes, message", [
    (dict(num_hidden_layers=10**9), "config.json, num_hidden_layers: expected at most 4096, got 1e+09"),
    (dict(text_config={"n_layer": 10**400}), "config.json, n_layer: expected at most 4096, got a number of hundreds of digits"),
    (dict(num_local_experts=10**9), "config.json, num_local_experts: expected at most 4096"),
    (dict(num_hidden_layers=4000, num_experts=4000), "config.json: expected at most 131072 experts in all layers, got 4000"),
    (dict(vocab_size=10**12), "config.json, vocab_size: expected at most 134217728, got 1e+12"),
    (dict(num_hidden_layers=1), "expected a checkpoint with the layers of its configuration, got .* with model.layers.1"),
    (dict(final_logit_softcapping="thirty"), "final_logit_softcapping: expected a finite number, got 'thirty'"),
    (dict(logit_scale=[2]), "logit_scale: expected a finite number, got \\[2\\]"),
    (dict(logits_scaling=float("nan")), "logits_scaling: expected a finite number, got nan"),
    (dict(logits_scaling=10**400), "logits_scaling: expected a finite number, got 1000"),
])  # fmt: skip
def test_hostile_configurations_are_refused(changes, message, saved, tmp_path):
    """Before a model of that size is built; a model without one of the layers in the file would be another one."""
    base = shutil.copytree(saved / "base", tmp_path / "base")
    change(base / "config.json", **changes)
    with pytest.raises(ValueError, match=message.replace("+", "[+]")):
        load(base)


@pytest.mark.parametrize("changes, message", [
    (dict(target_modules="((a|[a-z_.0-9]+)+)+#"), "expected regular expressions that take .*, got some that take longer"),
    (dict(rank_pattern={"([a-z_.0-9]+)+#": 2}), "expected regular expressions that take .*, got some that take longer"),
    (dict(exclude_modules="("), "expected regular expressions .*, got re.*: missing"),
    (dict(r=10**9), "adapter_config.json, r: expected ranks from 1 to 16384, got 1000000000"),
    (dict(layer_replication=[[0, 10**9]]), "adapter_config.json, layer_replication: expected at most 4096 layers"),
    (dict(init_lora_weights="pissa_niter_1000000000"), "adapter_config.json, init_lora_weights: expected true, or a name"),
    (dict(target_modules=r".*\.(q|k|v)_proj|.*mlp\.\w+_proj|.*o_proj"), None),
])  # fmt: skip
def test_hostile_adapters_are_refused(changes, message, saved, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PATTERN_SECONDS", 0.5)
    adapters = shutil.copytree(saved / "adapters", tmp_path / "adapters")
    change(adapters / "adapter_config.json", **changes)
    if message is None:
        assert causal_lm.has_adapters(load(adapters)[0])
        return
    with pytest.raises(ValueError, match=message):
        load(adapters)


@pytest.mark.parametrize("family, adapters", [("llama, tied", False), ("llama, untied", False), ("llama, untied", True)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_loaded_model_does_not_depend_on_its_files(dtype, family, adapters, tmp_path):
    """Transformers maps safetensors into memory, where no conversion makes a copy: they are overwritten, then truncated."""
    tiny_model(family).to(getattr(torch, dtype)).save_pretrained(tmp_path / "model")
    directory = tmp_path / "model"
    if adapters:
        model = lora_model(family)
        model.peft_config["default"].base_model_name_or_path = str(directory)
        model.save_pretrained(tmp_path / "adapters")
        directory = tmp_path / "adapters"
    tiny_tokenizer().save_pretrained(directory)
    model, _ = load(directory, dtype=dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for path in tmp_path.rglob("*.safetensors"):
        with open(path, "rb+") as file:
            file.write(b"x" * path.stat().st_size)
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert not changed
    for path in tmp_path.rglob("*.safetensors"):
        os.truncate(path, 0)
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == (family == "llama, tied")

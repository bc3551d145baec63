import json
import os
import pickle
import shutil
import sys
import types

import pytest
import torch
import transformers
import transformers.masking_utils

from soul.data.batches import collate
from soul.losses import GradDiff
from soul.models import causal_lm, files
from soul_kernels import Head, LinearOptions, TokenBatch, linear_objective
from tests.support import tolerances as tol
from tests.support.helpers import assert_close
from tests.support.models import COMMON, FAMILIES, lora_model, sequences, tiny_model, tiny_tokenizer


@pytest.mark.parametrize("family", FAMILIES)
def test_probabilities_and_gradients_are_those_of_the_model_itself(family):
    """Forget and retain in one padded forward, loss from hidden states, against the model's own logits one by one."""
    model = tiny_model(family)
    causal_lm.check_linear_head(model)
    forget, retain = sequences(3), sequences(4)[1:]
    batch = collate(forget, retain)
    objective = GradDiff(gamma=0.5, alpha=2.0)
    weight, bias = causal_lm.head(model)
    assert (bias is not None) == ("bias" in family)
    head = Head(weight, bias, **causal_lm.transform(model))
    loss, logps = linear_objective(causal_lm.hidden_states(model, batch), head, batch.labels, objective,
                                   is_forget=batch.is_forget, return_logps=True,
                                   options=LinearOptions(token_indices=batch.rows))  # fmt: skip
    assert (causal_lm.token_logps(model, batch) - logps).abs().max() <= tol.LOGP_ABS
    loss.backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    rows = []
    for sequence in [*forget, *retain]:
        ids, labels = torch.tensor([sequence.input_ids]), torch.tensor(sequence.labels)
        row = model(input_ids=ids).logits[0].log_softmax(-1).gather(-1, labels.clamp(min=0)[:, None])[:, 0]
        row = row * (labels >= 0)
        rows.append(torch.nn.functional.pad(row, (0, batch.labels.shape[1] - len(row))))
    want_logps = torch.stack(rows)
    assert (logps - want_logps).abs().max() <= tol.LOGP_ABS
    objective(want_logps, TokenBatch.from_labels(batch.labels, batch.is_forget)).backward()
    assert got
    for name, p in model.named_parameters():
        if p.grad is not None and p.grad.norm() > 1e-6:
            assert_close(got[name], p.grad, 1e-3, name)  # padded attention sums in another order


def test_a_compilation_of_the_users_own_is_there_afterwards(monkeypatch):
    monkeypatch.setattr(causal_lm, "COMPILE", dict(backend="eager"))
    model = tiny_model()
    model.base_model.compile(backend="eager")
    own = model.base_model._compiled_call_impl
    with causal_lm.compiled(model):
        assert model.base_model._compiled_call_impl is not own
    assert model.base_model._compiled_call_impl is own


class Capped(transformers.LlamaForCausalLM):
    """Caps its logits, and its configuration does not say so."""

    def forward(self, **inputs):
        output = super().forward(**inputs)
        output.logits = 30 * torch.tanh(output.logits / 30)
        return output


def test_models_that_bend_their_logits_in_other_ways_are_refused():
    """Logits of about 0.1 agree with a cap of 30 to 1 in 10^5: only enlarged ones show it."""
    capped, scaled, plain = Capped(FAMILIES["llama, tied"]()), tiny_model("cohere, scaled"), tiny_model()
    scaled.logit_scale = 4.0  # the configuration says 8
    plain.config.final_logit_softcapping = 30.0  # Llama has no cap
    for model in (capped, scaled, plain):
        model.train()
        with pytest.raises(
            ValueError, match=f"model: expected logits = softcap tanh.*, got other logits in {type(model).__name__}"
        ):
            causal_lm.check_linear_head(model)
        assert all(module.training for module in model.modules()) and not model.lm_head._forward_pre_hooks


@pytest.mark.parametrize("capturing", [False, True])
def test_a_batch_without_a_mask_is_attended_to_without_one(capturing, monkeypatch):
    """As a graph needs it: no question to the device, and none of the slower kernels. The states are those of a full mask."""
    model, ids = tiny_model(), torch.randint(2, 300, (2, 8))
    want = causal_lm.hidden_states(model, types.SimpleNamespace(input_ids=ids, attention_mask=torch.ones_like(ids)))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    seen, attend = [], torch.nn.functional.scaled_dot_product_attention

    def spy(*inputs, **options):
        seen.append((options.get("attn_mask"), options["is_causal"]))
        return attend(*inputs, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    look = transformers.masking_utils.find_packed_sequence_indices
    got = causal_lm.hidden_states(model, types.SimpleNamespace(input_ids=ids, attention_mask=None))
    assert seen == [(None, True)] * 2 and torch.equal(got, want)
    assert transformers.masking_utils.find_packed_sequence_indices is look


def test_models_with_adapters():
    """Wrapped by peft, with a head of its own: the head that is in use, hidden states with adapters or without."""
    model = lora_model(modules_to_save=["lm_head"])
    model.get_output_embeddings().weight.data.mul_(2.0)
    causal_lm.check_linear_head(model)
    batch = collate(sequences(3), [])
    frozen = dict(model.named_parameters())["base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"]
    frozen.requires_grad_(False)
    model.train()
    model.base_model.model.model.layers[0].eval()
    before = [module.training for module in model.modules()], [p.requires_grad for p in model.parameters()]
    with pytest.raises(KeyError), causal_lm.as_reference(model):
        off = causal_lm.token_logps(model, batch)
        assert not off.requires_grad and not model.training
        raise KeyError  # whatever happens inside
    assert ([module.training for module in model.modules()], [p.requires_grad for p in model.parameters()]) == before
    with_adapters = causal_lm.token_logps(model, batch)
    base = causal_lm.token_logps(tiny_model("llama, untied"), batch)
    assert torch.equal(off, base) and (with_adapters - base).abs().max() > 1e-3


def test_heads_that_are_not_a_matrix_are_refused():
    """An adapter beside the head starts at 0, so that trying a few tokens would not tell; virtual tokens do."""
    peft = pytest.importorskip("peft", reason="the extra hf is not installed")
    config = peft.LoraConfig(target_modules=["q_proj", "lm_head"])
    with pytest.raises(ValueError, match="model: expected a language-model head without an adapter.*target_modules"):
        causal_lm.check_linear_head(peft.get_peft_model(tiny_model("llama, untied"), config))
    prompts = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ValueError, match="got other logits in PeftModel"):
        causal_lm.check_linear_head(peft.get_peft_model(tiny_model(), prompts))


def test_loading(tmp_path):
    with pytest.raises(ValueError, match="model: expected a directory with config.json, or a hub name"):
        causal_lm.load(tmp_path)
    with pytest.raises(ValueError, match="model: expected a causal language model, got nobody/nothing"):
        causal_lm.load("nobody/nothing")
    tiny_model().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="model: expected a causal language model, got .*SafetensorError"):
        causal_lm.load(tmp_path)
    with pytest.raises(ValueError, match="dtype: expected one of"):
        causal_lm.load(tmp_path, dtype="int8")


def test_what_is_not_whole_is_refused(tmp_path):
    """transformers and peft draw what is missing at random, and warn: another model would be measured, or unlearned."""
    safetensors = pytest.importorskip("safetensors.torch", reason="the extra hf is not installed")
    base, adapters = tmp_path / "base", tmp_path / "adapters"
    tiny_model("llama, untied").save_pretrained(base)
    causal_lm.add_adapters(transformers.AutoModelForCausalLM.from_pretrained(base), rank=2).save_pretrained(adapters)
    for place in (base, adapters):
        tiny_tokenizer().save_pretrained(place)
        causal_lm.load(place)
    for place, file, message in (
        (adapters, "adapter_model.safetensors", "model: expected a causal language model, got .*missing adapter keys"),
        (base, "model.safetensors", r"model: expected a checkpoint with all weights.*embed_tokens.weight \(1 missing\)"),
    ):
        tensors = safetensors.load_file(place / file)
        del tensors[min(tensors, key=lambda name: "embed_tokens" not in name)]
        safetensors.save_file(tensors, place / file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=message):
            causal_lm.load(place)
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
    """Directories of a tiny model and of adapters of it; tests copy them before they change a file."""
    pytest.importorskip("peft", reason="the extra hf is not installed")
    root = tmp_path_factory.mktemp("saved")
    tiny_model("llama, untied").save_pretrained(root / "base")
    causal_lm.add_adapters(tiny_model("llama, untied"), rank=2).save_pretrained(root / "adapters")
    for name in ("base", "adapters"):
        tiny_tokenizer().save_pretrained(root / name)
    change(root / "adapters" / "adapter_config.json", base_model_name_or_path=str(root / "base"))
    return root


def change(path, **values):
    """Sets keys of a JSON file."""
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, **values}))


class Pickled:
    """Runs code where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return exec, (f"open({str(self.path)!r}, 'w')",)


def replace_weights(place, safe, legacy, marker):
    (place / safe).unlink()
    (place / legacy).write_bytes(pickle.dumps({"weight": Pickled(marker)}))


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
        lambda base, adapters, marker: [change(place / "tokenizer_config.json", tokenizer_class="Mine", auto_map={
            "AutoTokenizer": ["planted.Mine", None]}) for place in (base, adapters)],
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
    base, adapters, marker = tmp_path / "base", tmp_path / "adapters", tmp_path / "code has run"
    for place in (base, adapters):
        shutil.copytree(saved / place.name, place)
        (place / "planted.py").write_text(f"open({str(marker)!r}, 'w')\n\nclass Model: ...\n\ndef generate(model): ...\n")
    change(adapters / "adapter_config.json", base_model_name_or_path=str(base))
    monkeypatch.syspath_prepend(adapters)
    monkeypatch.delitem(sys.modules, "planted", raising=False)
    plant, message = CODE[way]
    plant(base, adapters, marker)
    for place in (adapters,) if way.startswith("adapters") else (base, adapters):
        if message is None:
            causal_lm.load(place)
        else:
            with pytest.raises(ValueError, match=message):
                causal_lm.load(place)
        assert not marker.exists() and "planted" not in sys.modules


@pytest.mark.parametrize("changes, message", [
    (dict(num_hidden_layers=10**9), "config.json, num_hidden_layers: expected at most 4096, got 1e+09"),
    (dict(text_config={"n_layer": 10**400}), "config.json, n_layer: expected at most 4096, got a number of hundreds of digits"),
    (dict(num_local_experts=10**9), "config.json, num_local_experts: expected at most 4096"),
    (dict(num_hidden_layers=4000, num_experts=4000), "config.json: expected at most 131072 of them in all, got 4000 layers"),
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
        causal_lm.load(base)


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
        assert causal_lm.has_adapters(causal_lm.load(adapters)[0])
        return
    with pytest.raises(ValueError, match=message):
        causal_lm.load(adapters)


def test_a_body_that_the_prefix_does_not_find():
    sizes = {**COMMON, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size_mlp": 48}
    config = transformers.Llama4TextConfig(**sizes)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    assert model.base_model is model
    causal_lm.check_linear_head(model)


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
    model, _ = causal_lm.load(directory, dtype=dtype)
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

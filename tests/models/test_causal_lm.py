import dataclasses
import types

import pytest
import torch
import transformers
import transformers.masking_utils

from soul.data.batches import collate
from soul.models import causal_lm
from tests.support.helpers import assert_close
from tests.support.models import COMMON, FAMILIES, lora_model, sequences, tiny_model
from tests.support.own_logits import check_against_own_logits


@pytest.mark.parametrize("family", FAMILIES)
def test_probabilities_and_gradients_are_those_of_the_model_itself(family):
    model = tiny_model(family)
    _, bias = causal_lm.head(model)
    assert (bias is not None) == ("bias" in family)
    check_against_own_logits(model)


def test_a_compilation_of_the_users_own_is_there_afterwards(monkeypatch):
    monkeypatch.setattr(causal_lm, "COMPILE", dict(backend="eager"))
    model = tiny_model()
    model.base_model.compile(backend="eager")
    users_own = model.base_model._compiled_call_impl
    with causal_lm.compiled(model):
        assert model.base_model._compiled_call_impl is not users_own
    assert model.base_model._compiled_call_impl is users_own


class Capped(transformers.LlamaForCausalLM):
    """Caps its logits, and its configuration does not say so."""

    def forward(self, **inputs):
        output = super().forward(**inputs)
        output.logits = 30 * torch.tanh(output.logits / 30)
        return output


def test_models_that_transform_their_logits_in_other_ways_are_refused():
    """Logits of about 0.1 agree with a cap of 30 to 1 in 10^5: only enlarged ones show it."""
    capped = Capped(FAMILIES["llama, tied"]())
    scaled = tiny_model("cohere, scaled")
    plain = tiny_model()
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
    """CUDA graphs need this: no wait for the device, and no slower kernel. The states are those of a full mask."""
    model = tiny_model()
    ids = torch.randint(2, 300, (2, 8))
    want = causal_lm.hidden_states(model, types.SimpleNamespace(input_ids=ids, attention_mask=torch.ones_like(ids)))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    masks = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def spy(*inputs, **options):
        masks.append((options.get("attn_mask"), options["is_causal"]))
        return attend(*inputs, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    look = transformers.masking_utils.find_packed_sequence_indices
    got = causal_lm.hidden_states(model, types.SimpleNamespace(input_ids=ids, attention_mask=None))
    assert masks == [(None, True)] * 2 and torch.equal(got, want)
    assert transformers.masking_utils.find_packed_sequence_indices is look


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_on_the_right_needs_no_mask(family, monkeypatch):
    """Tokens have the same states and gradients; and no attention gets a mask that it would have to look at."""
    model = tiny_model(family)
    batch = collate(sequences(5), [])
    assert batch.pads_right and not batch.attention_mask.all()
    tokens = batch.attention_mask.bool()
    masks = record_masks(model)
    results = []
    for pads_right in (False, True):
        model.zero_grad()
        hidden = causal_lm.hidden_states(model, dataclasses.replace(batch, pads_right=pads_right))[tokens]
        (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum().backward()
        results.append((hidden, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}))
    assert masks[0] is batch.attention_mask and masks[1] is None
    (want, want_grads), (got, got_grads) = results
    assert_close(got, want, 1e-5, "hidden states")
    for name, grad in want_grads.items():
        if grad.norm() > 1e-6:
            assert_close(got_grads[name], grad, 1e-3, name)  # padded attention sums in another order


def record_masks(model):
    """Return a list of the masks that the model's body is called with."""
    masks = []
    model.base_model.register_forward_pre_hook(lambda _, args, inputs: masks.append(inputs["attention_mask"]), with_kwargs=True)
    return masks


@pytest.mark.parametrize("config", [
    transformers.BloomConfig(vocab_size=300, hidden_size=32, n_layer=1, n_head=2),
    transformers.MptConfig(vocab_size=300, d_model=32, n_layers=1, n_heads=2),
    transformers.FalconConfig(vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, alibi=True),
    transformers.MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=1, state_size=4),
    transformers.Lfm2Config(**COMMON | {"num_hidden_layers": 1}, num_key_value_heads=1, layer_types=["conv"]),
    transformers.BertConfig(**COMMON | {"num_hidden_layers": 1}),
], ids=lambda config: config.model_type)  # fmt: skip
def test_families_that_may_look_at_padding_keep_the_mask(config):
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    masks = record_masks(model)
    batch = collate(sequences(3), [])
    causal_lm.hidden_states(model, batch)
    assert masks == [batch.attention_mask] and not causal_lm.attends_back_only(model.base_model)


def test_models_with_adapters():
    """A model wrapped by peft with its own head: the active head, and hidden states with and without adapters."""
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


def test_a_body_that_base_model_prefix_does_not_name():
    sizes = {**COMMON, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size_mlp": 48}
    config = transformers.Llama4TextConfig(**sizes)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    assert model.base_model is model
    causal_lm.check_linear_head(model)

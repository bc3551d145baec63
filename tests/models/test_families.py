"""Which families of models are in and which are out: docs/models.md says so, and these tests show it.

Every model is tiny, with random weights. "In" means that log-probabilities and gradients of the fused loss are those of the
model's own logits, for every parameter.
"""

import pathlib
import re

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from soul.models import causal_lm, load
from tests.support.models import COMMON, tiny_tokenizer
from tests.support.own_logits import check_against_own_logits

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "models.md"
GQA = {**COMMON, "num_key_value_heads": 1, "max_position_embeddings": 128}
HEADS = {**GQA, "head_dim": 16}
EXPERTS = dict(num_experts=4, num_experts_per_tok=2)
SMALL_EXPERTS = {**EXPERTS, "moe_intermediate_size": 16}
SHORT = dict(vocab_size=300, hidden_size=32)
MAMBA = dict(mamba_d_state=8, mamba_d_head=16, mamba_n_heads=4, mamba_chunk_size=8)
VISION = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)

DENSE = {
    "Llama": ("LlamaConfig", GQA),
    "Mistral": ("MistralConfig", GQA),
    "Qwen2": ("Qwen2Config", GQA),
    "Qwen3": ("Qwen3Config", HEADS),
    "Gemma": ("GemmaConfig", HEADS),
    "Gemma2": ("Gemma2Config", {**HEADS, "final_logit_softcapping": 0.3}),
    "Gemma3": ("Gemma3TextConfig", HEADS),
    "Phi": ("PhiConfig", COMMON),
    "Phi3": ("Phi3Config", {**GQA, "pad_token_id": 0}),
    "OLMo": ("OlmoConfig", GQA),
    "OLMo2": ("Olmo2Config", GQA),
    "SmolLM3": ("SmolLM3Config", {**GQA, "pad_token_id": 0}),
    "GLM4": ("Glm4Config", {**HEADS, "pad_token_id": 0}),
    "StarCoder2": ("Starcoder2Config", GQA),
    "StableLM": ("StableLmConfig", GQA),
    "Cohere": ("CohereConfig", {**GQA, "logit_scale": 8.0}),
    "Cohere2": ("Cohere2Config", GQA),
    "Granite": ("GraniteConfig", {**GQA, "logits_scaling": 0.125}),
    "GPT2": ("GPT2Config", dict(vocab_size=300, n_embd=32, n_layer=2, n_head=2)),
    "GPTJ": ("GPTJConfig", dict(vocab_size=300, n_embd=32, n_layer=2, n_head=2, rotary_dim=8)),
    "GPTNeo": ("GPTNeoConfig", dict(**SHORT, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]])),
    "GPTNeoX": ("GPTNeoXConfig", COMMON),
    "OPT": ("OPTConfig", dict(**SHORT, num_hidden_layers=2, num_attention_heads=2, ffn_dim=48, word_embed_proj_dim=16)),
    "Bloom": ("BloomConfig", dict(**SHORT, n_layer=2, n_head=2)),
    "MPT": ("MptConfig", dict(vocab_size=300, d_model=32, n_layers=2, n_heads=2)),
    "Falcon": ("FalconConfig", dict(**SHORT, num_hidden_layers=2, num_attention_heads=2)),
}
MIXTURES = {
    "Mixtral": ("MixtralConfig", {**GQA, "num_local_experts": 4}),
    "Qwen2Moe": ("Qwen2MoeConfig", {**GQA, **SMALL_EXPERTS, "shared_expert_intermediate_size": 16}),
    "Qwen3Moe": ("Qwen3MoeConfig", {**HEADS, **SMALL_EXPERTS}),
    "OLMoE": ("OlmoeConfig", {**GQA, **EXPERTS}),
    "GPT-OSS": ("GptOssConfig", {**HEADS, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "DeepSeek-V3": ("DeepseekV3Config", {**COMMON, "num_key_value_heads": 2, "n_routed_experts": 4, "n_group": 1,
                                         "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
                                         "first_k_dense_replace": 1,
                                         "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
                                         "v_head_dim": 16}),
    "GraniteMoe": ("GraniteMoeConfig", {**GQA, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "PhiMoE": ("PhimoeConfig", {**GQA, "num_local_experts": 4}),
    "Llama4": ("Llama4TextConfig", {**HEADS, "intermediate_size_mlp": 48, "num_local_experts": 2}),
}  # fmt: skip
RECURRENT = {
    "Mamba": ("MambaConfig", dict(**SHORT, num_hidden_layers=2, state_size=4)),
    "Mamba2": ("Mamba2Config", dict(**SHORT, num_hidden_layers=2, state_size=8, num_heads=4, head_dim=16, n_groups=1,
                                    chunk_size=8)),
    "FalconMamba": ("FalconMambaConfig", dict(**SHORT, num_hidden_layers=2, state_size=4)),
    "RWKV": ("RwkvConfig", dict(**SHORT, attention_hidden_size=32, num_hidden_layers=2, intermediate_size=48)),
    "xLSTM": ("xLSTMConfig", dict(**SHORT, num_hidden_layers=2, num_heads=2, output_logit_soft_cap=0.3)),
    "RecurrentGemma": ("RecurrentGemmaConfig", {**HEADS, "lru_width": 32, "block_types": ("recurrent", "attention"),
                                                "attention_window_size": 64, "logits_soft_cap": 0.3}),
    "LFM2": ("Lfm2Config", {**GQA, "layer_types": ["conv", "full_attention"]}),
    "Jamba": ("JambaConfig", {**GQA, "num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
                              "expert_layer_offset": 1, "use_mamba_kernels": False, "mamba_d_state": 4}),
    "Bamba": ("BambaConfig", {**GQA, **MAMBA, "mamba_n_groups": 1, "attn_layer_indices": [1]}),
    "FalconH1": ("FalconH1Config", {**HEADS, **MAMBA, "mamba_d_ssm": 64}),
    "Zamba2": ("Zamba2Config", {**GQA, "mamba_d_state": 8, "n_mamba_heads": 4, "mamba_headdim": 16, "mamba_ngroups": 1,
                                "chunk_size": 8, "layers_block_type": ["mamba", "hybrid"], "hybrid_layer_ids": [1],
                                "attention_head_dim": 32, "num_mem_blocks": 1}),
    "Qwen3Next": ("Qwen3NextConfig", {**HEADS, **SMALL_EXPERTS, "shared_expert_intermediate_size": 16,
                                      "linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 16,
                                      "linear_value_head_dim": 16, "layer_types": ["linear_attention", "full_attention"]}),
}  # fmt: skip
# With a tower for images, which text alone does not use, and which stays as it is.
VISUAL = {
    "Gemma3 with images": ("Gemma3Config", {"text_config": HEADS, "mm_tokens_per_image": 4, "image_token_id": 5,
                                            "vision_config": {**VISION, "model_type": "siglip_vision_model"}}),
}  # fmt: skip
IN = {"dense": DENSE, "mixture of experts": MIXTURES, "recurrent and hybrid": RECURRENT, "vision-language": VISUAL}
# What `soul.models.load` or `check_linear_head` says of the others.
NOT_CAUSAL = "model: expected a causal language model"
T5 = dict(vocab_size=300, d_model=32, d_ff=32, num_layers=1, num_heads=2)
OUT = {
    "LLaVA": ("LlavaForConditionalGeneration", "LlavaConfig", {}, NOT_CAUSAL),
    "T5": ("T5ForConditionalGeneration", "T5Config", T5, NOT_CAUSAL),
    "BERT": ("BertLMHeadModel", "BertConfig", {**COMMON, "is_decoder": True}, "model: expected logits = softcap tanh"),
}


SLOW = pytest.mark.slow(reason="imports and makes a model for each; every third family is always tested")


@pytest.mark.parametrize("family", [
    pytest.param(name, marks=SLOW if index % 3 else []) for kind in IN.values() for index, name in enumerate(kind)
])  # fmt: skip
def test_families_that_are_in(family):
    name, sizes = {name: case for kind in IN.values() for name, case in kind.items()}[family]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, name)(**sizes)).eval()
    if family in VISUAL:
        assert any("vision" in name for name, _ in model.named_parameters())
    check_against_own_logits(model)


@pytest.mark.parametrize("family", OUT)
def test_families_that_are_out_are_refused(family, tmp_path):
    model_name, config_name, sizes, message = OUT[family]
    if family == "LLaVA":
        sizes = {"text_config": transformers.LlamaConfig(**GQA), "vision_config": transformers.CLIPVisionConfig(**VISION)}
    getattr(transformers, model_name)(getattr(transformers, config_name)(**sizes)).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        model, _ = load(str(tmp_path))
        causal_lm.check_linear_head(model)


def test_the_page_names_every_family_that_is_tested():
    listed = {}
    for line in PAGE.read_text().splitlines():
        kind, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        if kind in {*IN, "out"}:
            listed[kind] = re.findall(r"`([^`]+)`", cells[0])
    assert listed == {**{kind: list(families) for kind, families in IN.items()}, "out": list(OUT)}

"""Tiny models of the families that the command supports, with random weights; and the paths of real data."""

import pathlib

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    OPTConfig,
    PhiConfig,
    Qwen2Config,
)

from soul.data.examples import Example, Sequence
from soul.study.scratch import train_tokenizer

TOFU = pathlib.Path(__file__).parents[3] / "shared" / "data" / "tofu"  # beside the checkout, where it is at all
COMMON = dict(vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
FAMILIES = {
    "llama, untied": lambda: LlamaConfig(**COMMON, tie_word_embeddings=False),
    "llama, tied": lambda: LlamaConfig(**COMMON, tie_word_embeddings=True),
    "gpt2, tied": lambda: GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=2, n_positions=128),
    # word_embed_proj_dim: the head is narrower than the layers, as in OPT-350m
    "opt, tied": lambda: OPTConfig(**{k: v for k, v in COMMON.items() if k != "intermediate_size"}, ffn_dim=48,
                                   word_embed_proj_dim=16, do_layer_norm_before=True, pad_token_id=1),
    "qwen2, tied": lambda: Qwen2Config(**COMMON, num_key_value_heads=1, tie_word_embeddings=True),
    "gpt-neox, untied": lambda: GPTNeoXConfig(**COMMON, tie_word_embeddings=False),
    "phi, head with a bias": lambda: PhiConfig(**COMMON),
    # Logits of these weights are about 0.1: a cap of 0.3 and these scales change every probability.
    "gemma2, capped": lambda: Gemma2Config(**COMMON, num_key_value_heads=1, head_dim=16, final_logit_softcapping=0.3),
    "cohere, scaled": lambda: CohereConfig(**COMMON, logit_scale=8.0),
    "granite, scaled": lambda: GraniteConfig(**COMMON, logits_scaling=0.125),
}  # fmt: skip


def tiny_model(family="llama, tied"):
    torch.manual_seed(0)
    config = FAMILIES[family]()
    for name in ("attention_dropout", "dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "hidden_dropout"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    model = AutoModelForCausalLM.from_config(config)
    bias = model.get_output_embeddings().bias
    if bias is not None:
        torch.nn.init.normal_(bias)
    return model.eval()


def lora_model(family="llama, untied", **options):
    """Return a tiny model wrapped by peft with nonzero adapters, so that they change its outputs."""
    peft = pytest.importorskip("peft", reason="the extra hf is not installed")
    model = peft.get_peft_model(tiny_model(family), peft.LoraConfig(target_modules=["q_proj", "v_proj"], **options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


def sequences(n, vocab_size=300, prompt=3):
    """Return ragged token sequences: ``prompt`` tokens without labels, then 2 to 6 labelled ones."""
    made = []
    for index in range(n):
        ids = torch.randint(2, vocab_size, (prompt + 2 + index % 5,)).tolist()
        labels = [-100] * (prompt - 1) + ids[prompt:] + [-100]
        made.append(Sequence(ids, labels, prompt))
    return made


def learn(model, sequences, steps):
    """Train a tiny model until it knows some sequences by heart; return it in evaluation mode."""
    longest = max(len(sequence.input_ids) for sequence in sequences)
    ids = torch.tensor([s.input_ids + [0] * (longest - len(s.input_ids)) for s in sequences])
    labels = torch.tensor([s.labels + [-100] * (longest - len(s.labels)) for s in sequences])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        logits = model(ids).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    optimizer.zero_grad()
    return model.eval()


def examples(n):
    return [Example(f"Question: where does number {i} live?\nAnswer:", f" In house {i * 7} of street {i}.") for i in range(n)]


def tiny_tokenizer():
    return train_tokenizer(examples(20), 300)

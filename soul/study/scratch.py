"""A tokenizer and small Llamas, trained from scratch."""

import random
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from soul._extras import require
from soul.data.batches import batches_by_length, collate
from soul.data.examples import Example, Sequence
from soul.losses import GradDiff
from soul.models.loading import pick_device
from soul.run.config import UnlearnConfig, build_scheduler
from soul.run.step import train_step
from soul.study.config import StudyConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def train_tokenizer(examples: Iterable[Example], vocab_size: int) -> "PreTrainedTokenizerBase":
    """Return a byte-level BPE tokenizer trained on the examples, with begin, end and padding tokens."""
    tokenizers = require("tokenizers", "hf")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((e.prompt + e.answer for e in examples), trainer)
    bpe.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast_tokenizer = require("transformers", "hf").PreTrainedTokenizerFast
    return fast_tokenizer(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def new_model(tokenizer: "PreTrainedTokenizerBase", config: StudyConfig, seed: int) -> "PreTrainedModel":
    """Return a Llama of the config's size with random weights, on the config's device."""
    transformers = require("transformers", "hf")
    torch.manual_seed(seed)
    llama = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=config.hidden_size * 8 // 3 // 32 * 32,
        num_hidden_layers=config.layers,
        num_attention_heads=max(1, config.hidden_size // 64),
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return transformers.LlamaForCausalLM(llama).to(pick_device(config.device))


def train(model: "PreTrainedModel", sequences: list[Sequence], config: StudyConfig, seed: int) -> list[float]:
    """Train a model on sequences with AdamW, in place, and return the mean loss of every epoch."""
    device = next(model.parameters()).device
    rng = random.Random(seed)
    steps = config.train_epochs * -(-len(sequences) // config.train_batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.train_lr, weight_decay=0.0, fused=device.type == "cuda")
    scheduler = build_scheduler(optimizer, steps, warmup_ratio=0.05)
    options = UnlearnConfig(backend=config.backend)
    objective = GradDiff(gamma=0.0)  # the retain term alone is plain cross-entropy
    losses = []
    model.train()
    for _ in range(config.train_epochs):
        losses_of_epoch = []
        for indices in batches_by_length(sequences, config.train_batch, rng):
            batch = collate([], [sequences[i] for i in indices], device=device)
            losses_of_epoch.append(train_step(model, [batch], objective, optimizer, options)["loss"])
            scheduler.step()
        losses.append(torch.stack(losses_of_epoch).mean().item())
    return losses

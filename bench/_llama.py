"""Llama-shaped models with random weights, sequences of TOFU's lengths for them, and what a step costs by bytes and FLOPs."""

import dataclasses
import random

import torch

from soul._extras import require
from soul.data import Sequence


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a model of Llama's family, and of its part in a step.

    Attributes:
        name: of the model that has these sizes.
        tied: head and embedding are one tensor.
        lengths: shortest and longest sequence, in tokens.
        pad_to: length that the published recipe pads every sequence to.
    """

    name: str
    width: int
    mlp: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    n_vocab: int
    tied: bool
    lengths: tuple = (45, 90)  # TOFU's questions with their answers
    pad_to: int = 512

    @property
    def body(self):
        """Parameters that every token is multiplied with, without the head."""
        attention = 2 * self.width**2 + 2 * self.width * (self.width // self.n_heads) * self.n_kv_heads
        return self.n_layers * (attention + 3 * self.width * self.mlp)

    @property
    def n_params(self):
        """All parameters: body, norms, embedding, head."""
        norms = (2 * self.n_layers + 1) * self.width
        return self.body + norms + (1 if self.tied else 2) * self.n_vocab * self.width

    def flops(self, tokens, rows, *, checkpointing=False):
        """Of the matrix products of one training step: 6 a parameter and token, 8 where the body is computed twice; attention
        itself, below 1% at these lengths, is left out.

        Args:
            tokens: that go through the body, padding included.
            rows: of them that go through the head.
            checkpointing: the body's forward is computed again in the backward pass.
        """
        return (8 if checkpointing else 6) * self.body * tokens + 6 * self.width * self.n_vocab * rows


LLAMA_1B = Shape("Llama-3.2-1B", 2048, 8192, 16, 32, 8, 128256, True)
LLAMA_7B = Shape("LLaMA-2-7B", 4096, 11008, 32, 32, 32, 32000, False)
SMALL = Shape("small Llama", 128, 344, 4, 4, 2, 4000, True, lengths=(20, 40), pad_to=128)
TINY = Shape("tiny Llama", 32, 64, 2, 2, 1, 200, True, lengths=(6, 12), pad_to=32)


def make_model(shape, device, dtype):
    """A model of that shape with the same random weights at every call, in training mode."""
    transformers = require("transformers", "hf")
    config = transformers.LlamaConfig(
        vocab_size=shape.n_vocab,
        hidden_size=shape.width,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.n_heads,
        num_key_value_heads=shape.n_kv_heads,
        tie_word_embeddings=shape.tied,
        use_cache=False,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    found = sum(p.numel() for p in model.parameters())
    assert found == shape.n_params, f"{shape.name}: {found:,} parameters, {shape.n_params:,} by the formula"
    return model.train()


def make_sequences(shape, count, seed=0):
    """Random token ids in sequences of the shape's lengths, a third of each a prompt without labels."""
    draw, found = random.Random(seed), []
    for _ in range(count):
        ids = [draw.randrange(shape.n_vocab) for _ in range(draw.randint(*shape.lengths))]
        prompt = len(ids) // 3
        labels = [-100] * (prompt - 1) + ids[prompt:] + [-100]
        found.append(Sequence(ids, labels, prompt))
    return found

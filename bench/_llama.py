"""Llama-shaped models with random weights, and sequences of TOFU's lengths for them."""

import dataclasses
import random
from typing import TYPE_CHECKING, Any

import torch

from soul._extras import require
from soul.data.examples import Sequence
from soul.plan import Shape, shape_of
from soul.plan.shapes import llama

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclasses.dataclass(frozen=True)
class Setup:
    """A model and its data.

    Attributes:
        shape: of the model, of Llama's family.
        lengths: shortest and longest sequence, in tokens.
        pad_to: length that the published recipe pads every sequence to.
    """

    shape: Shape
    lengths: tuple[int, int] = (45, 90)  # TOFU's questions with their answers
    pad_to: int = 512

    def of(self, **sizes: Any) -> "Setup":
        """Return the same with other sizes of the model, which are arguments of `soul.plan.shapes.llama`."""
        names = ("name", "hidden", "intermediate", "layers", "heads", "kv_heads", "vocab", "tied")
        return dataclasses.replace(self, shape=llama(**{name: getattr(self.shape, name) for name in names} | sizes))


SMOLLM2 = Setup(llama("smollm2-135m", hidden=576, intermediate=1536, layers=30, heads=9, kv_heads=3, vocab=49152, tied=True))
LLAMA_1B, LLAMA_7B = Setup(shape_of("llama-3.2-1b")), Setup(shape_of("llama-2-7b"))
TINY = Setup(llama("tiny", hidden=32, intermediate=64, layers=2, heads=2, kv_heads=1, vocab=200, tied=True), (6, 12), 32)


def make_model(shape: Shape, device: torch.device, dtype: torch.dtype) -> "PreTrainedModel":
    """Make a model of a shape, with the same random weights at every call, in training mode."""
    transformers = require("transformers", "hf")
    config = transformers.LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        tie_word_embeddings=shape.tied,
        use_cache=False,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    numel = sum(p.numel() for p in model.parameters())
    assert numel == shape.numel, f"{shape.name}: {numel:,} parameters, {shape.numel:,} by its shape"
    return model.train()


def make_sequences(setup: Setup, count: int, seed: int = 0) -> list[Sequence]:
    """Make sequences of random token ids with the setup's lengths; a third of each is a prompt without labels."""
    draw = random.Random(seed)
    sequences = []
    for _ in range(count):
        ids = [draw.randrange(setup.shape.vocab) for _ in range(draw.randint(*setup.lengths))]
        prompt = len(ids) // 3
        labels = [-100] * (prompt - 1) + ids[prompt:] + [-100]
        sequences.append(Sequence(ids, labels, prompt))
    return sequences

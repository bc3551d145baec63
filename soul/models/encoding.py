"""Encoding of examples as token ids that fit a model."""

from typing import TYPE_CHECKING, Protocol

from soul.data.examples import Counts, Example, Sequence, encode
from soul.models.causal_lm import head
from soul_kernels.errors import argument_error

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class EncodingOptions(Protocol):
    """The options of a run that decide how its examples are encoded, as `soul.UnlearnConfig` and others have them."""

    @property
    def max_length(self) -> int: ...  # noqa: D102

    @property
    def long_texts(self) -> str: ...  # noqa: D102


def encode_for(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    examples: list[Example],
    config: EncodingOptions,
    name: str,
    counts: Counts | None = None,
) -> list[Sequence]:
    """Encode examples, and check that the model has a head row for every token and a position for the longest sequence.

    Args:
        model: the model that will read the sequences.
        tokenizer: its tokenizer.
        examples: list of `soul.data.Example`.
        config: ``max_length`` in tokens, and ``long_texts``: "split", or any other word for truncating.
        name: what to call the examples in errors.
        counts: as in `soul.data.encode`.

    Raises:
        ArgumentError: a row or the longest sequence does not fit; the error names it.
    """
    sequences = encode(
        examples,
        tokenizer,
        vocab_size=head(model)[0].shape[0],
        max_length=config.max_length,
        split=config.long_texts == "split",
        name=name,
        counts=counts,
    )
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max((len(sequence.input_ids) for sequence in sequences), default=0)
    if positions and longest > positions:
        remedy = f"pass --max-length {positions} to cut longer sequences"
        raise argument_error("max_length", f"sequences of at most {positions} tokens", longest, remedy)
    return sequences

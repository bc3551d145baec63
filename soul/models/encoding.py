"""Examples -> token ids that fit a model."""

from soul.data.examples import encode
from soul.models.causal_lm import head
from soul_kernels.errors import argument_error


def encode_for(model, tokenizer, examples, config, name, counts=None):
    """Encodes examples and makes sure that the model has a place for every token; ``counts`` as in `soul.data.encode`.

    Raises:
        ArgumentError: naming the row, or the length that does not fit.
    """
    options = dict(max_length=config.max_length, split=config.long_texts == "split", name=name, counts=counts)
    sequences = encode(examples, tokenizer, vocab_size=head(model)[0].shape[0], **options)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max((len(sequence.input_ids) for sequence in sequences), default=0)
    if positions and longest > positions:
        remedy = f"pass --max-length {positions} to cut longer sequences"
        raise argument_error("max_length", f"sequences of at most {positions} tokens", longest, remedy)
    return sequences

"""What the ops on hidden states share: one sweep over the rows of a language-model head, chunk by chunk.

`rows` computes logits, statistics and gradients of a chunk, `gradients` adds them up, `autograd` runs objectives over all
chunks and shows autograd the result, `custom_ops` makes opaque ops of that for torch.compile, `checks` checks arguments.
Start with `rows`.
"""

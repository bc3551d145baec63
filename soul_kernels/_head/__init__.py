"""The machinery that the ops on hidden states share: one sweep over the rows of a language-model head, chunk by chunk.

From the ground up: `checks` checks arguments, `rows` computes logits, statistics and gradients of a chunk, `gradients` adds
these up, `sweeps` runs what an op computes over all chunks, `autograd` shows the results to autograd, and `custom_ops` makes
opaque ops of them for torch.compile, which find their objectives in `registry`. A module imports only those before it, and
public modules of `soul_kernels` below the ops. Start with `rows`.
"""

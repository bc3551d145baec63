"""Machinery that the ops on hidden states share: a sweep over the rows of a language-model head, chunk by chunk.

From the ground up: `checks` checks arguments. `rows` computes logits, statistics and gradients of a chunk. `gradients` adds the
gradients up. `sweeps` runs the computation of an op over all chunks. `autograd` wraps the results for autograd. `custom_ops`
wraps the ops for torch.compile, and `registry` numbers objectives for it. A module imports only those before it, and public
modules of `soul_kernels` below the ops. Start with `rows`.
"""

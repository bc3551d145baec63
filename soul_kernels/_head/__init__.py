"""The machinery that the ops on hidden states share: a sweep over the rows of a language-model head, chunk by chunk.

May import: row kernels, references and leaves of ``soul_kernels``; and of `checks`, `flat`, `rows`, `gradients`, `sweeps`,
`autograd`, `registry`, `custom_ops` each one those before it.
Start reading with `rows`, then `sweeps`.
"""

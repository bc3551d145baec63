"""The optimizers SophiaG and SOUL, gradient release, and the curvature that they are given.

`optimizer` is the public class, over `parts` (tensors that are stepped together), `states` and `options`; `curvature` and
`release` are built on it. May import: distributed.shards. Start with `optimizer`.
"""

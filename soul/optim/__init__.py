"""The optimizers SophiaG and SOUL, gradient release, and the sources of curvature.

`optimizer` and `soul` hold the public classes, `stepper` takes their steps; `curvature` and `release` are built on them.
May import: distributed.shards. Start with `optimizer`, then `stepper` and `step_groups`.
"""

"""The optimizers SophiaG and SOUL, gradient release, and the sources of curvature.

May import: distributed.
Start reading with `optimizer` and `soul`, the public classes, then `stepper`, which takes their steps.
"""

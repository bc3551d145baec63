"""First order against second order, from one start, on data that a small model has memorised.

`config` says what is compared, `data` and `scratch` make the start, `run` unlearns and `measure` measures, `fronts` and
`results` decide, `report` and `pictures` tell.
"""

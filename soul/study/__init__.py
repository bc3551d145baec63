"""A comparison of first-order and second-order unlearning on data that a small model has memorised.

`config` lists the comparisons, `data` and `scratch` make the models to start from, `run` unlearns, `measure` measures, `fronts`
and `results` compare, `report` and `pictures` write the report. Start reading at `run.run_study`. The wing may import data,
models, checkpoints, runs and evaluation; only the commands import it.
"""

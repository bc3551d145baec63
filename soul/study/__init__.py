"""A study that compares first-order and second-order unlearning of data that a small model has memorised.

May import: _extras, checkpoint, data, evaluate, losses, models, output, report, run.
Start reading with `soul.study.run.run_study`, then `config` for what is compared and `report` for what is written.
"""

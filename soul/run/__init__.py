"""A run of unlearning: options (`config`), data (`prepare`, `feed`), steps (`step`, `graph`, `influence`), `loop`, `unlearner`.

`trackers` shows the numbers of a run elsewhere.

May import: _extras, checkpoint, data, distributed, evaluate, losses, models, optim, output.
Start reading with `unlearner`, which is the whole run, then `loop` and `step`.
"""

"""A run of unlearning: options (`config`), data (`prepare`, `feed`), steps (`step`, `graph`, `influence`), `loop`, `unlearner`.

A run with an aim: its numbers and the controller (`aim`), measurements (`measures`), the search before the first step
(`pilot`), and their part in the loop (`steering`). `trackers` shows the numbers of a run elsewhere.

May import: _extras, checkpoint, data, distributed, evaluate, hub, losses, models, optim, output.
Start reading with `unlearner`, which is the whole run, then `loop` and `step`.
"""

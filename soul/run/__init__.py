"""A run of unlearning: its options, its data, the loop, and the files that it writes.

`unlearner` is the whole run; `loop` repeats `step` over the batches of `feed`; `config` has all options. May import every wing
but study, plan, integrations and commands. Start with `unlearner`.
"""

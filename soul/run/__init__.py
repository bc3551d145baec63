"""A run of unlearning: configuration, data, the loop, and the model that it leaves.

`unlearner` is the whole run; `loop` repeats `step` over the batches of `feed`; `config` has all options. May import: every wing
but evaluate's users (study, plan, integrations, commands). Start with `unlearner`.
"""

"""The numerical contract: every op in plain PyTorch, in a module of the same name as in `soul_kernels`.

These functions define the results of the kernels, and compute where Triton cannot run. They import torch and the leaves
`soul_kernels.errors` and `soul_kernels.tokens`, never Triton. Start with ``sophia_step.py`` for the optimizer and
``token_logprob.py`` for the losses.
"""

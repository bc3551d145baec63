"""The references: every op in plain PyTorch, in a module of the op's name. They define the ops, and serve tensors on a CPU.

May import: torch, `soul_kernels.errors` and `soul_kernels.tokens`; never Triton.
Start reading with ``sophia_step.py`` for the optimizer and ``token_logprob.py`` for the losses.
"""

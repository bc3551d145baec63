"""The numerical contract: every op in plain PyTorch, one module for each stem of `soul_kernels`. It also serves CPU tensors.

It imports torch and the leaves `soul_kernels.errors` and `soul_kernels.tokens`, never Triton. Start with ``sophia_step.py`` for
the optimizer and ``token_logprob.py`` for the losses.
"""

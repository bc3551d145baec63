"""The numerical contract: every op in plain PyTorch, one module a stem, no Triton. It also serves tensors on the CPU."""

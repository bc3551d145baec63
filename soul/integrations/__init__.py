"""Integrations with other people's training code. Nothing here is imported by ``import soul``.

`hf`: the Hugging Face Trainer. `open_unlearning`: trainers and configurations for that code base. `trl`: data sets with TRL's
columns. May import: compat, data, losses, model_loss, models, optim, and what those may import. Start reading with `hf`.
"""

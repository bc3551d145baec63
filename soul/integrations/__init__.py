"""Integrations with other training code: the Hugging Face Trainer (`hf`), TRL (`trl`) and open-unlearning.

May import: compat, data, distributed, losses, model_loss, models, optim. ``import soul`` imports none of these modules.
Start reading with `hf`.
"""

"""What brings this library into other people's training code. Nothing here is imported by ``import soul``.

`soul.integrations.hf`: the Hugging Face Trainer. `soul.integrations.open_unlearning`: trainers and configurations for that code
base. `soul.integrations.trl`: data sets with TRL's columns.
"""

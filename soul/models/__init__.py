"""Hugging Face causal language models: body, head and adapters (`causal_lm`), and the model before unlearning (`ref_model`).

`files` checks what comes with a model before it is read, `encoding` makes token ids that fit a model. May import: data,
distributed, output, and below. Start with `causal_lm`.
"""

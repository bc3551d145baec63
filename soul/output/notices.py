"""Warnings of other libraries that a user can do nothing about, and that are therefore not shown.

Each is named by its own text, with the reason; every other warning is shown as ever. `filtered` is around a whole command. In a
program that imports the library it is only around the loading of models, where the library imports others; the rest of what
such a program shows is its own decision.
"""

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator
from typing import NamedTuple


class Notice(NamedTuple):
    """A warning that is not shown.

    Attributes:
        text: regular expression of its whole text.
        reason: why a user can do nothing about it, or need not.
        logger: name of the logger that it goes to; None: it is a Python warning.
    """

    text: str
    reason: str
    logger: str | None = None


NOTICES = (
    Notice(
        r"`is_gradient_checkpointing` is deprecated and will be removed in v6\. Use `is_activation_checkpointing` instead\.",
        "peft asks transformers so, for every model with adapters",
    ),
    Notice(
        r"Token indices sequence length is longer than the specified maximum sequence length for this model \(\d+ > \d+\)\. "
        r"Running this sequence through the model will result in indexing errors",
        "texts are encoded whole, and then split or cut to --max-length and to what the model takes; the output counts those",
        "transformers.tokenization_utils_base",
    ),
    Notice(
        r"Ignoring clean_up_tokenization_spaces=True for BPE tokenizer \w+\. The clean_up_tokenization post-processing step is "
        r"designed for WordPiece tokenizers and is destructive for BPE \(it strips spaces before punctuation\)\. Set "
        r"clean_up_tokenization_spaces=False to suppress this warning, or set "
        r"clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output=True to force cleanup anyway\.",
        "the tokenizer's own files ask for it, and that it is ignored is right",
        "transformers.tokenization_utils_tokenizers",
    ),
    Notice(
        r"The following generation flags are not valid and may be ignored: \[.*\]\."
        r"( Set `TRANSFORMERS_VERBOSITY=info` for more details\.)?",
        "answers are greedy, and what the model's generation_config.json says about sampling is not used",
        "transformers.generation.configuration_utils",
    ),
    Notice(
        r"Both `max_new_tokens` \(=\d+\) and `max_length`\(=\d+\) seem to have been set\. "
        r"`max_new_tokens` will take precedence\. Please refer to the documentation for more information\. "
        r"\(https://huggingface\.co/docs/transformers/main/en/main_classes/text_generation\)",
        "max_length is the default of the model's generation_config.json, and max_new_tokens is what the command asks for",
        "transformers.generation.utils",
    ),
    Notice(
        r"Failed to load .*\.so: Could not load this library: .*\.so",
        "torchao's libraries for GPUs, which rounding does not use; transformers and peft import torchao wherever it is",
        "torchao",
    ),
    Notice(
        r"<enum '\w+'> is an Enum subclass and is now natively supported by torch\.compile as an opaque value type\. Calling "
        r"register_constant\(\) on Enum subclasses is deprecated and will be an error in a future release\.",
        "torchao calls it when it is imported",
        "torch.utils._pytree",
    ),
    Notice(
        r"Failed to load CPU gemm_4bit_forward from kernels-community: .*",
        "bitsandbytes looks for it on the hub when it is imported, and multiplies by code of its own without it; peft imports "
        "bitsandbytes wherever it is",
        "bitsandbytes.backends.cpu.ops",
    ),
    Notice(
        r"Skipping publisher trust check for 'kernels-community/quantization-bitsandbytes' because .* offline mode\.",
        "the same search, with HF_HUB_OFFLINE",
        "kernels._internals.hf_hub",
    ),
)


@contextlib.contextmanager
def filtered() -> Iterator[None]:
    """Do not show the warnings in ``NOTICES`` for the duration of the block."""
    filters = [(logging.getLogger(notice.logger), _Without(notice.text)) for notice in NOTICES if notice.logger]
    for logger, without in filters:
        logger.addFilter(without)
    try:
        with warnings.catch_warnings():
            for notice in NOTICES:
                if notice.logger is None:
                    warnings.filterwarnings("ignore", f"{notice.text}$")
            yield
    finally:
        for logger, without in filters:
            logger.removeFilter(without)


class _Without(logging.Filter):
    """Lets all records of a logger pass but those of one text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self._text = re.compile(text, re.DOTALL)

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether a record is shown."""
        return self._text.fullmatch(record.getMessage()) is None

"""Warnings that no user can do anything about are not shown by the command, and all others are."""

import contextlib
import importlib.metadata
import logging
import re
import warnings

import pytest

from soul.output.notices import NOTICES, filtered
from tests.support.models import tiny_model, tiny_tokenizer

LOGGED = [notice for notice in NOTICES if notice.logger is not None and notice.logger.startswith("transformers")]


class Kept(logging.Handler):
    """Keeps the texts of what is logged."""

    def __init__(self):
        super().__init__()
        self.texts = []

    def emit(self, record):
        self.texts.append(record.getMessage())


@pytest.fixture
def kept():
    transformers = pytest.importorskip("transformers")
    handler = Kept()
    logger = transformers.utils.logging.get_logger("transformers")
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)


def provoke(tokenizer):
    """Do what makes transformers log the warnings."""
    logging.Logger.warning_once.cache_clear()  # of transformers: otherwise it would be silent the second time
    tokenizer.deprecation_warnings.clear()
    tokenizer.model_max_length = 4
    tokenizer.clean_up_tokenization_spaces = True
    inputs = tokenizer("Where does number 3 live?", return_tensors="pt")
    model = tiny_model()
    model.generation_config.temperature = 0.5
    model.generation_config.max_length = 30
    ids = model.generate(**inputs, max_new_tokens=2, do_sample=False, pad_token_id=0)
    tokenizer.batch_decode(ids)


def test_the_texts_are_those_of_the_libraries(kept):
    tokenizer = tiny_tokenizer()
    provoke(tokenizer)
    matching = [[re.fullmatch(notice.text, text) is not None for notice in LOGGED] for text in kept.texts]
    assert all(any(row) for row in matching), kept.texts
    if int(importlib.metadata.version("transformers").partition(".")[0]) >= 5:
        assert all(any(column) for column in zip(*matching))


def test_they_are_hidden_within_the_block_alone_and_others_are_not(kept):
    tokenizer = tiny_tokenizer()
    with filtered():
        provoke(tokenizer)
        assert kept.texts == []
        for notice in LOGGED:
            logging.getLogger(notice.logger).warning("another warning")
        assert kept.texts == ["another warning"] * len(LOGGED)
    kept.texts.clear()
    provoke(tokenizer)
    assert len(kept.texts) >= len(LOGGED) - 1  # transformers 4 has one less


def test_warnings_of_python_are_hidden_by_their_whole_text():
    text = "`is_gradient_checkpointing` is deprecated and will be removed in v6. Use `is_activation_checkpointing` instead."
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with filtered():
            warnings.warn(text, FutureWarning, stacklevel=1)
            warnings.warn(f"{text} And more.", FutureWarning, stacklevel=1)
        warnings.warn(text, FutureWarning, stacklevel=1)
    assert [str(warning.message) for warning in seen] == [f"{text} And more.", text]


def test_every_one_has_a_reason():
    assert all(notice.reason for notice in NOTICES)


def test_what_libraries_say_when_they_are_imported_is_hidden(caplog):
    """They are imported once in a process, so their texts are logged by hand here."""
    enum = (
        "<enum 'Kernel'> is an Enum subclass and is now natively supported by torch.compile as an opaque value type. Calling "
        "register_constant() on Enum subclasses is deprecated and will be an error in a future release."
    )
    repository = "kernels-community/quantization-bitsandbytes"
    trust = f"Skipping publisher trust check for '{repository}' because Hugging Face Hub is in offline mode."
    records = [
        ("torchao", "Failed to load /a/torchao/_C_mxfp8.abi3.so: Could not load this library: /a/torchao/_C_mxfp8.abi3.so"),
        ("torch.utils._pytree", enum),
        ("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward from kernels-community: No module named"),
        ("kernels._internals.hf_hub", trust),
    ]
    for hidden in (True, False):
        with filtered() if hidden else contextlib.nullcontext():
            for name, text in records:
                logging.getLogger(name).warning(text)
                logging.getLogger(name).warning("something else")
    for name, text in records:
        shown = [record.getMessage() for record in caplog.records if record.name == name]
        assert shown == (["something else", text, "something else"] if logging.getLogger(name).propagate else [])

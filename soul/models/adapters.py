"""LoRA adapters: new ones on a model, and saved ones with the model they belong to."""

import pathlib
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from soul._extras import require
from soul.models.files import MAX_RANK, check_patterns
from soul.output.notices import filtered
from soul_kernels.errors import argument_error, check_positive, check_range, check_whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@filtered()
def add_adapters(
    model: "PreTrainedModel",
    *,
    rank: int,
    alpha: float | None = None,
    dropout: float = 0.0,
    targets: str | Sequence[str] = "all-linear",
) -> "PreTrainedModel":
    """Freeze a model and put LoRA adapters (Hu et al. 2021, arXiv 2106.09685) on it: ``W x + (alpha / rank) B A x``.

    B starts as zeros, so at first the model computes what it did without adapters.

    Args:
        model: a Hugging Face causal language model, which is changed in place.
        rank: rows of A.
        alpha: scale; None: twice the rank.
        dropout: probability of dropout on the inputs of A.
        targets: list of names of linear layers; or "all-linear", all but the head.

    Returns:
        The model wrapped by peft; the adapters are fp32.

    Raises:
        ArgumentError: a number is out of its range, or there are no such layers.
    """
    peft = require("peft", "hf")
    check_rank(rank)
    check_range("lora_dropout", dropout, high=1.0)
    if alpha is not None:
        check_positive("lora_alpha", alpha, "twice the rank is common")
    for target in () if isinstance(targets, str) else targets:  # peft is content if one of them matches
        if not any(is_named(path, target) for path, _ in model.named_modules()):
            raise argument_error("lora_targets", "linear layers of the model", repr(target), "check the names")
    options = dict(r=rank, lora_alpha=2 * rank if alpha is None else alpha, lora_dropout=dropout, target_modules=targets)
    try:
        return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options))
    except ValueError as error:
        raise argument_error("lora_targets", "linear layers of the model", f"{targets} ({error})", "check the names") from error


def is_named(path: str, target: str) -> bool:
    """Tell whether peft takes the module at a dotted path for one with this name."""
    return f".{path}".endswith(f".{target}")


def check_rank(rank: int) -> None:
    """Raise unless adapters can have this rank."""
    check_whole("lora_rank", rank, "16 is common", high=MAX_RANK + 1)


def load_adapters(
    name: str | pathlib.Path,
    config: Mapping[str, Any],
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
) -> "PreTrainedModel":
    """Load saved adapters onto their model.

    Args:
        name: directory, or name on the hub, of the adapters.
        config: their configuration, from `soul.models.files.adapter_config_of`.
        model: the model that the configuration names.
        tokenizer: tokenizer of the adapters. It may have new tokens, for which the model's embedding is extended.

    Raises:
        ArgumentError: as `soul.models.files.check_patterns`.
        UserWarning: an adapter of the configuration has no weights; it would be initialized anew.
    """
    peft = require("peft", "hf")
    check_patterns(config, [path for path, _ in model.named_modules()])
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys")
        return peft.PeftModelForCausalLM.from_pretrained(model, name)

"""Checks of the files that come with a model, made before transformers and peft read them. Anyone may have written them.

Code that comes with a model is not run. transformers is called with ``trust_remote_code=False`` and unpickles tensors only, but
some versions of transformers and peft run code all the same. peft before 0.20 imports any module that ``adapter_config.json``
names. transformers 4 runs ``custom_generate/generate.py`` of a local directory and the attention kernels that ``config.json``
names. Therefore `check_config`, `check_directory` and `check_adapters` refuse those by name, whatever the version.

No configuration makes a program run for hours: numbers of layers are bounded (`check_config`), and so is the time that the
regular expressions of adapters take (`check_patterns`). The cost of a chat template is bounded in `soul.data.templates`.
"""

import json
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from soul._extras import require
from soul_kernels.errors import argument_error

MAX_LAYERS = 4096  # layers, and experts of a layer; the largest published models have 126 and 2048
MAX_MODULES = 2**17  # layers x experts
MAX_SIZE = 2**27  # widths, vocabularies, positions; the largest published models have up to 10 million positions
MAX_RANK = 2**14  # of adapters
PATTERN_SECONDS = 5.0  # for all regular expressions of an adapter configuration, on all names of modules
# A key is a number of layers or of experts if it matches both COUNT and REPEATED, and not SIZE.
COUNT = re.compile(r"(^|_)(n|num|depth|layers?|blocks?)(_|$)")
REPEATED = re.compile(r"layer|expert|block|depth")
SIZE = re.compile(r"(size|dim|positions?|embeddings|embd|width)$")
NAME = re.compile(r"[\w.-]*")


def config_of(name: str | os.PathLike[str], revision: str | None = None) -> dict[str, Any]:
    """Return the content of a model's ``config.json`` as a dict, checked by `check_config`.

    Args:
        name: directory, or name on the hub.
        revision: revision of the hub's repository.

    Raises:
        ArgumentError: as `check_config`.
        OSError: there is no such file, or it cannot be read.
    """
    config, _ = require("transformers", "hf").PretrainedConfig.get_config_dict(name, revision=revision)
    check_config(config)
    return config


def check_config(config: Mapping[str, Any]) -> None:
    """Raise unless a model can be built from a ``config.json`` without code of its own and within bounds.

    Args:
        config: the dict; nested ones are checked too.

    Raises:
        ArgumentError: it names an attention kernel of the hub, or has more layers or experts than ``MAX_LAYERS``, or a size
            beyond ``MAX_SIZE``.
    """
    largest: dict[str, float] = {"layer": 1, "expert": 1}
    for key, value in _items(config):
        where = f"config.json, {key}"
        if "attn_implementation" in key or "experts_implementation" in key:
            for kind in value.values() if isinstance(value, dict) else [value]:
                if not (kind is None or isinstance(kind, str) and NAME.fullmatch(kind)):
                    remedy = "remove it: code from the hub is not run"
                    raise argument_error(where, "one of the implementations of transformers", repr(kind), remedy)
        elif isinstance(value, (int, float)):
            is_count = COUNT.search(key) and REPEATED.search(key) and not SIZE.search(key)
            limit = MAX_LAYERS if is_count else MAX_SIZE if SIZE.search(key) else None
            if limit is not None and not value <= limit:
                raise argument_error(where, f"at most {limit}", _short(value), "is this the file of a model?")
            if is_count:
                kind = "expert" if "expert" in key else "layer"
                largest[kind] = max(largest[kind], value)
    if largest["layer"] * largest["expert"] > MAX_MODULES:
        got = f"{largest['layer']} layers with {largest['expert']} experts"
        raise argument_error("config.json", f"at most {MAX_MODULES} experts in all layers", got, "is this the file of a model?")


def _items(config: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the keys and values of a dict and of the dicts in it."""
    for key, value in config.items():
        yield str(key), value
        if isinstance(value, dict):
            yield from _items(value)


def _short(value: float) -> str:
    """Return a number as a text of a few characters."""
    try:
        return f"{value:.4g}"
    except OverflowError:
        return "a number of hundreds of digits"


def check_directory(name: str | pathlib.Path) -> None:
    """Raise if a model's directory has code that some versions of transformers run without being asked.

    Raises:
        ArgumentError: there is a ``custom_generate/generate.py``.
    """
    code = pathlib.Path(name) / "custom_generate"
    if code.exists():
        remedy = f"remove {code}: code that comes with a model is not run"
        raise argument_error("model", "a directory without code for generation", str(name), remedy)


def adapter_config_of(name: str | pathlib.Path, revision: str | None = None) -> dict[str, Any] | None:
    """Return the content of a model's ``adapter_config.json`` as a dict, checked by `check_adapters`; None without the file.

    Args:
        name: directory, or name on the hub.
        revision: revision of the hub's repository.

    Raises:
        ArgumentError: as `check_adapters`.
        OSError: it cannot be read.
        ValueError: it is not JSON.
    """
    path = require("transformers.utils", "hf").find_adapter_config_file(str(name), revision=revision)
    if path is None:
        return None
    config = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    check_adapters(config)
    return config


def check_adapters(config: object) -> None:
    """Raise unless an ``adapter_config.json`` describes LoRA adapters, without code and within bounds.

    Raises:
        ArgumentError: it names the key that does not fit.
    """
    if not isinstance(config, dict):
        raise argument_error("adapter_config.json", "an object", type(config).__name__, "save the adapters again")
    library = str((config.get("auto_mapping") or {"parent_library": "transformers"}).get("parent_library"))
    ranks = [config.get("r"), *_values(config.get("rank_pattern"))]
    replicated = sum(end - start for start, end in config.get("layer_replication") or ())
    merge = "merge them into their model with peft, and pass that"
    for key, fits, expected, remedy in (
        ("peft_type", config.get("peft_type") == "LORA", "'LORA'", merge),
        ("task_type", config.get("task_type") in (None, "CAUSAL_LM"), "'CAUSAL_LM' or null", "is it a language model's?"),
        ("base_model_name_or_path", bool(config.get("base_model_name_or_path")), "a directory or a hub name", "set it"),
        ("megatron_config", config.get("megatron_config") is None, "null", merge),
        ("megatron_core", config.get("megatron_core") in (None, "megatron.core"), "null or 'megatron.core'", "set it to null"),
        ("auto_mapping", re.fullmatch(r"transformers(\.\w+)*", library), "null or a class of transformers", "set it to null"),
        ("r", all(isinstance(rank, int) and 0 < rank <= MAX_RANK for rank in ranks), f"ranks from 1 to {MAX_RANK}", merge),
        ("layer_replication", replicated <= MAX_LAYERS, f"at most {MAX_LAYERS} layers", merge),
        ("init_lora_weights", _is_quick(config.get("init_lora_weights")), "true, or a name", "set it to true"),
    ):  # fmt: skip
        if not fits:
            raise argument_error(f"adapter_config.json, {key}", expected, repr(config.get(key))[:200], remedy)


def _is_quick(kind: object) -> bool:
    """Tell whether a way of initializing adapters takes at most 999 iterations."""
    return kind is None or isinstance(kind, bool) or re.fullmatch(r"[a-z_]+|pissa_niter_\d{1,3}", str(kind)) is not None


def _values(mapping: Mapping[str, Any] | None) -> list[Any]:
    return list((mapping or {}).values())


def check_patterns(config: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raise if the regular expressions of an ``adapter_config.json`` take too long.

    They are tried in a separate process, which can be ended. Plain names are not tried.

    Args:
        config: the dict, from `adapter_config_of`.
        names: names of all modules of the model.

    Raises:
        ArgumentError: they take longer than ``PATTERN_SECONDS``, or are not regular expressions.
    """
    patterns: list[str] = []
    for key in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern", "rank_pattern", "alpha_pattern",
                "target_parameters"):  # fmt: skip
        value = config.get(key) or ()
        patterns += [value] if isinstance(value, str) else map(str, value)
    patterns = sorted({pattern for pattern in patterns if not NAME.fullmatch(pattern)})
    if not patterns:
        return
    # peft matches the whole name, what follows a dot, or what precedes one.
    code = (
        "import json, re, sys\n"
        "patterns, names = json.load(sys.stdin)\n"
        "for pattern in patterns:\n"
        "    for form in (pattern, rf'(.*\\.)?({pattern})$', rf'(^|.*\\.){pattern}($|\\..*)'):\n"
        "        for name in names:\n"
        "            re.match(form, name); re.fullmatch(form, name)\n"
    )
    names_of_one_layer = sorted({re.sub(r"\d", "0", name) for name in names})  # layers differ by their numbers only
    command = [sys.executable, "-I", "-c", code]
    text = json.dumps([patterns, names_of_one_layer])
    try:
        ended = subprocess.run(command, input=text, text=True, capture_output=True, timeout=PATTERN_SECONDS)
        problem = None if ended.returncode == 0 else (ended.stderr.strip().splitlines() or ["an error"])[-1]
    except subprocess.TimeoutExpired:
        problem = "some that take longer"
    if problem is not None:
        where = "adapter_config.json, " + ", ".join(repr(pattern[:60]) for pattern in patterns[:3])
        expected = f"regular expressions that take at most {PATTERN_SECONDS:g} s"
        raise argument_error(where, expected, problem, "name the modules instead")

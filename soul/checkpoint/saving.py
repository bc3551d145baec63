"""The saving of a model as Hugging Face's files, completely or not at all.

How it works: a whole model is saved by its own ``save_pretrained``. A model in shards is too large for that, since
``save_pretrained`` wants all tensors at once. So it gets a number in place of each tensor, and writes its configuration and
files of these numbers. They show under which names it saves which tensors (a tied one once), and in which order it divides them
among files. `_write_tensors` then writes the same files with the tensors themselves, one after the other, as they are gathered.

Of some families transformers stores other tensors than a model has: a mixture of experts has the experts of a layer in one
tensor, and they are stored one by one. The conversion, a function of transformers, is then tried on the meta device, of all
tensors together and of each alone. If both have the same results, a tensor is gathered, converted, and kept until all that is
made of it is written. If they have not, or transformers has no such function, all tensors are gathered first.

Safe to change: messages. Not safe: the bytes of `_write_tensors`, which are those of the library safetensors
(tests/checkpoint/test_saving.py); and collective calls, of which `soul.distributed.gather` makes all.
"""

import contextlib
import functools
import inspect
import json
import os
import pathlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from soul._extras import require
from soul.distributed.gather import WholeTensors, on_first_with_tensors
from soul.distributed.processes import Processes
from soul.models.causal_lm import has_adapters
from soul.output.files import reason, sweep, whole
from soul.output.progress import bars_of_transformers, task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MODEL_FILES = ("config.json", "adapter_config.json")  # of a model, of adapters
INDEX_FILE = "model.safetensors.index.json"
Convert = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]  # a model's tensors by name -> those that are stored


def save_model(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", directory: str | os.PathLike[str]) -> None:
    """Save a model (or its adapters) and its tokenizer as Hugging Face's files, completely or not at all.

    One of ``MODEL_FILES`` is put in place last, so that its presence proves that the rest is complete. For a sharded model
    every process must call this, and the first one writes: the files that one process would write, bit for bit. It holds one
    whole tensor at a time beside its shards; of a mixture whose experts are stored one by one, the experts of a layer. If
    transformers makes a stored tensor of several of the model's, the first process holds all whole tensors at once.

    Args:
        model: a Hugging Face model, sharded or not, with or without adapters.
        tokenizer: its tokenizer.
        directory: must exist.

    Raises:
        OSError: they could not be written; none of the files is in place.
    """
    with task("save the model", stays=True):
        on_first_with_tensors(model, lambda tensors: _save_model(model, tokenizer, pathlib.Path(directory), tensors))


def _save_model(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", directory: pathlib.Path, tensors: WholeTensors
) -> None:
    try:
        sweep(directory)
        with whole(directory, last=MODEL_FILES) as scratch:
            with _valid_generation_config(model, scratch):
                with bars_of_transformers(require("transformers", "hf").utils.logging):
                    _save_weights(model, scratch, tensors)
            tokenizer.save_pretrained(scratch)
    except OSError as error:
        raise OSError(f"{directory}: the model could not be saved ({reason(error)})") from error


def _save_weights(model: "PreTrainedModel", scratch: pathlib.Path, tensors: WholeTensors) -> None:
    """Save a model without its tokenizer into an empty directory."""
    if Processes.of(model).size == 1:
        model.save_pretrained(scratch)
        return
    stored = None if has_adapters(model) else _stored(model, scratch, tensors)
    if stored is None:
        model.save_pretrained(scratch, state_dict=tensors.state(trained=has_adapters(model)))
        return
    split = require("huggingface_hub", "hf").split_state_dict_into_shards_factory(  # as transformers does with whole tensors
        stored.entries,
        get_storage_size=lambda entry: entry.untyped_storage().nbytes(),
        get_storage_id=torch.Tensor.untyped_storage,  # what is cut out of one tensor stays together
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=inspect.signature(type(model).save_pretrained).parameters["max_shard_size"].default,
    )
    for file, names in split.filename_to_tensors.items():
        _write_tensors(scratch / file, names, stored)
    if split.is_sharded:
        index = {"metadata": stored.saved.index_metadata | split.metadata, "weight_map": split.tensor_to_filename}
        (scratch / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


class _Saved(NamedTuple):
    """What ``save_pretrained`` puts into the files of a model.

    Attributes:
        sources: name in the files -> name in the model's state dict, in the order in which they are divided among files.
        metadata: of each file of weights.
        index_metadata: of the index, without ``total_size``.
    """

    sources: dict[str, str]
    metadata: dict[str, str]
    index_metadata: dict[str, int]


class _Stored:
    """The tensors in the files of a model. Each is made of one tensor of the model, which is gathered when it is asked for.

    Attributes:
        saved: their names, and the metadata of the files.
        entries: name in the files -> a tensor of the same shape on the meta device.
    """

    def __init__(self, saved: _Saved, entries: dict[str, torch.Tensor], tensors: WholeTensors, convert: Convert) -> None:
        self.saved = saved
        self.entries = entries
        self._tensors = tensors
        self._convert = convert
        self._pieces: dict[str, dict[str, torch.Tensor]] = {}  # name in the state dict -> what is not yet written of it

    def whole(self, name: str) -> torch.Tensor:
        """Return one tensor, once, in the first process, within `on_first_with_tensors`."""
        source = self.saved.sources[name]
        if source not in self._pieces:
            self._pieces[source] = self._convert({source: self._tensors.whole(source)})
        tensor = self._pieces[source].pop(name)
        if not self._pieces[source]:
            del self._pieces[source]
        return tensor


def _stored(model: "PreTrainedModel", scratch: pathlib.Path, tensors: WholeTensors) -> _Stored | None:
    """Save everything but the weights of a model, and find out how ``save_pretrained`` saves these.

    Returns:
        None if it makes a tensor of several ones of the model, or does not say of which.
    """
    empty = {name: torch.empty(entry.shape, dtype=entry.dtype, device="meta") for name, entry in tensors.entries.items()}
    saved = _save_numbers(model, scratch, tensors)
    if saved is not None:
        names = {source: name for name, source in saved.sources.items()}
        entries = {name: empty[source] for name, source in saved.sources.items()}
        return _Stored(saved, entries, tensors, lambda whole: {names[source]: tensor for source, tensor in whole.items()})
    saved = _save_numbers(model, scratch, tensors, save_original_format=False)  # under the model's own names
    if saved is None:
        return None
    try:
        revert = require("transformers.core_model_loading", "hf").revert_weight_conversion
        entries = revert(model, {source: empty[source] for source in saved.sources})
        made = {source: revert(model, {source: empty[source]}) for source in saved.sources}
    except Exception:  # transformers before 5 has no such function; or it wants several tensors at a time
        return None
    alone = [(name, tensor.shape, tensor.dtype) for pieces in made.values() for name, tensor in pieces.items()]
    if sorted(alone) != sorted((name, tensor.shape, tensor.dtype) for name, tensor in entries.items()):
        return None
    of_piece = {name: source for source, pieces in made.items() for name in pieces}
    saved = saved._replace(sources={name: of_piece[name] for name in entries})
    return _Stored(saved, entries, tensors, functools.partial(revert, model))


def _save_numbers(model: "PreTrainedModel", scratch: pathlib.Path, tensors: WholeTensors, **options: bool) -> _Saved | None:
    """Save everything but the weights of a model, and find out how ``save_pretrained`` saves these with some options.

    Returns:
        None if it does not save the tensors of the model as they are.
    """
    sources = [name for name, first_name in tensors.first_names.items() if name == first_name]
    numbers = {name: torch.tensor(number, device="cpu") for number, name in enumerate(sources)}
    state = {name: numbers[first_name] for name, first_name in tensors.first_names.items()}
    found: dict[str, torch.Tensor] = {}
    metadata: dict[str, str] = {}
    index: dict[str, dict[str, int]] = {"metadata": {}}
    try:
        model.save_pretrained(scratch, state_dict=state, max_shard_size=1, **options)  # a file for each shows their order
        for path in sorted(scratch.glob("*.safetensors")):
            with require("safetensors", "hf").safe_open(path, "pt") as file:
                metadata = file.metadata()
                found |= {name: file.get_tensor(name) for name in file.keys()}
        if (scratch / INDEX_FILE).exists():
            index = json.loads((scratch / INDEX_FILE).read_text(encoding="utf-8"))
    except OSError:
        raise
    except Exception:  # transformers has computed something of a number that has too few dimensions for it
        return None
    finally:
        for path in [*scratch.glob("*.safetensors"), scratch / INDEX_FILE]:
            path.unlink(missing_ok=True)
    if any(number.dim() for number in found.values()) or sorted(map(int, found.values())) != [*range(len(sources))]:
        return None
    return _Saved({name: sources[int(number)] for name, number in found.items()}, metadata, index["metadata"])


def _write_tensors(path: pathlib.Path, names: Sequence[str], stored: _Stored) -> None:
    """Write a file of safetensors a tensor at a time, with the bytes that the library safetensors writes.

    Args:
        path: of the file.
        names: the tensors that it holds.
        stored: all tensors.
    """
    # The library chooses the order of the tensors and the names of dtypes. Both can be read from a file of empty tensors.
    empty = {name: torch.empty(0, dtype=stored.entries[name].dtype, device="cpu") for name in names}
    serialized = require("safetensors.torch", "hf").save(empty, stored.saved.metadata)
    header = json.loads(serialized[8 : 8 + int.from_bytes(serialized[:8], "little")])
    names = [name for name in header if name != "__metadata__"]
    end = 0
    for name in names:
        start = end
        end += stored.entries[name].nbytes
        header[name] |= {"shape": list(stored.entries[name].shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            file.write(stored.whole(name).contiguous().view(-1).view(torch.uint8).numpy().data)


@contextlib.contextmanager
def _valid_generation_config(model: "PreTrainedModel", scratch: pathlib.Path) -> Iterator[None]:
    """Give the model a generation config that transformers agrees to save, for the duration of the block.

    Transformers loads some generation configs that it refuses to save with the model, such as one with a temperature and
    without sampling. The run would end without a model. So the default config is saved instead, with a warning.

    Args:
        model: its own generation config is put back after the block.
        scratch: a scratch directory in which saving is tried.
    """
    original = None if has_adapters(model) else getattr(model, "generation_config", None)
    if original is None:
        yield
        return
    try:
        original.save_pretrained(scratch)
    except ValueError as error:
        lines = str(error).strip().splitlines()
        warnings.warn(f"generation_config.json is a default: the model's is refused ({' '.join(lines[:2])})", stacklevel=2)
        model.generation_config = type(original).from_model_config(model.config)
    try:
        yield
    finally:
        model.generation_config = original

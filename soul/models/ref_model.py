"""The reference model of NPO, DPO, UNDIAL and KL terms, which is the model before unlearning.

Its log-probabilities or hidden states are computed once, before the first step, and may be kept in a cache on disk. A file of a
cache belongs to the weights, the data and the settings that its key was made of, all by content. It is written under another
name and then renamed, so it is never half written. It is used only if key, shape, dtype and checksum are right. These checks
find damage, not forgery: the checksum has no secret, and whoever can write into a cache decides what its readers compute.

Whoever changes how the numbers are computed must raise ``FORMAT``, or put the change into the key, so that older files are
computed again.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from soul._extras import require
from soul.data.batches import Batch, collate
from soul.data.examples import Sequence
from soul.distributed.processes import COMPUTE, Processes, full, gathered, is_sharded_by_others
from soul.models.causal_lm import (
    as_reference,
    autocast,
    check_linear_head,
    device_of,
    has_adapters,
    head,
    hidden_states,
    stored_head,
    token_logps,
)
from soul.models.head_call import call_at_head
from soul.models.quantized import dequantized, scales
from soul.output.directory import check_writable
from soul.output.files import whole
from soul.output.progress import track
from soul_kernels import Head, LinearOptions, linear_logprob
from soul_kernels.backends import resolve_head_backend
from soul_kernels.errors import argument_error
from soul_kernels.tokens import Transform

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FORMAT = 1  # version of the files; older versions are computed again
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of the log-probabilities and hidden states that models yield
HASHED_BYTES = 2**26  # bytes of a tensor that are hashed at a time


@dataclasses.dataclass(frozen=True)
class ReferenceStates:
    """The states of a reference model from which divergences are computed.

    Attributes:
        hidden: for each sequence [n, D], the final hidden states at its n labelled positions, on the CPU, in the dtype that the
            model yields.
        weight: [V, D], the head of the reference model on the model's device. None: the model's own, which is frozen.
        bias: [V] or None.
    """

    hidden: list[Tensor]
    weight: Tensor | None
    bias: Tensor | None


def reference_logps(
    model: "PreTrainedModel",
    dataset: list[Sequence],
    *,
    cache: str | pathlib.Path | None = None,
    batch_size: int = 8,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    backend: str = "auto",
) -> list[float]:
    """Return the summed log-probability of each sequence under the model as it is now, for NPO and DPO.

    They come from the kernels of the loss. In a batch of the same sequences, the loss of the unchanged model therefore has
    the same numbers bit for bit, and a log-ratio of exactly 0. In a batch of other sequences (other padding, other sizes of
    matrix products) they differ by rounding. The model is left as it was; the adapters of a peft model are off while it runs.

    Args:
        model: a Hugging Face causal language model, which peft may have wrapped.
        dataset: list of `soul.data.Sequence`.
        cache: directory in which the numbers are kept and looked up, created if it is missing; None: no cache. The
            numbers of a file that is damaged or belongs to another key are computed again, with a warning. Whoever can write
            there can change the results.
        batch_size: sequences at a time, in the order of the dataset.
        tokenizer: tokenizer of the dataset, whose vocabulary becomes a part of the cache's key; or None.
        backend: "auto", "triton", "compile", "torch" or "reference".

    Returns:
        A list of floats, in nats.

    Raises:
        ArgumentError: the cache is not a directory, the backend does not fit the model's device, or
            `soul.models.check_linear_head` refuses the model.
    """
    weight = head(model)[0]
    device = device_of(model)
    backend = resolve_head_backend(backend, weight)

    def compute() -> Tensor:
        sums = [torch.empty(0, device=device)]
        by_forward = is_sharded_by_others(model)
        with as_reference(model):
            if not by_forward:
                _check_head(model)
            for batch in _batches(dataset, batch_size, device):
                logps = _logps_in_forward(model, batch, backend) if by_forward else token_logps(model, batch, backend).sum(1)
                sums.append(logps)
        return torch.cat(sums).cpu()

    convention = {"batch_size": batch_size, "backend": backend, "sum": "over labelled tokens"}
    return _cached(cache, "logps", (len(dataset),), compute, model, dataset, tokenizer, convention).tolist()


def _logps_in_forward(model: "PreTrainedModel", batch: Batch, backend: str) -> Tensor:
    """Return the summed log-probabilities [B] of a batch, by a forward pass of the model with all its hooks."""

    def sums(hidden: Tensor, weight: Tensor, bias: Tensor | None, transform: Transform) -> Tensor:
        options = LinearOptions(token_indices=batch.token_indices, backend=backend)
        return linear_logprob(hidden, Head(weight, bias, **transform), batch.labels, options=options).sum(1)

    inputs = {"input_ids": batch.input_ids}
    if batch.attention_mask is not None:
        inputs["attention_mask"] = batch.attention_mask
    with autocast(model):
        return call_at_head(model, inputs, sums)


def reference_hidden(
    model: "PreTrainedModel",
    dataset: list[Sequence],
    *,
    cache: str | pathlib.Path | None = None,
    batch_size: int = 8,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
) -> ReferenceStates:
    """Return hidden states of each sequence under the model as it is now, for UNDIAL and KL terms.

    Pass them to `soul.data.batches.collate` as ``ref_hidden``. Then ``batch.ref_hidden`` and the head make the
    `soul_kernels.Reference` of `soul_kernels.linear_objective`. They are as exact as `reference_logps`: at the unchanged model
    a divergence in a batch of the same sequences is exactly 0.

    Args:
        model: a Hugging Face causal language model, which peft may have wrapped.
        dataset: list of `soul.data.Sequence`.
        cache: as in `reference_logps`. The head is not stored, since only the same model has the same key.
        batch_size: sequences at a time, in the order of the dataset.
        tokenizer: as in `reference_logps`.

    Returns:
        `ReferenceStates`. Where the head is trained, its weight is a copy.

    Raises:
        ArgumentError: the cache is not a directory, or `soul.models.check_linear_head` refuses the model.
    """
    weight = head(model)[0]
    device = device_of(model)
    width = weight.shape[1]
    counts = [sequence.n_labels for sequence in dataset]

    def compute() -> Tensor:
        states = [torch.empty(0, width)]
        with as_reference(model):
            _check_head(model)
        with as_reference(model), autocast(model):
            for batch in _batches(dataset, batch_size, device):
                hidden = gathered(model, functools.partial(hidden_states, model, batch)).flatten(0, 1)
                states.append(hidden.index_select(0, batch.token_indices.to(device)).cpu())
        return torch.cat(states[1:] or states)

    convention = {"batch_size": batch_size}
    packed = _cached(cache, "hidden", (sum(counts), width), compute, model, dataset, tokenizer, convention)
    ref_weight, ref_bias = reference_head(model)
    return ReferenceStates(list(packed.split(counts)), ref_weight, ref_bias)


def _check_head(model: "PreTrainedModel") -> None:
    """Raise for a model that `check_linear_head` refuses. `soul.Unlearner` checks a model before it cuts it."""
    if not hasattr(model, COMPUTE):
        check_linear_head(model)


def reference_head(model: "PreTrainedModel") -> tuple[Tensor | None, Tensor | None]:
    """Return weight and bias of the head as it is now, without adapters, to be used while the model is trained.

    A tensor that is trained is copied. (None, None) says that the model's own head is frozen and can be used itself.
    """

    def constant(tensor: Tensor | None) -> Tensor | None:
        return tensor.detach().clone() if tensor is not None and tensor.requires_grad else tensor

    def copies() -> tuple[Tensor | None, Tensor | None]:
        weight, bias = stored_head(model)
        with as_reference(model):
            ref_weight, ref_bias = stored_head(model)
        is_trained = weight.requires_grad or (bias is not None and bias.requires_grad)
        if ref_weight is weight and not is_trained:
            return None, None
        return constant(dequantized(ref_weight)), constant(ref_bias)

    with torch.no_grad():
        return gathered(model, copies)


def check_cache(directory: str | pathlib.Path | None, name: str = "cache") -> None:
    """Raise unless a cache could be kept in a directory; None passes.

    Args:
        directory: directory of the cache, or None.
        name: name of the argument, for errors.

    Raises:
        ArgumentError: it is not a directory, or cannot be written.
        MissingExtra: safetensors is not installed.
    """
    if directory is None:
        return
    require("safetensors.torch", "hf")
    path = pathlib.Path(directory).absolute()
    above = next((parent for parent in (path, *path.parents) if parent.exists()), path)
    if not above.is_dir():
        raise argument_error(name, "a directory, or a new one", f"the file {above}", "choose another one")
    check_writable(name, path)


def _batches(dataset: list[Sequence], size: int, device: torch.device) -> Iterator[Batch]:
    for start in track(range(0, len(dataset), size), "reference pass", stays=True):
        yield collate(dataset[start : start + size], [], device=device)


def _cached(
    cache: str | pathlib.Path | None,
    name: str,
    shape: tuple[int, ...],
    compute: Callable[[], Tensor],
    model: "PreTrainedModel",
    dataset: list[Sequence],
    tokenizer: "PreTrainedTokenizerBase | None",
    convention: Mapping[str, object],
) -> Tensor:
    """Return the tensor of a cache, or compute it and put it there."""
    check_cache(cache)
    if cache is None:
        return compute()
    key = _key(name, model, dataset, tokenizer, convention)
    processes = Processes.of(model)
    path = pathlib.Path(cache) / f"{name}-{key}.safetensors"
    tensor = None
    if path.exists():
        tensor, problem = _read(path, name, key, shape)
        if problem is not None:
            warnings.warn(f"{path}: {problem}; computed again", stacklevel=3)
    is_missing_somewhere = processes.any(tensor is None)
    if tensor is not None and not is_missing_somewhere:
        return tensor
    computed = compute()  # a collective computation: by all processes, even if only one lacks the file
    processes.on_first(lambda: _write(path, name, key, computed))
    return computed


def _read(path: pathlib.Path, name: str, key: str, shape: tuple[int, ...]) -> tuple[Tensor | None, str | None]:
    """Return the tensor of a file and None; or None and what is wrong with the file."""
    try:
        with require("safetensors", "hf").safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensor = file.get_tensor(name).clone()
    except Exception as error:  # the library raises many kinds for a truncated or foreign file
        return None, f"not readable ({type(error).__name__})"
    if metadata.get("key") != key:
        return None, "written for another key"
    if tuple(tensor.shape) != shape:
        return None, f"shape {tuple(tensor.shape)}, expected {shape}"
    if tensor.dtype not in DTYPES:
        return None, f"dtype {tensor.dtype}, expected one of a model's"
    if metadata.get("checksum") != digest({name: tensor}):
        return None, "damaged (checksum)"
    return tensor, None


def _write(path: pathlib.Path, name: str, key: str, tensor: Tensor) -> None:
    """Write a file of the cache, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"key": key, "checksum": digest({name: tensor})}
    with whole(path.parent) as aside:
        require("safetensors.torch", "hf").save_file({name: tensor.contiguous()}, aside / path.name, metadata)


def _key(
    name: str,
    model: "PreTrainedModel",
    dataset: list[Sequence],
    tokenizer: "PreTrainedTokenizerBase | None",
    convention: Mapping[str, object],
) -> str:
    """Return a hash of everything that decides the numbers: configuration, weights, vocabulary, data and settings."""
    parameter = head(model)[0]
    with autocast(model):
        device_type = device_of(model).type
        cast = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
    description = {
        "format": FORMAT,
        "name": name,
        "configuration": configuration(model),
        "transformers": model.config.to_dict().get("transformers_version"),
        "vocabulary": None if tokenizer is None else tokenizer.get_vocab(),
        "data": [[sequence.input_ids, sequence.labels] for sequence in dataset],
        "dtype": str(parameter.dtype),
        "autocast": str(cast),
        "device": device_type,
        "torch": torch.__version__,
        **convention,
    }
    return digest(base_weights(model), json.dumps(description, sort_keys=True, default=str))


def configuration(model: "PreTrainedModel") -> dict[str, Any]:
    """Return the configuration that decides a model's numbers beside its weights, as a dict of JSON values.

    It has the activation, epsilons, dropout and so on, and the implementations of attention and of experts. The path of the
    weights and the version of transformers are left out.
    """
    values = model.config.to_dict()
    for name in ("_name_or_path", "transformers_version"):
        values.pop(name, None)
    for name in ("attn_implementation", "experts_implementation"):
        if getattr(model.config, f"_{name}", None) is not None:
            values[name] = getattr(model.config, f"_{name}")
    return json.loads(json.dumps(values, default=str))


def base_weights(model: torch.nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by name, without those of adapters; with the scales of weights of 4 bits."""
    adapters: tuple[str, ...] = ()
    if has_adapters(model):
        adapters = tuple(
            f"{path}.{name}."
            for path, module in model.named_modules()
            for name in (*getattr(module, "adapter_layer_names", ()), *getattr(module, "other_param_names", ()))
        )
    named = [*model.named_parameters(), *model.named_buffers()]
    named += [item for name, parameter in model.named_parameters() for item in scales(name, parameter).items()]
    return {name: tensor for name, tensor in named if not f"{name}.".startswith(adapters)}


def digest(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """Return blake2b, in hexadecimal, of a text and of the names, dtypes, shapes and bytes of tensors.

    Shards are gathered first, a tensor at a time, so every process must call it.
    """
    hashed = hashlib.blake2b(text.encode(), digest_size=32)
    for name, tensor in tensors.items():
        hashed.update(f"\0{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        flat = full(tensor.detach()).contiguous().view(-1).view(torch.uint8)
        for start in range(0, len(flat), HASHED_BYTES):
            hashed.update(flat[start : start + HASHED_BYTES].cpu().numpy().data)
    return hashed.hexdigest()

"""What the model said before it was changed: the reference of NPO, DPO, UNDIAL and KL terms, computed once and kept on disk.

A file of a cache belongs to the weights, the data and the way of computing that its key was made of, all by content. It is
written to the side and renamed, so it is never half there; and it is trusted only if key, shape, dtype and checksum are right.
These find damage, not forgery: the checksum has no secret, and whoever can write into a cache decides what its readers compute.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
import warnings

import torch

from soul._extras import require
from soul.data.batches import collate
from soul.distributed.processes import COMPUTE, Processes, full, gathered
from soul.models.causal_lm import as_reference, autocast, check_linear_head, has_adapters, head, hidden_states, token_logps
from soul.output.directory import check_writable
from soul.output.files import whole
from soul_kernels.backends import resolve_head_backend
from soul_kernels.errors import argument_error

FORMAT = 1  # of the files; another number makes all older ones stale
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # in which a model yields log-probabilities and hidden states
PART_BYTES = 2**26  # of a tensor at a time go through the hash


@dataclasses.dataclass(frozen=True)
class ReferenceStates:
    """What divergences from a reference are computed from.

    Attributes:
        hidden: list with [n, D] of each sequence: final hidden states at its n labelled positions, on the CPU, in the dtype in
            which the model yields them.
        weight: [V, D], the reference's head on the model's device. None: the model's own, which is frozen.
        bias: [V] or None.
    """

    hidden: list
    weight: torch.Tensor | None
    bias: torch.Tensor | None


def reference_logps(model, dataset, *, cache=None, batch_size=8, tokenizer=None, backend="auto"):
    """Summed log-probability of each sequence under the model as it is now: the reference of NPO and DPO.

    By the kernels of the loss: in a batch of the same sequences, the loss at the unchanged model finds the same numbers bit for
    bit, and a ratio of exactly 0. In other company (padding, sizes of matrix products) they differ by rounding. The model is
    left as it was; of a peft model the adapters are off meanwhile.

    Args:
        model: a Hugging Face causal language model, which peft may have wrapped.
        dataset: list of `soul.data.Sequence`.
        cache: a directory to keep the numbers in and to take them from, created where it is missing; None: neither. A file
            that is not what it should be is computed again, with a warning. Whoever can write there can change the results.
        batch_size: sequences at a time, in the order of the dataset.
        tokenizer: the dataset's, whose vocabulary then is a part of the cache's key.
        backend: "auto", "triton", "compile", "torch" or "reference".

    Returns:
        List of floats, in nats.

    Raises:
        ArgumentError: the cache is not a directory, the backend does not fit the model's device, or
            `soul.models.check_linear_head` refuses the model.
    """
    device, backend = head(model)[0].device, resolve_head_backend(backend, head(model)[0])

    def compute():
        sums = [torch.empty(0, device=device)]
        with as_reference(model):
            _check_head(model)
            for batch in _batches(dataset, batch_size, device):
                sums.append(token_logps(model, batch, backend).sum(1))
        return torch.cat(sums).cpu()

    convention = {"batch_size": batch_size, "backend": backend, "sum": "over labelled tokens"}
    return _kept(cache, "logps", (len(dataset),), compute, model, dataset, tokenizer, convention).tolist()


def reference_hidden(model, dataset, *, cache=None, batch_size=8, tokenizer=None):
    """Hidden states of each sequence under the model as it is now: the reference of UNDIAL and of KL terms.

    Give them to `soul.data.batches.collate` (``ref_hidden``), and ``batch.ref_hidden`` with the head, as a
    `soul_kernels.Reference`, to `soul_kernels.linear_objective`. As exact as `reference_logps`: at the unchanged model a
    divergence in a batch of the same sequences is exactly 0.

    Args:
        model: as in `reference_logps`, and so are the others.
        dataset: list of `soul.data.Sequence`.
        cache: a directory, or None. The head is not stored: the key vouches that the model has it.
        batch_size: sequences at a time.
        tokenizer: the dataset's, or None.

    Returns:
        `ReferenceStates`. Where the head is trained, its weight is a copy.

    Raises:
        ArgumentError: the cache is not a directory, or `soul.models.check_linear_head` refuses the model.
    """
    device, width = head(model)[0].device, head(model)[0].shape[1]
    counts = [sequence.n_labels for sequence in dataset]

    def compute():
        states = [torch.empty(0, width)]
        with as_reference(model):
            _check_head(model)
        with as_reference(model), autocast(model):
            for batch in _batches(dataset, batch_size, device):
                hidden = gathered(model, functools.partial(hidden_states, model, batch)).flatten(0, 1)
                states.append(hidden.index_select(0, batch.rows.to(device)).cpu())
        return torch.cat(states[1:] or states)

    convention = {"batch_size": batch_size}
    packed = _kept(cache, "hidden", (sum(counts), width), compute, model, dataset, tokenizer, convention)
    return ReferenceStates(list(packed.split(counts)), *reference_head(model))


def _check_head(model):
    """Raises for a model with logits of its own kind. One in shards was checked by `soul.Unlearner` before it was cut."""
    if not hasattr(model, COMPUTE):
        check_linear_head(model)


def reference_head(model):
    """Weight and bias of the head as it is now, without adapters, for as long as the model is trained: copies of what is
    trained. (None, None) where the model's own head is frozen and serves.
    """

    def copies():
        own = head(model)
        with as_reference(model):
            frozen = head(model)
        if frozen[0] is own[0] and not any(tensor is not None and tensor.requires_grad for tensor in own):
            return None, None
        return tuple(t if t is None or not t.requires_grad else t.detach().clone() for t in frozen)

    with torch.no_grad():
        return gathered(model, copies)


def check_cache(directory, name="cache"):
    """Raises unless a cache could be kept in ``directory``, the argument ``name``; None passes.

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


def _batches(dataset, size, device):
    for start in range(0, len(dataset), size):
        yield collate(dataset[start : start + size], [], device=device)


def _kept(cache, name, shape, compute, *what):
    """The tensor of a cache, or a new one, which is then put there."""
    check_cache(cache)
    if cache is None:
        return compute()
    key, processes = _key(name, *what), Processes.of(what[0])
    path, tensor = pathlib.Path(cache) / f"{name}-{key}.safetensors", None
    if path.exists():
        tensor, wrong = _read(path, name, key, shape)
        if wrong is not None:
            warnings.warn(f"{path}: {wrong}; computed again", stacklevel=3)
    if not processes.any(tensor is None):
        return tensor
    tensor = compute()  # in all processes, where one of them has not found it
    processes.on_first(lambda: _write(path, name, key, tensor))
    return tensor


def _read(path, name, key, shape):
    """The tensor of a file and None; or None and what is wrong with it."""
    try:
        with require("safetensors", "hf").safe_open(path, framework="pt") as file:
            metadata, tensor = file.metadata() or {}, file.get_tensor(name).clone()
    except Exception as error:  # whatever the library says of a truncated or foreign file
        return None, f"not readable ({type(error).__name__})"
    if metadata.get("key") != key:
        return None, "made of something else"
    if tuple(tensor.shape) != shape:
        return None, f"shape {tuple(tensor.shape)}, expected {shape}"
    if tensor.dtype not in DTYPES:
        return None, f"of {tensor.dtype}"
    if metadata.get("checksum") != digest({name: tensor}):
        return None, "damaged (checksum)"
    return tensor, None


def _write(path, name, key, tensor):
    """All or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"key": key, "checksum": digest({name: tensor})}
    with whole(path.parent) as aside:
        require("safetensors.torch", "hf").save_file({name: tensor.contiguous()}, aside / path.name, metadata)


def _key(name, model, dataset, tokenizer, convention):
    """Hash of everything that decides the numbers: configuration, weights, vocabulary, data, and how they are computed."""
    parameter = head(model)[0]
    with autocast(model):
        device_type = parameter.device.type
        cast = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
    about = {
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
    return digest(base_weights(model), json.dumps(about, sort_keys=True, default=str))


def configuration(model):
    """Return the configuration of a model that decides its numbers beside its weights, as a dict of JSON values: activation,
    epsilons, dropout and so on, and which implementation of attention (and of experts) runs. Where the weights lie is no part
    of it, nor is the version of transformers.
    """
    values = model.config.to_dict()
    for name in ("_name_or_path", "transformers_version"):
        values.pop(name, None)
    for name in ("attn_implementation", "experts_implementation"):
        if getattr(model.config, f"_{name}", None) is not None:
            values[name] = getattr(model.config, f"_{name}")
    return json.loads(json.dumps(values, default=str))


def base_weights(model):
    """Parameters and buffers by name, without those of adapters."""
    adapters = tuple(
        f"{name}.{part}."
        for name, module in (model.named_modules() if has_adapters(model) else ())
        for part in (*getattr(module, "adapter_layer_names", ()), *getattr(module, "other_param_names", ()))
    )
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor for name, tensor in named if not f"{name}.".startswith(adapters)}


def digest(tensors, text=""):
    """blake2b, in hexadecimal, of a text and of names, dtypes, shapes and bytes; a part of a tensor at a time. Shards are
    gathered first, a tensor at a time: every process must call it.
    """
    found = hashlib.blake2b(text.encode(), digest_size=32)
    for name, tensor in tensors.items():
        found.update(f"\0{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        flat = full(tensor.detach()).contiguous().view(-1).view(torch.uint8)
        for start in range(0, len(flat), PART_BYTES):
            found.update(flat[start : start + PART_BYTES].cpu().numpy())
    return found.hexdigest()

"""Bytes of every component in every phase of a step; the phase with the largest sum is the peak.

A step has two or three phases: the forward pass with the loss, the backward pass, and the optimizer's step. `phases` adds what
is allocated all the time (`resident`) to what is allocated in the phase. For the backward pass the largest of three moments
counts: as the loss hands over its gradients, in the last layer, and in the first layer.

A component without bytes is left out of the table. A new tensor of the run belongs in the functions of all the phases in which
it is alive; tests/plan/test_plan.py compares the sums with steps of small models, within 15%.
"""

import collections
import functools
import math
from typing import NamedTuple

import torch

from soul.models.quantized import BLOCK
from soul.optim.offload import BUCKET_BYTES
from soul.optim.states import new_state
from soul.plan.activations import FLOAT, forward_bytes, last_norm_bytes, recomputed_bytes, saved_bytes, working_bytes
from soul.plan.case import Case, numel_of
from soul_kernels.chunks import memory_share, row_bytes
from soul_kernels.lookup import round_size
from soul_kernels.reference.token_logprob import N_BASIC

FORWARD, BACKWARD, STEP = "forward and loss", "backward", "optimizer step"
TOKEN_NUMBERS = 18  # bytes for each token that is looked up: its row twice, and two masks


class Share(NamedTuple):
    """Bytes on one GPU, or in main memory for it.

    Attributes:
        cut: of what FSDP2 cuts into shards, which ``cpu_offload`` moves to main memory.
        rows: of head and embeddings that stay in shards of rows; these are always on the GPU.
    """

    cut: float
    rows: float

    @classmethod
    def of(cls, case: Case, cut: float, rows: float) -> "Share":
        """Return the share of one GPU of bytes that lie over the GPUs of a copy, and of such that lie over all of them."""
        return cls(cut / case.shards, rows / case.gpus)

    @property
    def total(self) -> float:
        """Bytes of both."""
        return self.cut + self.rows

    def on_gpu(self, case: Case) -> float:
        """Return the bytes that are on the GPU."""
        return self.rows if case.cpu_offload else self.total


def phases(case: Case) -> dict[str, dict[str, int]]:
    """Return phase -> component -> bytes, on one GPU. With gradient release the step belongs to the backward pass.

    The forward pass is largest at its end, in the loss. For the backward pass the largest moment counts.
    """
    accumulated = gradient_bytes(case) if case.config.accumulate > 1 else 0
    first = [_in_a_layer, _in_the_loss] + ([_looked_up] if case.looks_up else [])
    forward = max((moment(case, accumulated) for moment in first), key=_sum)
    moments = [_loss_backward, _last_layer, _first_layer]
    moments += [_layer_before_last, _layer_scattered, _rest_scattered] if case.gpus > 1 else []
    moments += [_lookup_backward] if case.looks_up and case.adapters is None else []
    backward = max((moment(case, accumulated) for moment in moments), key=_sum)
    by_phase = {FORWARD: forward, BACKWARD: backward}
    if not case.config.gradient_release:
        by_phase[STEP] = {"gradients": gradient_bytes(case)}
    always = resident(case)
    return {
        phase: {name: math.ceil(size) for name, size in (always | components).items() if size}
        for phase, components in by_phase.items()
    }


def _sum(components: dict[str, float]) -> float:
    return sum(components.values())


def resident(case: Case) -> dict[str, float]:
    """Return component -> bytes of what is allocated all the time on each GPU; with several GPUs, shards of it."""
    sizes: dict[str, float] = {"parameters": case.code_bytes + parameter_share(case).on_gpu(case)}
    if not case.cpu_offload:
        sizes |= {"adapters": adapter_bytes(case) / case.shards}
    if case.config.state_offload:
        sizes["states on their way"] = 2 * min(BUCKET_BYTES, host_bytes(case))
    else:
        sizes |= {name: share.on_gpu(case) for name, share in state_shares(case).items()}
    if case.has_divergence and case.adapters is None:  # a copy of the head, and the hidden states of a batch
        parts = case.gpus if case.head_in_shards else 1
        sizes["reference"] = _head_bytes(case) / parts + _hidden_bytes(case)
    return {name: size for name, size in sizes.items() if size}


def parameter_share(case: Case) -> Share:
    """Return the bytes of all parameters that are cut, without adapters."""
    rows = numel_of(case.vocabulary)
    size = case.parameter_dtype.itemsize
    return Share.of(case, (case.cut_numel - rows) * size, rows * size)


def adapter_bytes(case: Case) -> int:
    """Return the bytes of all adapters."""
    return 0 if case.adapters is None else trained_numel(case) * case.trained_dtype.itemsize


def host_bytes(case: Case) -> float:
    """Return the bytes in main memory for each GPU: offloaded states; or shards of parameters, gradients and states."""
    states = state_shares(case).values()
    if case.cpu_offload:
        shares = parameter_share(case), gradient_share(case), *states
        return sum(share.cut for share in shares) + adapter_bytes(case) / case.shards
    return sum(share.total for share in states) if case.config.state_offload else 0


def state_shares(case: Case) -> dict[str, Share]:
    """Return component -> bytes of the optimizer's states of all trained parameters, as `soul.optim.states` makes them."""
    cut, rows = (_state_bytes(case, sizes) for sizes in case.trained_parts)
    return {name: Share.of(case, cut.get(name, 0), rows.get(name, 0)) for name in {**cut, **rows}}


def _state_bytes(case: Case, sizes: "collections.Counter[tuple[int, ...]]") -> dict[str, int]:
    """Return component -> bytes of the states of some parameters: shape -> number of such ones."""
    if case.config.optimizer == "adamw":
        return {"optimizer states": 2 * case.trained_dtype.itemsize * numel_of(sizes)}
    states: collections.Counter[str] = collections.Counter()
    for shape, count in sizes.items():
        state = _sizes_of_state(shape, case.trained_dtype, case.config.state_dtype, case.config.param_rounding)
        for name, nbytes in state.items():
            states["low bits" if name == "low_bits" else "optimizer states"] += count * nbytes
    return dict(states)


@functools.lru_cache(maxsize=1024)
def _sizes_of_state(shape: tuple[int, ...], dtype: torch.dtype, state_dtype: str | None, param_rounding: str) -> dict[str, int]:
    """Return name -> bytes of the states of a parameter."""
    group = {"state_dtype": state_dtype, "param_rounding": param_rounding, "state_offload": False}
    state = new_state(torch.empty(shape, dtype=dtype, device="meta"), group, ())
    return {name: tensor.nbytes for name, tensor in state.items()}


def gradient_share(case: Case) -> Share:
    """Return the bytes of all gradients."""
    cut, rows = (numel_of(sizes) * case.trained_dtype.itemsize for sizes in case.trained_parts)
    return Share.of(case, cut, rows)


def gradient_bytes(case: Case) -> float:
    """Return the bytes of all gradients on a GPU; with several GPUs, of the shards on each."""
    return gradient_share(case).on_gpu(case)


def trained_numel(case: Case) -> int:
    """Return the number of trained elements."""
    return sum(map(numel_of, case.trained_parts))


def gathered_bytes(case: Case, layers: int = 2) -> float:
    """Return the bytes of whole parameters on each GPU under FSDP2; 0 on one GPU.

    What is outside of the layers stays whole from the forward to the backward pass. Shards in main memory come up before they
    are gathered.

    Args:
        case: the case.
        layers: number of layers that are whole at a time: the one in use and the next one.
    """
    if case.gpus == 1:
        return 0
    layer = case.whole_layer_numel * case.parameter_dtype.itemsize
    if case.adapters is not None:
        layer += case.whole_trained_numel * case.trained_dtype.itemsize
    on_its_way = layer / case.shards if case.cpu_offload else 0
    return layers * layer + case.whole_rest_numel * case.parameter_dtype.itemsize + on_its_way


def scattered_bytes(case: Case) -> float:
    """Return the bytes of the whole gradients of a layer on their way to their shards under FSDP2, which are fp32."""
    return FLOAT * case.whole_trained_numel if case.gpus > 1 else 0


def _head_bytes(case: Case) -> int:
    return case.shape.head_numel * case.parameter_dtype.itemsize


def _hidden_bytes(case: Case) -> int:
    """Return the bytes of the hidden states of all tokens as they go into the head."""
    return case.tokens.n * case.shape.head_width * case.compute_dtype.itemsize


def _in_the_loss(case: Case, accumulated: float) -> dict[str, float]:
    """Return component -> bytes at the end of the forward pass, in the fused loss: see `soul_kernels.linear_loss`.

    A head in shards is used in rounds, in which every process puts in a chunk: each computes its part of the vocabulary for all
    of these rows.
    """
    shape = case.shape
    options = case.head_options
    rows = case.tokens.n_labelled
    compared = case.n_compared(case.tokens)
    limit = case.chunk_rows
    together = case.gpus if case.head_in_shards else 1
    plain = together * row_bytes(case.columns, options, False)
    with_reference = together * row_bytes(case.columns, options, True)
    bytes_of_row = shape.head_width * options.compute_dtype.itemsize + N_BASIC * FLOAT  # hidden states and statistics
    hidden = _hidden_bytes(case) + rows * (bytes_of_row + shape.head_width * FLOAT) + compared * bytes_of_row
    if case.has_divergence and case.adapters is not None:
        hidden += _hidden_bytes(case)  # a forward without the adapters
    if case.head_in_shards:  # the hidden states of a round, and their gradient
        hidden += case.gpus * min(rows, limit) * shape.head_width * (options.compute_dtype.itemsize + FLOAT)
    return {
        "gradients": accumulated,
        "activations": saved_bytes(case) + last_norm_bytes(case),
        "logits of a chunk": min(rows, limit) * plain + min(compared, limit) * (with_reference - plain),
        "hidden states at the head": hidden,
        "head's gradient in fp32": _fp32_head_gradient(case),
        "bf16 copies of matrices": _bf16_copies(case) + (2 * shape.head_numel if case.casts else 0),
        "gathered from shards": gathered_bytes(case),
    }


def _in_a_layer(case: Case, accumulated: float) -> dict[str, float]:
    """Return component -> bytes in the forward pass of the last layer, with checkpointing; without it the loss takes more."""
    return {
        "gradients": accumulated,
        "activations": saved_bytes(case) + forward_bytes(case),
        "bf16 copies of matrices": _bf16_copies(case),
        "dequantized weights": _dequantized(case),
        "gathered from shards": gathered_bytes(case),
    }


def _dequantized(case: Case) -> float:
    """Return the bytes of the largest weight of 4 bits as its product takes it, with its scales in fp32."""
    if not case.load_in_4bit:
        return 0
    numel = max(map(math.prod, case.shape.linear.values()))
    return numel * (case.compute_dtype.itemsize + FLOAT / BLOCK)


def _fp32_head_gradient(case: Case) -> float:
    whole = case.shape.head_numel * FLOAT if case.adapters is None else 0
    return whole / case.gpus if case.head_in_shards else whole


def _bf16_copies(case: Case) -> int:
    """Return the bytes of the bf16 copies of the layers' matrices under autocast."""
    return 2 * case.shape.linear_numel if case.casts else 0


def _loss_backward(case: Case, accumulated: float) -> dict[str, float]:
    """Return component -> bytes as the loss hands over its gradients: all activations are still alive."""
    rows = case.tokens.n_labelled * case.shape.head_width * (FLOAT + case.compute_dtype.itemsize)
    return {
        "gradients": accumulated + _head_gradient(case),
        "activations": saved_bytes(case) + last_norm_bytes(case),
        "hidden states at the head": rows + _hidden_bytes(case),
        "head's gradient in fp32": _fp32_head_gradient(case),
        "bf16 copies of matrices": _bf16_copies(case),
        "gathered from shards": gathered_bytes(case),
    }


def _last_layer(case: Case, accumulated: float) -> dict[str, float]:
    """Return component -> bytes in the backward pass of the last layer, which comes first."""
    pending = _pending_gradients(case) if case.config.gradient_release else _head_gradient(case)
    return _in_a_layers_backward(case, accumulated + pending, saved_bytes(case))


def _first_layer(case: Case, accumulated: float) -> dict[str, float]:
    """Return component -> bytes in the backward pass of the first layer and the embedding, when all gradients exist."""
    gradients = accumulated or gradient_bytes(case) - _largest_gradient(case) / case.shards
    if case.config.gradient_release:
        embedding = _head_gradient(case)  # has the same size
        gradients = accumulated + max(0, embedding - _largest_gradient(case))
    if case.config.gradient_release or accumulated or not case.head_in_shards:  # else it is among all gradients
        gradients += _pending_gradients(case)
    components = _in_a_layers_backward(case, gradients, saved_bytes(case) / case.shape.layers)
    components["bf16 copies of matrices"] = 0
    components["gathered from shards"] += scattered_bytes(case)
    return components


def _layer_before_last(case: Case, accumulated: float) -> dict[str, float]:
    """Return component -> bytes in the backward pass of the last but one layer, with the last one's gradients on their way."""
    saved = saved_bytes(case) * (1 - 1 / case.shape.layers)
    components = _in_a_layers_backward(case, accumulated + _pending_gradients(case), saved)
    components["gathered from shards"] += scattered_bytes(case)
    return components


def _layer_scattered(case: Case, accumulated: float) -> dict[str, float]:
    """Return component -> bytes as FSDP2 copies the gradients of the last layer into an fp32 tensor, which it scatters."""
    whole = case.whole_trained_numel * case.trained_dtype.itemsize
    return {
        "gradients": accumulated + _pending_gradients(case) + whole,
        "activations": saved_bytes(case) * (1 - 1 / case.shape.layers),
        "gradients of activations": 2 * case.tokens.n * case.shape.hidden * case.compute_dtype.itemsize,
        "gathered from shards": gathered_bytes(case, layers=1) + scattered_bytes(case),
    }


def _rest_scattered(case: Case, accumulated: float) -> dict[str, float]:
    """Return component -> bytes at the end of the backward pass, as FSDP2 does so with what is outside of the layers."""
    trained = case.whole_rest_numel if case.adapters is None else 0
    gradients = accumulated or (0 if case.config.gradient_release else gradient_bytes(case))
    return {
        "gradients": gradients + trained * case.parameter_dtype.itemsize,
        "gathered from shards": FLOAT * trained,
    }


def _in_a_layers_backward(case: Case, gradients: float, saved: float) -> dict[str, float]:
    """Return component -> bytes in the backward pass of a layer, as the gradient of its largest matrix is formed.

    Args:
        case: the case.
        gradients: bytes of the gradients that exist before.
        saved: bytes of what the layers have saved that are not through.
    """
    return {
        "gradients": gradients + _largest_gradient(case),
        "activations": saved + recomputed_bytes(case),
        "gradients of activations": working_bytes(case),
        "bf16 copies of matrices": _bf16_copies(case),
        "dequantized weights": _dequantized(case),
        "gathered from shards": gathered_bytes(case),
    }


def _largest_gradient(case: Case) -> int:
    """Return the bytes of the largest gradient of a matrix in a layer; those of adapters are left out."""
    return max(map(math.prod, case.shape.linear.values())) * case.parameter_dtype.itemsize if case.adapters is None else 0


def _head_gradient(case: Case) -> float:
    """Return the bytes of the head's gradient in the dtype of the parameter; the embedding's has the same size."""
    if case.adapters is not None:
        return 0
    return _head_bytes(case) / (case.gpus if case.head_in_shards else 1)


def _pending_gradients(case: Case) -> float:
    """Return the bytes of the head's gradient while it waits for the end of the backward pass.

    The gradient of a tied head waits for the embedding's, to which it is added. FSDP2 scatters all gradients of parameters
    outside of the layers together: until then the head's is whole. That of an untied head in shards is complete at once; only
    if it is not added to others, nor released, does it stay.
    """
    stays = case.gpus > 1
    if case.head_in_shards:
        stays = case.config.accumulate == 1 and not case.config.gradient_release
    return _head_gradient(case) if stays or case.shape.tied else 0


def _round_tokens(case: Case) -> int:
    """Return the number of tokens in a round in which embeddings are looked up in shards, of all GPUs together."""
    assert case.shape.embedding is not None
    size = case.parameter_dtype.itemsize
    budget = memory_share(case.card.memory)
    return case.gpus * min(case.tokens.n, round_size(case.shape.embedding[1], size, case.gpus, budget))


def _embedded_bytes(case: Case, tokens: int) -> int:
    """Return the bytes of the embeddings of some tokens."""
    assert case.shape.embedding is not None
    return tokens * case.shape.embedding[1] * case.parameter_dtype.itemsize


def _looked_up(case: Case, accumulated: float) -> dict[str, float]:
    """Return component -> bytes as embeddings are looked up in shards, at the beginning of the forward pass."""
    tokens = _round_tokens(case)
    return {
        "gradients": accumulated,
        "activations": _embedded_bytes(case, case.tokens.n),
        "embeddings of a round": _embedded_bytes(case, tokens) + TOKEN_NUMBERS * tokens,
        "gathered from shards": case.whole_rest_numel * case.parameter_dtype.itemsize,
    }


def _lookup_backward(case: Case, accumulated: float) -> dict[str, float]:
    """Return component -> bytes as the gradient of embeddings in shards is formed, at the end of the backward pass.

    The gradients of a round come in their own dtype, and are copied to fp32. Their sums exist twice: of the round, and of all
    rounds.
    """
    assert case.shape.embedding is not None
    tokens = _round_tokens(case)
    sums = FLOAT * math.prod(case.shape.embedding) / case.gpus
    in_fp32 = FLOAT * tokens * case.shape.embedding[1]
    copied = 0 if case.parameter_dtype.itemsize == FLOAT else _embedded_bytes(case, tokens)
    gradients = accumulated or (_pending_gradients(case) if case.config.gradient_release else gradient_bytes(case))
    return {
        "gradients": gradients,
        "gradients of activations": _embedded_bytes(case, case.tokens.n),
        "embeddings of a round": in_fp32 + max(copied, sums) + TOKEN_NUMBERS / 2 * tokens + sums,
        "gathered from shards": scattered_bytes(case),
    }

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

import torch

from soul.optim.offload import BUCKET_BYTES
from soul.optim.states import new_state
from soul.plan.activations import FLOAT, last_norm_bytes, recomputed_bytes, saved_bytes, working_bytes
from soul.plan.case import Case
from soul_kernels.chunks import row_bytes
from soul_kernels.reference.token_logprob import N_BASIC

FORWARD, BACKWARD, STEP = "forward and loss", "backward", "optimizer step"


def phases(case: Case) -> dict[str, dict[str, int]]:
    """Return phase -> component -> bytes, on one GPU. With gradient release the step belongs to the backward pass.

    The forward pass is largest at its end, in the loss. For the backward pass the largest moment counts.
    """
    accumulated = gradient_bytes(case) if case.config.accumulate > 1 else 0
    activations = saved_bytes(case) + last_norm_bytes(case)
    forward = {"gradients": accumulated, "activations": activations} | _loss(case)
    moments = [_loss_backward(case, accumulated), _last_layer(case, accumulated), _first_layer(case, accumulated)]
    backward = max(moments, key=lambda components: sum(components.values()))
    forward["gathered from shards"] = gathered_bytes(case)
    backward["gathered from shards"] = gathered_bytes(case) + scattered_bytes(case)
    by_phase = {FORWARD: forward, BACKWARD: backward}
    if not case.config.gradient_release:
        by_phase[STEP] = {"gradients": gradient_bytes(case)}
    always = resident(case)
    return {
        phase: {name: math.ceil(size) for name, size in (always | components).items() if size}
        for phase, components in by_phase.items()
    }


def resident(case: Case) -> dict[str, float]:
    """Return component -> bytes of what is allocated all the time on each GPU; with several GPUs, shards of it."""
    whole = {"parameters": case.shape.numel * case.parameter_dtype.itemsize}
    if case.adapters is not None:
        whole["adapters"] = trained_numel(case) * case.trained_dtype.itemsize
    if not case.config.state_offload:
        whole |= state_bytes(case)
    sizes = {name: size / case.gpus for name, size in whole.items()}
    if case.config.state_offload:
        sizes["states on their way"] = 2 * min(BUCKET_BYTES, host_bytes(case))
    if case.has_divergence and case.adapters is None:  # a copy of the head, and the hidden states of a batch
        sizes["reference"] = _head_bytes(case) + _hidden_bytes(case)
    return sizes


def host_bytes(case: Case) -> float:
    """Return the bytes of states in main memory for each GPU: 0 unless they are offloaded."""
    return sum(state_bytes(case).values()) / case.gpus if case.config.state_offload else 0


def state_bytes(case: Case) -> dict[str, int]:
    """Return component -> bytes of the optimizer's states of all trained parameters, as `soul.optim.states` makes them."""
    if case.config.optimizer == "adamw":
        return {"optimizer states": 2 * case.trained_dtype.itemsize * trained_numel(case)}
    sizes: collections.Counter[str] = collections.Counter()
    for shape, count in collections.Counter(case.trained_shapes).items():
        state = _sizes_of_state(shape, case.trained_dtype, case.config.state_dtype, case.config.param_rounding)
        for name, nbytes in state.items():
            sizes["low bits" if name == "low_bits" else "optimizer states"] += count * nbytes
    return dict(sizes)


@functools.lru_cache(maxsize=1024)
def _sizes_of_state(shape: tuple[int, ...], dtype: torch.dtype, state_dtype: str | None, param_rounding: str) -> dict[str, int]:
    """Return name -> bytes of the states of a parameter."""
    group = {"state_dtype": state_dtype, "param_rounding": param_rounding, "state_offload": False}
    state = new_state(torch.empty(shape, dtype=dtype, device="meta"), group, ())
    return {name: tensor.nbytes for name, tensor in state.items()}


def gradient_bytes(case: Case) -> float:
    """Return the bytes of all gradients; with several GPUs, of the shards on each."""
    return trained_numel(case) * case.trained_dtype.itemsize / case.gpus


def trained_numel(case: Case) -> int:
    """Return the number of trained elements."""
    return sum(map(math.prod, case.trained_shapes))


def gathered_bytes(case: Case) -> float:
    """Return the bytes of whole parameters on each GPU under FSDP2; 0 on one GPU.

    Two layers are whole at a time, the one in use and the next one. What is outside of the layers stays whole from the forward
    to the backward pass.
    """
    shape = case.shape
    return (2 * shape.layer_numel + shape.outside_numel) * case.parameter_dtype.itemsize if case.gpus > 1 else 0


def scattered_bytes(case: Case) -> float:
    """Return the bytes of whole gradients on each GPU under FSDP2.

    These are two layers: one whose gradients are being formed, and one whose gradients are on their way to their shards.
    """
    return 2 * case.shape.layer_numel * case.parameter_dtype.itemsize if case.gpus > 1 and case.adapters is None else 0


def _head_bytes(case: Case) -> int:
    return case.shape.head_numel * case.parameter_dtype.itemsize


def _hidden_bytes(case: Case) -> int:
    """Return the bytes of the hidden states of all tokens as they go into the head."""
    return case.tokens.n * case.shape.head_width * case.compute_dtype.itemsize


def _loss(case: Case) -> dict[str, float]:
    """Return component -> bytes of the fused loss at its largest: see `soul_kernels.linear_loss`."""
    shape = case.shape
    options = case.head_options
    rows = case.tokens.n_labelled
    compared = case.n_compared(case.tokens)
    limit = case.chunk_rows
    plain = row_bytes(shape.vocab, options, False)
    with_reference = row_bytes(shape.vocab, options, True)
    bytes_of_row = shape.head_width * options.compute_dtype.itemsize + N_BASIC * FLOAT  # hidden states and statistics
    hidden = _hidden_bytes(case) + rows * (bytes_of_row + shape.head_width * FLOAT) + compared * bytes_of_row
    if case.has_divergence and case.adapters is not None:
        hidden += _hidden_bytes(case)  # a forward without the adapters
    return {
        "logits of a chunk": min(rows, limit) * plain + min(compared, limit) * (with_reference - plain),
        "hidden states at the head": hidden,
        "head's gradient in fp32": _fp32_head_gradient(case),
        "bf16 copies of matrices": _bf16_copies(case) + (2 * shape.head_numel if case.casts else 0),
    }


def _fp32_head_gradient(case: Case) -> int:
    return case.shape.head_numel * FLOAT if case.adapters is None else 0


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
    }


def _last_layer(case: Case, accumulated: float) -> dict[str, float]:
    """Return component -> bytes in the backward pass of the last layer, which comes first."""
    largest = max(map(math.prod, case.shape.linear.values())) * case.parameter_dtype.itemsize
    new = _pending_gradients(case) + largest if case.config.gradient_release else _head_gradient(case)
    return {
        "gradients": accumulated + new,
        "activations": saved_bytes(case) + recomputed_bytes(case),
        "gradients of activations": working_bytes(case),
        "bf16 copies of matrices": _bf16_copies(case),
    }


def _first_layer(case: Case, accumulated: float) -> dict[str, float]:
    """Return component -> bytes in the backward pass of the first layer and the embedding, when all gradients exist."""
    gradients = accumulated or gradient_bytes(case)
    if case.config.gradient_release:
        gradients = accumulated + _head_gradient(case)  # the embedding's has the same size
    return {
        "gradients": gradients + _pending_gradients(case),
        "activations": saved_bytes(case) / case.shape.layers + recomputed_bytes(case),
        "gradients of activations": working_bytes(case),
    }


def _head_gradient(case: Case) -> int:
    """Return the bytes of the head's gradient in the dtype of the parameter; the embedding's has the same size."""
    return _head_bytes(case) if case.adapters is None else 0


def _pending_gradients(case: Case) -> float:
    """Return the bytes of the gradients that stay whole until the end of the backward pass.

    The gradient of a tied head waits for the embedding's, to which it is added. FSDP2 scatters all gradients of parameters
    outside of the layers together.
    """
    if case.gpus > 1 and case.adapters is None:
        return case.shape.outside_numel * case.parameter_dtype.itemsize
    return _head_gradient(case) if case.shape.tied else 0

"""Bytes of every part in every phase of a step; the phase with the largest sum is the peak."""

import collections
import math

import torch

from soul.optim.states import new_state
from soul.plan.activations import FLOAT, again_bytes, kept_bytes, last_norm_bytes, working_bytes
from soul_kernels.chunks import chunk_rows, row_bytes
from soul_kernels.reference.token_logprob import N_BASIC

FORWARD, BACKWARD, STEP = "forward and loss", "backward", "optimizer step"


def phases(case):
    """Phase -> part -> bytes, on one GPU. With gradient release the step is a part of the backward pass.

    The forward pass is largest at its end, in the loss. Of the backward pass the largest moment counts.
    """
    always, held = resident(case), gradient_bytes(case) if case.config.accumulate > 1 else 0
    forward = {"gradients": held, "activations": kept_bytes(case) + last_norm_bytes(case)} | _loss(case)
    moments = [_loss_backward(case, held), _last_layer(case, held), _first_layer(case, held)]
    backward = max(moments, key=lambda parts: sum(parts.values()))
    found = {FORWARD: forward, BACKWARD: backward}
    forward["gathered from shards"] = gathered_bytes(case)
    backward["gathered from shards"] = gathered_bytes(case) + scattered_bytes(case)
    if not case.config.gradient_release:
        found[STEP] = {"gradients": gradient_bytes(case)}
    return {phase: {part: math.ceil(size) for part, size in (always | parts).items() if size} for phase, parts in found.items()}


def resident(case):
    """Part -> bytes of what is there all the time; shards of it on each of several GPUs."""
    found = {"parameters": case.shape.numel * case.parameter_dtype.itemsize}
    if case.adapters is not None:
        found["adapters"] = trained_numel(case) * case.trained_dtype.itemsize
    found = {part: size / case.gpus for part, size in (found | state_bytes(case)).items()}
    if case.compares and case.adapters is None:  # a copy of the head, and the hidden states of a batch
        found["reference"] = _head_bytes(case) + _hidden_bytes(case)
    return found


def state_bytes(case):
    """Part -> bytes of the optimizer's states, of everything that is trained; as `soul.optim.states` makes them."""
    if case.config.optimizer == "adamw":
        return {"optimizer states": 2 * case.trained_dtype.itemsize * trained_numel(case)}
    found = collections.Counter()
    group = {"state_dtype": case.config.state_dtype, "param_rounding": case.config.param_rounding}
    for size, count in collections.Counter(case.trained).items():
        state = new_state(torch.empty(size, dtype=case.trained_dtype, device="meta"), group, ())
        for name, tensor in state.items():
            found["low bits" if name == "low_bits" else "optimizer states"] += count * tensor.nbytes
    return dict(found)


def gradient_bytes(case):
    """Bytes of all gradients; shards of them on each of several GPUs."""
    return trained_numel(case) * case.trained_dtype.itemsize / case.gpus


def trained_numel(case):
    """How many parameters are trained."""
    return sum(map(math.prod, case.trained))


def gathered_bytes(case):
    """Bytes of whole parameters under FSDP2: two layers, one in use and the next one, and what is outside of the layers, which
    stays from the forward to the backward pass. 0 on one GPU.
    """
    shape = case.shape
    return (2 * shape.layer_numel + shape.outside_numel) * case.parameter_dtype.itemsize if case.gpus > 1 else 0


def scattered_bytes(case):
    """Bytes of whole gradients under FSDP2: of two layers, one in the making and one on its way to its shards."""
    return 2 * case.shape.layer_numel * case.parameter_dtype.itemsize if case.gpus > 1 and case.adapters is None else 0


def _head_bytes(case):
    return case.shape.head_numel * case.parameter_dtype.itemsize


def _hidden_bytes(case):
    """Hidden states of all tokens as they go into the head."""
    return case.tokens.n * case.shape.head_width * case.compute_dtype.itemsize


def _loss(case):
    """Part -> bytes of the fused loss at its largest: see `soul_kernels.linear_loss`."""
    shape, tokens, options = case.shape, case.tokens, case.head_options
    rows, compared = tokens.n_labelled, case.n_compared(tokens)
    limit = chunk_rows(shape.vocab, options, case.compares)
    plain, both = row_bytes(shape.vocab, options, False), row_bytes(shape.vocab, options, True)
    a_row = shape.head_width * options.compute_dtype.itemsize + N_BASIC * FLOAT  # hidden states and statistics
    states = _hidden_bytes(case) + rows * (a_row + shape.head_width * FLOAT) + compared * a_row
    if case.compares and case.adapters is not None:
        states += _hidden_bytes(case)  # a forward without the adapters
    return {
        "logits of a chunk": min(rows, limit) * plain + min(compared, limit) * (both - plain),
        "hidden states at the head": states,
        "head's gradient in fp32": _fp32_head(case),
        "bf16 copies of matrices": _copies(case) + (2 * shape.head_numel if case.casts else 0),
    }


def _fp32_head(case):
    return case.shape.head_numel * FLOAT if case.adapters is None else 0


def _copies(case):
    return 2 * case.shape.linear_numel if case.casts else 0


def _loss_backward(case, held):
    """The loss hands on its gradients, all activations are there."""
    rows = case.tokens.n_labelled * case.shape.head_width * (FLOAT + case.compute_dtype.itemsize)
    return {
        "gradients": held + _head_gradient(case),
        "activations": kept_bytes(case) + last_norm_bytes(case),
        "hidden states at the head": rows + _hidden_bytes(case),
        "head's gradient in fp32": _fp32_head(case),
        "bf16 copies of matrices": _copies(case),
    }


def _last_layer(case, held):
    """The backward pass of the last layer, the first that it meets."""
    released = case.config.gradient_release
    one = max(map(math.prod, case.shape.linear.values())) * case.parameter_dtype.itemsize
    return {
        "gradients": held + (_waiting(case) + one if released else _head_gradient(case)),
        "activations": kept_bytes(case) + again_bytes(case),
        "gradients of activations": working_bytes(case),
        "bf16 copies of matrices": _copies(case),
    }


def _first_layer(case, held):
    """The backward pass of the first layer and of the embedding, when all gradients are there that will be."""
    released, embedding = case.config.gradient_release, _head_gradient(case)
    gradients = held or gradient_bytes(case)
    left = kept_bytes(case) / case.shape.layers + again_bytes(case)
    return {
        "gradients": (held + embedding if released else gradients) + _waiting(case),
        "activations": left,
        "gradients of activations": working_bytes(case),
    }


def _head_gradient(case):
    """The head's gradient in the dtype of the parameter; the embedding's has the same size."""
    return _head_bytes(case) if case.adapters is None else 0


def _waiting(case):
    """Gradients that are whole until the end: that of a tied head waits for that of the embedding, to which it is added; FSDP2
    scatters all that are outside of the layers together.
    """
    if case.gpus > 1 and case.adapters is None:
        return case.shape.outside_numel * case.parameter_dtype.itemsize
    return _head_gradient(case) if case.shape.tied else 0

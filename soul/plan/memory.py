"""Bytes of every part in every phase of a step; the phase with the largest sum is the peak."""

import collections
import math

import torch

from soul._states import new_state
from soul.plan.activations import FLOAT, again_bytes, kept_bytes, working_bytes
from soul_kernels._head_rows import chunk_rows, row_bytes
from soul_kernels.token_logprob import N_BASIC

FORWARD, BACKWARD, STEP = "forward, loss", "backward", "optimizer step"


def phases(case):
    """Phase -> part -> bytes, on one GPU. Only phases that there are: with gradient release the step is in the backward pass."""
    always = resident(case)
    gradients = gradient_bytes(case)
    held = gradients if case.config.accumulate > 1 else 0  # those of the micro-batches before
    unsharded = unsharded_bytes(case)
    found = {
        FORWARD: always | {"gradients": held, "activations": kept_bytes(case)} | _sweep(case),
        BACKWARD: _backward(case, always, held),
    }
    for phase in found:
        found[phase]["unsharded layers"] = unsharded
    if not case.config.gradient_release:
        found[STEP] = always | {"gradients": gradients}
    return {phase: {part: math.ceil(size) for part, size in parts.items() if size} for phase, parts in found.items()}


def resident(case):
    """Part -> bytes of what is there all the time, divided by the GPUs."""
    found = {"parameters": case.shape.numel * case.parameter_dtype.itemsize}
    if case.adapters is not None:
        found["adapters"] = _trained_numel(case) * FLOAT
    for part, size in state_bytes(case).items():
        found[part] = size
    found = {part: size / case.gpus for part, size in found.items()}
    if case.compares and case.trains_head:  # a copy of the head, and the hidden states of the batch, in each process
        found["reference"] = case.shape.head_numel * case.parameter_dtype.itemsize + _reference_hidden(case)
    return found


def state_bytes(case):
    """Part -> bytes of the optimizer's states, of all parameters that are trained."""
    if case.config.optimizer == "adamw":
        states = {"exp_avg": case.trained_dtype, "exp_avg_sq": case.trained_dtype}
        return {"optimizer states": sum(dtype.itemsize for dtype in states.values()) * _trained_numel(case)}
    found = collections.Counter()
    group = {"state_dtype": case.config.state_dtype, "param_rounding": case.config.param_rounding}
    for size, count in collections.Counter(case.trained).items():
        state = new_state(torch.empty(size, dtype=case.trained_dtype, device="meta"), group, ())
        for name, tensor in state.items():
            found["low bits" if name == "low_bits" else "optimizer states"] += count * tensor.nbytes
    return dict(found)


def gradient_bytes(case):
    """Bytes of all gradients, divided by the GPUs."""
    return _trained_numel(case) * case.trained_dtype.itemsize / case.gpus


def _trained_numel(case):
    return sum(map(math.prod, case.trained))


def _head_gradient(case):
    """Bytes of the head's gradient in the dtype of the parameter."""
    return case.shape.head_numel * case.parameter_dtype.itemsize if case.trains_head else 0


def _sweep(case):
    """Part -> bytes of the fused loss: see `soul_kernels.linear_loss`."""
    shape, tokens, element = case.shape, case.tokens, case.compute_dtype.itemsize
    options, rows = case.head_options(), tokens.n_kept
    scratch = row_bytes(shape.vocab, options, False) * min(rows, chunk_rows(shape.vocab, options, case.compares))
    compared = tokens.n_compared if case.compares else 0
    scratch += min(compared, chunk_rows(shape.vocab, options, True)) * (
        row_bytes(shape.vocab, options, True) - row_bytes(shape.vocab, options, False)
    )
    hidden = tokens.n * shape.head_width * element
    found = {
        "logits of a chunk": scratch,
        "rows of hidden states": hidden + rows * (shape.head_width * (element + FLOAT) + N_BASIC * FLOAT),
        "head's gradient in fp32": shape.head_numel * FLOAT if case.trains_head else 0,
        "bf16 copies": _copies(case),
    }
    if case.compares:
        picked = compared * (shape.head_width * element + (N_BASIC + 2) * FLOAT)
        found["rows of hidden states"] += picked + (0 if case.trains_head else _reference_hidden(case))
    return found


def _copies(case):
    """bf16 copies of the matrices under autocast, that of the head by the loss."""
    return (case.shape.linear_numel + case.shape.head_numel) * 2 if case.casts else 0


def _reference_hidden(case):
    return case.tokens.n * case.shape.head_width * case.compute_dtype.itemsize


def _backward(case, always, held):
    """The largest moment of the backward pass: its start, when all activations are there, or its end, when all gradients are."""
    shape, tokens, element = case.shape, case.tokens, case.compute_dtype.itemsize
    working, again, kept = working_bytes(case), again_bytes(case), kept_bytes(case)
    released = case.config.gradient_release and case.config.accumulate == 1
    gradients = gradient_bytes(case)
    head = _head_gradient(case)
    rows = tokens.n_kept * shape.head_width
    waiting = head if shape.tied else 0  # the head's gradient, until the embedding's is added to it
    largest = max(math.prod(size) for size in case.trained) * case.trained_dtype.itemsize
    copies = {"bf16 copies": case.shape.linear_numel * 2 if case.casts else 0}
    moments = [
        {  # the loss hands its gradients on
            "gradients": held + head,
            "activations": kept,
            "head's gradient in fp32": head and shape.head_numel * FLOAT,
            "rows of hidden states": rows * (FLOAT + element) + tokens.n * shape.head_width * element,
        },
        {  # the last layer
            "gradients": held + (waiting if released else head) + (largest if released else 0),
            "activations": kept + again,
            "working set": working,
        },
    ]
    if not case.adapters:  # the embedding
        embedding = head
        moments.append({"gradients": (waiting if released else max(held, gradients - (0 if shape.tied else embedding))) + embedding,
                        "working set": tokens.n * shape.hidden * element})  # fmt: skip
    else:
        moments.append({"gradients": gradients, "activations": kept / shape.layers + again, "working set": working})
    return max((always | copies | moment for moment in moments), key=lambda parts: sum(parts.values()))


def unsharded_bytes(case):
    """Bytes of what FSDP2 gathers: two layers, one in use and one that is prefetched, and what is outside of layers, which stays
    from forward to backward; and their gradients before they are scattered.
    """
    if case.gpus == 1:
        return 0
    shape, element = case.shape, case.parameter_dtype.itemsize
    gathered = 2 * shape.layer_numel + shape.outside_numel
    return gathered * element * (2 if case.adapters is None else 1)

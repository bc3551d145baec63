"""Least time of a step: FLOPs of its matrix products, bytes of its optimizer, and what FSDP2 sends; on paper, not measured."""

from soul.plan.memory import state_bytes, trained_numel
from soul_kernels.chunks import chunk_rows

GEMMS, OPTIMIZER, NETWORK = "matrix products", "optimizer", "network"


def step_seconds(case, batches=None):
    """Part -> seconds of one step; they add up, but for the network, which the matrix products may hide.

    Args:
        case: the `Case`.
        batches: `Tokens` of the step's micro-batches; None: as many as are accumulated, of the case's own.
    """
    batches = [case.tokens] * case.config.accumulate if batches is None else batches
    found = {
        GEMMS: sum(flops(case, tokens) for tokens in batches) / case.card.flops,
        OPTIMIZER: optimizer_bytes(case) / case.card.bandwidth,
    }
    if case.gpus > 1:
        found[NETWORK] = network_bytes(case) * len(batches) / case.network
    return found


def floor_seconds(parts):
    """Least time of a step: the optimizer, after whichever of matrix products and network takes longer."""
    return max(parts[GEMMS], parts.get(NETWORK, 0)) + parts[OPTIMIZER]


def flops(case, tokens):
    """FLOPs of the matrix products of one micro-batch on one GPU.

    With n tokens, P parameters in linear layers, R tokens with a label, head [V, D]: forward 2 n P, backward 4 n P (2 n P where
    they are frozen), computed again 2 n P; causal attention, half of T^2: 2 products forward, 5 backward; the loss 6 R V D (4
    with a frozen head), 2 more where the objective takes a second sweep, and 2 for every token that is compared.
    """
    shape, frozen = case.shape, case.adapters is not None
    again = 1 if case.config.gradient_checkpointing else 0
    passes = 1 + again + (1 if frozen else 2)  # forward, again, by inputs and by weights
    if frozen and case.compares:
        passes += 1  # the model without its adapters
    linear = 2 * tokens.n * shape.linear_numel * passes
    product = tokens.sequences * tokens.length**2 * shape.heads * shape.head_dim  # half of 2 B T T H d
    attention = product * shape.layers * (2 * (1 + again) + 5 + (2 if frozen and case.compares else 0))
    sweep = 4 if frozen else 6
    limit = chunk_rows(shape.vocab, case.head_options, case.compares)
    if case.objective.additive is None and tokens.n_labelled > limit:
        sweep += 2
    head = shape.head_numel * (tokens.n_labelled * sweep + 2 * case.n_compared(tokens))
    adapters = 0
    if frozen:
        adapters = 2 * tokens.n * trained_numel(case) * (3 + again)
    return linear + attention + head + adapters


def optimizer_bytes(case):
    """Bytes that the update moves on one GPU: parameters and states read and written; gradients read, and again for a norm."""
    trained, size = trained_numel(case), case.trained_dtype.itemsize
    states = sum(state_bytes(case).values())
    norms = 1 if case.config.max_grad_norm not in (None, float("inf")) else 0
    return (2 * (trained * size + states) + trained * size * (1 + norms)) / case.gpus


def network_bytes(case):
    """Bytes into each GPU in one micro-batch under FSDP2: parameters gathered twice, gradients scattered once."""
    part = (case.gpus - 1) / case.gpus
    gathered = 2 * case.shape.numel * case.parameter_dtype.itemsize
    return part * (gathered + trained_numel(case) * case.trained_dtype.itemsize)

"""A lower bound of the time of a step, on paper.

It consists of FLOPs of matrix products, bytes of the optimizer, traffic of FSDP2, and traffic of states that are offloaded.
"""

from collections.abc import Mapping, Sequence

from soul.plan.case import Case, Tokens
from soul.plan.memory import host_bytes, state_bytes, trained_numel

GEMMS, OPTIMIZER, NETWORK, TRANSFER = "matrix products", "optimizer", "network", "transfer of states"


def step_seconds(case: Case, batches: Sequence[Tokens] | None = None) -> dict[str, float]:
    """Return component -> lower bound of its seconds in one step. `floor_seconds` combines them.

    Args:
        case: the `Case`.
        batches: `Tokens` of the step's micro-batches; None: the case's own, as often as the config accumulates.
    """
    if batches is None:
        n_batches = case.config.accumulate  # there may be millions: no list of them is made
        products = n_batches * flops(case, case.tokens)
    else:
        n_batches = len(batches)
        products = sum(flops(case, tokens) for tokens in batches)
    seconds = {
        GEMMS: products / case.card.flops,
        OPTIMIZER: optimizer_bytes(case) / case.card.bandwidth,
    }
    if case.gpus > 1:
        seconds[NETWORK] = network_bytes(case) * n_batches / case.network
    if case.config.state_offload:
        seconds[TRANSFER] = host_bytes(case) / case.card.host_bandwidth
    return seconds


def floor_seconds(seconds: Mapping[str, float], released: bool = False) -> float:
    """Return the lower bound of a step: the larger of matrix products and network, and the optimizer after it.

    Offloaded states come up while others go down. The optimizer waits for them; with gradient release, where it steps in the
    backward pass, they may pass behind everything else.

    Args:
        seconds: of each component.
        released: whether gradients are released.
    """
    compute = max(seconds[GEMMS], seconds.get(NETWORK, 0))
    transfer = seconds.get(TRANSFER, 0)
    if released:
        return max(compute + seconds[OPTIMIZER], transfer)
    return compute + max(seconds[OPTIMIZER], transfer)


def flops(case: Case, tokens: Tokens) -> int:
    """Return the FLOPs of the matrix products of one micro-batch on one GPU.

    With n tokens, P parameters in linear layers, R tokens with a label, head [V, D]: forward 2 n P, backward 4 n P (2 n P where
    they are frozen), recomputation 2 n P; causal attention, half of T^2: 2 products forward, 5 backward; the loss 6 R V D (4
    with a frozen head), 2 more where the objective takes a second sweep, and 2 for every token that is compared with the
    reference model.
    """
    shape = case.shape
    frozen = case.adapters is not None
    recomputed = 1 if case.config.gradient_checkpointing else 0
    passes = 1 + recomputed + (1 if frozen else 2)  # forward, recomputation, gradients by inputs and by weights
    if frozen and case.has_divergence:
        passes += 1  # the model without its adapters
    linear = 2 * tokens.n * shape.linear_numel * passes
    product = tokens.sequences * tokens.length**2 * shape.heads * shape.head_dim  # half of 2 B T T H d
    attention = product * shape.layers * (2 * (1 + recomputed) + 5 + (2 if frozen and case.has_divergence else 0))
    sweep = 4 if frozen else 6
    if case.objective.additive is None and tokens.n_labelled > case.chunk_rows:
        sweep += 2
    head = shape.head_numel * (tokens.n_labelled * sweep + 2 * case.n_compared(tokens))
    adapters = 0
    if frozen:
        adapters = 2 * tokens.n * trained_numel(case) * (3 + recomputed)
    return linear + attention + head + adapters


def optimizer_bytes(case: Case) -> float:
    """Return the bytes that an update moves on one GPU.

    Parameters and states are read and written, gradients are read, and read once more for their norm. States that are offloaded
    are also written as they come up, and read as they go down.
    """
    trained_bytes = trained_numel(case) * case.trained_dtype.itemsize
    states = sum(state_bytes(case).values())
    norms = 1 if case.config.max_grad_norm not in (None, float("inf")) else 0
    return (2 * (trained_bytes + states) + trained_bytes * (1 + norms)) / case.gpus + 2 * host_bytes(case)


def network_bytes(case: Case) -> float:
    """Return the bytes into each GPU in one micro-batch under FSDP2: parameters gathered twice, gradients scattered once."""
    received = (case.gpus - 1) / case.gpus  # of every tensor: the shards of the others
    gathered = 2 * case.shape.numel * case.parameter_dtype.itemsize
    return received * (gathered + trained_numel(case) * case.trained_dtype.itemsize)

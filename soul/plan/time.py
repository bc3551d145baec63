"""A lower bound of the time of a step, on paper.

It consists of FLOPs of matrix products, bytes of the optimizer, weights of 4 bits that are dequantized, traffic of FSDP2, and
traffic of states or parameters that are in main memory.
"""

from collections.abc import Mapping, Sequence

from soul.plan.cards import MAIN_MEMORY, NODE
from soul.plan.case import Case, Tokens, numel_of
from soul.plan.memory import Share, gradient_share, host_bytes, state_shares, trained_numel

GEMMS, OPTIMIZER, NETWORK, TRANSFER = "matrix products", "optimizer", "network", "transfer of states"
DEQUANTIZATION, LINK = "dequantization", "transfer of parameters"
FP32 = 4  # bytes of an element of a gradient on its way to its shard


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
    moved = optimizer_share(case)
    memory = MAIN_MEMORY / min(case.gpus, NODE) if case.cpu_offload else case.card.bandwidth
    seconds = {
        GEMMS: products / case.card.flops,
        OPTIMIZER: moved.cut / memory + moved.rows / case.card.bandwidth,
    }
    if case.load_in_4bit:
        seconds[DEQUANTIZATION] = dequantization_bytes(case) * n_batches / case.card.bandwidth
    if case.gpus > 1:
        seconds[NETWORK] = network_seconds(case) * n_batches
    if case.cpu_offload:
        seconds[LINK] = link_bytes(case) * n_batches / case.card.host_bandwidth
    if case.config.state_offload:
        seconds[TRANSFER] = host_bytes(case) / case.card.host_bandwidth
    return seconds


def floor_seconds(seconds: Mapping[str, float], released: bool = False) -> float:
    """Return the lower bound of a step: matrix products, or network or link if these take longer, and the optimizer after them.

    Weights are dequantized between the products. Offloaded states come up while others go down. The optimizer waits for them;
    with gradient release, where it steps in the backward pass, they may pass behind everything else.

    Args:
        seconds: of each component.
        released: whether gradients are released.
    """
    products = seconds[GEMMS] + seconds.get(DEQUANTIZATION, 0)
    compute = max(products, seconds.get(NETWORK, 0), seconds.get(LINK, 0))
    transfer = seconds.get(TRANSFER, 0)
    if released:
        return max(compute + seconds[OPTIMIZER], transfer)
    return compute + max(seconds[OPTIMIZER], transfer)


def passes(case: Case) -> tuple[int, int]:
    """Return how often a micro-batch goes through the layers: forward, and backward to their inputs.

    Layers are gone through again for recomputation, and without their adapters for a reference model.
    """
    recomputed = 1 if case.config.gradient_checkpointing else 0
    return 1 + recomputed + _bare_passes(case), 1


def _bare_passes(case: Case) -> int:
    """Return how often a micro-batch goes through the layers without their adapters, for a reference model."""
    return 1 if case.adapters is not None and case.has_divergence else 0


def dequantization_bytes(case: Case) -> float:
    """Return the bytes that one micro-batch moves for weights of 4 bits: codes are read and numbers written in every pass."""
    return sum(passes(case)) * (case.code_bytes + case.shape.linear_numel * case.compute_dtype.itemsize)


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
    linear = 2 * tokens.n * shape.linear_numel * (sum(passes(case)) + (0 if frozen else 1))  # 1: gradients by weights
    product = tokens.sequences * tokens.length**2 * shape.heads * shape.head_dim  # half of 2 B T T H d
    attention = product * shape.layers * (2 * (1 + recomputed) + 5 + (2 if frozen and case.has_divergence else 0))
    sweep = 4 if frozen else 6
    sweep += 2 if _sweeps_twice(case, tokens) else 0
    head = shape.head_numel * (tokens.n_labelled * sweep + 2 * case.n_compared(tokens))
    adapters = 0
    if frozen:
        adapters = 2 * tokens.n * trained_numel(case) * (3 + recomputed)
    return linear + attention + head + adapters


def _sweeps_twice(case: Case, tokens: Tokens) -> bool:
    """Tell whether the loss goes over the logits twice, since coefficients need all of them and no chunk has all."""
    return case.objective.additive is None and tokens.n_labelled > case.chunk_rows


def optimizer_share(case: Case) -> Share:
    """Return the bytes that an update moves on one GPU, or in main memory where the parameters are there.

    Parameters and states are read and written, gradients are read, and read once more for their norm. States that are offloaded
    are also written as they come up, and read as they go down.
    """
    norms = 1 if case.config.max_grad_norm not in (None, float("inf")) else 0
    copied = 2 if case.config.state_offload else 0
    trained, states = gradient_share(case), state_shares(case).values()
    return Share(
        cut=(3 + norms) * trained.cut + (2 + copied) * sum(share.cut for share in states),
        rows=(3 + norms) * trained.rows + (2 + copied) * sum(share.rows for share in states),
    )


def used_bytes(case: Case) -> float:
    """Return the bytes of the parameters that FSDP2 gathers in one micro-batch: layers twice, what is outside of them once.

    Adapters are gathered with their layers. Weights in 4 bits, and a head and embeddings in shards, are not gathered.
    """
    shape = case.shape
    in_codes = shape.linear_numel if case.load_in_4bit else 0
    rest = shape.outside_numel - numel_of(case.vocabulary)
    size = (2 * (shape.numel - shape.outside_numel - in_codes) + rest) * case.parameter_dtype.itemsize
    return size + (0 if case.adapters is None else 2 * trained_numel(case) * case.trained_dtype.itemsize)


def network_bytes(case: Case) -> tuple[float, float]:
    """Return the bytes into each GPU in one micro-batch under FSDP2: between the shards of a copy, and between all GPUs.

    With s shards a GPU receives the other s - 1 of what is gathered, and scatters gradients in fp32 once. Each of N copies of
    the shards has its sum added up over the copies: 2 (N - 1) / N of a shard. Head and embeddings in shards exchange
    `token_bytes` of every GPU with all others.
    """
    others = (case.shards - 1) / case.shards  # of every tensor: the shards of the others
    scattered = FP32 * numel_of(case.trained_parts[0])
    between = 2 * (case.replicas - 1) / case.replicas * scattered / case.shards
    return others * (used_bytes(case) + scattered), between + (case.gpus - 1) * token_bytes(case)


def token_bytes(case: Case) -> float:
    """Return the bytes that one GPU's tokens of a micro-batch send to every other GPU, for a head and embeddings in shards.

    The head takes the hidden states of all labelled tokens, those of the reference model too, with a second sweep twice, and
    gives their gradients in fp32. Embeddings of all tokens come from the shards, once more for a pass without adapters; their
    gradients go there.
    """
    if not case.head_in_shards:
        return 0
    shape, size = case.shape, case.compute_dtype.itemsize
    sent = (2 if _sweeps_twice(case, case.tokens) else 1) * (2 if case.has_divergence else 1)
    states = case.tokens.n_labelled * shape.head_width * (size * sent + FP32)
    if shape.embedding is None:
        return states
    times = 1 + _bare_passes(case) + (1 if case.adapters is None else 0)
    return states + case.tokens.n * shape.embedding[1] * times * case.parameter_dtype.itemsize


def network_seconds(case: Case) -> float:
    """Return the seconds that the bytes of `network_bytes` take: within a machine at the rate of its links between GPUs."""
    peers = case.card.peer_bandwidth or case.network
    shards, between = network_bytes(case)
    return shards / (peers if case.shards <= NODE else case.network) + between / (peers if case.gpus <= NODE else case.network)


def link_bytes(case: Case) -> float:
    """Return the bytes that pass from main memory to a GPU in one micro-batch: the shards of what is gathered.

    Gradients go the other way, at the same time, and are fewer.
    """
    return used_bytes(case) / case.shards

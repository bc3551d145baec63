"""Bytes that a layer saves in the forward pass for its backward pass, and the scratch memory of that backward pass.

The formulas are those of a Llama layer as transformers writes it. They count every tensor that autograd saves, and count it
once where several operations save the same one. Other families differ by a few tensors of width D.
tests/plan/test_plan.py compares `layer_bytes` with what autograd really saves: a change of a formula has to pass there.
"""

from soul.plan.case import Case

FLOAT = 4  # bytes


def layer_components(case: Case) -> dict[str, float]:
    """Return component of a layer -> bytes that its forward pass saves for its backward pass, without checkpointing.

    Here e is the size of an element, n = B T the tokens, D the width, I the inner width of the MLP, d the width of a head, H
    and K the heads of queries and of keys::

        each of two norms    n D (4 + e + e)      input in fp32, normalized input, output, which the next matrices save
        attention            n d e (2 H + 2 K)    queries, keys, values, output; as many keys as queries with a mask, and eager
          "sdpa"             n H 4                log-sum-exp; with a mask, which every layer converts, B T T e more
          "eager"            B H T T (4 + e)      probabilities in fp32 and in e; once where these are the same
        MLP                  4 n I e              gate, its activation, up, their product; without a gate 2

    fp32 under autocast: norms work in fp32, and each of the five matrices that read one saves a bf16 copy of its own.
    Adapters: frozen matrices save no input, and frozen norms no normalized input; each adapter saves its input in fp32, n r 4
    bytes, and with dropout one byte for each element of the input.
    """
    shape = case.shape
    tokens = case.tokens
    element = case.compute_dtype.itemsize
    n = tokens.n
    n_pairs = tokens.sequences * tokens.length**2
    norm: float = n * shape.hidden * FLOAT
    if case.casts:
        norm += n * shape.hidden * (FLOAT + 2.5 * element)
    elif case.adapters is None:
        norm += n * shape.hidden * 2 * element
    eager = case.attention == "eager"
    key_heads = shape.heads if tokens.masked or eager else shape.kv_heads
    attention = n * shape.head_dim * element * (2 * shape.heads + 2 * key_heads)
    if eager:
        attention += n_pairs * shape.heads * (FLOAT + (element if element != FLOAT else 0))
    else:
        attention += n * shape.heads * FLOAT + (n_pairs * element if tokens.masked else 0)
    inner = n * shape.intermediate * element
    mlp = inner * (4 if shape.gated else 2)
    adapters = 0.0
    if case.adapters is not None:
        mlp -= inner  # the input of the last matrix
        if eager:
            attention -= n * shape.head_dim * element * shape.heads  # the output, which only a trained matrix would save
        input_element = FLOAT + (1 if case.adapters.get("dropout") else 0)
        rank = case.adapters["rank"]
        adapters = n * sum(n_in * input_element + rank * FLOAT for _, n_in in case.adapted_layers.values()) / shape.layers
    return {"norms": 2 * norm, "attention": attention, "mlp": mlp, "adapters": adapters}


def layer_bytes(case: Case) -> float:
    """Return the sum of `layer_components`."""
    return sum(layer_components(case).values())


def saved_bytes(case: Case) -> float:
    """Return the bytes that all layers have saved at the end of the forward pass.

    With checkpointing this is one hidden state for each layer, which is fp32 under autocast.
    """
    if not case.config.gradient_checkpointing:
        return case.shape.layers * layer_bytes(case)
    size = FLOAT if case.casts else case.compute_dtype.itemsize
    return case.shape.layers * case.tokens.n * case.shape.hidden * size


def recomputed_bytes(case: Case) -> float:
    """Return the bytes of the one layer that the backward pass recomputes at a time; 0 without checkpointing."""
    return layer_bytes(case) if case.config.gradient_checkpointing else 0


def forward_bytes(case: Case) -> float:
    """Return the bytes that the forward pass of a layer holds besides the hidden state that it keeps, with checkpointing.

    In the MLP these are three inner tensors (the activated gate, up and their product, or those of a layer without a gate),
    the normalized hidden states and the sum before them. Adapters have their input, their result and its multiple in fp32, in
    place of the product. 0 without checkpointing, where the backward pass takes more.
    """
    if not case.config.gradient_checkpointing:
        return 0
    shape = case.shape
    size = case.compute_dtype.itemsize
    inner = (3 if shape.gated else 2) * size
    hidden = size + (FLOAT if case.casts else size)
    if case.adapters is not None:
        inner += 2 * FLOAT - size
        hidden += FLOAT
    return case.tokens.n * (shape.intermediate * inner + shape.hidden * hidden)


def last_norm_bytes(case: Case) -> int:
    """Return the bytes that the norm after the layers saves: its input in fp32 and, if it is trained, its normalized input."""
    element = FLOAT if case.casts else case.compute_dtype.itemsize
    return case.tokens.n * case.shape.hidden * (FLOAT + (0 if case.adapters else element))


def working_bytes(case: Case) -> float:
    """Return the most scratch memory, in bytes, that the backward pass of a layer needs beside what was saved.

    Two gradients with respect to hidden states exist throughout. The larger of two moments is added: the gradients with respect
    to the two inner halves of the MLP; or, with eager attention, the gradients with respect to the probabilities, when what the
    MLP saved has been freed.
    """
    shape = case.shape
    n = case.tokens.n
    element = case.compute_dtype.itemsize
    need: float = n * shape.intermediate * (2 * element + (FLOAT if case.adapters else 0))
    if case.attention == "eager":
        saved = layer_components(case)
        n_probabilities = case.tokens.sequences * case.tokens.length**2 * shape.heads
        gradients = n_probabilities * (2 * FLOAT - (element if element != FLOAT else 0))
        need = max(need, gradients - saved["mlp"] - saved["norms"] / 2)
    return need + 2 * n * shape.hidden * (FLOAT if case.casts else element)

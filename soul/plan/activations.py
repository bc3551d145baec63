"""What a layer keeps from the forward pass for the backward pass, and what that needs meanwhile.

Of a layer as transformers writes Llama: every tensor that autograd saves, once, where several operations save the same one.
Other families differ by a few tensors of width D.
"""

FLOAT = 4  # bytes


def layer_parts(case):
    """Part of a layer -> bytes that its forward pass leaves for its backward pass, without checkpointing.

    Where e is the size of an element, n = B T the tokens, D the width, I that of the MLP's inside, d that of a head, H and K
    the heads of queries and of keys::

        each of two norms    n D (4 + e + e)      input in fp32, normalized, output, which the next matrices take in
        attention            n d e (2 H + 2 K)    queries, keys, values, output; as many keys as queries with a mask, and eager
          "sdpa"             n H 4                log-sum-exp; with a mask, which every layer converts, B T T e more
          "eager"            B H T T (4 + e)      probabilities in fp32 and in e; once where these are the same
        MLP                  4 n I e              gate, its activation, up, their product; without a gate 2

    fp32 under autocast: norms work in fp32, and each of the five matrices that read one saves a bf16 copy of its own.
    Adapters: frozen matrices save no input and frozen norms nothing normalized; each adapter saves its input in fp32, n r 4,
    and with dropout a byte for each element of the input.
    """
    shape, tokens, element, lora = case.shape, case.tokens, case.compute_dtype.itemsize, case.adapters is not None
    n, pairs = tokens.n, tokens.sequences * tokens.length**2
    norm = n * shape.hidden * FLOAT
    if case.casts:
        norm += n * shape.hidden * (FLOAT + 2.5 * element)
    elif not lora:
        norm += n * shape.hidden * 2 * element
    eager = case.attention == "eager"
    keys = shape.heads if tokens.padded or eager else shape.kv_heads
    attention = n * shape.head_dim * element * (2 * shape.heads + 2 * keys)
    if eager:
        attention += pairs * shape.heads * (FLOAT + (element if element != FLOAT else 0))
    else:
        attention += n * shape.heads * FLOAT + (pairs * element if tokens.padded else 0)
    inside = n * shape.intermediate * element
    mlp = inside * (4 if shape.gated else 2)
    adapters = 0
    if lora:
        mlp -= inside  # the input of the last matrix
        if eager:
            attention -= n * shape.head_dim * element * shape.heads  # the output, which nothing but a matrix would save
        a_value, rank = FLOAT + (1 if case.adapters.get("dropout") else 0), case.adapters["rank"]
        adapters = n * sum(width * a_value + rank * FLOAT for _, width in case.adapted.values()) / shape.layers
    return {"norms": 2 * norm, "attention": attention, "mlp": mlp, "adapters": adapters}


def layer_bytes(case):
    """Sum of `layer_parts`."""
    return sum(layer_parts(case).values())


def kept_bytes(case):
    """Bytes of all layers at the end of the forward pass; with checkpointing, of one hidden state a layer, which under autocast
    is fp32.
    """
    if not case.config.gradient_checkpointing:
        return case.shape.layers * layer_bytes(case)
    size = FLOAT if case.casts else case.compute_dtype.itemsize
    return case.shape.layers * case.tokens.n * case.shape.hidden * size


def again_bytes(case):
    """Bytes of the one layer that is computed again in the backward pass; 0 without checkpointing."""
    return layer_bytes(case) if case.config.gradient_checkpointing else 0


def last_norm_bytes(case):
    """What the norm after the layers keeps: its input in fp32 and, where it is trained, that normalized."""
    element = FLOAT if case.casts else case.compute_dtype.itemsize
    return case.tokens.n * case.shape.hidden * (FLOAT + (0 if case.adapters else element))


def working_bytes(case):
    """Most bytes that the backward pass of a layer needs beside what was kept: gradients by the two halves of the MLP's inside;
    or those by the probabilities of eager attention, when what the MLP kept is gone; and two by hidden states.
    """
    shape, n, element = case.shape, case.tokens.n, case.compute_dtype.itemsize
    need = n * shape.intermediate * (2 * element + (FLOAT if case.adapters else 0))
    if case.attention == "eager":
        parts = layer_parts(case)
        pairs = case.tokens.sequences * case.tokens.length**2 * shape.heads
        gradients = pairs * (2 * FLOAT - (element if element != FLOAT else 0))
        need = max(need, gradients - parts["mlp"] - parts["norms"] / 2)
    return need + 2 * n * shape.hidden * (FLOAT if case.casts else element)

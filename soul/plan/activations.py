"""What a layer keeps from the forward pass to the backward pass, and what it needs meanwhile.

Of a layer as transformers writes Llama: every tensor that autograd saves, once, where several operations save the same one.
Other families differ by a few tensors of width D.
"""

FLOAT = 4  # bytes


def layer_bytes(case):
    """Bytes that the forward pass of one layer leaves for its backward pass, without checkpointing.

    Where e is the size of an element, n the tokens, D the width, I that of the MLP's inside::

        each of two norms    n D (4 + e + e)      input in fp32, normalized, output (what the next matrices take in)
        attention            n d e (2 H + 2 K)    queries, keys, values, output; K: as many as H with a mask
          "sdpa"             n H 4 (+ B T T e)    log-sum-exp; a mask of its own
          "eager"            B H T T (4 + e)      probabilities, in fp32 and as the values are multiplied; e = 4: once
        MLP                  4 n I e              gate, its activation, up, their product; 2 without a gate

    With adapters the base's matrices save no input and norms no normalized one: each adapter saves its input in fp32 instead.
    """
    shape, tokens, element = case.shape, case.tokens, case.compute_dtype.itemsize
    n, width = tokens.n, shape.heads * shape.head_dim
    lora = case.adapters is not None
    norms = 2 * n * shape.hidden * FLOAT
    outputs = 0 if lora else 2 * n * shape.hidden * element  # of the norms
    normalized = 0 if lora else 2 * n * shape.hidden * element
    heads = shape.heads if tokens.padded or case.attention == "eager" else shape.kv_heads
    attention = n * element * (2 * width + 2 * heads * shape.head_dim)
    if case.attention == "eager":
        pairs = tokens.sequences * shape.heads * tokens.length**2
        attention += pairs * (FLOAT + (element if element != FLOAT else 0))
        attention -= n * element * width  # the output is that of a copy: it is saved by the next matrix only
        attention += 0 if lora else n * element * width
    else:
        attention += n * shape.heads * FLOAT
        if tokens.padded:
            attention += tokens.sequences * tokens.length**2 * element
    inside = n * shape.intermediate * element * (4 if shape.gated else 2)
    if lora:
        inside -= n * shape.intermediate * element  # the input of the last matrix
    return norms + normalized + outputs + attention + inside + _adapter_bytes(case)


def _adapter_bytes(case):
    """fp32 inputs and inner states of the adapters of one layer."""
    if case.adapters is None:
        return 0
    widths = sum(inside + case.adapters["rank"] for _, inside in case.adapted.values())
    return case.tokens.n * FLOAT * widths // case.shape.layers


def kept_bytes(case):
    """Bytes of all layers, at the end of the forward pass: with checkpointing one hidden state a layer."""
    shape, n = case.shape, case.tokens.n
    last_norm = n * shape.hidden * (FLOAT + (0 if case.adapters else case.compute_dtype.itemsize))
    if case.config.gradient_checkpointing:
        return shape.layers * n * shape.hidden * residual_size(case) + last_norm
    return shape.layers * layer_bytes(case) + last_norm


def residual_size(case):
    """Bytes of an element of the hidden states between layers: under autocast embeddings are fp32, and so what is added."""
    return FLOAT if case.casts else case.compute_dtype.itemsize


def again_bytes(case):
    """Bytes of the one layer that is computed again in the backward pass; 0 without checkpointing."""
    return layer_bytes(case) if case.config.gradient_checkpointing else 0


def working_bytes(case):
    """Bytes that the backward pass of a layer needs beside what was kept: gradients by the inside of its MLP, and by hidden
    states in fp32 and as they are.
    """
    shape, n, element = case.shape, case.tokens.n, case.compute_dtype.itemsize
    return n * (2 * shape.intermediate * element + shape.hidden * (FLOAT + 2 * element))

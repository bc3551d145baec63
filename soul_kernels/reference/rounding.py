"""How fp32 results are stored: four roundings of a parameter and two 8-bit formats of a state, on bit patterns.

All of it is integer arithmetic or exact powers of two, so that these definitions, the interpreter and a GPU agree bit for bit.

**Noise** is a hash of (seed, tensor, step, element), never the device's random state: replicas agree, and a resumed run
repeats what an uninterrupted one does. An element's number is the one in the whole tensor: shards draw what one process draws.
One 32-bit word an element, split into fields: bits 31..16 for the parameter, 23..12 for an 8-bit momentum, 15..0 for a bf16
Hessian or 11..0 for an 8-bit one.

**Magnitudes.** bf16 is the upper half of fp32. An fp16 number is the same with another exponent range: the fp32 bits of
``|x| 2^-112``, shifted right by 13, are the bits of ``|x|`` in fp16, subnormal numbers included.
"""

import math

import torch

GROUP = 256  # values that share the scale of an 8-bit state
PRIME = 0x9E3779B9  # 2^32 / golden ratio: consecutive counters become far apart
WORD = 0xFFFFFFFF
SIGN = -(1 << 31)  # bit of an fp32 pattern, as int32
DROPPED = {torch.bfloat16: 16, torch.float16: 13}  # low bits of the fp32 magnitude that the format has not
INFINITE = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00}
NAN = {torch.bfloat16: 0x7FC0, torch.float16: 0x7E00}
LARGEST_WEIGHT = {torch.bfloat16: float.fromhex("0x1.FEFEp127"), torch.float16: 65519.875}  # the largest with low bits, 127


def scalar(value):
    """The fp32 tensor of shape () that a number is in the formulas, or the one element of a tensor."""
    return value.reshape(()) if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=torch.float32, device="cpu")


def _right(x, by):
    """``x >> by`` of 32-bit words: zeros come in from above, whatever the sign."""
    return (x >> by) & (WORD >> by)


def _times(x, factor):
    """The lower half of a product of 32-bit words; that of int32 tensors wraps around."""
    return x * (factor - (factor >> 31 << 32)) if isinstance(x, torch.Tensor) else x * factor & WORD


def mix(x):
    """A bijection of 32-bit words that spreads every input bit (lowbias32 of C. Wellons, less its first shift).

    Words are Python's integers, or int32 tensors: a vector of a CPU holds twice as many as of int64, and AVX2 has no product of
    those.
    """
    x = _times(x, 0x7FEB352D)
    x = _times(x ^ _right(x, 15), 0x846CA68B)
    return x ^ _right(x, 16)


def salt(seed, tensor):
    """What a tensor contributes to its noise: a 32-bit hash of the user's seed and of the tensor's number."""
    return mix(mix(mix(mix(seed & WORD) ^ (seed >> 32 & WORD)) + tensor & WORD) ^ PRIME)


def noise_key(salt, step, start, device):
    """Return what the noise of a block starts from: an int32 tensor of shape ().

    Args:
        salt: of the tensor.
        step: a number or a tensor of one, which is never read: a tensor may be without data.
        start: number of the block's first element in the whole tensor; no block may reach beyond a multiple of 2^32.
        device: of the block.
    """
    step = step.long() if isinstance(step, torch.Tensor) else torch.tensor(int(step), device=device)
    return mix(mix((salt + step * PRIME).to(torch.int32)) ^ (start >> 32))


def noise_words(key, start, shape):
    """Return a 32-bit word for each element of a block: an int32 tensor of its shape.

    Args:
        key: the block's `noise_key`.
        start: the same, as an int64 tensor.
        shape: of the block, whose elements are numbered in the order of its dimensions.
    """
    index = torch.arange(math.prod(shape), dtype=torch.int32, device=key.device).view(shape)
    return mix(key ^ (index + start.to(torch.int32)))


def bits(x):
    """The bit pattern of an fp32 tensor: int32."""
    return x.view(torch.int32)


def from_bits(pattern):
    """The fp32 tensor of a bit pattern: int32, or what has it as its lower 32 bits."""
    return pattern.to(torch.int32).view(torch.float32)


def _sign(x):
    """The sign bit of the pattern of ``x``, where it stands there."""
    return bits(x) & SIGN


def _magnitude(x, dtype):
    """fp32 bits of ``|x|``, for fp16 of ``|x| 2^-112``: the exponent range of ``dtype``."""
    if dtype == torch.float16:
        return bits(x.abs() * 2.0**-112)
    return bits(x) & ~SIGN


def _words(x, dtype):
    """fp32 bits of ``x`` in the exponent range of ``dtype``; one pattern for all NaN, one for all that overflow fp16."""
    magnitude = _magnitude(x, dtype)
    if dtype == torch.float16:
        magnitude = magnitude.clamp(max=INFINITE[dtype] << DROPPED[dtype])
    return torch.where(x != x, NAN[dtype] << DROPPED[dtype], magnitude)


def _assemble(magnitude, x, dtype):
    """16-bit magnitudes with the signs of ``x``.

    The way leads over fp32, which has every number of 16 bits: torch.compile makes vectors of it, and none of 16-bit integers.
    """
    value = from_bits((magnitude << DROPPED[dtype]) | _sign(x))
    if dtype == torch.float16:
        value = torch.where(magnitude > INFINITE[dtype], float("nan"), value * 2.0**112)
    return value.to(dtype)


def round_stochastic(x, noise, dtype):
    """fp32 -> ``dtype``, up or down with the probabilities that make the mean right.

    Representable values stay as they are, NaN and inf as well. ``noise``: a 32-bit word for each, here and below int32, or
    int64 in [0, 2^32).
    """
    if dtype == torch.float32:
        return x
    dropped = DROPPED[dtype]
    return _assemble(_words(x, dtype) + _right(noise, 32 - dropped) >> dropped, x, dtype)


def split(x, noise, dtype):
    """fp32 -> a 16-bit number and the next 8 bits: the 24-bit weight ``join(high, low)``.

    The weight is ``x`` rounded stochastically to 8 bits more than ``dtype`` has; ``high`` is that, rounded to nearest with
    halves away from zero, so that ``low`` is exactly in [-128, 127]. Between the largest 24-bit weight and the point from which
    ``dtype`` has inf, the weight is the largest one: noise must not push a number to inf that is to stay finite.

    Returns:
        ``high`` in ``dtype`` and ``low`` in int8.
    """
    below = DROPPED[dtype] - 8
    field = torch.where(x.abs() < LARGEST_WEIGHT[dtype], _right(noise, 32 - below), 0)
    weight = (_words(x, dtype) + field) >> below
    tiny = torch.zeros_like(weight, dtype=torch.bool)
    if dtype == torch.float16:  # half the smallest number is 3e-8: what would become 0 goes up or down as chance has it
        tiny = weight < 0x80
    high = (weight + torch.where(tiny, noise >> 16 & 0xFF, 0x80)) >> 8
    return _assemble(high, x, dtype), torch.where(tiny, 0, weight - (high << 8)).to(torch.int8)


def join(high, low):
    """The fp32 value of a 24-bit weight.

    ``low`` counts for nothing where ``high`` is 0 or not finite: it may be left from another value that the user has replaced.
    """
    dtype = high.dtype
    wide = high.float()
    magnitude = _magnitude(wide, dtype) >> DROPPED[dtype]
    value = from_bits(((magnitude << 8) + low) << (DROPPED[dtype] - 8) | _sign(wide))
    if dtype == torch.float16:
        value = value * 2.0**112
    return torch.where((magnitude >= 1) & (magnitude < INFINITE[dtype]), value, wide)


# 8-bit states: `value = scale * code`, one power-of-two scale for GROUP values, so that scaling is exact. The codes are small
# floats: a momentum has sign, 4 exponent and 3 mantissa bits (e4m3); a Hessian is never negative and has 5 exponent bits
# instead (e5m3): twice the resolution that the square root in e4m3 has, over the same range, without the square root.
TOP = {"exp_avg": 8, "hessian": 16}  # exponent of the largest codes; the largest value of a group is given one of them
MAGNITUDE = {"exp_avg": 0x7F, "hessian": 0xFF}
SHRINK = {"exp_avg": 120, "hessian": 112}  # 2^-SHRINK brings a code's exponent range to the lowest one of fp32


def encode_groups(x, noise, kind):
    """fp32 [groups, n] -> codes uint8 [groups, n] and scales fp32 [groups], rounded stochastically.

    A NaN or an inf makes its whole group NaN, through the scale.

    Args:
        x: the values.
        noise: [groups, n] of 32 bits.
        kind: "exp_avg" or "hessian"; a negative Hessian is stored as 0.
    """
    if kind == "hessian":
        x = torch.where(x < 0, 0.0, x)
    largest = bits(x.abs()).amax(1).clamp(max=0x7F800000)  # whichever NaN it is
    # A mantissa from 1.875 on could be rounded up beyond the largest code: the eighth moves it to the next exponent.
    exponent = (((largest + 0x100000) >> 23) - TOP[kind]).clamp(min=1)
    scale = torch.where(largest < 0x7F800000, from_bits(exponent << 23), float("nan"))
    inverse = from_bits((254 - exponent) << 23)
    field = (noise >> 12 if kind == "exp_avg" else noise) & 0xFFF
    code = bits(x.abs() * inverse[:, None] * 2.0 ** -SHRINK[kind]) + ((field << 8) | 0x80) >> 20
    if kind == "exp_avg":
        code = code & 0x7F | (_right(bits(x), 31) << 7)
    return (code & 0xFF).to(torch.uint8), scale


def decode_groups(code, scale, kind):
    """The fp32 values [groups, n] of 8-bit codes; the inverse of `encode_groups`."""
    magnitude = code.to(torch.int32) & MAGNITUDE[kind]
    value = from_bits(magnitude << 20) * 2.0 ** SHRINK[kind] * scale[:, None]
    return torch.where(code > 127, -value, value) if kind == "exp_avg" else value


def encode(x, noise, kind):
    """`encode_groups` of a vector in memory order: [numel] -> [numel] and [ceil(numel / GROUP)]."""
    code, scale = encode_groups(_in_groups(x), _in_groups(noise), kind)
    return code.view(-1)[: x.numel()], scale


def decode(code, scale, kind):
    """`decode_groups` of a vector in memory order: [numel] and [ceil(numel / GROUP)] -> [numel]."""
    return decode_groups(_in_groups(code), scale, kind).view(-1)[: code.numel()]


def _in_groups(x):
    """A vector as rows of GROUP elements, the last of which is filled up with 0."""
    return torch.nn.functional.pad(x, (0, -x.numel() % GROUP)).view(-1, GROUP)


def in_memory_order(tensor):
    """A dense tensor, whatever the order of its dimensions, as the vector that lies in memory."""
    return tensor.as_strided((tensor.numel(),), (1,))


def load_state(state, scale, kind):
    """The fp32 values of a state: fp32 or bf16, or 8-bit codes with their scales."""
    if state.dtype != torch.uint8:
        return state.float()
    return decode(in_memory_order(state), scale, kind).as_strided(state.shape, state.stride())


def load_block(state, scale, kind):
    """The fp32 values of a block [rows, n] of a state, whose scales are [rows]."""
    return state.float() if state.dtype != torch.uint8 else decode_groups(state, scale, kind)


def store_block(state, scale, x, word, kind):
    """Store fp32 values [rows, n] in a block of a state.

    A bf16 Hessian is rounded stochastically: its small changes would be lost to nearest.
    """
    if state.dtype == torch.uint8:
        code, new_scale = encode_groups(x, word, kind)
        state.copy_(code)
        scale.copy_(new_scale)
    elif state.dtype == torch.bfloat16 and kind == "hessian":
        state.copy_(round_stochastic(x, word << 16, state.dtype))
    else:
        state.copy_(x)  # to nearest, ties to even

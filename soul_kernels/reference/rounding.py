"""How fp32 results are stored: four roundings of a parameter and two 8-bit formats of a state, on bit patterns.

All of it is integer arithmetic or exact powers of two, so that these definitions, the interpreter and a GPU agree bit for bit.

**Noise** is a hash of (seed, tensor, step, element), never the device's random state: replicas agree, and a resumed run
repeats what an uninterrupted one does. One 32-bit word an element, split into fields: bits 31..16 for the parameter, 23..12
for an 8-bit momentum, 15..0 for a bf16 Hessian or 11..0 for an 8-bit one.

**Magnitudes.** bf16 is the upper half of fp32. An fp16 number is the same with another exponent range: the fp32 bits of
``|x| 2^-112``, shifted right by 13, are the bits of ``|x|`` in fp16, subnormal numbers included.
"""

import torch

GROUP = 256  # values that share the scale of an 8-bit state
PRIME = 0x9E3779B9  # 2^32 / golden ratio: consecutive counters become far apart
WORD = 0xFFFFFFFF
DROPPED = {torch.bfloat16: 16, torch.float16: 13}  # low bits of the fp32 magnitude that the format has not
INFINITE = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00}
NAN = {torch.bfloat16: 0x7FC0, torch.float16: 0x7E00}
LARGEST_WEIGHT = {torch.bfloat16: float.fromhex("0x1.FEFEp127"), torch.float16: 65519.875}  # the largest with low bits, 127


def mix(x):
    """A bijection of 32-bit words that spreads every input bit (lowbias32 of C. Wellons, less its first shift)."""
    x = (x * 0x7FEB352D) & WORD
    x = ((x ^ (x >> 15)) * 0x846CA68B) & WORD
    return x ^ (x >> 16)


def salt(seed, tensor):
    """What a tensor contributes to its noise: a 32-bit hash of the user's seed and of the tensor's number."""
    return mix(mix(mix(mix(seed & WORD) ^ (seed >> 32 & WORD)) + tensor & WORD) ^ PRIME)


def noise(salt, step, numel, device, start=0):
    """Return a 32-bit word for each of ``numel`` elements of a tensor, from number ``start`` on, at one step (a number or a
    tensor of one): [numel] int64.
    """
    index = torch.arange(start, start + numel, device=device)
    step = step.long() if isinstance(step, torch.Tensor) else int(step)  # never read: a tensor may be without data
    key = mix(mix((salt + step * PRIME) & WORD) ^ (index >> 32))
    return mix(key ^ (index & WORD))


def store_nearest(destination, x):
    """``destination <- x``, rounded to nearest, ties to even, into the dtype of ``destination``; in place."""
    destination.copy_(x)


def bits(x):
    """The bit pattern of an fp32 tensor as int64 in [0, 2^32)."""
    return x.view(torch.int32).to(torch.int64) & WORD


def from_bits(pattern):
    """The fp32 tensor of a bit pattern."""
    return torch.where(pattern >= 2**31, pattern - 2**32, pattern).to(torch.int32).view(torch.float32)


def _words(x, dtype):
    """fp32 bits of ``x`` in the exponent range of ``dtype``; one pattern for all NaN, one for all that overflow fp16."""
    if dtype == torch.float16:
        magnitude = bits(x.abs() * 2.0**-112).clamp(max=INFINITE[dtype] << DROPPED[dtype])
    else:
        magnitude = bits(x.abs())
    return torch.where(x.isnan(), NAN[dtype] << DROPPED[dtype], magnitude)


def _assemble(magnitude, x, dtype):
    """16-bit magnitudes with the signs of ``x``."""
    pattern = magnitude | (x.signbit().long() << 15)
    return torch.where(pattern >= 2**15, pattern - 2**16, pattern).to(torch.int16).view(dtype)


def store_stochastic(destination, x, noise):
    """``destination <- x``, up or down with the probabilities that make the mean right; in place.

    Representable values stay as they are, NaN and inf as well. ``noise``: [numel] of 32 bits.
    """
    dtype = destination.dtype
    if dtype == torch.float32:
        return store_nearest(destination, x)
    dropped = DROPPED[dtype]
    destination.copy_(_assemble(_words(x, dtype) + (noise >> (32 - dropped)) >> dropped, x, dtype))


def split(x, noise, dtype):
    """fp32 -> a 16-bit number and the next 8 bits: the 24-bit weight ``join(high, low)``.

    The weight is ``x`` rounded stochastically to 8 bits more than ``dtype`` has; ``high`` is that, rounded to nearest with
    halves away from zero, so that ``low`` is exactly in [-128, 127]. Between the largest 24-bit weight and the point from which
    ``dtype`` has inf, the weight is the largest one: noise must not push a number to inf that is to stay finite.

    Returns:
        ``high`` in ``dtype`` and ``low`` in int8.
    """
    below = DROPPED[dtype] - 8
    field = torch.where(x.abs() < LARGEST_WEIGHT[dtype], noise >> (32 - below), 0)
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
    magnitude = high.view(torch.int16).to(torch.int64) & 0x7FFF
    value = from_bits(((magnitude << 8) + low) << (DROPPED[dtype] - 8))
    if dtype == torch.float16:
        value = value * 2.0**112
    value = torch.where((magnitude >= 1) & (magnitude < INFINITE[dtype]), value, high.abs().float())
    return torch.where(high.view(torch.int16) < 0, -value, value)


# 8-bit states: `value = scale * code`, one power-of-two scale for GROUP values, so that scaling is exact. The codes are small
# floats: a momentum has sign, 4 exponent and 3 mantissa bits (e4m3); a Hessian is never negative and has 5 exponent bits
# instead (e5m3): twice the resolution that the square root in e4m3 has, over the same range, without the square root.
TOP = {"exp_avg": 8, "hessian": 16}  # exponent of the largest codes; the largest value of a group is given one of them
MAGNITUDE = {"exp_avg": 0x7F, "hessian": 0xFF}
SHRINK = {"exp_avg": 120, "hessian": 112}  # 2^-SHRINK brings a code's exponent range to the lowest one of fp32


def encode(x, noise, kind):
    """fp32 [numel] -> codes uint8 [numel] and scales fp32 [ceil(numel / GROUP)], rounded stochastically.

    A NaN or an inf makes its whole group NaN, through the scale.

    Args:
        x: the values, in memory order.
        noise: [numel] of 32 bits.
        kind: "exp_avg" or "hessian"; a negative Hessian is stored as 0.
    """
    if kind == "hessian":
        x = torch.where(x < 0, 0.0, x)
    magnitude = bits(x.abs())
    largest = torch.nn.functional.pad(magnitude, (0, -x.numel() % GROUP)).view(-1, GROUP).amax(1)
    largest = largest.clamp(max=0x7F800000)  # whichever NaN it is
    # A mantissa from 1.875 on could be rounded up beyond the largest code: the eighth moves it to the next exponent.
    exponent = (((largest + 0x100000) >> 23) - TOP[kind]).clamp(min=1)
    scale = torch.where(largest < 0x7F800000, from_bits(exponent << 23), float("nan"))
    inverse = from_bits((254 - exponent) << 23).repeat_interleave(GROUP)[: x.numel()]
    field = (noise >> 12 if kind == "exp_avg" else noise) & 0xFFF
    code = bits(x.abs() * inverse * 2.0 ** -SHRINK[kind]) + ((field << 8) | 0x80) >> 20
    if kind == "exp_avg":
        code = code & 0x7F | (x.signbit().long() << 7)
    return (code & 0xFF).to(torch.uint8), scale


def decode(code, scale, kind):
    """The fp32 values of 8-bit codes; the inverse of `encode`."""
    magnitude = code.to(torch.int64) & MAGNITUDE[kind]
    value = from_bits(magnitude << 20) * 2.0 ** SHRINK[kind] * scale.repeat_interleave(GROUP)[: code.numel()]
    return torch.where(code > 127, -value, value) if kind == "exp_avg" else value


def in_memory_order(tensor):
    """A dense tensor, whatever the order of its dimensions, as the vector that lies in memory."""
    return tensor.as_strided((tensor.numel(),), (1,))


def load_state(state, scale, kind):
    """The fp32 values of a state: fp32 or bf16, or 8-bit codes with their scales."""
    if state.dtype != torch.uint8:
        return state.float()
    return decode(in_memory_order(state), scale, kind).as_strided(state.shape, state.stride())


def store_state(state, scale, x, word, kind):
    """Stores fp32 values in a state. A bf16 Hessian is rounded stochastically: its small changes would be lost to nearest."""
    if state.dtype == torch.uint8:
        x = torch.empty_like(state, dtype=torch.float32).copy_(x)  # the layout of the state
        code, new_scale = encode(in_memory_order(x), in_memory_order(word), kind)
        in_memory_order(state).copy_(code)
        scale.copy_(new_scale)
    elif state.dtype == torch.bfloat16 and kind == "hessian":
        store_stochastic(state, x, (word << 16) & WORD)
    else:
        store_nearest(state, x)

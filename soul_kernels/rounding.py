"""Device functions that convert between storage formats and fp32. Kernels store numbers below fp32 through these only.

Each function gives the same bits as the function of that name in ``reference/rounding.py``, which explains the formats, the
noise and the reasons; `round_nearest` gives those of torch's ``to()``. Only a NaN may have other bits. A change must be made
in both; ``tests/kernels/test_rounding.py`` compares them. Constexpr arguments choose the format: ``DTYPE``, and ``HESSIAN``,
which is true for the 8-bit format of a Hessian and false for a momentum's.
"""

from typing import Any, NamedTuple

from soul_kernels._launch import interpreting, tl, triton
from soul_kernels.reference import rounding as reference

ROUNDINGS = ("nearest", "stochastic", "compensated")
INTERPRETED = tl.constexpr(interpreting())  # as for the kernels: Triton also chooses when a function is defined
GROUP = tl.constexpr(reference.GROUP)
SMALLEST = tl.constexpr(reference.SMALLEST)
M_POLE = tl.constexpr(reference.M_POLE)
M_BEND = tl.constexpr(reference.M_BEND)
M_STEP = tl.constexpr(reference.M_STEP)
H_LEVELS = tl.constexpr(reference.H_LEVELS)
H_STEP = tl.constexpr(reference.H_STEP)


class Block(NamedTuple):
    """Elements of a chunk of a tensor that a program works on at once, within a kernel.

    Attributes:
        offsets: [BLOCK] int32, from the start of the chunk.
        mask: [BLOCK] bool, or None in a full block: only unmasked accesses are 16 bytes wide.
        group: index of the block's first group of 8-bit values, from the start of the chunk.
        groups: number of groups in the chunk.
    """

    offsets: Any
    mask: Any
    group: Any
    groups: Any


@triton.jit
def mix(x):
    """Apply a bijection of 32-bit words that spreads every input bit."""
    x = x * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def noise_key(salt, step):
    """Return the key from which the noise of one tensor in one step is hashed."""
    return mix(salt.to(tl.uint32) + step.to(tl.int32).to(tl.uint32) * 0x9E3779B9)


@triton.jit
def noise_words(key, first, offsets, CROSSES: tl.constexpr):
    """Return one 32-bit word for each element ``first + offsets``.

    ``CROSSES``: the upper half of an element's number may differ from that of ``first``.
    """
    high = first >> 32  # without CROSSES the same for all elements, so the compiler computes it before the loop
    if CROSSES:
        high = (first + offsets) >> 32
    return mix(mix(key ^ high.to(tl.uint32)) ^ (first.to(tl.uint32) + offsets.to(tl.uint32)))


@triton.jit
def round_nearest(x, DTYPE: tl.constexpr):
    """Round fp32 to ``DTYPE``, to nearest, ties to even; NaN stays NaN and overflow becomes inf, as in torch's ``to()``.

    Compiled, this is one conversion, of two numbers where the compiler finds a pair. Its NaN is 0x7FFF.
    """
    if INTERPRETED and DTYPE == tl.bfloat16:  # the interpreter's conversion truncates, so there the bits are rounded
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        bits = tl.where(x == x, bits, 0x7FC00000)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(DTYPE)


@triton.jit
def _bits(x, DTYPE: tl.constexpr):
    """Return the fp32 bits; for fp16 those of ``|x| 2^-112``, which has its exponent range."""
    if DTYPE == tl.bfloat16:
        return x.to(tl.uint32, bitcast=True)
    else:
        return (tl.abs(x) * 1.925929944387236e-34).to(tl.uint32, bitcast=True)  # 2^-112


@triton.jit
def _words(x, DTYPE: tl.constexpr):
    """Return `_bits`, with all NaN mapped to one pattern, and all numbers that overflow fp16 to another."""
    if DTYPE == tl.bfloat16:
        return tl.where(x == x, _bits(x, DTYPE), 0x7FC00000)
    else:
        return tl.where(x == x, tl.minimum(_bits(x, DTYPE), 0x7C00 << 13), 0x7E00 << 13)


@triton.jit
def _assemble(pattern, x, DTYPE: tl.constexpr):
    """Return numbers of ``DTYPE`` from 16-bit patterns; fp16 patterns lack the sign, which is taken from ``x``."""
    if DTYPE == tl.float16:
        pattern |= x.to(tl.uint32, bitcast=True) >> 31 << 15
    return pattern.to(tl.uint16).to(DTYPE, bitcast=True)


@triton.jit
def round_stochastic(x, noise, DTYPE: tl.constexpr):
    """Round fp32 to ``DTYPE``, up or down at random so that the mean of the result is ``x``."""
    if DTYPE == tl.float32:
        return x
    else:
        DROPPED: tl.constexpr = 16 if DTYPE == tl.bfloat16 else 13
        return _assemble((_words(x, DTYPE) + (noise >> (32 - DROPPED))) >> DROPPED, x, DTYPE)


@triton.jit
def split(x, noise, DTYPE: tl.constexpr):
    """Round fp32 to a 24-bit weight: a 16-bit number and the next 8 bits."""
    BELOW: tl.constexpr = 8 if DTYPE == tl.bfloat16 else 5
    LARGEST: tl.constexpr = 3.3961256062618747e38 if DTYPE == tl.bfloat16 else 65519.875
    # Choosing between the two results costs one instruction; choosing the noise would cost three.
    words = tl.where(tl.abs(x) < LARGEST, _bits(x, DTYPE) + (noise >> (32 - BELOW)), _words(x, DTYPE))
    weight = words >> BELOW
    if DTYPE == tl.float16:
        tiny = weight < 0x80
        high = (weight + tl.where(tiny, (noise >> 16) & 0xFF, 0x80)) >> 8
        weight = tl.where(tiny, 0, weight)
    else:
        high = (words + 0x8000) >> 16  # (weight + 0x80) >> 8; an upper half needs no shift
    return _assemble(high, x, DTYPE), weight.to(tl.int8)  # the low byte is what was rounded away, signed


@triton.jit
def join(high, low, DTYPE: tl.constexpr):
    """Return the fp32 value of a 24-bit weight."""
    INFINITE: tl.constexpr = 0x7F80 if DTYPE == tl.bfloat16 else 0x7C00
    pattern = high.to(tl.uint16, bitcast=True).to(tl.uint32)
    counts = ((pattern & 0x7FFF) - 1) < (INFINITE - 1)
    low = tl.where(counts, low.to(tl.int32), 0)
    if DTYPE == tl.bfloat16:
        return ((pattern << 16) + (low << 8).to(tl.uint32)).to(tl.float32, bitcast=True)
    else:
        magnitude = (((pattern & 0x7FFF) << 8) + low.to(tl.uint32)) << 5
        value = magnitude.to(tl.float32, bitcast=True) * 5.192296858534828e33  # 2^112
        value = tl.where(counts, value, tl.abs(high.to(tl.float32)))
        # The sign as a bit: older versions of Triton compute -0.0 as 0.0 - 0.0.
        return (value.to(tl.uint32, bitcast=True) | (pattern >> 15 << 31)).to(tl.float32, bitcast=True)


@triton.jit
def _spread(number, BLOCK: tl.constexpr):
    """Repeat the number of each group of a block [BLOCK / GROUP] for the values of the group: [BLOCK]."""
    return tl.reshape(tl.broadcast_to(number[:, None], [BLOCK // GROUP, GROUP]), [BLOCK])


@triton.jit
def encode(x, noise, HESSIAN: tl.constexpr, BLOCK: tl.constexpr):
    """Round fp32 [BLOCK] to 8-bit codes uint8 [BLOCK] and scales int16 [BLOCK / GROUP]; a NaN or an inf makes its group NaN.

    ``noise``: a word for each value of a Hessian, or None to round to nearest.
    """
    if HESSIAN:
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    magnitude = tl.abs(x)
    # Bit patterns as integers are in the order of the numbers, with inf and NaN on top.
    largest = tl.max(tl.reshape(magnitude.to(tl.int32, bitcast=True), [BLOCK // GROUP, GROUP]), 1)
    rounded = tl.minimum((tl.maximum(largest, SMALLEST) + 0x4000) >> 15, 0xFEFF)
    number = (rounded << 15).to(tl.float32, bitcast=True)
    scale = tl.where(largest < 0x7F800000, rounded, 0xFF80).to(tl.int16)
    if HESSIAN:
        level = tl.sqrt_rn(x * _spread(tl.div_rn(H_LEVELS, number), BLOCK))
        if noise is not None:
            level += ((noise << 7 & 0x7FFF80) | 0x3F800000).to(tl.float32, bitcast=True) - 1.5
            level = tl.minimum(level, 255.0)  # the scale may have been rounded down
    else:
        t = x * _spread(tl.div_rn(M_BEND, number), BLOCK)
        level = tl.div_rn(t * M_POLE, tl.abs(t) + 1.0)
    # Adding 1.5 2^23 rounds to an integer, whose two's complement is then the low end of the pattern.
    return (level + 12582912.0).to(tl.uint32, bitcast=True).to(tl.uint8), scale


@triton.jit
def decode(code, scale, HESSIAN: tl.constexpr, BLOCK: tl.constexpr):
    """Return the fp32 values [BLOCK] of 8-bit codes [BLOCK] and their scales [BLOCK / GROUP]."""
    scale = (scale.to(tl.uint16, bitcast=True).to(tl.uint32) << 15).to(tl.float32, bitcast=True)
    if HESSIAN:
        level = code.to(tl.float32)
        return level * level * _spread(scale * H_STEP, BLOCK)
    else:
        level = code.to(tl.int8, bitcast=True).to(tl.float32)
        return tl.div_rn(level, M_POLE - tl.abs(level)) * _spread(scale * M_STEP, BLOCK)


@triton.jit
def load(ptr, offsets, mask):
    """Return elements as they are stored; 0 where ``mask`` is false."""
    if mask is None:  # only an unmasked access is 16 bytes wide
        return tl.load(ptr + offsets)
    else:
        return tl.load(ptr + offsets, mask=mask, other=0)


@triton.jit
def load_state(ptr, scale_ptr, block, DTYPE: tl.constexpr, HESSIAN: tl.constexpr, BLOCK: tl.constexpr):
    """Return a `Block` of a state in fp32."""
    stored = load(ptr, block.offsets, block.mask)
    if DTYPE == tl.uint8:
        index = block.group + tl.arange(0, BLOCK // GROUP)
        scale = load(scale_ptr, index, None if block.mask is None else index < block.groups)
        return decode(stored, scale, HESSIAN, BLOCK)
    else:
        return stored.to(tl.float32)


@triton.jit
def store_state(
    ptr, scale_ptr, x, noise, block, DTYPE: tl.constexpr, HESSIAN: tl.constexpr, STOCHASTIC: tl.constexpr, BLOCK: tl.constexpr
):
    """Store a `Block` of a state. A bf16 Hessian is rounded stochastically: rounding to nearest would lose small changes.

    ``STOCHASTIC``: so is an 8-bit state.
    """
    if DTYPE == tl.uint8:
        if STOCHASTIC:
            code, scale = encode(x, noise, HESSIAN, BLOCK)
        else:
            code, scale = encode(x, None, HESSIAN, BLOCK)
        index = block.group + tl.arange(0, BLOCK // GROUP)
        tl.store(scale_ptr + index, scale, mask=None if block.mask is None else index < block.groups)
        tl.store(ptr + block.offsets, code, mask=block.mask)
    elif HESSIAN:
        tl.store(ptr + block.offsets, round_stochastic(x, noise << 16, DTYPE), mask=block.mask)
    else:
        tl.store(ptr + block.offsets, round_nearest(x, DTYPE), mask=block.mask)

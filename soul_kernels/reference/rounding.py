"""Storage formats of fp32 results: four roundings of a parameter and two 8-bit formats of a state, on bit patterns.

How the file works. All of it is integer arithmetic on the bit patterns of fp32 numbers, or multiplication by powers of two,
which is exact. Therefore these definitions, Triton's interpreter and a GPU agree bit for bit; ``soul_kernels/rounding.py``
has the same functions for kernels. A NaN is a NaN everywhere, but its bits are the machine's: rounded to bf16 it becomes 0x7FC0
on a CPU and 0x7FFF on a GPU. Every function that needs random bits takes them as an argument; its caller draws them with
`noise_key` and `noise_words`.

**Noise** is a hash of (seed, tensor, step, element), never the device's random state. So replicas agree, and a resumed run
repeats what an uninterrupted one does. Elements are numbered in the whole tensor, so that shards draw what one process would
draw. Each element has one 32-bit word, which is split into fields: bits 31..16 for the parameter, 15..0 for the Hessian.

**Magnitudes.** bf16 is the upper half of fp32. fp16 differs in its exponent range alone: the fp32 bits of ``|x| 2^-112``,
shifted right by 13, are the bits of ``|x|`` in fp16, subnormal numbers included.

Safe to change: how something is computed, as long as every bit of the result stays; ``tests/kernels/test_rounding.py``
compares all bit patterns with the kernels. Not safe: a format or `GROUP`, which say what stored states mean, and the hash or
the fields of a word, which say what a resumed run draws. The operations are chosen so that torch.compile vectorizes them on a
CPU: they are on int32 and fp32, not on 16-bit integers or int64.
"""

import math
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

GROUP = 32  # values that share the scale of an 8-bit state
PRIME = 0x9E3779B9  # 2^32 / golden ratio: multiples of it by consecutive counters are far apart
WORD = 0xFFFFFFFF  # mask of a 32-bit word
SIGN = -(1 << 31)  # the sign bit of an fp32 pattern, as int32
DROPPED = {torch.bfloat16: 16, torch.float16: 13}  # low bits of the fp32 magnitude that the format lacks
INFINITE = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00}
NAN = {torch.bfloat16: 0x7FC0, torch.float16: 0x7E00}
# The largest 24-bit weight; its low bits are 127.
LARGEST_WEIGHT = {torch.bfloat16: float.fromhex("0x1.FEFEp127"), torch.float16: 65519.875}

Word = TypeVar("Word", int, Tensor)  # a 32-bit word as a Python integer, or an int32 tensor of words


def scalar(value: float | Tensor) -> Tensor:
    """Return a number as an fp32 tensor of shape (), or the only element of a tensor as a tensor of shape ()."""
    return value.reshape(()) if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=torch.float32, device="cpu")


def _right(x: Word, by: int) -> Word:
    """Return ``x >> by`` of 32-bit words as a logical shift: zeros come in from the left, whatever the sign."""
    return (x >> by) & (WORD >> by)


def _times(x: Word, factor: int) -> Word:
    """Return the lower half of a product of 32-bit words; products of int32 tensors wrap around."""
    return x * (factor - (factor >> 31 << 32)) if isinstance(x, torch.Tensor) else x * factor & WORD


def mix(x: Word) -> Word:
    """Apply a bijection of 32-bit words that spreads every input bit (lowbias32 of C. Wellons, without its first shift).

    A word is a Python integer or an element of an int32 tensor. A vector register of a CPU holds twice as many of int32 as of
    int64, and AVX2 cannot multiply int64.
    """
    x = _times(x, 0x7FEB352D)
    x = _times(x ^ _right(x, 15), 0x846CA68B)
    return x ^ _right(x, 16)


def salt(seed: int, tensor: int) -> int:
    """Return the salt of a tensor's noise: a 32-bit hash of the user's seed and the tensor's number."""
    return mix(mix(mix(mix(seed & WORD) ^ (seed >> 32 & WORD)) + tensor & WORD) ^ PRIME)


def noise_key(salt: int, step: float | Tensor, start: int, device: torch.device | str) -> Tensor:
    """Return the key of a block, from which the noise of its elements is hashed: an int32 tensor of shape ().

    Args:
        salt: the tensor's `salt`.
        step: a number, or a tensor with one element, whose value is not read on the host: it may have no data.
        start: index of the block's first element in the whole tensor; no block may reach beyond a multiple of 2^32.
        device: the block's device.
    """
    step = step.long() if isinstance(step, torch.Tensor) else torch.tensor(int(step), device=device)
    return mix(mix((salt + step * PRIME).to(torch.int32)) ^ (start >> 32))


def noise_words(key: Tensor, start: Tensor, shape: Sequence[int]) -> Tensor:
    """Return a 32-bit word for each element of a block: an int32 tensor of its shape.

    Args:
        key: the block's `noise_key`.
        start: int64 tensor, otherwise as in `noise_key`.
        shape: the block's shape. Elements are numbered in the order of its dimensions.
    """
    index = torch.arange(math.prod(shape), dtype=torch.int32, device=key.device).view(shape)
    return mix(key ^ (index + start.to(torch.int32)))


def bits(x: Tensor) -> Tensor:
    """Return the bit pattern of an fp32 tensor as int32."""
    return x.view(torch.int32)


def from_bits(pattern: Tensor) -> Tensor:
    """Return the fp32 tensor with a given bit pattern: int32, or int64, whose lower 32 bits count."""
    return pattern.to(torch.int32).view(torch.float32)


def _sign(x: Tensor) -> Tensor:
    """Return the bit pattern of ``x`` with all bits but the sign cleared."""
    return bits(x) & SIGN


def _magnitude(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the fp32 bits of ``|x|``; for fp16 those of ``|x| 2^-112``, which has its exponent range."""
    if dtype == torch.float16:
        return bits(x.abs() * 2.0**-112)
    return bits(x) & ~SIGN


def _words(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `_magnitude`, with one pattern for all NaN and one for all numbers that overflow fp16."""
    magnitude = _magnitude(x, dtype)
    if dtype == torch.float16:
        magnitude = magnitude.clamp(max=INFINITE[dtype] << DROPPED[dtype])
    return torch.where(x != x, NAN[dtype] << DROPPED[dtype], magnitude)


def _assemble(magnitude: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return numbers of ``dtype`` from 16-bit magnitudes and the signs of ``x``.

    They are assembled in fp32, which represents every 16-bit number: torch.compile vectorizes fp32, but not 16-bit integers.
    """
    value = from_bits((magnitude << DROPPED[dtype]) | _sign(x))
    if dtype == torch.float16:
        value = torch.where(magnitude > INFINITE[dtype], float("nan"), value * 2.0**112)
    return value.to(dtype)


def round_stochastic(x: Tensor, noise: Tensor, dtype: torch.dtype) -> Tensor:
    """Round fp32 numbers to ``dtype``, up or down at random so that the mean of the result is ``x``.

    Representable numbers, NaN and inf do not change.

    Args:
        x: fp32.
        noise: a 32-bit word for each number, as int32, or as int64 in [0, 2^32); this holds for all functions below.
        dtype: fp32, bf16 or fp16.
    """
    if dtype == torch.float32:
        return x
    dropped = DROPPED[dtype]
    return _assemble(_words(x, dtype) + _right(noise, 32 - dropped) >> dropped, x, dtype)


def split(x: Tensor, noise: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Round fp32 numbers to 24-bit weights, each a 16-bit number and the next 8 bits; `join` returns its value.

    The weight is ``x`` rounded stochastically to 8 bits more than ``dtype`` has. ``high`` is the weight rounded to nearest,
    halves away from zero; so ``low`` is exactly in [-128, 127]. From the largest 24-bit weight up to the point where ``dtype``
    overflows, the result is the largest weight: noise must not push a finite number to inf.

    Returns:
        ``high`` in ``dtype`` and ``low`` in int8.
    """
    below = DROPPED[dtype] - 8
    field = torch.where(x.abs() < LARGEST_WEIGHT[dtype], _right(noise, 32 - below), 0)
    weight = (_words(x, dtype) + field) >> below
    tiny = torch.zeros_like(weight, dtype=torch.bool)
    if dtype == torch.float16:  # below 3e-8, half the smallest number, nearest would give 0: these are rounded stochastically
        tiny = weight < 0x80
    high = (weight + torch.where(tiny, noise >> 16 & 0xFF, 0x80)) >> 8
    return _assemble(high, x, dtype), torch.where(tiny, 0, weight - (high << 8)).to(torch.int8)


def join(high: Tensor, low: Tensor) -> Tensor:
    """Return the fp32 value of a 24-bit weight.

    ``low`` is ignored where ``high`` is 0 or not finite: it may belong to another value, which the user has replaced.
    """
    dtype = high.dtype
    wide = high.float()
    magnitude = _magnitude(wide, dtype) >> DROPPED[dtype]
    value = from_bits(((magnitude << 8) + low) << (DROPPED[dtype] - 8) | _sign(wide))
    if dtype == torch.float16:
        value = value * 2.0**112
    return torch.where((magnitude >= 1) & (magnitude < INFINITE[dtype]), value, wide)


# 8-bit states. GROUP values share a scale: the largest magnitude among them, in 16 bits, which are fp32 without its sign and
# without its last 15 bits. Codes are levels of a companded value, -127..127 of a momentum (two's complement) and 0..255 of a
# Hessian, which is never negative:
#
#     momentum: level = M_POLE t / (1 + |t|), where t = M_BEND value / scale; value = M_STEP scale level / (M_POLE - |level|)
#     Hessian: level = 255 sqrt(value / scale); value = scale (level / 255)^2
#
# So levels are denser where values are small, at zero four to five times as dense for a momentum as at the largest value.
# Everything is a rounded product, sum, quotient or root of fp32, or integer arithmetic: without fused multiply-add the same
# bits on every machine. docs/optimizer.md compares the errors with those of other formats.
#
# A group is GROUP neighbours in memory, counted from a tensor's first element. So where the rows of a tensor (its slices along
# dimension 0) have a multiple of GROUP elements, as in nearly every matrix of a model, each row has groups of its own: row r of
# a contiguous [rows, cols] has the scales from r cols / GROUP on, and shards of rows hold whole groups with their scales. The
# kernel needs no division for it. The optimizers give 8-bit states to such tensors only: see ``soul/optim/scales.py``.
M_POLE = 242.0
M_BEND = 127.0 / (M_POLE - 127.0)  # t of the largest value, whose level is 127
M_STEP = 1.0 / M_BEND
H_LEVELS = 255.0**2
H_STEP = 1.0 / H_LEVELS
NAN_SCALE = -0x80  # the scale of a group with a NaN or an inf: the upper 16 of the last 31 bits of an fp32 NaN
SMALLEST = (127 - 109) << 23  # pattern of the smallest scale: products and quotients with it neither overflow nor lose bits


# Rounded to nearest, h stands still where a step changes it by less than half a level. The squared gradients' own noise carries
# it over up to beta2 = 0.99: the mean of h is then off by 1% at most, and by up to 70% with 0.999. Above, h is rounded
# stochastically, at the price of twice the variance of each rounding.
NEAREST_UP_TO = 0.99


def draws_codes(beta2: float | None) -> bool:
    """Tell whether an 8-bit Hessian with this decay is rounded stochastically."""
    return beta2 is not None and beta2 > NEAREST_UP_TO


def encode_groups(x: Tensor, noise: Tensor | None, kind: str) -> tuple[Tensor, Tensor]:
    """Round groups of fp32 values to 8-bit codes with a scale for each group.

    A NaN or an inf makes its whole group NaN, through the scale. Values below 2^-109 may become 0.

    Args:
        x: fp32 [groups, n].
        noise: [groups, n], a 32-bit word for each value of a Hessian, to round its level up or down at random; None: to
            nearest.
        kind: "exp_avg" or "hessian"; a negative Hessian is stored as 0.

    Returns:
        Codes uint8 [groups, n] and scales int16 [groups].
    """
    if kind == "hessian":
        x = torch.where(x < 0, 0.0, x)
    largest = bits(x.abs()).amax(1)  # NaN has many patterns, all above inf
    rounded = (largest.clamp(SMALLEST, 0x7F800000) + 0x4000 >> 15).clamp(max=0xFEFF)
    number = from_bits(rounded << 15)[:, None]
    scale = torch.where(largest < 0x7F800000, rounded, NAN_SCALE)
    if kind == "hessian":
        level = (x * (H_LEVELS / number)).sqrt()
        if noise is not None:
            level = level + (from_bits((noise << 7) & 0x7FFF80 | 0x3F800000) - 1.5)
            level = level.clamp(max=255.0)  # the scale may have been rounded down
    else:
        t = x * (M_BEND / number)
        level = t * M_POLE / (t.abs() + 1.0)
    # Adding 1.5 2^23 rounds to an integer, whose two's complement is then the low end of the pattern.
    code = bits(level + 12582912.0) & 0xFF
    return code.to(torch.uint8), scale.to(torch.int16)


def decode_groups(code: Tensor, scale: Tensor, kind: str) -> Tensor:
    """Return the fp32 values [groups, n] of 8-bit codes; the inverse of `encode_groups`."""
    scale = from_bits((scale.to(torch.int32) & 0xFFFF) << 15)[:, None]
    if kind == "hessian":
        level = code.float()
        return level * level * (scale * H_STEP)
    level = (code.to(torch.int32) << 24 >> 24).float()
    return level / (M_POLE - level.abs()) * (scale * M_STEP)


def encode(x: Tensor, noise: Tensor | None, kind: str) -> tuple[Tensor, Tensor]:
    """Return `encode_groups` of a vector in memory order: codes [numel] and scales [ceil(numel / GROUP)]."""
    code, scale = encode_groups(_in_groups(x), None if noise is None else _in_groups(noise), kind)
    return code.view(-1)[: x.numel()], scale


def decode(code: Tensor, scale: Tensor, kind: str) -> Tensor:
    """Return `decode_groups` of a vector in memory order: the fp32 values [numel] of codes [numel]."""
    return decode_groups(_in_groups(code), scale, kind).view(-1)[: code.numel()]


def _in_groups(x: Tensor) -> Tensor:
    """Return a vector as rows of GROUP elements; the last row is padded with 0."""
    return torch.nn.functional.pad(x, (0, -x.numel() % GROUP)).view(-1, GROUP)


def in_memory_order(tensor: Tensor) -> Tensor:
    """Return a dense tensor as a vector, in the order in which its elements lie in memory."""
    return tensor.as_strided((tensor.numel(),), (1,))


def load_state(state: Tensor, scale: Tensor | None, kind: str) -> Tensor:
    """Return the fp32 values of a state, which is fp32 or bf16, or 8-bit codes with their scales, in any shape."""
    if state.dtype != torch.uint8:
        return state.float()
    assert scale is not None
    return decode(in_memory_order(state), scale.view(-1).view(torch.int16), kind).as_strided(state.shape, state.stride())


def load_block(state: Tensor, scale: Tensor | None, kind: str) -> Tensor:
    """Return the fp32 values of a block [rows, n] of a state; ``scale`` is [rows] for 8-bit codes, else None."""
    if state.dtype != torch.uint8:
        return state.float()
    assert scale is not None
    return decode_groups(state, scale, kind)


def store_block(state: Tensor, scale: Tensor | None, x: Tensor, word: Tensor | None, kind: str) -> None:
    """Store fp32 values [rows, n] in a block of a state.

    A bf16 Hessian is rounded stochastically: rounding to nearest would lose its small changes.

    Args:
        state: [rows, n] in any storage; mutated.
        scale: int16 [rows], the scales of 8-bit codes; mutated. None for other dtypes.
        x: fp32 [rows, n].
        word: the `noise_words` of the block, with which 8-bit codes are rounded stochastically; None: to nearest.
        kind: "exp_avg" or "hessian".
    """
    if state.dtype == torch.uint8:
        assert scale is not None
        code, new_scale = encode_groups(x, word, kind)
        state.copy_(code)
        scale.copy_(new_scale)
    elif state.dtype == torch.bfloat16 and kind == "hessian":
        assert word is not None
        state.copy_(round_stochastic(x, word << 16, state.dtype))
    else:
        state.copy_(x)  # to nearest, ties to even

"""Every instruction form of ``tests/ptx/arithmetic.py`` against an oracle in Python's integers, fractions and decimals.

``expected(opcode, *bits)`` computes one thread's result exactly, from the opcode's own text and one rounding at the end; it
shares nothing with the numpy code. A form that it cannot compute fails its test, so that no form goes untested. Mutants at the
end show that the inputs tell wrong functions from right ones.
"""

import decimal
import functools
import itertools
import math
import random
import struct
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import pytest
import torch

from tests.ptx.arithmetic import DTYPES, FORMS, Unsupported, form, immediate, ulps

# Bits of exponent and mantissa.
FORMATS = {"f16": (5, 10), "bf16": (8, 7), "f32": (8, 23), "f64": (11, 52)}
WIDTHS = {"pred": 1, "amount": 32, "selector": 32, "table": 32}
WIDTHS |= {f"{kind}{bits}": bits for kind in "bus" for bits in (8, 16, 32, 64)}
WIDTHS |= {"f16": 16, "bf16": 16, "f32": 32, "f64": 64}


INTEGERS_TO_32 = ("u8", "s8", "u16", "s16", "u32", "s32")


@pytest.fixture(autouse=True)
def exact():
    """The errors that ``--ptx-ulps`` adds are left out: tests here ask for their own."""
    with ulps(0):
        yield


# ---- The oracle: numbers ----


class Number(NamedTuple):
    """A real number with the sign of its zero; ``size`` is inf or nan where it is not a number."""

    negative: bool
    size: Fraction | float

    @property
    def value(self) -> Fraction | float:
        return -self.size if self.negative else self.size

    @property
    def is_nan(self) -> bool:
        return self.size != self.size


NAN = Number(False, math.nan)


@functools.cache
def decode(bits: int, type_name: str) -> Number:
    exponent_bits, mantissa_bits = FORMATS[type_name]
    negative = bool(bits >> exponent_bits + mantissa_bits)
    exponent = bits >> mantissa_bits & 2**exponent_bits - 1
    mantissa = bits & 2**mantissa_bits - 1
    if exponent == 2**exponent_bits - 1:
        return NAN if mantissa else Number(negative, math.inf)
    if exponent:
        mantissa |= 1 << mantissa_bits
    power = max(exponent, 1) - (2 ** (exponent_bits - 1) - 1) - mantissa_bits
    return Number(negative, Fraction(mantissa << max(power, 0), 1 << max(-power, 0)))


def encode(number: Number, type_name: str) -> int:
    """Round to nearest even."""
    exponent_bits, mantissa_bits = FORMATS[type_name]
    infinity = 2**exponent_bits - 1 << mantissa_bits
    if number.is_nan:
        return 2 ** (exponent_bits + mantissa_bits) - 1
    bits = infinity
    if number.size != math.inf:
        above = number.size.numerator
        below = number.size.denominator
        lowest = 2 - 2 ** (exponent_bits - 1)
        exponent = above.bit_length() - below.bit_length()
        exponent -= above << max(-exponent, 0) < below << max(exponent, 0)
        exponent = max(exponent, lowest) if above else lowest
        shift = exponent - mantissa_bits
        units, rest = divmod(above << max(-shift, 0), below << max(shift, 0))
        half = 2 * rest - (below << max(shift, 0))
        units += half > 0 or (half == 0 and units % 2)
        bits = min(units + (exponent - lowest << mantissa_bits), infinity)
    return number.negative << exponent_bits + mantissa_bits | bits


def add(x: Number, y: Number) -> Number:
    if x.is_nan or y.is_nan or (x.size == y.size == math.inf and x.negative != y.negative):
        return NAN
    if x.size == math.inf or y.size == math.inf:
        return x if x.size == math.inf else y
    total = x.value + y.value
    return Number(total < 0 or (total == 0 and x.negative and y.negative), abs(total))


def negate(x: Number) -> Number:
    return Number(not x.negative, x.size)


def multiply(x: Number, y: Number) -> Number:
    if x.is_nan or y.is_nan or {x.size, y.size} == {0, math.inf}:
        return NAN
    size = math.inf if math.inf in (x.size, y.size) else x.size * y.size
    return Number(x.negative != y.negative, size)


def reciprocal(x: Number) -> Number:
    if x.is_nan:
        return NAN
    size = math.inf if x.size == 0 else Fraction(0) if x.size == math.inf else 1 / x.size
    return Number(x.negative, size)


def divide(x: Number, y: Number) -> Number:
    return multiply(x, reciprocal(y))


def divide_approximately(x: Number, y: Number) -> Number:
    if not y.is_nan and 2**126 < y.size < math.inf:
        return multiply(x, Number(y.negative, Fraction(0)))
    return divide(x, y)


def square_root(x: Number) -> Number:
    if x.is_nan or (x.negative and x.size):
        return NAN
    if x.size in (0, math.inf):
        return x
    # 700 bits behind the point, and one more that tells whether anything follows.
    scaled, rest = divmod(x.size.numerator << 1400, x.size.denominator)
    root = math.isqrt(scaled)
    return Number(False, Fraction(2 * root + (rest != 0 or root * root != scaled), 2**701))


def transcendental(function: Callable[[decimal.Decimal], decimal.Decimal], x: Fraction) -> Number:
    with decimal.localcontext() as context:
        context.prec = 120
        value = Fraction(function(decimal.Decimal(x.numerator) / decimal.Decimal(x.denominator)))
    return Number(value < 0, abs(value))


def exponential(x: Number) -> Number:
    if x.is_nan:
        return NAN
    if x.size > 1000:
        return Number(False, Fraction(0) if x.negative else math.inf)
    return transcendental(lambda value: (value * decimal.Decimal(2).ln()).exp(), x.value)


def logarithm(x: Number) -> Number:
    if x.size == 0:
        return Number(True, math.inf)
    if x.is_nan or x.negative:
        return NAN
    return x if x.size == math.inf else transcendental(lambda value: value.ln() / decimal.Decimal(2).ln(), x.value)


def hyperbolic_tangent(x: Number) -> Number:
    if x.is_nan or x.size == 0:
        return x
    if x.size > 100:
        return Number(x.negative, Fraction(1))
    return transcendental(lambda value: ((2 * value).exp() - 1) / ((2 * value).exp() + 1), x.value)


def extremum(pick: Callable, propagate: bool, numbers: list[Number]) -> Number:
    ordered = [number for number in numbers if not number.is_nan]
    if not ordered or (propagate and len(ordered) < len(numbers)):
        return NAN
    return pick(ordered, key=lambda number: (number.value, not number.negative))


FLOAT_OPERATIONS: dict[str, Callable[..., Number]] = {
    "add": add,
    "sub": lambda x, y: add(x, negate(y)),
    "mul": multiply,
    "fma": lambda x, y, z: add(multiply(x, y), z),
    "div": divide,
    "div.full": divide,
    "div.approx": divide_approximately,
    "rcp": reciprocal,
    "rcp.approx": reciprocal,
    "sqrt": square_root,
    "sqrt.approx": square_root,
    "rsqrt.approx": lambda x: reciprocal(x) if x.size == 0 else NAN if x.negative else square_root(reciprocal(x)),
    "ex2.approx": exponential,
    "lg2.approx": logarithm,
    "tanh.approx": hyperbolic_tangent,
    "min": lambda *numbers: extremum(min, False, numbers),
    "max": lambda *numbers: extremum(max, False, numbers),
    "min.NaN": lambda *numbers: extremum(min, True, numbers),
    "max.NaN": lambda *numbers: extremum(max, True, numbers),
}
ORDERED = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}
ORDERED_UNSIGNED = {"lo": ORDERED["lt"], "ls": ORDERED["le"], "hi": ORDERED["gt"], "hs": ORDERED["ge"]}
INTEGRAL = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}


# ---- The oracle: instructions ----


def signed(bits: int, type_name: str) -> int:
    width = WIDTHS[type_name]
    bits &= 2**width - 1
    return bits - 2**width if type_name[0] == "s" and bits >> width - 1 else bits


def bit(word: int, index: int) -> int:
    return word >> index & 1


def extract(a: int, position: int, length: int, type_name: str) -> int:
    """Follow the loop in the PTX ISA."""
    top = WIDTHS[type_name] - 1
    position = position & 255
    length = length & 255
    sign = 0 if type_name[0] == "u" or length == 0 else bit(a, min(position + length - 1, top))
    return sum((bit(a, position + i) if i < length and position + i <= top else sign) << i for i in range(top + 1))


def insert(a: int, b: int, position: int, length: int, type_name: str) -> int:
    top = WIDTHS[type_name] - 1
    position = position & 255
    length = length & 255
    for i in range(length):
        if position + i <= top:
            b = b & ~(1 << position + i) | bit(a, i) << position + i
    return b


def permute(a: int, b: int, selector: int) -> int:
    source = a.to_bytes(4, "little") + b.to_bytes(4, "little")
    picked = []
    for i in range(4):
        nibble = selector >> 4 * i & 15
        byte = source[nibble & 7]
        picked.append((255 if byte & 128 else 0) if nibble & 8 else byte)
    return int.from_bytes(picked, "little")


INTEGER_OPERATIONS: dict[str, Callable[..., int]] = {
    "add": lambda t, a, b: signed(a, t) + signed(b, t),
    "sub": lambda t, a, b: signed(a, t) - signed(b, t),
    "min": lambda t, a, b: min(signed(a, t), signed(b, t)),
    "max": lambda t, a, b: max(signed(a, t), signed(b, t)),
    "mul.lo": lambda t, a, b: signed(a, t) * signed(b, t),
    "mul.hi": lambda t, a, b: signed(a, t) * signed(b, t) >> WIDTHS[t],
    "mul.wide": lambda t, a, b: signed(a, t) * signed(b, t),
    "mad.lo": lambda t, a, b, c: signed(a, t) * signed(b, t) + c,
    "mad.hi": lambda t, a, b, c: (signed(a, t) * signed(b, t) >> WIDTHS[t]) + c,
    "mad.wide": lambda t, a, b, c: signed(a, t) * signed(b, t) + c,
    "neg": lambda t, a: -signed(a, t),
    "abs": lambda t, a: abs(signed(a, t)),
    "and": lambda t, a, b: a & b,
    "or": lambda t, a, b: a | b,
    "xor": lambda t, a, b: a ^ b,
    "not": lambda t, a: ~a,
    "shl": lambda t, a, n: a << min(n, 64),
    "shr": lambda t, a, n: signed(a, t) >> min(n, 64),
    "selp": lambda t, a, b, condition: a if condition else b,
    "bfe": lambda t, a, position, length: extract(a, position, length, t),
    "bfi": lambda t, a, b, position, length: insert(a, b, position, length, t),
    "popc": lambda t, a: bin(a).count("1"),
    "clz": lambda t, a: WIDTHS[t] - a.bit_length(),
    "brev": lambda t, a: int(f"{a:0{WIDTHS[t]}b}"[::-1], 2),
    "prmt": lambda t, a, b, selector: permute(a, b, selector),
    "lop3": lambda t, a, b, c, table: sum(bit(table, 4 * bit(a, i) + 2 * bit(b, i) + bit(c, i)) << i for i in range(32)),
    "shf.l.wrap": lambda t, low, high, n: (high << 32 | low) << (n & 31) >> 32,
    "shf.l.clamp": lambda t, low, high, n: (high << 32 | low) << min(n, 32) >> 32,
    "shf.r.wrap": lambda t, low, high, n: (high << 32 | low) >> (n & 31),
    "shf.r.clamp": lambda t, low, high, n: (high << 32 | low) >> min(n, 32),
}


def flush(bits: int, type_name: str) -> int:
    exponent_bits, mantissa_bits = FORMATS[type_name]
    return (
        bits
        if bits >> mantissa_bits & 2**exponent_bits - 1
        else bits >> exponent_bits + mantissa_bits << exponent_bits + mantissa_bits
    )


def compare_numbers(comparison: str, x: Number, y: Number) -> bool:
    unordered = x.is_nan or y.is_nan
    if comparison in ("num", "nan"):
        return unordered == (comparison == "nan")
    if comparison in ORDERED:
        return not unordered and ORDERED[comparison](x.value, y.value)
    return unordered or ORDERED[comparison.removesuffix("u")](x.value, y.value)


def convert(to: str, source: str, modifiers: list[str], bits: int) -> int:
    rounding = [m for m in modifiers if m != "ftz"]
    ftz = "ftz" in modifiers
    width = max(16, WIDTHS[to])
    bits &= 2 ** WIDTHS[source] - 1
    if source not in FORMATS:
        value = signed(bits, source)
        if to in FORMATS:
            assert rounding == ["rn"] and not ftz
            return encode(Number(value < 0, Fraction(abs(value))), to)
        assert not modifiers
        return signed(value, to) % 2**width
    if (to, source) == ("f32", "bf16"):
        assert not modifiers
        return bits << 16
    number = decode(flush(bits, source) if ftz and source == "f32" else bits, source)
    if to not in FORMATS:
        (mode,) = rounding
        lowest, highest = (-(2 ** (WIDTHS[to] - 1)), 2 ** (WIDTHS[to] - 1) - 1) if to[0] == "s" else (0, 2 ** WIDTHS[to] - 1)
        if number.is_nan:
            value = 0 if source != "f64" and WIDTHS[to] < 64 else 2 ** (WIDTHS[to] - 1)
            return signed(value, to) % 2**width
        if number.size == math.inf:
            return (lowest if number.negative else highest) % 2**width
        return min(max(INTEGRAL[mode](number.value), lowest), highest) % 2**width
    if to == source:
        (mode,) = rounding
        if number.is_nan or number.size == math.inf:
            return encode(number, to)
        return encode(Number(number.negative, Fraction(abs(INTEGRAL[mode](number.value)))), to)
    assert rounding == (["rn"] if WIDTHS[to] < WIDTHS[source] else [])
    out = encode(number, to)
    return flush(out, to) if ftz and to == "f32" else out


def expected(opcode: str, *operands: int) -> int:
    """Return the bits of one thread's result; raise KeyError or AssertionError for an opcode without a meaning here."""
    name, *modifiers, type_name = opcode.split(".")
    if name == "cvt":
        to = modifiers.pop()
        if to.endswith("x2"):
            above, below = (convert(to[:-2], type_name, modifiers, bits) for bits in operands)
            return above << 16 | below
        return convert(to, type_name, modifiers, *operands)
    if "f32" in modifiers:  # mixed precision
        modifiers.remove("f32")
        wide = [encode(decode(bits, type_name), "f32") for bits in operands[:-1]]
        return expected(".".join((name, *modifiers, "f32")), *wide, operands[-1])
    if type_name.endswith("x2"):
        base = type_name[:-2]
        width = WIDTHS[base]
        lane = ".".join((name, *modifiers, base))
        low, high = (expected(lane, *(bits >> shift & 2**width - 1 for bits in operands)) for shift in (0, width))
        return high << width | low
    if name == "selp" or type_name not in FORMATS:
        if name == "setp":
            (comparison,) = modifiers
            table = ORDERED | ORDERED_UNSIGNED if type_name[0] == "u" else ORDERED
            return table[comparison](*(signed(bits, type_name) for bits in operands))
        width = 32 if name in ("popc", "clz") else WIDTHS[type_name] * (2 if "wide" in modifiers else 1)
        return INTEGER_OPERATIONS[".".join((name, *modifiers))](type_name, *operands) % 2**width
    ftz = "ftz" in modifiers
    modifiers = [modifier for modifier in modifiers if modifier not in ("ftz", "rn")]
    if ftz:
        operands = tuple(flush(bits, type_name) for bits in operands)
    if name == "setp":
        (comparison,) = modifiers
        return compare_numbers(comparison, *(decode(bits, type_name) for bits in operands))
    sign = 2 ** (WIDTHS[type_name] - 1)
    if name in ("abs", "neg", "copysign"):
        assert not modifiers
        sign_bits = {"abs": 0, "neg": operands[0] & sign ^ sign, "copysign": operands[0] & sign}[name]
        return sign_bits | operands[-1] & sign - 1
    operation = FLOAT_OPERATIONS[".".join((name, *modifiers))]
    out = encode(operation(*(decode(bits, type_name) for bits in operands)), type_name)
    return flush(out, type_name) if ftz else out


# ---- Inputs ----


def operand_types(opcode: str) -> list[str]:
    """Return the type of each source, as the PTX ISA has it."""
    name, *modifiers, t = opcode.split(".")
    if name == "cvt":
        return [t, t] if modifiers[-1].endswith("x2") else [t]
    special = {
        "selp": [t, t, "pred"],
        "shl": [t, "amount"],
        "shr": [t, "amount"],
        "bfe": [t, "amount", "amount"],
        "bfi": [t, t, "amount", "amount"],
        "shf": [t, t, "amount"],
        "prmt": [t, t, "selector"],
        "lop3": [t, t, t, "table"],
    }
    if name in special:
        return special[name]
    if name == "mad":
        return [t, t, f"{t[0]}{2 * WIDTHS[t]}" if "wide" in modifiers else t]
    if "f32" in modifiers:
        return [t] * (2 if name == "fma" else 1) + ["f32"]
    if name == "fma" or (name in ("min", "max") and t == "f32"):
        return [t, t, t]
    unary = ("abs", "neg", "not", "popc", "clz", "brev", "rcp", "sqrt", "rsqrt", "ex2", "lg2", "tanh")
    return [t] if name in unary else [t, t]


def result_type(opcode: str) -> str:
    name, *modifiers, t = opcode.split(".")
    if name in ("setp", "popc", "clz"):
        return "pred" if name == "setp" else "u32"
    if name == "cvt":
        return modifiers[-1]
    if "f32" in modifiers:
        return "f32"
    return f"{t[0]}{2 * WIDTHS[t]}" if "wide" in modifiers else t


def register_class(t: str) -> str:
    width = 2 * WIDTHS[t[:-2]] if t.endswith("x2") else WIDTHS[t]
    return "pred" if t == "pred" else f"b{max(16, width)}"


@functools.cache
def edges(t: str) -> list[int]:
    if t == "pred":
        return [0, 1]
    if t == "amount":
        return [0, 1, 2, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 255, 256, 257, 2**31, 2**32 - 1]
    if t == "selector":
        return [0x7632, 0x5410, 0x3340, 0x7770, 0x7771, 0x9991, 0xAAA2, 0xBBB3, 0x3210, 0x0123, 0x89AB, 0xFFFF, 0xDEADBEEF]
    if t == "table":
        return [0, 255, 0xC0, 0xFC, 0x96, 0xE8, 0xCA, 0x3C, 0xAA]
    if t in FORMATS:
        mantissa_bits = FORMATS[t][1]
        sign = 2 ** (WIDTHS[t] - 1)
        infinity = encode(Number(False, math.inf), t)
        least_normal = 1 << mantissa_bits
        positive = [0, 1, 2, least_normal - 1, least_normal, least_normal + 1, infinity - 1, infinity, infinity + 1]
        positive += [2 * infinity - infinity // 2 & sign - 1 | 1, sign - 1]
        values = [0.5, 1, 1.5, 2, 2.5, 3, 127.5, 128, 255.5, 256, 32767.5, 2.0**15, 2.0**16, 2.0**31, 2.0**32, 2.0**63, 2.0**64]
        values += [2.0**126, 2.0**127, 2.0**-126, 2.0**-127, 2.0**-24, 2.0**-25, 2.0**-133, 2.0**-134, 2.0**-149, 65504, 65520]
        positive += [encode(Number(False, Fraction(value)), t) for value in values]
        one = encode(Number(False, Fraction(1)), t)
        return [bits | s for bits in {*positive, one - 1, one + 1} for s in (0, sign)]
    width = WIDTHS[t]
    small = [0, 1, 2, 3, 7, 8, 100, 127]
    large = [2**width - 1, 2**width - 2, 2 ** (width - 1), 2 ** (width - 1) - 1, 2 ** (width - 1) + 1, 2 ** (width // 2)]
    return sorted({*(bits % 2**width for bits in small), *large, 2**width // 3, 0x8040201080402010 % 2**width})


@functools.cache
def core(t: str) -> list[int]:
    """Return the few edges of which all combinations are tried."""
    if t not in FORMATS:
        return edges(t)[:6]
    one, infinity = (encode(Number(False, size), t) for size in (Fraction(1), math.inf))
    sign = 2 ** (WIDTHS[t] - 1)
    return [0, sign, one, sign | one, infinity, sign | infinity, sign - 1, infinity + 1]


def near_ties(t: str, to: str, source: random.Random) -> list[tuple[int]]:
    """Return numbers of a wide type in the middle of two neighbours of a narrow one, and their own neighbours."""
    exponent_bits, mantissa_bits = FORMATS[to]
    out = []
    for _ in range(100):
        exponent = source.randrange(2 - 2 ** (exponent_bits - 1), 2 ** (exponent_bits - 1)) - mantissa_bits - 1
        units = source.randrange(1, 2 ** (mantissa_bits + 2), 2)
        bits = encode(Number(source.random() < 0.5, units * Fraction(2) ** exponent), t)
        out += [(bits - 1,), (bits,), (bits + 1,)]
    return out


def draw(t: str, source: random.Random) -> int:
    """Draw an edge, any bits, or a number of moderate size: those meet in sums."""
    if t.endswith("x2"):
        base = t[:-2]
        return draw(base, source) << WIDTHS[base] | draw(base, source)
    kind = source.random()
    if kind < 0.4:
        return source.choice(edges(t))
    if t in FORMATS and kind < 0.8:
        exponent_bits, mantissa_bits = FORMATS[t]
        exponent = 2 ** (exponent_bits - 1) - 1 + source.randrange(-14, 15)
        mantissa = source.getrandbits(mantissa_bits)
        if source.random() < 0.5:  # short ones make sums and products exact, or ties
            mantissa &= -1 << mantissa_bits // 2
        return source.getrandbits(1) << WIDTHS[t] - 1 | exponent << mantissa_bits | mantissa
    if t in ("amount", "table"):
        return source.randrange(70) if t == "amount" else source.randrange(256)
    return source.getrandbits(WIDTHS[t])


def f32_bits(value: float) -> int:
    return struct.unpack("<I", struct.pack("<f", value))[0]


def doubly_rounded(source: random.Random, *, subnormal: bool) -> tuple[int, int, int]:
    """Return a, b, c near a tie of fp32 that fp64 cannot tell from it: a b = +-half a unit of c x (1 - 2^-46)."""
    if subnormal:
        c = source.randrange(2**21, 2**23 - 1) * 2.0**-149
        scale = 2.0**-75
        half_a_unit = scale * scale
    else:
        exponent = source.randrange(-60, 60)
        c = source.randrange(2**23 + 1, 2**24 - 1) * 2.0**exponent
        half_a_unit = 2.0 ** (exponent - 1)
        scale = 1.0
    sign = source.choice((-1, 1))
    a = sign * (1 + 2.0**-23) * scale
    b = (1 - 2.0**-23) * half_a_unit / scale
    return f32_bits(a), f32_bits(b), f32_bits(source.choice((-1, 1)) * c)


def crumb_beside_tie(source: random.Random) -> tuple[int, int, int]:
    """Return a, b, c of which a b is a tie of fp32, and c too small to be seen beside it in fp64."""
    odd = source.randrange(2**22 + 1, 2**22 + 2**20, 2)
    return f32_bits(5.0 * source.choice((-1, 1))), f32_bits(float(odd)), f32_bits(source.choice((-1, 1)) * 2.0**-60)


def rows(opcode: str, types: list[str]) -> list[tuple[int, ...]]:
    """Return operands of several hundred threads, the same ones in every run."""
    source = random.Random(opcode)
    out = []
    if not any(t.endswith("x2") for t in types):
        out = list(itertools.product(*map(core, types)))
        if len(types) == 1:
            out += [(bits,) for bits in edges(types[0])]
        elif len(types) == 2:
            pairs = [(a, b) for a in edges(types[0]) for b in edges(types[1])]
            out += source.sample(pairs, min(len(pairs), 300))
            out += [(a, a) for a in edges(types[0])] if types[0] == types[1] else []
    out += [tuple(draw(t, source) for t in types) for _ in range(200 if len(types) < 3 else 300)]
    if opcode.startswith("cvt.rn.") and types[0] in ("f32", "f64") and len(types) == 1:
        out += near_ties(types[0], result_type(opcode), source)
    if opcode.startswith("fma") and opcode.endswith("f32"):
        for _ in range(50):
            out += [doubly_rounded(source, subnormal=False), doubly_rounded(source, subnormal=True), crumb_beside_tie(source)]
    return out


def registers(operands: list[tuple[int, ...]], types: list[str]) -> list[np.ndarray]:
    """Return one read-only row of threads for each operand: a function that writes to an operand raises."""
    out = [np.array([column], DTYPES[register_class(t)]) for column, t in zip(zip(*operands), types)]
    for array in out:
        array.setflags(write=False)
    return out


def mismatches(opcode: str, function: Callable[..., np.ndarray], types: list[str] | None = None) -> list[str]:
    types = types or operand_types(opcode)
    operands = rows(opcode, types)
    arrays = registers(operands, types)
    results = list(enumerate(function(*arrays).ravel().tolist()))
    assert len(results) == len(operands)
    # Some threads alone as well: numpy has other code for the last few elements than for many, and it differs in odd cases.
    results += [(i, function(*(array[:, i : i + 1] for array in arrays)).item()) for i in range(0, len(operands), 5)]
    right = [int(expected(opcode, *row)) for row in operands]
    return [
        f"{opcode}({', '.join(map(hex, operands[i]))}) = {result:#x}, expected {right[i]:#x}"
        for i, result in results
        if result != right[i]
    ]


# ---- Forms ----


MANY = pytest.mark.slow(reason="forms change when one is added; every fourth is always tested, and kernels use the common ones")
SAMPLED = [pytest.param(opcode, marks=MANY if index % 4 else []) for index, opcode in enumerate(sorted(FORMS))]


@pytest.mark.parametrize("opcode", SAMPLED)
def test_form(opcode):
    function, operands, result = form(opcode)
    types = operand_types(opcode)
    assert operands == tuple(map(register_class, types))
    assert result == register_class(result_type(opcode))
    wrong = mismatches(opcode, function)
    if opcode.startswith(("min", "max")) and opcode.endswith(".f32"):
        wrong += mismatches(opcode, function, types[:2])
    assert not wrong, "\n".join(wrong[:10])


SHAPES = [(1, 1), (3, 1), (1, 4), (3, 4)]


@pytest.mark.parametrize("opcode", SAMPLED)
def test_shapes(opcode):
    # Registers that are the same for all threads or all programs, and a register that is a transposed array: the values are
    # those of full registers, in a new array of the broadcast shape.
    function, operands, result = form(opcode)
    types = operand_types(opcode)
    full = [array[:, -12:].reshape(3, 4) for array in registers(rows(opcode, types), types)]
    for turn in range(4):
        arrays = [array[: SHAPES[(i + turn) % 4][0], : SHAPES[(i + turn) % 4][1]] for i, array in enumerate(full)]
        arrays[0] = np.asfortranarray(arrays[0])
        arrays[0].setflags(write=False)
        out = function(*arrays)
        assert out.dtype == DTYPES[result]
        assert out.shape == np.broadcast_shapes(*(array.shape for array in arrays))
        assert out.flags.writeable and not any(np.shares_memory(out, array) for array in arrays)
        same = function(*(np.broadcast_to(array, out.shape).copy() for array in arrays))
        assert (out == same).all()


NARROW_SOURCES = [opcode for opcode in sorted(FORMS) if opcode.startswith("cvt") and opcode.split(".")[-1] in INTEGERS_TO_32]


@pytest.mark.parametrize("opcode", NARROW_SOURCES)
def test_conversion_of_wider_register(opcode):
    # cvt.s32.s8 reads the lowest byte of a 32-bit register, whatever stands above.
    types = operand_types(opcode)
    (operand,) = registers(rows(opcode, types), types)
    above = np.uint64(0xDEADBEEF01234567 << WIDTHS[register_class(types[0])] & 2**64 - 1)
    function = form(opcode).function
    assert (function(operand.astype(np.uint64) | above) == function(operand)).all()


@pytest.mark.parametrize("selector", edges("selector") + [random.Random(0).getrandbits(16) for _ in range(50)])
def test_permute_with_one_selector_for_all(selector):
    operands = rows("prmt.b32", ["b32", "b32"])
    a, b = registers(operands, ["b32", "b32"])
    out = form("prmt.b32").function(a, b, immediate(f"0x{selector:X}U", "b32"))
    assert out.ravel().tolist() == [permute(*row, selector) for row in operands]


def test_oracle_knows_numbers():
    # The oracle's own rounding against torch's, and against Python's float.
    source = random.Random(0)
    for t, dtype, integers in (("f16", torch.float16, torch.int16), ("bf16", torch.bfloat16, torch.int16)):
        words = [
            bits for bits in edges("f32") + [source.getrandbits(32) for _ in range(2000)] if not decode(bits, "f32").is_nan
        ]
        words += [source.randrange(2**12) << 12 | 2**11 | 0x38000000 for _ in range(500)]
        halves = torch.from_numpy(np.array(words, np.uint32).view(np.float32)).to(dtype).view(integers).numpy().view(np.uint16)
        assert [encode(decode(bits, "f32"), t) for bits in words] == halves.tolist()
    for bits in edges("f64"):
        (value,) = struct.unpack("<d", struct.pack("<Q", bits))
        number = decode(bits, "f64")
        assert number.is_nan if value != value else float(number.value) == value


@pytest.mark.parametrize(
    "opcode",
    ["add.rz.f32", "add.sat.s32", "max.xorsign.abs.f32", "cvt.s32.f32", "cvt.rz.f32.f64", "cvt.sat.u8.s32", "sin.approx.f32"],
)
def test_oracle_refuses_what_it_does_not_know(opcode):
    with pytest.raises((KeyError, AssertionError, ValueError)):
        expected(opcode, *range(len(operand_types(opcode))))


@pytest.mark.parametrize(
    "opcode, message",
    [
        ("sin.approx.f32", "the instruction sin is unknown"),
        ("add.rz.f32", "add is known, but not with .rz"),
        ("add.sat.s32", "add is known, but not with .sat"),
        ("fma.rn.relu.bf16", "fma is known, but not with .relu"),
        ("max.xorsign.abs.f32", "max is known, but not with .xorsign and .abs"),
        ("cvt.rna.tf32.f32", "cvt is known, but not with .rna and .tf32"),
        ("fma.ftz.rn.f32", "each part is known, but not this combination"),
        ("mul.s32", "each part is known, but not this combination"),
        ("cvt.rn.bf16.s64", "each part is known, but not this combination"),
        ("prmt.b32.f4e", "prmt is known, but not with .f4e"),
        ("fma.rn.f64", "each part is known|not with .f64"),
    ],
)
def test_unknown_form_raises(opcode, message):
    with pytest.raises(Unsupported, match=message) as caught:
        form(opcode)
    assert opcode in str(caught.value)


# ---- Immediates ----


@pytest.mark.parametrize(
    "text, register, bits",
    [
        ("0f3F800000", "b32", 0x3F800000),
        ("0fFF800000", "b32", 0xFF800000),
        ("0d3FF0000000000000", "b64", 0x3FF0000000000000),
        ("0x7632U", "b32", 0x7632),
        ("0x7FC0", "b16", 0x7FC0),
        ("-100", "b32", 2**32 - 100),
        ("-1", "b64", 2**64 - 1),
        ("-32768", "b16", 32768),
        ("32767", "b16", 32767),
        ("65535", "b16", 65535),
        ("0", "b64", 0),
        ("1", "pred", 1),
        ("-1", "pred", 1),
        ("4294967295", "b32", 2**32 - 1),
    ],
)
def test_immediate(text, register, bits):
    out = immediate(text, register)
    assert out.shape == (1, 1) and out.dtype == DTYPES[register]
    assert int(out[0, 0]) == bits


@pytest.mark.parametrize(
    "text, register",
    [
        ("0f3F800000", "b64"),  # would be the bits of a tiny double
        ("0d3FF0000000000000", "b32"),
        ("017", "b32"),  # octal
        ("0b11", "b32"),
        ("1.0", "b32"),
        ("65536", "b16"),
        ("-32769", "b16"),
        ("4294967296", "b32"),
        ("2", "pred"),
        ("-2", "pred"),
        ("%r1", "b32"),
        ("", "b32"),
    ],
)
def test_immediate_that_is_unknown_raises(text, register):
    with pytest.raises(Unsupported, match="immediate"):
        immediate(text, register)


# ---- Approximate instructions ----

APPROXIMATE = [opcode for opcode in sorted(FORMS) if "approx" in opcode or "full" in opcode]


def moderate(n: int, operands: int) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.uniform(0.5, 20, (2, n)).astype(np.float32).view(np.uint32) for _ in range(operands)]


@pytest.mark.parametrize("opcode", APPROXIMATE)
def test_errors_are_bounded_and_repeatable(opcode):
    function, classes, _ = form(opcode)
    operands = moderate(2000, len(classes))
    exact = function(*operands)
    with ulps(2):
        first = function(*operands)
        # An error depends on a thread's operands, not on its place, and not on other threads.
        alone = np.concatenate([function(*(operand[:, i : i + 1] for operand in operands)) for i in range(50)], axis=1)
        backwards = function(*(operand[::-1, ::-1] for operand in operands))
    error = first.astype(np.int64) - exact.astype(np.int64)
    assert set(error.ravel().tolist()) == {-2, -1, 0, 1, 2}
    assert (alone == first[:, :50]).all()
    assert (backwards == first[::-1, ::-1]).all()
    assert (function(*operands) == exact).all()


def is_special(bits: np.ndarray) -> np.ndarray:
    return ~np.isfinite(bits.view(np.float32)) | (bits & 0x7FFFFFFF == 0)


@pytest.mark.parametrize("opcode", APPROXIMATE)
def test_errors_leave_what_is_special(opcode):
    function, classes, _ = form(opcode)
    columns = list(np.array(list(itertools.product(edges("f32"), repeat=len(classes))), np.uint32).T[:, None, :].copy())
    exact = function(*columns)
    with ulps(2):
        moved = function(*columns)
    operand_special = np.any([is_special(column) for column in columns], axis=0)
    assert operand_special.any() and is_special(exact).any()
    assert (moved == exact)[operand_special | is_special(exact)].all()
    assert (moved != exact).any()
    if ".ftz" not in opcode:  # with it, a result may fall among the subnormal numbers and become zero
        assert not is_special(moved)[~is_special(exact)].any()


@pytest.mark.parametrize("opcode", ["ex2.approx.f32", "ex2.approx.ftz.f32"])
def test_ex2_of_zero_is_one(opcode):
    with ulps(2):
        out = form(opcode).function(np.array([[0, 1 << 31, 1, 0x7FFFFF]], np.uint32))
    assert (out.view(np.float32) == 1).all()


def test_error_bound_is_checked_and_restored():
    with pytest.raises(ValueError, match="n: expected units in the last place"), ulps(-1):
        pass
    operands = moderate(500, 1)
    exact = form("ex2.approx.f32").function(*operands)
    with pytest.raises(RuntimeError), ulps(1):
        raise RuntimeError
    assert (form("ex2.approx.f32").function(*operands) == exact).all()


# ---- Mutants ----


def f32(bits: np.ndarray) -> np.ndarray:
    return bits.view(np.float32)


def twice_rounded(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        out = (f32(a).astype(np.float64) * f32(b) + f32(c)).astype(np.float32)
    bits = out.view(np.uint32)
    bits[np.isnan(out)] = 0x7FFFFFFF
    return bits


@pytest.mark.parametrize("kind", ["normal", "subnormal", "crumb"])
def test_fma_rounds_once_where_fp64_rounds_twice(kind):
    source = random.Random(kind)
    make = {
        "normal": lambda: doubly_rounded(source, subnormal=False),
        "subnormal": lambda: doubly_rounded(source, subnormal=True),
        "crumb": lambda: crumb_beside_tie(source),
    }[kind]
    operands = [make() for _ in range(1000)]
    right = np.array([expected("fma.rn.f32", *row) for row in operands], np.uint32)
    arrays = registers(operands, ["f32"] * 3)
    # A tie goes the wrong way about every other time.
    assert (twice_rounded(*arrays)[0] != right).mean() > 0.3
    assert (form("fma.rn.f32").function(*arrays)[0] == right).all()


def shift_without_clamp(a: np.ndarray, n: np.ndarray) -> np.ndarray:
    return a >> (n & 31)


def narrow_mask(a: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray:
    return form("bfe.u64").function(a, position, np.minimum(length & 255, 32))


def quiet(function: Callable) -> Callable:
    return np.errstate(all="ignore")(function)


MUTANTS = {
    "bfe.u64 of a 32-bit mask": ("bfe.u64", narrow_mask),
    "bfe.u64 of a position modulo 64": ("bfe.u64", lambda a, p, n: form("bfe.u64").function(a, p & 63, n)),
    "bfe.s32 without sign": ("bfe.s32", form("bfe.u32").function),
    "bfi.b32 of a length modulo 32": ("bfi.b32", lambda a, b, p, n: form("bfi.b32").function(a, b, p, n & 31)),
    "prmt without sign replication": ("prmt.b32", lambda a, b, s: form("prmt.b32").function(a, b, s & 0x7777)),
    "prmt with its registers swapped": ("prmt.b32", lambda a, b, s: form("prmt.b32").function(b, a, s)),
    "shr.u32 modulo 32": ("shr.u32", shift_without_clamp),
    "shr.s32 without sign": ("shr.s32", form("shr.u32").function),
    "shl.b32 modulo 32": ("shl.b32", lambda a, n: a << (n & 31)),
    "fma rounded twice": ("fma.rn.f32", twice_rounded),
    "fma in fp32": ("fma.rn.f32", lambda a, b, c: form("add.f32").function(form("mul.f32").function(a, b), c)),
    "fma without ftz": ("fma.rn.ftz.f32", form("fma.rn.f32").function),
    "min with NaN": ("min.f32", form("min.NaN.f32").function),
    "min without NaN": ("min.NaN.f32", form("min.f32").function),
    "min of any zero": ("min.f32", quiet(lambda a, b, c: np.fmin(np.fmin(f32(a), f32(b)), f32(c)).view(np.uint32))),
    "max that ignores its third": ("max.f32", lambda a, b, c: form("max.f32").function(a, b)),
    "add with any NaN": ("add.f32", quiet(lambda a, b: (f32(a) + f32(b)).view(np.uint32))),
    "mul.hi.s64 of unsigned": ("mul.hi.s64", form("mul.hi.u64").function),
    "mad.wide.s32 of unsigned": ("mad.wide.s32", form("mad.wide.u32").function),
    "setp.ne of NaN": ("setp.ne.f32", form("setp.neu.f32").function),
    "setp.leu ordered": ("setp.leu.f32", form("setp.le.f32").function),
    "setp.lt.s32 of unsigned": ("setp.lt.s32", form("setp.lt.u32").function),
    "div.approx of a large divisor": ("div.approx.f32", form("div.full.f32").function),
    "cvt.s8.s32 without extension": ("cvt.s8.s32", lambda a: (a & 0xFF).astype(np.uint16)),
    "cvt.rzi rounds": ("cvt.rzi.s32.f32", form("cvt.rni.s32.f32").function),
    "cvt.rzi of the machine": ("cvt.rzi.s32.f32", quiet(lambda a: f32(a).astype(np.int32).view(np.uint32))),
    "cvt.rn.bf16.f32 truncates": ("cvt.rn.bf16.f32", lambda a: (a >> 16).astype(np.uint16)),
    "cvt.rn.bf16.f64 by way of fp32": (
        "cvt.rn.bf16.f64",
        lambda a: form("cvt.rn.bf16.f32").function(form("cvt.rn.f32.f64").function(a)),
    ),
    "cvt.rn.bf16x2 swapped": ("cvt.rn.bf16x2.f32", lambda a, b: form("cvt.rn.bf16x2.f32").function(b, a)),
    "add.s16x2 with a carry between lanes": ("add.s16x2", form("add.s32").function),
    "selp swapped": ("selp.b32", lambda a, b, p: form("selp.b32").function(b, a, p)),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutant_is_caught(mutant):
    opcode, function = MUTANTS[mutant]
    assert mismatches(opcode, function)

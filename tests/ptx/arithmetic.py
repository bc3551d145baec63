"""The arithmetic of PTX: one pure numpy function for each instruction form, for all threads of many programs at once.

A *form* is an opcode with all its modifiers and types, such as ``fma.rn.ftz.f32``. ``FORMS`` holds every form that is known and
``form(opcode)`` looks one up. There is no parser of modifiers that could overlook one: an opcode is in the table, letter by
letter, or ``Unsupported`` is raised.

**Registers** are unsigned arrays (``DTYPES``; bool for predicates) whose shapes broadcast to (programs, threads). A function
returns a new array of the broadcast shape and of the dtype of ``Form.result``, and changes no operand. It trusts the register
classes, with one exception: as in PTX, the source of a ``cvt`` from an integer may be wider than its type, and the excess is
cut off. A type of 8 bits lives in a b16 register; as a result it is extended to all of it, by its sign or by zeros.

**Floating point.** Results are rounded to nearest even, once. fp32 add, subtract, multiply, divide and square root are numpy's.
``fma`` forms the exact product in fp64, where the sum is rounded a first time; the few sums for which a second rounding to fp32
could go wrong are rounded to odd first (``_sum_to_odd``), which makes it harmless. Types of 16 bits are computed in fp64 the
same way. A NaN that arithmetic produces is the canonical one (0x7fffffff, 0x7fffffffffffffff, 0x7fff).

**Choices** where the PTX ISA leaves one:
  - ``abs``, ``neg`` and ``copysign`` touch only the sign bit, also of a NaN. ``cvt.f32.bf16`` is a shift and keeps a NaN's
    bits; all other conversions between floating-point types make it canonical.
  - ``.ftz`` flushes a result that is subnormal after rounding.
  - ``mul.f32`` and ``add.f32``, which ptxas may contract to ``fma``, are taken as written: two roundings.
  - Approximate instructions (``.approx`` and ``.full``) are rounded correctly; within ``ulps(n)`` they are wrong by up to n
    units in the last place. The ISA allows ``ex2`` and ``div`` 2 of them, ``tanh`` far more.

**To add a form**, add a line to the function at the end of this file that lists its family, and teach its meaning to the oracle
in ``test_ptx_arithmetic.py``, which runs every form (with ``--slow``) and fails for one that it cannot compute in integers and
fractions.
**To remember**: numpy has other code for the last few elements of an array than for many; ``fmin`` of a signaling NaN, for one,
depends on an element's place.
"""

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

DTYPES = {"pred": np.bool_, "b16": np.uint16, "b32": np.uint32, "b64": np.uint64}
INTEGERS = {
    "u8": np.uint8, "u16": np.uint16, "u32": np.uint32, "u64": np.uint64,
    "s8": np.int8, "s16": np.int16, "s32": np.int32, "s64": np.int64,
}  # fmt: skip

Function = Callable[..., np.ndarray]


class Unsupported(NotImplementedError):
    """An instruction form or an immediate whose meaning this module does not know."""


class Form(NamedTuple):
    """The meaning of one opcode.

    ``operands`` and ``result`` are register classes, keys of ``DTYPES``. The function takes one array for each operand;
    ``min`` and ``max`` of f32 may be called without their third.
    """

    function: Function
    operands: tuple[str, ...]
    result: str


FORMS: dict[str, Form] = {}


def form(opcode: str) -> Form:
    """Return the form of an opcode such as ``"fma.rn.ftz.f32"``; raise ``Unsupported``, naming what of it is unknown."""
    try:
        return FORMS[opcode]
    except KeyError:
        raise Unsupported(f"{opcode}: {_what_is_unknown(opcode)}; add it to tests/ptx/arithmetic.py, with its oracle") from None


def _what_is_unknown(opcode: str) -> str:
    name, *modifiers = opcode.split(".")
    known = {modifier for other in FORMS for modifier in other.split(".")[1:] if other.split(".")[0] == name}
    if not known:
        return f"the instruction {name} is unknown"
    unknown = [f".{modifier}" for modifier in modifiers if modifier not in known]
    if unknown:
        return f"{name} is known, but not with {' and '.join(unknown)}"
    return "each part is known, but not this combination in this order"


def immediate(text: str, register_class: str) -> np.ndarray:
    """Return a constant operand as an array of shape (1, 1).

    Accepts decimal and hexadecimal integers within the range of the class, signed or unsigned, bits of a float (``0f3F800000``
    in b32, ``0d3FF0000000000000`` in b64), and 0, 1 or -1 for a predicate. Anything else raises ``Unsupported``.
    """
    bits = {"pred": 1, "b16": 16, "b32": 32, "b64": 64}[register_class]
    if register_class == "b32" and re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
        value = int(text[2:], 16)
    elif register_class == "b64" and re.fullmatch(r"0[dD][0-9a-fA-F]{16}", text):
        value = int(text[2:], 16)
    elif re.fullmatch(r"-?0[xX][0-9a-fA-F]+U?", text):
        value = int(text.rstrip("U"), 16)
    elif re.fullmatch(r"-?(0|[1-9][0-9]*)U?", text):  # a leading zero would mean octal
        value = int(text.rstrip("U"))
    else:
        raise Unsupported(f"immediate {text!r}: no constant that is known for a register of class {register_class}")
    if not -(1 << bits - 1) <= value < 1 << bits:
        raise Unsupported(f"immediate {text!r}: out of range of a register of class {register_class}")
    return np.full((1, 1), value % (1 << bits), DTYPES[register_class])


# ---- Integers ----


def _bits(type_name: str) -> int:
    return int(re.search(r"\d+", type_name).group())


def _register(type_name: str) -> str:
    """Return the register class of a type: ``"b32"`` of f32, s32 and bf16x2; 8 bits live in b16."""
    if type_name == "pred":
        return type_name
    base, _, lanes = type_name.partition("x")
    return f"b{max(16, _bits(base) * int(lanes or 1))}"


def _on_integers(operation: Function, type_name: str) -> Function:
    """Apply a numpy operation, which wraps around, to registers seen as integers of a type."""
    dtype = INTEGERS[type_name]
    unsigned = DTYPES[_register(type_name)]
    return lambda *operands: operation(*(operand.view(dtype) for operand in operands)).view(unsigned)


def _packed(function: Function, lane_dtype: type) -> Function:
    """Apply a function to each lane of packed registers, such as the two f32 in an f32x2."""

    def packed(*operands: np.ndarray) -> np.ndarray:
        lanes = function(*(operand[..., None].view(lane_dtype) for operand in operands))
        return np.ascontiguousarray(lanes).view(operands[0].dtype)[..., 0]

    return packed


def _multiply_wide(type_name: str) -> Function:
    """Full product of 16- or 32-bit integers, in twice their width."""
    dtype = INTEGERS[type_name]
    wide = INTEGERS[f"{type_name[0]}{2 * _bits(type_name)}"]
    unsigned = DTYPES[f"b{2 * _bits(type_name)}"]
    return lambda a, b: (a.view(dtype).astype(wide) * b.view(dtype)).view(unsigned)


def _multiply_high(type_name: str) -> Function:
    """Upper half of the full product."""
    bits = _bits(type_name)
    if bits < 64:
        wide = _multiply_wide(type_name)
        return lambda a, b: (wide(a, b) >> bits).astype(DTYPES[f"b{bits}"])

    def high(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        a_low, a_high = a & 0xFFFFFFFF, a >> 32
        b_low, b_high = b & 0xFFFFFFFF, b >> 32
        middle = a_high * b_low + (a_low * b_low >> 32)
        carry = a_low * b_high + (middle & 0xFFFFFFFF)
        product = a_high * b_high + (middle >> 32) + (carry >> 32)
        if type_name == "s64":  # a negative a stands for a - 2^64: take b off the upper half
            product -= np.where(a >> 63 != 0, b, 0) + np.where(b >> 63 != 0, a, 0)
        return product

    return high


def _shift(direction: str, type_name: str) -> Function:
    """Shift by an amount in a b32 register; an amount beyond the width shifts everything out, or leaves signs everywhere."""
    bits = _bits(type_name)
    dtype = INTEGERS["s" + str(bits)] if type_name[0] == "s" else DTYPES[f"b{bits}"]
    operation = np.left_shift if direction == "shl" else np.right_shift

    def shift(a: np.ndarray, amount: np.ndarray) -> np.ndarray:
        beyond = amount >= bits
        if beyond.any():
            last = np.minimum(amount, bits - 1).astype(dtype)
            if dtype == INTEGERS["s" + str(bits)]:
                return operation(a.view(dtype), last).view(a.dtype)
            return np.where(beyond, a.dtype.type(0), operation(a, last))
        return operation(a.view(dtype), amount.astype(dtype)).view(a.dtype)

    return shift


def _low_bits(count: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return words with the lowest ``count`` bits set."""
    bits = dtype.itemsize * 8
    ones = dtype.type(2**bits - 1)
    return np.where(count == 0, dtype.type(0), ones >> (bits - np.clip(count, 1, bits)).astype(dtype))


def _extract_bits(type_name: str) -> Function:
    """Bit field of ``length`` bits from ``position``; above it zeros, or the sign: the field's last bit that ``a`` has."""
    bits = _bits(type_name)

    def extract(a: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray:
        position, length = position & 0xFF, length & 0xFF
        shifted = np.where(position < bits, a >> np.minimum(position, bits - 1).astype(a.dtype), a.dtype.type(0))
        inside = _low_bits(np.minimum(length, bits - np.minimum(position, bits)), a.dtype)
        field = shifted & inside
        if type_name[0] == "u":
            return field
        last = np.minimum(position + np.maximum(length, 1) - 1, bits - 1).astype(a.dtype)
        negative = ((a >> last) & 1).astype(np.bool_) & (length > 0)
        return np.where(negative, field | ~inside, field)

    return extract


def _insert_bits(a: np.ndarray, b: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Write the lowest ``length`` bits of a over b from ``position`` on."""
    bits = a.dtype.itemsize * 8
    position, length = position & 0xFF, length & 0xFF
    shift = np.minimum(position, bits - 1).astype(a.dtype)
    field = np.where(position < bits, _low_bits(length, a.dtype) << shift, a.dtype.type(0))
    return (b & ~field) | ((a << shift) & field)


def _permute_bytes(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """Four bytes picked out of b:a (byte 0 is the lowest of a); bit 3 of a nibble replicates the sign of its byte."""
    if selector.size > 1:
        pair = a.astype(np.uint64) | b.astype(np.uint64) << 32
        out = np.zeros(np.broadcast_shapes(pair.shape, selector.shape), np.uint32)
        for byte in range(4):
            nibble = selector >> 4 * byte
            picked = (pair >> ((nibble & 7) * 8).astype(np.uint64) & 0xFF).astype(np.uint32)
            out |= np.where(nibble & 8, (picked >> 7) * 0xFF, picked) << 8 * byte
        return out
    shape = np.broadcast_shapes(a.shape, b.shape, selector.shape)
    # Bytes of one register that move by the same distance move together.
    moves: dict[tuple[int, int], int] = {}
    signs = []
    for byte in range(4):
        nibble = int(selector.flat[0]) >> 4 * byte & 0xF
        source = nibble >> 2 & 1
        index = nibble & 3
        if nibble & 8:
            signs.append((source, index, byte))
        else:
            moves[source, index - byte] = moves.get((source, index - byte), 0) | 0xFF << 8 * byte
    out = np.zeros((1, 1), np.uint32)
    for (source, distance), mask in moves.items():
        word = (a, b)[source]
        out = out | (word >> 8 * distance if distance > 0 else word << -8 * distance) & mask
    for source, index, byte in signs:
        out = out | ((a, b)[source] >> 8 * index + 7 & 1) * np.uint32(0xFF << 8 * byte)
    return out if out.shape == shape else np.broadcast_to(out, shape).copy()


def _lookup(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Bitwise function of three words: bit ``4 a + 2 b + c`` of the table, for each bit."""
    out = np.zeros(np.broadcast_shapes(a.shape, b.shape, c.shape, table.shape), np.uint32)
    for row in range(8):
        words = (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
        out |= np.where(table >> row & 1, words, np.uint32(0))
    return out


def _funnel_shift(direction: str, mode: str) -> Function:
    """Upper word of (high:low << amount), or lower word of (high:low >> amount)."""

    def shift(low: np.ndarray, high: np.ndarray, amount: np.ndarray) -> np.ndarray:
        amount = (amount & 31 if mode == "wrap" else np.minimum(amount, 32)).astype(np.uint64)
        pair = low.astype(np.uint64) | high.astype(np.uint64) << 32
        return (pair << amount >> 32 if direction == "l" else pair >> amount).astype(np.uint32)

    return shift


def _count_ones(a: np.ndarray) -> np.ndarray:
    out = np.zeros(a.shape, np.uint32)
    for bit in range(a.dtype.itemsize * 8):
        out += (a >> bit & 1).astype(np.uint32)
    return out


def _count_leading_zeros(a: np.ndarray) -> np.ndarray:
    out = np.zeros(a.shape, np.uint32)
    for bit in range(a.dtype.itemsize * 8):
        out += a >> bit == 0
    return out


def _reverse_bits(a: np.ndarray) -> np.ndarray:
    bits = a.dtype.itemsize * 8
    out = np.zeros(a.shape, a.dtype)
    for bit in range(bits):
        out |= (a >> bit & 1) << (bits - 1 - bit)
    return out


def _choose(a: np.ndarray, b: np.ndarray, condition: np.ndarray) -> np.ndarray:
    """Return ``np.where(condition, a, b)``, without its branches: those are slow where the condition is irregular."""
    return b ^ ((a ^ b) & np.negative(condition.astype(a.dtype)))


def _convert_integer(to: str, source: str) -> Function:
    unsigned = INTEGERS[f"u{_bits(source)}"]
    signed = INTEGERS[source]
    extended = INTEGERS[f"{to[0]}{max(16, _bits(to))}"]
    return lambda a: a.astype(unsigned).view(signed).astype(INTEGERS[to]).astype(extended).view(DTYPES[_register(to)])


# ---- Floating point ----

FLOATS = {"f16": np.float16, "f32": np.float32, "f64": np.float64}
CANONICAL_NAN = {16: 0x7FFF, 32: 0x7FFFFFFF, 64: 0x7FFFFFFFFFFFFFFF}


BITS_OF = {np.dtype(FLOATS[name]): np.dtype(DTYPES[f"b{bits}"]) for name, bits in (("f16", 16), ("f32", 32), ("f64", 64))}
ONE = np.uint32(1)  # numpy converts Python's numbers at every call
LEAST_NORMAL = np.uint32(0x00FFFFFF)  # of the bits without the sign, times two, less one


def _has_nan(values: np.ndarray) -> bool:
    norm = np.vdot(values, values)  # NaN if and only if an element is: the cheapest way to know
    return bool(norm != norm)


def _canonical(out: np.ndarray) -> np.ndarray:
    """Return the bits of a new float array, with canonical NaNs."""
    bits = out.view(BITS_OF[out.dtype])
    if _has_nan(out):
        bits[np.isnan(out)] = CANONICAL_NAN[out.dtype.itemsize * 8]
    return bits


def _flush(bits: np.ndarray) -> np.ndarray:
    """Return fp32 bits with zeros of the same sign for subnormal numbers; the same array where there are none."""
    if bits.size == 1:
        return bits & 0x80000000 if 0 < bits.item() & 0x7FFFFFFF < 0x00800000 else bits
    shifted = bits << ONE
    shifted -= ONE  # zero wraps around to the largest integer
    if shifted.min() >= LEAST_NORMAL:
        return bits
    return np.where(shifted < LEAST_NORMAL, bits & 0x80000000, bits)


def _on_f32(operation: Function, ftz: str = "") -> Function:
    """Apply an operation on fp32 arrays that returns a new one."""
    dtype = np.dtype(np.float32)
    if ftz:
        return lambda *operands: _flush(_canonical(operation(*[_flush(operand).view(dtype) for operand in operands])))
    return lambda *operands: _canonical(operation(*[operand.view(dtype) for operand in operands]))


def _on_f64(operation: Function) -> Function:
    return lambda *operands: _canonical(operation(*(operand.view(np.float64) for operand in operands)))


def _widen(bits: np.ndarray, type_name: str) -> np.ndarray:
    """Return the values of a type's bits as a new fp64 array, exactly."""
    if type_name == "bf16":
        return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return bits.view(FLOATS[type_name]).astype(np.float64)


def _narrow(values: np.ndarray, type_name: str) -> np.ndarray:
    """Round fp64 values to a type's bits, once."""
    if type_name != "bf16":
        out = values.astype(FLOATS[type_name])
        bits = out.view(DTYPES[_register(type_name)])
    else:
        single = values.astype(np.float32)
        # To odd: an inexact fp32 value gets a last bit of 1, so that it never looks like a tie of bf16.
        words = single.view(np.uint32)
        gap = values - single
        even = (gap != 0) & (words & 1 == 0) & np.isfinite(single)
        outward = (gap > 0) == ~np.signbit(single)
        words = np.where(even, np.where(outward, words + 1, words - 1), words)
        bits = ((words + 0x7FFF + (words >> 16 & 1)) >> 16).astype(np.uint16)
    nan = np.isnan(values)
    if nan.any():
        bits[nan] = CANONICAL_NAN[_bits(type_name)]
    return bits


def _sum_to_odd(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return a + b in fp64, an inexact sum with a last bit of 1: rounding that to at most 51 bits rounds the exact sum."""
    total = a + b
    b_part = total - a
    error = (a - (total - b_part)) + (b - b_part)  # exact: Knuth's TwoSum
    bits = total.view(np.uint64)
    even = (error != 0) & (bits & 1 == 0) & np.isfinite(total)
    outward = (error > 0) == ~np.signbit(total)
    return np.where(even, np.where(outward, bits + 1, bits - 1), bits).view(np.float64)


OF_A_TIE, TIE = np.uint64(35), np.uint64(1 << 63)
JUST_NORMAL = np.uint32(0x01000000)


def _fma_f32(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    product = np.multiply(a, b, dtype=np.float64)  # 48 bits: exact
    total = np.add(product, c, dtype=np.float64)
    out = total.astype(np.float32)
    # Two roundings differ from one only where the first lands on a tie of the second. Among normal numbers ties are known
    # by their 29 lowest bits, 1 and zeros; subnormal results and the least normal one are all taken for ties.
    doubtful = total.view(np.uint64) << OF_A_TIE == TIE
    shifted = out.view(np.uint32) << ONE
    shifted -= ONE
    doubtful |= shifted < JUST_NORMAL
    if doubtful.any():
        product, c = np.broadcast_to(product, total.shape), np.broadcast_to(c, total.shape)
        out[doubtful] = _sum_to_odd(product[doubtful], c[doubtful].astype(np.float64)).astype(np.float32)
    return out


def _on_half(operation: Function, type_name: str) -> Function:
    """Apply an operation on fp64 arrays to f16 or bf16, and round its result, exact or rounded to odd, once."""
    return lambda *operands: _narrow(operation(*(_widen(operand, type_name) for operand in operands)), type_name)


# The sum of two f16 or bf16 is rounded twice without harm too, as 53 >= 2 x 11 + 2; fma's is not. One way for all is simpler.
HALF_OPERATIONS: dict[str, tuple[Function, int]] = {
    "add": (_sum_to_odd, 2),
    "sub": (lambda a, b: _sum_to_odd(a, -b), 2),
    "mul": (np.multiply, 2),
    "fma": (lambda a, b, c: _sum_to_odd(a * b, c), 3),
}


def _values(bits: np.ndarray, type_name: str) -> np.ndarray:
    """Return an array for comparisons: a view of f16, f32 and f64, a wider copy of bf16."""
    if type_name == "bf16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.view(FLOATS[type_name])


def _extremum(name: str, propagate_nan: bool) -> Function:
    """``min`` or ``max`` of two or three floats: -0 is less than +0. A NaN is ignored beside a number, or decides."""
    if propagate_nan:
        operation = np.minimum if name == "min" else np.maximum
    else:
        operation = np.fmin if name == "min" else np.fmax
    preferred_zero = -0.0 if name == "min" else 0.0

    def of_two(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        out = operation(a, b)
        if not propagate_nan and _has_nan(out):  # fmin and fmax prefer a signaling NaN to a number
            out = np.where(np.isnan(a), b, np.where(np.isnan(b), a, out))
        if not out.all():  # numpy takes either of two zeros
            out[(a == 0) & (b == 0) & (np.signbit(a) != np.signbit(b))] = preferred_zero
        return out

    def extremum(a: np.ndarray, b: np.ndarray, c: np.ndarray | None = None) -> np.ndarray:
        return of_two(a, b) if c is None else of_two(of_two(a, b), c)

    return extremum


def _on_values(operation: Function, type_name: str) -> Function:
    """Apply an operation whose result is one of its operands."""

    def function(*operands: np.ndarray) -> np.ndarray:
        out = _canonical(operation(*(_values(operand, type_name) for operand in operands)))
        return (out >> 16).astype(np.uint16) if type_name == "bf16" else out

    return function


def _change_sign(name: str, type_name: str, ftz: str = "") -> Function:
    sign = 1 << _bits(type_name) - 1

    def change(a: np.ndarray) -> np.ndarray:
        a = _flush(a) if ftz else a
        return a ^ sign if name == "neg" else a & sign - 1

    return change


def _copy_sign(type_name: str) -> Function:
    sign = 1 << _bits(type_name) - 1
    return lambda a, b: (a & sign) | (b & sign - 1)


COMPARISONS: dict[str, Function] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
UNSIGNED_NAMES = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
FLOAT_COMPARISONS: dict[str, Function] = {
    **COMPARISONS,
    "ne": lambda a, b: (a < b) | (a > b),
    # The unordered ones hold for NaN too: they are the opposites of ordered ones, except that numpy's != is one already.
    "equ": lambda a, b: ~((a < b) | (a > b)),
    "neu": np.not_equal,
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
    "num": lambda a, b: (a == a) & (b == b),
    "nan": lambda a, b: (a != a) | (b != b),
}


def _compare_floats(comparison: Function, type_name: str, ftz: str = "") -> Function:
    def compare(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        if ftz:
            a, b = _flush(a), _flush(b)
        return comparison(_values(a, type_name), _values(b, type_name))

    return compare


# ---- Approximate instructions ----

_error_bound = 0


@contextlib.contextmanager
def ulps(n: int) -> Iterator[None]:
    """Make approximate instructions wrong by up to n units in the last place while the context lasts.

    The error is a function of the operands' bits alone, so that two runs agree. Zeros, infinities and NaN, as operands and as
    results, stay exact: ``ex2`` of a zero, or of a subnormal number, is 1.
    """
    global _error_bound
    if n < 0:
        raise ValueError(f"n: expected units in the last place, 0 or more, got {n}")
    before, _error_bound = _error_bound, n
    try:
        yield
    finally:
        _error_bound = before


def _with_error(out: np.ndarray, *operands: np.ndarray) -> np.ndarray:
    """Return new fp32 values moved by ``_error_bound`` ulp at most."""
    if _error_bound == 0:
        return out
    bits = out.view(np.uint32)
    mixed = np.zeros((1, 1), np.uint32)
    regular = _is_regular(bits)
    for operand in operands:
        word = operand.view(np.uint32)
        regular = regular & _is_regular(word)
        mixed = (mixed ^ word) * np.uint32(0x9E3779B1)
        mixed = (mixed ^ mixed >> 15) * np.uint32(0x85EBCA77)
        mixed = mixed ^ mixed >> 13
    step = (mixed % (2 * _error_bound + 1)).astype(np.int64) - _error_bound
    magnitude = np.clip((bits & 0x7FFFFFFF) + step, 1, 0x7F7FFFFF).astype(np.uint32)
    return np.where(regular, bits & 0x80000000 | magnitude, bits).view(np.float32)


def _is_regular(bits: np.ndarray) -> np.ndarray:
    """Tell which fp32 bits are finite and not zero."""
    return (bits << 1) - 1 < 0xFEFFFFFF


def _ex2(a: np.ndarray) -> np.ndarray:
    flushed = _flush(a.view(np.uint32)).view(np.float32)  # a subnormal exponent gives exactly 1
    return _with_error(np.exp2(flushed.astype(np.float64)).astype(np.float32), flushed)


def _through_f64(operation: Function) -> Function:
    return lambda a: _with_error(operation(a.astype(np.float64)).astype(np.float32), a)


def _divide_full(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return _with_error(a / b, a, b)


def _divide_approximately(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Divide as a times 1/b, whose reciprocal is flushed to zero for 2^126 < |b| < 2^128, as the ISA says."""
    out = _divide_full(a, b)
    size = np.abs(b)
    lost = (size > 2.0**126) & np.isfinite(b)
    return np.where(lost, a * np.copysign(np.float32(0), b), out) if lost.any() else out


# ---- Conversions ----

ROUND_TO_INTEGER = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def _float_to_integer(rounding: str, to: str, source: str, ftz: str = "") -> Function:
    """Round, and clamp to the range. The ISA turns NaN into 0 between types of at most 32 bits, else into 2^(bits - 1)."""
    dtype = INTEGERS[to]
    operation = ROUND_TO_INTEGER[rounding]
    limits = np.iinfo(dtype)
    extended = INTEGERS[f"{to[0]}{max(16, _bits(to))}"]
    nan_value = 0 if source != "f64" and _bits(to) < 64 else 1 << _bits(to) - 1
    register = DTYPES[_register(to)]

    def convert(a: np.ndarray) -> np.ndarray:
        values = operation(_widen(_flush(a) if ftz else a, source))
        above = values >= 2.0 ** np.log2(float(limits.max) + 1)
        below = values <= float(limits.min)
        nan = np.isnan(values)
        out = np.where(above | below | nan, 0, values).astype(dtype)
        out[above] = limits.max
        out[below] = limits.min
        out = out.astype(extended).view(register)
        out[nan] = np.array(nan_value, np.uint64).astype(INTEGERS[f"u{_bits(to)}"]).view(dtype).astype(extended).view(register)
        return out

    return convert


def _integer_to_float(to: str, source: str) -> Function:
    unsigned = INTEGERS[f"u{_bits(source)}"]
    dtype = INTEGERS[source]
    if to in ("f16", "bf16"):
        return lambda a: _narrow(a.astype(unsigned).view(dtype).astype(np.float64), to)
    return lambda a: a.astype(unsigned).view(dtype).astype(FLOATS[to]).view(DTYPES[_register(to)])


def _float_to_float(to: str, source: str, ftz: str = "") -> Function:

    def convert(a: np.ndarray) -> np.ndarray:
        if ftz and source == "f32":
            a = _flush(a)
        out = _narrow(_widen(a, source), to)
        return _flush(out) if ftz and to == "f32" else out

    return convert


def _pair_of_halves(to: str) -> Function:
    """Convert two fp32 to halves of one register: a above, b below."""
    convert = _float_to_float(to, "f32")
    return lambda a, b: convert(a).astype(np.uint32) << 16 | convert(b)


# ---- The table ----


def _define(opcode: str, function: Function, operands: str, result: str) -> None:
    """Enter a form; ``operands`` are types separated by spaces."""
    if opcode in FORMS:
        raise ValueError(f"opcode: {opcode} is defined twice")
    # numpy would warn of what PTX defines: overflow to infinity, NaN from 0 / 0, ...
    FORMS[opcode] = Form(np.errstate(all="ignore")(function), tuple(map(_register, operands.split())), _register(result))


def _define_integers() -> None:
    for bits in (16, 32, 64):
        for kind in "us":
            t = f"{kind}{bits}"
            multiply_high = _multiply_high(t)
            for name, operation in {"add": np.add, "sub": np.subtract, "min": np.minimum, "max": np.maximum}.items():
                _define(f"{name}.{t}", _on_integers(operation, t), f"{t} {t}", t)
            _define(f"mul.lo.{t}", np.multiply, f"{t} {t}", t)
            _define(f"mad.lo.{t}", lambda a, b, c: a * b + c, f"{t} {t} {t}", t)
            _define(f"mul.hi.{t}", multiply_high, f"{t} {t}", t)
            _define(f"mad.hi.{t}", lambda a, b, c, high=multiply_high: high(a, b) + c, f"{t} {t} {t}", t)
            if bits < 64:
                multiply = _multiply_wide(t)
                wide = f"{kind}{2 * bits}"
                _define(f"mul.wide.{t}", multiply, f"{t} {t}", wide)
                _define(f"mad.wide.{t}", lambda a, b, c, multiply=multiply: multiply(a, b) + c, f"{t} {t} {wide}", wide)
        _define(f"neg.s{bits}", _on_integers(np.negative, f"s{bits}"), f"s{bits}", f"s{bits}")
        _define(f"abs.s{bits}", _on_integers(np.abs, f"s{bits}"), f"s{bits}", f"s{bits}")
    for kind in "us":
        for name, operation in {"add": np.add, "min": np.minimum, "max": np.maximum}.items():
            lanes = _packed(_on_integers(operation, f"{kind}16"), np.uint16)
            _define(f"{name}.{kind}16x2", lanes, f"{kind}16x2 {kind}16x2", f"{kind}16x2")


def _define_bits() -> None:
    for t in ("pred", "b16", "b32", "b64"):
        for name, operation in {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}.items():
            _define(f"{name}.{t}", operation, f"{t} {t}", t)
        _define(f"not.{t}", np.invert, t, t)
    for bits in (16, 32, 64):
        _define(f"shl.b{bits}", _shift("shl", f"b{bits}"), f"b{bits} u32", f"b{bits}")
        for kind in "bus":
            _define(f"shr.{kind}{bits}", _shift("shr", f"{kind}{bits}"), f"b{bits} u32", f"b{bits}")
            _define(f"selp.{kind}{bits}", _choose, f"b{bits} b{bits} pred", f"b{bits}")
    for bits in (32, 64):
        _define(f"selp.f{bits}", _choose, f"b{bits} b{bits} pred", f"b{bits}")
        for kind in "us":
            _define(f"bfe.{kind}{bits}", _extract_bits(f"{kind}{bits}"), f"b{bits} u32 u32", f"b{bits}")
        _define(f"bfi.b{bits}", _insert_bits, f"b{bits} b{bits} u32 u32", f"b{bits}")
        _define(f"popc.b{bits}", _count_ones, f"b{bits}", "u32")
        _define(f"clz.b{bits}", _count_leading_zeros, f"b{bits}", "u32")
        _define(f"brev.b{bits}", _reverse_bits, f"b{bits}", f"b{bits}")
    _define("prmt.b32", _permute_bytes, "b32 b32 b32", "b32")
    _define("lop3.b32", _lookup, "b32 b32 b32 b32", "b32")
    for direction in "lr":
        for mode in ("wrap", "clamp"):
            _define(f"shf.{direction}.{mode}.b32", _funnel_shift(direction, mode), "b32 b32 u32", "b32")


def _define_comparisons() -> None:
    for bits in (16, 32, 64):
        for name, comparison in COMPARISONS.items():
            for kind in "us" if name not in ("eq", "ne") else "usb":
                dtype = INTEGERS[f"s{bits}"] if kind == "s" else DTYPES[f"b{bits}"]
                function = lambda a, b, comparison=comparison, dtype=dtype: comparison(a.view(dtype), b.view(dtype))  # noqa: E731
                _define(f"setp.{name}.{kind}{bits}", function, f"b{bits} b{bits}", "pred")
        for name, plain in UNSIGNED_NAMES.items():
            _define(f"setp.{name}.u{bits}", COMPARISONS[plain], f"b{bits} b{bits}", "pred")
    for name, comparison in FLOAT_COMPARISONS.items():
        for t in ("f16", "bf16", "f32", "f64"):
            _define(f"setp.{name}.{t}", _compare_floats(comparison, t), f"{t} {t}", "pred")
        _define(f"setp.{name}.ftz.f32", _compare_floats(comparison, "f32", ".ftz"), "f32 f32", "pred")


def _define_f32() -> None:
    t = "f32"
    for ftz in ("", ".ftz"):
        for name, operation in {"add": np.add, "sub": np.subtract, "mul": np.multiply}.items():
            function = _on_f32(operation, ftz)
            for rounding in ("", ".rn"):
                _define(f"{name}{rounding}{ftz}.f32", function, "f32 f32", t)
                _define(f"{name}{rounding}{ftz}.f32x2", _packed(function, np.uint32), "f32x2 f32x2", "f32x2")
        fma = _on_f32(_fma_f32, ftz)
        _define(f"fma.rn{ftz}.f32", fma, "f32 f32 f32", t)
        _define(f"fma.rn{ftz}.f32x2", _packed(fma, np.uint32), "f32x2 f32x2 f32x2", "f32x2")
        _define(f"div.rn{ftz}.f32", _on_f32(np.divide, ftz), "f32 f32", t)
        _define(f"div.full{ftz}.f32", _on_f32(_divide_full, ftz), "f32 f32", t)
        _define(f"div.approx{ftz}.f32", _on_f32(_divide_approximately, ftz), "f32 f32", t)
        _define(f"rcp.rn{ftz}.f32", _on_f32(np.reciprocal, ftz), t, t)
        _define(f"rcp.approx{ftz}.f32", _on_f32(lambda a: _with_error(np.reciprocal(a), a), ftz), t, t)
        _define(f"sqrt.rn{ftz}.f32", _on_f32(np.sqrt, ftz), t, t)
        _define(f"sqrt.approx{ftz}.f32", _on_f32(lambda a: _with_error(np.sqrt(a), a), ftz), t, t)
        _define(f"rsqrt.approx{ftz}.f32", _on_f32(_through_f64(lambda a: 1 / np.sqrt(a)), ftz), t, t)
        _define(f"lg2.approx{ftz}.f32", _on_f32(_through_f64(np.log2), ftz), t, t)
        _define(f"ex2.approx{ftz}.f32", _on_f32(_ex2, ftz), t, t)
        for name in ("min", "max"):
            for nan in ("", ".NaN"):
                _define(f"{name}{ftz}{nan}.f32", _on_f32(_extremum(name, nan != ""), ftz), "f32 f32 f32", t)
        for name in ("abs", "neg"):
            _define(f"{name}{ftz}.f32", _change_sign(name, t, ftz), t, t)
    for half in ("f16", "bf16"):  # mixed precision, since sm_100: the last operand is f32
        for name, operation in {"add": np.add, "sub": np.subtract}.items():
            for rounding in ("", ".rn"):
                _define(f"{name}{rounding}.f32.{half}", _on_f32_and_half(operation, half), f"{half} f32", t)
        _define(f"fma.rn.f32.{half}", _on_f32_and_half(_fma_f32, half), f"{half} {half} f32", t)
    _define("tanh.approx.f32", _on_f32(_through_f64(np.tanh)), t, t)
    _define("copysign.f32", _copy_sign(t), "f32 f32", t)


def _on_f32_and_half(operation: Function, half: str) -> Function:
    """Apply an operation on fp32 to operands that are halves, but for the last."""
    function = _on_f32(operation)
    return lambda *operands: function(
        *(_widen(a, half).astype(np.float32).view(np.uint32) for a in operands[:-1]), operands[-1]
    )


def _define_f64() -> None:
    t = "f64"
    for name, operation in {"add": np.add, "sub": np.subtract, "mul": np.multiply}.items():
        for rounding in ("", ".rn"):
            _define(f"{name}{rounding}.f64", _on_f64(operation), "f64 f64", t)
    _define("div.rn.f64", _on_f64(np.divide), "f64 f64", t)
    _define("rcp.rn.f64", _on_f64(np.reciprocal), t, t)
    _define("sqrt.rn.f64", _on_f64(np.sqrt), t, t)
    for name in ("min", "max"):
        _define(f"{name}.f64", _on_f64(_extremum(name, False)), "f64 f64", t)
    for name in ("abs", "neg"):
        _define(f"{name}.f64", _change_sign(name, t), t, t)
    _define("copysign.f64", _copy_sign(t), "f64 f64", t)


def _define_halves() -> None:
    for t in ("f16", "bf16"):
        functions = {}
        for name, (operation, arity) in HALF_OPERATIONS.items():
            for rounding in ("", ".rn") if name != "fma" else (".rn",):
                functions[name + rounding] = _on_half(operation, t), arity
        for name in ("min", "max"):
            functions[name] = _on_values(_extremum(name, False), t), 2
            functions[name + ".NaN"] = _on_values(_extremum(name, True), t), 2
        for name in ("abs", "neg"):
            functions[name] = _change_sign(name, t), 1
        for name, (function, arity) in functions.items():
            _define(f"{name}.{t}", function, " ".join([t] * arity), t)
            _define(f"{name}.{t}x2", _packed(function, np.uint16), " ".join([f"{t}x2"] * arity), f"{t}x2")


def _define_conversions() -> None:
    for source in INTEGERS:
        for to in INTEGERS:
            _define(f"cvt.{to}.{source}", _convert_integer(to, source), source, to)
        # A 64-bit integer does not fit fp64, through which the narrow types go.
        for to in ("f32", "f64") if _bits(source) == 64 else ("f16", "bf16", "f32", "f64"):
            _define(f"cvt.rn.{to}.{source}", _integer_to_float(to, source), source, to)
    for rounding, operation in ROUND_TO_INTEGER.items():
        for to in INTEGERS:
            for source in ("f16", "bf16", "f32", "f64"):
                _define(f"cvt.{rounding}.{to}.{source}", _float_to_integer(rounding, to, source), source, to)
            _define(f"cvt.{rounding}.ftz.{to}.f32", _float_to_integer(rounding, to, "f32", ".ftz"), "f32", to)
        _define(f"cvt.{rounding}.f32.f32", _on_f32(operation), "f32", "f32")
        _define(f"cvt.{rounding}.ftz.f32.f32", _on_f32(operation, ".ftz"), "f32", "f32")
        _define(f"cvt.{rounding}.f64.f64", _on_f64(operation), "f64", "f64")
    _define("cvt.f32.bf16", lambda a: a.astype(np.uint32) << 16, "bf16", "f32")
    _define("cvt.f32.f16", _float_to_float("f32", "f16"), "f16", "f32")
    _define("cvt.f64.f16", _float_to_float("f64", "f16"), "f16", "f64")
    for ftz in ("", ".ftz"):
        _define(f"cvt{ftz}.f64.f32", _float_to_float("f64", "f32", ftz), "f32", "f64")
        _define(f"cvt.rn{ftz}.f32.f64", _float_to_float("f32", "f64", ftz), "f64", "f32")
    for to in ("f16", "bf16"):
        for source in ("f32", "f64"):
            _define(f"cvt.rn.{to}.{source}", _float_to_float(to, source), source, to)
        _define(f"cvt.rn.{to}x2.f32", _pair_of_halves(to), "f32 f32", f"{to}x2")


_define_integers()
_define_bits()
_define_comparisons()
_define_f32()
_define_f64()
_define_halves()
_define_conversions()

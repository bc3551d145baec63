"""What executed PTX instructions cost a card: the SASS instructions that ptxas makes of them, by the unit that runs them.

An estimate. ptxas merges some instructions (three logical ones into one, an address into a load) and adds others. Only the
machine code tells which, and that is not executed here. ``tests/kernels/test_compile.py`` holds the estimate against the
machine code of kernels that are one plain loop.
"""

import collections
from collections.abc import Mapping

UNITS = ("float", "integer", "special", "exchange", "memory", "control")
# PTX instructions that become several or none: what Triton's ptxas makes of them for sm_90, without the slow path that ordinary
# numbers do not take. "special" is the unit for 1 / x, 2^x and log2 x. The sign of an operand costs nothing. A 64-bit "or" adds
# a small constant to a multiple of a larger one, so the upper half stays.
EXPANSIONS: dict[str, dict[str, float]] = {
    "neg.f32": {},
    "cvt.rn.bf16.f32": {"integer": 0.5},  # two, for neighbours, are one F2FP.BF16.F32.PACK_AB
    "or.b64": {"integer": 1},
    "div.rn.f32": {"special": 1, "float": 5, "integer": 1, "control": 3},
    "div.full.f32": {"special": 1, "float": 5, "integer": 2},
    "div.approx.f32": {"special": 1, "float": 3, "integer": 1},
    "sqrt.rn.f32": {"special": 1, "float": 4, "integer": 2, "control": 3},
    "ex2.approx.f32": {"special": 1, "float": 2, "integer": 1},
    "lg2.approx.f32": {"special": 1, "float": 2, "integer": 1},
}
DROPPED = ("mov", "cvta")  # registers are renamed; a parameter is an operand in constant memory
FLOAT = ("add", "sub", "mul", "fma", "neg")
FLOAT_TYPES = ("f32", "f16", "bf16", "f16x2", "bf16x2", "f64")
EXCHANGE = ("shfl", "redux", "ldmatrix")
CONTROL = ("bra", "ret", "bar")


def issued(executed: Mapping[str, int]) -> collections.defaultdict[str, float]:
    """Return how many SASS instructions each of `UNITS` is given.

    "float" has additions and multiplications; comparisons, selections, minima and conversions of floating point are "integer",
    whose unit runs them; "exchange" is traffic between threads, by shuffle or in shared memory; "memory" is global memory.

    Args:
        executed: PTX instructions by opcode.
    """
    instructions: collections.defaultdict[str, float] = collections.defaultdict(float)
    for opcode, count in executed.items():
        for unit, weight in _cost(opcode).items():
            instructions[unit] += weight * count
    return instructions


def _cost(opcode: str) -> Mapping[str, float]:
    name, *modifiers = opcode.split(".")
    if opcode in EXPANSIONS:
        return EXPANSIONS[opcode]
    if name in DROPPED or "param" in modifiers:
        return {}
    if name in CONTROL:
        return {"control": 1}
    if name in EXCHANGE or "shared" in modifiers or "shared::cta" in modifiers:
        return {"exchange": 1}
    if name in ("ld", "st", "atom", "red"):
        return {"memory": 1}
    kind = modifiers[-1]
    if name in ("ex2", "lg2", "rcp", "sqrt", "div"):
        return {"special": 1}
    if name in FLOAT and kind in FLOAT_TYPES:
        return {"float": 1}
    return {"integer": 2 if kind in ("s64", "u64", "b64") and name != "cvt" else 1}

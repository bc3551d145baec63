"""Device functions that bring fp32 results to storage: the one place where precision is given up.

Rounding is written out on bit patterns, because the interpreter truncates where the GPU rounds; written out, the two
agree bit for bit. Other roundings (stochastic, 24-bit weights) join here, chosen by the ``ROUNDING`` of the caller.
"""

from soul_kernels._launch import tl, triton

ROUNDINGS = ("nearest",)


@triton.jit
def round_nearest(x, DTYPE: tl.constexpr):
    """fp32 -> ``DTYPE``, to nearest, ties to even; NaN stays NaN and overflow becomes inf, as in torch's ``to()``."""
    if DTYPE == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        bits = tl.where(x == x, bits, 0x7FC00000)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(DTYPE)


@triton.jit
def round_param(x, DTYPE: tl.constexpr, ROUNDING: tl.constexpr):
    """fp32 parameter -> storage by the rounding that the caller asked for."""
    tl.static_assert(ROUNDING == "nearest", "unknown ROUNDING")
    return round_nearest(x, DTYPE)

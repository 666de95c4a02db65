"""Correctly rounded divisions made of fused multiply-adds, for the other Triton kernels.

A division has the bits of `tl.div_rn`, for less: the assembler's own takes about twelve instructions and a branch each
time, though all that depends on the divisor is the same for a constant or for a row. Triton's interpreter rounds a
fused multiply-add twice; there the division is `tl.div_rn` itself. That is decided here, and nowhere else.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..codebooks import LINEAR_MAX

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_LINEAR_MAX = tl.constexpr(float(LINEAR_MAX))
_MINUS_RECIPROCAL = tl.constexpr(-0x1020408 / 2**31)  # -1 / 127 rounded to fp32
_LARGEST = tl.constexpr(3.4028234663852886e38)
_SMALL, _LARGE = tl.constexpr(2.0**-64), tl.constexpr(2.0**64)


@triton.jit
def times_over_linear_max(codes, scale):
    """Return (codes * scale) / 127, rounded twice, of fp32 codes [ROWS, COLS] and scale [ROWS, 1].

    The residual of the first quotient is a multiple of its unit, below 127 of them: exact, subnormal or not. What it
    adds to the quotient is off by 2**-24 of half a unit, and p / 127 is never that close to the middle of two numbers.
    Signs are such that a zero keeps its own. Infinity has the residual NaN, of which the minimum makes a number.
    """
    if INTERPRETED:
        quotient = tl.div_rn(codes * scale, _LINEAR_MAX)
    else:
        minus_product = codes * (scale * -1.0)
        first = minus_product * _MINUS_RECIPROCAL
        minus_residual = tl.minimum(tl.fma(first, _LINEAR_MAX, minus_product), _LARGEST)
        quotient = tl.fma(minus_residual, _MINUS_RECIPROCAL, first)
    return quotient


@triton.jit
def _divisor(scale):
    """Return a power of two, and scale times it, with its reciprocal in two parts, of scales [ROWS, 1].

    The power, in {2**64, 1, 2**-64}, keeps everything normal. It is 0 for a scale of 0, by which nothing is divided, as
    for infinity: finite values over them are 0, others NaN.
    """
    power = tl.where(scale < _SMALL, _LARGE, tl.where(scale > _LARGE, _SMALL, 1.0))
    is_number = (scale > 0.0) & (scale <= _LARGEST)
    power = tl.where(is_number, power, tl.where(scale == scale, 0.0, scale))
    divisor = tl.where(is_number, scale * power, 1.0)
    high = tl.div_rn(1.0, divisor)
    low = tl.fma(-divisor, high, 1.0) * high
    return power, divisor, high, low


@triton.jit
def over_scale(values, scale, ALONG: tl.constexpr):
    """Return fp32 values [ROWS, COLS] / scale [ROWS, 1], which is normal and not below any of them, or 0: then 0.

    A quotient below 2**-38 is only as small: its residual may be subnormal. Else the first quotient is less than one
    unit off, its residual exact, and the high part of the reciprocal correctly rounded: then so is their sum.

    Args:
        values: the dividends.
        scale: the divisors.
        ALONG: a thread has elements of one row, and divides by its scale once.
    """
    if INTERPRETED or not ALONG:
        quotient = tl.div_rn(values, tl.where(scale == 0.0, float("inf"), scale))
    else:
        power, divisor, high, low = _divisor(scale)
        scaled = values * power
        first = tl.fma(scaled, high, scaled * low)
        quotient = tl.fma(tl.fma(-divisor, first, scaled), high, first)
    return quotient

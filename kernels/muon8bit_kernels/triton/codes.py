"""Codes to values and values to codes in Triton, with the bits of `reference`, for the other Triton kernels."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.target_info import is_cuda

from ..codebooks import LINEAR_MAX, SCALE_FLOOR, zero_code
from .exact import INTERPRETED, over_scale, times_over_linear_max

_LINEAR_MAX = tl.constexpr(float(LINEAR_MAX))
_SCALE_FLOOR = tl.constexpr(float(SCALE_FLOOR))
_ZERO_CODE = tl.constexpr(zero_code("dynamic"))
# Adding 1.5 * 2**23 to |x| < 2**22 rounds it to the nearest integer, ties to even, and leaves that in the low bits.
ROUNDER = tl.constexpr(12582912.0)
_MAGNITUDE_BITS = tl.constexpr(0x7FFFFFFF)
_LARGEST = tl.constexpr(3.4028234663852886e38)


@triton.jit
def inverse_of(norm):
    """Return the reciprocal of a norm; where it overflows, the largest fp32, so that a zero momentum stays zero."""
    return tl.minimum(tl.div_rn(1.0, norm), _LARGEST)


@triton.jit
def entries(table, indices, ALONG: tl.constexpr):
    """Return the entries of an fp32 table at int32 indices from 0 on.

    A load lets the compiler give each thread other elements than it has, and move them there and back; Triton 3.6 even
    computes them twice. With ALONG, where all tensors lie along the rows, threads keep theirs. Where one lies across,
    they are moved anyway.
    """
    if INTERPRETED or not is_cuda() or not ALONG:
        found = tl.load(table + indices)
    else:
        found = tl.inline_asm_elementwise(
            "{ .reg .b64 place; mad.wide.u32 place, $1, 4, $2; ld.global.nc.b32 $0, [place]; }",
            "=r,r,l",
            [indices, table],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    return found


@triton.jit
def load_codes(places, mask, CODEBOOK: tl.constexpr):
    """Load codes, and outside of `mask` the code of zero; with CODEBOOK None the codes are the fp32 momentum itself."""
    return tl.load(places, mask, other=_ZERO_CODE if CODEBOOK == "dynamic" else 0)


@triton.jit
def decode(codes, scale, map_values, CODEBOOK: tl.constexpr, ALONG: tl.constexpr = True):
    """Return the fp32 values of codes [ROWS, COLS] and scale [ROWS, 1]; `map_values` points to the dynamic map."""
    if CODEBOOK == "linear":
        decoded = times_over_linear_max(codes.to(tl.float32), scale)
    elif CODEBOOK == "dynamic":
        decoded = entries(map_values, codes.to(tl.int32), ALONG) * scale
    else:
        decoded = codes
    return decoded


@triton.jit
def _line(x, slope, intercept, ALONG: tl.constexpr):
    """Return slope * x + intercept; in pieces fused operations would hold their constants in 24 registers more."""
    return tl.fma(x, slope, intercept) if ALONG else x * slope + intercept


@triton.jit
def encode(values, scale, midpoints, CODEBOOK: tl.constexpr, ALONG: tl.constexpr = True):
    """Return the codes of fp32 values [ROWS, COLS] and floored scale [ROWS, 1].

    `midpoints` points to those of the dynamic map.
    """
    ratio = over_scale(values, scale, ALONG)
    if CODEBOOK == "linear":
        codes = (ratio * _LINEAR_MAX + ROUNDER).to(tl.int32, bitcast=True).to(tl.int8)
    else:
        # Magnitudes number 1..127 from zero: decade d holds 2**d of them, evenly spaced over 10**(d - 6) * (0.1, 1).
        # Number against magnitude is thus a straight line in each decade; the lines get flatter and meet where the
        # decades do, so the least of the seven is the right one. Half a level less makes the guess exact or one too
        # low, with a quarter of a level to spare for rounding; one comparison with the true midpoint decides.
        magnitude = tl.abs(ratio)
        position = _line(magnitude, 1e6 / 0.9, 8 / 9 - 0.5, ALONG)
        for d in tl.static_range(1, 7):
            position = tl.minimum(position, _line(magnitude, 1e6 / 0.9 / 5.0**d, 2.0**d * 8 / 9 - 0.5, ALONG))
        guess = position.to(tl.int32)
        guess = tl.where(ratio < 0.0, _ZERO_CODE - 1 - guess, _ZERO_CODE + guess)
        guess = tl.minimum(tl.maximum(guess, 0), 255)  # -1.0 is not in the map; and NaN must not index the table
        codes = (guess + (ratio > entries(midpoints, guess, ALONG)).to(tl.int32)).to(tl.uint8)
    return codes


@triton.jit
def magnitude_bits(values):
    """Return the bits of |values|, int32.

    They are in the order of the magnitudes with NaN on top, so the maximum of them is NaN where a value is. A maximum
    of floats would drop it.
    """
    return values.to(tl.int32, bitcast=True) & _MAGNITUDE_BITS


@triton.jit
def scale_of(largest):
    """Return the scale of a block from the maximum of its `magnitude_bits`: below the smallest normal fp32 it is 0."""
    absmax = largest.to(tl.float32, bitcast=True)
    return tl.where(absmax < _SCALE_FLOOR, 0.0, absmax)


@triton.jit
def widened(values):
    """Return values of any float dtype in fp32."""
    if values.dtype == tl.bfloat16:
        wide = (values.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        wide = values.to(tl.float32)
    return wide

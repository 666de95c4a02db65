"""Limits of a dtype for given coefficients: where the Gram form restarts, and whether fp16 can hold the iterates.

Rounding gives R = X X^T eigenvalues near -eps where X is rank-deficient, and a step of the Gram form multiplies them by
a^2. Where they come near 1 the polynomial throws them away. A restart (Q is applied to X, R made anew) ends the growth.
"""

from __future__ import annotations

from functools import cache

import torch
from muon8bit_kernels import MAX_GROWTH

from .coefficients import Coefficients

# eps of the dtype, and how far eps * prod(a^2) may grow in the first and in later segments. fp32: five of Jordan's
# steps reach .014 (error 1e-3), six .17 (error .015), ten diverge, on ranks 1 and 4. fp16: the limits cut five steps of
# Jordan, "you" and Polar Express into two and three; three and two have up to 2.2 of the bf16 error (Polar Express,
# 1/k). Later segments start from larger singular values.
_GROWTH = {torch.float32: (2.0**-24, MAX_GROWTH, MAX_GROWTH), torch.float16: (2.0**-11, 0.6, 1.0)}
# In fp32, for coefficients that converge. In a constant matrix all elements of Q round alike, and their sums keep that:
# without a restart the error grows with the rows, at [512, 2048] to .086 (Polar Express), .071 ("you") and .023
# (deepseek_v4, restart after 5). Jordan's values end between .68 and 1.14 anyway. With this limit all stay under .001.
_CONVERGING_GROWTH = 2e-4
_CONVERGED = 0.2  # from 1, of what becomes of the singular values from .5 to 1
# Iterates of converging coefficients stay under 40; fp16 ends at 65504.
_LARGEST_IN_FP16 = 4096.0
# Such a number can be squared and summed over the side of a matrix in float32.
_LARGEST_IN_FP32 = 2.0**50
_SINGULAR_VALUES = 257


@cache
def segments(coefficients: Coefficients, dtype: torch.dtype) -> tuple[int, ...] | None:
    """Return the numbers of steps between the restarts of the Gram form, or None where `dtype` does not carry it.

    Their sum is the number of steps. One segment means no restart. bf16 has None: it fails on spectra like 1/k
    (measured errors of 1 to 3.7 times those of the standard form, with a restart).
    """
    if dtype not in _GROWTH or (dtype == torch.float16 and not fits_fp16(coefficients)):
        return None
    eps, limit, later_limit = _GROWTH[dtype]
    if dtype == torch.float32 and _converges(coefficients):
        limit = later_limit = _CONVERGING_GROWTH
    counts, growth = [0], eps
    for a, _, _ in coefficients.steps:
        if counts[-1] and growth * a * a >= limit:
            counts.append(0)
            growth, limit = eps, later_limit
        counts[-1] += 1
        growth *= a * a
    return tuple(counts)


def _converges(coefficients: Coefficients) -> bool:
    """Return whether singular values end so near to 1 that rounding errors of a few hundredths show."""
    for index in range(_SINGULAR_VALUES):
        x = (0.5 + 0.5 * index / (_SINGULAR_VALUES - 1)) / coefficients.norm_factor
        for a, b, c in coefficients.steps:
            x = min(max(x * (a + b * x * x + c * x**4), -1e9), 1e9)  # what diverges stays a number
        if abs(x - 1) > _CONVERGED:
            return False
    return True


@cache
def diverges(coefficients: Coefficients) -> bool:
    """Return whether an iterate grows beyond what float32 and bfloat16 hold, so that parameters become NaN."""
    return not _stays_under(_LARGEST_IN_FP32, coefficients)


@cache
def fits_fp16(coefficients: Coefficients) -> bool:
    """Return whether every iterate stays far from fp16's largest number, in both forms.

    Singular values from 0 to 1 are tried.
    """
    return _stays_under(_LARGEST_IN_FP16, coefficients)


def _stays_under(limit: float, coefficients: Coefficients) -> bool:
    for index in range(_SINGULAR_VALUES):
        x = index / (_SINGULAR_VALUES - 1)
        q = 1.0  # product of the polynomials of two steps, the least between restarts
        for step, (a, b, c) in enumerate(coefficients.steps):
            r = x * x
            z = a + b * r + c * r * r
            q = z * (q if step % 2 else 1.0)
            x *= z
            if max(abs(v) for v in (x, x * x, z - a, z, q)) > limit:
                return False
    return True

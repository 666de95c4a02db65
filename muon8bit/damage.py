"""Damage of saved states: values that no step leaves."""

from __future__ import annotations

from torch import Tensor

from .config import (
    EXP_AVG_SCALES_KEY,
    EXP_AVG_SQ_CODES_KEY,
    EXP_AVG_SQ_KEY,
    EXP_AVG_SQ_SCALES_KEY,
    LINEAR_CODES_KEY,
    SCALES_KEY,
    STEP_KEY,
)

# Largest magnitudes, squares, a count: never under zero.
_NOT_NEGATIVE = (SCALES_KEY, EXP_AVG_SCALES_KEY, EXP_AVG_SQ_SCALES_KEY, EXP_AVG_SQ_KEY, STEP_KEY)


def why_damaged(key: str, value: Tensor, num_steps: float = 0) -> str:
    """Return what no step leaves in a tensor of the state, or nothing. Takes no memory for elements.

    The dynamic maps use all of their 256 codes; of the linear one -128 would be -1.008 of the scale.

    Args:
        key: one of `config.STATE_KEYS`.
        value: dense, with values, of the key's dtype.
        num_steps: AdamW's; from the first on no 8-bit second moment has the code 0.
    """
    if value.numel() == 0:
        return ""
    low, high = value.aminmax()
    if value.is_floating_point() and not (low.isfinite() and high.isfinite()):
        return "NaN or Inf"
    if key in _NOT_NEGATIVE and low < 0:
        return f"the negative number {low.item():g}"
    if key == STEP_KEY and low != low.floor():
        return f"{low.item():g}, which is no number of steps"
    if key == LINEAR_CODES_KEY and low < -127:
        return "the code -128, which is none of the linear codebook's"
    if key == EXP_AVG_SQ_CODES_KEY and num_steps > 0 and low == 0:
        return "the code 0, by which a step would be divided, and which it never stores"
    return ""

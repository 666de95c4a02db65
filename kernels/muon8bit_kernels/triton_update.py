"""The update of a parameter in Triton, one pass over parameter and direction; bitwise `update_reference`.

To and from bf16 on the bits, also to nearest: the interpreter truncates, and takes subnormal bf16 for zero.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rounding import ADDED, FINAL_1, FINAL_2, NUM_BYTES, WORD_1, WORD_2
from .triton_tiles import _launch, _tile
from .update_reference import check_rounding

_WORD_1, _WORD_2, _ADDED = tl.constexpr(WORD_1), tl.constexpr(WORD_2), tl.constexpr(ADDED)
_FINAL_1, _FINAL_2, _NUM_BYTES = tl.constexpr(FINAL_1), tl.constexpr(FINAL_2), tl.constexpr(NUM_BYTES)
# Columns of a tile; not a block of the momentum, whose size the update does not know.
_TILE_COLUMNS = 2048


@triton.jit
def _rotated(words, BY: tl.constexpr):
    return (words << BY) | (words >> (32 - BY))


@triton.jit
def _folded(state, word):
    """Take one more 32-bit word into MurmurHash3's state."""
    return _rotated(state ^ (_rotated(word * _WORD_1, 15) * _WORD_2), 13) * 5 + _ADDED


@triton.jit
def _random_bits(indices, key):
    """The hash of int64 element indices under an int32 key: uint32."""
    state = _folded(tl.cast(key, tl.uint32), indices.to(tl.uint32))
    state = _folded(state, (indices >> 32).to(tl.uint32)) ^ _NUM_BYTES
    state = (state ^ (state >> 16)) * _FINAL_1
    state = (state ^ (state >> 13)) * _FINAL_2
    return state ^ (state >> 16)


@triton.jit
def _widened(values):
    """Any float dtype -> fp32."""
    if values.dtype == tl.bfloat16:
        wide = (values.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        wide = values.to(tl.float32)
    return wide


@triton.jit
def _to_bf16(values, indices, key, ROUNDING: tl.constexpr):
    """fp32 -> bf16: add to the 16 bits that will be cut off, a half or random bits; NaN stays NaN."""
    bits = values.to(tl.uint32, bitcast=True)
    noise = _random_bits(indices, key) & 0xFFFF if ROUNDING == "stochastic" else 0x7FFF + ((bits >> 16) & 1)
    cut = tl.where(values == values, bits + noise, bits | 0x400000) >> 16
    return cut.to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit(do_not_specialize=["key", "first"])
def _update_param_kernel(
    param,
    direction,
    decay,
    scale,
    key,
    first,
    pitch,
    param_row_stride,
    param_col_stride,
    direction_row_stride,
    direction_col_stride,
    rows,
    cols,
    IN_MEMORY: tl.constexpr,
    ROUNDING: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, col, mask, _, _ = _tile(rows, cols, ROWS, BLOCK)
    places = param + (row * param_row_stride + col * param_col_stride)
    old = _widened(tl.load(places, mask, other=0.0))
    step = direction + (row * direction_row_stride + col * direction_col_stride)
    step = _widened(tl.load(step, mask, other=0.0))
    decay_value = tl.load(decay) if IN_MEMORY else tl.cast(decay, tl.float32)  # torch.compile passes scalars as fp64
    scale_value = tl.load(scale) if IN_MEMORY else tl.cast(scale, tl.float32)
    decayed = old * decay_value
    new = tl.where(scale_value == 0.0, decayed, decayed - step * scale_value)
    if ROUNDING is not None:
        new = _to_bf16(new, tl.cast(first, tl.int64) + (row * pitch + col), key, ROUNDING)
    # A small tile's elements are held more than once: no warp may write what another has yet to load.
    tl.debug_barrier()
    tl.store(places, new, mask)


@triton.jit(do_not_specialize=["key", "first"])
def _round_stochastic_kernel(values, out, key, first, rows, cols, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row, col, mask, _, _ = _tile(rows, cols, ROWS, BLOCK)
    index = row * cols + col
    new = _to_bf16(tl.load(values + index, mask, other=0.0), tl.cast(first, tl.int64) + index, key, "stochastic")
    tl.store(out + index, new, mask)


def update_param(
    param: Tensor,
    direction: Tensor,
    *,
    decay: float | Tensor,
    scale: float | Tensor,
    key: int | None = None,
    first: int = 0,
    pitch: int | None = None,
) -> None:
    """param <- param * decay - direction * scale, in place, in fp32, rounded once to the parameter's dtype; bitwise
    `update_reference.update_param`.

    Args:
        param: [rows, cols], fp32, bf16 or fp16, any strides.
        direction: [rows, cols], any of these dtypes, any strides.
        decay: 1 - lr * weight_decay; a float, or a 0-d fp32 tensor on the parameter's device.
        scale: lr times the factor of the shape; as `decay`. Where it is 0, `direction` is not looked at.
        key: of `rounding_key`: round bf16 stochastically. None: to nearest, ties to even.
        first: global element index of param[0, 0].
        pitch: difference of the global indices of param[1, 0] and param[0, 0]; None: cols.

    Raises:
        ValueError: for a key with a parameter that is not bf16.
    """
    check_rounding(param, key)
    in_memory = isinstance(decay, Tensor) or isinstance(scale, Tensor)
    if in_memory:
        decay, scale = (torch.as_tensor(f, dtype=torch.float32, device=param.device) for f in (decay, scale))
    rounding = "stochastic" if key is not None else "nearest" if param.dtype == torch.bfloat16 else None
    _launch(
        _update_param_kernel,
        param,
        _TILE_COLUMNS,
        param,
        direction,
        decay,
        scale,
        key or 0,
        first,
        param.shape[1] if pitch is None else pitch,
        *param.stride(),
        *direction.stride(),
        IN_MEMORY=in_memory,
        ROUNDING=rounding,
    )


def round_stochastic(values: Tensor, *, key: int, first: int = 0) -> Tensor:
    """fp32 `values` (any shape, contiguous) -> bf16 of the same shape, rounded stochastically; bitwise
    `update_reference.round_stochastic`.

    Args:
        key: of `rounding_key`.
        first: global element index of the first value; the others follow in order.
    """
    rounded = torch.empty(values.shape, dtype=torch.bfloat16, device=values.device)
    _launch(_round_stochastic_kernel, values.view(1, -1), _TILE_COLUMNS, values, rounded, key, first)
    return rounded

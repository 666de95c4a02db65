"""Momentum step of a batch of matrices of which there are only some columns here, in Triton, one launch a phase.

Codes, scales, maxima and Newton-Schulz input are those of `reference.cut` to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from ..codebooks import Codebook
from ..reference.cut import touched_blocks
from .cut_kernels import apply_cut_kernel, stats_cut_kernel
from .momentum import MomentumBatch
from .tiles import Tiling, common_strides, has_flag_each, lies_across, table_of, tiling


class _CutBatch(MomentumBatch):
    """Arguments that both phases make of their stacks, and the grid."""

    def __init__(
        self,
        codes: Sequence[Tensor],
        scales: Sequence[Tensor] | None,
        grads: Sequence[Tensor],
        first_col: int,
        nesterov: bool,
        codebook: Codebook | None,
        block_size: int,
    ) -> None:
        touched = touched_blocks(first_col, codes[0].shape[2], block_size)
        blocks = touched.stop if scales is None else scales[0].shape[2]
        super().__init__(codes, scales, grads, nesterov, codebook, blocks)
        (self.rows, self.width), self.num_blocks = self.shape, blocks
        self.num_touched = touched.stop - touched.start
        self.table = table_of(list(zip(*self.columns, strict=True)), self.first.device)
        self.place = self.rows, self.width, first_col, self.num_touched, blocks
        is_aligned = not any(place % 16 for column in (self.columns[0], self.columns[2]) for place in column)
        is_even = not any(number % 16 for number in (first_col, self.width, block_size))
        self.constants |= {"ALIGNMENT": 16 if is_aligned else 1, "EVEN": is_even}

    def launch(self, kernel: Any, tiles: Tiling, block_size: int, *args: Tensor | float | None, **more: int) -> None:
        """Run `kernel` over what is here of each block of some rows."""
        if self.count * self.rows * self.width == 0:
            return
        shape = {**tiles._asdict(), "BLOCK": block_size, **more}
        grid = (self.count * triton.cdiv(self.rows, tiles.ROWS) * self.num_touched,)
        with torch.cuda.device_of(self.first):  # Triton launches on the current device, wherever its arguments are
            kernel[grid](*args, *self.place, **self.constants, **shape, enable_fp_fusion=False)


def momentum_stats_cut(
    codes: Sequence[Tensor],
    scales: Sequence[Tensor] | None,
    grads: Sequence[Tensor],
    *,
    first_col: int,
    beta: float,
    nesterov: bool,
    codebook: Codebook | None,
    block_size: int,
) -> tuple[Tensor, Tensor]:
    """Compute the first phase of the step, which reads only: `reference.cut` but for the order of addition.

    Args:
        codes: stacks [count, rows, width] of contiguous matrices, int8 (linear), uint8 (dynamic) or fp32 (None).
        scales: stacks [count, rows, blocks] of whole rows, fp32, contiguous but for the first stride; None with
            `codebook=None`.
        grads: stacks [count, rows, width], fp32, bf16 or fp16, any strides, row and column stride the same in all.
        first_col: the place of these columns in the whole matrix.
        beta: the momentum factor in [0, 1).
        nesterov: u is beta * m + (1 - beta) * g instead of m.
        codebook: `"linear"`, `"dynamic"`, or None for an fp32 momentum.
        block_size: the number of elements that share a scale, a power of two.

    Returns:
        Two of fp32 [matrices, rows, touched blocks]: the sum of u squared of what is here of each, not finite where a
        gradient is not; and the largest magnitude of m, 0 if that is below the smallest normal fp32.

    Raises:
        ValueError: if the stacks of an argument are not alike, codes or scales are not contiguous matrices, or
            `block_size` is not a power of two.
    """
    batch = _CutBatch(codes, scales, grads, first_col, nesterov, codebook, block_size)
    shape = 2, batch.count, batch.rows, batch.num_touched
    sumsq, maxima = torch.empty(shape, dtype=torch.float32, device=batch.first.device)
    across = lies_across(batch.grad_strides)
    tiles = tiling((batch.rows, batch.width), block_size, across=across)
    tensors, numbers = (sumsq, maxima, batch.map_values), (float(beta), 1.0 - beta, *batch.grad_strides)
    batch.launch(stats_cut_kernel, tiles, block_size, batch.table, *tensors, *numbers, ALONG=not across)
    return sumsq, maxima


def momentum_apply_cut(
    codes: Sequence[Tensor],
    scales: Sequence[Tensor] | None,
    grads: Sequence[Tensor],
    new_scales: Tensor | None,
    norms: Tensor,
    out: Tensor,
    *,
    first_col: int,
    beta: float,
    nesterov: bool,
    codebook: Codebook | None,
    block_size: int,
    skip: Tensor | None = None,
    signs: bool = False,
) -> None:
    """Write codes, scales and the Newton-Schulz input: the second phase of the step; bitwise `reference.cut`.

    Args:
        codes, scales, grads, first_col, beta, nesterov, codebook, block_size: as in `momentum_stats_cut`. Codes and
            scales are overwritten with the new state.
        new_scales: fp32 [matrices, rows, blocks], the maxima of whole blocks; None with `codebook=None`.
        norms: fp32 [matrices], contiguous: the positive divisors of u.
        out: [matrices, rows, width], any float dtype and strides; receives u * (1 / norm), in fp32, rounded once.
        skip: fp32 on the device, 0-d or [matrices]; unless it is zero, nothing is written, `out` neither.
        signs: `out` receives the sign of u, -1, 0 or 1, instead; it may be int8.

    Raises:
        ValueError: as `momentum_stats_cut`, or if `new_scales`, `norms`, `out` or `skip` has another shape.
    """
    batch = _CutBatch(codes, scales, grads, first_col, nesterov, codebook, block_size)
    shape = batch.count, batch.rows, batch.width
    if norms.shape != (batch.count,) or out.shape != shape:
        raise ValueError(f"norms {tuple(norms.shape)} and out {tuple(out.shape)} must be of {batch.count} matrices")
    if new_scales is not None and new_scales.shape != (*shape[:2], batch.num_blocks):
        raise ValueError(f"new_scales {tuple(new_scales.shape)} must be {(*shape[:2], batch.num_blocks)}")
    out_strides = common_strides("out", [out], shape[1:])
    across = lies_across(batch.grad_strides) or lies_across(out_strides)
    batch.launch(
        apply_cut_kernel,
        tiling(shape[1:], block_size, across=across),
        block_size,
        batch.table,
        None if new_scales is None else new_scales.contiguous(),
        norms.contiguous(),
        out,
        skip,
        batch.map_values,
        batch.midpoints,
        float(beta),
        1.0 - beta,
        *batch.grad_strides,
        out.stride(0),
        *out_strides,
        ALONG=not across,
        SIGNS=signs,
        BLOCKS=triton.next_power_of_2(batch.num_blocks),
        EACH=has_flag_each(skip, batch.count),
    )

"""Two-phase momentum step of a batch of matrices in Triton, one launch a phase; bitwise `reference`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..codebooks import Codebook, dynamic_map, dynamic_midpoints
from ..reference import num_blocks
from .momentum_kernels import apply_kernel, stats_kernel
from .tiles import (
    addresses,
    check_rows_contiguous,
    common_strides,
    has_flag_each,
    launch,
    lies_across,
    tables_of,
    tiling,
    tl_dtype,
    whole_eighths,
)


class MomentumBatch:
    """Arguments that both phases make of their stacks: the columns of the table, and the kernel's constants.

    `blocks` is the number of blocks in a row of the scales.
    """

    def __init__(
        self,
        codes: Sequence[Tensor],
        scales: Sequence[Tensor] | None,
        grads: Sequence[Tensor],
        nesterov: bool,
        codebook: Codebook | None,
        blocks: int,
    ) -> None:
        self.first, self.shape = codes[0], codes[0].shape[1:]
        self.blocks_shape = self.shape[0], blocks
        check_rows_contiguous("codes", codes, self.shape)
        self.grad_strides = common_strides("grads", grads, self.shape)
        places = addresses(codes)
        columns = [places, places, addresses(grads)]
        if scales is not None:
            check_rows_contiguous("scales", scales, self.blocks_shape)
            columns[1] = addresses(scales)
        self.count, self.columns = len(columns[0]), columns
        self.map_values = dynamic_map(self.first.device) if codebook == "dynamic" else None
        self.midpoints = dynamic_midpoints(self.first.device) if codebook == "dynamic" else None
        self.constants: dict[str, Any] = {
            "CODE": tl_dtype(codes[0]),
            "GRAD": tl_dtype(grads[0]),
            "NESTEROV": nesterov,
            "CODEBOOK": codebook,
        }

    def launches(self, *strides: int) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """Give the table of each launch and its constants; the strides are those of rows and matrices of `out`.

        Matrices that are not aligned go by themselves.
        """
        eights = whole_eighths(self.shape[1], self.grad_strides[0], *strides)
        # Of rows of other lengths most begin where they like, and nothing is gained by where the first one does.
        if self.shape[1] % 8 == 0 or lies_across(self.grad_strides):
            alignments = {0: min(16, 8 * self.first.itemsize) if eights else 16, 2: 16}
        else:
            alignments = {}
        for table, aligned in tables_of(self.columns, alignments, self.first.device):
            multiples = (alignments[0], alignments[2]) if aligned else (1, 1)
            hints = {"CODE_ALIGNMENT": multiples[0], "GRAD_ALIGNMENT": multiples[1], "EIGHTS": eights}
            yield table, {**self.constants, **hints}


def momentum_stats(
    codes: Sequence[Tensor],
    scales: Sequence[Tensor] | None,
    grads: Sequence[Tensor],
    *,
    beta: float,
    nesterov: bool,
    codebook: Codebook | None,
    block_size: int,
) -> Tensor:
    """Compute the first phase of the step, which reads only: `reference.momentum_stats` but for the order of addition.

    Args:
        codes: stacks [count, rows, cols] of contiguous matrices, int8 (linear), uint8 (dynamic) or fp32 (None).
        scales: stacks [count, rows, blocks], fp32, contiguous but for the first stride; None with `codebook=None`.
        grads: stacks [count, rows, cols], fp32, bf16 or fp16, any strides, row and column stride the same in all.
        beta: the momentum factor in [0, 1).
        nesterov: u is beta * m + (1 - beta) * g instead of m.
        codebook: `"linear"`, `"dynamic"`, or None for an fp32 momentum.
        block_size: the number of elements that share a scale, a power of two.

    Returns:
        The sum of u squared, fp32 [matrices, rows, blocks]; not finite where a gradient of the block is not.

    Raises:
        ValueError: if the stacks of an argument are not alike, codes or scales are not contiguous matrices, or
            `block_size` is not a power of two.
    """
    batch = MomentumBatch(codes, scales, grads, nesterov, codebook, num_blocks(codes[0].shape[2], block_size))
    sumsq = torch.empty(batch.count, *batch.blocks_shape, dtype=torch.float32, device=batch.first.device)
    tiles = tiling(batch.shape, block_size, across=lies_across(batch.grad_strides))
    for table, constants in batch.launches():
        launch(
            stats_kernel,
            batch.first,
            len(table),
            tiles,
            table,
            sumsq,
            batch.map_values,
            float(beta),
            1.0 - beta,
            *batch.grad_strides,
            **constants,
        )
    return sumsq


def momentum_apply(
    codes: Sequence[Tensor],
    scales: Sequence[Tensor] | None,
    grads: Sequence[Tensor],
    norms: Tensor | None,
    out: Tensor | None,
    *,
    beta: float,
    nesterov: bool,
    codebook: Codebook | None,
    block_size: int,
    skip: Tensor | None = None,
    signs: bool = False,
) -> None:
    """Write codes, scales and the Newton-Schulz input from the same momentum, recomputed: the second phase of the step.

    The results are bitwise those of `reference.momentum_apply`.

    Args:
        codes, scales, grads, beta, nesterov, codebook, block_size: as in `momentum_stats`. Codes and scales are
            overwritten with the new state.
        norms: fp32 [matrices], contiguous: the positive divisors of u (its Frobenius norms, bounded below); None
            without `out`.
        out: [matrices, rows, cols], any float dtype and strides; receives u * (1 / norm), in fp32, rounded once. With
            None codes and scales alone are written.
        skip: fp32 on the device, 0-d or [matrices]; unless it is zero, nothing is written, `out` neither.
        signs: `out` receives the sign of u, -1, 0 or 1, instead; it may be int8.

    Raises:
        ValueError: as `momentum_stats`, or if `norms`, `out` or `skip` has another shape, or if one of `norms` and
            `out` alone is None.
    """
    batch = MomentumBatch(codes, scales, grads, nesterov, codebook, num_blocks(codes[0].shape[2], block_size))
    out_strides = 0, 0, 1
    if norms is None or out is None:
        if norms is not out:
            raise ValueError("norms and out go together: give both, or None for both")
    elif norms.shape != (batch.count,) or out.shape != (batch.count, *batch.shape):
        raise ValueError(f"norms {tuple(norms.shape)} and out {tuple(out.shape)} must be of {batch.count} matrices")
    else:
        out_strides = out.stride(0), *common_strides("out", [out], batch.shape)
    each = has_flag_each(skip, batch.count)
    tiles = tiling(batch.shape, block_size, across=lies_across(batch.grad_strides) or lies_across(out_strides[1:]))
    for table, constants in batch.launches(*out_strides[:2]):
        launch(
            apply_kernel,
            batch.first,
            len(table),
            tiles,
            table,
            norms if norms is None else norms.contiguous(),
            out,
            skip,
            batch.map_values,
            batch.midpoints,
            float(beta),
            1.0 - beta,
            *batch.grad_strides,
            *out_strides,
            EACH=each,
            SIGNS=signs and out is not None,
            **constants,
        )

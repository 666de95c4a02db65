"""Matrices of many storages in one launch, and the tiles of them; shared by the Triton kernels.

A kernel finds the matrices of a batch by a table of their addresses, so that nothing is stacked or copied. A tile is
one block of columns of each of ROWS consecutive rows of one matrix; the programs are numbered along one grid axis,
whose limit is 2**31 - 1, tile after tile and matrix after matrix. Nothing is tuned at run time: the same shapes and
strides take the same path and give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# 128 threads with 16 one-byte codes each: one 16-byte load a thread.
_TILE_ELEMENTS = 2048
_ELEMENTS_PER_WARP = 512
# A matrix that lies column by column is read in pieces of 32 rows by 64 columns: 64 bytes and more at a place,
# whichever way a tensor of the launch lies. Twice the warps halve the registers, most of which hold addresses.
_PIECE_ROWS, _PIECE_COLS, _PIECE_WARPS = 32, 64, 8


class Tiling(NamedTuple):
    """Cut of a matrix: a tile is ROWS x BLOCK elements, worked on in pieces of ROWS x COLS."""

    ROWS: int
    COLS: int
    BLOCK: int
    num_warps: int


def tiling(shape: Sequence[int], block_size: int, *, across: bool = False) -> Tiling:
    """Return the tiles of matrices of (rows, cols) = `shape` with blocks of `block_size` elements, a power of two.

    Args:
        shape: rows and columns of the matrices.
        block_size: the elements of a block.
        across: a tensor of the launch lies column by column, so that a piece must have many rows.

    Raises:
        ValueError: if `block_size` is not a power of two.
    """
    if block_size < 1 or block_size & (block_size - 1):
        raise ValueError(f"block_size must be a power of two for the Triton backend, not {block_size}")
    rows, cols = shape
    block = min(block_size, triton.next_power_of_2(max(1, cols)))
    rows_there = triton.next_power_of_2(rows)
    if across and block > _PIECE_COLS:
        return Tiling(min(rows_there, _PIECE_ROWS), _PIECE_COLS, block, _PIECE_WARPS)
    tall = min(rows_there, max(1, _TILE_ELEMENTS // block))
    return Tiling(tall, block, block, min(max(1, tall * block // _ELEMENTS_PER_WARP), 8))


@triton.jit
def tile_rows(rows, cols, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Return this program's matrix and block of columns, scalars, its rows [ROWS, 1], and which of them exist.

    All but the mask are int64: offsets are made of them. The division is of 32 bits, as the grid is: 64 are slow.
    """
    num_blocks = tl.cast((cols - 1) // BLOCK + 1, tl.int32)
    num_tiles = tl.cast((rows - 1) // ROWS + 1, tl.int32)
    program = tl.program_id(0)
    block = (program % num_blocks).to(tl.int64)
    program = program // num_blocks
    row = (program % num_tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    return (program // num_tiles).to(tl.int64), block, row, row < rows


@triton.jit
def address(table, matrix, PLACE: tl.constexpr, WIDTH: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Return the pointer in column PLACE of a matrix's row of the table, which has WIDTH columns.

    The compiler cannot see that a loaded address is a multiple of 16, without which nothing moves 16 bytes at a time.
    """
    pointer = tl.load(table + (matrix * WIDTH + PLACE)).to(tl.pointer_type(DTYPE))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


def tl_dtype(tensor: Tensor) -> tl.dtype:
    """Return a tensor's dtype, as a kernel's constant."""
    return getattr(tl, str(tensor.dtype).removeprefix("torch."))


def _strides(stack: Tensor) -> tuple[int, int]:
    """Return row and column stride in elements; for a dimension of 1, whose stride is unused, a contiguous tensor's."""
    _, rows, cols = stack.shape
    _, row_stride, col_stride = stack.stride()
    return row_stride if rows > 1 else max(1, cols), col_stride if cols > 1 else 1


def common_strides(name: str, stacks: Sequence[Tensor], shape: Sequence[int]) -> tuple[int, int]:
    """Return row and column stride, in elements, of all stacks [count, rows, cols] of one launch.

    Args:
        name: the argument's name, for errors.
        stacks: the argument.
        shape: the rows and columns that are expected.

    Raises:
        ValueError: if (rows, cols) is not `shape`, or the stacks differ in dtype, device, or row or column stride.
    """
    expected = tuple(shape), stacks[0].dtype, stacks[0].device, _strides(stacks[0])
    kinds = {
        (stack.shape, stack.stride(), stack.dtype, stack.device): stack for stack in stacks
    }  # of hundreds there are few
    for stack in kinds.values():
        found = tuple(stack.shape[1:]), stack.dtype, stack.device, _strides(stack)
        if found != expected:
            raise ValueError(f"{name}: a stack of matrices {found} in a launch that takes {expected}")
    return expected[3]


def check_rows_contiguous(name: str, stacks: Sequence[Tensor], shape: Sequence[int]) -> None:
    """Raise ValueError unless every matrix of the stacks is contiguous, with (rows, cols) = `shape`."""
    if common_strides(name, stacks, shape) != (max(1, shape[1]), 1):
        raise ValueError(f"{name} must be contiguous matrices for the Triton backend, not {stacks[0].stride()}")


def lies_across(strides: Sequence[int]) -> bool:
    """Return whether a matrix of these row and column strides is contiguous along its columns, not its rows."""
    return strides[0] == 1 != strides[1]


def addresses(stacks: Sequence[Tensor]) -> list[int]:
    """Return the address of every matrix of the stacks, in order; no views are made, since there may be hundreds."""
    places = []
    for stack in stacks:
        first, step = stack.data_ptr(), stack.stride(0) * stack.itemsize
        places += [first + number * step for number in range(stack.shape[0])]
    return places


def table_of(columns: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Return the columns as int64 [matrices, columns] on `device`, sent there without waiting for it."""
    numbers = list(chain.from_iterable(zip(*columns, strict=True)))
    table = torch.tensor(numbers, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
    return table.view(-1, len(columns)).to(device, non_blocking=True)


def launch(
    kernel: Any, matrices: Tensor, count: int, tiles: Tiling, *args: Tensor | float | None, **constants: Any
) -> None:
    """Run `kernel(*args, rows, cols)` over the tiles of `count` matrices as large as those of `matrices`, there."""
    rows, cols = matrices.shape[-2:]
    if count * rows * cols == 0:
        return
    grid = (count * triton.cdiv(rows, tiles.ROWS) * triton.cdiv(cols, tiles.BLOCK),)
    constants |= {**tiles._asdict(), "enable_fp_fusion": False}
    with torch.cuda.device_of(matrices):  # Triton launches on the current device, wherever its arguments are
        kernel[grid](*args, rows=rows, cols=cols, **constants)

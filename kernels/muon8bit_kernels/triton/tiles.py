"""Matrices of many storages in one launch, and the tiles of them; shared by the Triton kernels.

A kernel finds the matrices of a batch by a table of their addresses, so that nothing is stacked or copied. A tile is
one block of columns of each of ROWS consecutive rows of one matrix; the programs are numbered along one grid axis,
whose limit is 2**31 - 1, tile after tile and matrix after matrix. Nothing is tuned at run time: the same shapes and
strides take the same path and give the same bits.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from itertools import chain, compress
from operator import not_
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


@lru_cache(maxsize=1024)
def tiling(shape: tuple[int, int], block_size: int, *, across: bool = False) -> Tiling:
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


# Arguments of a kernel that only `tile_rows` reads: their values make no other kernel.
GRID = ["num_blocks", "num_tiles", "over_blocks", "over_tiles"]


@lru_cache(maxsize=1024)
def packed_divisor(divisor: int) -> int:
    """Return a divisor, from 1 to 2**31 - 1, as `divided` takes it: the high word a multiplier, the low one a shift.

    The multiplier is 2**(31 + shift) / divisor rounded up, where 2**shift is the next power of two: it has 32 bits, and
    a product with less than 2**31 is less than 2**(31 + shift) / divisor too large, which changes no quotient.
    """
    shift = (divisor - 1).bit_length()
    multiplier = -(-(1 << (31 + shift)) // divisor)
    return ((multiplier - (1 << 32)) << 32) + shift  # negative, so that it is int64 for every divisor


@triton.jit
def divided(number, divisor):
    """Return int32 numbers from 0 on over a `packed_divisor`, by three instructions where a division has thirty."""
    high = tl.umulhi((number * 2).to(tl.uint32), (divisor >> 32).to(tl.uint32))
    return (high >> (divisor.to(tl.uint32) & 31)).to(tl.int32)


@triton.jit
def tile_rows(rows, num_blocks, num_tiles, over_blocks, over_tiles, ROWS: tl.constexpr):
    """Return this program's matrix and block of columns, scalars, its rows [ROWS, 1], and which of them exist.

    All but the mask are int64: offsets are made of them.
    """
    program = tl.program_id(0)
    tile = divided(program, over_blocks)
    matrix = divided(tile, over_tiles)
    block = (program - tile * num_blocks).to(tl.int64)
    row = (tile - matrix * num_tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    return matrix.to(tl.int64), block, row, row < rows


@triton.jit
def in_row(row, stride, EIGHTS: tl.constexpr):
    """Return the offsets of rows [ROWS, 1]; with EIGHTS they are multiples of 8, and the compiler is told so."""
    return row * (stride // 8 * 8) if EIGHTS else row * stride


@triton.jit
def address(table, place, COLUMN: tl.constexpr, WIDTH: tl.constexpr, DTYPE: tl.constexpr, ALIGNMENT: tl.constexpr):
    """Return the pointer in a column of the table's row `place`, which has WIDTH columns.

    The compiler cannot see that a loaded address is a multiple of ALIGNMENT bytes (1: nothing is known), without which
    nothing moves 16 bytes at a time.
    """
    pointer = tl.load(table + (place * WIDTH + COLUMN)).to(tl.pointer_type(DTYPE))
    return tl.multiple_of(pointer, ALIGNMENT) if ALIGNMENT > 1 else pointer


@triton.jit
def flag_of(skip, matrix, EACH: tl.constexpr):
    """Return the flag that keeps a matrix from being written where it is not 0: its own, or with EACH False all's."""
    return tl.load(skip + matrix if EACH else skip)


def has_flag_each(skip: Tensor | None, count: int) -> bool:
    """Return whether each of `count` matrices has its own flag, as EACH of kernels.

    Raises:
        ValueError: if there are flags, and neither one nor `count` of them.
    """
    if skip is None or skip.ndim == 0:
        return False
    if skip.shape != (count,) or not skip.is_contiguous():
        raise ValueError(f"skip {tuple(skip.shape)} must be 0-d, or contiguous and of {count} matrices")
    return True


def tl_dtype(tensor: Tensor) -> tl.dtype:
    """Return a tensor's dtype, as a kernel's constant."""
    return _tl_dtype(tensor.dtype)


@cache
def _tl_dtype(dtype: torch.dtype) -> tl.dtype:
    return getattr(tl, str(dtype).removeprefix("torch."))


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
    first = stacks[0]
    strides, known = _strides(first), (first.shape, first.stride(), first.dtype, first.device)
    others: Sequence[Tensor] = stacks
    if known[0][1:] == shape:  # most of hundreds are quickly seen to be like the first
        others = [stack for stack in stacks[1:] if (stack.shape, stack.stride(), stack.dtype, stack.device) != known]
    for stack in others:
        expected = tuple(shape), first.dtype, first.device, strides
        found = tuple(stack.shape[1:]), stack.dtype, stack.device, _strides(stack)
        if found != expected:
            raise ValueError(f"{name}: a stack of matrices {found} in a launch that takes {expected}")
    return strides


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
        first, count = stack.data_ptr(), stack.shape[0]
        if count == 1:
            places.append(first)
        else:
            step = stack.stride(0) * stack.itemsize
            places.extend(range(first, first + count * step, step) if step else [first] * count)
    return places


def table_of(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Return the rows as int64 [matrices, columns] on `device`, sent there without waiting for it."""
    numbers = array("q", chain.from_iterable(rows))
    table = torch.frombuffer(numbers, dtype=torch.int64)
    if device.type == "cuda":
        table = torch.empty(len(numbers), dtype=torch.int64, device="cpu", pin_memory=True).copy_(table)
    return table.view(len(rows), -1).to(device, non_blocking=True)


def tables_of(
    columns: Sequence[Sequence[int]], alignments: Mapping[int, int], device: torch.device
) -> list[tuple[Tensor, bool]]:
    """Return the table of the aligned matrices with True, and that of the others with False; of one kind alone, one.

    One misaligned matrix thus does not take wide loads from all others of its batch. A row ends in the number that its
    matrix has in the batch.

    Args:
        columns: of each argument the addresses, and what else a kernel reads, in the order of the batch.
        alignments: by index of a column, what its addresses must be a multiple of, in bytes; without any, no matrix is
            taken for aligned.
        device: where the tables are made.
    """
    if not columns[0]:
        return []
    rows: Sequence[Sequence[int]] = list(zip(*columns, range(len(columns[0])), strict=True))
    misaligned = [place % multiple for column, multiple in alignments.items() for place in columns[column]]
    if not any(misaligned):
        return [(table_of(rows, device), bool(alignments))]
    are_aligned = [not any(row[column] % multiple for column, multiple in alignments.items()) for row in rows]
    aligned, others = list(compress(rows, are_aligned)), list(compress(rows, map(not_, are_aligned)))
    table = table_of([*aligned, *others], device)
    if not aligned:
        return [(table, False)]
    return [(table[: len(aligned)], True), (table[len(aligned) :], False)]


def whole_eighths(*numbers: int) -> bool:
    """Return whether columns and strides are all multiples of 8, and not all of 16, which the compiler sees itself."""
    return all(n % 8 == 0 for n in numbers) and any(n % 16 for n in numbers)


def launch(
    kernel: Any, matrices: Tensor, count: int, tiles: Tiling, *args: Tensor | float | None, **constants: Any
) -> None:
    """Run `kernel(*args, rows, cols, ...)` over the tiles of `count` matrices as large as those of `matrices`, there.

    The last arguments are those of GRID.
    """
    rows, cols = matrices.shape[-2:]
    if count * rows * cols == 0:
        return
    num_tiles, arguments = _grid(rows, cols, tiles)
    with torch.cuda.device_of(matrices):  # Triton launches on the current device, wherever its arguments are
        kernel[(count * num_tiles,)](*args, **arguments, **constants)


@lru_cache(maxsize=1024)
def _grid(rows: int, cols: int, tiles: Tiling) -> tuple[int, dict[str, Any]]:
    """Return the number of tiles of a matrix, and what kernels are told of its shape and of them."""
    tall, wide, block, num_warps = tiles
    num_blocks, num_tiles = -(-cols // block), -(-rows // tall)
    split = {"num_blocks": num_blocks, "num_tiles": num_tiles}
    split |= {"over_blocks": packed_divisor(num_blocks), "over_tiles": packed_divisor(num_tiles)}
    constants = {"ROWS": tall, "COLS": wide, "BLOCK": block, "num_warps": num_warps, "enable_fp_fusion": False}
    return num_tiles * num_blocks, {"rows": rows, "cols": cols, **split, **constants}

"""Products with a symmetric result in Triton: one triangle of tiles is computed, the other is its mirror image.

The lower triangle is cut into squares of BLOCK_N rows, a square into tiles of BLOCK_M rows (all or half of them), and
one program computes a tile. Operands, what is added and the result go through tensor descriptors (TMA) where the
architecture has them and their strides allow it, else through pointers. Nothing is tuned at run time: shapes and
strides decide the path. A descriptor leaves out what lies beyond the end of a matrix.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..reference.products import check_operands
from .gemm_tilings import DESCRIBED, GemmTiling, architecture_of, num_tiles, tiling_for

# Squares of this many rows are walked column by column: programs that run together share their operands in L2.
_GROUP = tl.constexpr(8)


@triton.jit
def _triangle(index):
    """Return row and column of pair number `index` (int32, below 2**27) of 0 <= column <= row, counted row by row.

    Where rounding changes the row at all, it rounds up to the next one: one correction makes it exact.
    """
    row = ((tl.sqrt_rn((8 * index + 1).to(tl.float32)) - 1.0) * 0.5).to(tl.int32)
    row -= (row * (row + 1) // 2 > index).to(tl.int32)
    return row, index - row * (row + 1) // 2


@triton.jit
def _square(index, side, GROUP: tl.constexpr):
    """Return row and column of square number `index` of a lower triangle side x side, counted in groups of rows."""
    row, _ = _triangle(index)
    first = row // GROUP * GROUP
    rows = tl.minimum(GROUP, side - first)
    inside = index - first * (first + 1) // 2
    corner_row, corner_col = _triangle(tl.maximum(inside - first * rows, 0))
    whole = inside < first * rows  # left of the group's own triangle, where all its rows have squares
    return first + tl.where(whole, inside % rows, corner_row), tl.where(whole, inside // rows, first + corner_col)


@triton.jit
def _described(matrix, batch, row, start, TALL: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr):
    """Load block [ROWS, DEPTH] of an operand through its descriptor; it is zero beyond the operand's end."""
    if TALL:
        block = matrix.load([batch, start, row]).reshape(DEPTH, ROWS).T
    else:
        block = matrix.load([batch, row, start]).reshape(ROWS, DEPTH)
    return block


@triton.jit
def _finish(
    product,
    batch,
    row,
    col,
    c,
    d,
    alpha,
    beta,
    diagonal,
    n,
    HAS_D: tl.constexpr,
    STORED: tl.constexpr,
    SIDE: tl.constexpr,
):
    """Add to a square of A B^T, fp32 [SIDE, SIDE] at (row, col), round it, and store it and its mirror image.

    The squares on the diagonal alone have a diagonal, and two triangles that need not be equal to the bit where A is
    not B: there the lower one is mirrored.
    """
    down, across = tl.arange(0, SIDE)[:, None], tl.arange(0, SIDE)[None, :]
    value = product * alpha
    if HAS_D:
        if STORED:
            addend = d.load([batch, row, col]).reshape(SIDE, SIDE)
        else:
            exists = (row + down < n) & (col + across < n)
            addend = tl.load(d + (row.to(tl.int64) * n + col) + down * n + across, exists, other=0.0)
        value += addend.to(tl.float32) * beta
    if row == col:
        value = tl.where(down == across, value + diagonal, value)
        out = value.to(c.dtype if STORED else c.dtype.element_ty)
        out = tl.where(down >= across, out, tl.trans(out))
        _store(out, batch, row, col, c, n, STORED, SIDE)
    else:
        out = value.to(c.dtype if STORED else c.dtype.element_ty)
        _store(out, batch, row, col, c, n, STORED, SIDE)
        _store(tl.trans(out), batch, col, row, c, n, STORED, SIDE)


@triton.jit
def _store(square, batch, row, col, c, n, STORED: tl.constexpr, SIDE: tl.constexpr):
    """Store a square [SIDE, SIDE] of C at (row, col), as far as C goes."""
    if STORED:
        c.store([batch, row, col], square.reshape(1, SIDE, SIDE))
    else:
        down, across = tl.arange(0, SIDE)[:, None], tl.arange(0, SIDE)[None, :]
        exists = (row + down < n) & (col + across < n)
        tl.store(c + (row.to(tl.int64) * n + col) + down * n + across, square, exists)


@triton.jit
def _symmetric_product_kernel(
    a,
    b,
    c,
    d,
    alpha,
    beta,
    diagonal,
    n,
    k,
    a_batch_stride,
    a_row_stride,
    a_col_stride,
    b_batch_stride,
    b_row_stride,
    b_col_stride,
    HAS_D: tl.constexpr,
    DESCRIBED: tl.constexpr,
    STORED: tl.constexpr,
    A_TALL: tl.constexpr,
    B_TALL: tl.constexpr,
    TAIL: tl.constexpr,
    EIGHTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    if EIGHTS:  # divided and multiplied, since Triton sees multiples of 16 alone
        n, k = n // 8 * 8, k // 8 * 8
        a_batch_stride, b_batch_stride = a_batch_stride // 8 * 8, b_batch_stride // 8 * 8
        if A_TALL:
            a_col_stride = a_col_stride // 8 * 8
        else:
            a_row_stride = a_row_stride // 8 * 8
        if B_TALL:
            b_col_stride = b_col_stride // 8 * 8
        else:
            b_row_stride = b_row_stride // 8 * 8
    side = tl.cdiv(n, BLOCK_N)
    num_squares = side * (side + 1) // 2
    PARTS: tl.constexpr = BLOCK_N // BLOCK_M
    tile = tl.program_id(0) % (num_squares * PARTS)
    batch = tl.program_id(0) // (num_squares * PARTS)
    row, col = _square(tile // PARTS, side, _GROUP)
    row = row * BLOCK_N + tile % PARTS * BLOCK_M
    col = col * BLOCK_N
    if row >= n:  # of the last square only the upper part exists
        return
    product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if DESCRIBED:
        for start in range(0, k, BLOCK_K):
            left = _described(a, batch, row, start, A_TALL, BLOCK_M, BLOCK_K)
            right = _described(b, batch, col, start, B_TALL, BLOCK_N, BLOCK_K)
            product = tl.dot(left, right.T, product, input_precision="ieee")
    else:
        down, across, depth = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :], tl.arange(0, BLOCK_K)
        a += batch.to(tl.int64) * a_batch_stride + row.to(tl.int64) * a_row_stride
        b += batch.to(tl.int64) * b_batch_stride + col.to(tl.int64) * b_row_stride
        left_places = a + (down.to(tl.int64) * a_row_stride + depth[None, :].to(tl.int64) * a_col_stride)
        right_places = b + (across.to(tl.int64) * b_row_stride + depth[:, None].to(tl.int64) * b_col_stride)
        for start in range(0, k, BLOCK_K):
            left_exists, right_exists = row + down < n, col + across < n
            if TAIL:
                left_exists &= depth[None, :] < k - start
                right_exists &= depth[:, None] < k - start
            left = tl.load(left_places, left_exists, other=0.0)
            right = tl.load(right_places, right_exists, other=0.0)
            product = tl.dot(left, right, product, input_precision="ieee")
            left_places += BLOCK_K * tl.cast(a_col_stride, tl.int64)
            right_places += BLOCK_K * tl.cast(b_col_stride, tl.int64)
    alpha = tl.cast(alpha, tl.float32)  # torch.compile passes scalars as fp64
    beta = tl.cast(beta, tl.float32)
    diagonal = tl.cast(diagonal, tl.float32)
    if not STORED:
        c += batch.to(tl.int64) * n * n
        if HAS_D:
            d += batch.to(tl.int64) * n * n
    if PARTS == 1:
        _finish(product, batch, row, col, c, d, alpha, beta, diagonal, n, HAS_D, STORED, BLOCK_M)
    else:
        first, second = product.reshape(BLOCK_M, 2, BLOCK_M).permute(0, 2, 1).split()
        _finish(first, batch, row, col, c, d, alpha, beta, diagonal, n, HAS_D, STORED, BLOCK_M)
        if row > col:  # else it lies above the diagonal
            col += BLOCK_M
            _finish(second, batch, row, col, c, d, alpha, beta, diagonal, n, HAS_D, STORED, BLOCK_M)


def _architecture(device: torch.device) -> int | None:
    """Return the device's key of TILINGS."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    return architecture_of(torch.cuda.get_device_capability(device))


def _is_tall(matrix: Tensor) -> bool:
    """Return whether n, not k, is the contiguous dimension of [batch, n, k]."""
    return matrix.stride(2) != 1 and matrix.shape[2] > 1


def _described_strides(matrix: Tensor) -> list[int] | None:
    """Return the strides of a descriptor of [batch, n, k], of [batch, k, n] if tall; None if TMA cannot take it."""
    view = matrix.mT if _is_tall(matrix) else matrix
    strides = [view.stride(0) if len(view) > 1 else view.shape[1] * view.stride(1), view.stride(1), 1]
    aligned = all(stride > 0 and stride * view.itemsize % 16 == 0 for stride in strides[:2])
    fits = view.numel() > 0 and view.stride(2) == 1 and aligned and view.data_ptr() % 16 == 0
    return strides if fits else None


def _descriptor(matrix: Tensor, block_rows: int, block_k: int) -> TensorDescriptor | None:
    """Return a descriptor with these strides in blocks of one matrix, or None if TMA cannot take it."""
    view, block = (matrix.mT, [block_k, block_rows]) if _is_tall(matrix) else (matrix, [block_rows, block_k])
    strides = _described_strides(matrix)
    return None if strides is None else TensorDescriptor(view, list(view.shape), strides, [1, *block])


def _is_aligned(matrix: Tensor) -> bool:
    """Return whether the address is a multiple of 16 bytes, and sides and strides are multiples of 8 elements."""
    tall = _is_tall(matrix)
    numbers = (*matrix.shape[1:], matrix.stride(2 if tall else 1), matrix.stride(0) if len(matrix) > 1 else 0)
    is_dense = matrix.stride(1 if tall else 2) == 1
    return is_dense and matrix.data_ptr() % 16 == 0 and all(x % 8 == 0 for x in numbers)


def _launch(
    A: Tensor,
    B: Tensor,
    D: Tensor | None,
    factors: tuple[float, float, float],
    tiling: GemmTiling,
    with_descriptors: bool,
) -> Tensor:
    """Run the kernel with (alpha, beta, diagonal) in this tiling, through descriptors if asked for and possible."""
    batch, n, k = A.shape
    C = torch.empty(batch, n, n, dtype=A.dtype, device=A.device)
    if C.numel() == 0:
        return C
    left = _descriptor(A, tiling.block_m, tiling.block_k) if with_descriptors else None
    right = _descriptor(B, tiling.block_n, tiling.block_k) if with_descriptors else None
    described = left is not None and right is not None
    squares = [_descriptor(M, tiling.block_m, tiling.block_m) for M in (C, D) if with_descriptors and M is not None]
    stored = bool(squares) and None not in squares
    outputs = [*squares, None][:2] if stored else [C, D]
    through_pointers = not (described and stored)
    with torch.cuda.device_of(A):  # Triton launches on the current device, wherever its arguments are
        _symmetric_product_kernel[(num_tiles(n, batch, tiling),)](
            left if described else A,
            right if described else B,
            *outputs,
            *factors,
            n,
            k,
            *A.stride(),
            *B.stride(),
            HAS_D=D is not None,
            DESCRIBED=described,
            STORED=stored,
            A_TALL=_is_tall(A),
            B_TALL=_is_tall(B),
            TAIL=k % tiling.block_k != 0,
            EIGHTS=through_pointers and n % 16 + k % 16 > 0 and _is_aligned(A) and _is_aligned(B),
            BLOCK_M=tiling.block_m,
            BLOCK_N=tiling.block_n,
            BLOCK_K=tiling.block_k,
            num_warps=tiling.num_warps,
            num_stages=tiling.num_stages,
        )
    return C


def symmetric_product(
    A: Tensor,
    B: Tensor,
    *,
    alpha: float = 1.0,
    D: Tensor | None = None,
    beta: float = 0.0,
    diagonal: float = 0.0,
) -> Tensor:
    """Return alpha * A B^T + beta * D + diagonal * I in one launch, where that is symmetric; the caller guarantees it.

    The result is symmetric to the bit: its upper triangle is the mirror image of the lower one.

    Args:
        A, B: [batch, n, k], fp32, bf16 or fp16, either k or n contiguous (A may be the transposed view of a tall
            matrix); may be the same tensor. Fast where the address and the other strides are multiples of 16 bytes.
        D: [batch, n, n], contiguous, dtype of A, or None; only its lower triangle is looked at.
        alpha, beta, diagonal: factors without unit. With beta 0 `D` is not looked at.

    Returns:
        [batch, n, n], contiguous, dtype of A. Accumulated (fp32 without TF32) and added in fp32, rounded once.

    Raises:
        ValueError: for shapes, dtypes, devices or strides other than these, and for fp32 on compute capability 10.
    """
    check_operands(A, B, D)
    architecture = _architecture(A.device)
    if architecture == 100 and A.dtype == torch.float32:
        # Triton 3.7 compiles an IEEE product of matrices to tcgen05 in TF32 there, without a word.
        raise ValueError("float32 is not supported on compute capability 10, where it would run in TF32")
    with_descriptors = architecture in DESCRIBED and A.dtype != torch.float32
    is_aligned = _is_aligned(A) and _is_aligned(B)
    is_described = all(_described_strides(matrix) is not None for matrix in (A, B))
    tiling = tiling_for(A.shape[1], A.shape[0], A.dtype, architecture, is_aligned=is_aligned, is_described=is_described)
    return _launch(A, B, D if beta != 0.0 else None, (alpha, beta, diagonal), tiling, with_descriptors)

"""Matrix products of Newton-Schulz, by the vendor's library, by row panels, or by the symmetric-product kernel.

    symmetric:  alpha * A B^T + beta * D + diagonal * I   where that is symmetric
    advance:    a X + P X            apply:  Q X

Half precision is stored, accumulated and added in fp32, and rounded once (a diagonal of the vendor's: once more). On
CPU fp16 is a storage format alone: its products run in fp32. `accumulating_in_fp32` sees to it whatever the process has
been set to.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, TypeAlias

import torch
from muon8bit_kernels import Backend, kernels_for
from torch import Tensor

# vendor: cuBLAS, oneDNN or the BLAS. panels: the row panels of one triangle, each by the vendor (CPU).
# kernel: `symmetric_product` of the backend, one triangle of tiles.
ProductKind: TypeAlias = Literal["vendor", "panels", "kernel"]

# From this many rows on, oneDNN's fp32 product is the faster on CPU (x86, measured; below, the BLAS is).
_ONEDNN_MIN_ROWS = 64
# Lower row panels hold 10/16 of a symmetric result.
NUM_PANELS = 4


@contextmanager
def accumulating_in_fp32(dtype: torch.dtype) -> Iterator[None]:
    """Let products of `dtype` be what their dtype says in this context; restore the process's settings afterwards.

    With fp32 there is no TF32 and no implicit bf16, which `torch.set_float32_matmul_precision` and `fp32_precision`
    allow; the Gram form fails with them. With fp16 neither accumulation nor the sums of split products are in fp16.
    bf16 stays as torch.optim.Muon runs it. Another thread sees the settings meanwhile. What is right already is not
    touched. Source: torch.backends, "fp32_precision" (torch 2.9 and later).
    """
    cuda, mkldnn = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    changed: list[tuple[Any, str, Any, Any]] = []  # object, attribute, value in this context, value afterwards
    if dtype == torch.float32:
        precisions = [(matmul, matmul.fp32_precision) for matmul in (cuda, mkldnn)]
        changed = [(matmul, "fp32_precision", "ieee", p) for matmul, p in precisions if p not in ("ieee", "none")]
    elif dtype == torch.float16:
        # A pair since torch 2.10; its second part, whether split products may be used at all, is left as it is.
        may_split = getattr(cuda, "allow_fp16_reduced_precision_reduction_split_k", True)
        name = "allow_fp16_reduced_precision_reduction"
        if cuda.allow_fp16_accumulation:
            changed.append((cuda, "allow_fp16_accumulation", False, True))
        if cuda.allow_fp16_reduced_precision_reduction:
            changed.append((cuda, name, False if may_split else (False, False), True if may_split else (True, False)))
    try:
        for target, name, value, _ in changed:
            setattr(target, name, value)
        yield
    finally:
        for target, name, _, value in changed:
            setattr(target, name, value)


def matmul_nt(left: Tensor, right: Tensor) -> Tensor:
    """Return `left @ right^T`, [..., m, k] x [..., n, k] -> [..., m, n].

    fp32 matrices on CPU go to oneDNN, while torch's `matmul` takes the BLAS; there MKL was 2.3 times slower on an
    AVX-512 AMD machine. Both accumulate in fp32.
    """
    if _is_onednn(left, min(left.shape[-2], right.shape[-2])):
        product: Tensor = torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")
        return product
    return left @ right.mT


def _is_onednn(matrix: Tensor, least_rows: int) -> bool:
    """Return whether oneDNN multiplies this matrix: fp32, 2-D, on the CPU, with enough rows."""
    fp32_on_cpu = matrix.ndim == 2 and matrix.dtype == torch.float32 and matrix.device.type == "cpu"
    return fp32_on_cpu and least_rows >= _ONEDNN_MIN_ROWS and torch.backends.mkldnn.is_available()


def _matmul(left: Tensor, right: Tensor, D: Tensor | None, alpha: float, beta: float, out: Tensor | None) -> Tensor:
    """Return alpha * left @ right + beta * D by the vendor, in `out` where that saves memory."""
    if left.dtype == torch.float16 and left.device.type == "cpu":
        wide_left, wide_right = left.float(), right.float()
        if D is not None:
            D = wide_left if D is left else wide_right if D is right else D.float()
        return _matmul(wide_left, wide_right, D, alpha, beta, None).to(left.dtype)
    if D is None:
        if _is_onednn(left, min(left.shape[-2], right.shape[-1])):
            product = matmul_nt(left, right.mT)
        else:
            product = torch.matmul(left, right, out=out)
        return product if alpha == 1.0 else product.mul_(alpha)
    if _is_onednn(left, min(left.shape[-2], right.shape[-1])):
        product = matmul_nt(left, right.mT)
        return (product if alpha == 1.0 else product.mul_(alpha)).add_(D, alpha=beta)
    add = torch.baddbmm if left.ndim == 3 else torch.addmm
    return add(D, left, right, beta=beta, alpha=alpha, out=out)


@dataclass(frozen=True)
class Products:
    """The products that one method takes.

    Attributes:
        kind: `"vendor"`, `"panels"` (2-D matrices) or `"kernel"` (symmetric products by the backend's kernel).
        backend: None (by device), `"reference"` or `"triton"`.
    """

    kind: ProductKind = "vendor"
    backend: Backend | None = None

    def symmetric(
        self,
        A: Tensor,
        B: Tensor,
        *,
        alpha: float = 1.0,
        D: Tensor | None = None,
        beta: float = 0.0,
        diagonal: float = 0.0,
    ) -> Tensor:
        """Return alpha * A B^T + beta * D + diagonal * I, where that is symmetric.

        The shapes are [..., n, k] x [..., n, k] -> [..., n, n].
        """
        if alpha == 0.0 and D is not None:  # the cubic iteration needs no product
            C = D * beta
        elif self.kind == "kernel":
            return self._by_kernel(A, B, alpha, D, beta, diagonal)
        elif self.kind == "panels" and A.ndim == 2:
            C = _panelled(A, B, D, alpha, beta)
        else:
            C = _matmul(A, B.mT, D, alpha, beta, None)
        if diagonal != 0.0:
            C.diagonal(dim1=-2, dim2=-1).add_(diagonal)
        return C

    def _by_kernel(self, A: Tensor, B: Tensor, alpha: float, D: Tensor | None, beta: float, diagonal: float) -> Tensor:
        stacks = [matrix.reshape(-1, *matrix.shape[-2:]) for matrix in (A, B, *(() if D is None else (D,)))]
        addend = None if D is None else stacks[2]
        kernels = kernels_for(A.device, self.backend)
        product = kernels.symmetric_product(*stacks[:2], alpha=alpha, D=addend, beta=beta, diagonal=diagonal)
        return product.view(*A.shape[:-1], A.shape[-2])

    def polynomial(self, X: Tensor, b: float, c: float) -> Tensor:
        """Return bA + cA^2 for A = X X^T, [..., n, n]."""
        A = self.symmetric(X, X)
        return self.symmetric(A, A, alpha=c, D=A, beta=b)

    def advance(self, P: Tensor, X: Tensor, a: float, spare: Tensor | None) -> Tensor:
        """Return aX + P X, [..., m, n], in `spare` or in X where that saves memory."""
        if _is_onednn(P, min(P.shape[-1], X.shape[-1])):
            product = matmul_nt(P, X.mT)
            return torch.add(product, X, alpha=a, out=X if X.is_contiguous() else product)
        return _matmul(P, X, X, 1.0, a, spare)

    def apply(self, Q: Tensor, X: Tensor, spare: Tensor | None) -> Tensor:
        """Return Q X, [..., m, n], in `spare` where that saves memory."""
        return _matmul(Q, X, None, 1.0, 0.0, spare)


def _panels(rows: int) -> Iterator[tuple[slice, slice]]:
    """Give the row panels of a symmetric result, each with the columns up to its diagonal."""
    edges = [rows * index // NUM_PANELS for index in range(NUM_PANELS + 1)]
    for start, stop in pairwise(edges):
        yield slice(start, stop), slice(0, stop)


def _panelled(A: Tensor, B: Tensor, D: Tensor | None, alpha: float, beta: float) -> Tensor:
    """Return a symmetric result whose lower panels are computed and mirrored; A and B are contiguous."""
    C = A.new_empty(len(A), len(A))
    for rows, cols in _panels(len(A)):
        panel = _matmul(A[rows], B[cols].mT, None if D is None else D[rows, cols], alpha, beta, None)
        C[rows, cols] = panel
        C[: rows.start, rows] = panel[:, : rows.start].T
    return C

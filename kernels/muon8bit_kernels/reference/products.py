"""Products with a symmetric result in torch; `triton.gemm` computes one triangle of them.

    C  =  round(alpha * A B^T + beta * D + diagonal * I)

C is accumulated and added in fp32, and rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor


def check_operands(A: Tensor, B: Tensor, D: Tensor | None) -> None:
    """Check the operands of `symmetric_product`.

    Args:
        A, B: [batch, n, k], with contiguous k or n.
        D: contiguous [batch, n, n], or None.

    Raises:
        ValueError: for other shapes or strides, or unless all are of one dtype (fp32, bf16 or fp16) and device.
    """
    if A.ndim != 3 or A.shape != B.shape:
        raise ValueError(f"A and B must be [batch, n, k] alike, not {tuple(A.shape)} and {tuple(B.shape)}")
    batch, n, _ = A.shape
    if D is not None and (D.shape != (batch, n, n) or not D.is_contiguous()):
        raise ValueError(f"D must be contiguous {(batch, n, n)}, not {tuple(D.shape)} with strides {D.stride()}")
    for name, tensor in (("A", A), ("B", B), ("D", D)):
        if tensor is not None and (tensor.dtype != A.dtype or tensor.device != A.device):
            raise ValueError(f"{name} is {tensor.dtype} on {tensor.device}, A is {A.dtype} on {A.device}")
    if A.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"A must be float32, bfloat16 or float16, not {A.dtype}")
    for name, tensor in (("A", A), ("B", B)):
        if 1 not in tensor.stride()[1:] and tensor.shape[1] > 1 < tensor.shape[2]:
            raise ValueError(f"{name} must have contiguous rows or columns, not strides {tensor.stride()}")


def symmetric_product(
    A: Tensor,
    B: Tensor,
    *,
    alpha: float = 1.0,
    D: Tensor | None = None,
    beta: float = 0.0,
    diagonal: float = 0.0,
) -> Tensor:
    """Return alpha * A B^T + beta * D + diagonal * I, where that is symmetric; the caller guarantees it.

    A backend may compute one triangle and mirror it, so a nonsymmetric result is not defined.

    Args:
        A, B: [batch, n, k], fp32, bf16 or fp16, either k or n contiguous (A may be the transposed view of a tall
            matrix); may be the same tensor.
        D: [batch, n, n], contiguous, dtype of A, or None.
        alpha, beta, diagonal: factors without unit. With beta 0 `D` is not looked at.

    Returns:
        [batch, n, n], contiguous, dtype of A. Accumulated and added in fp32, rounded once.

    Raises:
        ValueError: for shapes, dtypes, devices or strides other than these.
    """
    check_operands(A, B, D)
    if D is None or beta == 0.0:
        C = torch.matmul(A.float(), B.float().mT).mul_(alpha)
    else:
        C = torch.baddbmm(D.float(), A.float(), B.float().mT, beta=beta, alpha=alpha)
    if diagonal != 0.0:
        C.diagonal(dim1=1, dim2=2).add_(diagonal)
    return C.to(A.dtype)

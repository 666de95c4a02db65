"""The Gram form of a matrix that lies in parts along its long side: R is the sum of the parts' Gram matrices, and each
part of O is the factor times that part of X. One segment alone: a restart would need the whole matrix.
"""

from __future__ import annotations

import torch
from muon8bit_kernels import Backend
from torch import Tensor

from .coefficients import Coefficients
from .method import NSMethod
from .newton_schulz import factor
from .precision import accumulating_in_fp32
from .products import Products


def partial_gram(X: Tensor, tall: bool) -> Tensor:
    """The Gram matrix of a part [rows, cols] of X: X^T X (`tall`: rows are cut) or X X^T, fp32, computed in fp32."""
    wide = (X.mT if tall else X).float()
    with torch.autocast(X.device.type, enabled=False), accumulating_in_fp32(torch.float32):
        return wide @ wide.mT


def gram_factor(R: Tensor, schedule: Coefficients, path: NSMethod, backend: Backend | None = None) -> Tensor:
    """The factor Q of all steps, in `path.dtype`.

    Args:
        R: [batch, n, n] fp32, the Gram matrices of whole matrices with Frobenius norm at most 1.
        path: from `choose`, of one segment.
        backend: as in `orthogonalize`.

    Raises:
        ValueError: for a path with restarts.
    """
    if path.form != "gram" or len(path.segments) != 1:
        raise ValueError(f"the factor of a matrix in parts needs the Gram form without restarts, not {path}")
    matrix = R[0] if len(R) == 1 else R
    with torch.autocast(R.device.type, enabled=False), accumulating_in_fp32(path.dtype):
        return factor(matrix.to(path.dtype), schedule.steps, Products(path.products, backend)).view(R.shape)


def apply_factor(Q: Tensor, X: Tensor, tall: bool) -> Tensor:
    """A part of O: Q X, or X Q (`tall`), [batch, rows, cols] in their dtype."""
    with torch.autocast(X.device.type, enabled=False), accumulating_in_fp32(X.dtype):
        return X @ Q if tall else Q @ X

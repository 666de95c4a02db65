"""Gram form for a matrix that lies in parts along its long side; one segment alone, since a restart needs all of X.

R = sum of the parts' Gram matrices             (partial_gram)
Q = the factor of all steps, of R               (gram_factor)
O = Q X, or X Q where rows are cut, by parts    (apply_factor)
"""

from __future__ import annotations

import torch
from muon8bit_kernels import Backend
from torch import Tensor

from .coefficients import Coefficients
from .method import NSMethod
from .newton_schulz import factor
from .products import Products, accumulating_in_fp32


def partial_gram(X: Tensor, tall: bool) -> Tensor:
    """Return the Gram matrix of a part [rows, cols] of X, fp32, computed in fp32: X^T X if `tall`, else X X^T.

    Args:
        X: the part, in any floating-point dtype.
        tall: X has more rows than columns, and its rows are cut.
    """
    wide = (X.mT if tall else X).float()
    with torch.autocast(X.device.type, enabled=False), accumulating_in_fp32(torch.float32):
        return wide @ wide.mT


def gram_factor(R: Tensor, coefficients: Coefficients, method: NSMethod, backend: Backend | None = None) -> Tensor:
    """Return the factor Q of all steps, [batch, n, n] in `method.dtype`.

    Args:
        R: [batch, n, n] fp32, the Gram matrices of whole matrices with Frobenius norm at most 1.
        coefficients: one triple a step.
        method: from `choose_method`, with one segment.
        backend: as in `orthogonalize`.

    Raises:
        ValueError: for a method with restarts, or in the standard form.
    """
    if method.form != "gram" or len(method.segments) != 1:
        raise ValueError(f"the factor of a matrix in parts needs the Gram form without restarts, not {method}")
    matrix = R[0] if len(R) == 1 else R
    with torch.autocast(R.device.type, enabled=False), accumulating_in_fp32(method.dtype):
        return factor(matrix.to(method.dtype), coefficients.steps, Products(method.products, backend)).view(R.shape)


def apply_factor(Q: Tensor, X: Tensor, tall: bool) -> Tensor:
    """Return a part of O, [batch, rows, cols] in the dtype of Q and X: X Q if `tall`, else Q X."""
    with torch.autocast(X.device.type, enabled=False), accumulating_in_fp32(X.dtype):
        return X @ Q if tall else Q @ X

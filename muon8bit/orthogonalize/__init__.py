"""Orthogonalization of normalized matrices: O = NS(X), nearest semi-orthogonal matrix up to the schedule's error.

`newton_schulz` has the equations, `path` decides how a shape runs, from `rates`, `cost` and `stability`.
"""

from __future__ import annotations

import torch
from muon8bit_kernels import Backend
from torch import Tensor

from .coefficients import NAMES, Coefficients, resolve_coefficients
from .cost import flops
from .method import NSMethod, choose_method, force_method
from .newton_schulz import gram, standard
from .precision import accumulating_in_fp32
from .products import Products
from .rates import RATES, Rates, device_kind, rates_of
from .sharded import apply_factor, gram_factor, partial_gram
from .stability import diverges, segments
from .workspace import batch_size, workspace_bytes

__all__ = [
    "NAMES",
    "RATES",
    "Coefficients",
    "NSMethod",
    "Rates",
    "apply_factor",
    "batch_size",
    "choose_method",
    "device_kind",
    "diverges",
    "flops",
    "force_method",
    "gram_factor",
    "orthogonalize",
    "partial_gram",
    "rates_of",
    "resolve_coefficients",
    "segments",
    "workspace_bytes",
]


def orthogonalize(X: Tensor, schedule: Coefficients, path: NSMethod, backend: Backend | None = None) -> Tensor:
    """Newton-Schulz of a batch, whatever autocast and the process's fp32 precision say.

    Args:
        X: [batch, rows, cols] in `path.dtype`, each matrix with Frobenius norm at most 1. Overwritten.
        schedule: the coefficients, one triple a step.
        path: from `choose_method`.
        backend: of the kernel that `path.products == "kernel"` asks for: None (by device), `"reference"`, `"triton"`.

    Returns:
        [batch, rows, cols] in `path.dtype`, perhaps in the memory of X; singular values near 0.7 to 1.2 (Jordan's
        coefficients).
    """
    products = Products(path.products, backend)
    wide = X.mT if X.shape[-2] > X.shape[-1] else X
    # A batch of one as a plain matrix: the 2-D products are the faster ones.
    matrix = wide[0] if len(wide) == 1 else wide
    if X.device.type == "cpu" and (path.form == "standard" or path.products == "panels"):
        # oneDNN is up to some 100 times slower on panels of a transposed view, and into one.
        matrix = matrix.contiguous()
    with torch.autocast(X.device.type, enabled=False), accumulating_in_fp32(path.dtype):
        if path.form == "gram":
            out = gram(matrix, schedule.steps, products, path.segments)
        else:
            out = standard(matrix, schedule.steps, products)
    out = out.view(wide.shape)
    return out.mT if X.shape[-2] > X.shape[-1] else out

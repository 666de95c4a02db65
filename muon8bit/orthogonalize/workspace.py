"""Bytes alive while matrices are orthogonalized, and how many go together. m = min(rows, cols), n = max."""

from __future__ import annotations

import torch

from .method import NSMethod
from .products import NUM_PANELS

# Matrices with fewer rows than this gain on CPU from batching; above, one fills the cores.
_CPU_BATCH_ROWS = 128


def workspace_bytes(path: NSMethod, rows: int, cols: int, kind: str) -> int:
    """Bytes of one matrix at the peak of `orthogonalize`: X, its successors, the small matrices, casts and copies.

    What a library keeps for itself (cuBLAS' workspace, oneDNN's packing) is not counted, nor the casts of the torch
    reference of the symmetric product.
    """
    m, n = min(rows, cols), max(rows, cols)
    large, small = m * n, m * m
    num_large = 2  # X and its successor take turns
    on_cpu = kind.startswith("cpu")
    if on_cpu:
        num_large += rows > cols and (path.form == "standard" or path.products == "panels")  # X as contiguous rows
        if path.dtype == torch.float16 or (path.dtype == torch.float32 and m >= _CPU_BATCH_ROWS):
            # Results of casts and of oneDNN's products are new each time.
            num_large += max(0, min(len(path.segments) - 1, 2))
        if path.dtype == torch.float16 and path.form == "standard":
            num_large += 2
    elements = num_large * large
    if path.form == "standard":
        elements += 2 * small  # A, P
    elif len(path.segments) > 1:
        elements += 4 * small  # R, Z, Q and a successor
    else:  # all of them before the last product, and Q with it
        elements = max(elements - large + 4 * small, elements + small)
    if path.products == "panels":
        elements += small // NUM_PANELS
    casts = 4 * (2 * large + small) if on_cpu and path.dtype == torch.float16 else 0
    return elements * path.dtype.itemsize + casts


def batch_size(path: NSMethod, rows: int, cols: int, kind: str, budget_bytes: int) -> int:
    """How many matrices [rows, cols] to orthogonalize together so that they fit into `budget_bytes`; at least 1."""
    if kind.startswith("cpu") and min(rows, cols) >= _CPU_BATCH_ROWS:
        return 1
    return max(1, budget_bytes // max(1, workspace_bytes(path, rows, cols, kind)))

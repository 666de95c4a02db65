"""Orthogonalization of normalized matrices: O = NS(X), nearest semi-orthogonal matrix up to the schedule's error."""

from __future__ import annotations

import torch
from torch import Tensor

from .coefficients import NAMES, Schedule, resolve
from .newton_schulz import gram, standard
from .path import Path, batch_size, choose, flops

__all__ = ["NAMES", "Path", "Schedule", "batch_size", "choose", "flops", "orthogonalize", "resolve"]

_FORMS = {"standard": standard, "gram": gram}


def orthogonalize(X: Tensor, schedule: Schedule, path: Path) -> Tensor:
    """Newton-Schulz of a batch, whatever autocast says.

    Args:
        X: [batch, rows, cols] in `path.dtype`, each matrix with Frobenius norm at most 1.
        schedule: the coefficients, one triple a step.
        path: from `choose`.

    Returns:
        [batch, rows, cols] in `path.dtype`; singular values of X near 0.7 to 1.2 (Jordan's coefficients).
    """
    wide = X.mT if X.shape[-2] > X.shape[-1] else X
    form = _FORMS[path.form]
    with torch.autocast(X.device.type, enabled=False):  # the path chose the dtype
        # A batch of one as a plain matrix: the 2-D products are the faster ones.
        out = form(wide[0], schedule.steps)[None] if len(wide) == 1 else form(wide, schedule.steps)
    return out.mT if X.shape[-2] > X.shape[-1] else out

"""One Muon step of a group in two phases: `read` changes nothing, `step_` writes momentum and parameters.

A parameter of three or more dimensions is a stack of matrices over its last two, or, with `flatten`, one matrix of
its first dimension by all others. `split_sizes` cuts each matrix into pieces that are orthogonalized and scaled by
their own shape. Pieces of rows are matrices of their own from the first phase on. Blocks of the momentum may
straddle pieces of columns: such a matrix is decoded and encoded whole, and cut in between.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from .config import BATCH_BYTES, Backend
from .orthogonalize import Schedule, batch_size, choose, orthogonalize, resolve
from .state import Format, Momentum
from .update import frobenius_norm, lr_ratio, update_param_

T = TypeVar("T")
# What an update writes: a view of a parameter, its rounding key, and the index of its first element in the parameter.
_Target: TypeAlias = tuple[Tensor, int | None, int]


@dataclass(frozen=True)
class Matrix:
    """One matrix of this step, its momentum, and what the first phase found out.

    `param` and `grad` are views [rows, cols], with `flatten` [rows, ...]; `absmax` is fp32 [rows, blocks]; `sumsq`,
    the squared norm of the Newton-Schulz input, 0-d fp32, is not finite if the gradient is not, or if its norm
    overflows. `key` draws the bits of stochastic rounding, None rounds to nearest; `first` is the index of the
    matrix's first element in the parameter.
    """

    param: Tensor
    grad: Tensor
    momentum: Momentum
    absmax: Tensor
    sumsq: Tensor
    key: int | None
    first: int


@dataclass(frozen=True)
class Reading:
    """The momentum of one parameter, and its matrices in the order of their rows."""

    momentum: Momentum
    matrices: list[Matrix]


def read(
    param: Tensor,
    grad: Tensor,
    state: Mapping[str, Tensor] | None,
    group: dict[str, Any],
    backend: Backend | None,
    key: int | None,
) -> Reading:
    """First phase: the stored momentum (zero without a state) and the statistics of the new one."""
    form = Format.of(param.shape, group["bits"], group["codebook"], group["block_size"], group["flatten"])
    momentum = Momentum.from_state(state, form) if state else Momentum.zeros(param.shape, form, param.device)
    absmax, sumsq = momentum.stats(grad, beta=group["momentum"], nesterov=group["nesterov"], backend=backend)
    matrices, start = [], 0
    for piece, piece_grad in zip(_row_pieces(param, group), _row_pieces(grad, group), strict=True):
        rows = slice(start, start + len(piece))
        start = rows.stop
        part = momentum.rows(rows)
        first = rows.start * part.codes.shape[1]
        matrices.append(Matrix(piece, piece_grad, part, absmax[rows], sumsq[rows].sum(), key, first))
    return Reading(momentum, matrices)


def _row_pieces(tensor: Tensor, group: dict[str, Any]) -> list[Tensor]:
    """Views of the stacked matrices of `tensor`, cut where the group splits dimension -2."""
    stacked = [tensor]
    for _ in range(0 if group["flatten"] else tensor.ndim - 2):
        stacked = [matrix for stack in stacked for matrix in stack.unbind(0)]
    if group["split_sizes"] is None or group["split_dim"] != -2:
        return stacked
    return [piece for matrix in stacked for piece in matrix.split(group["split_sizes"])]


def step_(
    matrices: Sequence[Matrix], group: dict[str, Any], *, ns_dtype: torch.dtype | None, backend: Backend | None
) -> None:
    """Second phase, matrices of one shape and device together, as many at once as the workspace budget allows."""
    schedule = resolve(group["ns_coefficients"], group["ns_steps"])
    column_sizes = group["split_sizes"] if group["split_dim"] == -1 else None
    classes: dict[tuple[torch.Size, torch.device], list[Matrix]] = {}
    for matrix in matrices:
        if matrix.param.numel():
            classes.setdefault((matrix.param.shape, matrix.param.device), []).append(matrix)
    for members in classes.values():
        if column_sizes is None:
            _step_whole(members, group, schedule, ns_dtype, backend)
        else:
            _step_columns(members, column_sizes, group, schedule, ns_dtype, backend)


def _step_whole(
    members: Sequence[Matrix],
    group: dict[str, Any],
    schedule: Schedule,
    ns_dtype: torch.dtype | None,
    backend: Backend | None,
) -> None:
    """Write the new momenta of matrices of one shape, orthogonalize their exact values, update the parameters."""
    (rows, cols), device = members[0].momentum.codes.shape, members[0].param.device
    path = choose(rows, cols, schedule, device.type, ns_dtype)
    for batch in _chunks(members, batch_size(rows, cols, path.dtype, device.type, BATCH_BYTES)):
        X = torch.empty(len(batch), rows, cols, dtype=path.dtype, device=device)
        for matrix, x in zip(batch, X, strict=True):
            norm = frobenius_norm(matrix.sumsq, eps=group["eps"], factor=schedule.norm_factor)
            _apply(matrix, norm, x, group, backend)
        targets = [(matrix.param, matrix.key, matrix.first) for matrix in batch]
        _update(targets, orthogonalize(X, schedule, path), cols, group, backend)


def _step_columns(
    members: Sequence[Matrix],
    sizes: Sequence[int],
    group: dict[str, Any],
    schedule: Schedule,
    ns_dtype: torch.dtype | None,
    backend: Backend | None,
) -> None:
    """The same with pieces of `sizes` columns: the momenta whole into fp32, normalized by the norm of each piece.

    The fp32 momenta get one half of the workspace budget, Newton-Schulz the other.
    """
    (rows, cols), device = members[0].momentum.codes.shape, members[0].param.device
    one = torch.ones((), dtype=torch.float32, device=device)
    for batch in _chunks(members, max(1, BATCH_BYTES // 2 // (4 * rows * cols))):
        U = torch.empty(len(batch), rows, cols, dtype=torch.float32, device=device)
        pieces: dict[int, list[tuple[_Target, Tensor]]] = {}  # of one width: parameter and fp32 momentum
        for matrix, u in zip(batch, U, strict=True):
            _apply(matrix, one, u, group, backend)
            first = matrix.first
            for param, piece in zip(matrix.param.split(sizes, -1), u.split(sizes, -1), strict=True):
                pieces.setdefault(piece.shape[-1], []).append(((param, matrix.key, first), piece))
                first += piece.shape[-1]
        for width, same in pieces.items():
            path = choose(rows, width, schedule, device.type, ns_dtype)
            for chunk in _chunks(same, batch_size(rows, width, path.dtype, device.type, BATCH_BYTES // 2)):
                X = torch.stack([u for _, u in chunk])
                sumsq = torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True).square()
                X.div_(frobenius_norm(sumsq, eps=group["eps"], factor=schedule.norm_factor))
                directions = orthogonalize(X.to(path.dtype), schedule, path)
                _update([target for target, _ in chunk], directions, cols, group, backend)


def _chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _apply(matrix: Matrix, norm: Tensor, out: Tensor, group: dict[str, Any], backend: Backend | None) -> None:
    options = {"beta": group["momentum"], "nesterov": group["nesterov"], "backend": backend}
    matrix.momentum.apply(matrix.grad.flatten(1), matrix.absmax, norm, out, **options)


def _update(
    targets: Sequence[_Target], directions: Tensor, pitch: int, group: dict[str, Any], backend: Backend | None
) -> None:
    """Update the targets, whose rows lie `pitch` elements apart in their parameters, by `directions` [batch, rows,
    cols], scaled by that shape."""
    ratio = lr_ratio(directions.shape[1], directions.shape[2], group["adjust_lr_fn"])
    factors = {"lr": group["lr"], "weight_decay": group["weight_decay"], "ratio": ratio, "backend": backend}
    for (param, key, first), direction in zip(targets, directions, strict=True):
        flat = param.flatten(1)  # of a channels_last convolution a copy
        update_param_(flat, direction, **factors, key=key, first=first, pitch=pitch)
        if flat.data_ptr() != param.data_ptr():
            param.copy_(flat.view(param.shape))

"""One Muon step of a group in two phases: `read` changes nothing, `step_` writes momentum and parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .config import BATCH_BYTES, Backend
from .orthogonalize import Path, Schedule, batch_size, choose, orthogonalize, resolve
from .state import Format, Momentum
from .update import frobenius_norm, lr_ratio, update_param_


@dataclass(frozen=True)
class Matrix:
    """A parameter of this step, its momentum, and what the first phase found out.

    `absmax` is fp32 [rows, blocks]; `sumsq`, the squared norm of the Newton-Schulz input, 0-d fp32, is not finite
    if the gradient is not, or if its norm overflows. `key` draws the bits of stochastic rounding; None: to nearest.
    """

    param: Tensor
    grad: Tensor
    momentum: Momentum
    absmax: Tensor
    sumsq: Tensor
    key: int | None = None


def read(
    param: Tensor,
    grad: Tensor,
    state: Mapping[str, Tensor] | None,
    group: dict[str, Any],
    backend: Backend | None,
    key: int | None = None,
) -> Matrix:
    """First phase: the stored momentum (zero without a state) and the statistics of the new one."""
    form = Format.of(param.shape, group["bits"], group["codebook"], group["block_size"])
    momentum = Momentum.from_state(state, form) if state else Momentum.zeros(param.shape, form, param.device)
    absmax, sumsq = momentum.stats(grad, beta=group["momentum"], nesterov=group["nesterov"], backend=backend)
    return Matrix(param, grad, momentum, absmax, sumsq.sum(), key)


def step_(
    matrices: Sequence[Matrix], group: dict[str, Any], *, ns_dtype: torch.dtype | None, backend: Backend | None
) -> None:
    """Second phase, matrices of one shape together."""
    schedule = resolve(group["ns_coefficients"], group["ns_steps"])
    for path, batch in _batches(matrices, schedule, ns_dtype):
        _step_batch(batch, group, schedule, path, backend)


def _batches(
    matrices: Sequence[Matrix], schedule: Schedule, ns_dtype: torch.dtype | None
) -> Iterator[tuple[Path, list[Matrix]]]:
    """Matrices of one shape and device, as many at once as the workspace budget allows."""
    classes: dict[tuple[torch.Size, torch.device], list[Matrix]] = {}
    for matrix in matrices:
        if matrix.param.numel():
            classes.setdefault((matrix.param.shape, matrix.param.device), []).append(matrix)
    for ((rows, cols), device), members in classes.items():
        path = choose(rows, cols, schedule, device.type, ns_dtype)
        size = batch_size(rows, cols, path.dtype, device.type, BATCH_BYTES)
        for start in range(0, len(members), size):
            yield path, members[start : start + size]


def _step_batch(
    batch: Sequence[Matrix], group: dict[str, Any], schedule: Schedule, path: Path, backend: Backend | None
) -> None:
    """Write the new momentum, orthogonalize its exact value, update the parameters."""
    rows, cols = batch[0].param.shape
    X = torch.empty(len(batch), rows, cols, dtype=path.dtype, device=batch[0].param.device)
    options = {"beta": group["momentum"], "nesterov": group["nesterov"], "backend": backend}
    for matrix, x in zip(batch, X, strict=True):
        norm = frobenius_norm(matrix.sumsq, eps=group["eps"], factor=schedule.norm_factor)
        matrix.momentum.apply(matrix.grad, matrix.absmax, norm, x, **options)
    ratio = lr_ratio(rows, cols, group["adjust_lr_fn"])
    with torch.autocast(X.device.type, enabled=False):  # the dtype was chosen above
        directions = orthogonalize(X, schedule, path)
    factors = {"lr": group["lr"], "weight_decay": group["weight_decay"], "ratio": ratio}
    for matrix, direction in zip(batch, directions, strict=True):
        update_param_(matrix.param, direction, **factors, backend=backend, key=matrix.key)

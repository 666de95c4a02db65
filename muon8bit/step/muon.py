"""One Muon step of a group in two phases: `read` changes nothing, the `jobs` write momentum and parameters.

All matrices of one shape go through each kernel together, as many at once as the workspace budget allows. Pieces of
rows (`split_sizes`) are matrices of their own. Blocks of the momentum may straddle pieces of columns: such a matrix is
decoded and encoded whole, and cut in between.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..config import SMALL_WORKSPACE_BYTES, Options
from ..orthogonalize import (
    Coefficients,
    batch_size,
    choose_method,
    device_kind,
    orthogonalize,
    resolve_coefficients,
    workspace_bytes,
)
from . import momentum
from .commit import Commit
from .matrix_batches import MatrixBatch, ParamMatrices, chunks, flat, gradients, momenta_on, momentum_tensors
from .offload import OffloadTask, StateOffload
from .update import factors, frobenius_norm, lr_ratio, update_params_


def read(
    stacks: Sequence[ParamMatrices], group: dict[str, Any], options: Options, staging: StateOffload
) -> list[MatrixBatch]:
    """First phase: sort stacks into batches, with the statistics of their new momenta."""
    sorted_stacks: dict[Hashable, list[ParamMatrices]] = {}
    for stack in stacks:
        sorted_stacks.setdefault(stack.layout, []).append(stack)
    jobs: list[OffloadTask] = []
    sums: list[list[Tensor]] = []
    for members in sorted_stacks.values():
        # Room for copies: a channels_last gradient is flattened into one, and one with a factor is multiplied.
        per_element = 4 if members[0].factor is None else 16
        size = max(1, options.workspace_bytes // (per_element * prod(members[0].grad.shape[1:])))
        sums.append([])
        for chunk in chunks(members, size):
            run = partial(_stats, chunk, group, options, sums[-1])
            jobs.append(OffloadTask(chunk[0].param.device, run, read=momentum_tensors(chunk)))
    staging.run(jobs)
    return [
        MatrixBatch(members, found[0] if len(found) == 1 else torch.cat(found))
        for members, found in zip(sorted_stacks.values(), sums, strict=True)
    ]


def _stats(
    stacks: list[ParamMatrices],
    group: dict[str, Any],
    options: Options,
    sums: list[Tensor],
    staged: Sequence[Tensor] | None,
) -> None:
    """Add the squared norms of the Newton-Schulz inputs, fp32 [count]."""
    momenta, grads = [s.momentum for s in momenta_on(stacks, staged)], gradients(stacks)
    sums.append(momentum.stats(momenta, grads, **_average(group), backend=options.backend).flatten(1).sum(1))


def jobs(
    batch: MatrixBatch, group: dict[str, Any], options: Options, commit: Commit, *, is_first: bool
) -> Iterator[OffloadTask]:
    """Second phase: each writes the new momenta of a part of the batch, orthogonalizes their exact values, updates the
    parameters. Together they are bitwise the same wherever the momenta lie. With `is_first` the first one works on
    copies of the momenta, and writes nothing before its Newton-Schulz has returned."""
    schedule = resolve_coefficients(group["ns_coefficients"], group["ns_steps"])
    _, rows, cols = batch.stacks[0].momentum.codes.shape
    kind = device_kind(batch.sumsq.device)
    if group["split_sizes"] is not None and group["split_dim"] == -1:
        budget, step, one = _half(options), _step_columns, 4 * rows * cols
        size = max(1, budget // one)
    else:
        path = choose_method(rows, cols, schedule, kind, options.ns_dtype)
        budget, step = options.workspace_bytes - SMALL_WORKSPACE_BYTES, _step_whole
        size = batch_size(path, rows, cols, kind, budget)
        one = 0 if path.tiny else workspace_bytes(path, rows, cols, kind)
    if is_first and one:  # room for the copies; twice, since they are there when the reference has most temporaries
        one += 2 * sum(tensor[0].nbytes for tensor in batch.stacks[0].momentum.tensors)
        size = min(size, max(1, budget // one))
    for part in batch.split(size):
        run, count = partial(step, part, group, schedule, options, commit, is_first), len(part.sumsq)
        is_first = False
        yield OffloadTask(batch.sumsq.device, run, written=momentum_tensors(part.stacks), workspace_bytes=count * one)


def _half(options: Options) -> int:
    """Of the workspace budget, in bytes."""
    return (options.workspace_bytes - SMALL_WORKSPACE_BYTES) // 2


def _step_whole(
    batch: MatrixBatch,
    group: dict[str, Any],
    schedule: Coefficients,
    options: Options,
    commit: Commit,
    is_first: bool,
    staged: Sequence[Tensor] | None,
) -> None:
    batch = batch.on(staged)
    _, rows, cols = batch.stacks[0].momentum.codes.shape
    device = batch.sumsq.device
    path = choose_method(rows, cols, schedule, device_kind(device), options.ns_dtype)
    norms = frobenius_norm(batch.sumsq, eps=group["eps"], factor=schedule.norm_factor)
    if path.tiny:
        commit.confirm()
        _step_tiny(batch, norms, group, schedule, options)
        commit()  # only now: what fails in one launch has not been launched
        return
    copies = batch.copied() if is_first and staged is None else batch
    X = torch.empty(len(batch.sumsq), rows, cols, dtype=path.dtype, device=device)
    _apply(copies, norms, X, group, options)
    X = orthogonalize(X, schedule, path, options.backend)
    commit()
    batch.take(copies)
    _update(batch.stacks, X, slice(0, cols), group, options)


def _step_tiny(
    batch: MatrixBatch, norms: Tensor, group: dict[str, Any], schedule: Coefficients, options: Options
) -> None:
    """All of the second phase in one launch, in fp32."""
    places = _places(batch.stacks, 0)
    with written([stack.param for stack in batch.stacks]) as params:
        decay, scale = _factors(params[0].shape, group)
        how = {**_average(group), "decay": decay, "scale": scale, **places, **_how(options)}
        momentum.step_tiny_(batch.momenta, batch.grads, params, norms, schedule.steps, **how)


def _step_columns(
    batch: MatrixBatch,
    group: dict[str, Any],
    schedule: Coefficients,
    options: Options,
    commit: Commit,
    is_first: bool,
    staged: Sequence[Tensor] | None,
) -> None:
    """The momenta whole into fp32, then cut, each piece normalized by its own norm.

    The fp32 momenta get one half of the workspace budget, Newton-Schulz the other.
    """
    batch = batch.on(staged)
    copies = batch.copied() if is_first and staged is None else batch
    _, rows, cols = batch.stacks[0].momentum.codes.shape
    device, kind = batch.sumsq.device, device_kind(batch.sumsq.device)
    U = torch.empty(len(batch.sumsq), rows, cols, dtype=torch.float32, device=device)
    _apply(copies, torch.ones_like(batch.sumsq), U, group, options)
    start = 0
    for width in group["split_sizes"]:
        columns = slice(start, start + width)
        start += width
        path = choose_method(rows, width, schedule, kind, options.ns_dtype, tiny=False)
        sumsq = torch.linalg.vector_norm(U[..., columns], dim=(-2, -1)).square()
        norms = frobenius_norm(sumsq, eps=group["eps"], factor=schedule.norm_factor)
        done = 0
        for chunk in chunks(batch.stacks, batch_size(path, rows, width, kind, _half(options))):
            which = slice(done, done + sum(stack.num_matrices for stack in chunk))
            done = which.stop
            X = U[which, :, columns].div_(norms[which].view(-1, 1, 1)).to(path.dtype).contiguous()
            X = orthogonalize(X, schedule, path, options.backend)
            commit()
            batch.take(copies)
            copies = batch
            _update(chunk, X, columns, group, options)
            del X  # before the next one is made


def _apply(batch: MatrixBatch, norms: Tensor, out: Tensor, group: dict[str, Any], options: Options) -> None:
    """The new momenta into codes and scales, and u / norm into `out` [batch, rows, cols]. Copies of gradients, where
    they have factors, are made for a part of the batch at a time."""
    if batch.stacks[0].factor is None:
        _apply_at_once(batch, norms, out, group, options)
        return
    start = 0
    for part in batch.split(max(1, len(batch.sumsq) // 16)):
        which = slice(start, start + len(part.sumsq))
        start = which.stop
        _apply_at_once(part, norms[which], out[which], group, options)


def _apply_at_once(batch: MatrixBatch, norms: Tensor, out: Tensor, group: dict[str, Any], options: Options) -> None:
    momentum.apply_(batch.momenta, batch.grads, norms, out, **_average(group), **_how(options))


def _update(
    stacks: Sequence[ParamMatrices], directions: Tensor, columns: slice, group: dict[str, Any], options: Options
) -> None:
    """Update these columns of the parameters by `directions` [batch, rows, cols], scaled by that shape."""
    with written([stack.param for stack in stacks]) as params:
        pieces = params
        if directions.shape[2] < params[0].shape[2]:
            pieces = [param[..., columns] for param in params]
        decay, scale = _factors(directions.shape, group)
        update_params_(pieces, directions, decay, scale, **_places(stacks, columns.start), **_how(options))


@contextmanager
def written(views: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Parameters of stacks as [num_matrices, rows, cols], to be written; copies are copied back."""
    params = flat(views)
    yield params
    for view, param in zip(views, params, strict=True):
        if param.data_ptr() != view.data_ptr():
            view.copy_(param.view(view.shape))


def _factors(shape: Sequence[int], group: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Decay and scale of the update of matrices of this shape [..., rows, cols]."""
    ratio = lr_ratio(shape[-2], shape[-1], group["adjust_lr_fn"])
    return factors(lr=group["lr"], weight_decay=group["weight_decay"], ratio=ratio)


def _places(stacks: Sequence[ParamMatrices], first_column: int) -> dict[str, Any]:
    """What the random bits of stochastic rounding depend on, in the order of the matrices."""
    if stacks[0].key is None:
        return {}
    keys = [stack.key for stack in stacks for _ in range(stack.num_matrices)]
    firsts = [s.first + i * s.pitch + first_column for s in stacks for i in range(s.num_matrices)]
    return {"keys": keys, "firsts": firsts, "pitch": stacks[0].momentum.codes.shape[2]}


def _average(group: dict[str, Any]) -> dict[str, Any]:
    return {"beta": group["momentum"], "nesterov": group["nesterov"]}


def _how(options: Options) -> dict[str, Any]:
    return {"skip": options.skip, "backend": options.backend}

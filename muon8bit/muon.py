"""One Muon step of a group in two phases: `read` changes nothing, `step_` writes momentum and parameters.

All matrices of one shape go through each kernel together, as many at once as the workspace budget allows. Pieces of
rows (`split_sizes`) are matrices of their own. Blocks of the momentum may straddle pieces of columns: such a matrix is
decoded and encoded whole, and cut in between.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from . import state
from .config import Options
from .orthogonalize import Schedule, batch_size, choose, orthogonalize, resolve
from .stacks import Bucket, Stack, chunks, flat
from .update import frobenius_norm, lr_ratio, update_params_


def read(stacks: Sequence[Stack], group: dict[str, Any], options: Options) -> list[Bucket]:
    """First phase: sort stacks into buckets, with the statistics of their new momenta."""
    sorted_stacks: dict[Hashable, list[Stack]] = {}
    for stack in stacks:
        sorted_stacks.setdefault(stack.bucket_key, []).append(stack)
    buckets = []
    for members in sorted_stacks.values():
        # Room for copies, since a channels_last gradient is flattened into one.
        size = max(1, options.workspace_bytes // (4 * prod(members[0].grad.shape[1:])))
        sums = []
        for chunk in chunks(members, size):
            momenta, grads = [stack.momentum for stack in chunk], flat(chunk, "grad")
            ema = {"beta": group["momentum"], "nesterov": group["nesterov"]}
            sums.append(state.stats(momenta, grads, **ema, backend=options.backend).flatten(1).sum(1))
        buckets.append(Bucket(members, sums[0] if len(sums) == 1 else torch.cat(sums)))
    return buckets


def step_(bucket: Bucket, group: dict[str, Any], options: Options) -> None:
    """Second phase: write the new momenta, orthogonalize their exact values, update the parameters."""
    schedule = resolve(group["ns_coefficients"], group["ns_steps"])
    if group["split_sizes"] is not None and group["split_dim"] == -1:
        _step_columns(bucket, group, schedule, options)
    else:
        _step_whole(bucket, group, schedule, options)


def _step_whole(bucket: Bucket, group: dict[str, Any], schedule: Schedule, options: Options) -> None:
    _, rows, cols = bucket.stacks[0].momentum.codes.shape
    device = bucket.sumsq.device
    path = choose(rows, cols, schedule, device.type, options.ns_dtype)
    for batch in bucket.batches(batch_size(rows, cols, path.dtype, device.type, options.workspace_bytes)):
        norms = frobenius_norm(batch.sumsq, eps=group["eps"], factor=schedule.norm_factor)
        X = torch.empty(len(batch.sumsq), rows, cols, dtype=path.dtype, device=device)
        _apply(batch.stacks, norms, X, group, options)
        _update(batch.stacks, orthogonalize(X, schedule, path), slice(None), group, options)


def _step_columns(bucket: Bucket, group: dict[str, Any], schedule: Schedule, options: Options) -> None:
    """The momenta whole into fp32, then cut, each piece normalized by its own norm.

    The fp32 momenta get one half of the workspace budget, Newton-Schulz the other.
    """
    _, rows, cols = bucket.stacks[0].momentum.codes.shape
    device, half = bucket.sumsq.device, options.workspace_bytes // 2
    for batch in bucket.batches(max(1, half // (4 * rows * cols))):
        U = torch.empty(len(batch.sumsq), rows, cols, dtype=torch.float32, device=device)
        _apply(batch.stacks, torch.ones_like(batch.sumsq), U, group, options)
        start = 0
        for width in group["split_sizes"]:
            columns = slice(start, start + width)
            start += width
            path = choose(rows, width, schedule, device.type, options.ns_dtype)
            sumsq = torch.linalg.vector_norm(U[..., columns], dim=(-2, -1)).square()
            norms = frobenius_norm(sumsq, eps=group["eps"], factor=schedule.norm_factor)
            done = 0
            for chunk in chunks(batch.stacks, batch_size(rows, width, path.dtype, device.type, half)):
                which = slice(done, done + sum(map(len, chunk)))
                done = which.stop
                X = U[which, :, columns].div_(norms[which].view(-1, 1, 1)).to(path.dtype).contiguous()
                _update(chunk, orthogonalize(X, schedule, path), columns, group, options)


def _apply(stacks: Sequence[Stack], norms: Tensor, out: Tensor, group: dict[str, Any], options: Options) -> None:
    state.apply_(
        [stack.momentum for stack in stacks],
        flat(stacks, "grad"),
        norms,
        out,
        beta=group["momentum"],
        nesterov=group["nesterov"],
        skip=options.skip,
        backend=options.backend,
    )


def _update(
    stacks: Sequence[Stack],
    directions: Tensor,
    columns: slice,
    group: dict[str, Any],
    options: Options,
) -> None:
    """Update these columns of the parameters by `directions` [batch, rows, cols], scaled by that shape."""
    params = flat(stacks, "param")
    keys = [stack.key for stack in stacks for _ in range(len(stack)) if stack.key is not None] or None
    firsts = None
    if keys is not None:
        firsts = [first for stack in stacks for first in stack.firsts(columns.start or 0)]
    update_params_(
        [param[..., columns] for param in params],
        directions,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        ratio=lr_ratio(directions.shape[1], directions.shape[2], group["adjust_lr_fn"]),
        keys=keys,
        firsts=firsts,
        pitch=params[0].shape[2],
        skip=options.skip,
        backend=options.backend,
    )
    for stack, param in zip(stacks, params, strict=True):
        if param.data_ptr() != stack.param.data_ptr():
            stack.param.copy_(param.view(stack.param.shape))

"""One step of matrices W [rows, cols] with gradients g by Muon.

    m  =  beta * m + (1 - beta) * g                     momentum, decoded from 8 bits       (kernels)
    u  =  beta * m + (1 - beta) * g  if nesterov else m                                     (kernels)
    O  =  NS(u / max(|u|_F, eps))                       on u BEFORE m is encoded again      (orthogonalize/)
    W  =  round((1 - lr * weight_decay) * W  -  lr * ratio(rows, cols) * O)                 (kernels)

`ratio` is `lr_ratio`. The same step of one matrix in plain torch: `muon8bit/functional.py`. Sources: torch.optim.Muon
for the arguments and their meaning; Jordan 2024 and Moonlight (arXiv 2502.16982) for the two ratios; arXiv 2509.23106
for encoding after the orthogonalization; arXiv 2510.12402 for cautious weight decay, where W decays only where
O * W >= 0; modded-nanogpt for a decay by lr and the update's rate (`decay_lr_power`).

A step has two phases. `stats` reads: |u|_F of every matrix, by which it is known whether all gradients are finite.
`apply` writes momenta and parameters. All matrices of one shape go through each kernel together, as many at once as the
workspace allows. Blocks of the momentum may straddle pieces of columns: such matrices are averaged whole, and cut in
between.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import Any

import torch
from muon8bit_kernels import kernels_for
from torch import Tensor

from ..config import SMALL_WORKSPACE_BYTES
from ..orthogonalize import device_kind, orthogonalize, partition
from .commit import Commit
from .group_options import RESCALED, MuonOptions
from .matrix_batches import MatrixBatch, as_matrices, copy_back
from .second_moment import normalize, update_arguments, write_

_LEAST_NORM = 2.0**-60  # of a Newton-Schulz input that counts as one: see `frobenius_norm`


def lr_ratio(rows: float, cols: float, adjust_lr_fn: str | None) -> float:
    """Return the factor of lr for a shape.

    `RESCALED` gives 1: a second moment has given the direction its size. `"spectral"` gives sqrt(rows / cols), with
    which the update's effect on activations is the same at every width.
    None and `"original"` give sqrt(max(1, rows / cols)). `"match_rms_adamw"` gives 0.2 sqrt(max(rows, cols)), with
    which the update has the RMS of AdamW's (0.2), so that AdamW's lr and weight decay carry over.
    """
    if adjust_lr_fn in ("spectral", RESCALED):
        return sqrt(rows / cols) if adjust_lr_fn == "spectral" else 1.0
    return 0.2 * sqrt(max(rows, cols)) if adjust_lr_fn == "match_rms_adamw" else sqrt(max(1.0, rows / cols))


def frobenius_norm(sumsq: Tensor, *, eps: float, factor: float) -> Tensor:
    """Return the divisors of Newton-Schulz inputs, fp32, the shape of `sumsq`: factor * max(sqrt(sumsq), eps).

    An eps under 2^-60 counts as that. Elements under 2^-74.5 have squares that are 0 in fp32, so that a matrix of up to
    2^29 of them may have a norm of 2^-60 where `sumsq` is 0; divided by less, Newton-Schulz would blow it up.
    """
    return sumsq.sqrt().clamp(min=max(eps, _LEAST_NORM)).mul(factor)


def normalize_signs_(signs: Tensor, options: MuonOptions) -> None:
    """Divide signs [batch, rows, cols], any float dtype, by their Frobenius norms, in place."""
    # Exact: each row's is an integer. torch.count_nonzero takes 9 bytes an element.
    of_rows = kernels_for(signs.device, options.backend).direction_squares(signs, columns=False)
    counts = of_rows.sum(1, dtype=torch.float64).float()
    norms = frobenius_norm(counts, eps=options.eps, factor=options.coefficients.norm_factor)
    signs.mul_(norms.reciprocal().to(signs.dtype).view(-1, 1, 1))


def factors(
    *, lr: float | Tensor, weight_decay: float, ratio: float, decay_lr_power: int = 1
) -> tuple[float, float] | tuple[Tensor, Tensor]:
    """Return 1 - decay and lr * ratio: floats, or 0-d fp32 where `lr` is, which is not waited for.

    The decay is lr * weight_decay, with decay_lr_power=2 times lr * ratio, the rate of the update.

    Args:
        lr: a float, or a 0-d or 1-element tensor on the CPU or the parameters' device.
        weight_decay: the decay per unit of lr, or of lr * lr * ratio.
        ratio: the factor of lr for the shape, from `lr_ratio`.
        decay_lr_power: 1 or 2.
    """
    if isinstance(lr, Tensor) and lr.device.type != "cpu":
        on_device = lr.reshape(()).float()
        rate = on_device * ratio
        return 1 - on_device * weight_decay * (rate if decay_lr_power == 2 else 1), rate
    return 1 - float(lr) * weight_decay * (float(lr) * ratio if decay_lr_power == 2 else 1), float(lr) * ratio


def stats_parts(batch: MatrixBatch, *, is_staged: bool = False) -> list[MatrixBatch]:
    """Cut a batch for `stats`, which copies a gradient that has a factor, and may one that is flattened.

    With `is_staged` the momenta are brought to the device part by part.
    """
    num_bytes = 4 * batch.rows * -(-batch.cols // batch.format.block_size)  # of what comes out
    if batch.has_factors or batch.members[0].grad.ndim > 3 or is_staged:
        num_bytes = (16 if batch.has_factors else 4) * batch.rows * batch.cols
    return batch.split(max(1, batch.options.workspace_bytes // num_bytes))


def stats(batch: MatrixBatch) -> None:
    """Fill `batch.sumsq` with the squared norms of the Newton-Schulz inputs; change nothing else."""
    torch.sum(squares(batch).flatten(1), 1, out=batch.sumsq)


def squares(batch: MatrixBatch) -> Tensor:
    """Return the sums of squares of the Newton-Schulz inputs by row and block: fp32 [num_matrices, rows, blocks]."""
    kernels = kernels_for(batch.device, batch.options.backend)
    return kernels.momentum_stats(batch.codes, batch.scales or None, batch.grads(), **batch.averaging)


def apply_parts(batch: MatrixBatch, *, is_first: bool) -> list[MatrixBatch]:
    """Cut a batch for `apply`, within the workspace, and say how each part goes.

    Args:
        batch: the matrices.
        is_first: it is the first batch of the step: then `apply` makes copies of the momenta.
    """
    options = batch.options
    kind = device_kind(batch.device)
    copied_bytes = sum(tensor[0].nbytes for tensor in (batch.codes[0], *batch.scales[:1])) if is_first else 0
    how = partition(
        batch.rows,
        batch.cols,
        options.coefficients,
        kind,
        options.workspace_bytes - SMALL_WORKSPACE_BYTES,
        dtype=options.ns_dtype,
        count=options.counts.get((batch.rows, batch.cols), 1),
        widths=options.column_splits,
        rates=options.rates(kind) if options.table is not None else None,
        tiny=not options.sign_momentum,
        copied_bytes=2 * copied_bytes,  # they are there when the reference has most temporaries
    )
    batch.partition = how
    if options.column_splits is None:  # else each piece has its own
        batch.norms = frobenius_norm(batch.sumsq, eps=options.eps, factor=options.coefficients.norm_factor)
    batch.skip = options.skip
    if any(member.idle is not None for member in batch.members):
        batch.skip_idle()
    return batch.split(how.size)


def apply(batch: MatrixBatch, commit: Commit) -> None:
    """Write the new momenta of a batch, orthogonalize the exact values of their Newton-Schulz inputs, and update.

    The first batch of a step averages copies of its momenta: nothing is written before its Newton-Schulz has returned
    and `commit` is called.
    """
    options = batch.options
    assert batch.partition is not None
    method = batch.partition.pieces[0].method
    if options.column_splits is not None:
        _apply_by_columns(batch, commit)
        return
    norms = batch.norms
    assert norms is not None
    if method.tiny:
        commit.confirm()
        directions = _fused_step(batch, norms)
        commit()  # only now: what fails in one launch has not been launched
        if directions is not None:
            update_(batch, directions)
        return
    averaged = batch if commit.is_done or batch.is_staged else batch.with_tensors()
    X = torch.empty(batch.num_matrices, batch.rows, batch.cols, dtype=method.dtype, device=batch.device)
    average_(averaged, norms, X)
    if options.sign_momentum:
        normalize_signs_(X, options)
    X = orthogonalize(X, options.coefficients, method, options.backend)
    commit()
    if averaged is not batch:
        torch._foreach_copy_(batch.momentum_tensors, averaged.momentum_tensors)
        del averaged  # second moments need memory too
    update_(batch, X)


def _apply_by_columns(batch: MatrixBatch, commit: Commit) -> None:
    """Average the momenta whole into fp32, cut them, and normalize each piece by its own norm."""
    options, averaged = batch.options, batch if commit.is_done or batch.is_staged else batch.with_tensors()
    assert batch.partition is not None
    coefficients, pieces = options.coefficients, batch.partition.pieces
    U = torch.empty(batch.num_matrices, batch.rows, batch.cols, dtype=torch.float32, device=batch.device)
    average_(averaged, torch.ones_like(batch.sumsq), U)
    for piece, (columns, method, size) in enumerate(pieces):
        sumsq = torch.linalg.vector_norm(U[..., columns], dim=(-2, -1)).square()
        norms = frobenius_norm(sumsq, eps=options.eps, factor=coefficients.norm_factor).view(-1, 1, 1)
        parts = batch.split(size)
        sizes = [part.num_matrices for part in parts]
        for part, cut, norm in zip(parts, U[..., columns].split(sizes), norms.split(sizes), strict=True):
            X = cut.div_(norm).to(method.dtype).contiguous()
            X = orthogonalize(X, coefficients, method, options.backend)
            commit()
            if averaged is not batch:
                torch._foreach_copy_(batch.momentum_tensors, averaged.momentum_tensors)
                averaged = batch
            update_(part, X, columns, piece)
            del X  # before the next one is made


def _fused_step(batch: MatrixBatch, norms: Tensor) -> Tensor | None:
    """Do all of the second phase in one launch, in fp32; with a second moment all up to the directions, returned."""
    options = batch.options
    views = [member.param for member in batch.members]
    params = as_matrices(views)
    if options.second_moment is None:
        ratio = lr_ratio(batch.rows, batch.cols, options.adjust_lr_fn)
        decay, scale = factors(
            lr=options.lr, weight_decay=options.weight_decay, ratio=ratio, decay_lr_power=options.decay_lr_power
        )
        how = {"cautious": options.cautious_weight_decay, **batch.random_bits()}
    else:  # O = 0 * 0 - (-1) * O
        params = [torch.zeros(batch.num_matrices, batch.rows, batch.cols, dtype=torch.float32, device=batch.device)]
        decay, scale, how = 0.0, -1.0, {}
    how |= {"decay": decay, "scale": scale, "skip": batch.skip, **batch.averaging}
    step_tiny = kernels_for(batch.device, options.backend).step_tiny
    tensors = batch.codes, batch.scales or None, batch.grads(), params, norms
    step_tiny(*tensors, steps=options.coefficients.steps, **how)
    if options.second_moment is not None:
        return params[0]
    if params is not views:
        copy_back(views, params)
    return None


def average_(batch: MatrixBatch, norms: Tensor | None, out: Tensor | None) -> None:
    """Write the new momenta into codes and scales, and u / norm, or its signs, into `out`.

    Args:
        batch: the matrices.
        norms: fp32 [num_matrices]; None without `out`.
        out: [num_matrices, rows, cols], any float dtype; of matrices that are skipped it is 0. None where nobody needs
            u.
    """
    apply_kernel = kernels_for(batch.device, batch.options.backend).momentum_apply
    if out is not None and batch.skip is not None and batch.skip.ndim == 1:
        out.zero_()
    if not batch.has_factors:
        tensors = batch.codes, batch.scales or None, batch.grads(), norms, out
        apply_kernel(*tensors, skip=batch.skip, signs=batch.options.sign_momentum, **batch.averaging)
        return
    # Gradients with factors are copied, a part of the batch at a time.
    parts = batch.split(max(1, batch.num_matrices // 16))
    sizes = [part.num_matrices for part in parts]
    none = [None] * len(parts)
    split = [none if tensor is None else tensor.split(sizes) for tensor in (norms, out)]
    for part, part_norms, part_out in zip(parts, *split, strict=True):
        tensors = part.codes, part.scales or None, part.grads(), part_norms, part_out
        apply_kernel(*tensors, skip=part.skip, signs=part.options.sign_momentum, **part.averaging)


def update_(batch: MatrixBatch, directions: Tensor, columns: slice | None = None, piece: int = 0) -> None:
    """Update parameters by the directions of whole matrices, or of a piece of their columns.

    Args:
        batch: the matrices.
        directions: O, [num_matrices, rows, cols], fp32, bf16 or fp16, any strides.
        columns: of the piece; None means all.
        piece: its number.
    """
    options, found = batch.options, None
    views = [member.param for member in batch.members]
    params = as_matrices(views)
    first_column, pieces, moments = 0, params, batch.second_moments
    if columns is not None:
        first_column, pieces = columns.start, [param[..., columns] for param in params]
        moments = [moment.columns(piece) for moment in moments]
    _, rows, cols = directions.shape
    how = batch.random_bits(first_column)
    if options.second_moment is not None:
        found = normalize(directions, moments, options.second_moment, options.backend)
        how |= update_arguments(found, moments, options.second_moment)
    update_params_(pieces, directions, lr_ratio(rows, cols, options.adjust_lr_fn), options, batch.skip, **how)
    if found is not None:
        write_(moments, found.new, batch.skip)
    if params is not views:
        copy_back(views, params)


def update_params_(
    params: Sequence[Tensor],
    directions: Tensor | Sequence[Tensor],
    ratio: float,
    options: MuonOptions,
    skip: Tensor | None,
    **how: Any,
) -> None:
    """Compute W <- decay * W - scale * O in place, in fp32, rounded once; scale 0 and decay 1 change no bit.

    With `cautious_weight_decay`, elements whose signs in W and O are opposite do not decay.

    Args:
        params: [count, rows, cols] each, in one dtype, fp32, bf16 or fp16, any strides.
        directions: O, [batch, rows, cols], or stacks of it, fp32, bf16 or fp16, any strides.
        ratio: the factor of lr, for the shape of the whole matrix.
        options: the group's.
        skip: None, or fp32, 0-d or one a matrix; where it is not 0, nothing is written.
        how: keys, firsts and pitch of stochastic rounding, bf16 only (none rounds to nearest), and what
            `update_arguments` gives.
    """
    decay, scale = factors(
        lr=options.lr, weight_decay=options.weight_decay, ratio=ratio, decay_lr_power=options.decay_lr_power
    )
    how |= {"decay": decay, "scale": scale, "cautious": options.cautious_weight_decay, "skip": skip}
    kernels_for(params[0].device, options.backend).update_params(params, directions, **how)

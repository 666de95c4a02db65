"""Measures of what 8 bits do to the update of one matrix, the threshold of the warning, and the way out it names.

Of one step, with x what Newton-Schulz gets (u, or its signs for AdaMuon) and O what it gives, by the fp32 momentum; O8
by the 8-bit one:

    update_cosine  =  <O8, O> / (|O8| |O|)
    descent        =  <O8, x> / <O, x>              the share of the steepest way down along x that the update keeps

The threshold is on `descent`, the cosine counted where the momentum has something. The plain cosine falls in sound runs
as far as in bad ones: where x is nearly rank-deficient, as at output projections of grouped heads, Newton-Schulz blows
up rounding in directions along which x has nothing, and on which the loss does not depend to first order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from muon8bit_kernels import zero_code
from torch import Tensor
from torch.linalg import vector_norm

from ..orthogonalize import choose_method, device_kind, orthogonalize
from ..step.group_options import MuonOptions
from ..step.momentum import Momentum, MomentumFormat
from ..step.muon import frobenius_norm
from .samples import WatchedMatrix
from .shadow import MomentumPair

# Of Muon and NorMuon; and of AdaMuon, whose signs make small elements as large as others. See docs/results/health.md.
MIN_DESCENT = {"momentum": 0.95, "signs": 0.8}
# Blocks that the advice tries: those of the optimizer's own documentation for uneven rows.
_SMALL_BLOCKS = (256, 64)
_ENOUGH = 0.5  # of the descent that one storing loses, which another format has to save to be named


@dataclass(frozen=True)
class MatrixHealth:
    """Measures of one matrix at one step, all without unit.

    Attributes:
        name: of the parameter, with the matrix of a stack and the piece of a fused weight.
        format: of the momentum, as arguments.
        shape: rows and columns of the matrix.
        step: the number of the step, counted since `QuantizationHealth` was attached.
        descent: the share of the steepest descent along the fp32 momentum, or its signs, that the update keeps.
        min_descent: the threshold under which a warning names the matrix.
        update_cosine: of the orthogonalized updates.
        momentum_error: norm of the difference of the stored momenta over that of the fp32 one.
        sign_flips: share of the elements of u whose sign is the other one.
        zero_codes, extreme_codes: shares of codes that are 0, and that are at either end of the codebook.
    """

    name: str
    format: str
    shape: tuple[int, int]
    step: int
    min_descent: float
    descent: float
    update_cosine: float
    momentum_error: float
    sign_flips: float
    zero_codes: float
    extreme_codes: float

    @property
    def is_sound(self) -> bool:
        """Whether the update keeps at least `min_descent` of the descent."""
        return self.descent >= self.min_descent


def measure(of: WatchedMatrix, pair: MomentumPair, step: int) -> MatrixHealth | None:
    """Return the measures of a matrix at a step, for which the device is waited for; None where its momentum is 0."""
    given = _given(pair.u, pair.options)
    by_fp32, by_8bit = directions([pair.u, pair.u8], pair.options)
    linear, zero = pair.format.codebook == "linear", zero_code(pair.format.codebook or "linear")
    ends = (-127, 127) if linear else (0, 255)
    values = torch.stack(
        [
            (by_8bit * given).sum() / (by_fp32 * given).sum(),
            (by_8bit * by_fp32).sum() / (vector_norm(by_8bit) * vector_norm(by_fp32)),
            vector_norm(pair.m8 - pair.m) / vector_norm(pair.m),
            (pair.u8 * pair.u < 0).float().mean(),
            (pair.codes == zero).float().mean(),
            ((pair.codes == ends[0]) | (pair.codes == ends[1])).float().mean(),
        ]
    ).tolist()
    if values[0] != values[0]:
        return None
    least = MIN_DESCENT["signs" if pair.options.sign_momentum else "momentum"]
    return MatrixHealth(of.name, pair.format.options, (of.rows, of.cols), step, least, *values)


def _given(u: Tensor, options: MuonOptions) -> Tensor:
    """Return what Newton-Schulz gets of u, before it is normalized."""
    return u.sign() if options.sign_momentum else u


def directions(inputs: Sequence[Tensor], options: MuonOptions) -> list[Tensor]:
    """Return O of each u, [rows, cols], in fp32 and by the coefficients of the group."""
    X = torch.stack([_given(u, options) for u in inputs])
    count, rows, cols = X.shape
    norms = frobenius_norm(
        vector_norm(X, dim=(1, 2)).square(), eps=options.eps, factor=options.coefficients.norm_factor
    )
    kind = device_kind(X.device)
    method = choose_method(rows, cols, options.coefficients, kind, torch.float32, tiny=False, count=count)
    return list(orthogonalize(X.div_(norms.view(-1, 1, 1)), options.coefficients, method, options.backend).unbind())


def advice(pair: MomentumPair) -> str:
    """Return the keys of a group that would help a matrix, as the text of a dict.

    Each format stores u once. The first one that loses at most half of what the present one does is named, those of
    the same bytes before those of smaller blocks; 32 bits where there is none.
    """
    given = _given(pair.u, pair.options)

    def kept(u: Tensor) -> float:
        return float((directions([u], pair.options)[0] * given).sum())

    best, own = kept(pair.u), pair.format
    lost = best - kept(Momentum.encode(pair.u, replace(own, flatten=False)).decode())
    for form in _alternatives(own):
        if best - kept(Momentum.encode(pair.u, form).decode()) <= _ENOUGH * lost:
            keys = {"codebook": form.codebook, "block_size": form.block_size}
            changed = {key: value for key, value in keys.items() if value != getattr(own, key)}
            return str(changed).replace("'", '"')
    return '{"bits": 32}'


def _alternatives(form: MomentumFormat) -> Iterator[MomentumFormat]:
    other = replace(form, codebook="linear" if form.codebook == "dynamic" else "dynamic", flatten=False)
    yield other
    for block_size in _SMALL_BLOCKS:
        if block_size < form.block_size:
            yield replace(other, block_size=block_size)
            yield replace(form, block_size=block_size, flatten=False)

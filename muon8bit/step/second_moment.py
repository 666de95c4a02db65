"""Second moment of the orthogonalized O, by which NorMuon and AdaMuon divide it: between Newton-Schulz and the update.

    v   =  beta2 * v + (1 - beta2) * mean(O^2)              over a row, over a column, or of each element
    O'  =  O / (sqrt(v) + eps)   or   O / sqrt(max(v, eps))
    O'' =  gamma * O',   gamma = |O|_F / |O'|_F  ("keep"),   0.2 sqrt(rows cols) / |O'|_F  ("rms"),   else 1

v begins at 0 and is not corrected for it: gamma cancels what that changes. Where v is 0, so is O, and O' too.
Sources: NorMuon (arXiv 2510.05491) for rows, AdaMuon (arXiv 2507.11005) for elements.

`normalize` reads whole matrices. What it finds suffices to update any part of them, on any rank: `Normalization`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod, sqrt
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from muon8bit_kernels import ElementMoment, kernels_for, num_blocks
from muon8bit_kernels.batches import known_flag
from muon8bit_kernels.element_moment import inverses_of, root, steps_of
from torch import Tensor

from ..config import (
    DEFAULT_BLOCK_SIZE,
    MIN_QUANTIZED_COLUMNS,
    SECOND_CODES_KEY,
    SECOND_MOMENT_KEY,
    SECOND_SCALES_KEY,
    Backend,
    SecondMomentKind,
)
from .group_options import SecondMomentOptions

Axis: TypeAlias = Literal["row", "column", "element"]


@dataclass(frozen=True)
class SecondMomentFormat:
    """The way in which the second moment of a parameter is stored.

    Attributes:
        axis: what has a number: each row, each column, or each element of a matrix.
        block_size: of elements, the number that share a scale, in each piece of a row; None means fp32.
        flatten: a row is all dimensions but the first, instead of the last one.
        rows, cols: the sizes of the pieces of a matrix, of which each has numbers of its own.
    """

    axis: Axis
    block_size: int | None
    flatten: bool
    rows: tuple[int, ...]
    cols: tuple[int, ...]

    @classmethod
    @cache
    def of(
        cls,
        shape: torch.Size,
        bits: int,
        _: str,
        block_size: int,
        flatten: bool,
        row_splits: tuple[int, ...] | None,
        column_splits: tuple[int, ...] | None,
        second_moment: SecondMomentKind,
    ) -> SecondMomentFormat:
        """Return the format for a parameter of `shape`; "shape" takes the longer dimension of its matrices."""
        rows, cols = (shape[0], prod(shape[1:])) if flatten else shape[-2:]
        axis: Axis = "element" if second_moment == "element" else "row"
        if second_moment == "shape" and rows < cols:
            axis = "column"
        is_quantized = axis == "element" and bits == 8 and cols >= MIN_QUANTIZED_COLUMNS
        pieces = row_splits or (rows,), column_splits or (cols,)
        return cls(axis, block_size if is_quantized else None, flatten, *pieces)

    def layout(self, shape: torch.Size) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return state key -> shape and dtype of its tensor, for a parameter of `shape`."""
        lead = tuple(shape[:1] if self.flatten else shape[:-1])
        if self.axis == "row":
            return {SECOND_MOMENT_KEY: ((*lead, len(self.cols)), torch.float32)}
        if self.axis == "column":
            return {SECOND_MOMENT_KEY: ((*lead[:-1], len(self.rows), sum(self.cols)), torch.float32)}
        if self.block_size is None:
            return {SECOND_MOMENT_KEY: (tuple(shape), torch.float32)}
        blocks = sum(num_blocks(width, self.block_size) for width in self.cols)
        return {
            SECOND_CODES_KEY: (tuple(shape), torch.uint8),
            SECOND_SCALES_KEY: ((*lead, blocks), torch.float32),
        }


@dataclass(frozen=True)
class SecondMoment:
    """Second moment of one parameter, or, from `as_matrices`, of its matrices over the same memory.

    Attributes:
        values: fp32, or uint8 codes; of the shape in `SecondMomentFormat.layout`, or [count, rows, cols], with one row
            or column where the numbers are those of columns or rows.
        scales: fp32 [..., rows, blocks] of codes, else None.
        format: how it is stored.
    """

    values: Tensor
    scales: Tensor | None
    format: SecondMomentFormat

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], format: SecondMomentFormat) -> SecondMoment:
        """Return the second moment whose tensors lie in `optimizer.state[param]`; they are shared, not copied."""
        key = SECOND_MOMENT_KEY if format.block_size is None else SECOND_CODES_KEY
        return cls(state[key], state.get(SECOND_SCALES_KEY), format)

    def to_state(self) -> dict[str, Tensor]:
        """Return its tensors under their public keys."""
        if self.scales is None:
            return {SECOND_MOMENT_KEY: self.values}
        return {SECOND_CODES_KEY: self.values, SECOND_SCALES_KEY: self.scales}

    @property
    def tensors(self) -> list[Tensor]:
        """Return values and, if quantized, scales."""
        return [self.values] if self.scales is None else [self.values, self.scales]

    def with_tensors(self, tensors: Iterator[Tensor]) -> SecondMoment:
        """Return the same second moment in the next ones of `tensors`, as `tensors` orders them."""
        return SecondMoment(next(tensors), None if self.scales is None else next(tensors), self.format)

    def as_matrices(self) -> SecondMoment:
        """Return views of matrices: [count, rows or pieces, cols or pieces]."""
        flatten = self.format.flatten
        as_rows = [t.reshape(1, len(t), -1) if flatten else t.reshape(-1, *t.shape[-2:]) for t in self.tensors]
        return self.with_tensors(iter(as_rows))

    def rows(self, matrices: slice, rows: slice, piece: int) -> SecondMoment:
        """Return views of one piece of rows of these matrices, of what `as_matrices` gave."""
        if self.format.axis == "column":
            rows = slice(piece, piece + 1)
        return self.with_tensors(tensor[matrices, rows] for tensor in self.tensors)

    def matrices(self, start: int, stop: int) -> SecondMoment:
        """Return views of some matrices, of what `as_matrices` gave."""
        return self.with_tensors(tensor[start:stop] for tensor in self.tensors)

    def columns(self, piece: int) -> SecondMoment:
        """Return views of one piece of columns, of what `as_matrices` gave."""
        if self.format.axis == "row":
            return SecondMoment(self.values[..., piece : piece + 1], None, self.format)
        widths, size, scales = self.format.cols, self.format.block_size, self.scales
        start = sum(widths[:piece])
        if scales is not None and size is not None:
            first, count = sum(num_blocks(w, size) for w in widths[:piece]), num_blocks(widths[piece], size)
            scales = scales[..., first : first + count]
        return SecondMoment(self.values[..., start : start + widths[piece]], scales, self.format)


class Normalization(NamedTuple):
    """Numbers of whole matrices by which any part of them can be updated.

    Attributes:
        factors: fp32 [batch, rows, 1], [batch, 1, cols] or [batch, 1, 1], which the directions are multiplied by.
        new: fp32, the new second moment of rows [batch, rows, 1] or columns [batch, 1, cols], or the new scales of that
            of elements [batch, rows, blocks]; None where that is fp32.
    """

    factors: Tensor
    new: Tensor | None


def normalize(
    directions: Tensor, moments: Sequence[SecondMoment], options: SecondMomentOptions, backend: Backend | None
) -> Normalization:
    """Return what the second moments make of directions; nothing is changed.

    Args:
        directions: O of whole matrices, [batch, rows, cols].
        moments: theirs, as matrices, in the same order.
        options: the group's.
        backend: the kernels.
    """
    kernels, axis = kernels_for(directions.device, backend), moments[0].format.axis
    _, rows, cols = directions.shape
    new: Tensor | None
    if axis == "element":
        stats = kernels.second_moment_stats(directions, element_moment(moments, options))
        squares, plain = stats[:2].flatten(2).sum(2, dtype=torch.float64)
        new = None if moments[0].scales is None else stats[2]
        factors = directions.new_ones(len(directions), 1, 1, dtype=torch.float32)
    else:
        sums = kernels.direction_squares(directions, columns=axis == "column")
        count = cols if axis == "row" else rows
        old = torch.cat([moment.values for moment in moments]).flatten(1)
        new = old * options.beta2 + sums * ((1.0 - options.beta2) / count)
        divisor = root(new.clamp(min=options.eps)) if options.is_clamped else root(new) + options.eps
        factors = torch.where(divisor > 0, 1 / divisor, 0)
        squares, plain = (sums * factors * factors).sum(1, dtype=torch.float64), sums.sum(1, dtype=torch.float64)
        dim = 2 if axis == "row" else 1
        new, factors = new.unsqueeze(dim), factors.unsqueeze(dim)
    if options.rescale is not None:
        target = plain.sqrt() if options.rescale == "keep" else 0.2 * sqrt(rows * cols)
        factors = factors * torch.where(squares > 0, target / squares.sqrt(), 0).float().view(-1, 1, 1)
    return Normalization(factors, new)


def element_moment(moments: Sequence[SecondMoment], options: SecondMomentOptions, first_col: int = 0) -> ElementMoment:
    """Return second moments of elements as the kernels take them.

    Args:
        moments: of a batch, as matrices.
        options: the group's.
        first_col: the column of whole rows that is the first one here.
    """
    # A block size in fp32 too: the sums of `second_moment_stats` are by block.
    size = moments[0].format.block_size or DEFAULT_BLOCK_SIZE
    scales = [moment.scales for moment in moments if moment.scales is not None]
    steps = steps_of(torch.cat(scales)) if scales else None
    codes = [moment.values for moment in moments]
    return ElementMoment(codes, steps, options.beta2, options.eps, options.is_clamped, size, first_col)


def update_arguments(
    found: Normalization, moments: Sequence[SecondMoment], options: SecondMomentOptions, first_col: int = 0
) -> dict[str, Any]:
    """Return what `update_params` takes of it for these parts of the matrices, whose numbers are those of `found`.

    The second moments of elements are written by the update, all else by `write_`.
    """
    if moments[0].format.axis != "element":
        return {"factors": found.factors}
    return {
        "factors": found.factors,
        "moment": element_moment(moments, options, first_col),
        "inverses": None if found.new is None else inverses_of(found.new),
    }


def write_(moments: Sequence[SecondMoment], new: Tensor | None, skip: Tensor | None) -> None:
    """Write new second moments of rows or columns, or new scales; where `skip`, 0-d or [batch], is not 0, nothing."""
    is_over, skip = known_flag(skip, 1)
    if new is None or is_over:
        return
    targets = [moment.values if moment.scales is None else moment.scales for moment in moments]
    values = new if skip is None else torch.where(skip.view(-1, 1, 1) == 0, new, torch.cat(targets))
    torch._foreach_copy_(targets, values.split([len(target) for target in targets]))

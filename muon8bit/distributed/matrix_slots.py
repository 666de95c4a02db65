"""Matrices of a parameter, and the parts of each that every rank has."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import product
from math import prod

import torch

from ..config import SECOND_MOMENT_KEY
from ..step.second_moment import SecondMomentFormat
from .matrix_sharding import MatrixSharding, Region, Span
from .param_sharding import ParamSharding, Spans


@dataclass(frozen=True)
class MatrixSlot:
    """One matrix in a parameter.

    Attributes:
        lead: its index in the leading dimensions (none in a 2-D or flattened parameter).
        rows: the rows there that it consists of.
        cols: how many it has.
        piece: its number among the pieces of rows.
        sharding: where it lies.
    """

    lead: tuple[int, ...]
    rows: Span
    cols: int
    piece: int
    sharding: MatrixSharding


@cache
def matrix_slots(
    param: ParamSharding,
    flatten: bool,
    splits: tuple[int, ...] | None,
    second: SecondMomentFormat | None = None,
) -> tuple[MatrixSlot, ...]:
    """Return the matrices of a parameter that are orthogonalized one by one, in its order.

    Args:
        param: where the parameter lies.
        flatten: whether its first dimension is the rows of one matrix.
        splits: sizes of pieces of rows, None for one.
        second: the format of its second moment.
    """
    shape = param.shape
    lead_shape, num_rows = ((), shape[0]) if flatten else (shape[:-2], shape[-2])
    cols = prod(shape[1:]) if flatten else shape[-1]
    slots, shardings, vectors = list[MatrixSlot](), dict[MatrixSharding, MatrixSharding](), tuple[Spans, ...]()
    if second is not None and second.axis != "element":
        shape, _ = second.layout(torch.Size(param.shape))[SECOND_MOMENT_KEY]
        vectors = param.second_parts(SECOND_MOMENT_KEY, shape)
    for lead in product(*map(range, lead_shape)):
        start = 0
        for piece, size in enumerate(splits or (num_rows,)):
            rows = start, start + size
            start += size
            momenta, params = (
                tuple(_region(spans, lead, rows, cols, flatten) for spans in by_rank)
                for by_rank in (param.state_parts, param.param_parts)
            )
            held = tuple(_vector_span(spans, lead, rows, piece, second) for spans in vectors)
            sharding = MatrixSharding(momenta, params, held)
            # The same object for matrices that lie alike, which are then known by it.
            slots.append(MatrixSlot(lead, rows, cols, piece, shardings.setdefault(sharding, sharding)))
    return tuple(slots)


def _vector_span(
    spans: Spans, lead: tuple[int, ...], rows: Span, piece: int, second: SecondMomentFormat | None
) -> Span | None:
    """Return the rows or columns of one matrix whose numbers lie in these spans of a second moment."""
    if not all(start <= index < stop for index, (start, stop) in zip(lead, spans, strict=False)):
        return None
    down, across = spans[-2:]
    if second is not None and second.axis == "column":
        return across if down[0] <= piece < down[1] and across[0] < across[1] else None
    start, stop = max(down[0], rows[0]) - rows[0], min(down[1], rows[1]) - rows[0]
    return (start, stop) if start < stop and across[0] < across[1] else None


def _region(spans: Spans, lead: tuple[int, ...], rows: Span, cols: int, flatten: bool) -> Region | None:
    """Return the part of one matrix, in its own coordinates, that lies in these spans of the parameter."""
    if not all(start <= index < stop for index, (start, stop) in zip(lead, spans, strict=False)):
        return None
    row_span, col_span = (spans[0], (0, cols)) if flatten else spans[-2:]
    start, stop = max(row_span[0], rows[0]) - rows[0], min(row_span[1], rows[1]) - rows[0]
    if start >= stop or col_span[0] >= col_span[1]:
        return None
    return Region((start, stop), col_span)

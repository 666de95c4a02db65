"""The matrices in a parameter, and where each of them lies."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import product
from math import prod

from .matrix_sharding import MatrixSharding, Region, Span
from .param_sharding import ParamSharding, Spans


@dataclass(frozen=True)
class MatrixSlot:
    """One matrix in a parameter: its place in the leading dimensions (none in a 2-D or flattened parameter), its rows
    there, and where it lies."""

    lead: tuple[int, ...]
    rows: Span
    cols: int
    sharding: MatrixSharding


@cache
def places(layout: ParamSharding, flatten: bool, splits: tuple[int, ...] | None) -> tuple[MatrixSlot, ...]:
    """The matrices of a parameter that are orthogonalized one by one, in its order. `splits`: sizes of pieces of rows,
    None for one."""
    shape = layout.shape
    lead_shape, num_rows = ((), shape[0]) if flatten else (shape[:-2], shape[-2])
    cols = prod(shape[1:]) if flatten else shape[-1]
    found, shardings = list[MatrixSlot](), dict[MatrixSharding, MatrixSharding]()
    for lead in product(*map(range, lead_shape)):
        start = 0
        for size in splits or (num_rows,):
            rows = (start, start + size)
            start += size
            sharding = MatrixSharding(
                *(
                    tuple(_region(spans, lead, rows, cols, flatten) for spans in by_rank)
                    for by_rank in (layout.held, layout.wanted)
                )
            )
            sharding = shardings.setdefault(sharding, sharding)
            found.append(MatrixSlot(lead, rows, cols, sharding))
    return tuple(found)


def _region(spans: Spans, lead: tuple[int, ...], rows: Span, cols: int, flatten: bool) -> Region | None:
    """The part of one matrix, in its own coordinates, that lies in these spans of the parameter."""
    if not all(start <= index < stop for index, (start, stop) in zip(lead, spans, strict=False)):
        return None
    row_span, col_span = (spans[0], (0, cols)) if flatten else spans[-2:]
    start, stop = max(row_span[0], rows[0]) - rows[0], min(row_span[1], rows[1]) - rows[0]
    if start >= stop or col_span[0] >= col_span[1]:
        return None
    return Region((start, stop), col_span)

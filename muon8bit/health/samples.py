"""Choice of the matrices that are watched: the same ones in every run, spread over shapes, kinds and depth."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from math import prod
from typing import Any

from torch import Tensor

from .._text import template
from ..step.momentum import MomentumFormat
from ..step.options import FORMAT_KEYS, describe


@dataclass(frozen=True)
class WatchedMatrix:
    """Place of one matrix that is orthogonalized by itself.

    Attributes:
        name: the parameter's; a matrix of a stack and a piece of a fused weight are named behind it.
        param_name: the parameter's alone.
        has_name: that it is a name, and not a place in the groups.
        kind: equal for the same weight of other layers.
        group_index, param_index: the group, and the place of the parameter in it.
        matrix: the number of the matrix in a stack, else 0.
        piece: the number of the piece of a fused matrix, else 0.
        rows, cols: its shape.
    """

    name: str
    param_name: str
    has_name: bool
    kind: str
    group_index: int
    param_index: int
    matrix: int
    piece: int
    rows: int
    cols: int


def choose_matrices(groups: Sequence[Mapping[str, Any]], sample: int) -> list[WatchedMatrix]:
    """Return up to `sample` matrices whose momentum is in 8 bits.

    They take turns over shapes, those with the longest rows first, since a long block is where linear codes fail, and
    over the kinds of a shape. The n-th one is of the n-th part of the layers. Of a stack one matrix is a candidate.

    Args:
        groups: of the optimizer.
        sample: the number wanted; all are taken where there are fewer.
    """
    found = list(_candidates(groups))
    shapes: dict[tuple[int, int], dict[str, list[WatchedMatrix]]] = {}
    for of in sorted(found, key=lambda of: (-of.cols, -of.rows)):
        shapes.setdefault((of.rows, of.cols), {}).setdefault(of.kind, []).append(of)
    rounds = zip_longest(*(kinds.values() for kinds in shapes.values()))
    kinds = [layers for turn in rounds for layers in turn if layers is not None][:sample]
    chosen = [layers[(2 * n + 1) * len(layers) // (2 * len(kinds))] for n, layers in enumerate(kinds)]
    rest = [of for of in found if of not in chosen]
    return chosen + rest[:: max(1, len(rest) // max(1, sample - len(chosen)))][: sample - len(chosen)]


def _candidates(groups: Sequence[Mapping[str, Any]]) -> Iterator[WatchedMatrix]:
    for group_index, group in enumerate(groups):
        if group["algorithm"] != "muon":
            continue
        for param_index, param in enumerate(group["params"]):
            form = MomentumFormat.of(param.shape, *(group[key] for key in FORMAT_KEYS))
            if form.codebook is not None and param.numel():
                yield from _matrices_of(param, group, group_index, param_index)


def _matrices_of(
    param: Tensor, group: Mapping[str, Any], group_index: int, param_index: int
) -> Iterable[WatchedMatrix]:
    """Give the pieces of one matrix of a parameter; which matrix of a stack changes from one parameter to the next."""
    name, has_name = describe(dict(group), group_index, param_index), "param_names" in group
    flatten, is_rows = group["flatten"], group["split_dim"] == -2
    rows, cols = (param.shape[0], prod(param.shape[1:])) if flatten else param.shape[-2:]
    count = 1 if flatten else prod(param.shape[:-2])
    matrix = param_index % count
    place = f"{name}, matrix {matrix}" if count > 1 else name
    sizes = group["split_sizes"] or [rows if is_rows else cols]
    for piece, size in enumerate(sizes):
        full = f"{place}, piece {piece}" if len(sizes) > 1 else place
        kind = f"{template(name) if has_name else ''} {piece}"
        shape = (size, cols) if is_rows else (rows, size)
        yield WatchedMatrix(full, name, has_name, kind, group_index, param_index, matrix, piece, *shape)

"""AdamW's state in 8 bits, sharded like its parameter: 256 elements, in the order of indices, share a scale, and lie on
one rank. Then every rank steps its part as one process steps the whole, to the bit."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from math import prod

from ..config import ADAMW8_BLOCK_SIZE
from ..step import adamw8bit
from .param_sharding import ParamSharding, Spans


def with_scales(layout: ParamSharding, name: str) -> ParamSharding:
    """A layout of `layout.sharded` that knows where the scales lie.

    Raises:
        NotImplementedError: names a parameter of which blocks are cut, or whose scales cannot be sharded as it is.
    """
    found = _with_scales(layout)
    if found is None:
        raise NotImplementedError(
            f"{name} {layout.shape} is sharded as {layout.placements}, which cuts blocks of {ADAMW8_BLOCK_SIZE} "
            "elements that share a scale of adamw_bits=8: put it into a group of its own with adamw_bits=32, or shard "
            "it so that every part has a multiple of so many, in the order of its elements"
        )
    return found


@cache
def _with_scales(layout: ParamSharding) -> ParamSharding | None:
    shape = adamw8bit.scales_shape(layout.shape)
    if any((getattr(placement, "dim", None) or 0) >= len(shape) for placement in layout.placements):
        return None
    scales = layout.like(shape)
    if list(scales.held) != [_blocks(layout.shape, spans, shape) for spans in layout.held]:
        return None
    return replace(layout, scales_shape=shape, scales_part=scales.held[scales.rank])


def _blocks(shape: tuple[int, ...], spans: Spans, scales_shape: tuple[int, ...]) -> Spans | None:
    """The blocks in a part of a parameter, as a part of its scales; None where one is cut."""
    if len(scales_shape) == len(shape):
        lead, (start, stop), end = spans[:-1], spans[-1], shape[-1]
    else:
        pitch = prod(shape[1:])
        lead, (start, stop), end = (), (spans[0][0] * pitch, spans[0][1] * pitch), prod(shape)
    if any(bound % ADAMW8_BLOCK_SIZE and bound != end for bound in (start, stop)):
        return None
    return (*lead, (-(-start // ADAMW8_BLOCK_SIZE), -(-stop // ADAMW8_BLOCK_SIZE)))

"""Second moments of NorMuon8bit and AdaMuon8bit, checked and in the asked format.

Of rows and columns they are fp32 in every format. Of elements they are fp32, or codes that are linear in the square
root: decoding is exact, so that the next step is that of the 8-bit optimizer to the bit; encoding rounds the root by at
most half a step, 1/510 of the largest root of its block.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from muon8bit_kernels import num_blocks
from muon8bit_kernels.element_moment import inverses_of, root, steps_of
from torch import Tensor

from ..config import (
    DEFAULT_BLOCK_SIZE,
    SECOND_CODES_KEY,
    SECOND_KEYS,
    SECOND_MOMENT_KEY,
    SECOND_SCALES_KEY,
    why_damaged,
)
from ..step.options import MATRIX_DEFAULTS, state_format
from ..step.second_moment import SecondMoment, SecondMomentFormat
from .entries import Change, Entry, dense

# How others store them.
_UNQUANTIZED = {"bits": 32, "codebook": "linear", "block_size": DEFAULT_BLOCK_SIZE, **MATRIX_DEFAULTS}


def second_moment(
    entry: Entry, shape: torch.Size, options: Mapping[str, Any], changes: set[Change], *, is_new: bool
) -> dict[str, Tensor]:
    """Return the second moment of a matrix as a group with `options` stores it; empty without `second_moment`.

    Args:
        entry: the saved parameter.
        shape: its shape.
        options: of the group that it gets.
        changes: gets a change of format, a start at zero, and what is left out.
        is_new: it may start at zero where the saved state has none that fits.

    Raises:
        ValueError: names the parameter whose second moment is missing, foreign or damaged.
    """
    saved = _checked(entry, shape)
    before = "second_moment=None" if saved is None else _words(saved.format, entry.options)
    if options["second_moment"] is None:
        if saved is not None:
            changes.add(("the second moment was", before, "nothing, as Muon8bit has none without `second_moment`"))
        return {}
    format = SecondMomentFormat.of(shape, *state_format(options))
    if saved is not None and _numbers(saved.format) == _numbers(format):
        if saved.format.layout(shape) == format.layout(shape) and saved.format.block_size == format.block_size:
            return saved.to_state()
        changes.add(("the second moment was", before, _words(format, options)))
        return _encode(_decode(saved, shape), format)
    if not is_new and entry.dialect != "adamw":
        raise ValueError(
            f"state of {entry.where} has no second moment for second_moment={options['second_moment']!r}, as it was "
            f"saved with {before}: let it start at zero by new_second_moment=True (--new-second-moment); as an average "
            f"it forgets that in some {1 / (1 - options['beta2']):.0f} steps"
        )
    changes.add(("the second moment was", before, f"{_words(format, options)}, starting at zero"))
    return {key: torch.zeros(size, dtype=dtype) for key, (size, dtype) in format.layout(shape).items()}


def _words(format: SecondMomentFormat, options: Mapping[str, Any]) -> str:
    stored = "fp32" if format.block_size is None else f"8 bits, block_size={format.block_size}"
    return f"second_moment={options['second_moment']!r} in {stored}"


def _numbers(format: SecondMomentFormat) -> tuple[Any, ...]:
    """Return what the numbers are of: elements, or rows or columns of which pieces."""
    pieces = {"row": format.cols, "column": format.rows, "element": None}[format.axis]
    return format.axis, pieces


def _checked(entry: Entry, shape: torch.Size) -> SecondMoment | None:
    """Return the saved second moment; None where the saved group has none."""
    found, options = {key for key in entry.tensors if key in SECOND_KEYS}, entry.options
    is_ours = entry.dialect == "muon8bit"
    if not is_ours:  # theirs are floats, and may be missing
        options = {**_UNQUANTIZED, **options, "second_moment": options.get("second_moment") if found else None}
    kind = options.get("second_moment")
    format = None if kind is None else SecondMomentFormat.of(shape, *state_format(options))
    layout = {} if format is None else format.layout(shape)
    if found != layout.keys():
        listed = ", ".join(map(str, entry.tensors))
        expected = ", ".join(layout) or "none"
        raise ValueError(f"state of {entry.where} has {listed}; of a second moment its group asks for {expected}")
    tensors = {}
    for key, (size, dtype) in layout.items():
        value = dense(entry, key)
        if not is_ours and value.is_floating_point() and value.numel() == torch.Size(size).numel():
            value = value.float().reshape(size)
        tensors[key] = value
        if tuple(value.shape) != size or value.dtype != dtype:
            raise ValueError(
                f"state of {entry.where}: {key} is {value.dtype} {tuple(value.shape)}, expected {dtype} {size}"
            )
        if problem := why_damaged(key, value):
            raise ValueError(f"state of {entry.where}: {key} holds {problem}: the checkpoint is damaged")
    return None if format is None else SecondMoment.from_state(tensors, format)


def _decode(saved: SecondMoment, shape: torch.Size) -> Tensor:
    """Return second moments of elements, fp32, of the parameter's shape."""
    if saved.scales is None or saved.format.block_size is None:
        return saved.values
    matrices, pieces = saved.as_matrices(), []
    for piece in range(len(saved.format.cols)):
        part = matrices.columns(piece)
        assert part.scales is not None
        steps = steps_of(part.scales).repeat_interleave(saved.format.block_size, -1)
        pieces.append((part.values.float() * steps[..., : part.values.shape[-1]]).square_())
    return torch.cat(pieces, -1).reshape(shape)


def _encode(values: Tensor, format: SecondMomentFormat) -> dict[str, Tensor]:
    """Return the state of second moments of elements, fp32, of the parameter's shape."""
    if format.block_size is None:
        return {SECOND_MOMENT_KEY: values.contiguous()}
    size, codes, scales = format.block_size, torch.empty(values.shape, dtype=torch.uint8), []
    layout = format.layout(values.shape)
    roots = root(values.reshape(-1, sum(format.cols)))
    rows, start = codes.view(roots.shape), 0
    for width in format.cols:
        piece = roots[:, start : start + width]
        padded = torch.nn.functional.pad(piece, (0, num_blocks(width, size) * size - width))
        largest = padded.unflatten(1, (-1, size)).amax(2)
        inverses = inverses_of(largest).repeat_interleave(size, 1)[:, :width]
        rows[:, start : start + width] = (piece * inverses).round_().maximum((piece > 0).float()).to(torch.uint8)
        scales.append(largest)
        start += width
    return {SECOND_CODES_KEY: codes, SECOND_SCALES_KEY: torch.cat(scales, 1).view(layout[SECOND_SCALES_KEY][0])}

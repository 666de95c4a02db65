"""Both 8-bit codebooks: the value of each code, before it is multiplied by its block's scale.

`linear`: int8 codes -127..127, value `code / 127`. `dynamic`: uint8 codes 0..255 into the signed dynamic-tree map of
Dettmers et al. (arXiv 2110.02861): seven decades of 1, 2, 4, ... 64 levels a sign, zero, and one. Values that are never
negative have the unsigned map: seven decades of 2, 4, 8, ... 128 levels, zero, and one.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

Codebook: TypeAlias = Literal["linear", "dynamic"]

CODE_DTYPES: dict[str, torch.dtype] = {"linear": torch.int8, "dynamic": torch.uint8}
LINEAR_MAX = 127
# A block whose largest magnitude is below the smallest normal fp32 is stored as exact zeros.
SCALE_FLOOR = torch.finfo(torch.float32).tiny
_DECADES = 7


def _dynamic_values(signed: bool = True) -> Tensor:
    def fp32(*values: float) -> Tensor:  # whatever default dtype and device the caller's process has set
        return torch.tensor(values, dtype=torch.float32, device="cpu")

    one_tenth = fp32(0.1).item()  # fp32, held in fp64: each boundary below is rounded to fp32 once
    values = [fp32(0.0, 1.0)]
    for decade in range(_DECADES):
        levels = 2**decade if signed else 2 ** (decade + 1)
        step = (fp32(1.0) - fp32(0.1)).item() / levels
        index = torch.arange(levels + 1, dtype=torch.float64, device="cpu")
        from_below, from_above = one_tenth + index * step, 1.0 - (levels - index) * step
        boundaries = torch.where(index < (levels + 1) // 2, from_below, from_above).float()
        means = (boundaries[:-1] + boundaries[1:]) / 2
        means = means * fp32(10.0 ** (decade - _DECADES + 1))
        values += [means, -means] if signed else [means]
    return torch.cat(values).sort().values


def _dynamic_midpoints(signed: bool = True) -> Tensor:
    values = (_VALUES if signed else _UNSIGNED_VALUES).double()
    midpoints = ((values[:-1] + values[1:]) / 2).float()
    return torch.cat([midpoints, midpoints.new_tensor([torch.inf])])


def _dynamic_guesses() -> tuple[Tensor, Tensor]:
    lower = torch.arange(-32768, 32768, dtype=torch.int32, device="cpu") << 16
    lower[:32768] |= 0xFFFF  # negative numbers: the larger magnitude is the lower end
    codes = torch.bucketize(lower.view(torch.float32).nan_to_num(), _MIDPOINTS[:-1])
    return codes.to(torch.uint8), _MIDPOINTS[codes]


# Built at import, so that no mode of a later caller (fake tensors, inference) gets into them.
_VALUES = _dynamic_values()
_UNSIGNED_VALUES = _dynamic_values(signed=False)
_MIDPOINTS = _dynamic_midpoints()
_UNSIGNED_MIDPOINTS = _dynamic_midpoints(signed=False)
_GUESSES = _dynamic_guesses()
_copies: dict[tuple[int, torch.device], Tensor] = {}


def _on(table: Tensor, device: torch.device | str) -> Tensor:
    """Return the table on a device, copied there once."""
    device = torch.device(device)
    if device.type == "cpu":
        return table
    key = (id(table), device)
    if key not in _copies:
        copy = table.to(device)
        if type(copy) is not Tensor:  # a fake tensor must not outlive its mode
            return copy
        _copies[key] = copy
    return _copies[key]


def dynamic_map(device: torch.device | str = "cpu") -> Tensor:
    """Return the signed dynamic map, fp32 [256], ascending from -0.99297 to 1.0 (there is no -1.0).

    Do not write to it. It is equal bit for bit to `bitsandbytes.functional.create_dynamic_map()`, and made here so that
    a checkpoint does not depend on another library's version.
    """
    return _on(_VALUES, device)


def unsigned_dynamic_map(device: torch.device | str = "cpu") -> Tensor:
    """Return the unsigned dynamic map, fp32 [256], ascending from 0.0 and 3.25e-7 to 1.0.

    Do not write to it. It is equal bit for bit to `bitsandbytes.functional.create_dynamic_map(signed=False)`.
    """
    return _on(_UNSIGNED_VALUES, device)


def dynamic_midpoints(device: torch.device | str = "cpu") -> Tensor:
    """Return decision thresholds, fp32 [256]: entry i lies between map entries i and i + 1; the last is +inf.

    `code = number of midpoints < x`, so a value exactly on a midpoint takes the lower code. A midpoint is the exact
    mean rounded to fp32, hence within one fp32 unit of it either neighbour may be chosen.
    """
    return _on(_MIDPOINTS, device)


def unsigned_dynamic_midpoints(device: torch.device | str = "cpu") -> Tensor:
    """Return decision thresholds of the unsigned map, as `dynamic_midpoints` does for the signed one."""
    return _on(_UNSIGNED_MIDPOINTS, device)


def dynamic_guesses(device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Return first guesses of codes, uint8 [65536], and the midpoints above them, fp32 [65536].

    Entry 32768 + i is for the numbers in [-1, 1] whose upper 16 bits (sign, exponent, 7 bits of mantissa) are the int16
    i. They form an interval narrower than the map's spacing, so it holds at most one midpoint: the guess is the code of
    the interval's lower end, and one comparison with the midpoint finishes the encoding.
    """
    codes, midpoints = _GUESSES
    return _on(codes, device), _on(midpoints, device)


def zero_code(codebook: Codebook) -> int:
    """Return the code that decodes to 0.0; in the dynamic map, the 127 negative values come first."""
    return 0 if codebook == "linear" else 127

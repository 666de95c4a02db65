"""Parts of LoRA adapters, told by the names and modules that peft makes; peft is not imported."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from .fused import Split, looks_fused
from .projections import layer_split, split_of

# `<layer>.lora_<part>.<adapter>`, then the name inside a module, if the part is one: `q_proj.lora_A.default.weight`.
_PART = re.compile(r"(?:(?P<layer>.*)\.)?lora_(?P<part>[A-Za-z_]+)\.[^.]+(?:\.\w+)?")


@dataclass(frozen=True)
class Part:
    """A parameter of an adapter.

    `kind` is what follows `lora_` ("A", "B", "embedding_A", "magnitude_vector", ...), `path` and `layer` the adapted
    layer's, `inner` that without its adapters, `base` the weight that it adapts, if it has one called `weight`;
    `num_experts` over 1 where it holds a factor for each of stacked experts, `num_blocks` of a block diagonal one.
    """

    kind: str
    path: str
    layer: nn.Module
    inner: nn.Module
    base: Tensor | None
    num_experts: int
    num_blocks: int


def is_adapter(name: str) -> bool:
    """Return whether the parameter `name` belongs to a LoRA adapter."""
    return _PART.fullmatch(name) is not None


def adapter_part(name: str, modules: Mapping[str, nn.Module]) -> Part | None:
    """Return the part of a LoRA adapter that the parameter `name` is, or None."""
    match = _PART.fullmatch(name)
    if match is None:
        return None
    path = match["layer"] or ""
    layer = base = modules[path]
    while isinstance(inner := getattr(base, "base_layer", None), nn.Module):
        base = inner
    weight = getattr(base, "weight", None)
    num_experts = getattr(layer, "num_experts", 1) if hasattr(layer, "parameter_name") else 1  # peft's ParamWrapper
    num_blocks = getattr(modules[name.rpartition(".")[0]], "nblocks", 1)  # peft's BlockDiagonalLinear
    weight = weight if isinstance(weight, Tensor) else None
    return Part(match["part"], path, layer, base, weight, num_experts, num_blocks)


def factor_split(part: Part, shape: Sequence[int], modules: Mapping[str, nn.Module], *, is_told: bool) -> Split | None:
    """Return the pieces of the factor A or B of this shape, along its rows; None if it is one matrix.

    A over stacked experts, [experts * r, in], and the blocks of a block diagonal factor lie one after the other
    (peft 0.21, `ParamWrapper` and `BlockDiagonalLinear`). The rows of B, [out, r], are those of the fused base weight
    where its layout is known; `is_told` as for `split_of`.
    """
    num_pieces = part.num_blocks if part.num_blocks > 1 else part.num_experts
    if num_pieces > 1:
        return (shape[0] // num_pieces,) * num_pieces, -2
    if part.kind == "A":
        return None
    if is_told and isinstance(part.inner, nn.MultiheadAttention):  # peft adapts its in_proj_weight
        return layer_split(part.inner, shape[0])
    base_shape = (shape[0], int(getattr(part.layer, "in_features", 1)))
    if getattr(part.layer, "fan_in_fan_out", False):
        base_shape = (base_shape[1], base_shape[0])
    split = split_of(f"{part.path}.weight", base_shape, modules, is_told=is_told)
    return None if split is None else (split[0], -2)


def looks_fused_factor(part: Part, shape: Sequence[int]) -> bool:
    """Return whether B [out, r] seems to hold several matrices; A, whose input is shared, never does."""
    return part.kind == "B" and looks_fused(
        f"{part.path}.weight", (shape[0], int(getattr(part.layer, "in_features", 1)))
    )

"""A model's configuration at another width, by which rates are transferred. No torch in here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from finetune.config.errors import InputError

# Keys of a config.json, with the names that older classes have for them.
WIDTH = ("hidden_size", "n_embd")
HEADS = ("num_attention_heads", "n_head")
KV_HEADS = ("num_key_value_heads",)
INNER = ("intermediate_size", "n_inner", "moe_intermediate_size", "shared_expert_intermediate_size")
SCALED = (*WIDTH, *HEADS, *KV_HEADS, *INNER)


def model_of_width(model: Mapping[str, Any], width: int) -> dict[str, Any]:
    """Return a model's configuration at another width.

    Heads, KV heads and intermediate sizes (dense, of an expert, of shared experts) are in proportion to the width.
    An intermediate size is rounded to a multiple of 8 where the model's is one. KV heads stay where the proportion is
    no whole number and they divide the heads. All else stays: layers, vocabulary, latents, number of experts, and the
    size of a head, also where a class derives it from width and heads.

    Args:
        model: content of a config.json, which states its width, heads and intermediate sizes.
        width: hidden size. The model's own gives the model itself.

    Raises:
        InputError: a width at which the model has no whole number of heads; names the nearest that have. A size that
            the model does not state.
    """
    base, heads = (_stated(model, names) for names in (WIDTH, HEADS))
    if width <= 0:
        raise InputError("--width", f"{width} must be above 0")
    if not _fits(model, width):
        step = base // math.gcd(base, heads)
        top = width - width % step
        below = next((w for w in range(top, 0, -step) if _fits(model, w)), None)
        above = next(w for w in range(top + step, top + base + 2 * step, step) if _fits(model, w))
        kv = next((f" and {model[key]} KV heads" for key in KV_HEADS if model.get(key)), "")
        nearest = " and ".join(str(w) for w in (below, above) if w)
        raise InputError(
            "--width",
            f"the model has {heads} heads{kv} at width {base}, which is no whole number of them at {width}; the "
            f"nearest that work: {nearest}",
        )
    sized = dict(model)
    for key, value in model.items():
        if key in WIDTH:
            sized[key] = width
        elif key in HEADS:
            sized[key] = value * width // base
        elif key in KV_HEADS and value is not None:
            sized[key] = value * width // base if value * width % base == 0 else value
        elif key in INNER and value is not None:
            unit = math.gcd(value, 8)
            sized[key] = max(unit, round(value * width / base / unit) * unit)
    return sized


def _stated(model: Mapping[str, Any], names: tuple[str, ...]) -> int:
    """Return the size that the model has under one of these names."""
    value = next((model[name] for name in names if name in model), None)
    if type(value) is not int or value <= 0:
        raise InputError("--width", f"the model states no {names[0]}, which is scaled; write it into the model")
    return value


def _fits(model: Mapping[str, Any], width: int) -> bool:
    base, heads = (_stated(model, names) for names in (WIDTH, HEADS))
    kv_heads = next((model[key] for key in KV_HEADS if model.get(key)), None)
    if heads * width % base:
        return False
    return kv_heads is None or kv_heads * width % base == 0 or heads * width // base % kv_heads == 0

"""The state of an AdamW over the whole model, from which a Muon8bit starts: torch's, or bitsandbytes' in 32 or 8 bits.

    AdamW       exp_avg <- beta1 exp_avg + (1 - beta1) g
    Muon8bit    m       <- beta  m       + (1 - beta)  g

Both are averages of gradients, of one scale, neither corrected for its start at zero: exp_avg is taken as the first
momentum as it is. Only its memory is shorter: 10 steps at beta1 = 0.9, 20 at beta = 0.95. exp_avg_sq of such a
parameter is dropped; parameters that AdamW keeps have their whole state.

Source: torch.optim.AdamW; bitsandbytes 0.50 `Optimizer2State`, whose maps are those of `muon8bit_kernels`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from muon8bit_kernels import dynamic_map, unsigned_dynamic_map
from torch import Tensor

from ..config import (
    BUFFER_KEY,
    EXP_AVG_CODES_KEY,
    EXP_AVG_KEY,
    EXP_AVG_SCALES_KEY,
    EXP_AVG_SQ_CODES_KEY,
    EXP_AVG_SQ_KEY,
    EXP_AVG_SQ_SCALES_KEY,
)
from ..step import adamw8bit
from .entries import Entry, Group, saved_names, saved_state

_NESTED = "__bnb_optimizer_quant_state__"
_MAPS = {"qmap1": dynamic_map, "qmap2": unsigned_dynamic_map}
_32_BITS = {"state1": EXP_AVG_KEY, "state2": EXP_AVG_SQ_KEY}
_8_BITS = {"state1": EXP_AVG_CODES_KEY, "state2": EXP_AVG_SQ_CODES_KEY}
_8_BITS |= {"absmax1": EXP_AVG_SCALES_KEY, "absmax2": EXP_AVG_SQ_SCALES_KEY}


def adamw_group(group: Mapping[str, Any], states: Mapping[Any, Any], where: str, given: Iterator[str] | None) -> Group:
    """Return a group saved by an AdamW.

    Raises:
        ValueError: names the group that another optimizer saved, that has no names, or was stepped in another way.
    """
    if "algorithm" in group:
        raise ValueError(f"{where} was saved by Muon8bit: give source (--from) muon8bit")
    if "betas" not in group:
        raise ValueError(f"{where} has no 'betas': it was not saved by an AdamW")
    is_decoupled = group.get("decoupled_weight_decay", True) or not group.get("weight_decay")
    refused = [key for key in ("amsgrad", "maximize") if group.get(key)] + ["L2 weight decay"] * (not is_decoupled)
    if refused:
        raise ValueError(f"{where} was stepped with {', '.join(refused)}: start with a fresh optimizer")
    entries = []
    for key, name in zip(group["params"], saved_names(group, where, given), strict=True):
        if name is None:
            raise ValueError(
                f"{where} has no 'param_names', and parameters are matched by name: give names (--names), one a saved "
                "parameter in the order of AdamW's groups; only of a single group that is the order of "
                "model.named_parameters()"
            )
        state = _in_our_words(saved_state(states, key, name), name)
        entries.append(Entry(name, name, key, "adamw", state, {"betas": group["betas"]}, "adamw"))
    return Group("adamw", {}, entries)


def _in_our_words(state: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the state of a parameter under Muon8bit's keys.

    Raises:
        ValueError: for codes of bitsandbytes' in other maps, or in blocks of another size.
    """
    state = {**{key: value for key, value in state.items() if key != _NESTED}, **state.get(_NESTED, {})}
    if "state1" not in state:
        return state
    for key, values in _MAPS.items():
        saved = state.pop(key, None)
        if saved is not None and not torch.equal(saved.cpu(), values(torch.device("cpu"))):
            raise ValueError(f"state of {name}: {key} is not the dynamic map of bitsandbytes' AdamW8bit")
    codes = state["state1"]
    if not isinstance(codes, Tensor) or codes.dtype != torch.uint8:
        return {_32_BITS.get(key, key): value for key, value in state.items()}
    shape = adamw8bit.scales_shape(codes.shape)
    for key in ("absmax1", "absmax2"):
        scales = state.get(key)
        if not isinstance(scales, Tensor) or scales.shape.numel() != torch.Size(shape).numel():
            raise ValueError(f"state of {name}: {key} has not one value for each block of 256 elements")
        state[key] = scales.reshape(shape)
    return {_8_BITS.get(key, key): value for key, value in state.items()}


def first_momentum(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return AdamW's exp_avg as a momentum in fp32; `state` is checked."""
    values = state[EXP_AVG_KEY] if EXP_AVG_KEY in state else adamw8bit.decode(state)[EXP_AVG_KEY]
    return {BUFFER_KEY: values.float().contiguous()}

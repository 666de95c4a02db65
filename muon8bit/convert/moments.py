"""AdamW's moments, fp32 or in 8 bits, checked and in the asked format."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..config import EXP_AVG_CODES_KEY, EXP_AVG_KEY, EXP_AVG_SQ_CODES_KEY, EXP_AVG_SQ_KEY, why_damaged
from ..step import adamw, adamw8bit
from .entries import Change, Entry, dense


def moments(entry: Entry, bits: int, changes: set[Change]) -> dict[str, Tensor]:
    """Return AdamW's state as a group with `adamw_bits=bits` stores it: step 0-d.

    A change of bits is added to `changes`.

    Raises:
        ValueError: names the parameter and the key that is missing, foreign or damaged.
    """
    state = checked_moments(entry)
    step = entry.tensors.get("step")
    if isinstance(step, int | float):
        step = torch.tensor(step, dtype=torch.float32, device="cpu")
    elif not isinstance(step, Tensor) or step.numel() != 1:
        raise ValueError(f"state of {entry.where}: step is {step!r}, expected a number")
    saved_bits = 8 if adamw.is_8bit(state) else 32
    state = state if saved_bits == 8 else {key: value.float() for key, value in state.items()}
    if adamw8bit.is_8bit(state[EXP_AVG_CODES_KEY if saved_bits == 8 else EXP_AVG_KEY].shape, bits) != (saved_bits == 8):
        state = adamw8bit.decode(state) if saved_bits == 8 else adamw8bit.encode(state)
        changes.add(("AdamW's moments were", f"adamw_bits={saved_bits}", f"adamw_bits={40 - saved_bits}"))
    step = step.detach()
    if problem := why_damaged("step", step):
        raise ValueError(f"state of {entry.where}: step holds {problem}: the checkpoint is damaged")
    return {"step": step.float().reshape(()), **state}


def checked_moments(entry: Entry) -> dict[str, Tensor]:
    """Return AdamW's two moments as they are saved; of bitsandbytes' second one without the code 0.

    Its kernels round a small second moment to 0, by which the next step divides. The smallest code stands for it here.
    """
    state = {key: dense(entry, key) for key in entry.tensors if key != "step"}
    _check(entry, state)
    if entry.dialect == "adamw" and EXP_AVG_SQ_CODES_KEY in state:
        state[EXP_AVG_SQ_CODES_KEY] = state[EXP_AVG_SQ_CODES_KEY].clamp(min=1)
    return state


def _check(entry: Entry, state: Mapping[str, Tensor]) -> None:
    """Raise ValueError for what is not AdamW's two moments: floats or, saved by Muon8bit, in 8 bits."""
    listed = ", ".join(map(str, entry.tensors))
    if EXP_AVG_CODES_KEY in state and entry.dialect in ("muon8bit", "adamw"):
        expected = adamw8bit.layout(state[EXP_AVG_CODES_KEY].shape)
        if {key: (tuple(value.shape), value.dtype) for key, value in state.items()} != expected:
            raise ValueError(f"state of {entry.where} has {listed}; in 8 bits, AdamW's has {expected}")
    elif state.keys() != {EXP_AVG_KEY, EXP_AVG_SQ_KEY}:
        raise ValueError(f"state of {entry.where} has {listed}; AdamW's has step, exp_avg, exp_avg_sq")
    elif state[EXP_AVG_KEY].shape != state[EXP_AVG_SQ_KEY].shape:
        raise ValueError(f"state of {entry.where}: exp_avg and exp_avg_sq differ in shape")
    for key, value in state.items():
        if problem := why_damaged(key, value):
            raise ValueError(f"state of {entry.where}: {key} holds {problem}: the checkpoint is damaged")

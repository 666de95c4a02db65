"""The states in an optimizer's file, parameter by parameter: whose they are, and what was predicted for them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import (
    BITS,
    BLOCK_SIZES,
    BUFFER_KEY,
    CODEBOOKS,
    DYNAMIC_CODES_KEY,
    EXP_AVG_CODES_KEY,
    EXP_AVG_KEY,
    EXP_AVG_SQ_KEY,
    LINEAR_CODES_KEY,
    MIN_ADAMW8_ELEMENTS,
    SECOND_MOMENTS,
)
from ..report import STEP_BYTES, bnb_bytes
from ..step.local_params import muon_layout
from ..step.options import FORMAT_KEYS, MATRIX_DEFAULTS, SECOND_MOMENT_DEFAULTS, state_format
from . import saved
from .optimizers import OURS, Param, layout_bytes, moments_sizes

_BNB_KEY = "__bnb_optimizer_quant_state__"
_ADAMW_STATE = {"step", EXP_AVG_KEY, EXP_AVG_SQ_KEY}


@dataclass(frozen=True)
class StateEntry:
    """State of a parameter; `name`: None where the optimizer saved none; `has_weight`: its weight's shape is known."""

    name: str | None
    param: Param
    format: str
    tensors: Any
    predicted_bytes: int
    has_weight: bool


def load(file: Path) -> Any:
    """Load what torch.save wrote, its tensors mapped from the file.

    Raises:
        ValueError: torch.save did not write this file, or the file has objects that only code of their own reads.
    """
    try:
        return torch.load(file, mmap=True, weights_only=True, map_location="cpu")
    except Exception as error:  # whatever torch meets in a file that is none of its own
        unsafe = re.search(r"Unsupported global: GLOBAL (\S+)|Unsupported class (\S+)", str(error))
        if unsafe:
            raise ValueError(
                f"{file}: holds an object of {unsafe[1] or unsafe[2]}, and code in files is not run; save the "
                "optimizer's state_dict() in a file of its own, and give that"
            ) from None
        raise _no_state_dict(file, error) from None


def _no_state_dict(file: Path, error: Exception) -> ValueError:
    reason = " ".join(str(error).split())[:120] or type(error).__name__
    return ValueError(f"{file}: no optimizer's state_dict as torch.save writes it ({reason})")


def entries(file: Path, loaded: Any, weights: saved.SavedWeights | None) -> Iterator[StateEntry]:
    """Yield every state in a loaded file, of all optimizers there.

    Raises:
        ValueError: there is no optimizer, or a state is of none that is known.
    """
    try:
        found = [
            (one["state"], index, name, group)
            for one in _state_dicts(loaded)
            for group in one["param_groups"]
            for index, name in zip(
                group["params"], group.get("param_names") or [None] * len(group["params"]), strict=True
            )
        ]
    except Exception as error:  # whatever a file has under these keys
        raise _no_state_dict(file, error) from None
    names = [str(name) for _, _, name, _ in found if name is not None]
    shapes = {} if weights is None else saved.shapes_by_name(names, weights)
    for state, index, name, group in found:
        if index in state:
            where = f"{file}: parameter {index if name is None else name}"
            shape = shapes.get(str(name)) if name is not None else None
            try:
                entry = _entry(where, name, shape, state[index], group)
            except (TypeError, KeyError, IndexError, AttributeError, RuntimeError) as error:
                raise ValueError(
                    f"{where}: its state or its group has a value that no optimizer saves there ({error!r}); the file "
                    "is damaged, or was changed"
                ) from None
            yield entry


def _state_dicts(loaded: Any) -> list[Mapping[str, Any]]:
    """Return the optimizers' state dicts of a loaded file.

    The file is a state dict itself, or a dict such as `{"model": ..., "optimizer": ...}` whose values are searched,
    alone or in lists as Lightning's `optimizer_states`.
    """

    def is_one(value: Any) -> bool:
        if not isinstance(value, Mapping):
            return False
        return isinstance(value.get("state"), Mapping) and isinstance(value.get("param_groups"), (list, tuple))

    if not isinstance(loaded, Mapping):
        raise TypeError(f"it holds a {type(loaded).__name__}")
    values = [loaded] if is_one(loaded) else list(loaded.values())
    found = [one for value in values for one in (value if isinstance(value, list) else [value]) if is_one(one)]
    if not found:
        keys = ", ".join(map(str, list(loaded)[:5])) or "no key"
        raise KeyError(f"it has {keys}, and no `state` with `param_groups` in any of them")
    return found


def _is_known(key: str | None, state: Mapping[str, Any], tensors: Mapping[str, Any], group: Mapping[str, Any]) -> bool:
    """Check whether the keys of a state and its group are those of AdamW or a Muon, and of no other optimizer."""
    if key is None or "algorithm" in group:
        return key is not None
    if key == EXP_AVG_KEY:
        is_adamw = (
            "betas" in group
            and group.get("decoupled_weight_decay", True)
            and ("amsgrad" in group or "use_muon" in group)
        )
        return bool(is_adamw and EXP_AVG_SQ_KEY in state and state.keys() <= _ADAMW_STATE)
    if key == "state1":
        return (
            "betas" in group
            and isinstance(tensors.get("state2"), Tensor)
            and (tensors[key].dtype == torch.uint8 or tensors[key].numel() < MIN_ADAMW8_ELEMENTS)
        )
    if key == BUFFER_KEY:
        return state.keys() <= {BUFFER_KEY, "use_muon"} and ("ns_steps" in group or bool(group.get("use_muon")))
    return False


def _entry(
    where: str,
    saved_name: str | None,
    shape: tuple[int, ...] | None,
    state: Mapping[str, Any],
    group: Mapping[str, Any],
) -> StateEntry:
    """Describe one parameter's state by its keys."""
    tensors = {**state, **state.get(_BNB_KEY, {})}
    keys = (LINEAR_CODES_KEY, DYNAMIC_CODES_KEY, BUFFER_KEY, EXP_AVG_KEY, EXP_AVG_CODES_KEY, "state1")
    key = next((key for key in keys if isinstance(tensors.get(key), Tensor)), None)
    if key is None or not _is_known(key, state, tensors, group):
        options = ", ".join(sorted(str(option) for option in group if option not in ("params", "param_names")))
        raise ValueError(
            f"{where}: its state ({', '.join(map(str, state)) or 'empty'}; group: {options or 'no option'}) is of no "
            "optimizer known here: Muon8bit, torch.optim.Muon, AdamW or bitsandbytes' 8-bit AdamW"
        )
    first, has_weight = tensors[key], shape is not None
    shape = tuple(first.shape) if shape is None else shape
    num_elements, is_ours = math.prod(shape), "algorithm" in group
    if key == EXP_AVG_CODES_KEY:
        name, predicted = "adamw8bit", sum(moments_sizes(shape, 8))
    elif key == EXP_AVG_KEY:
        step = STEP_BYTES if isinstance(state.get("step"), Tensor) else 0
        name, predicted = "adamw", 2 * num_elements * first.dtype.itemsize + step
    elif key == "state1":
        name, predicted = "adamw8bit", bnb_bytes(num_elements)
    elif is_ours:
        full = {**MATRIX_DEFAULTS, **SECOND_MOMENT_DEFAULTS, **group}
        bits, codebook, block_size, _ = (full[key] for key in FORMAT_KEYS)
        moment = full["second_moment"]
        is_known = bits in BITS and codebook in CODEBOOKS and block_size in BLOCK_SIZES
        if not is_known or moment not in (None, *SECOND_MOMENTS):
            values = f"bits={bits}, codebook={codebook!r}, block_size={block_size} and second_moment={moment!r}"
            raise ValueError(
                f"{where}: its group has {values}, which are none known here; the file is damaged or newer"
            )
        name = "muon8bit" if bits == 8 else "muon"
        if moment is not None:
            name = "adamuon8bit" if moment == "element" else "normuon8bit"
        predicted = sum(layout_bytes(muon_layout(torch.Size(shape), *state_format(full))))
    else:
        name, predicted = ("muon" if first.dtype == torch.float32 else "muon_bf16"), num_elements * first.dtype.itemsize
    param = Param(where, shape, torch.float32, "muon" in name, flatten=bool(group.get("flatten")))
    return StateEntry(saved_name, param, name, tensors, predicted, has_weight)


def optimizer_of(formats: set[str]) -> str:
    """Return which of `OPTIMIZERS` or `FAMILY` has states of all these formats.

    A second moment of elements is called AdaMuon8bit's, any other NorMuon8bit's, with 32 bits too.
    """
    kinds = ("adamuon8bit", "normuon8bit", "muon8bit", "muon_bf16", "muon")
    muon = next((name for name in kinds if name in formats), None)
    if muon in OURS and "adamw8bit" in formats:
        return f"{muon}+adamw8bit"
    return muon or ("adamw8bit" if "adamw8bit" in formats else "adamw")

"""A saved optimizer as groups of entries, in Muon8bit's terms: what every conversion goes through."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..choices import Dialect

Change: TypeAlias = tuple[str, str, str]  # what was converted, from which format, to which


@dataclass(frozen=True)
class Entry:
    """The saved state of one parameter.

    Attributes:
        name: the parameter's, None where the checkpoint has none.
        where: how errors call it.
        key: its id in the state dict, an index or a name.
        algorithm: `"muon"` or `"adamw"`.
        tensors: its state by key; empty if it never had a gradient. Not checked yet.
        options: its group's hyper-parameters under Muon8bit's names, with those of the storage where Muon8bit saved it.
        dialect: who saved it; `"heavy-ball"` momenta are those of Muon8bit times 1 / (1 - options["momentum"]).
        shape: of the parameter to which the state shall go, None where it is not known.
    """

    name: str | None
    where: str
    key: int | str
    algorithm: str
    tensors: Mapping[str, Any]
    options: dict[str, Any]
    dialect: Dialect
    shape: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Group:
    """Entries that share hyper-parameters.

    `part` is the state dict that it belongs to: `"muon"` or `"adamw"` where there are two, else empty.
    """

    algorithm: str
    options: dict[str, Any]
    entries: list[Entry]
    part: str = ""


def dense(entry: Entry, key: str) -> Tensor:
    """Return a tensor of the entry's state, which must be whole and dense."""
    value = entry.tensors[key]
    if hasattr(value, "placements"):
        raise ValueError(
            f"state of {entry.where}: {key} is a DTensor: convert a full state dict (full_state_dict=True)"
        )
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta:
        raise ValueError(f"state of {entry.where}: {key} is a {type(value).__name__}, expected a dense tensor")
    return value.detach()


def is_finite(values: Tensor) -> bool:
    """Return whether no element is NaN or Inf; without temporaries, which isfinite() has."""
    return values.numel() == 0 or all(bool(bound.isfinite()) for bound in values.aminmax())


def saved_names(group: Mapping[str, Any], where: str, given: Iterator[str] | None) -> list[str | None]:
    """Return a name for each parameter: as given, or saved, or its key, or None."""
    keys = group["params"]
    if given is not None:
        names = [name for _, name in zip(keys, given, strict=False)]
        if len(names) < len(keys):
            raise ValueError(f"there are fewer names than saved parameters: they end in {where}")
        return list(names)
    saved = group.get("param_names", [key if isinstance(key, str) else None for key in keys])
    if not isinstance(saved, Sequence) or not all(isinstance(name, str | None) for name in saved):
        raise ValueError(f"{where} has 'param_names' that are no names: {saved!r}")
    if len(saved) != len(keys):
        raise ValueError(f"{where} has {len(saved)} 'param_names' for {len(keys)} parameters")
    return list(saved)


def saved_state(states: Mapping[Any, Any], key: int | str, where: str) -> Mapping[str, Any]:
    """Return what is saved of a parameter; empty if that is nothing."""
    state = states.get(key, {})
    if not isinstance(state, Mapping):
        raise ValueError(f"state of {where} is a {type(state).__name__}, expected a mapping of tensors")
    return state

"""A checkpoint's bytes beside what was predicted: the state of every optimizer in it, and the weights that lie by it.

Measured are true bytes, each storage once. Predicted is what `optimizers` says for the shapes: those of the weights,
where the optimizer knows their names and they lie beside it, else those of the state. Nothing is loaded into memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..report import BNB_MAPS_BYTES
from . import saved, states
from .optimizers import OPTIMIZERS, state_bytes


@dataclass(frozen=True)
class CheckpointPart:
    """`measured_bytes` and `predicted_bytes` of the state of one algorithm ("muon", "adamw"), or of the weights."""

    name: str
    num_parameters: int
    measured_bytes: int
    predicted_bytes: int

    @property
    def difference_bytes(self) -> int:
        """Measured less predicted bytes."""
        return self.measured_bytes - self.predicted_bytes


@dataclass(frozen=True)
class Report:
    """Bytes of a checkpoint, measured and predicted.

    Attributes:
        path: as it was given.
        optimizer: of `OPTIMIZERS` or `FAMILY`.
        state: parts by algorithm.
        weights: None where the checkpoint has no file of them.
        others: bytes of state that each of `OPTIMIZERS` would take for the same parameters; the Muons only where the
            checkpoint is one of theirs.
        notes: sentences on what the predictions rest on.
    """

    path: Path
    optimizer: str
    state: tuple[CheckpointPart, ...]
    weights: CheckpointPart | None
    others: dict[str, int]
    notes: tuple[str, ...] = ()

    @property
    def total(self) -> CheckpointPart:
        """All of the state."""
        return CheckpointPart(
            "state in all",
            sum(part.num_parameters for part in self.state),
            sum(part.measured_bytes for part in self.state),
            sum(part.predicted_bytes for part in self.state),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able record.

        Its keys are `path`, `optimizer`, `state`, `weights` (None where the checkpoint has no file of them), `parts`
        (by algorithm), `optimizers` ({name: {state_bytes}}) and `notes`. `state`, `weights` and each of `parts` are
        {num_parameters, measured_bytes, predicted_bytes, difference_bytes}.
        """
        return {
            "path": str(self.path),
            "optimizer": self.optimizer,
            "state": _part_dict(self.total),
            "weights": None if self.weights is None else _part_dict(self.weights),
            "parts": {part.name: _part_dict(part) for part in self.state},
            "optimizers": {name: {"state_bytes": num_bytes} for name, num_bytes in self.others.items()},
            "notes": list(self.notes),
        }


def _part_dict(part: CheckpointPart) -> dict[str, int]:
    names = ("num_parameters", "measured_bytes", "predicted_bytes", "difference_bytes")
    return {name: getattr(part, name) for name in names}


def report(path: Path) -> Report:
    """Describe a saved optimizer state: its bytes, measured and predicted.

    Args:
        path: a file of `torch.save(optimizer.state_dict())`, alone or under a key of a dict; a folder of Accelerate,
            the Trainer or Lightning that holds one; or a run's folder, whose newest complete checkpoint is taken.

    Raises:
        ValueError: names the file, or the parameter whose state is no known optimizer's.
    """
    files, folder = saved.find(path)
    weights: saved.SavedWeights | str = (None if folder is None else saved.beside(folder)) or ""
    entries: list[states.StateEntry] = []
    for file in files:
        loaded = states.load(file)
        weights = saved.inside(file, loaded) if isinstance(weights, str) else weights
        entries += states.entries(file, loaded, None if isinstance(weights, str) else weights)
    if not entries:
        raise ValueError(f"{files[0]}: the optimizer has no state yet; save it after a step")
    parts = []
    maps = BNB_MAPS_BYTES if any("qmap1" in entry.tensors for entry in entries) else 0
    seen: set[int] = set()
    for name in ("muon", "adamw"):
        members = [entry for entry in entries if entry.param.is_muon == (name == "muon")]
        if members:
            measured = sum(_storage_bytes(entry.tensors, seen) for entry in members)
            predicted = sum(entry.predicted_bytes for entry in members) + (maps if name == "adamw" else 0)
            parts.append(CheckpointPart(name, sum(entry.param.num_elements for entry in members), measured, predicted))
    params = [entry.param for entry in entries]
    is_routed = any(param.is_muon for param in params)  # else nothing says what is a hidden matrix
    others = {name: state_bytes(name, params) for name in OPTIMIZERS if is_routed or "muon" not in name}
    part = None
    if not isinstance(weights, str):
        part = CheckpointPart("weights", weights.num_elements, weights.measured_bytes, weights.predicted_bytes)
    name = states.optimizer_of({entry.format for entry in entries})
    return Report(path, name, tuple(parts), part, others, _notes(weights, entries))


def _notes(weights: saved.SavedWeights | str, entries: Sequence[states.StateEntry]) -> tuple[str, ...]:
    """Say whose shapes the predictions are for."""
    if isinstance(weights, str):
        return (f"The state is predicted for its own shapes: {weights}.",)
    unknown = [entry for entry in entries if not entry.has_weight]
    note = f"Weights: {weights.where}; the state is predicted for their shapes"
    if not unknown:
        return (f"{note}.",)
    why = "the optimizer saved no names" if unknown[0].name is None else f"they have no {unknown[0].name}"
    return (f"{note}, for its own where they are not known ({len(unknown)} of {len(entries)} parameters: {why}).",)


def _storage_bytes(tensors: Mapping[str, Any], seen: set[int]) -> int:
    num_bytes = 0
    for tensor in tensors.values():
        if isinstance(tensor, Tensor) and (address := tensor.untyped_storage().data_ptr()) not in seen:
            seen |= {address} if address else set()
            num_bytes += tensor.untyped_storage().nbytes()
    return num_bytes

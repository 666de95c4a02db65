"""A checkpoint's bytes beside what was predicted: the state of every optimizer in it, and the weights that lie by it.

Measured are true bytes, each storage once. Predicted is what `optimizers` says for the shapes: those of the weights,
where the optimizer knows their names and they lie beside it, else those of the state. Nothing is loaded into memory.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import (
    BUFFER_KEY,
    DYNAMIC_CODES_KEY,
    EXP_AVG_CODES_KEY,
    EXP_AVG_KEY,
    EXP_AVG_SQ_KEY,
    LINEAR_CODES_KEY,
    MIN_ADAMW8_ELEMENTS,
)
from ..groups import FORMAT_KEYS
from ..names import unwrapper
from ..report import bnb_bytes
from .optimizers import BNB_MAPS_BYTES, OPTIMIZERS, STEP_BYTES, Param, moments_sizes, momentum_sizes, state_bytes

# What Accelerate and transformers' Trainer call an optimizer's file; a second optimizer is optimizer_1.bin.
_OPTIMIZER_FILES = ("optimizer*.bin", "optimizer*.pt", "last.ckpt")
_BNB_KEY = "__bnb_optimizer_quant_state__"
_ADAMW_STATE = {"step", EXP_AVG_KEY, EXP_AVG_SQ_KEY}


@dataclass(frozen=True)
class Part:
    """`measured_bytes` and `predicted_bytes` of the state of one algorithm ("muon", "adamw"), or of the weights."""

    name: str
    num_parameters: int
    measured_bytes: int
    predicted_bytes: int

    @property
    def difference_bytes(self) -> int:
        return self.measured_bytes - self.predicted_bytes


@dataclass(frozen=True)
class Report:
    """`optimizer`: one of `OPTIMIZERS`; `others`: what each of them would take for the same
    parameters, in bytes; the Muons only where one of them is in use."""

    path: Path
    optimizer: str
    state: tuple[Part, ...]
    weights: Part | None
    others: dict[str, int]

    @property
    def total(self) -> Part:
        """All of the state."""
        return Part(
            "state in all",
            sum(part.num_parameters for part in self.state),
            sum(part.measured_bytes for part in self.state),
            sum(part.predicted_bytes for part in self.state),
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able. Keys: `path`, `optimizer`, `state`, `weights` (None where no file of them is there), `parts` (by
        algorithm) - each {num_parameters, measured_bytes, predicted_bytes, difference_bytes} - and `optimizers`
        ({name: {state_bytes}})."""
        return {
            "path": str(self.path),
            "optimizer": self.optimizer,
            "state": _part_dict(self.total),
            "weights": None if self.weights is None else _part_dict(self.weights),
            "parts": {part.name: _part_dict(part) for part in self.state},
            "optimizers": {name: {"state_bytes": num_bytes} for name, num_bytes in self.others.items()},
        }


def _part_dict(part: Part) -> dict[str, int]:
    names = ("num_parameters", "measured_bytes", "predicted_bytes", "difference_bytes")
    return {name: getattr(part, name) for name in names}


def report(path: Path) -> Report:
    """Report on a file of `torch.save(optimizer.state_dict())`, alone or under a key of a dict, a folder of
    Accelerate's or the Trainer's with one, or a run's folder, of which the newest complete checkpoint is taken.

    Raises:
        ValueError: names the file, or the parameter whose state is no optimizer's that is known.
    """
    files, weights_file = _find(path)
    shapes = {} if weights_file is None else {name: shape for name, shape, _ in _weights(weights_file)}
    entries = [entry for file in files for entry in _entries(file, shapes)]
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
            parts.append(Part(name, sum(entry.param.num_elements for entry in members), measured, predicted))
    params = [entry.param for entry in entries]
    is_routed = any(param.is_muon for param in params)  # else nothing says what is a hidden matrix
    others = {name: state_bytes(name, params) for name in OPTIMIZERS if is_routed or "muon" not in name}
    weights = None if weights_file is None else _weights_part(weights_file)
    return Report(path, _name({entry.format for entry in entries}), tuple(parts), weights, others)


def _find(path: Path) -> tuple[list[Path], Path | None]:
    """Files of optimizers, and of the weights beside them."""
    if path.is_file():
        return [path], None
    if not path.is_dir():
        raise ValueError(f"{path}: no such file or folder")
    checkpoints = sorted(p.parent for p in (path / "checkpoints").glob("step-*/progress.json"))
    of_trainer = [p for p in path.glob("checkpoint-*") if p.name[11:].isdigit()]
    newest = max(of_trainer, key=lambda p: int(p.name[11:]), default=path)
    folder = checkpoints[-1] if checkpoints else newest
    files = sorted(file for pattern in _OPTIMIZER_FILES for file in folder.glob(pattern))
    if not files:
        if (folder / ".metadata").is_file():
            raise ValueError(
                f"{folder}: a checkpoint of torch.distributed.checkpoint; turn it into a file first: "
                "python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE"
            )
        raise ValueError(f"{folder}: holds neither checkpoints/ nor optimizer.bin or optimizer.pt; give a checkpoint")
    weights = [folder / name for name in ("model.safetensors", "trainable.safetensors")]
    return files, next((file for file in weights if file.is_file()), None)


@dataclass(frozen=True)
class _Entry:
    param: Param
    format: str
    tensors: Any
    predicted_bytes: int


def _entries(file: Path, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[_Entry]:
    try:
        loaded = torch.load(file, mmap=True, weights_only=True, map_location="cpu")
        named = [
            (saved["state"], index, name, group)
            for saved in _state_dicts(loaded)
            for group in saved["param_groups"]
            for index, name in zip(group["params"], group.get("param_names") or group["params"], strict=True)
        ]
    except Exception as error:  # whatever torch meets in a file that is none of its own
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise ValueError(f"{file}: no optimizer's state_dict as torch.save writes it ({reason})") from None
    unwrapped, unwrapped_weight = unwrapper(str(name) for _, _, name, _ in named), unwrapper(shapes)
    shapes = {unwrapped_weight(name): shape for name, shape in shapes.items()}
    for state, index, name, group in named:
        if index in state:
            yield _entry(f"{file}: parameter {name}", shapes.get(unwrapped(str(name))), state[index], group)


def _state_dicts(loaded: Any) -> list[Mapping[str, Any]]:
    """Return the optimizers' state dicts of a loaded file: itself, or the values of a dict such as
    `{"model": ..., "optimizer": ...}`, alone or in lists as Lightning's `optimizer_states`."""

    def is_one(value: Any) -> bool:
        return isinstance(value, Mapping) and {"state", "param_groups"} <= value.keys()

    if not isinstance(loaded, Mapping):
        raise TypeError(f"it holds a {type(loaded).__name__}")
    values = [loaded] if is_one(loaded) else list(loaded.values())
    found = [one for value in values for one in (value if isinstance(value, list) else [value]) if is_one(one)]
    if not found:
        keys = ", ".join(map(str, list(loaded)[:5])) or "no key"
        raise KeyError(f"it has {keys}, and no `state` with `param_groups` in any of them")
    return found


def _is_known(key: str | None, state: Mapping[str, Any], tensors: Mapping[str, Any], group: Mapping[str, Any]) -> bool:
    """Whether these keys of a state and its group are those of AdamW or a Muon, and of no other optimizer."""
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


def _entry(where: str, shape: tuple[int, ...] | None, state: Mapping[str, Any], group: Mapping[str, Any]) -> _Entry:
    """What is known of one parameter's state, by its keys."""
    tensors = {**state, **state.get(_BNB_KEY, {})}
    keys = (LINEAR_CODES_KEY, DYNAMIC_CODES_KEY, BUFFER_KEY, EXP_AVG_KEY, EXP_AVG_CODES_KEY, "state1")
    key = next((key for key in keys if isinstance(tensors.get(key), Tensor)), None)
    if key is None or not _is_known(key, state, tensors, group):
        options = ", ".join(sorted(str(option) for option in group if option not in ("params", "param_names")))
        raise ValueError(
            f"{where}: its state ({', '.join(map(str, state)) or 'empty'}; group: {options or 'no option'}) is of no "
            "optimizer known here: Muon8bit, torch.optim.Muon, AdamW or bitsandbytes' 8-bit AdamW"
        )
    first = tensors[key]
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
        bits, codebook, block_size, flatten = (group[key] for key in FORMAT_KEYS)
        name = "muon8bit" if bits == 8 else "muon"
        predicted = sum(momentum_sizes(shape, bits=bits, codebook=codebook, block_size=block_size, flatten=flatten))
    else:
        name, predicted = ("muon" if first.dtype == torch.float32 else "muon_bf16"), num_elements * first.dtype.itemsize
    param = Param(where, shape, torch.float32, name.startswith("muon"), flatten=bool(group.get("flatten")))
    return _Entry(param, name, tensors, predicted)


def _name(formats: set[str]) -> str:
    """Which of `OPTIMIZERS` states of these formats are together."""
    muon = next((name for name in ("muon8bit", "muon_bf16", "muon") if name in formats), None)
    if muon == "muon8bit" and "adamw8bit" in formats:
        return "muon8bit+adamw8bit"
    return muon or ("adamw8bit" if "adamw8bit" in formats else "adamw")


def _storage_bytes(tensors: Mapping[str, Any], seen: set[int]) -> int:
    num_bytes = 0
    for tensor in tensors.values():
        if isinstance(tensor, Tensor) and (address := tensor.untyped_storage().data_ptr()) not in seen:
            seen |= {address} if address else set()
            num_bytes += tensor.untyped_storage().nbytes()
    return num_bytes


# Bytes of an element, by the names of safetensors.
_ITEMSIZES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I16": 2, "F8_E4M3": 1, "U8": 1, "I8": 1}


def _weights(file: Path) -> Iterator[tuple[str, tuple[int, ...], Mapping[str, Any]]]:
    """Name, shape and header of every tensor of a safetensors file; only its header is read."""
    try:
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            header = json.loads(opened.read(min(length, 2**28)))
        yield from ((name, tuple(e["shape"]), e) for name, e in header.items() if name != "__metadata__")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise ValueError(f"{file}: no safetensors file: {error}") from None


def _weights_part(file: Path) -> Part:
    num_elements = measured = predicted = 0
    for name, shape, entry in _weights(file):
        if entry["dtype"] not in _ITEMSIZES:
            raise ValueError(f"{file}: {name} has the dtype {entry['dtype']}, which is not known here")
        num_elements += math.prod(shape)
        measured += entry["data_offsets"][1] - entry["data_offsets"][0]
        predicted += math.prod(shape) * _ITEMSIZES[entry["dtype"]]
    return Part("weights", num_elements, measured, predicted)

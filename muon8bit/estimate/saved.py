"""Files of a checkpoint: where the optimizers' are, and the names, shapes and bytes of the weights beside or in them.

Of a safetensors file only the header is read, of a file of torch.save no tensor's content.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .._text import unwrapper

# What Accelerate and transformers' Trainer call an optimizer's file; a second optimizer is optimizer_1.bin.
_OPTIMIZER_FILES = ("optimizer*.bin", "optimizer*.pt", "last.ckpt")
_SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")
_INDEX = "model.safetensors.index.json"
# Under what a training file has the weights; the last is DeepSpeed's.
_MODEL_KEYS = ("state_dict", "model", "model_state_dict", "module")
# Bytes of an element, by the names of safetensors.
_ITEMSIZES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I16": 2, "F8_E4M3": 1, "U8": 1, "I8": 1}


@dataclass(frozen=True)
class SavedWeights:
    """Weights of a checkpoint.

    Attributes:
        where: they are, in words.
        shapes: by name.
        num_elements: of all weights.
        measured_bytes: as saved.
        predicted_bytes: those of the shapes and dtypes.
    """

    where: str
    shapes: dict[str, tuple[int, ...]]
    num_elements: int
    measured_bytes: int
    predicted_bytes: int


def find(path: Path) -> tuple[list[Path], Path | None]:
    """Find the optimizers' files, and the folder with the weights beside them, None where `path` is a file.

    Raises:
        ValueError: there is none, or it is not known which of several is the newest.
    """
    if path.is_file():
        return [path], None
    if not path.is_dir():
        raise ValueError(f"{path}: no such file or folder")
    checkpoints = sorted(p.parent for p in (path / "checkpoints").glob("step-*/progress.json"))
    of_trainer = [p for p in path.glob("checkpoint-*") if p.name[11:].isdigit()]
    newest = max(of_trainer, key=lambda p: int(p.name[11:]), default=path)
    folder = checkpoints[-1] if checkpoints else newest
    files = sorted(file for pattern in _OPTIMIZER_FILES for file in folder.glob(pattern))
    for place in (folder, folder / "checkpoints") if not files else ():  # the second is Lightning's
        last = place / "last.ckpt"
        files = files or ([last] if last.is_file() else _newest(sorted(place.glob("*.ckpt"))))
    if files:
        return files, folder
    for metadata in (folder / ".metadata", *folder.glob("optimizer*/.metadata")):
        if metadata.is_file():
            raise ValueError(
                f"{metadata.parent}: a checkpoint of torch.distributed.checkpoint; turn it into a file first: "
                "python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE"
            )
    raise ValueError(
        f"{folder}: holds neither checkpoints/ nor optimizer.bin, optimizer.pt or .ckpt; give a checkpoint"
    )


def _newest(files: Sequence[Path]) -> list[Path]:
    """Return the file whose name has the highest step, as Lightning writes it: `epoch=1-step=200.ckpt`."""
    if len(files) < 2:
        return list(files)
    found = [re.search(r"step=(\d+)", file.name) for file in files]
    steps = [int(match[1]) for match in found if match]
    if len(steps) < len(files) or steps.count(max(steps)) > 1:
        names = ", ".join(file.name for file in files)
        raise ValueError(f"{files[0].parent}: holds {names}, and their names do not say which is the newest; give one")
    return [files[steps.index(max(steps))]]


def beside(folder: Path) -> SavedWeights | None:
    """Return the weights that a folder holds: a model's, whole or in shards, else the trained ones or an adapter's.

    Raises:
        ValueError: a file that is damaged, or a shard that is missing.
    """
    for name in ("model.safetensors", _INDEX, "trainable.safetensors", "adapter_model.safetensors"):
        if name != _INDEX and (folder / name).is_file():
            return _of_files([folder / name], f"the adapter in {name}" if name.startswith("adapter") else name)
        shards = _shards(folder) if name == _INDEX else []
        if shards:
            return _of_files(shards, f"{len(shards)} shards, {shards[0].name} and so on")
    return None


def _shards(folder: Path) -> list[Path]:
    """Return the files that an index names, else the files whose own names say that they are all the parts of one."""
    index = folder / _INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index}: no index of safetensors files: {error!r}") from None
    else:
        found = [match for file in sorted(folder.glob("model-*.safetensors")) if (match := _SHARD.fullmatch(file.name))]
        num_shards = max((int(match[2]) for match in found), default=0)
        names = [f"model-{i:05}-of-{num_shards:05}.safetensors" for i in range(1, num_shards + 1)]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{folder}: of the weights {missing[0]} is missing ({len(missing)} of {len(names)} shards are); add what "
            "is missing, or give the optimizer's file alone"
        )
    return [folder / name for name in names]


def _of_files(files: Sequence[Path], where: str) -> SavedWeights:
    shapes: dict[str, tuple[int, ...]] = {}
    num_elements = measured = predicted = 0
    for file in files:
        for name, entry in _header(file):
            if entry["dtype"] not in _ITEMSIZES:
                raise ValueError(f"{file}: {name} has the dtype {entry['dtype']}, which is not known here")
            shapes[name] = tuple(entry["shape"])
            num_elements += math.prod(entry["shape"])
            measured += entry["data_offsets"][1] - entry["data_offsets"][0]
            predicted += math.prod(entry["shape"]) * _ITEMSIZES[entry["dtype"]]
    return SavedWeights(where, shapes, num_elements, measured, predicted)


def _header(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield name and header of every tensor of a safetensors file."""
    try:
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            header = json.loads(opened.read(min(length, 2**28)))
        entries = [(name, entry) for name, entry in header.items() if name != "__metadata__"]
        if not all({"dtype", "shape", "data_offsets"} <= entry.keys() for _, entry in entries):
            raise ValueError("its header has a tensor without shape or dtype")
    except (OSError, ValueError, TypeError, AttributeError, struct.error) as error:
        raise ValueError(f"{file}: no safetensors file: {error}") from None
    return iter(entries)


def inside(file: Path, loaded: Any) -> SavedWeights | str:
    """Return the weights in a training file, or in words why they are not known.

    The file is such as `{"model": ..., "optimizer": ...}`, or has Lightning's `state_dict`.
    """
    held = {key: value for key, value in loaded.items() if _is_state_dict(value)} if isinstance(loaded, Mapping) else {}
    keys = [key for key in _MODEL_KEYS if key in held] or list(held)
    if not keys:
        return "no weights were found with it"
    if len(keys) > 1 and keys[0] not in _MODEL_KEYS:
        return f"{file.name} holds several sets of weights ({', '.join(map(str, keys))})"
    tensors = {name: value for name, value in held[keys[0]].items() if isinstance(value, Tensor)}
    storages = {tensor.untyped_storage().data_ptr(): tensor for tensor in tensors.values()}  # tied ones once
    return SavedWeights(
        f"{keys[0]!r} of {file.name}",
        {name: tuple(tensor.shape) for name, tensor in tensors.items()},
        sum(tensor.numel() for tensor in storages.values()),
        sum(tensor.untyped_storage().nbytes() for tensor in storages.values()),
        sum(tensor.numel() * tensor.dtype.itemsize for tensor in storages.values()),
    )


def _is_state_dict(value: Any) -> bool:
    """Check for a module's state dict: names of tensors, but for what a module adds as `_extra_state`."""
    return (
        isinstance(value, Mapping)
        and any(isinstance(one, Tensor) for one in value.values())
        and all(
            isinstance(name, str) and (isinstance(one, Tensor) or name.endswith("_extra_state"))
            for name, one in value.items()
        )
    )


def shapes_by_name(names: Sequence[str], weights: SavedWeights) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the weights that an optimizer's parameter names stand for; other names are left out.

    Names are compared without wrappers' segments, and without peft's segments for the adapter, which peft does not
    save. One prefix before all names, such as Lightning's for the model inside its module, is ignored too.
    """
    own, theirs = unwrapper(names), unwrapper(weights.shapes)
    shapes = {theirs(name): shape for name, shape in weights.shapes.items()}
    plain = {name: _without_adapter(own(name)) for name in names}
    found = {name: shapes.get(own(name), shapes.get(plain[name])) for name in names}
    if names and all(shape is None for shape in found.values()):
        first = f".{plain[names[0]]}"
        prefixes = [name.removesuffix(first) for name in shapes if name.endswith(first)]
        full = [p for p in prefixes if all(f"{p}.{name}" in shapes for name in plain.values())]
        if len(full) == 1:
            found = {name: shapes[f"{full[0]}.{short}"] for name, short in plain.items()}
    return {name: shape for name, shape in found.items() if shape is not None}


def _without_adapter(name: str) -> str:
    """Remove the adapter's segment from a name, which peft does not save.

    `a.lora_A.default.weight` becomes `a.lora_A.weight`, `b.modules_to_save.default.weight` becomes `b.weight`.
    """
    return ".".join(part for part in name.split(".") if part not in ("default", "modules_to_save"))

"""Loads what torch.distributed.checkpoint saved: on all ranks, or on none."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_values

from muon8bit import Muon8bit

_AS_SAVED = (
    "build model and optimizer as they were saved (groups of release 0.1 by muon8bit.param_groups(model, ..., "
    "routing='0.1'))"
)
T = TypeVar("T")
Keys = tuple[str | int, ...]  # the way to a value in the nested state dict, as the checkpoint's metadata has it


def load_checkpoint(
    model: nn.Module, optimizer: Muon8bit, path: str | os.PathLike[str], *, process_group: ProcessGroup | None = None
) -> None:
    """Load model and optimizer from a folder of torch.distributed.checkpoint, on all ranks together.

    It was saved on any number of ranks with `dcp.save({"model": get_model_state_dict(model), "optimizer":
    get_optimizer_state_dict(model, optimizer)}, checkpoint_id=path)`; with `shard_state=True` in
    `with optimizer.sharded_state_dict():`. Other entries of the folder are left alone.

    After an error model and optimizer are as before, on every rank. A bare `dcp.load` is not atomic: it writes into the
    live tensors as it reads, converts dtypes without a word, and what a rank has read before another one fails, stays.
    Here keys, dtypes (as torch has them), shapes and the files' lengths are compared first, the values then read into
    new tensors on the same devices (a second copy of this rank's parameters, two of its optimizer state), checked as
    `Muon8bit.load_state_dict` does, and assigned when all ranks agree. A flipped bit is found by neither torch.load,
    nor dcp.load, nor this function, unless it makes a scale NaN or Inf: keep checksums of the files. Group options are
    unpickled, as by dcp.load: load only what you trust.

    Args:
        model: with the parameters of `optimizer`; may be wrapped in DistributedDataParallel, or sharded.
        optimizer: with or without state; its `backend`, `on_nonfinite` and format stay its own.
        path: the folder, the same for all ranks.
        process_group: of the ranks that load together, if not all.

    Raises:
        ValueError: on every rank, naming the folder, the file or key, and the first rank that found it.
    """
    found = _agreed(lambda: _templates(model, optimizer, Path(path)), path, process_group)
    values, load = _agreed(lambda: _read(optimizer, *found, path, process_group), path, process_group)
    set_model_state_dict(model, values)
    load()


def _agreed(work: Callable[[], T], path: object, group: ProcessGroup | None) -> T:
    """Return what `work` gives, if it succeeds on all ranks."""
    cause = result = None
    try:
        result = work()
    except Exception as error:  # whatever it is, the other ranks must not go on
        cause = error
    told = [None if cause is None else str(cause) or repr(cause)]
    if dist.is_initialized():
        everyone: list[str | None] = [None] * dist.get_world_size(group)
        dist.all_gather_object(everyone, told[0], group=group)
        told = everyone
    for rank, text in enumerate(told):
        if text is not None:
            raise ValueError(f"{path} is not loaded, nothing changed on any rank: {text} (rank {rank})") from cause
    return result  # type: ignore[return-value]


def _templates(model: nn.Module, optimizer: Muon8bit, folder: Path) -> tuple[dict[str, Any], dict[str, Keys], Any]:
    """Return memory to load into, by the checkpoint's flat keys.

    Also where these belong, and each group's parameter names.
    """
    try:
        saved = FileSystemReader(folder).read_metadata()
    except Exception as error:  # unpickling a damaged file raises anything
        raise ValueError(f"{folder / '.metadata'} cannot be read ({error!r})") from error
    _check_files(saved, folder)
    own: dict[Keys, Any] = {
        ("model", name): torch.empty_like(value) if isinstance(value, Tensor) else value
        for name, value in get_model_state_dict(model).items()
    }
    names = _named(model, optimizer)
    for name, tensors in names["state"].items():
        own |= {("optimizer", "state", name, key): value for key, value in tensors.items()}
    templates: dict[str, Any] = {}
    places = {k: place for k, place in saved.planner_data.items() if place[0] in ("model", "optimizer")}
    for key, place in places.items():
        kind = saved.state_dict_metadata[key]
        there = (kind.properties.dtype, tuple(kind.size)) if isinstance(kind, TensorStorageMetadata) else None
        if place[:2] == ("optimizer", "param_groups") and len(place) == 4:  # torch has them all, whatever they are
            templates[key] = 0 if there is None else torch.empty(there[1], dtype=there[0], device="cpu")
            continue
        if place not in own:
            raise ValueError(f"{key}, saved there, is unknown here: {_AS_SAVED}")
        templates[key] = own.pop(place)
        here = (templates[key].dtype, tuple(templates[key].shape)) if isinstance(templates[key], Tensor) else None
        if here != there:
            raise ValueError(f"{key} is {there} there, {here} here: {_AS_SAVED}")
    stateful = {place[2] for place in places.values() if place[1] == "state" and place[0] == "optimizer"}
    for place in own:  # a parameter that never had a gradient has no state; load_state_dict warns of it
        if place[0] == "model" or place[2] in stateful:
            raise ValueError(f"{'.'.join(map(str, place))} is missing there: {_AS_SAVED}")
    return templates, places, [group["params"] for group in names["param_groups"]]


def _check_files(saved: Metadata, folder: Path) -> None:
    """Check that all files are there, as long as the metadata says: torch's errors do not name them."""
    lengths: dict[str, int] = {}
    for entry in saved.storage_data.values():
        name, end = entry.relative_path, entry.offset + entry.length
        lengths[name] = max(end, lengths.get(name, 0))
    for name, length in lengths.items():
        size = (folder / name).stat().st_size if (folder / name).exists() else None
        if size is None or size < length:
            raise ValueError(
                f"{folder / name} is " + ("missing" if size is None else f"cut to {size} of {length} bytes")
            )


def _named(model: nn.Module, optimizer: Muon8bit) -> dict[str, Any]:
    """Return empty state and groups by the names of distributed checkpointing.

    Asking for the optimizer's own would take a step to make its state, or give none where there are gradients.
    """
    known = set(model.parameters())
    for i, group in enumerate(optimizer.param_groups):
        for j, param in enumerate(group["params"]):
            if param not in known:
                raise ValueError(f"parameter {j} of group {i} of the optimizer is not in the model")
    bearer = torch.optim.SGD([{"params": list(group["params"])} for group in optimizer.param_groups])
    bearer.state.update(optimizer.empty_state())
    return get_optimizer_state_dict(model, bearer)


def _read(
    optimizer: Muon8bit,
    templates: dict[str, Any],
    places: dict[str, Keys],
    names: list[list[str]],
    path: str | os.PathLike[str],
    group: ProcessGroup | None,
) -> tuple[dict[str, Any], Callable[[], None]]:
    """Return the model's values, and a function that assigns the optimizer's."""
    try:
        load_values(templates, checkpoint_id=path, process_group=group)
    except CheckpointException as error:  # on all ranks, and no Exception
        rank, (cause, _) = next(iter(error.failures.items()))
        raise ValueError(f"reading failed on rank {rank}: {cause!r}") from error
    values: dict[str, Any] = {}
    state: dict[Any, dict[str, Any]] = {}
    groups: dict[Any, dict[str, Any]] = {}
    for key, place in places.items():
        tree: Any = values
        if place[0] == "optimizer":
            tree = (state if place[1] == "state" else groups).setdefault(place[2], {})
        tree[place[-1]] = templates[key]
    ordered = [groups[i] for i in sorted(groups)]
    load = optimizer.prepare_load({"state": state, "param_groups": ordered})
    for i, (there, here) in enumerate(zip(ordered, names, strict=True)):
        for theirs, ours in zip(there["params"], here, strict=True):
            if theirs != ours:
                raise ValueError(f"group {i} has {theirs} there, {ours} here: {_AS_SAVED}")
    return values, load

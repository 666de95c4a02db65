"""Folders of torch.distributed.checkpoint: one process reads and writes them, with files for memory.

Each tensor lies in them as a file of torch.save inside a larger file, or as several, one a shard; torch checks none of
their checksums. Its reader fills given tensors: these are mapped from files of a scratch folder. A folder's .metadata
is a pickle, which torch loads without restrictions: read none that you do not trust.
"""

from __future__ import annotations

import io
import os
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save


class Scratch:
    """Tensors on the CPU whose memory is files of a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._num_files = folder, 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return a new contiguous tensor with zeros."""
        num_elements = torch.Size(shape).numel()
        if num_elements == 0:
            return torch.empty(*shape, dtype=dtype, device="cpu")
        self._num_files += 1
        path = self._folder / str(self._num_files)
        if hasattr(os, "posix_fallocate"):  # else a full disk would be found by writing to memory, which is fatal
            with path.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, num_elements * dtype.itemsize)
        return torch.from_file(str(path), shared=True, size=num_elements, dtype=dtype, device="cpu").view(tuple(shape))

    def copy(self, tensor: Tensor) -> Tensor:
        """Return a contiguous copy of a tensor."""
        return self.empty(tensor.shape, tensor.dtype).copy_(tensor)


def read(path: Path, scratch: Scratch) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the one optimizer that a folder holds, and the keys under which it lies there.

    Raises:
        ValueError: names the folder, or its file and the state whose checksum is wrong.
        OSError: if the folder cannot be read.
    """
    try:
        metadata = FileSystemReader(path).read_metadata()
    except FileNotFoundError:
        # A checkpoint of Accelerate's, or a run of the scripts.
        files = [*sorted(path.glob("checkpoints/*/optimizer.bin")), *path.glob("optimizer.bin")]
        offer = f"; give {files[-1]}" if files else ""
        raise ValueError(f"{path} is no folder of torch.distributed.checkpoint: it has no .metadata{offer}") from None
    except Exception as error:  # whatever a damaged pickle raises
        raise ValueError(f"{path}: its .metadata is damaged: {error}") from error
    paths: dict[str, tuple[Any, ...]] = metadata.planner_data or {}
    roots = {keys[: keys.index("param_groups")] for keys in paths.values() if "param_groups" in keys}
    if len(roots) != 1:
        raise ValueError(f"{path} holds the 'param_groups' of {len(roots)} optimizers, expected one")
    (root,) = roots
    chosen = {name: keys[len(root) :] for name, keys in paths.items() if keys[: len(root)] == root}
    _check(path, metadata, chosen)
    flat: dict[str, Any] = {}
    for name in chosen:
        item = metadata.state_dict_metadata[name]
        flat[name] = None
        if isinstance(item, TensorStorageMetadata):
            flat[name] = scratch.empty(item.size, item.properties.dtype)
    with _alone(path):
        load(flat, checkpoint_id=path, no_dist=True)
    return _nested({keys: flat[name] for name, keys in chosen.items()}), root


def write(structure: Mapping[str, Any], root: Sequence[str], path: Path) -> None:
    """Save an optimizer as a folder, under these keys."""
    for key in reversed(root):
        structure = {key: structure}
    with _alone(path):
        save(dict(structure), checkpoint_id=path, no_dist=True)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Run the block as one process, which no_dist=True says and torch warns of; raise the error that torch wraps."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    except CheckpointException as wrapped:
        error, _ = next(iter(wrapped.failures.values()))
        if isinstance(error, OSError):
            raise error from None
        raise ValueError(f"{path}: {error}") from error


def _check(path: Path, metadata: Metadata, chosen: Mapping[str, Any]) -> None:
    """Check the checksums of what will be read."""
    for index, info in metadata.storage_data.items():
        if index.fqn not in chosen or info.transform_descriptors:  # of an extension of torch's, such as zstd
            continue
        with (path / info.relative_path).open("rb") as file:
            file.seek(info.offset)
            content = io.BytesIO(file.read(info.length))
        try:
            with zipfile.ZipFile(content) as archive:
                damaged = archive.testzip()
        except Exception as error:  # whatever zipfile meets in a damaged file
            raise ValueError(f"{path / info.relative_path} is truncated or damaged at {index.fqn}: {error}") from error
        if damaged is not None:
            raise ValueError(f"{path / info.relative_path} is damaged: the checksum of {index.fqn} is wrong")


def _nested(flat: Mapping[tuple[Any, ...], Any]) -> dict[str, Any]:
    """Make nested dicts from paths; where all keys are integers, as in `param_groups`, a list in their order."""
    result: dict[Any, Any] = {}
    for keys, value in flat.items():
        inner = result
        for key in keys[:-1]:
            inner = inner.setdefault(key, {})
        inner[keys[-1]] = value
    groups = result["param_groups"]
    if isinstance(groups, dict):
        result["param_groups"] = [_lists(groups[i]) for i in sorted(groups)]
    return result


def _lists(value: Any) -> Any:
    """Turn dicts with integer keys, which a flattened list has become, into lists again."""
    if not isinstance(value, dict):
        return value
    inner = {key: _lists(item) for key, item in value.items()}
    return [inner[i] for i in sorted(inner)] if inner and all(isinstance(key, int) for key in inner) else inner

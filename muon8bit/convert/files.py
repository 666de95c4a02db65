"""Checkpoint files: read by mapping them, checked by their checksums, written tensor by tensor.

The format is torch.save's: a zip archive of stored records, of which `data.pkl` is the pickled structure, with tensors
as references to the records `data/0`, `data/1`, ...; `torch.load(mmap=True)` wants those aligned. torch.save itself
needs all tensors at once.
"""

from __future__ import annotations

import copy
import ctypes
import errno
import io
import os
import pickle
import sys
import tempfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

Keys = tuple[Any, ...]  # keys, from the outside to the inside
_PARTS = {"muon", "adamw"}
_ALIGNMENT = 64  # bytes, torch.save's
_ZIP64_EXTRA = 20  # bytes that zipfile adds to the header of every record that may be large
_STORAGES: dict[torch.dtype, type] = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.float16: torch.HalfStorage,
    torch.int8: torch.CharStorage,
    torch.uint8: torch.ByteStorage,
    torch.int32: torch.IntStorage,
    torch.int64: torch.LongStorage,
}


def read(path: Path) -> Any:
    """Return what `torch.save` put into a file, on the CPU; tensors are read from the file when they are used.

    Raises:
        ValueError: names the file, and the record whose checksum is wrong. torch.load itself checks none.
        OSError: if the file cannot be read.
    """
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"PK\x03\x04":
        raise ValueError(f"{path} is no checkpoint of torch.save: not a zip archive, or its beginning is damaged")
    try:
        with zipfile.ZipFile(path) as archive:
            packed = [record.filename for record in archive.infolist() if record.compress_type != zipfile.ZIP_STORED]
            damaged = archive.testzip()
    except Exception as error:  # whatever zipfile meets in a damaged file, a place before its beginning too
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        raise ValueError(f"{path} is truncated or damaged: {error}") from error
    if damaged is not None:
        raise ValueError(f"{path} is damaged: the checksum of its record {damaged} is wrong; use another checkpoint")
    if packed:  # torch would map the compressed bytes and take them for values
        raise ValueError(f"{path} was compressed after it was saved ({packed[0]}): load it and torch.save it again")
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # whatever torch meets in a zip archive that is none of its own
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{path} cannot be read by torch.load with weights_only=True: {reason}") from error


def optimizer_inside(path: Path, loaded: Any) -> Keys:
    """Return the keys under which a loaded file has its optimizer, none where it is one or has none.

    State dicts under 'muon' and 'adamw' beside nothing else are one optimizer.

    Raises:
        ValueError: for several optimizers; it names their keys.
    """
    found = list(_state_dicts(loaded, ()))
    parents = {keys[:-1] for keys in found}
    if len(parents) == 1 and found != [()]:
        (parent,) = parents
        beside = at(loaded, parent)
        if isinstance(beside, Mapping) and beside.keys() <= _PARTS:
            return parent
    if len(found) > 1:
        places = ", ".join(map(place, found))
        raise ValueError(f"{path} holds {len(found)} optimizers ({places}): save the one to convert alone in a file")
    return found[0] if found else ()


def _state_dicts(value: Any, keys: Keys) -> Iterator[Keys]:
    """Yield the keys under which nested dicts, lists and tuples hold optimizers' state dicts."""
    if isinstance(value, Mapping):
        if isinstance(value.get("state"), Mapping) and isinstance(value.get("param_groups"), list | tuple):
            yield keys
            return
        items: Iterable[tuple[Any, Any]] = value.items()
    else:
        items = enumerate(value) if isinstance(value, list | tuple) else ()
    for key, item in items:
        yield from _state_dicts(item, (*keys, key))


def at(value: Any, keys: Keys) -> Any:
    """Return what nested containers hold under these keys."""
    for key in keys:
        value = value[key]
    return value


def replaced(value: Any, keys: Keys, new: Any) -> Any:
    """Return a copy of nested containers with another value under these keys; all else is shared."""
    if not keys:
        return new
    inner = replaced(value[keys[0]], keys[1:], new)
    if isinstance(value, tuple):
        return (*value[: keys[0]], inner, *value[keys[0] + 1 :])
    result = copy.copy(value)
    result[keys[0]] = inner
    return result


def place(keys: Keys) -> str:
    """Return keys as messages show them: `optimizer_states[0]`."""
    return "".join(f"[{key!r}]" if isinstance(key, int) else f".{key}" for key in keys).removeprefix(".")


def save(structure: Any, path: Path) -> None:
    """Write what has other tensors than an optimizer's by torch.save, which keeps what shares memory, and strides.

    Raises:
        OSError: such as for a full disk.
    """
    with path.open("wb") as file:
        try:
            torch.save(structure, file)
        except RuntimeError as error:  # of torch's writer, after the file's own error
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def appearing(path: Path) -> Iterator[tuple[Path, Path]]:
    """Yield a place to write what shall appear under `path` when the block ends without an error, and a scratch folder.

    `path` is of a file or a folder. After an error nothing appears.

    Raises:
        FileExistsError: if there is one.
        FileNotFoundError: if its folder does not exist.
    """
    if path.exists() or path.is_symlink():
        raise FileExistsError(f"{path} exists: give another name, or remove it")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} is no folder: make it first")
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        beside, scratch = Path(folder) / path.name, Path(folder) / "scratch"
        scratch.mkdir()
        try:
            yield beside, scratch
        except OSError as error:
            if error.filename is not None:
                raise
            raise OSError(error.errno, error.strerror, str(path)) from error  # such as a full disk
        if path.exists():
            raise FileExistsError(f"{path} has come into being meanwhile: give another name")
        beside.rename(path)


@contextmanager
def written(path: Path) -> Iterator[Writer]:
    """Yield a writer of the file `path`."""
    with path.open("wb") as file:
        with zipfile.ZipFile(file, "w") as archive:
            yield Writer(archive, file)
        file.flush()
        os.fsync(file.fileno())


class Writer:
    """Writes a file of `torch.save`'s format, each tensor when it is given."""

    def __init__(self, archive: zipfile.ZipFile, file: BinaryIO) -> None:
        self._zip, self._file, self._num_storages = archive, file, 0
        self._record("version", b"3\n")
        self._record("byteorder", sys.byteorder.encode())

    def keep(self, tensor: Tensor) -> Any:
        """Write the tensor's values; returns what stands for it in `finish`."""
        if tensor.dtype not in _STORAGES:
            raise ValueError(f"a tensor of {tensor.dtype} is no part of an optimizer's state: take it out")
        tensor = tensor.detach().cpu().contiguous()
        reference = _Reference(str(self._num_storages), tensor.dtype, tuple(tensor.shape))
        self._num_storages += 1
        memory = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()) if tensor.nbytes else b""
        self._record(f"data/{reference.key}", memory)
        return reference

    def finish(self, structure: Any) -> None:
        """Write the structure, in which `keep`'s results stand for tensors; the last thing to do."""
        data = io.BytesIO()
        _Pickler(data, self.keep).dump(structure)
        self._record("data.pkl", data.getvalue())

    def _record(self, name: str, data: Any) -> None:
        info = zipfile.ZipInfo(f"archive/{name}")  # of 1980, so that equal content is an equal file
        header = 30 + len(info.filename.encode()) + _ZIP64_EXTRA + 4
        padding = -(self._file.tell() + header) % _ALIGNMENT
        info.extra = b"FB" + padding.to_bytes(2, "little") + bytes(padding)
        with self._zip.open(info, "w", force_zip64=True) as record:
            record.write(data)


@dataclass(frozen=True)
class _Storage:
    """A record of the archive, as the pickle refers to it."""

    key: str
    dtype: torch.dtype
    num_elements: int


@dataclass(frozen=True)
class _Reference:
    """A tensor whose values are written already."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    def __reduce__(self) -> tuple[Callable[..., Tensor], tuple[Any, ...]]:
        stride = tuple(prod(self.shape[i + 1 :]) for i in range(len(self.shape)))
        storage = _Storage(self.key, self.dtype, prod(self.shape))
        return torch._utils._rebuild_tensor_v2, (storage, 0, self.shape, stride, False, OrderedDict())


class _Pickler(pickle.Pickler):
    """Pickles references as torch.save pickles tensors; a tensor that is met is written first."""

    def __init__(self, file: BinaryIO, keep: Callable[[Tensor], Any]) -> None:
        super().__init__(file, protocol=2)
        self._keep = keep

    def persistent_id(self, value: Any) -> tuple[Any, ...] | None:
        if isinstance(value, _Storage):
            return ("storage", _STORAGES[value.dtype], value.key, "cpu", value.num_elements)
        return None

    def reducer_override(self, value: Any) -> Any:
        return self._keep(value).__reduce__() if isinstance(value, Tensor) else NotImplemented

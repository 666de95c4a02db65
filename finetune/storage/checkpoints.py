"""Checkpoints on disk: written beside, sealed by a manifest of SHA-256, then named. No torch in here.

A checkpoint is a folder `checkpoints/step-N` with what Accelerate saves, `progress.json`, and `manifest.json`, which
has the size and SHA-256 of every other file. It is written as `.step-N.partial`, reaches the disk, and takes its name
last; one that goes away loses its name first. So a folder with the name is a whole checkpoint, whenever the process was
killed, and the manifest tells whether the disk gave back what was written (`torch.load` does not notice a flipped bit).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
PROGRESS_FILE = "progress.json"
CHUNK = 1 << 22  # bytes read at a time: files may be larger than memory


def named_checkpoints(run: Path) -> list[Path]:
    """List the checkpoints of a run's folder, oldest first; whether they are undamaged is not looked at."""
    return sorted((path for path in _matching(run, r"step-\d+") if path.is_dir()), key=step_of)


def step_of(checkpoint: Path) -> int:
    """Step of a named checkpoint."""
    return int(checkpoint.name.removeprefix("step-"))


def partial_checkpoint(run: Path, step: int) -> Path:
    """Return the folder into which the checkpoint of a step is written."""
    return run / "checkpoints" / f".step-{step:07d}.partial"


def remove_leftovers(run: Path) -> None:
    """Delete what killed processes left: checkpoints that were never complete, or that had lost their name."""
    for leftover in _matching(run, r"\.step-\d+\.(partial|old|given-up)"):
        _delete(leftover)


def file_names(checkpoint: Path) -> list[str]:
    """Return the paths of all files of a checkpoint but the manifest, relative to it, sorted."""
    names = (path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file())
    return sorted(name for name in names if name != MANIFEST)


def seal_files(checkpoint: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Sync files to the disk; return name -> {"bytes": size, "sha256": hex digest}.

    Raises:
        OSError: the disk is full, or fails.
    """
    return {name: _entry(checkpoint / name, sync=True) for name in names}


def complete(partial: Path, files: dict[str, dict[str, Any]]) -> Path:
    """Write the manifest of a checkpoint whose files are on the disk, and give it its name.

    Args:
        partial: of `partial_checkpoint`.
        files: entries of all its files, from `seal_files`.

    Returns:
        The named folder.

    Raises:
        OSError: the disk is full, or fails, or a checkpoint has that name, or there are other files.
    """
    if sorted(files) != file_names(partial):
        raise OSError(f"{partial.name} has not the files that the processes wrote; let all see one file system")
    (partial / MANIFEST).write_text(_manifest_text(files), encoding="ascii")
    sync(partial / MANIFEST)
    for folder in (partial, *(path for path in partial.rglob("*") if path.is_dir())):
        sync(folder)
    final = partial.with_name(partial.name.removeprefix(".").removesuffix(".partial"))
    partial.rename(final)
    for folder in (final.parent, final.parent.parent):  # the first checkpoint is new in one, checkpoints/ in the other
        sync(folder)
    return final


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint if it is there: first its name, so that no half of it is ever taken for a whole."""
    if checkpoint.exists():
        nameless = checkpoint.with_name(f".{checkpoint.name}.old")
        checkpoint.rename(nameless)
        _delete(nameless)


def find_damage(checkpoint: Path, part: int = 0, num_parts: int = 1) -> str | None:
    """Compare a checkpoint with its manifest.

    Args:
        checkpoint: its folder.
        part: look only at every num_parts-th file, beginning with this one; the manifest is read in any case.
        num_parts: how many processes share the work.

    Returns:
        The first file that is not as it was written, and why; None if all are.
    """
    try:
        text = (checkpoint / MANIFEST).read_text(encoding="ascii")
        files = json.loads(text)["files"]
        whole = text == _manifest_text(files)
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in sorted(files.items())}
    except OSError as error:
        return f"{MANIFEST} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError):
        whole, expected = False, {}
    if not whole or PROGRESS_FILE not in expected:
        return f"{MANIFEST} is not as it was written"
    for name in list(expected)[part::num_parts]:
        path, (size, digest) = checkpoint / name, expected[name]
        try:
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size:,} bytes instead of {size:,}"
            if _entry(path)["sha256"] != digest:
                return f"{name} does not match its SHA-256"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def sync(path: Path) -> None:
    """Write a file, or a folder's list of names, through to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _matching(run: Path, pattern: str) -> list[Path]:
    """Return the paths in `checkpoints/` with a name of ours; copies and notes that users put beside are left out."""
    return [path for path in (run / "checkpoints").glob("*") if re.fullmatch(pattern, path.name)]


def _delete(folder: Path) -> None:
    """Delete a folder; of a linked one, such as to another disk, the link."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder)


def _entry(path: Path, sync: bool = False) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        size = 0
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return {"bytes": size, "sha256": digest.hexdigest()}


def _manifest_text(files: Any) -> str:
    return json.dumps({"files": files}, indent=1, sort_keys=True) + "\n"

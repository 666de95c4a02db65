"""Joint actions of a run's processes, made so that none waits for one that has failed."""

from __future__ import annotations

import platform
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import torch.distributed as dist
from accelerate import Accelerator
from safetensors import SafetensorError
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException

from finetune.config.errors import InputError, OtherRankError, StorageError
from finetune.parallel.watch import watch_group, watched

T = TypeVar("T")
# How long the processes wait for one that tokenizes, answers or merges. Training's own collectives keep torch's limit.
PATIENCE = timedelta(hours=12)
# How torch.save says that it could not write: a plain RuntimeError, as so much else is.
_TORCH_SAVE = ("PytorchStreamWriter", "inline_container", "file write failed")
_GROUPS: dict[Any, ProcessGroup] = {}
_ENDED: list[Any] = []


def _patient_group() -> ProcessGroup:
    """Return a gloo group of all processes, which waits on the CPU up to `PATIENCE`.

    The first call is collective.
    """
    world = dist.group.WORLD
    if world not in _GROUPS:
        _GROUPS[world] = dist.new_group(backend="gloo", timeout=PATIENCE)
    return _GROUPS[world]


def connect(accelerator: Accelerator) -> None:
    """Make the groups that these functions use, early: a collective call."""
    if accelerator.num_processes > 1:
        _patient_group()
        watch_group()


def gather(accelerator: Accelerator, value: T) -> list[T]:
    """Gather the value of every rank, on all ranks; a collective call that may wait for `PATIENCE`."""
    if accelerator.num_processes == 1:
        return [value]
    values: list[Any] = [None] * accelerator.num_processes
    dist.all_gather_object(values, value, group=_patient_group())
    dist.barrier(group=_patient_group())  # see `leave`
    return values


def leave(accelerator: Accelerator) -> None:
    """Close trackers and the process group, all ranks together.

    The group's object is kept until the process ends. Its destructor, which holds the interpreter's lock, waits for
    gloo's threads, and one of those may still need the lock to free a gathered tensor: neither would ever end (seen
    with torch 2.13 on a busy machine, where the last reference was the model's).
    """
    gather(accelerator, None)  # the main process may still be merging
    if dist.is_initialized():
        _ENDED.append(dist.group.WORLD)
    accelerator.end_training()


def on_main(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Do the work on the main process, while the others wait; what it returns there is returned on all.

    Raises:
        InputError: it failed; on all processes.
        RanksError: it failed in another way; on all processes but the main one, which raises its own error.
    """
    results, told, cause = _attempt(accelerator, work if accelerator.is_main_process else None)
    results, told = gather(accelerator, (results, told))[0]
    if told is not None:
        raise cause or told
    return results[0]


def on_all(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Do the work on every process, without waiting for another inside; none goes on if it failed on one.

    Raises:
        InputError: it failed somewhere; on all processes.
        RanksError: it failed in another way; on all processes but that one, which raises its own error.
    """
    results, told, cause = _attempt(accelerator, work)
    failed = [error for error in gather(accelerator, told) if error is not None]
    if failed:
        raise cause or failed[0]
    return results[0]


def _attempt(accelerator: Accelerator, work: Callable[[], T] | None) -> tuple[list[T], Exception | None, Any]:
    """Run the work; return its value in a list, or the error to tell the other ranks, with the original error."""
    try:
        return ([] if work is None else [work()]), None, None
    except InputError as error:
        return [], error, error
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        return [], OtherRankError(f"process {accelerator.process_index} failed: {type(error).__name__}: {text}"), error


def first_on_node(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Do the work on one process of every node, then on the others, which find it in the cache.

    Raises:
        InputError: it failed somewhere; all processes raise, so that none waits for another.
    """
    results: list[T] = []
    error = None
    if accelerator.is_local_main_process:
        try:
            results.append(work())
        except InputError as caught:
            error = caught
    failed = [e for e in gather(accelerator, error) if e is not None]
    if failed:
        raise failed[0]
    return results[0] if results else work()


def check_shared(accelerator: Accelerator, folder: Path) -> None:
    """Look on every process for a file that the main process has just written where a run's folder is to be.

    Raises:
        InputError: some process does not see it, or it cannot be written; on all processes. It is gone again.
    """
    if accelerator.num_processes == 1:
        return
    place = next(path for path in (folder, *folder.parents) if path.is_dir())
    token, error = place / f".token-{uuid4().hex}", None
    if accelerator.is_main_process:
        try:
            token.touch(exist_ok=False)
        except OSError as caught:
            error = caught.strerror
    token, error = gather(accelerator, (token, error))[0]
    try:
        seen = gather(accelerator, (error is not None or token.is_file(), platform.node()))
    finally:
        if accelerator.is_main_process:
            token.unlink(missing_ok=True)
    if error is not None:
        raise InputError("--output-dir", f"cannot write to {token.parent}: {error}")
    blind = [f"{rank} (on {node})" for rank, (is_seen, node) in enumerate(seen) if not is_seen]
    if blind:
        raise InputError(
            "--output-dir",
            f"process {', '.join(blind[:3])} does not see {folder} of process 0 (on {seen[0][1]}), and all write "
            "checkpoints there; give a folder on a file system that all machines share, under the same path",
        )


def is_storage_error(error: BaseException) -> bool:
    """Check whether an error of writing a checkpoint comes from the disk, not from a device or from communication.

    Files, safetensors, torch.save and distributed checkpointing each have one of their own.
    """
    if isinstance(error, CheckpointException):
        return all(is_storage_error(failure[0]) for failure in error.failures.values())
    if isinstance(error, (OSError, SafetensorError)):
        return not isinstance(error, (ConnectionError, TimeoutError))
    return type(error) is RuntimeError and any(words in str(error) for words in _TORCH_SAVE)


def write_together(accelerator: Accelerator, write: Callable[[], T]) -> list[T]:
    """Write on every rank; returns what each wrote.

    A process that is killed or stopped meanwhile ends the others: see `finetune.parallel.watch.watched`.

    Raises:
        StorageError: the disk failed somewhere; all processes raise, so that none waits for another.
        RanksError: something else did; on all processes but that one, which raises its own error as the cause.
    """
    results: list[T] = []
    told, cause = None, None
    with watched(accelerator) as watch:
        try:
            results.append(write())
        except (Exception, CheckpointException) as caught:
            text = " ".join(str(caught).split())[:200] or type(caught).__name__
            told = (is_storage_error(caught), text, type(caught).__name__)
            cause = caught
            watch.fail(f"{told[2]}: {text}")
        outcomes = gather(accelerator, (results, told))
    failed = [(rank, told) for rank, (_, told) in enumerate(outcomes) if told is not None]
    for _, (from_disk, text, _) in failed:
        if from_disk:
            raise StorageError(text) from cause
    for rank, (_, text, kind) in failed:
        raise OtherRankError(f"process {rank} failed: {kind}: {text}") from cause
    return [results[0] for results, _ in outcomes]

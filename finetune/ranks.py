"""What the processes of a run do together, so that none waits for one that has failed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from finetune.errors import InputError, StorageError

T = TypeVar("T")
# What writing a checkpoint raises when the disk is full: files, safetensors, torch.save, distributed checkpointing.
WRITE_ERRORS = (OSError, SafetensorError, RuntimeError, CheckpointException)


def gather(accelerator: Accelerator, value: T) -> list[T]:
    """The value of every rank, on all ranks; a collective call."""
    values: list[T] = gather_object([value])
    accelerator.wait_for_everyone()  # see `finetune.job.leave`
    return values


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


def write_together(accelerator: Accelerator, write: Callable[[], T]) -> list[T]:
    """Write on every rank; returns what each wrote.

    Raises:
        StorageError: it failed somewhere; all processes raise, so that none waits for another.
    """
    results: list[T] = []
    error = None
    try:
        results.append(write())
    except WRITE_ERRORS as caught:
        error = " ".join(str(caught).split())[:200] or type(caught).__name__
    outcomes = gather(accelerator, (results, error))
    failed = [error for _, error in outcomes if error is not None]
    if failed:
        raise StorageError(failed[0])
    return [results[0] for results, _ in outcomes]

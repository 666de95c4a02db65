"""Watches over what the processes of a run write together: a process that is gone ends the others, with the cause."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from accelerate import Accelerator
from torch.distributed import ProcessGroup

LIMIT_S = 60.0  # that a process may give no sign
GRACE_S = 10.0  # that a process has to end by itself after another one has failed
ROUND_S = 0.5  # between two signs
_GROUPS: dict[Any, ProcessGroup] = {}


class RankWatch:
    """A thread that exchanges signs with those of the other processes, over a group of its own.

    Args:
        group: of gloo; its timeout is how long a process may give no sign.
        limit: that timeout, in seconds, for the message.
    """

    def __init__(self, group: ProcessGroup | None, limit: float) -> None:
        self._group, self._limit = group, limit
        self._is_done, self._failure = threading.Event(), ""
        self._thread = threading.Thread(target=self._run, daemon=True, name="watch")

    def fail(self, text: str) -> None:
        """Tell the others that this process cannot go on, and why: those that wait for it in vain end."""
        self._failure = text

    def start(self) -> None:
        """Begin to exchange signs; a collective call."""
        if self._group is not None:
            self._thread.start()

    def finish(self) -> None:
        """Say that this process is done, and wait until all are."""
        self._is_done.set()
        if self._group is not None:
            self._thread.join()

    def _run(self) -> None:
        deadline = None
        num_ranks = dist.get_world_size(self._group)
        while True:
            self._is_done.wait(ROUND_S)
            signs: list[Any] = [None] * num_ranks
            own = (self._is_done.is_set(), self._failure)
            try:
                dist.all_gather_object(signs, own, group=self._group)
            except Exception as error:
                first = " ".join(str(error).split())[:200]
                _end(f"another process is gone, or has given no sign for {self._limit:.0f} s ({first})")
            if all(is_done for is_done, _ in signs):
                return
            failed = [f"process {rank} failed: {text}" for rank, (_, text) in enumerate(signs) if text]
            if failed and deadline is None:
                deadline = time.monotonic() + GRACE_S
            if deadline is not None and time.monotonic() > deadline:
                _end(failed[0])


def _end(text: str) -> None:
    """Stop the process: its main thread may wait in a collective call that can be ended in no other way."""
    print(f"saving: {text}; the checkpoints before are untouched", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(1)


def watch_group() -> ProcessGroup:
    """Return a gloo group of all processes, with `LIMIT_S` as its timeout. The first call is collective."""
    world = dist.group.WORLD
    if world not in _GROUPS:
        _GROUPS[world] = dist.new_group(backend="gloo", timeout=timedelta(seconds=LIMIT_S))
    return _GROUPS[world]


@contextmanager
def watched(accelerator: Accelerator) -> Iterator[RankWatch]:
    """Watch over the processes while all do what is inside; a collective call.

    A process that is killed ends the others at once, one that is stopped after `LIMIT_S`. One that has failed lets
    them wait for `GRACE_S` at most in what they were doing.
    """
    watch = RankWatch(watch_group() if accelerator.num_processes > 1 else None, LIMIT_S)
    watch.start()
    try:
        yield watch
    except BaseException as error:
        watch.fail(f"{type(error).__name__}: {error}")
        raise
    finally:
        watch.finish()

"""Waits for other ranks inside a step: never longer than `step_timeout`, and with the cause if one does not come.

Ranks arrive at a step when they can: one may evaluate or save alone before, and the process group's own timeout says
how long the others wait. Inside the step they work alike, so that what takes longer than `step_timeout` seconds has
failed. A rank that fails where the others cannot know it leaves its error in the process group's store, where those
that wait for it look every second. Which rank has not answered is found there too: the others say that they are alive.

On the CPU (gloo) the host waits here, and can be interrupted. NCCL transfers are waited for by the device: their
timeout is `step_timeout` as well, after which torch's watchdog ends the process, as torch does of all collectives
(`TORCH_NCCL_ASYNC_ERROR_HANDLING`). That has not been tried on GPUs.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist
from torch._C._distributed_c10d import Store
from torch.distributed import ProcessGroup

Result = TypeVar("Result")

_POLL = timedelta(seconds=1)  # between two looks into the store
_STORE_S = 2.0  # for an answer of the store, whose host may be the rank that is gone


class RanksError(RuntimeError):
    """Another rank has failed, ended or stopped inside a step; the message says which, and its error if it told."""


def cause_of(error: Exception) -> str:
    """Return the first sentence of an error of a transfer, without its place in gloo's source."""
    return str(error).splitlines()[0].split("] ", 1)[-1].split(". ")[0]


class Watchdog:
    """Bounded waits of one process group, and what its ranks tell each other when a step cannot go on."""

    def __init__(self, group: ProcessGroup, timeout_s: float) -> None:
        """Watch a process group.

        Args:
            group: the process group.
            timeout_s: seconds that a rank waits for the others inside a step.
        """
        self.group, self.timeout_s = group, timeout_s
        self.rank, self.num_ranks = dist.get_rank(group), dist.get_world_size(group)
        self.token = ""  # of the step, equal on all ranks
        self._is_store_lost = False

    @property
    def timeout(self) -> timedelta:
        """Return the longest wait inside a step."""
        return timedelta(seconds=self.timeout_s)

    def publish(self, error: BaseException) -> None:
        """Leave this rank's error for the ranks that wait for it. The first one published stays."""
        text = f"rank {self.rank} failed inside the step: {type(error).__name__}: {error}"
        if isinstance(error, RanksError):
            text = str(error)
        self._ask(lambda store: store.compare_set(self._key("failed"), "", text), b"")

    def wait(self, work: dist.Work | None) -> None:
        """Wait on the host for a transfer between CPUs.

        Raises:
            RanksError: if it fails, takes longer than the timeout, or a rank has published that it failed.
        """
        if work is None:
            return
        grace = min(5.0, self.timeout_s / 4)  # of the timeout, to find out which rank is missing
        deadline = time.monotonic() + self.timeout_s - grace
        while True:
            seconds_left = deadline - time.monotonic()
            try:
                work.wait(min(_POLL, timedelta(seconds=max(seconds_left, 0.001))))
                return
            except RuntimeError as error:
                published = self._published()
                if published is None and not work.is_completed() and seconds_left > 0:
                    continue
                raise RanksError(published or self._missing(error, grace, is_over=seconds_left <= 0)) from error

    def _published(self) -> str | None:
        """Return what a rank has published of its failure."""
        key = self._key("failed")
        return self._ask(lambda store: store.get(key).decode() if store.check([key]) else None, None)

    def _missing(self, error: Exception, grace: float, *, is_over: bool) -> str:
        """Say which ranks are not there any more: those that do not say in the store that they are."""
        self._ask(lambda store: store.set(self._key(f"alive {self.rank}"), ""), None)
        stop = time.monotonic() + grace
        missing = [rank for rank in range(self.num_ranks) if rank != self.rank]
        while missing and not self._is_store_lost:
            missing = [rank for rank in missing if not self._is_alive(rank)]
            if published := self._published():
                return published
            if time.monotonic() >= stop:
                break
            time.sleep(0.05)
        ranks = f"rank {', '.join(map(str, missing))}" if missing and not self._is_store_lost else "another rank"
        if is_over:
            return f"{ranks} did not answer within step_timeout={self.timeout_s:g} seconds inside the step"
        return f"{ranks} is gone, or cannot be reached, inside the step: {cause_of(error)}"

    def _is_alive(self, rank: int) -> bool:
        return self._ask(lambda store: store.check([self._key(f"alive {rank}")]), False)

    def _key(self, name: str) -> str:
        return f"muon8bit {self.token} {name}"

    def _ask(self, question: Callable[[Store], Result], default: Result) -> Result:
        """Ask the store in a thread of its own, since a store whose host has stopped never answers.

        After one question without an answer no more are asked.
        """
        if self._is_store_lost:
            return default
        answers: list[Result] = []

        def ask() -> None:
            try:
                answers.append(question(self.group.get_group_store()))
            except RuntimeError:  # the store's host is gone
                self._is_store_lost = True

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(min(_STORE_S, self.timeout_s / 4))
        if not answers:
            self._is_store_lost = True
            return default
        return answers[0]

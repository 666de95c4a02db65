"""Time on a device: events around the region, arms that take turns, medians; and what a step allocates.

Each timed run starts with an idle device and a cache that has been overwritten; a last one, not timed, has NaN in
fresh memory. An arm that cannot run says why in
its result; an arm that fails is reported as failed and the command ends with an error.
"""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

# What the host may take to launch a queued run: about 2 ms of a device at 2 GHz.
_QUEUE_CYCLES = 4_000_000
FAILED = "failed"  # how the words begin that stand for the figures of an arm that raised


@contextmanager
def poisoned() -> Iterator[None]:
    """Make torch.empty give NaN (integers: their largest value), so that what is read without being written shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


class UnavailableError(RuntimeError):
    """An arm cannot run here; the message is what its column says."""


@dataclass(frozen=True)
class TimedJob:
    """`run` is timed; `check` raises unless what the runs left behind is finite and was written."""

    run: Callable[[], Any]
    check: Callable[[], None]


@dataclass
class Result:
    """Times that the turns of an arm took, in ms, and memory.

    `extra_bytes` is the peak of a run above what was there before it. `host_ms` is how long the call took to return,
    without waiting for the device. `problem` is empty if all went well.
    """

    device_ms: list[list[float]] = field(default_factory=list)
    host_ms: list[float] = field(default_factory=list)
    extra_bytes: int = 0
    problem: str = ""

    @property
    def ms(self) -> float:
        """Return the median of all times on the device."""
        return median(value for turn in self.device_ms for value in turn)

    @property
    def median_host_ms(self) -> float:
        """Return the median of the times until the call returned."""
        return median(self.host_ms)

    @property
    def spread(self) -> float:
        """Largest minus smallest median of a turn, over the median of all: what the same arm differs from itself."""
        turns = [median(turn) for turn in self.device_ms]
        return (max(turns) - min(turns)) / self.ms


class Clock:
    """Runs and times jobs on one device; on a CPU the same steps with a host clock, for the dry run."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._cuda = device.type == "cuda"
        cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size if self._cuda else 2**10
        self.cache_bytes = cache_bytes
        self._flush = torch.empty(4 * cache_bytes, dtype=torch.int8, device=device)

    def synchronize(self) -> None:
        """Wait for the device."""
        if self._cuda:
            torch.cuda.synchronize(self.device)

    def measure(self, run: Callable[[], Any], queued: bool) -> tuple[float, float]:
        """Return the milliseconds of a run on the device, and until the call returned, cache overwritten.

        It starts on an idle device, so that a launch costs what it costs; `queued` behind other work, so that what the
        host does is hidden and only the kernels are timed.
        """
        self._flush.zero_()
        if queued and self._cuda:
            torch.cuda._sleep(_QUEUE_CYCLES)
        else:
            self.synchronize()
        if self._cuda:
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            host = time.perf_counter()
            start.record()
            run()
            stop.record()
            host = time.perf_counter() - host
            self.synchronize()
            return start.elapsed_time(stop), 1e3 * host
        host = time.perf_counter()
        run()
        host = time.perf_counter() - host
        return 1e3 * host, 1e3 * host

    def turns(
        self,
        makers: Mapping[str, Callable[[], TimedJob]],
        *,
        rounds: int,
        repeats: int,
        warm_up: int = 1,
        queued: bool = False,
    ) -> dict[str, Result]:
        """Give every arm `rounds` turns, interleaved with the others': made, warmed up, timed, checked, freed."""
        results = {name: Result() for name in makers}
        gc.collect()
        gc.freeze()  # what is alive now need not be walked after every turn
        for _ in range(rounds):
            for name, make in makers.items():
                if not results[name].problem:
                    self._turn(name, make, results[name], repeats, warm_up, queued)
                gc.collect()
                if self._cuda:
                    torch.cuda.empty_cache()
        return results

    def _turn(
        self, name: str, make: Callable[[], TimedJob], result: Result, repeats: int, warm_up: int, queued: bool
    ) -> None:
        try:
            job = make()
            for _ in range(warm_up):
                job.run()
            self.synchronize()
            before = self._reset_peak()
            times = [self.measure(job.run, queued) for _ in range(repeats)]
            if self._cuda:
                result.extra_bytes = max(result.extra_bytes, torch.cuda.max_memory_allocated(self.device) - before)
            with poisoned():
                job.run()
            job.check()
        except UnavailableError as reason:
            result.problem = str(reason)
        except torch.cuda.OutOfMemoryError:
            result.problem = "out of memory"
        except Exception as error:  # the other arms go on; the command reports this one and ends with an error
            traceback.print_exc()
            result.problem = f"{FAILED}: {type(error).__name__}: {error}".splitlines()[0][:160]
        else:
            result.device_ms.append([device for device, _ in times])
            result.host_ms += [host for _, host in times]
            return
        print(f"  {name}: {result.problem}", flush=True)

    def _reset_peak(self) -> int:
        """Return the bytes allocated now, from where the peak counts; without meaning on a CPU."""
        if not self._cuda:
            return 0
        torch.cuda.reset_peak_memory_stats(self.device)
        return torch.cuda.memory_allocated(self.device)

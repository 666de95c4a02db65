"""Optimizer state on the host: brought to the device batch by batch, one batch ahead, and written back.

A step is a list of tasks. While the device works on one, the state of the next is copied, and the state that the one
before has written goes back. Two buffers on the device take turns; on CUDA all copies are on a stream of their own, in
this order:

    copies   fetch 0 | fetch 1 | (0 done) write 0, fetch 2 | (1 done) write 1, fetch 3 | ...
    current            work 0  |             work 1        |             work 2        | ...   (n fetched) before work n

A buffer is fetched into only after the copies stream has waited for the work on its former content, and has written
that back. The current stream waits for the last copy before the buffers are freed, so that their memory is safe there,
and the copies of one step come before those of the next, on the same stream. torch's allocator of pinned memory holds a
freed tensor back until the copies that use it are done. The host alone does not wait: `synchronize` does.

A batch holds the same matrices as without offload, so that it is bitwise the same. Its codes take a quarter of the
workspace at most where Newton-Schulz is in half precision, so both buffers a half; fp32 momenta (`bits=32`) four times
that. AdamW's moments are taken in chunks within the workspace.

Bytes over the bus for each element and step: a Muon momentum comes twice, for the statistics and for the update, and
goes once: 3 (12 with `bits=32`); AdamW's moments come and go once: 16. For Llama-3.1-8B (6.98e9 elements for Muon,
1.05e9 for AdamW) that is 38 GB, with an fp32 momentum 101 GB, with AdamW for all of it 128 GB: at 25 GB/s, about what
PCIe 4.0 x16 carries, 1.5, 4.0 and 5.1 s. These are estimates from byte counts. A part of it is hidden behind
Newton-Schulz; the first phase, a third of Muon's bytes, has nothing to hide behind. torch rounds a pinned tensor up to
a power of two bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# Buffers that take turns: one is worked on, one is fetched into.
NUM_BUFFERS = 2
# Where tensors in a buffer begin, in bytes: torch's allocators align to no more than 512.
_ALIGNMENT = 512


@dataclass(frozen=True)
class OffloadTask:
    """Work on parameters of one device that needs state.

    Attributes:
        device: the parameters'.
        run: gets the tensors of `written`, then those of `read`, on the device, each contiguous, and must keep none of
            them; or None where they are there already.
        written: the tensors that are read and changed.
        read: the tensors that are only read.
    """

    device: torch.device
    run: Callable[[Sequence[Tensor] | None], None]
    written: Sequence[Tensor] = field(default=())
    read: Sequence[Tensor] = field(default=())

    @property
    def tensors(self) -> list[Tensor]:
        """Return all tensors, in the order in which `run` gets them."""
        return [*self.written, *self.read]


class CopyStream:
    """Copies between the host and one device, here done at once. A copy is a pair of target and source."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def begin(self) -> None:
        """Begin, before the first fetch into buffers that are new."""

    def fetch(self, copies: Sequence[tuple[Tensor, Tensor]]) -> Any:
        """Start to bring state, and return a value for `arrive`."""
        self._copy(copies)

    def arrive(self, fetched: Any) -> None:
        """Wait, before the work on fetched state, until it is there."""

    def write(self, copies: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Start to write back after the work; the buffer may then be fetched into again."""
        self._copy(copies)

    def end(self) -> None:
        """Wait for the last copies, before the buffers are freed."""

    def synchronize(self) -> None:
        """Wait on the host until all is written back."""

    def _copy(self, copies: Sequence[tuple[Tensor, Tensor]], is_waited_for: bool = True) -> None:
        for target, source in copies:
            target.copy_(source, non_blocking=not is_waited_for)


class CudaCopyStream(CopyStream):
    """Copies on a stream beside the current one. All that is specific to CUDA is here."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._copies = torch.cuda.Stream(device)
        self._current = torch.cuda.current_stream(device)

    def begin(self) -> None:
        """Let the copies wait for the current stream."""
        self._current = torch.cuda.current_stream(self.device)  # a backward hook may run on another
        self._copies.wait_stream(self._current)  # earlier work may still use the memory of the buffers

    def fetch(self, copies: Sequence[tuple[Tensor, Tensor]]) -> torch.cuda.Event:
        """Start the copies, and return an event that is recorded after them."""
        with torch.cuda.stream(self._copies):
            self._copy(copies, is_waited_for=False)
        event: torch.cuda.Event = self._copies.record_event()
        return event

    def arrive(self, fetched: torch.cuda.Event) -> None:
        """Let the current stream wait for the event."""
        self._current.wait_event(fetched)

    def write(self, copies: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Start the copies when the work on the current stream is done."""
        self._copies.wait_stream(self._current)
        with torch.cuda.stream(self._copies):
            self._copy(copies, is_waited_for=False)

    def end(self) -> None:
        """Let the current stream wait for the copies."""
        self._current.wait_stream(self._copies)

    def synchronize(self) -> None:
        """Wait on the host until all copies are done."""
        self._copies.synchronize()


def lane_of(device: torch.device) -> CopyStream | None:
    """Return the copies between the host and `device`; None for the host itself."""
    if device.type == "cpu":
        return None
    return CudaCopyStream(device) if device.type == "cuda" else CopyStream(device)


class StateOffload:
    """Place of the optimizer's state, and its copies to the device and back.

    Args:
        state_device: None, with the parameter, or `"cpu"`, on the host, pinned where the parameter is on CUDA.
    """

    def __init__(self, state_device: str | None) -> None:
        self.state_device = state_device
        self._lanes: dict[torch.device, CopyStream | None] = {}

    def __reduce__(self) -> tuple[type, tuple[str | None]]:
        return type(self), (self.state_device,)  # streams belong to their process

    def moves(self, device: torch.device) -> bool:
        """Return whether the state of parameters on `device` is elsewhere."""
        return self._lane(device) is not None

    def home(self, device: torch.device) -> torch.device:
        """Return where the state of parameters on `device` lives."""
        return device if self.state_device is None else torch.device(self.state_device)

    def at_home(self, tensor: Tensor, device: torch.device) -> Tensor:
        """Return a tensor of the state of a parameter on `device`, moved or pinned where that is needed."""
        if self.state_device is None:
            return tensor
        tensor = tensor.to(self.state_device)
        return tensor.pin_memory() if device.type == "cuda" and not tensor.is_pinned() else tensor

    def run(self, tasks: Sequence[OffloadTask]) -> None:
        """Do the tasks, for each device in their order, and copy the state of the next one meanwhile."""
        by_device: dict[torch.device, list[OffloadTask]] = {}
        for task in tasks:
            by_device.setdefault(task.device, []).append(task)
        for device, own in by_device.items():
            lane = self._lane(device)
            if lane is not None:
                _run_staged(lane, own)
                continue
            for task in own:
                task.run(None)

    def synchronize(self) -> None:
        """Wait on the host until all state is written back."""
        for lane in self._lanes.values():
            if lane is not None:
                lane.synchronize()

    def _lane(self, device: torch.device) -> CopyStream | None:
        if device not in self._lanes:
            self._lanes[device] = None if self.state_device is None else lane_of(device)
        return self._lanes[device]


def aligned_bytes(num_bytes: int) -> int:
    """Return the bytes that a tensor of so many bytes takes in a buffer."""
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def buffer_bytes(tasks: Sequence[int]) -> list[int]:
    """Return the bytes of the buffers, at most `NUM_BUFFERS`, for tasks whose state takes these bytes."""
    return [max(tasks[i::NUM_BUFFERS]) for i in range(min(NUM_BUFFERS, len(tasks)))]


def _run_staged(lane: CopyStream, tasks: Sequence[OffloadTask]) -> None:
    sizes = buffer_bytes([sum(aligned_bytes(t.numel() * t.itemsize) for t in task.tensors) for task in tasks])
    buffers = [torch.empty(size, dtype=torch.uint8, device=lane.device) for size in sizes]

    def fetch(index: int) -> tuple[list[Tensor], Any]:
        tensors = tasks[index].tensors
        staged = list(_carve(buffers[index % NUM_BUFFERS], tensors))
        return staged, lane.fetch(list(_copies(staged, tensors)))

    lane.begin()
    try:
        fetched = fetch(0)
        for index, task in enumerate(tasks):
            staged, arrival = fetched
            if index + 1 < len(tasks):
                fetched = fetch(index + 1)
            lane.arrive(arrival)
            task.run(staged)
            lane.write(list(_copies(task.written, staged[: len(task.written)])))
    finally:
        lane.end()


def _carve(buffer: Tensor, tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    """Give contiguous tensors like these in a buffer of bytes."""
    start = 0
    for tensor in tensors:
        size = tensor.numel() * tensor.itemsize
        yield buffer[start : start + size].view(tensor.dtype).view(tensor.shape)
        start += aligned_bytes(size)


def _copies(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Give pairs of contiguous pieces: others would be copied through pageable memory."""
    for target, source in zip(targets, sources, strict=True):
        if target.is_contiguous() and source.is_contiguous():
            yield target, source
        else:
            yield from _copies(target.unbind(), source.unbind())

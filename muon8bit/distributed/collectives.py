"""Collectives of one process group: one padded all-gather, and all-to-alls of tensors of any dtype."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from math import prod
from operator import mul

import torch
from torch import Tensor
from torch._C._distributed_c10d import AllgatherOptions, AllToAllOptions
from torch.distributed import ProcessGroup, Work

from .watchdog import RanksError, Watchdog, cause_of


class Transport:
    """Collectives of one process group, whose waits `watchdog` bounds."""

    def __init__(self, group: ProcessGroup, watchdog: Watchdog) -> None:
        """Use a process group and its watchdog."""
        self.group, self.watchdog = group, watchdog
        self.rank, self.num_ranks = watchdog.rank, watchdog.num_ranks
        # The last gather's tensors. gloo's thread must not be the last to let them go: it would wait for the
        # interpreter's lock, which a group's destructor may hold while it waits for that thread.
        self._gathered: tuple[Tensor, Tensor] | None = None

    def all_gather(self, values: Tensor, *, is_bounded: bool = True) -> Tensor:
        """Return [num_ranks, n] of the [n] of each rank, n being equal on all.

        Args:
            values: [n] of this rank.
            is_bounded: wait for `step_timeout`, not for as long as the process group allows.

        Raises:
            RanksError: if a rank has failed, ended or stopped.
        """
        gathered = values.new_empty(self.num_ranks * len(values))
        self.gather_into(gathered, values, is_bounded=is_bounded)
        return gathered.view(self.num_ranks, -1)

    def gather_into(self, gathered: Tensor, values: Tensor, *, is_bounded: bool = True) -> None:
        """Gather into memory that is there, [num_ranks * n]: see `all_gather`."""
        options = AllgatherOptions()
        options.asyncOp = True
        if is_bounded:
            options.timeout = self.watchdog.timeout
        self._gathered = gathered, values
        try:
            work = self.group._allgather_base(gathered, values, options)
            if not is_bounded or values.device.type != "cpu":
                work.wait()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RanksError(f"another rank is gone, or did not come to the step: {cause_of(error)}") from error
        if is_bounded and values.device.type == "cpu":
            self.watchdog.wait(work)

    def gather_texts(self, text: str, device: torch.device) -> list[str]:
        """Return the text of every rank, by rank."""
        data = torch.frombuffer(bytearray(text.encode() or b" "), dtype=torch.uint8)
        size = torch.tensor([len(text.encode())], dtype=torch.int64, device=device)
        sizes = [int(n) for n in self.all_gather(size).flatten().tolist()]
        padded = torch.zeros(max(1, *sizes), dtype=torch.uint8)
        padded[: sizes[self.rank]] = data[: sizes[self.rank]]
        rows = self.all_gather(padded.to(device)).cpu()
        return [bytes(row[:n].tolist()).decode() for row, n in zip(rows, sizes, strict=True)]


class Kept:
    """Tensors of this rank, to be read like those of a `PendingExchange`; all ranks know that nothing is sent."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        """Keep them, in the order in which they are read."""
        self._unread = list(tensors)[::-1]

    def start(self) -> None:
        """Do nothing."""

    def wait(self) -> None:
        """Do nothing."""

    def read(self, rank: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:  # noqa: ARG002
        """Return the next tensor."""
        return self._unread.pop().view(shape)

    def read_all(self, ranks: Sequence[int], shape: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
        """Return the next tensors, each [1, rows, cols]."""
        return [self.read(rank, (1, *shape), dtype) for rank in ranks]


class PendingExchange:
    """An all-to-all of tensors: allocated when it is made, then to be started, waited for, and read."""

    def __init__(
        self, transport: Transport, outgoing: Sequence[Sequence[Tensor]], incoming: list[int], device: torch.device
    ) -> None:
        """Allocate what is sent and received.

        Args:
            transport: the collectives of the process group.
            outgoing: by rank, the tensors to send there, in an order that the receiver knows.
            incoming: by rank, the bytes that it sends to this one.
            device: where the tensors are.
        """
        self.sent_bytes, self.received_bytes = [sum(t.nbytes for t in of_rank) for of_rank in outgoing], incoming
        self._transport = transport
        # What is sent must live until the transfer is done.
        self._sent = _packed([tensor for tensors in outgoing for tensor in tensors], device)
        self._received = torch.empty(sum(incoming), dtype=torch.uint8, device=device)
        self._starts = list(accumulate(incoming, initial=0))[:-1]

    def start(self) -> None:
        """Send and receive, without waiting."""
        self._work = self._begin()

    def _begin(self) -> Work | None:
        options = AllToAllOptions()
        options.asyncOp, options.timeout = True, self._transport.watchdog.timeout
        tensors, sizes = (self._received, self._sent), (self.received_bytes, self.sent_bytes)
        return self._transport.group.alltoall_base(*tensors, *sizes, options)

    def wait(self) -> None:
        """Wait until all is received: on the CPU the host, else the device's stream.

        Raises:
            RanksError: if a rank has failed, ended or stopped.
        """
        if self._received.device.type == "cpu":
            self._transport.watchdog.wait(self._work)
        elif self._work is not None:
            self._work.wait()
        del self._sent, self._work
        self._typed: dict[torch.dtype, Tensor] = {}

    def read(self, rank: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return the next numbers that came from a rank; a copy where they do not start at a multiple of their size."""
        num_bytes, start = prod(shape) * dtype.itemsize, self._starts[rank]
        self._starts[rank] += num_bytes
        if start % dtype.itemsize:
            copied: Tensor = self._received[start : start + num_bytes].clone().view(dtype).view(shape)
            return copied
        strides = list(accumulate(shape[:0:-1], mul, initial=1))[::-1]
        return self._whole(dtype).as_strided(shape, strides, start // dtype.itemsize)

    def read_all(self, ranks: Sequence[int], shape: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
        """Return the next matrices that came from each of these ranks, as stacks [count, rows, cols].

        It is one stack where they lie at equal distances, as those of one matrix a rank do.
        """
        itemsize, starts = dtype.itemsize, list[int]()
        num_bytes = shape[0] * shape[1] * itemsize
        for rank in ranks:
            starts.append(self._starts[rank])
            self._starts[rank] += num_bytes
        steps = {second - first for first, second in pairwise(starts)} or {num_bytes}
        if len(steps) == 1 and not (starts[0] % itemsize or min(steps) % itemsize):
            strides = min(steps) // itemsize, shape[1], 1
            return [self._whole(dtype).as_strided((len(ranks), *shape), strides, starts[0] // itemsize)]
        for rank in ranks:
            self._starts[rank] -= num_bytes
        return [self.read(rank, (1, *shape), dtype) for rank in ranks]

    def _whole(self, dtype: torch.dtype) -> Tensor:
        """Return all that was received, as numbers."""
        if dtype not in self._typed:
            surplus = self._received.shape[0] % dtype.itemsize
            self._typed[dtype] = (self._received[:-surplus] if surplus else self._received).view(dtype)
        return self._typed[dtype]


class PendingGather(PendingExchange):
    """An all-gather of what every rank has for all others, padded to the longest."""

    def __init__(self, transport: Transport, own: Sequence[Tensor], incoming: list[int], device: torch.device) -> None:
        """Allocate what is sent and received.

        Args:
            transport: the collectives of the process group.
            own: the tensors to send.
            incoming: by rank, the bytes that it sends to each, this one among them.
            device: where the tensors are.
        """
        self.sent_bytes, self.received_bytes = [incoming[transport.rank]] * transport.num_ranks, incoming
        self._transport, longest = transport, max(incoming)
        padding = torch.empty(longest - incoming[transport.rank], dtype=torch.uint8, device=device)
        self._sent = _packed([*own, padding] if len(padding) else own, device)
        self._received = torch.empty(transport.num_ranks * longest, dtype=torch.uint8, device=device)
        self._starts = [rank * longest for rank in range(transport.num_ranks)]

    def _begin(self) -> Work | None:
        options = AllgatherOptions()
        options.asyncOp, options.timeout = True, self._transport.watchdog.timeout
        return self._transport.group._allgather_base(self._received, self._sent, options)


def _packed(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return the bytes of tensors, one after the other."""
    flat = [tensor.reshape(-1) for tensor in tensors]
    # One column of several is flat with gaps, which bytes cannot be a view of.
    flat = [t if t.stride(-1) == 1 else t.clone(memory_format=torch.contiguous_format) for t in flat]
    flat = [t.view(torch.uint8) for t in flat]
    if len(flat) == 1:
        return flat[0]
    return torch.cat(flat) if flat else torch.empty(0, dtype=torch.uint8, device=device)

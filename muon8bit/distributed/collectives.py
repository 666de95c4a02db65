"""How bytes get from rank to rank: one padded all-gather, and all-to-alls of pieces of any dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import AllgatherOptions, AllToAllOptions
from torch.distributed import ProcessGroup

from .watch import RanksError, Watch, cause_of


@dataclass
class ByteCounter:
    """Payload bytes of this rank since the optimizer was made. What a rank keeps for itself does not count.

    Attributes:
        gathered: received of the sums, flags and padding of all-gathers (a ring sends as many).
        sent, received: pieces of matrices, Gram matrices and their factors.
    """

    gathered: int = 0
    sent: int = 0
    received: int = 0


@dataclass(frozen=True)
class Parcel:
    """Memory of an all-to-all: what is sent, and where what comes is put; uint8, with the bytes by rank."""

    send: Tensor
    outgoing: list[int]
    buffer: Tensor
    incoming: list[int]


@dataclass(frozen=True)
class PendingExchange:
    """A parcel under way; `landed` waits for it."""

    parcel: Parcel  # must live until the transfer is done
    wait: Callable[[], None]

    def landed(self) -> list[Tensor]:
        """By rank, the bytes that came from it, uint8.

        Raises:
            RanksError: if a rank has failed, ended or stopped.
        """
        self.wait()
        return list(self.parcel.buffer.split(self.parcel.incoming))


@dataclass(frozen=True)
class Transport:
    """Collectives of one process group, whose bytes are counted, and whose waits are bounded by `watch`."""

    group: ProcessGroup
    watch: Watch
    traffic: ByteCounter = field(default_factory=ByteCounter)
    # The last gather's tensors. gloo's thread must not be the last to let them go: it would wait for the interpreter's
    # lock, which a group's destructor may hold while it waits for that thread.
    _kept: list[Tensor] = field(default_factory=list, repr=False)

    @property
    def rank(self) -> int:
        """This rank in the group."""
        return self.watch.rank

    @property
    def num_ranks(self) -> int:
        """Ranks of the group."""
        return self.watch.num_ranks

    def all_gather(self, values: Tensor, *, is_arrival: bool = False, is_counted: bool = True) -> Tensor:
        """[n] of equal n on all ranks -> [num_ranks, n].

        Args:
            is_arrival: wait as long as the process group allows, not only `step_timeout`.
            is_counted: whether its bytes are the step's.

        Raises:
            RanksError: if a rank has failed, ended or stopped.
        """
        gathered = values.new_empty(self.num_ranks * len(values))
        self.gather_into(gathered, values, is_arrival=is_arrival)
        if is_counted:
            self.traffic.gathered += (self.num_ranks - 1) * values.nbytes
        return gathered.view(self.num_ranks, -1)

    def gather_into(self, gathered: Tensor, values: Tensor, *, is_arrival: bool = False) -> None:
        """See `all_gather`; `gathered`: [num_ranks * n]."""
        how = AllgatherOptions()
        how.asyncOp = True
        if not is_arrival:
            how.timeout = self.watch.timeout
        self._kept[:] = gathered, values
        try:
            work = self.group._allgather_base(gathered, values, how)
            if is_arrival or values.device.type != "cpu":
                work.wait()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RanksError(f"another rank is gone, or did not come to the step: {cause_of(error)}") from error
        if not is_arrival and values.device.type == "cpu":
            self.watch.wait(work)

    def gather_texts(self, text: str, device: torch.device) -> list[str]:
        """A text of every rank, by rank."""
        data = torch.frombuffer(bytearray(text.encode() or b" "), dtype=torch.uint8)
        size = torch.tensor([len(text.encode())], dtype=torch.int64, device=device)
        sizes = [int(n) for n in self.all_gather(size, is_counted=False).flatten().tolist()]
        padded = torch.zeros(max(1, *sizes), dtype=torch.uint8)
        padded[: sizes[self.rank]] = data[: sizes[self.rank]]
        rows = self.all_gather(padded.to(device), is_counted=False).cpu()
        return [bytes(row[:n].tolist()).decode() for row, n in zip(rows, sizes, strict=True)]

    def packed(self, outgoing: Sequence[Sequence[Tensor]], incoming: list[int], device: torch.device) -> Parcel:
        """Allocate what an all-to-all needs.

        Args:
            outgoing: by rank, the pieces to send there, contiguous, in an order that the receiver knows.
            incoming: by rank, the bytes that it sends to this one.
        """
        pieces = [[piece.reshape(-1).view(torch.uint8) for piece in pieces] for pieces in outgoing]
        sizes = [sum(map(len, mine)) for mine in pieces]
        flat = [piece for mine in pieces for piece in mine]
        send = flat[0] if len(flat) == 1 else torch.cat([torch.empty(0, dtype=torch.uint8, device=device), *flat])
        buffer = torch.empty(sum(incoming), dtype=torch.uint8, device=device)
        return Parcel(send, sizes, buffer, incoming)

    def sent(self, parcel: Parcel) -> PendingExchange:
        """Start an all-to-all."""
        how = AllToAllOptions()
        how.asyncOp, how.timeout = True, self.watch.timeout
        work = self.group.alltoall_base(parcel.buffer, parcel.send, parcel.incoming, parcel.outgoing, how)
        self.traffic.sent += sum(parcel.outgoing) - parcel.outgoing[self.rank]
        self.traffic.received += sum(parcel.incoming) - parcel.incoming[self.rank]
        on_host = parcel.buffer.device.type == "cpu"
        return PendingExchange(parcel, partial(self.watch.wait if on_host else _on_device, work))


def _on_device(work: dist.Work) -> None:
    """Let the device's stream wait."""
    work.wait()


def typed(data: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 -> the numbers of a dtype; a copy where they do not start at a multiple of their size."""
    return (data if data.storage_offset() % dtype.itemsize == 0 else data.clone()).view(dtype)

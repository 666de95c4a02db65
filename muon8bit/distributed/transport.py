"""How bytes get from rank to rank: one padded all-gather, and all-to-alls of pieces of any dtype."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

# The name that torch 2.13 gave it; the old one warns there.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass
class Traffic:
    """Payload bytes of this rank since the optimizer was made. What a rank keeps for itself does not count.

    Attributes:
        gathered: received of the sums, flags and padding of all-gathers (a ring sends as many).
        sent, received: pieces of matrices, Gram matrices and their factors.
    """

    gathered: int = 0
    sent: int = 0
    received: int = 0


@dataclass(frozen=True)
class Flight:
    """Pieces under way; `landed` waits for them."""

    buffer: Tensor
    sizes: list[int]
    work: dist.Work | None
    _departed: Tensor = field(repr=False)  # must live until the transfer is done

    def landed(self) -> list[Tensor]:
        """By rank, the bytes that came from it, uint8."""
        if self.work is not None:
            self.work.wait()
        return list(self.buffer.split(self.sizes))


@dataclass(frozen=True)
class Transport:
    """Collectives of one process group, whose bytes are counted."""

    group: ProcessGroup
    rank: int
    num_ranks: int
    traffic: Traffic = field(default_factory=Traffic)

    def all_gather(self, values: Tensor) -> Tensor:
        """[n] of equal n on all ranks -> [num_ranks, n]."""
        gathered = values.new_empty(self.num_ranks * len(values))
        all_gather_single(gathered, values, group=self.group)
        self.traffic.gathered += (self.num_ranks - 1) * values.nbytes
        return gathered.view(self.num_ranks, -1)

    def exchange(self, outgoing: Sequence[Sequence[Tensor]], incoming: list[int], device: torch.device) -> Flight:
        """Start an all-to-all.

        Args:
            outgoing: by rank, the pieces to send there, contiguous, in an order that the receiver knows.
            incoming: by rank, the bytes that it sends to this one.
        """
        pieces = [[piece.reshape(-1).view(torch.uint8) for piece in pieces] for pieces in outgoing]
        sizes = [sum(map(len, mine)) for mine in pieces]
        flat = [piece for mine in pieces for piece in mine]
        send = flat[0] if len(flat) == 1 else torch.cat([torch.empty(0, dtype=torch.uint8, device=device), *flat])
        buffer = torch.empty(sum(incoming), dtype=torch.uint8, device=device)
        work = dist.all_to_all_single(buffer, send, incoming, sizes, group=self.group, async_op=True)
        self.traffic.sent += sum(sizes) - sizes[self.rank]
        self.traffic.received += sum(incoming) - incoming[self.rank]
        return Flight(buffer, incoming, work, send)


def typed(data: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 -> the numbers of a dtype; a copy where they do not start at a multiple of their size."""
    return (data if data.storage_offset() % dtype.itemsize == 0 else data.clone()).view(dtype)

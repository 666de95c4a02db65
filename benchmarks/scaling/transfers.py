"""Bytes of a step on several ranks: as an assignment predicts them, and as they are counted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import torch

from muon8bit.distributed import ShardedBatch
from muon8bit.distributed.assignment import Assignment
from muon8bit.distributed.collectives import PendingExchange, Transport
from muon8bit.distributed.normalizing import moment_padding
from muon8bit.distributed.norms import GatheredSums
from muon8bit.distributed.planned_transfers import PlannedTransfer


def sent(transfer: PlannedTransfer) -> Iterator[tuple[int, int, int]]:
    """Yield (from rank, to rank, bytes) of all that is sent of a matrix: to the owner, and back."""
    for rank in transfer.sources | transfer.moment_sources:
        if rank != transfer.owner:
            part = transfer.sources.get(rank)
            num_bytes = 0 if part is None else transfer.sent_bytes(part)
            yield rank, transfer.owner, num_bytes + transfer.moment_bytes_of(rank)
    for rank in transfer.targets | transfer.vector_holders:
        if rank != transfer.owner:
            part = transfer.targets.get(rank)
            num_bytes = 0 if part is None else transfer.returned_bytes(part)
            yield transfer.owner, rank, num_bytes + transfer.result_bytes(rank)


def transfers(assignment: Assignment) -> Iterator[tuple[int, int, int]]:
    """Yield (from rank, to rank, bytes) of all that is sent: to the owner, and back.

    What fills up a rank's second moments of a round, behind which X stands, is on its own.
    """
    for transfer in assignment.transfers:
        yield from sent(transfer)
    ranks = range(len(assignment.load))
    for a_round in assignment.rounds:
        for rank, owner in permutations(ranks if a_round.sends_inputs else (), 2):
            owned = [transfer for transfer in a_round.transfers if transfer.owner == owner]
            if num_bytes := moment_padding(owned, rank):
                yield rank, owner, num_bytes


def bytes_sent(assignment: Assignment) -> tuple[int, ...]:
    """Return the bytes that each rank sends in one step, without the padding of all-gathers."""
    totals = [0] * len(assignment.load)
    for source, _, num_bytes in transfers(assignment):
        totals[source] += num_bytes
    return tuple(totals)


def bytes_received(assignment: Assignment) -> tuple[int, ...]:
    """Return the bytes that each rank receives in one step, without the padding of all-gathers."""
    totals = [0] * len(assignment.load)
    for _, target, num_bytes in transfers(assignment):
        totals[target] += num_bytes
    return tuple(totals)


def gathered_bytes(num_sums: Sequence[int]) -> int:
    """Return the bytes that each rank receives, and in a ring sends, of an all-gather of fp32 numbers.

    Args:
        num_sums: by rank, how many it gives; they are padded to the longest. A step gathers the sums of squares that
            its norms are made of, one a row and block, and its flags.
    """
    return 4 * (len(num_sums) - 1) * max(num_sums, default=0)


def num_gathered(batches: Sequence[ShardedBatch], num_flags: int) -> list[int]:
    """Return how many numbers each rank gives to the all-gather of a step, without padding."""
    sums = [GatheredSums(batch) for batch in batches]
    sizes = [[size + of_batch.num_flags for size in of_batch.sizes] for of_batch in sums]
    return [num_flags + sum(of_rank) for of_rank in zip(*sizes, strict=True)]


@dataclass
class ByteCounter:
    """Payload bytes of this rank. What a rank keeps for itself does not count.

    Attributes:
        gathered: received of the sums, flags and padding of all-gathers (a ring sends as many).
        sent, received: parts of matrices, Gram matrices and their factors.
    """

    gathered: int = 0
    sent: int = 0
    received: int = 0


@contextmanager
def counted_bytes() -> Iterator[ByteCounter]:
    """Count what this process moves in this context."""
    counter, gather_into, start = ByteCounter(), Transport.gather_into, PendingExchange.start

    def counting_gather(self: Transport, gathered: torch.Tensor, values: torch.Tensor, **options: Any) -> None:
        if values.dtype == torch.float32:  # not what ranks agree on
            counter.gathered += (self.num_ranks - 1) * values.nbytes
        gather_into(self, gathered, values, **options)

    def counting_start(self: PendingExchange) -> None:
        rank = self._transport.rank
        counter.sent += sum(self.sent_bytes) - self.sent_bytes[rank]
        counter.received += sum(self.received_bytes) - self.received_bytes[rank]
        start(self)

    Transport.gather_into, PendingExchange.start = counting_gather, counting_start  # type: ignore[method-assign]
    try:
        yield counter
    finally:
        Transport.gather_into, PendingExchange.start = gather_into, start  # type: ignore[method-assign]

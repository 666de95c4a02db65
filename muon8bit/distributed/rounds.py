"""The order in which matrices are sent: rounds that are orthogonalized together, and the parts in which updates return.

A round takes as long as its slowest owner, and its transfers as long as their busiest sender. So every owner takes as
much into a round as the others do; and a part of the round has the same share of the rows of every matrix, so that all
owners send in each.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, groupby
from math import inf
from operator import attrgetter
from typing import NamedTuple, Protocol

from .matrix_sharding import Span
from .planned_transfers import PlannedTransfer

# More rounds are taken where they are cheaper by this factor, and rounds are even to this factor. Messages and smaller
# batches have their price too.
_EVENNESS = 1.1
# A part takes so many times `workspace_bytes`, a share of a step's, where no inputs are sent and nothing is copied.
_GATHERED_SHARES = 3


class PlannedUpdate(NamedTuple):
    """Rows of a matrix that one rank gets in a part.

    Attributes:
        place: of the matrix in its round.
        owner: the rank that it comes from.
        rows: in the part of the matrix that this rank has.
        shape: of what comes: these rows, or the whole factor.
    """

    place: int
    owner: int
    rows: Span
    shape: tuple[int, int]


class PlannedPart(NamedTuple):
    """One part of a round, as one rank sees it.

    Attributes:
        runs: what it gets, in the order in which it comes from each owner; a run has rows and shape in common.
        incoming: by rank, the bytes that come from there.
        outgoing: of each matrix that it owns, in their order, the rank that gets some of it and the index of that in O;
            where all get the same, one entry stands for all.
    """

    runs: tuple[tuple[PlannedUpdate, ...], ...]
    incoming: list[int]
    outgoing: tuple[tuple[tuple[int, tuple[slice, slice]], ...], ...]


@dataclass(frozen=True)
class PlannedRound:
    """Matrices that are orthogonalized together.

    Attributes:
        transfers: in the order of the matrices.
        num_parts: in which the updates return.
        is_gathered: all ranks want all of every O: parts are all-gathers, to which each owner gives its own.
    """

    transfers: tuple[PlannedTransfer, ...]
    num_parts: int
    is_gathered: bool
    _parts: dict[tuple[int, int], PlannedPart] = field(default_factory=dict, compare=False, repr=False)

    @property
    def is_moved(self) -> bool:
        """Return whether anything is communicated."""
        return any(transfer.is_moved for transfer in self.transfers)

    @property
    def sends_inputs(self) -> bool:
        """Return whether any owner lacks a part of its matrices."""
        return any(rank != t.owner for t in self.transfers for rank in (*t.sources, *t.moment_sources))

    def part(self, rank: int, number: int) -> PlannedPart:
        """Return a part as a rank sees it, made once."""
        if (rank, number) not in self._parts:
            self._parts[rank, number] = self._part(rank, number)
        return self._parts[rank, number]

    def _part(self, rank: int, number: int) -> PlannedPart:
        num_ranks = len(self.transfers[0].matrix.sharding.param_parts)
        updates, incoming = list[PlannedUpdate](), [0] * num_ranks
        outgoing = list[tuple[tuple[int, tuple[slice, slice]], ...]]()
        for place, transfer in enumerate(self.transfers):
            if rank in transfer.targets:
                region = transfer.targets[rank]
                rows = transfer.returned_rows(region, number, self.num_parts)
                incoming[transfer.owner] += transfer.returned_bytes(region, number, self.num_parts)
                if rows[0] < rows[1]:
                    shape = rows[1] - rows[0], transfer.sent_shape(region)[1]
                    rows = (0, region.shape[0]) if transfer.is_gram else rows
                    updates.append(PlannedUpdate(place, transfer.owner, rows, shape))
            if number == 0:
                incoming[transfer.owner] += transfer.result_bytes(rank)
            if transfer.owner == rank:
                outgoing.append(tuple(self._cuts(transfer, number)))
        runs = tuple(tuple(run) for _, run in groupby(updates, key=attrgetter("rows", "shape")))
        return PlannedPart(runs, incoming, tuple(outgoing))

    def _cuts(self, transfer: PlannedTransfer, number: int) -> Iterable[tuple[int, tuple[slice, slice]]]:
        """Yield what the owner of a matrix sends of it in a part, and to which rank."""
        for rank, region in transfer.targets.items():
            start, stop = transfer.returned_rows(region, number, self.num_parts)
            if transfer.is_gram:
                first, cols = 0, slice(None)
            else:
                first, cols = region.rows[0], slice(*region.cols)
            if start < stop:
                yield rank, (slice(first + start, first + stop), cols)
            if self.is_gathered:
                return


class RunningRound(Protocol):
    """Halves of a round, in the order in which they are called."""

    def prepare_inputs(self) -> None:
        """Make what the owners get ready."""

    def send_inputs(self) -> None:
        """Send it."""

    def orthogonalize(self) -> None:
        """Orthogonalize what this rank owns."""

    def send_updates(self) -> None:
        """Send the updates, or the first part of them."""

    def apply_updates(self) -> None:
        """Update this rank's parts of the parameters."""


def run_behind(first: RunningRound, later: Iterable[RunningRound]) -> None:
    """Run rounds behind the first, which has sent its updates, three at a time.

    While one is orthogonalized, the next one's inputs are on their way, and the last one's updates.
    """
    returning: RunningRound | None = first
    sending: RunningRound | None = None
    for upcoming in chain(later, (None, None)):
        if upcoming is not None:
            upcoming.prepare_inputs()
            upcoming.send_inputs()
        if sending is not None:
            sending.orthogonalize()
            sending.send_updates()
        if returning is not None:
            returning.apply_updates()
        returning, sending = sending, upcoming


def make_rounds(
    in_order: Sequence[PlannedTransfer], load: Sequence[float], workspace_bytes: int
) -> tuple[PlannedRound, ...]:
    """Return the rounds in which matrices are sent.

    Args:
        in_order: the transfers, costly ones first, what is not moved last.
        load: by rank, the sum of the costs of its matrices.
        workspace_bytes: see `assignment.plan`.
    """
    rounds, cost = _cut(in_order, workspace_bytes, inf)
    if rounds:
        largest = max(*(transfer.cost for transfer in in_order), max(load) / len(rounds))
        evener, lower_cost = _cut(in_order, workspace_bytes, _EVENNESS * largest)
        rounds = evener if _EVENNESS * lower_cost < cost else rounds
    return tuple(_round(sorted(members, key=lambda one: one.index), len(load), workspace_bytes) for members in rounds)


def round_bytes(heads: Iterable[PlannedTransfer], workspace_bytes: int) -> int:
    """Return the bytes that an owner may have in a round: as many as the largest matrix takes that begins one."""
    return max(workspace_bytes, *(transfer.owner_bytes for transfer in heads))


def _cut(
    in_order: Sequence[PlannedTransfer], workspace_bytes: int, largest_cost: float
) -> tuple[list[list[PlannedTransfer]], float]:
    """Return rounds, and their cost one after the other; in each, every owner takes its next matrices.

    Args:
        in_order: the transfers.
        workspace_bytes: of one owner in one round, or as `round_bytes` says.
        largest_cost: of one owner in one round, or it has one matrix there.
    """
    queues: dict[int, deque[PlannedTransfer]] = {}
    for transfer in in_order:
        queues.setdefault(transfer.owner, deque()).append(transfer)
    rounds, total = list[list[PlannedTransfer]](), 0.0
    while left := [queue for queue in queues.values() if queue]:
        budget = round_bytes((queue[0] for queue in left), workspace_bytes)
        members, slowest = list[PlannedTransfer](), 0.0
        for queue in left:
            first = queue.popleft()
            members.append(first)
            num_bytes, cost = first.owner_bytes, first.cost
            while queue and queue[0].is_moved == first.is_moved:
                num_bytes += queue[0].owner_bytes
                if num_bytes > budget or cost + queue[0].cost > largest_cost:
                    break
                cost += queue[0].cost
                members.append(queue.popleft())
            slowest = max(slowest, cost)
        rounds.append(members)
        total += slowest
    return rounds, total


def _round(members: Sequence[PlannedTransfer], num_ranks: int, workspace_bytes: int) -> PlannedRound:
    """Return a round whose parts are such that no rank sends or receives more than `workspace_bytes` in one.

    It is more where one matrix or one rank's part of one is larger, and by a row of each matrix.
    """
    wholes = [{*transfer.targets.values()} for transfer in members]
    is_gathered = all(
        len(transfer.targets) == num_ranks and len(whole) == 1 and not transfer.is_gram
        for transfer, whole in zip(members, wholes, strict=True)
    )
    sent, received, largest, most_rows = Counter[int](), Counter[int](), workspace_bytes, 1
    for transfer in members:
        for rank, region in transfer.targets.items():
            num_bytes = transfer.returned_bytes(region) + transfer.result_bytes(rank)
            largest, most_rows = max(largest, num_bytes), max(most_rows, region.shape[0])
            received[rank] += num_bytes
            sent[transfer.owner] += num_bytes
    # Of an all-gather the parts of all are as long as the longest, so that it takes what each sends to all.
    most = max(sent.values()) if is_gathered else max(*sent.values(), *received.values())
    planned = PlannedRound(tuple(members), 1, is_gathered)
    if is_gathered and not planned.sends_inputs:
        largest = max(largest, _GATHERED_SHARES * workspace_bytes)
    if not planned.is_moved:
        return replace(planned, is_gathered=False)
    return replace(planned, num_parts=min(-(-most // largest), most_rows))

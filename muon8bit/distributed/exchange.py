"""Second phase of matrices that lie on several ranks: every matrix is orthogonalized whole, once, by its owner.

    X   =  u / norm             of the part that a rank holds, with the new codes and scales        (send_inputs)
    X  ->  owner:   O = NS(X)   of the whole                                                        (orthogonalize)
    O  ->  every rank that wants a part, which updates its part of W                                (apply_updates)

With the strategy "reduce_gram" the parts stay: R = sum of the parts' Gram matrices goes to the owner, and the factor Q,
with which O = Q X (or X Q), comes back. While a round is orthogonalized, the next one's inputs are on their way, and
the last one's updates. The first round alone is orthogonalized before anything is written: what fails until then on any
rank has changed nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import filterfalse, groupby
from math import prod
from operator import attrgetter
from typing import NamedTuple

import torch
from muon8bit_kernels import kernels_for
from torch import Tensor

from ..orthogonalize import apply_factor, batch_size, device_kind, gram_factor, orthogonalize, partial_gram
from ..step.group_options import Options
from ..step.matrix_batches import MatrixBatch, ParamMatrices
from ..step.muon import average_, normalize_signs_
from ..step.second_moment import Normalization, normalize
from .assignment import Assignment
from .collectives import Kept, PendingExchange, PendingGather, Transport
from .normalizing import (
    MomentParts,
    PartialUpdate,
    ReceivedNormalization,
    moment_bytes,
    moment_padding,
    padding,
    results_for,
    sent_moment,
    update_members,
    write_vectors,
)
from .planned_transfers import PlannedTransfer
from .rounds import PlannedPart, PlannedRound, PlannedUpdate, run_behind
from .sharded_batch import ShardedBatch, ShardedMatrix

# Of the workspace, the part that each of these may take: of the round that is orthogonalized the bytes received, X with
# the iteration's own memory, and O; of the next one what is sent, made contiguous, and received; of the last one O,
# what is sent and what is received. Besides, passes over the momentum take up to 10 MiB on a CPU.
NUM_SHARES = 12
by_owner = attrgetter("owner")


class Transfer(NamedTuple):
    """One matrix in a round, as this rank sees it.

    Attributes:
        plan: its owner, and what is sent.
        batch: where this rank has its part.
        number: of the matrix in the batch.
    """

    plan: PlannedTransfer
    batch: ShardedBatch
    number: int

    @property
    def matrix(self) -> ShardedMatrix:
        """Return this rank's part."""
        return self.batch.members[self.number]


class ExchangeRound:
    """Matrices that are orthogonalized together. All ranks call the methods in their order here.

    The parts of X are sent all at once: a rank sends no more than its share of its replica's matrices. The updates come
    back part by part of the round, since a rank may want all of every owner's; a part has the same share of the rows of
    every matrix. What is sent of it lies in one buffer: where all ranks want the same, once; where some do, a copy for
    each.
    """

    is_first = False  # whether momenta are written later, by `FirstRound.write`

    def __init__(
        self,
        planned: PlannedRound,
        transfers: list[Transfer],
        transport: Transport,
        options: Options,
        device: torch.device,
    ) -> None:
        """Take the transfers of a planned round, in its order."""
        self._planned, self._transfers = planned, transfers
        self._transport, self._options, self._device = transport, options, device
        self._share = options.workspace_bytes // NUM_SHARES
        self._members = [transfer.matrix for transfer in transfers]
        # Equal numbers for what one launch can update.
        numbers: dict[object, int] = {}
        self._kinds = [
            numbers.setdefault((id(transfer.batch), param.stride(), param.dtype), len(numbers))
            if (param := member.param) is not None
            else -1
            for transfer, member in zip(transfers, self._members, strict=True)
        ]
        self._owned = [transfer for transfer in transfers if transfer.plan.owner == transport.rank]
        self._own_X: dict[int, Tensor] = {}  # by matrix, this rank's part of X with the strategy "reduce_gram"
        self._normalized: list[tuple[PlannedTransfer, Normalization, int]] = []  # with their numbers in a batch
        self._received: dict[int, ReceivedNormalization] = {}  # by the matrix's place
        self._results: list[Tensor] = []  # O, or the factors, of the matrices that this rank owns, until they are sent

    def prepare_inputs(self) -> None:
        """Write the new momenta, and make the parts of X, or their Gram matrices, ready to be sent to the owners."""
        rank, outgoing = self._transport.rank, self._by_rank()
        for plan, batch, number in self._transfers:
            outgoing[plan.owner] += sent_moment(plan, batch.members[number].second, rank)
        if self._planned.sends_inputs:
            for tensors in outgoing:
                tensors += padding(tensors, self._device)
        here = [transfer for transfer in self._transfers if transfer.matrix.stack is not None]
        for chunk in self._together(filter(self._needs_input, here), with_input=True):
            for (plan, *_), X in zip(chunk, self._apply(chunk), strict=True):
                if plan.is_gram:
                    self._own_X[plan.index] = X
                if rank in plan.sources:
                    outgoing[plan.owner].append(partial_gram(X, plan.is_tall) if plan.is_gram else X)
        if not self.is_first:
            self._write_momenta(filterfalse(self._needs_input, here))
        self._pending: PendingExchange | Kept
        if not self._planned.sends_inputs:
            self._pending = Kept(outgoing[rank])
            return
        owned = [transfer.plan for transfer in self._owned]
        incoming = [moment_bytes(owned, source) for source in range(len(outgoing))]
        for plan in owned:
            for source, region in plan.sources.items():
                incoming[source] += plan.sent_bytes(region)
        self._pending = PendingExchange(self._transport, outgoing, incoming, self._device)

    def send_inputs(self) -> None:
        """Send what `prepare_inputs` has made."""
        self._pending.start()

    def orthogonalize(self) -> None:
        """Orthogonalize what this rank owns, or make the factors."""

        def size(transfer: Transfer) -> int:
            rows, cols, _, method, _ = transfer.batch.matrix
            return batch_size(method, rows, cols, device_kind(self._device), self._share)

        def key(transfer: Transfer) -> object:
            rows, cols, _, method, _ = transfer.batch.matrix
            return rows, cols, method, transfer.batch.options.coefficients, transfer.plan.is_gram

        self._pending.wait()
        moments = self._received_moments()
        for chunk in _chunks(self._owned, key, size):
            plan, batch, _ = chunk[0]
            method, options = plan.matrix.method, batch.options
            solve = gram_factor if plan.is_gram else orthogonalize
            whole = self._assembled([transfer.plan for transfer in chunk])
            if options.sign_momentum:
                whole = whole.to(method.dtype)
                normalize_signs_(whole, options)
            whole = solve(whole, options.coefficients, method, self._options.backend)
            self._results.extend(whole)
            if options.second_moment is not None and batch.second is not None:
                old = [moments.popleft().assembled(batch.second) for _ in chunk]
                found = normalize(whole, old, options.second_moment, self._options.backend)
                self._normalized += [(transfer.plan, found, number) for number, transfer in enumerate(chunk)]

    def _received_moments(self) -> deque[MomentParts]:
        """Return the second moments of the matrices that this rank owns, which stand in front of X."""
        owned = [plan for plan, *_ in self._owned]
        moments = deque(MomentParts.read(plan, self._pending) for plan in owned if plan.moment_sources)
        if self._planned.sends_inputs:
            for rank in range(self._transport.num_ranks):
                self._pending.read(rank, (moment_padding(owned, rank),), torch.uint8)
        return moments

    def send_updates(self, number: int = 0) -> None:
        """Send what this rank owns of a part of the round to who wants it, O or the factor."""
        part = self._planned.part(self._transport.rank, number)
        outgoing = self._by_rank()
        if number == 0:
            for plan, found, place in self._normalized:
                for rank in range(self._transport.num_ranks)[: 1 if self._planned.is_gathered else None]:
                    outgoing[rank] += results_for(plan, found, place, rank)
            self._normalized.clear()
        for result, cuts in zip(self._results, part.outgoing, strict=True):
            for rank, index in cuts:
                outgoing[rank].append(result[index])
        if number + 1 == self._planned.num_parts:
            self._results.clear()
        if self._planned.is_gathered:
            own = [tensor for tensors in outgoing for tensor in tensors]
            self._pending = PendingGather(self._transport, own, part.incoming, self._device)
        elif self._planned.is_moved:
            self._pending = PendingExchange(self._transport, outgoing, part.incoming, self._device)
        else:
            self._pending = Kept(outgoing[self._transport.rank])
        self._pending.start()

    def apply_updates(self) -> None:
        """Update this rank's parts of the parameters, and let the memory go."""
        for number in range(self._planned.num_parts):
            received = self._pending
            received.wait()
            if number == 0:
                self._take_normalizations(received)
            if number + 1 < self._planned.num_parts:
                self.send_updates(number + 1)
            self._update(self._planned.part(self._transport.rank, number), received)
            del received
        del self._pending
        self._own_X.clear()
        self._received.clear()

    def _take_normalizations(self, received: PendingExchange | Kept) -> None:
        """Read the results of the owners, and write the second moments of rows and columns that this rank keeps."""
        by_batch: dict[int, list[int]] = {}
        for place, (plan, batch, _) in enumerate(self._transfers):
            if batch.second is not None:
                self._received[place] = ReceivedNormalization.read(plan, self._transport.rank, received)
                by_batch.setdefault(id(batch), []).append(place)
        for places in by_batch.values():
            numbers = [self._transfers[place].number for place in places]
            write_vectors(self._transfers[places[0]].batch, numbers, [self._received[place] for place in places])

    def _by_rank(self) -> list[list[Tensor]]:
        return [[] for _ in range(self._transport.num_ranks)]

    def _needs_input(self, transfer: Transfer) -> bool:
        """Return whether X of this rank's part is needed, by the owner or here for "reduce_gram"; replicas' is not."""
        return transfer.plan.is_gram or self._transport.rank in transfer.plan.sources

    def _together(self, transfers: Iterable[Transfer], *, with_input: bool) -> Iterator[list[Transfer]]:
        """Yield those of which this rank has a part, as many at a time as one launch takes, with X or without."""

        def size(transfer: Transfer) -> int:
            assert transfer.matrix.stack is not None
            stack, itemsize = transfer.matrix.stack, transfer.batch.matrix.method.dtype.itemsize
            # X, and copies of gradients that have factors; in the first round of momenta too
            num_bytes = itemsize if with_input or self._is_cut(transfer.batch) else 0
            num_bytes += 8 if stack.factor is not None else 0
            num_bytes += 2 * stack.momentum.codes.itemsize if self.is_first else 0
            return max(1, self._share // max(1, num_bytes * prod(stack.momentum.codes.shape[1:])))

        def key(transfer: Transfer) -> object:
            stack = transfer.matrix.stack
            return id(transfer.batch), stack and stack.layout

        return _chunks(transfers, key, size)

    def _is_cut(self, batch: ShardedBatch) -> bool:
        """Return whether this rank has but some of the columns of the momenta."""
        region = batch.matrix.sharding.momentum_parts[self._transport.rank]
        return region is not None and batch.is_cut(region)

    def _write_momenta(self, transfers: Iterable[Transfer]) -> None:
        """Write the new momenta of this rank's parts of these, of which X is not needed.

        Where columns are cut it comes out beside them.
        """
        for chunk in self._together(transfers, with_input=False):
            if self._is_cut(chunk[0].batch):
                self._apply(chunk)
            else:
                batch, numbers = chunk[0].batch, [transfer.number for transfer in chunk]
                average_(MatrixBatch(_stacks(chunk), batch.options, skip=batch.skip_of(numbers)), None, None)

    def _apply(self, transfers: list[Transfer]) -> Tensor:
        """Write the new momenta of these into codes and scales; return their parts of X, [transfers, rows, cols]."""
        batch, numbers, stacks = transfers[0].batch, [transfer.number for transfer in transfers], _stacks(transfers)
        if numbers[-1] - numbers[0] == len(numbers) - 1:
            norms = batch.norms[numbers[0] : numbers[-1] + 1]
        else:
            norms = torch.stack([batch.norms[number] for number in numbers])
        shape = stacks[0].momentum.codes.shape[1:]
        dtype = torch.int8 if batch.options.sign_momentum else batch.matrix.method.dtype
        X = torch.empty(len(stacks), *shape, dtype=dtype, device=self._device)
        matrices = MatrixBatch(stacks, batch.options, skip=batch.skip_of(numbers))
        if self.is_first:
            matrices = matrices.with_tensors()
        region = batch.matrix.sharding.momentum_parts[self._transport.rank]
        if region is not None and batch.is_cut(region):
            scales = None if batch.scales is None else torch.stack([batch.scales[number] for number in numbers])
            tensors = matrices.codes, matrices.scales or None, matrices.grads(), scales, norms, X
            kernels, skip = kernels_for(self._device, batch.options.backend), matrices.skip
            if batch.idle is not None:
                X.zero_()  # of which nothing is written where a matrix is skipped
            how = {"first_col": region.cols[0], "signs": batch.options.sign_momentum, **matrices.averaging}
            kernels.momentum_apply_cut(*tensors, **how, skip=skip)
        else:
            average_(matrices, norms, X)
        return X

    def _assembled(self, plans: list[PlannedTransfer]) -> Tensor:
        """Return X of whole matrices from its parts, or the sums of their Gram matrices in the order of ranks."""
        is_gram, matrix = plans[0].is_gram, plans[0].matrix
        shape = (min(matrix[:2]),) * 2 if is_gram else matrix[:2]
        new = torch.zeros if is_gram else torch.empty
        whole = new(len(plans), *shape, dtype=plans[0].sent_dtype, device=self._device)
        for out, plan in zip(whole, plans, strict=True):
            for rank, region in plan.sources.items():
                part = self._pending.read(rank, plan.sent_shape(region), plan.sent_dtype)
                if is_gram:
                    out += part
                else:
                    out[region.slices] = part
        return whole

    def _update(self, part: PlannedPart, received: PendingExchange | Kept) -> None:
        """Update this rank's parts of parameters by a part of the round's results."""

        def kind(update: PlannedUpdate) -> int:
            return self._kinds[update.place]

        for alike in (list(run) for planned in part.runs for _, run in groupby(planned, key=kind)):
            updates = sorted(alike, key=by_owner)
            places, rows, shape = [update.place for update in updates], updates[0].rows, updates[0].shape
            plan, batch, _ = self._transfers[places[0]]
            directions = received.read_all([update.owner for update in updates], shape, plan.matrix.method.dtype)
            if plan.is_gram:
                X = torch.stack([self._own_X[self._transfers[place].plan.index] for place in places])
                directions = [apply_factor(torch.cat(directions), X, plan.is_tall)]
            numbers, partial = [self._transfers[place].number for place in places], None
            if batch.second is not None:
                found = [self._received[place] for place in places]
                partial = PartialUpdate.of(batch, numbers, found, rows, plan.targets[self._transport.rank])
            update_members([self._members[place] for place in places], directions, batch, rows, numbers, partial)


class FirstRound(ExchangeRound):
    """The first round of a step, which writes nothing before `write`, and the rounds after it."""

    is_first = True

    def __init__(
        self,
        batches: Sequence[ShardedBatch],
        assignment: Assignment,
        transport: Transport,
        options: Options,
        device: torch.device,
    ) -> None:
        """Take the assignment of the matrices of these batches, numbered through in their order."""
        for batch in batches:
            batch.options = replace(batch.options, skip=options.skip)
        matrices = [(batch, number) for batch in batches for number in range(len(batch.members))]
        first, *self._later = [
            (planned, [Transfer(plan, *matrices[plan.index]) for plan in planned.transfers])
            for planned in assignment.rounds
        ]
        super().__init__(*first, transport, options, device)

    def write(self) -> None:
        """Write the first round's momenta, and step all matrices."""
        self.is_first = False
        self._write_momenta(transfer for transfer in self._transfers if transfer.matrix.stack is not None)
        self.send_updates()
        common = self._transport, self._options, self._device
        run_behind(self, (ExchangeRound(planned, transfers, *common) for planned, transfers in self._later))


def _chunks(
    transfers: Iterable[Transfer], key: Callable[[Transfer], object], size: Callable[[Transfer], int] | None = None
) -> Iterator[list[Transfer]]:
    """Yield transfers that follow on each other and have an equal `key`, as many at a time as `size` of the first."""
    for _, run in groupby(transfers, key=key):
        alike = list(run)
        step = len(alike) if size is None else size(alike[0])
        for start in range(0, len(alike), step):
            yield alike[start : start + step]


def _stacks(transfers: Iterable[Transfer]) -> list[ParamMatrices]:
    """Return this rank's parts of the momenta of these, with their gradients, where it has one."""
    return [stack for transfer in transfers if (stack := transfer.matrix.stack) is not None]

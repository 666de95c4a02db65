"""Second phase of matrices that lie on several ranks: every matrix is orthogonalized whole, once, by its owner.

    X   =  u / norm             of the part that a rank holds, with the new codes and scales        (depart)
    X  ->  owner:   O = NS(X)   of the whole                                                        (iterate)
    O  ->  every rank that wants a part, which updates its part of W                                (land)

On the route "gram" the parts stay: R = sum of the parts' Gram matrices goes to the owner, and the factor Q, with which
O = Q X (or X Q), comes back. While a round is iterated, the next one's parts travel, and the last one's results.
The first round alone is iterated before anything is written: what fails until then on any rank has changed nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..config import Options
from ..orthogonalize import apply_factor, batch_size, device_kind, gram_factor, orthogonalize, partial_gram
from ..step import momentum
from ..step.matrix_batches import gradients, momenta_on, momentum_tensors
from ..step.muon import written
from ..step.update import factors, lr_ratio, update_params_
from .collectives import PendingExchange, Transport, typed
from .matrix_sharding import ShardPiece
from .sharded_batch import ShardedBatch, ShardedMatrix, is_cut, runs
from .timetable import Timetable, Transfer

# Of the workspace, the part that each of these may take: of the round that is iterated the bytes received, X with the
# iteration's own memory, and O; of the next one what is sent, made contiguous, and received; of the last one O, what is
# sent and what is received. Besides, passes over the momentum take up to 10 MiB on a CPU.
NUM_SHARES = 12


class ExchangeRound:
    """Matrices that are iterated together. Call `pack`, `depart`, `iterate`, `give_back` and `land` in this order, on
    all ranks alike. With `is_first` `pack` writes no momenta; call `keep` when they may be written.

    The parts of X travel all at once: a rank sends no more than its share of its replica's matrices. The results come
    back part by part, since a rank may want all of every owner's. What is sent lies in one buffer: where several ranks
    want the same, its owner has a copy for each of them there, beyond the workspace if the matrix is large.
    """

    def __init__(
        self,
        parts: list[list[Transfer]],
        transport: Transport,
        options: Options,
        device: torch.device,
        *,
        is_first: bool = False,
    ) -> None:
        self.parts, self.items, self.is_first = parts, [item for part in parts for item in part], is_first
        self.transport, self.options, self.device = transport, options, device
        self.rank = transport.rank
        self.kept: dict[int, Tensor] = {}  # by matrix, this rank's part of X on the route "gram"
        self.results: list[Tensor] = []  # by matrix that this rank owns, until they have been sent

    def pack(self) -> None:
        """Write the new momenta, and make the parts of X, or their Gram matrices, ready to be sent to the owners."""
        outgoing: list[list[Tensor]] = [[] for _ in range(self.transport.num_ranks)]
        for item, X in self._applied():
            if item.is_gram:
                self.kept[item.stop.number] = X
            if item.source(self.rank) is not None:
                outgoing[item.owner].append(partial_gram(X, item.is_tall) if item.is_gram else X)
        incoming = [0] * self.transport.num_ranks
        for item in self._owned(self.items):
            for rank, region in item.stop.sources:
                incoming[rank] += item.sent_bytes(region)
        self.parcel = self.transport.packed(outgoing, incoming, self.device)

    def depart(self) -> None:
        """Send what `pack` has made."""
        self.flight = self.transport.sent(self.parcel)
        del self.parcel

    def keep(self) -> None:
        """Of the first round, write the new momenta; X, which comes out beside them, has been used by now."""
        self.is_first = False
        for _ in self._applied():
            pass

    def _owned(self, items: Iterable[Transfer]) -> list[Transfer]:
        return [item for item in items if item.owner == self.rank]

    def _applied(self) -> Iterator[tuple[Transfer, Tensor]]:
        """Write the momenta that this rank holds; their parts of X, in the order of the items."""

        def kind(item: Transfer) -> tuple[int, object]:
            return id(item.bundle), item.member.held and item.member.held.layout

        held = [item for item in self.items if item.member.held is not None]
        for _, run in groupby(held, key=kind):
            items = list(run)
            shape = items[0].member.held.momentum.codes.shape[1:]  # type: ignore[union-attr]
            # X, and copies of gradients; in the first round of momenta too
            one = (12 if self.is_first else 8) * prod(shape)
            size = max(1, self.options.workspace_bytes // NUM_SHARES // one)
            for start in range(0, len(items), size):
                some = items[start : start + size]
                X = self._apply(some)
                yield from zip(some, X, strict=True)

    def _apply(self, items: list[Transfer]) -> Tensor:
        """The new momenta of these into codes and scales, and their parts of X: [items, rows, cols]."""
        bundle, (stacks,) = items[0].bundle, runs([item.member for item in items])
        norms = torch.stack([bundle.norms[item.place] for item in items])
        shape = stacks[0].momentum.codes.shape[1:]
        X = torch.empty(len(items), *shape, dtype=bundle.matrix.path.dtype, device=self.device)
        grads = gradients(stacks)
        skip = self.options.skip
        kept = [tensor.clone() for tensor in momentum_tensors(stacks)] if self.is_first else None
        momenta = [stack.momentum for stack in momenta_on(stacks, kept)]
        region = bundle.matrix.spread.held[self.rank]
        if region is not None and is_cut(region, bundle.matrix):
            scales = None if bundle.scales is None else torch.stack([bundle.scales[item.place] for item in items])
            first_col = region.cols[0]
            momentum.cut_apply_(momenta, grads, scales, norms, X, first_col=first_col, **bundle.average, skip=skip)
        else:
            momentum.apply_(momenta, grads, norms, X, **bundle.average, skip=skip, backend=self.options.backend)
        return X

    def iterate(self) -> None:
        """Orthogonalize what this rank owns, or make the factor."""
        data, place = self.flight.landed(), [0] * self.transport.num_ranks

        def take(item: Transfer, piece: ShardPiece) -> Tensor:
            start = place[piece.rank]
            place[piece.rank] = stop = start + item.sent_bytes(piece.region)
            return typed(data[piece.rank][start:stop], item.sent_dtype).view(item.sent_shape(piece.region))

        self.results = list(self._orthogonalized(self._owned(self.items), take))

    def give_back(self) -> None:
        """Send the first part of the results to who wants them."""
        self.flight = self._returning(self.parts[0])

    def _returning(self, part: list[Transfer]) -> PendingExchange:
        """Send what this rank owns of a part, or the factor, to who wants it."""
        outgoing: list[list[Tensor]] = [[] for _ in range(self.transport.num_ranks)]
        owned = self._owned(part)
        for item, result in zip(owned, self.results, strict=False):
            for rank, region in item.stop.targets:
                part_of = result if item.is_gram else result[slice(*region.rows), slice(*region.cols)]
                outgoing[rank].append(part_of)
        del self.results[: len(owned)]
        incoming = [0] * self.transport.num_ranks
        for item in part:
            wanted = item.target(self.rank)
            if wanted is not None:
                incoming[item.owner] += item.returned_bytes(wanted)
        return self.transport.sent(self.transport.packed(outgoing, incoming, self.device))

    def _orthogonalized(
        self, items: list[Transfer], take: Callable[[Transfer, ShardPiece], Tensor]
    ) -> Iterator[Tensor]:
        """In their order O, or the factor Q; those that can go through the iteration together do."""

        def kind(item: Transfer) -> tuple[Any, ...]:
            return item.matrix.rows, item.matrix.cols, item.matrix.path, item.bundle.schedule, item.is_gram

        for (rows, cols, path, schedule, is_gram), run in groupby(items, key=kind):
            together, step = list(run), gram_factor if is_gram else orthogonalize
            size = batch_size(path, rows, cols, device_kind(self.device), self.options.workspace_bytes // NUM_SHARES)
            for start in range(0, len(together), size):
                whole = self._assembled(together[start : start + size], take)
                yield from step(whole, schedule, path, self.options.backend)

    def _assembled(self, items: list[Transfer], take: Callable[[Transfer, ShardPiece], Tensor]) -> Tensor:
        """X of whole matrices from its parts, or the sums of their Gram matrices in the order of ranks."""
        first = items[0]
        shape = (first.small, first.small) if first.is_gram else (first.matrix.rows, first.matrix.cols)
        new = torch.zeros if first.is_gram else torch.empty
        whole = new(len(items), *shape, dtype=first.sent_dtype, device=self.device)
        for matrix, item in zip(whole, items, strict=True):
            for piece in item.stop.sources:
                if item.is_gram:
                    matrix += take(item, piece)
                else:
                    matrix[slice(*piece.region.rows), slice(*piece.region.cols)] = take(item, piece)
        return whole

    def land(self) -> None:
        """Update this rank's parts of the parameters."""
        for number, part in enumerate(self.parts):
            data = self.flight.landed()
            if number + 1 < len(self.parts):
                self.flight = self._returning(self.parts[number + 1])
            self._update(part, data)

    def _update(self, part: list[Transfer], data: list[Tensor]) -> None:
        """Take a part's results from the bytes that came from each rank."""
        place = [0] * self.transport.num_ranks

        def kind(item: Transfer) -> tuple[object, ...]:
            param = item.member.param
            assert param is not None
            return id(item.bundle), item.owner, param.shape, param.stride(), param.dtype

        wanted = [item for item in part if item.target(self.rank) is not None]
        for _, run in groupby(wanted, key=kind):
            items = list(run)
            region = items[0].target(self.rank)
            assert region is not None
            owner, num_bytes = items[0].owner, len(items) * items[0].returned_bytes(region)
            start = place[owner]
            place[owner] += num_bytes
            shape = len(items), *items[0].sent_shape(region)
            got = typed(data[owner][start : start + num_bytes], items[0].matrix.path.dtype).view(shape)
            if items[0].is_gram:
                X = torch.stack([self.kept[item.stop.number] for item in items])
                got = apply_factor(got, X, items[0].is_tall)
            _update([item.member for item in items], got, items[0].bundle, self.options)


def _update(members: list[ShardedMatrix], directions: Tensor, bundle: ShardedBatch, options: Options) -> None:
    """Update the parts of these parameters by `directions` [members, rows, cols], scaled by the whole shape."""
    group, matrix = bundle.group, bundle.matrix
    ratio = lr_ratio(matrix.rows, matrix.cols, group["adjust_lr_fn"])
    decay, scale = factors(lr=group["lr"], weight_decay=group["weight_decay"], ratio=ratio)
    places: dict[str, Any] = {}
    if members[0].key is not None:
        keys, firsts = [member.key for member in members], [member.first for member in members]
        places = {"keys": keys, "firsts": firsts, "pitch": matrix.cols}
    with written([member.param for member in members if member.param is not None]) as params:
        update_params_(params, directions, decay, scale, **places, skip=options.skip, backend=options.backend)


class Rounds:
    """All rounds of a step. Call `pack`, `depart`, `iterate` and `write` in this order, on all ranks alike.

    The last one writes.

    Args:
        bundles: whose matrices are numbered through in their order.
        timetable: of their plan.
        transport, options, device: of the team and the step.
    """

    def __init__(
        self,
        bundles: Sequence[ShardedBatch],
        timetable: Timetable,
        transport: Transport,
        options: Options,
        device: torch.device,
    ) -> None:
        places = [(bundle, place) for bundle in bundles for place in range(len(bundle.members))]
        self._how = transport, options, device
        self._rounds = [
            [[Transfer(stop, *places[stop.number]) for stop in part] for part in parts] for parts in timetable if parts
        ]
        self._first = ExchangeRound(self._rounds[0], *self._how, is_first=True)

    def pack(self) -> None:
        """Allocate and compute, without communication, what the first round sends."""
        self._first.pack()

    def depart(self) -> None:
        """Send it."""
        self._first.depart()

    def iterate(self) -> None:
        """Orthogonalize the first round's matrices."""
        self._first.iterate()

    def write(self) -> None:
        """Write the first round's momenta, and step all matrices."""
        self._first.keep()
        self._first.give_back()
        landing: ExchangeRound | None = self._first
        del self._first
        flying: ExchangeRound | None = None
        for parts in [*self._rounds[1:], [], []]:
            current = None
            if parts:
                current = ExchangeRound(parts, *self._how)
                current.pack()
                current.depart()
            if flying is not None:
                flying.iterate()
                flying.give_back()
            if landing is not None:
                landing.land()
            landing, flying = flying, current

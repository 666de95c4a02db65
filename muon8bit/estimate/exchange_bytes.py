"""The memory of a rank while matrices are exchanged, counted from the plan: what `exchange` allocates, in its order.

At its peak a rank has the inputs of one round, packed and received; of the round before the matrices that it
orthogonalizes, with the iteration's own memory; and of the one before that O and its updates, packed and received.
Second moments stand in front of the inputs, the results of normalization in front of the updates.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from itertools import filterfalse, groupby
from math import prod

from ..config import MIN_QUANTIZED_COLUMNS
from ..distributed.assignment import Assignment
from ..distributed.exchange import NUM_SHARES
from ..distributed.normalizing import moment_bytes, moment_padding
from ..distributed.planned_transfers import MatrixStage, PlannedTransfer
from ..distributed.rounds import PlannedRound, run_behind
from ..orthogonalize import NSMethod, batch_size, workspace_bytes as iteration_bytes

# On a CPU: the elements that a pass takes at once, and the bytes of temporaries of each, by what it goes over: momenta
# with X and without (decoding takes the last number of them), O with the second moments of rows or columns and of
# elements, parameters and with these.
_PASS_ELEMENTS, _INPUT_BYTES, _MOMENTUM_BYTES, _DECODED_BYTES = 2**19, 16, 12, 4
_SQUARES_BYTES, _STATS_BYTES, _PARAM_BYTES, _DIVIDED_PARAM_BYTES = 4, 20, 8, 24


def exchange_bytes(
    assignment: Assignment, rank: int, workspace_bytes: int, kind: str, *, bits: int = 8, between: int = 0
) -> int:
    """Return the most bytes that a step allocates at once on a rank for matrices that lie on several ranks.

    Gradients are taken to have no factors, and momenta whole rows.

    Args:
        assignment: the plan of all matrices, made with `workspace_bytes // NUM_SHARES`.
        rank: in the group.
        workspace_bytes: the optimizer's.
        kind: device kind of `orthogonalize.device_kind`.
        bits: of the momenta.
        between: bytes that come and go when the first round has been orthogonalized: this rank's own matrices, AdamW.
    """
    memory, share = _Memory(), workspace_bytes // NUM_SHARES
    first, *later = (_Round(planned, rank, share, kind, bits, memory) for planned in assignment.rounds)
    first.prepare_inputs(is_first=True)
    first.orthogonalize()
    memory.pass_through(between)
    first.write_momenta()
    first.send_updates()
    run_behind(first, later)
    return memory.most


class _Memory:
    """The bytes that are allocated, and the most that were."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def add(self, num_bytes: int) -> None:
        """Count what is allocated, or with a minus what is freed."""
        self.now += num_bytes
        self.most = max(self.most, self.now)

    def pass_through(self, num_bytes: int) -> None:
        """Count what is allocated and freed again."""
        self.most = max(self.most, self.now + num_bytes)


class _Round:
    """The bytes of one rank in one round. The methods count what those of `ExchangeRound` allocate and free."""

    def __init__(self, planned: PlannedRound, rank: int, share: int, kind: str, bits: int, memory: _Memory) -> None:
        self._planned, self._rank, self._share, self._kind, self._memory = planned, rank, share, kind, memory
        self._bits = bits
        self._owned = [transfer for transfer in planned.transfers if transfer.owner == rank]
        self._held = [t for t in planned.transfers if t.matrix.sharding.momentum_parts[rank] is not None]
        self._sent = self._received = self._results = self._own_inputs = 0
        self._input_batches = deque[tuple[int, int]]()  # matrices and bytes of X, in the order in which they are read

    def prepare_inputs(self, *, is_first: bool = False) -> None:
        needed = list(filter(self._needs_input, self._held))
        given = [t.sent_bytes(t.sources[self._rank]) for t in needed if self._rank in t.sources]
        moments = self._given_moments() if self._planned.sends_inputs else []
        self._own_inputs = sum(self._input_bytes(t) for t in needed if t.is_gram)
        left = self._write_inputs(needed, is_first=is_first)
        if not is_first:
            self._write_momenta(filterfalse(self._needs_input, self._held))
        if self._planned.sends_inputs:
            self._sent = sum(given) + sum(moments)
            self._received = sum(t.sent_bytes(region) for t in self._owned for region in t.sources.values())
            self._received += sum(moment_bytes(self._owned, rank) for rank in range(self._num_ranks))
            # A single tensor is sent from where it lies.
            is_packed = len(given) + len(moments) > 1
            self._memory.add(self._received + (self._sent if is_packed else 0))
            left += 0 if is_packed else -self._sent
        else:
            self._received = sum(given)
            left -= self._received
        self._memory.add(self._own_inputs - left)

    def _given_moments(self) -> list[int]:
        """Return the bytes of the tensors of second moments that this rank sends, and of what is behind them."""
        found = list[int]()
        for owner in range(self._num_ranks):
            owned = [t for t in self._planned.transfers if t.owner == owner]
            held = (t.moment_shapes(t.moment_sources[self._rank]) for t in owned if self._rank in t.moment_sources)
            found += [prod(shape) * dtype.itemsize for shapes in held for shape, dtype in shapes]
            found.append(moment_padding(owned, self._rank))
        return [num_bytes for num_bytes in found if num_bytes]

    def _needs_input(self, transfer: PlannedTransfer) -> bool:
        return transfer.is_gram or self._rank in transfer.sources

    def _write_inputs(self, transfers: Iterable[PlannedTransfer], *, is_first: bool) -> int:
        """Count X by batches; return the bytes of X and Gram matrices that are there in the end."""
        left = 0

        def size(transfer: PlannedTransfer) -> int:
            num_bytes = self._num_elements(transfer) * transfer.matrix.method.dtype.itemsize
            num_bytes += 2 * self._state_bytes(transfer) if is_first else 0
            return max(1, self._share // num_bytes)

        for batch in _batches(transfers, size):
            X = sum(map(self._input_bytes, batch))
            passing = sum(map(self._state_bytes, batch)) if is_first else 0
            grams = [t.sent_bytes(t.sources[self._rank]) for t in batch if t.is_gram and self._rank in t.sources]
            self._memory.add(X)
            self._memory.pass_through(passing + self._momentum_pass_bytes(batch, _INPUT_BYTES))
            self._memory.add(sum(grams))
            self._input_batches.append((len(batch), X))
            left += X + sum(grams)
        return left

    def _write_momenta(self, transfers: Iterable[PlannedTransfer]) -> None:
        for batch in _batches(transfers, lambda _: self._share):
            self._memory.pass_through(self._momentum_pass_bytes(batch, _MOMENTUM_BYTES))

    def send_inputs(self) -> None:
        """Allocate nothing."""

    def orthogonalize(self) -> None:
        self._memory.add(-self._sent)
        self._sent = num_copied = assembled = 0
        for (rows, cols, method, stage, is_gram), run in groupby(self._owned, key=lambda t: (*_kind_of(t), t.is_gram)):
            of_kind = list(run)
            alike, side, itemsize = len(of_kind), min(rows, cols), method.dtype.itemsize
            size = batch_size(method, rows, cols, self._kind, self._share)
            one = itemsize * (side * side if is_gram else rows * cols)
            signs = rows * cols if stage is not None and stage.is_sign else 0
            # Of Gram matrices their sum in fp32, and what the iteration has.
            taken = (4 + 4 * itemsize) * side * side if is_gram else iteration_bytes(method, rows, cols, self._kind)
            for start in range(0, alike, size):
                count = min(size, alike - start)
                if not self._planned.sends_inputs:  # X that lies here is let go when all that came with it is copied
                    self._memory.pass_through(count * (signs or one))
                    num_copied += count
                    while self._input_batches and self._input_batches[0][0] <= num_copied:
                        num_matrices, num_bytes = self._input_batches.popleft()
                        num_copied -= num_matrices
                        self._received -= num_bytes
                        self._memory.add(-num_bytes)
                self._memory.pass_through(count * max(taken, signs + one if signs else 0))
                self._memory.add(count * one)
                self._results += count * one
                assembled = self._normalize(of_kind[start : start + count], assembled)
        self._memory.add(-assembled)

    def _normalize(self, chunk: list[PlannedTransfer], before: int) -> int:
        """Count the second moments of some matrices, assembled, once those of the ones before go; return their bytes.

        One that comes from a single rank is read where it lies.
        """
        (rows, cols, _, stage), assembled = _kind_of(chunk[0]), 0
        if stage is None or stage.axis is None:
            return 0
        for transfer in chunk:
            parts = transfer.moment_sources if len(transfer.moment_sources) > 1 else ()
            assembled += sum(map(transfer.moment_bytes_of, parts))
        self._memory.add(assembled)
        self._memory.add(-before)
        of_each = _STATS_BYTES if stage.axis == "element" else _SQUARES_BYTES
        self._memory.pass_through(self._pass_bytes(len(chunk) * rows * cols, of_each))
        return assembled

    def write_momenta(self) -> None:
        self._write_momenta(self._held)

    def send_updates(self, number: int = 0) -> None:
        planned, inputs = self._planned, self._received if number == 0 else 0
        is_last = number + 1 == planned.num_parts
        if not planned.is_moved:
            self._received, self._results = self._results, 0
            self._memory.add(-inputs)
            return
        given = list(self._given(number))
        packed = sum(given)
        self._received = self._incoming(number)
        if planned.is_gathered:
            padded = self._received // self._num_ranks
            given += [padded - packed] if padded > packed else []
            packed = padded
        is_view = len(given) == 1
        self._memory.add(self._received + (0 if is_view else packed))
        self._sent = (self._results if is_last else 0) if is_view else packed
        self._memory.add(-inputs - (self._results if is_last and not is_view else 0))
        self._results = 0 if is_last else self._results

    def _given(self, number: int) -> Iterator[int]:
        """Yield the bytes of each tensor that this rank sends in a part."""
        for transfer in self._owned:
            if number == 0:
                for rank in range(1 if self._planned.is_gathered else self._num_ranks):
                    yield from (4 * prod(shape) for shape in transfer.result_shapes(rank))
            regions = list(transfer.targets.values())[: 1 if self._planned.is_gathered else None]
            sizes = (transfer.returned_bytes(region, number, self._planned.num_parts) for region in regions)
            yield from filter(None, sizes)

    def _incoming(self, number: int) -> int:
        """Return the bytes that this rank receives in a part, those of a gather padded to the longest."""
        by_owner = Counter[int]()
        for transfer in self._planned.transfers:
            if self._rank in transfer.targets:
                region = transfer.targets[self._rank]
                by_owner[transfer.owner] += transfer.returned_bytes(region, number, self._planned.num_parts)
            by_owner[transfer.owner] += transfer.result_bytes(self._rank) if number == 0 else 0
        return self._num_ranks * max(by_owner.values()) if self._planned.is_gathered else by_owner.total()

    def apply_updates(self) -> None:
        here = [t for t in self._planned.transfers if self._rank in t.targets]
        elements = Counter[tuple[object, int]]()  # of matrices that go together, with what a pass takes of each
        for transfer in here:
            elements[_kind_of(transfer), _param_bytes(transfer)] += prod(transfer.targets[self._rank].shape)
        passes = (self._pass_bytes(-(-n // self._planned.num_parts), size) for (_, size), n in elements.items())
        most = max(passes, default=0)
        results = sum(t.result_bytes(self._rank) for t in self._planned.transfers)  # copied
        self._memory.add(results)
        for number in range(self._planned.num_parts):
            self._memory.add(-self._sent)
            self._sent, received = 0, self._received
            if number + 1 < self._planned.num_parts:
                self.send_updates(number + 1)
            # Of Gram matrices the factors, X and O, stacked.
            stacked = 2 * self._own_inputs + received if self._own_inputs else 0
            self._memory.pass_through(stacked + most)
            self._memory.add(-received)
        self._memory.add(-self._own_inputs - results)

    @property
    def _num_ranks(self) -> int:
        return len(self._planned.transfers[0].matrix.sharding.param_parts)

    def _pass_bytes(self, num_elements: int, of_each: int) -> int:
        return of_each * min(num_elements, _PASS_ELEMENTS) if self._kind.startswith("cpu") else 0

    def _momentum_pass_bytes(self, batch: Iterable[PlannedTransfer], of_each: int) -> int:
        """Return the bytes that a pass over the momenta of a batch takes, of which fp32 ones need not be decoded."""
        of_each -= _DECODED_BYTES if self._bits == 32 else 0
        return self._pass_bytes(sum(map(self._num_elements, batch)), of_each)

    def _num_elements(self, transfer: PlannedTransfer) -> int:
        """Count the elements of the momentum that this rank has."""
        region = transfer.matrix.sharding.momentum_parts[self._rank]
        return 0 if region is None else prod(region.shape)

    def _input_bytes(self, transfer: PlannedTransfer) -> int:
        stage = transfer.matrix.stage
        is_sign = stage is not None and stage.is_sign
        return self._num_elements(transfer) * (1 if is_sign else transfer.matrix.method.dtype.itemsize)

    def _state_bytes(self, transfer: PlannedTransfer) -> int:
        is_quantized = self._bits == 8 and transfer.matrix.cols >= MIN_QUANTIZED_COLUMNS
        return self._num_elements(transfer) * (1 if is_quantized else 4)


def _batches(
    transfers: Iterable[PlannedTransfer], size: Callable[[PlannedTransfer], int]
) -> Iterator[list[PlannedTransfer]]:
    """Yield the matrices that go together."""
    for _, run in groupby(transfers, key=lambda t: (t.matrix[:2], id(t.matrix.sharding))):
        alike = list(run)
        step = size(alike[0])
        yield from (alike[start : start + step] for start in range(0, len(alike), step))


def _kind_of(transfer: PlannedTransfer) -> tuple[int, int, NSMethod, MatrixStage | None]:
    """Return what matrices have in common that are orthogonalized together."""
    rows, cols, _, method, stage = transfer.matrix
    return rows, cols, method, stage


def _param_bytes(transfer: PlannedTransfer) -> int:
    """Return the bytes that a pass over parameters takes of each element."""
    stage = transfer.matrix.stage
    return _PARAM_BYTES if stage is None or stage.axis != "element" else _DIVIDED_PARAM_BYTES

"""One all-gather a step: sums of squares of all parts of matrices, which are zero, and one flag for all that is local.

Every rank adds up whole matrices in the order of a single process, so that all have its norms, to the bit where no
block is cut, and the same verdict on the gradients. Of replicas the first sends its sums, the others only whether
theirs are finite.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

import torch
from torch import Tensor

from .collectives import Transport
from .matrix_sharding import Region
from .sharded_batch import ShardedBatch, sums_of_squares


class GatheredSums:
    """The gathered numbers of one batch.

    Attributes:
        sizes: by rank, how many it gives.
        has_scales: whether the largest magnitudes of blocks are among them, since columns are cut.
        num_flags: how many more every rank gives, parts of the batch or not: `ShardedBatch.activity`.
    """

    def __init__(self, batch: ShardedBatch) -> None:
        """Count the numbers of a batch."""
        sharding = batch.matrix.sharding
        self._count, self._shape = len(batch.members), (batch.matrix.rows, batch.blocks)
        self._block_size = batch.format.block_size
        # The first holder of every part, in the order of rows and columns.
        self._regions = {ranks[0]: region for region, ranks in sorted(sharding.holders.items())}
        self._is_cut = any(map(batch.is_cut, sharding.holders))
        self.has_scales = self._is_cut and batch.format.codebook is not None
        self.num_flags = 0 if batch.members[0].is_zero is None else self._count
        self.sizes = [0 if region is None else self._count for region in sharding.momentum_parts]
        for rank, region in self._regions.items():
            self.sizes[rank] = prod(self._shape_of(region))

    def _slices(self, region: Region) -> tuple[slice, slice]:
        """Return the rows of a part, and the blocks that its columns touch."""
        blocks = region.cols[0] // self._block_size, -(-region.cols[1] // self._block_size)
        return slice(*region.rows), slice(*blocks)

    def _shape_of(self, region: Region) -> tuple[int, int, int, int]:
        """Return the shape of what the first holder of a part gives: sums (and maxima) by matrix, row and block."""
        rows, blocks = self._slices(region)
        return 1 + self.has_scales, self._count, rows.stop - rows.start, blocks.stop - blocks.start

    def contribution(self, numbers: list[Tensor], rank: int) -> Tensor:
        """Return what a rank sends of `sums_of_squares`: all, or what is finite where its sums are."""
        if rank in self._regions:
            return torch.cat([values.flatten() for values in numbers])
        return numbers[0].flatten(1).sum(1)

    def _values(self, gathered: Sequence[Tensor], which: int) -> Iterator[tuple[slice, slice, Tensor]]:
        """Yield rows, blocks and the sums (0) or maxima (1) there, in the order of rows and columns."""
        for rank, region in self._regions.items():
            yield *self._slices(region), gathered[rank].view(self._shape_of(region))[which]

    def total(self, gathered: Sequence[Tensor]) -> Tensor:
        """Return squared norms of the whole matrices, fp32 [members], not finite where any replica's are not."""
        if self._is_cut:  # a block may have parts
            sums = gathered[0].new_zeros(self._count, *self._shape)
            for rows, blocks, values in self._values(gathered, 0):
                sums[:, rows, blocks] += values
        else:
            sums = torch.cat([values for _, _, values in self._values(gathered, 0)], 1)
        totals = sums.flatten(1).sum(1)
        for rank, size in enumerate(self.sizes):
            if size and rank not in self._regions:  # 0 times infinity or NaN is NaN
                totals = totals + gathered[rank] * 0
        return totals

    def scales(self, gathered: Sequence[Tensor], region: Region) -> Tensor:
        """Return the largest magnitudes of the blocks of these rows, fp32 [members, rows, blocks]."""
        scales = gathered[0].new_zeros(self._count, region.shape[0], self._shape[1])
        for rows, blocks, values in self._values(gathered, 1):
            if (rows.start, rows.stop) == region.rows:
                scales[..., blocks] = torch.maximum(scales[..., blocks], values)
        return scales


class Gathering:
    """The all-gather of one step, in halves: made, which reads and allocates all that it needs, and run."""

    def __init__(self, batches: Sequence[ShardedBatch], flags: Tensor, rank: int, num_ranks: int) -> None:
        """Read what this rank gives.

        Args:
            batches: whose norms it sets.
            flags: fp32 [n], 0 where what is local to this rank is finite, of n parameters on which the ranks agree.
            rank: this one in the group.
            num_ranks: of the group.
        """
        self._batches, self._sums, self._num_flags = batches, [GatheredSums(batch) for batch in batches], len(flags)
        given = [flags]
        for batch, sums in zip(batches, self._sums, strict=True):
            region = batch.matrix.sharding.momentum_parts[rank]
            if region is not None:
                given.append(sums.contribution(sums_of_squares(batch, region), rank))
            given += batch.activity()
        lengths = [sum(sizes) for sizes in zip(*(sums.sizes for sums in self._sums), strict=True)]
        length = len(flags) + max(lengths, default=0) + sum(sums.num_flags for sums in self._sums)
        self._sent = torch.cat([*given, flags.new_zeros(length - sum(map(len, given)))])
        self._gathered = flags.new_empty(num_ranks * length)
        self._is_done = False

    def exchange(self, transport: Transport) -> None:
        """Gather, once. A rank that fails before it has done so still has to: the others wait for its numbers."""
        if not self._is_done:
            transport.gather_into(self._gathered, self._sent)
            self._is_done = True

    def run(self, transport: Transport) -> Tensor:
        """Set the batches' norms, with all ranks; return [n], 0 where it is finite on all of them."""
        self.exchange(transport)
        numbers = self._gathered.view(transport.num_ranks, -1)
        starts = [self._num_flags] * transport.num_ranks
        for batch, sums in zip(self._batches, self._sums, strict=True):
            stops = [start + size for start, size in zip(starts, sums.sizes, strict=True)]
            gathered = [of_rank[start:stop] for of_rank, start, stop in zip(numbers, starts, stops, strict=True)]
            batch.set_norms(sums.total(gathered))
            region = batch.matrix.sharding.momentum_parts[transport.rank]
            if region is not None and sums.has_scales:
                batch.scales = sums.scales(gathered, region)
            starts = [stop + sums.num_flags for stop in stops]
            if sums.num_flags:
                active = [of_rank[stop:start] for of_rank, stop, start in zip(numbers, stops, starts, strict=True)]
                batch.idle = (torch.stack(active).sum(0) == 0).float()
        return numbers[:, : self._num_flags].sum(0)

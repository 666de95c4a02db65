"""One all-gather a step: the sums of squares of every part of every matrix, and one flag for all that is local.

Every rank adds up whole matrices in the order of a single process, so that all have its norms, to the bit where no
block is cut, and the same verdict on the gradients. Of replicas the first sends its sums, the others only whether
theirs are finite.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..config import Options
from .collectives import Transport
from .matrix_sharding import Region
from .sharded_batch import ShardedBatch, is_cut, sums_of_squares


class GatheredSums:
    """What a bundle takes of the gathered numbers: by rank, how many it sends, and of which region."""

    def __init__(self, bundle: ShardedBatch) -> None:
        held, self.block_size = bundle.matrix.sharding.held, bundle.format.block_size
        self.count, self.shape = len(bundle.members), (bundle.matrix.rows, bundle.blocks)
        first_holder: dict[Region, int] = {}
        for rank, region in enumerate(held):
            if region is not None:
                first_holder.setdefault(region, rank)
        self.regions = {rank: region for region, rank in first_holder.items()}
        self.is_cut = any(is_cut(region, bundle.matrix) for region in first_holder)
        self.num_kinds = 2 if self.is_cut and bundle.format.codebook is not None else 1
        self.sizes = [
            self.count * (self.num_kinds * self._num_blocks(region) if rank in self.regions else 1) if region else 0
            for rank, region in enumerate(held)
        ]

    def _where(self, region: Region) -> tuple[slice, slice]:
        """Rows, and blocks: those that the region's columns touch."""
        blocks = region.cols[0] // self.block_size, -(-region.cols[1] // self.block_size)
        return slice(*region.rows), slice(*blocks)

    def _num_blocks(self, region: Region) -> int:
        rows, blocks = self._where(region)
        return len(range(rows.start, rows.stop)) * len(range(blocks.start, blocks.stop))

    def contribution(self, numbers: list[Tensor], rank: int) -> Tensor:
        """What this rank sends: its sums (and maxima), or what is finite where its sums are."""
        if rank in self.regions:
            return torch.cat([kind.flatten() for kind in numbers])
        return numbers[0].flatten(1).sum(1)

    def _pieces(self, parts: Sequence[Tensor], kind: int) -> Iterator[tuple[slice, slice, Tensor]]:
        """Rows, blocks and the sums (0) or maxima (1) there, in the order of rows and columns."""
        for rank, region in sorted(self.regions.items(), key=lambda item: item[1]):
            rows, blocks = self._where(region)
            shape = self.num_kinds, self.count, rows.stop - rows.start, blocks.stop - blocks.start
            yield rows, blocks, parts[rank].view(shape)[kind]

    def total(self, parts: Sequence[Tensor]) -> Tensor:
        """Squared norms of the whole matrices, fp32 [members], not finite where any replica's are not."""
        if self.is_cut:  # a block may have parts
            sums = parts[0].new_zeros(self.count, *self.shape)
            for rows, blocks, piece in self._pieces(parts, 0):
                sums[:, rows, blocks] += piece
        else:
            sums = torch.cat([piece for _, _, piece in self._pieces(parts, 0)], 1)
        totals = sums.flatten(1).sum(1)
        for rank, size in enumerate(self.sizes):
            if size and rank not in self.regions:  # 0 times infinity or NaN is NaN
                totals = totals + parts[rank] * 0
        return totals

    def scales(self, parts: Sequence[Tensor], region: Region) -> Tensor:
        """The largest magnitudes of the blocks of these rows: fp32 [members, rows, blocks]."""
        scales = parts[0].new_zeros(self.count, region.rows[1] - region.rows[0], self.shape[1])
        for rows, blocks, piece in self._pieces(parts, 1):
            if (rows.start, rows.stop) == region.rows:
                scales[..., blocks] = torch.maximum(scales[..., blocks], piece)
        return scales


class Gathering:
    """The all-gather of one step, in halves: made, which reads and allocates all that it needs, and run.

    Args:
        bundles: whose norms it settles.
        flags: fp32 [n], 0 where what is local to this rank is finite, of n parameters on which the ranks agree.
        rank, num_ranks: of the team.
        options: of the step.
    """

    def __init__(
        self, bundles: Sequence[ShardedBatch], flags: Tensor, rank: int, num_ranks: int, options: Options
    ) -> None:
        self._bundles, self._slots, self._num_flags = bundles, [GatheredSums(bundle) for bundle in bundles], len(flags)
        mine = [flags]
        for bundle, slot in zip(bundles, self._slots, strict=True):
            region = bundle.matrix.sharding.held[rank]
            if region is not None:
                mine.append(slot.contribution(sums_of_squares(bundle, region, options), rank))
        lengths = [len(flags) + sum(sizes) for sizes in zip(*(slot.sizes for slot in self._slots), strict=True)]
        length = max(lengths, default=len(flags))
        self._sent = torch.cat([*mine, flags.new_zeros(length - sum(map(len, mine)))])
        self._gathered = flags.new_empty(num_ranks * length)
        self._is_done = False

    def exchange(self, transport: Transport) -> None:
        """Gather, once. A rank that fails before it has done so still has to: the others wait for its numbers."""
        if not self._is_done:
            transport.gather_into(self._gathered, self._sent)
            self._is_done = True

    def run(self, transport: Transport) -> Tensor:
        """Settle the bundles' norms, with all ranks; returns [n], 0 where it is finite on all of them."""
        self.exchange(transport)
        gathered = self._gathered.view(transport.num_ranks, -1)
        place = [self._num_flags] * transport.num_ranks
        for bundle, slot in zip(self._bundles, self._slots, strict=True):
            ends = [start + size for start, size in zip(place, slot.sizes, strict=True)]
            parts = [numbers[start:end] for numbers, start, end in zip(gathered, place, ends, strict=True)]
            bundle.settle(slot.total(parts))
            region = bundle.matrix.sharding.held[transport.rank]
            if region is not None and slot.num_kinds == 2:
                bundle.scales = slot.scales(parts, region)
            place = ends
        return gathered[:, : self._num_flags].sum(0)

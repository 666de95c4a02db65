"""The parts of a parameter, of its state and of the matrices in it that each rank of the flat group has.

A DTensor lies as its placements say. A plain parameter lies whole on every rank; its state does too, or with
`shard_state` by rows of its first dimension, as `Shard(0)`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import pairwise, product
from math import prod
from typing import TypeAlias

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from ..config import ADAMW8_BLOCK_SIZE, SECOND_KEYS, SECOND_MOMENT_KEY, SECOND_SCALES_KEY
from ..step import adamw8bit
from .matrix_sharding import Span

Spans: TypeAlias = tuple[Span, ...]  # of a tensor, one a dimension


@dataclass(frozen=True, eq=False)
class ParamSharding:
    """The parts of a parameter that each rank has; the same object for all that lie alike.

    Attributes:
        shape: of the whole parameter.
        state_parts, param_parts: by rank, the part of the state and of the parameter (and its gradient) that it has.
        rank: this process's, in the flat group.
        mesh, placements: of the state as DTensors; None where it is plain tensors.
        ranks: global ranks of the flat group, in its order; of sharded parameters.
        scales_shape, scales_part: of AdamW's scales in 8 bits, which have the parameter's placements.
    """

    shape: tuple[int, ...]
    state_parts: tuple[Spans, ...]
    param_parts: tuple[Spans, ...]
    rank: int
    mesh: DeviceMesh | None = None
    placements: tuple[Placement, ...] = ()
    ranks: tuple[int, ...] = ()
    scales_shape: tuple[int, ...] | None = None
    scales_part: Spans = ()

    @cached_property
    def _has_whole_matrices(self) -> bool:
        leading = [spans[0] for spans in self.state_parts]
        whole = all(spans[1:] == _whole(self.shape)[1:] for spans in self.state_parts)
        return len(self.shape) > 2 and whole and all(a[1] <= b[0] for a, b in pairwise(leading))

    def is_local(self, flatten: bool) -> bool:
        """Return whether one rank alone has the state and the parameter of each matrix of the last two dimensions.

        Then no step communicates. So are experts that are sharded by expert.
        """
        return not flatten and self.state_parts is self.param_parts and self._has_whole_matrices

    @cached_property
    def first(self) -> int | None:
        """Return the index in the whole parameter of this rank's first element; None where its rows are cut."""
        spans = self.param_parts[self.rank]
        if spans[1:] != _whole(self.shape)[1:]:
            return None
        return spans[0][0] * prod(self.shape[1:]) if spans else 0

    def local(self, param: Tensor, grad: Tensor, name: str, *, is_rounded: bool) -> tuple[Tensor, Tensor, int]:
        """Return this rank's part of the parameter, that of its gradient, and `first`.

        Args:
            param: the parameter.
            grad: its gradient.
            name: how errors call it.
            is_rounded: whether the update draws random bits by `first`.

        Raises:
            NotImplementedError: names a parameter whose gradient lies otherwise, or that has no `first` but needs it.
        """
        if is_rounded and self.first is None:
            raise NotImplementedError(
                f"{name} is sharded by columns: param_rounding='stochastic' numbers the elements of AdamW's parameters "
                "row by row. Use param_rounding='nearest', or shard it by rows"
            )
        sharded = [(t.device_mesh, tuple(t.placements)) if isinstance(t, DTensor) else None for t in (param, grad)]
        if sharded[0] != sharded[1]:
            ours, theirs = ("no DTensor" if pair is None else f"on {pair[0]} as {pair[1]}" for pair in sharded)
            raise NotImplementedError(
                f"{name} is {ours}, its gradient {theirs}: redistribute the gradient before step()"
            )
        return local_tensor(param), local_tensor(grad), self.first or 0

    def with_scales(self, name: str) -> ParamSharding:
        """Return the same for AdamW's state in 8 bits, knowing where the scales lie.

        256 elements, in the order of indices, share a scale, and must lie on one rank. Then every rank steps its part
        as one process steps the whole, to the bit.

        Raises:
            NotImplementedError: names a parameter of which blocks are cut, or whose scales cannot be sharded as it is.
        """
        sharding = _with_scales(self)
        if sharding is None:
            raise NotImplementedError(
                f"{name} {self.shape} is sharded as {self.placements}, which cuts blocks of {ADAMW8_BLOCK_SIZE} "
                "elements that share a scale of adamw_bits=8: put it into a group of its own with adamw_bits=32, or "
                "shard it so that every part has a multiple of so many, in the order of its elements"
            )
        return sharding

    def local_shapes(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
        """Return the shapes of this rank's parts of state tensors, of the shapes of the whole ones."""
        return {key: tuple(stop - start for start, stop in self.part(key, shape)) for key, shape in shapes.items()}

    def part(self, key: str, shape: Sequence[int]) -> Spans:
        """Return this rank's part of a state tensor: of the parameter's shape, or of scales [..., rows, blocks].

        Of Muon's scales a rank has whole rows even where it has but some columns of the codes.
        """
        if key in SECOND_KEYS:
            return self.second_parts(key, tuple(shape))[self.rank]
        held = self.state_parts[self.rank]
        if tuple(shape) == self.scales_shape:
            return self.scales_part
        if tuple(shape) == self.shape or not shape:
            return held[: len(shape)]
        return (*held[: len(shape) - 1], (0, shape[-1]))

    def second_parts(self, key: str, shape: tuple[int, ...]) -> tuple[Spans, ...]:
        """Return the part that each rank has of a tensor of a second moment, which lies like the parameter.

        One with a number a row or column is cut as its own shape is by the parameter's placements. Scales have whole
        rows.
        """
        if not self.ranks:  # of replicas, even where their momenta are sharded
            return (_whole(shape),) * len(self.param_parts)
        if key == SECOND_SCALES_KEY:
            return tuple((*spans[: len(shape) - 1], (0, shape[-1])) for spans in self.param_parts)
        if shape == self.shape or self.mesh is None:
            return self.param_parts
        sharding = _sharded(shape, self.mesh, self.placements, self.ranks, self.rank)
        assert sharding is not None  # the parameter lies on the same ranks
        return sharding.param_parts

    def local_part(self, value: Tensor, key: str, name: str) -> Tensor:
        """Return this rank's part of a state tensor that was saved: whole, or a DTensor that lies like the state here.

        Args:
            value: what was saved.
            key: of the state.
            name: how errors call it.

        Raises:
            ValueError: by this name, for a DTensor that lies otherwise.
        """
        if not isinstance(value, DTensor):
            return value[tuple(slice(*span) for span in self.part(key, value.shape))]
        placements = self._placements(key, tuple(value.shape))
        if value.device_mesh != self.mesh or list(value.placements) != placements:
            raise ValueError(
                f"{name} lies on {value.device_mesh} as {tuple(value.placements)}, here it would be on {self.mesh} as "
                f"{placements}: load through torch.distributed.checkpoint, which reshards"
            )
        return value.to_local()

    def to_local(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return this rank's parts of what `optimizer.state` holds, over the same memory."""
        return {key: local_tensor(value) for key, value in tensors.items()}

    def to_dtensors(self, tensors: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        """Return what `optimizer.state` holds, of this rank's parts of the state tensors and the shapes of the whole.

        These are DTensors where the state is sharded, but AdamW's step, and second moments of replicas.
        """
        if self.mesh is None:
            return dict(tensors)
        wrapped: dict[str, Tensor] = {}
        for key, local in tensors.items():
            shape = torch.Size(shapes[key])
            if not shape or (key in SECOND_KEYS and not self.ranks):
                wrapped[key] = local
                continue
            stride, placements = torch.empty(shape, device="meta").stride(), self._placements(key, shape)
            wrapped[key] = DTensor.from_local(local, self.mesh, placements, shape=shape, stride=stride)
        return wrapped

    def _placements(self, key: str, shape: tuple[int, ...]) -> list[Placement]:
        """Return a state tensor's placements: the parameter's, but Muon's scales are replicated if columns are cut."""
        if key == SECOND_MOMENT_KEY:
            return list(self.placements)
        is_like_param, last = shape in (self.shape, self.scales_shape), len(shape) - 1
        return [p if is_like_param or _dim(p) != last else Replicate() for p in self.placements]


def local_tensor(tensor: Tensor) -> Tensor:
    """Return this rank's part of a DTensor, over the same memory; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@cache
def replicated(shape: tuple[int, ...], num_ranks: int, rank: int) -> ParamSharding:
    """Return where a parameter lies that is whole on every rank, as its state is."""
    everywhere = (_whole(shape),) * num_ranks
    return ParamSharding(shape, everywhere, everywhere, rank)


@cache
def state_sharded(shape: tuple[int, ...], num_ranks: int, rank: int, mesh: DeviceMesh) -> ParamSharding:
    """Return where a parameter lies that is whole on every rank, its state by rows over a mesh of one dimension."""
    held = tuple(_spans(shape, (num_ranks,), (r,), (Shard(0),)) for r in range(num_ranks))
    return ParamSharding(shape, held, (_whole(shape),) * num_ranks, rank, mesh, (Shard(0),))


def sharded(param: DTensor, name: str, ranks: tuple[int, ...], rank: int) -> ParamSharding:
    """Return where a DTensor lies, as its placements say.

    Args:
        param: the DTensor.
        name: how errors call it.
        ranks: the global ranks of the flat group, in its order.
        rank: this process's place among them.

    Raises:
        NotImplementedError: names a parameter whose mesh or placements cannot be used.
    """
    shape, placements = tuple(param.shape), tuple(param.placements)
    check_placements(param, name)
    sharding = _sharded(shape, param.device_mesh, placements, ranks, rank)
    if sharding is None:
        # Otherwise a rank of one mesh would wait for transfers that a rank of another does not know of.
        raise NotImplementedError(
            f"{name} lies on {param.device_mesh}, other sharded matrices of this optimizer on the ranks {list(ranks)}: "
            "matrices are orthogonalized together on one set of ranks. Give each mesh an optimizer of its own"
        )
    # Whoever made the DTensor may have cut it otherwise; then what is sent would be taken for other rows.
    local, part = tuple(param.to_local().shape), sharding.param_parts[rank]
    if local != tuple(stop - start for start, stop in part):
        raise NotImplementedError(
            f"{name} is {local} on this rank, not the part {part} that its placements {placements} say: only torch's "
            "own even or uneven chunks are understood. Shard it by fully_shard or distribute_tensor"
        )
    return sharding


def check_placements(param: DTensor, name: str) -> None:
    """Raise NotImplementedError, by name, for a DTensor that no optimizer here can take."""
    mesh_type, device = param.device_mesh.device_type, param.to_local().device.type
    if device != mesh_type and device != "meta":
        raise NotImplementedError(
            f"{name} is on the {device}, its mesh on {mesh_type}: sharded parameters that are offloaded to the host "
            "are not supported, since their matrices would travel to the GPU and back at every step. Leave out "
            "CPUOffloadPolicy (8-bit momentum takes a quarter of fp32's memory)"
        )
    placements = param.placements
    # FSDP on top of tensor parallelism cuts a shard again: split_factor says how many there are of those it cuts.
    for mesh_dim, placement in enumerate(placements):
        if placement.is_partial():
            raise NotImplementedError(
                f"{name} has the placement {placement!r}: its values are not there before a reduction. Redistribute it "
                "to Shard(0) or Replicate()"
            )
        factor = getattr(placement, "split_factor", None)
        if factor is None:
            continue
        later = zip(param.device_mesh.shape[mesh_dim + 1 :], placements[mesh_dim + 1 :], strict=True)
        num_shards = prod(size for size, other in later if _dim(other) == _dim(placement))
        if factor != num_shards or len([p for p in placements if getattr(p, "split_factor", None)]) > 1:
            raise NotImplementedError(
                f"{name} has the placements {tuple(placements)}: a strided shard is understood only as fully_shard "
                "makes it on top of tensor parallelism, one cut of each tensor-parallel shard"
            )


@cache
def _sharded(
    shape: tuple[int, ...], mesh: DeviceMesh, placements: tuple[Placement, ...], ranks: tuple[int, ...], rank: int
) -> ParamSharding | None:
    """Return where a tensor of this shape lies; None if the mesh has other ranks."""
    sizes, numbers = tuple(mesh.mesh.shape), mesh.mesh.flatten().tolist()
    if sorted(numbers) != sorted(ranks):
        return None
    coordinates = dict(zip(numbers, product(*map(range, sizes)), strict=True))
    held = tuple(_spans(shape, sizes, coordinates[number], placements) for number in ranks)
    return ParamSharding(shape, held, held, rank, mesh, placements, ranks)


@cache
def _with_scales(sharding: ParamSharding) -> ParamSharding | None:
    """Return `ParamSharding.with_scales`, or None where there is none."""
    shape = adamw8bit.scales_shape(sharding.shape)
    if sharding.mesh is None or any((_dim(placement) or 0) >= len(shape) for placement in sharding.placements):
        return None
    scales = _sharded(shape, sharding.mesh, sharding.placements, sharding.ranks, sharding.rank)
    blocks = [_blocks(sharding.shape, spans, shape) for spans in sharding.state_parts]
    if scales is None or list(scales.state_parts) != blocks:
        return None
    return replace(sharding, scales_shape=shape, scales_part=scales.state_parts[scales.rank])


def _blocks(shape: tuple[int, ...], spans: Spans, scales_shape: tuple[int, ...]) -> Spans | None:
    """Return the blocks in a part of a parameter, as a part of its scales; None where one is cut."""
    if len(scales_shape) == len(shape):
        lead, (start, stop), end = spans[:-1], spans[-1], shape[-1]
    else:
        pitch = prod(shape[1:])
        lead, (start, stop), end = (), (spans[0][0] * pitch, spans[0][1] * pitch), prod(shape)
    if any(bound % ADAMW8_BLOCK_SIZE and bound != end for bound in (start, stop)):
        return None
    return (*lead, (-(-start // ADAMW8_BLOCK_SIZE), -(-stop // ADAMW8_BLOCK_SIZE)))


def _spans(
    shape: tuple[int, ...], sizes: Sequence[int], coordinate: Sequence[int], placements: Sequence[Placement]
) -> Spans:
    """Return what `torch.chunk`, applied mesh dimension by mesh dimension, leaves at a coordinate of the mesh.

    FSDP cuts what tensor parallelism has left: its strided shards come last.
    """
    spans = list(_whole(shape))
    order = sorted(range(len(placements)), key=lambda d: getattr(placements[d], "split_factor", None) is not None)
    for mesh_dim in order:
        dim = _dim(placements[mesh_dim])
        if dim is not None:
            start, stop = spans[dim]
            chunk = -(-(stop - start) // sizes[mesh_dim])
            first = min(start + chunk * coordinate[mesh_dim], stop)
            spans[dim] = (first, min(first + chunk, stop))
    return tuple(spans)


def _whole(shape: Sequence[int]) -> Spans:
    return tuple((0, size) for size in shape)


def _dim(placement: Placement) -> int | None:
    """Return the dimension of the tensor that a placement shards."""
    dim = getattr(placement, "dim", None)
    return dim if isinstance(dim, int) else None

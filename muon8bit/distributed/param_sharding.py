"""Where a parameter and its state lie: the part of them that each rank of the flat group has.

A DTensor lies as its placements say. A plain parameter lies whole on every rank; its state does too, or with
`shard_state` by rows of its first dimension, as `Shard(0)`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise, product
from math import prod
from typing import TypeAlias

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from .matrix_sharding import Span

Spans: TypeAlias = tuple[Span, ...]  # of a tensor, one a dimension


@dataclass(frozen=True, eq=False)
class ParamSharding:
    """Of one parameter; the same object for all that lie alike.

    Attributes:
        shape: of the whole parameter.
        held, wanted: by rank, the part of the state and of the parameter (and its gradient) that it has.
        rank: this process's, in the flat group.
        ranks: global ranks of the flat group, in its order; of sharded parameters.
        mesh, placements: of the state as DTensors; None where it is plain tensors.
        scales_shape, scales_part: of AdamW's scales in 8 bits, which have the parameter's placements: see `blocks`.
    """

    shape: tuple[int, ...]
    held: tuple[Spans, ...]
    wanted: tuple[Spans, ...]
    rank: int
    mesh: DeviceMesh | None = None
    placements: tuple[Placement, ...] = ()
    ranks: tuple[int, ...] = ()
    scales_shape: tuple[int, ...] | None = None
    scales_part: Spans = ()

    @cached_property
    def _has_whole_matrices(self) -> bool:
        leading = [spans[0] for spans in self.held]
        whole = all(spans[1:] == whole_of(self.shape)[1:] for spans in self.held)
        return len(self.shape) > 2 and whole and all(a[1] <= b[0] for a, b in pairwise(leading))

    def is_local(self, flatten: bool) -> bool:
        """Whether every matrix of the last two dimensions is held whole by one rank, which alone wants it: then no
        step communicates. So are experts that are sharded by expert."""
        return not flatten and self.held is self.wanted and self._has_whole_matrices

    @cached_property
    def first(self) -> int | None:
        """Index in the whole parameter of this rank's first element; None where its elements are not consecutive."""
        spans = self.wanted[self.rank]
        if spans[1:] != whole_of(self.shape)[1:]:
            return None
        return spans[0][0] * prod(self.shape[1:]) if spans else 0

    def local(self, param: Tensor, grad: Tensor, name: str, *, is_rounded: bool) -> tuple[Tensor, Tensor, int]:
        """This rank's part of the parameter, that of its gradient, and `first`; `is_rounded`: the update draws random
        bits by `first`.

        Raises:
            NotImplementedError: names a parameter whose gradient lies otherwise, or that has no `first` but needs it.
        """
        if is_rounded and self.first is None:
            raise NotImplementedError(
                f"{name} is sharded by columns: param_rounding='stochastic' numbers the elements of AdamW's parameters "
                "row by row. Use param_rounding='nearest', or shard it by rows"
            )
        ours, theirs = _where(param), _where(grad)
        if ours != theirs:
            raise NotImplementedError(
                f"{name} is {_in_words(ours)}, its gradient {_in_words(theirs)}: redistribute the "
                "gradient before step()"
            )
        return local_tensor(param), local_tensor(grad), self.first or 0

    def like(self, shape: tuple[int, ...]) -> ParamSharding:
        """Of a tensor of another shape that is sharded by the same placements."""
        assert self.mesh is not None
        found = _sharded(shape, self.mesh, self.placements, self.ranks, self.rank)
        assert found is not None
        return found

    def parts(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
        """Shapes of whole state tensors -> those of this rank's parts."""
        return {key: tuple(stop - start for start, stop in self.part(shape)) for key, shape in shapes.items()}

    def part(self, shape: Sequence[int]) -> Spans:
        """This rank's part of a state tensor: of the parameter's shape, or of scales [..., rows, blocks], of which a
        rank has whole rows even where it has but some columns of the codes (Muon's)."""
        held = self.held[self.rank]
        if tuple(shape) == self.scales_shape:
            return self.scales_part
        if tuple(shape) == self.shape or not shape:
            return held[: len(shape)]
        return (*held[: len(shape) - 1], (0, shape[-1]))

    def own_part(self, value: Tensor, name: str) -> Tensor:
        """This rank's part of a state tensor that was saved: whole, or a DTensor that lies like the state here.

        Raises:
            ValueError: by this name, for a DTensor that lies otherwise.
        """
        if not isinstance(value, DTensor):
            return value[tuple(slice(*span) for span in self.part(value.shape))]
        shape = tuple(value.shape)
        if value.device_mesh != self.mesh or list(value.placements) != self.placements_of(shape):
            raise ValueError(
                f"{name} lies on {value.device_mesh} as {tuple(value.placements)}, here it would be on {self.mesh} as "
                f"{self.placements_of(shape)}: load through torch.distributed.checkpoint, which reshards"
            )
        return value.to_local()

    def unwrapped(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What `optimizer.state` holds -> this rank's parts, over the same memory."""
        return {key: local_tensor(value) for key, value in tensors.items()}

    def wrapped(self, tensors: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        """This rank's parts of state tensors -> what `optimizer.state` holds. `shapes`: of the whole tensors."""
        if self.mesh is None:
            return dict(tensors)
        return {key: self._wrapped(value, tuple(shapes[key])) for key, value in tensors.items()}

    def _wrapped(self, local: Tensor, shape: tuple[int, ...]) -> Tensor:
        if not shape:  # AdamW's step
            return local
        placements, stride = self.placements_of(shape), torch.empty(shape, device="meta").stride()
        wrapped: Tensor = DTensor.from_local(local, self.mesh, placements, shape=torch.Size(shape), stride=stride)
        return wrapped

    def placements_of(self, shape: tuple[int, ...]) -> list[Placement]:
        """Placements of a state tensor: the parameter's, but Muon's scales are replicated where columns are sharded."""
        last = len(shape) - 1
        is_cut = shape not in (self.shape, self.scales_shape)
        return [Replicate() if is_cut and _dim_of(placement) == last else placement for placement in self.placements]


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, over the same memory; any other tensor is returned."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _where(tensor: Tensor) -> tuple[DeviceMesh, tuple[Placement, ...]] | None:
    return (tensor.device_mesh, tuple(tensor.placements)) if isinstance(tensor, DTensor) else None


def _in_words(where: tuple[DeviceMesh, tuple[Placement, ...]] | None) -> str:
    return "no DTensor" if where is None else f"on {where[0]} as {where[1]}"


def whole_of(shape: Sequence[int]) -> Spans:
    return tuple((0, size) for size in shape)


def _dim_of(placement: Placement) -> int | None:
    dim = getattr(placement, "dim", None)
    return dim if isinstance(dim, int) else None


@cache
def replicated(shape: tuple[int, ...], num_ranks: int, rank: int) -> ParamSharding:
    """Parameter and state whole on every rank."""
    everywhere = (whole_of(shape),) * num_ranks
    return ParamSharding(shape, everywhere, everywhere, rank)


@cache
def state_sharded(shape: tuple[int, ...], num_ranks: int, rank: int, mesh: DeviceMesh) -> ParamSharding:
    """The parameter whole on every rank, its state by rows of its first dimension, over a mesh of one dimension."""
    held = tuple(_spans(shape, (num_ranks,), (r,), (Shard(0),)) for r in range(num_ranks))
    return ParamSharding(shape, held, (whole_of(shape),) * num_ranks, rank, mesh, (Shard(0),))


def sharded(param: DTensor, name: str, ranks: tuple[int, ...], rank: int) -> ParamSharding:
    """As the placements of a DTensor say.

    Args:
        name: how errors call it.
        ranks: the global ranks of the flat group, in its order.
        rank: this process's place among them.

    Raises:
        NotImplementedError: names a parameter whose mesh or placements cannot be used.
    """
    shape, placements = tuple(param.shape), tuple(param.placements)
    check_placements(param, name)
    layout = _sharded(shape, param.device_mesh, placements, ranks, rank)
    if layout is None:
        raise NotImplementedError(
            f"{name} lies on {param.device_mesh}, other sharded matrices of this optimizer on the ranks {list(ranks)}: "
            "matrices are orthogonalized together on one set of ranks. Give each mesh an optimizer of its own"
        )
    local = tuple(param.to_local().shape)
    if local != tuple(stop - start for start, stop in layout.held[rank]):
        raise NotImplementedError(
            f"{name} is {local} on this rank, not the part {layout.held[rank]} that its placements {placements} say: "
            "only torch's own even or uneven chunks are understood. Shard it by fully_shard or distribute_tensor"
        )
    return layout


def check_placements(param: DTensor, name: str) -> None:
    """Raise NotImplementedError, by name, for a DTensor that no optimizer here can take."""
    mesh_type, device = param.device_mesh.device_type, param.to_local().device.type
    if device != mesh_type and device != "meta":
        raise NotImplementedError(
            f"{name} is on the {device}, its mesh on {mesh_type}: sharded parameters that are offloaded to the host "
            "are not supported, since their matrices would travel to the GPU and back at every step. Leave out "
            "CPUOffloadPolicy (8-bit momentum takes a quarter of fp32's memory)"
        )
    for mesh_dim, placement in enumerate(param.placements):
        if placement.is_partial():
            raise NotImplementedError(
                f"{name} has the placement {placement!r}: its values are not there before a reduction. Redistribute it "
                "to Shard(0) or Replicate()"
            )
        factor = getattr(placement, "split_factor", None)
        if factor is None:
            continue
        others = [
            size
            for size, other in zip(
                param.device_mesh.shape[mesh_dim + 1 :], param.placements[mesh_dim + 1 :], strict=True
            )
            if _dim_of(other) == _dim_of(placement)
        ]
        if factor != prod(others) or len([p for p in param.placements if getattr(p, "split_factor", None)]) > 1:
            raise NotImplementedError(
                f"{name} has the placements {tuple(param.placements)}: a strided shard is understood only as "
                "fully_shard makes it on top of tensor parallelism, one cut of each tensor-parallel shard"
            )


@cache
def _sharded(
    shape: tuple[int, ...], mesh: DeviceMesh, placements: tuple[Placement, ...], ranks: tuple[int, ...], rank: int
) -> ParamSharding | None:
    """None if the mesh has other ranks."""
    sizes, numbers = tuple(mesh.mesh.shape), mesh.mesh.flatten().tolist()
    if sorted(numbers) != sorted(ranks):
        return None
    coordinates = dict(zip(numbers, product(*map(range, sizes)), strict=True))
    held = tuple(_spans(shape, sizes, coordinates[number], placements) for number in ranks)
    return ParamSharding(shape, held, held, rank, mesh, placements, ranks)


def _spans(
    shape: tuple[int, ...], sizes: Sequence[int], coordinate: Sequence[int], placements: Sequence[Placement]
) -> Spans:
    """What `torch.chunk`, applied mesh dimension by mesh dimension, leaves at a coordinate of the mesh. FSDP cuts what
    tensor parallelism has left: its strided shards come last."""
    spans = list(whole_of(shape))
    order = sorted(range(len(placements)), key=lambda d: getattr(placements[d], "split_factor", None) is not None)
    for mesh_dim in order:
        dim = _dim_of(placements[mesh_dim])
        if dim is not None:
            start, stop = spans[dim]
            chunk = -(-(stop - start) // sizes[mesh_dim])
            first = min(start + chunk * coordinate[mesh_dim], stop)
            spans[dim] = (first, min(first + chunk, stop))
    return tuple(spans)

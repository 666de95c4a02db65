"""The ranks with which one optimizer shares its matrices, and what they do together in a step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from ..step import adamw8bit
from ..step.group_options import Options
from . import param_sharding
from .assignment import Assignment, plan
from .consistency import SynchronizedRanks
from .exchange import NUM_SHARES, FirstRound
from .norms import Gathering
from .param_sharding import ParamSharding
from .sharded_batch import ShardedBatch, group_into_batches


class RankGroup(SynchronizedRanks):
    """One process group, the flat group: the ranks of the mesh of sharded parameters, or the one that was given.

    Attributes:
        replicates: whether plain parameters are replicas on these ranks, that is, whether the user gave the group.
        ranks: the global ranks, in the order of the group.
        mesh: of the momenta of replicas, where they are sharded over the group.
    """

    def __init__(
        self, group: ProcessGroup, device: torch.device, *, replicates: bool, shard_state: bool, timeout_s: float
    ) -> None:
        """Share matrices among the ranks of a group.

        Args:
            group: the process group.
            device: of the parameters.
            replicates: see the attribute.
            shard_state: whether the momenta of replicas are sharded over the group.
            timeout_s: seconds that a rank waits for the others inside a step.
        """
        super().__init__(group, device, timeout_s)
        self.replicates, self.ranks = replicates, tuple(dist.get_process_group_ranks(group))
        self.mesh = DeviceMesh.from_group(group, device.type) if shard_state else None
        self._assignments: dict[object, Assignment] = {}

    def sharding_of(self, param: Tensor, group: Mapping[str, Any], name: str) -> ParamSharding | None:
        """Return where a parameter and its state lie; None where both are this rank's own affair.

        Raises:
            NotImplementedError: names a parameter whose mesh, placements or splits cannot be used.
        """
        shape, rank = tuple(param.shape), self.transport.rank
        is_muon = group["algorithm"] == "muon"
        cuts_columns = is_muon and group["split_sizes"] is not None and group["split_dim"] == -1
        # AdamW communicates nothing, so its parameters may lie on any mesh.
        if isinstance(param, DTensor) and not is_muon:
            ranks = tuple(param.device_mesh.mesh.flatten().tolist())
            sharding = param_sharding.sharded(param, name, ranks, ranks.index(dist.get_rank()))
            return sharding.with_scales(name) if adamw8bit.is_8bit(shape, group["adamw_bits"]) else sharding
        # Muon's matrices have an owner in the flat group, and lie in parts of rows and columns there.
        if isinstance(param, DTensor):
            sharding = param_sharding.sharded(param, name, self.ranks, rank)
            if group["flatten"] and any(spans[1:] != sharding.state_parts[0][1:] for spans in sharding.state_parts):
                raise NotImplementedError(
                    f"{name} is sharded along another dimension than its first, which flatten=True makes the rows: "
                    "shard it along dimension 0, or leave it replicated"
                )
            if cuts_columns and not sharding.is_local(group["flatten"]):
                raise NotImplementedError(
                    f"{name} is sharded, and split_dim=-1 cuts its columns: pieces of sharded matrices are cut from "
                    "rows alone. Leave it replicated, or drop its split_sizes"
                )
            return sharding
        # Of replicas each rank orthogonalizes some matrices, unless their columns are cut: then each does all.
        if not is_muon or not self.replicates:
            return None
        if self.mesh is None:
            return None if cuts_columns else param_sharding.replicated(shape, len(self.ranks), rank)
        if cuts_columns:
            raise NotImplementedError(
                f"{name} has split_dim=-1, and its state would be sharded by rows: use shard_state=False, or drop its "
                "split_sizes"
            )
        return param_sharding.state_sharded(shape, len(self.ranks), rank, self.mesh)

    sharded_batches = staticmethod(group_into_batches)

    def gathering(self, batches: Sequence[ShardedBatch], flags: Tensor) -> Gathering:
        """Return what this rank gives to the all-gather of a step, without communication."""
        self._gathering = Gathering(batches, flags, self.transport.rank, self.transport.num_ranks)
        return self._gathering

    def first_round(self, batches: Sequence[ShardedBatch], options: Options) -> FirstRound | None:
        """Return the step of all matrices that lie on several ranks; None without any, which is so on all ranks."""
        if not batches:
            return None
        return FirstRound(batches, self._assignment(batches, options), self.transport, options, self.device)

    def _assignment(self, batches: Sequence[ShardedBatch], options: Options) -> Assignment:
        """Return who orthogonalizes what, planned once for the same matrices.

        Hashing their shardings at every step would cost more than the rest of it, so these are known by their identity.
        """
        counts = [(batch.matrix, len(batch.members)) for batch in batches]
        key = tuple((m.rows, m.cols, id(m.sharding), m.method, count) for m, count in counts), options.workspace_bytes
        if key not in self._assignments:
            matrices = [matrix for matrix, count in counts for _ in range(count)]
            self._assignments[key] = plan(matrices, len(self.ranks), options.workspace_bytes // NUM_SHARES)
        return self._assignments[key]

    def gather_state(
        self, state: Mapping[Tensor, Mapping[str, Tensor]], to: int | None, confirm: Callable[[], None]
    ) -> dict[Tensor, dict[str, Tensor]] | None:
        """Return the state gathered on the CPU of rank `to` of the group, or of all; None on the others.

        Args:
            state: of parameters that are replicas, with momenta sharded by rows.
            to: the rank, or None for all.
            confirm: called by all ranks when each has the memory that it needs, before they communicate.
        """
        is_given = to in (None, self.transport.rank)
        gathered: dict[Tensor, dict[str, Tensor]] = {param: dict(tensors) for param, tensors in state.items()}
        # All that is needed is allocated before `confirm`: a rank that cannot fails while the others can still go back.
        sharded = [(p, k, v) for p, tensors in state.items() for k, v in tensors.items() if isinstance(v, DTensor)]
        for tensors in gathered.values():
            for key, value in tensors.items():
                if isinstance(value, DTensor):
                    tensors[key] = torch.empty(value.shape if is_given else (0,), dtype=value.dtype)
                elif is_given and isinstance(value, Tensor):
                    tensors[key] = value.cpu()
        largest = max((self._padded_bytes(value) for *_, value in sharded), default=0)
        send = torch.zeros(largest, dtype=torch.uint8, device=self.device)
        received = torch.empty(len(self.ranks) * largest, dtype=torch.uint8, device=self.device)
        confirm()
        # Tensor by tensor, shards padded to the largest: all before it have as many rows, so their bytes follow on.
        for param, key, value in sharded:
            local, size = value.to_local(), self._padded_bytes(value)
            send[: local.nbytes].copy_(local.reshape(-1).view(torch.uint8))
            of_ranks = received[: len(self.ranks) * size]
            self.transport.gather_into(of_ranks, send[:size])
            if is_given:
                gathered[param][key].copy_(of_ranks.view(value.dtype).view(-1, *value.shape[1:])[: value.shape[0]])
        return gathered if is_given else None

    def _padded_bytes(self, value: DTensor) -> int:
        """Return the bytes of the largest shard of a tensor that is cut along its first dimension."""
        if value.device_mesh != self.mesh or tuple(value.placements) != (Shard(0),):
            raise NotImplementedError(
                f"a state of shape {tuple(value.shape)} is placed as {value.placements}, not by rows of the process "
                "group: leave sharded state as the optimizer made it"
            )
        return -(-value.shape[0] // len(self.ranks)) * prod(value.shape[1:]) * value.itemsize


def check_group(group: object) -> None:
    """Raise ValueError for what is no process group, or for one that this rank is not in."""
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("process_group: this rank is not in it. Make one for every set of ranks, and pass its own")
    if not isinstance(group, ProcessGroup):
        raise ValueError(
            f"process_group must be a torch.distributed.ProcessGroup, not a {type(group).__name__}: of a mesh take "
            "get_group()"
        )


def rank_group_of(
    params: Iterable[Tensor],
    process_group: ProcessGroup | None,
    shard_state: bool,
    timeout_s: float,
    previous: RankGroup | None,
) -> RankGroup | None:
    """Return the ranks that share these parameters, `previous` if it is still right; None where nothing is shared.

    Nothing is shared without sharded parameters and a process group.

    Raises:
        NotImplementedError: for a mesh of several dimensions that is not the whole world, without a process group.
    """
    params = list(params)
    meshes = [param.device_mesh for param in params if isinstance(param, DTensor)]
    if process_group is None and not meshes:
        return None
    group = process_group or _flat_group(max(meshes, key=lambda mesh: mesh.size()))
    device = params[0].device if params else torch.device("cpu")
    if previous is not None and previous.group is group and previous.device == device:
        previous.watchdog.timeout_s = timeout_s
        return previous
    return RankGroup(group, device, replicates=process_group is not None, shard_state=shard_state, timeout_s=timeout_s)


def _flat_group(mesh: DeviceMesh) -> ProcessGroup:
    """Return the process group of all ranks of a mesh."""
    if mesh.ndim == 1:
        return mesh.get_group()
    if mesh.size() == dist.get_world_size():
        world = dist.group.WORLD
        assert world is not None
        return world
    raise NotImplementedError(
        f"parameters lie on {mesh}, whose ranks are not the whole world: no process group has just these ranks. Make "
        "one on all of them (torch.distributed.new_group) and pass it as process_group"
    )

"""The optimizer on several ranks: which ranks share its matrices, and what its state dict holds of sharded state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from .step.commit import Commit
from .step.offload import StateOffload
from .step.options import describe

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from .distributed import RankGroup

# `distributed` is imported by those who need it: torch's DTensor takes a second, and not every build of torch has it.


class ShardedOptimizer(Optimizer):
    """An optimizer whose parameters may lie on several ranks."""

    step_timeout: float
    stack_activity: Any = None  # a `StackActivity` that was made for it
    _num_calls: int

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        *,
        process_group: ProcessGroup | None,
        shard_state: bool,
        offload: StateOffload,
    ) -> None:
        """Check what ranks are to share.

        Args:
            params: as torch's optimizers take them.
            defaults: of the groups.
            process_group: see `Muon8bit`.
            shard_state: see `Muon8bit`.
            offload: where the state lives.

        Raises:
            ValueError: for `shard_state` without a process group, or one that this rank is not in.
            NotImplementedError: for `state_device` with a process group, or with a sharded parameter, by name.
        """
        self._offload = offload
        if shard_state and process_group is None:
            raise ValueError(
                "shard_state=True shards the momenta of replicated parameters over a process group: pass "
                "process_group=torch.distributed.group.WORLD, or another"
            )
        if process_group is not None:
            self._check_state_device("a process_group")
            from .distributed import check_group

            check_group(process_group)
        self.process_group, self.shard_state = process_group, shard_state
        self._rank_group: RankGroup | None = None
        self._consolidated: dict[Tensor, dict[str, Tensor]] | None = None  # of the last step
        self._gives_shards = False  # whether `state_dict` gives DTensors
        super().__init__(params, defaults)

    @property
    def state_device(self) -> str | None:
        """Return where the state lives, as it was asked for."""
        return self._offload.state_device

    def _check_sharded(self, group: dict[str, Any], index: int) -> None:
        """Refuse by name a sharded parameter that no step could take."""
        for place, param in enumerate(group["params"]):
            if hasattr(param, "device_mesh"):
                from .distributed import check_placements

                self._check_state_device(f"{describe(group, index, place)}, which is sharded")
                check_placements(param, describe(group, index, place))

    def _check_state_device(self, what: str) -> None:
        """Refuse to share state that lies on the host.

        Args:
            what: the reason to share it, for the error.
        """
        if self.state_device is not None:
            raise NotImplementedError(
                f"state_device={self.state_device!r} does not go with {what}: matrices that several ranks share are "
                "stepped in rounds of messages, which do not fetch state from the host. Leave state_device out; "
                "fully_shard, or shard_state=True on replicas, divides the state among the GPUs instead"
            )

    def _find_rank_group(self) -> RankGroup | None:
        """Return the ranks that share matrices, looked for anew: parameters may have been swapped for sharded ones.

        Raises:
            NotImplementedError: for a mesh whose ranks no known process group has, or with `state_device`.
        """
        params = [param for group in self.param_groups for param in group["params"]]
        if self.process_group is None and not any(hasattr(param, "device_mesh") for param in params):
            return None
        self._check_state_device("sharded parameters")
        from .distributed import rank_group_of

        self._rank_group = rank_group_of(
            params, self.process_group, self.shard_state, self.step_timeout, self._rank_group
        )
        return self._rank_group

    def state_dict(self) -> dict[str, Any]:
        """Return torch's state dict; with `shard_state` of whole tensors, as `consolidate_state_dict` gathered them.

        These are on the CPU. In `sharded_state_dict` they are DTensors.

        Raises:
            RuntimeError: with `shard_state`, where this rank has not got the whole state since the last step.
        """
        if not self.shard_state or not self.state or self._gives_shards:
            return super().state_dict()
        if self._consolidated is None:
            raise RuntimeError(
                "with shard_state=True each rank has a part of the state: call consolidate_state_dict() on all ranks "
                "after the last step() and before state_dict(), or, for distributed checkpointing, take state_dict() "
                "in `with optimizer.sharded_state_dict():`"
            )
        shards, self.state = self.state, self._consolidated  # type: ignore[assignment]
        try:
            return super().state_dict()
        finally:
            self.state = shards

    @torch.no_grad()
    def consolidate_state_dict(self, to: int | None = None) -> None:
        """Gather the sharded state for `state_dict()`, valid until the next step; to be called on all ranks.

        Without `shard_state` there is nothing to do. The contract is that of torch's ZeroRedundancyOptimizer.

        Args:
            to: the rank in `process_group` that gets it, None for all.

        Raises:
            RuntimeError: on all ranks, if a step or this call has failed on one; the message says which.
        """
        rank_group = self._find_rank_group()
        if rank_group is None or not self.shard_state:
            return
        self._wait_for_ranks(rank_group)
        commit = Commit(rank_group.confirm)
        try:
            self._consolidated = rank_group.gather_state(self.state, to, commit.confirm)
        except BaseException as error:
            rank_group.report_failure(error, is_agreed=commit.is_confirmed)
            raise

    def _wait_for_ranks(self, rank_group: RankGroup) -> None:
        """Wait for the other ranks, which all refuse to go on if one of them has to."""
        rank_group.wait_for_ranks(None)

    @contextmanager
    def sharded_state_dict(self) -> Iterator[None]:
        """Let `state_dict()` give DTensors where the state is sharded, as distributed checkpointing needs them.

        `with optimizer.sharded_state_dict(): get_optimizer_state_dict(model, optimizer)`.
        """
        before, self._gives_shards = self._gives_shards, True
        try:
            yield
        finally:
            self._gives_shards = before

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or a pickle holds; a process group cannot be in it."""
        if self.process_group is not None:
            raise TypeError(
                "an optimizer with a process_group cannot be copied or pickled, since the group belongs to its "
                "process: construct another one and give it this one's state_dict()"
            )
        own = {"process_group": None, "shard_state": False, "_gives_shards": False, "_offload": self._offload}
        return {**super().__getstate__(), **own, "_rank_group": None, "_consolidated": None}

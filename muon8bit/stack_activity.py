"""When each matrix of a stack, as an expert, was last stepped: counted beside the optimizer, not in its state.

With `zero_slices="skip"` a step knows which matrices it leaves as they are. `StackActivity` writes its number down for
the others, on the device. An optimizer without one counts nothing, and checkpoints of optimizers know nothing of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .report import named_params

if TYPE_CHECKING:
    from .distributed import ParamSharding
    from .sharded_optimizer import ShardedOptimizer
    from .step.nonfinite import GradientCheck
    from .step.phases import GroupStep


class StackActivity:
    """Keep, for each matrix of the optimizer's stacks, the last call of `step()` that stepped it.

    Calls are counted from 1, those included that a gradient which is not finite made change nothing. A stack is a Muon
    parameter of three or more dimensions in a group with `zero_slices="skip"` and without `flatten`; an int32 a matrix
    is kept for it, where it lies, and no step waits for the device. From now on `state_report(optimizer)` has the
    `activity`. One at a time: a later one takes the place of an earlier.

    `state_dict` and `load_state_dict` are those of a learning rate scheduler: Accelerate's `register_for_checkpointing`
    and torch.distributed.checkpoint take it as it is, and any number of ranks may load what another number has saved.

    Raises:
        TypeError: for anything but an optimizer of this package, as Accelerate's wrapper of one.
    """

    def __init__(self, optimizer: ShardedOptimizer) -> None:
        if not hasattr(type(optimizer), "stack_activity"):
            kind = type(optimizer).__name__
            raise TypeError(f"StackActivity takes a Muon8bit, not a {kind}: give the optimizer that a wrapper holds")
        self._optimizer, self._num_before = optimizer, 0
        self._last: dict[Tensor, Tensor] = {}
        optimizer.stack_activity = self

    @property
    def step(self) -> int:
        """Return the number of the last call of `step()`."""
        return self._num_before + self._optimizer._num_calls

    def record(self, work: Iterable[GroupStep], check: GradientCheck | None, number: int) -> None:
        """Write down which matrices a step has changed; the optimizer calls it.

        Args:
            work: the step's, written.
            check: None, or the check whose `skip` may have kept the kernels from writing.
            number: of the call of `step()`, counted since the optimizer was made.
        """
        for step in work:
            idle = dict(_idle_matrices(step))
            for param in (param for param in step.params if param.index in idle):
                flags = idle[param.index]
                flags = flags if check is None else flags + check.skip(flags.device)
                last = self._last.get(param.param)
                if last is None or last.device != flags.device:
                    last = torch.zeros_like(flags, dtype=torch.int32) if last is None else last.to(flags.device)
                    self._last[param.param] = last
                last.masked_fill_(flags == 0, self._num_before + number)

    def local(self) -> dict[str, Tensor]:
        """Return parameter name -> int32 [...] on the CPU: the last step of each matrix that this rank knows of.

        It is 0 where none was seen. Known are all matrices of the stack, or this rank's where its first dimension is
        sharded.
        """
        found = {}
        for name, param, sharding in self._stacks():
            lead = [stop - start for start, stop in _spans(param, sharding)]
            last = self._last.get(param)
            found[name] = torch.zeros(lead, dtype=torch.int32) if last is None else last.view(lead).cpu()
        return found

    def last_steps(self) -> dict[str, Tensor]:
        """Return parameter name -> int32 [...] on the CPU: the last step of each matrix of the whole stack.

        It is 0 where none was seen since this was made. Of an optimizer on several ranks all must call it together.
        """
        group, local, whole = self._optimizer._find_rank_group(), self.local(), dict[str, Tensor]()
        for name, param, sharding in self._stacks():
            whole[name] = torch.zeros(param.shape[:-2], dtype=torch.int32)
            whole[name][tuple(slice(*span) for span in _spans(param, sharding))] = local[name]
        if group is None or not whole:
            return whole
        together = torch.cat([steps.flatten() for steps in whole.values()]).to(group.device)
        torch.distributed.all_reduce(together, torch.distributed.ReduceOp.MAX, group.transport.group)
        parts = together.cpu().split([steps.numel() for steps in whole.values()])
        return {name: part.view(whole[name].shape) for name, part in zip(whole, parts, strict=True)}

    def state_dict(self) -> dict[str, Any]:
        """Return `{"step": int, "last_steps": ...}`, the same on all ranks, which must all call it."""
        return {"step": self.step, "last_steps": self.last_steps()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take what `state_dict` gave, of the same stacks.

        Raises:
            ValueError: for other stacks, by name; nothing has changed.
        """
        stacks, saved = list(self._stacks()), state_dict["last_steps"]
        expected = {name: tuple(param.shape[:-2]) for name, param, _ in stacks}
        found = {name: tuple(steps.shape) for name, steps in saved.items()}
        for name in {**expected, **found}:
            if expected.get(name) != found.get(name):
                sizes = (f"matrices {of[name]}" if name in of else "no such stack" for of in (found, expected))
                raise ValueError(
                    "the activity saved of {} has {}, this optimizer {}: load what was saved of this model".format(
                        name, *sizes
                    )
                )
        for name, param, sharding in stacks:
            part = saved[name][tuple(slice(*span) for span in _spans(param, sharding))]
            self._last[param] = part.to("cpu", torch.int32).flatten().clone()
        self._num_before = int(state_dict["step"]) - self._optimizer._num_calls

    def _stacks(self) -> Iterator[tuple[str, Tensor, ParamSharding | None]]:
        """Yield the name of every stack, the parameter, and where it lies if it is sharded by its first dimension."""
        rank_group = self._optimizer._find_rank_group()
        for name, param, group in named_params(self._optimizer):
            if group["algorithm"] != "muon" or group["zero_slices"] != "skip" or group["flatten"] or param.ndim < 3:
                continue
            sharding = rank_group and rank_group.sharding_of(param, group, name)
            yield name, param, sharding if sharding and sharding.is_local(flatten=False) else None


def _spans(param: Tensor, sharding: ParamSharding | None) -> list[tuple[int, int]]:
    """Return, by leading dimension, the matrices of a stack that this rank steps, or knows of."""
    if sharding is None:
        return [(0, size) for size in param.shape[:-2]]
    return list(sharding.param_parts[sharding.rank][:-2])


def _idle_matrices(step: GroupStep) -> Iterator[tuple[int, Tensor]]:
    """Yield the index of every stack in its group, and fp32 [matrices], 1 where this step leaves one as it is."""
    found: dict[int, dict[int, Tensor]] = {}
    firsts = {param.index: param.first for param in step.params}
    for of in (of for batch in step.batches for of in batch.members):
        matrix, offset = divmod(of.first - firsts[of.param_index], of.pitch)
        if of.idle is not None and offset == 0:  # all pieces of a matrix have the same flag
            found.setdefault(of.param_index, {})[matrix] = of.idle
    for batch in step.sharded:
        if batch.idle is not None:
            for member, flag in zip(batch.members, batch.idle.split(1), strict=True):
                found.setdefault(member.param_index, {})[member.number] = flag
    for index, by_matrix in found.items():
        yield index, torch.cat([by_matrix[matrix] for matrix in sorted(by_matrix)])

"""The two phases of a step over all groups: `read` changes nothing, `write` writes state and parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import adamw, muon, rounding
from .config import Options
from .groups import FORMAT_KEYS, describe
from .nonfinite import Verdict
from .stacks import Batch, Stack, stacks_of
from .state import Format, Momentum

State = MutableMapping[Tensor, dict[str, Any]]


@dataclass(frozen=True)
class Entry:
    """A parameter that has a gradient, by its place in its group; its momentum, None in an AdamW group; and `key`,
    None where rounding is to nearest."""

    index: int
    param: Tensor
    grad: Tensor
    momentum: Momentum | None
    key: int | None


@dataclass(frozen=True)
class Work:
    """What one group does at this step; an AdamW group has no batches."""

    group: dict[str, Any]
    group_index: int
    entries: list[Entry]
    batches: list[Batch]

    def found(self) -> Iterator[tuple[Callable[[], list[str]], Tensor]]:
        """How to name parameters, and whether their gradients are finite and do not overflow in their norms: bool."""
        for batch in self.batches:
            indices = [stack.param_index for stack in batch.stacks for _ in range(stack.num_matrices)]
            yield self._namer(indices), batch.sumsq.isfinite()
        by_device: dict[torch.device, list[Entry]] = {}
        for entry in self.entries:
            if entry.momentum is None:
                by_device.setdefault(entry.grad.device, []).append(entry)
        for device, members in by_device.items():
            sumsq = _sums_of_squares([entry.grad for entry in members], device)
            yield self._namer([entry.index for entry in members]), sumsq.isfinite()

    def _namer(self, indices: Sequence[int]) -> Callable[[], list[str]]:
        group, group_index = self.group, self.group_index  # not self, which would keep the gradients alive
        return lambda: [describe(group, group_index, index) for index in indices]


def _sums_of_squares(grads: list[Tensor], device: torch.device) -> Tensor:
    """fp32 [n], not finite where a gradient is not or its squares overflow. On the CPU that of both ends, which both
    propagate NaN: norms there make copies."""
    if device.type == "cuda":
        return torch.stack(torch._foreach_norm(grads, 2, dtype=torch.float32)).square()
    ends = [torch.stack(grad.aminmax()) if grad.numel() else grad.new_zeros(2) for grad in grads]
    return torch.stack([pair.float().square().sum() for pair in ends])


def read(groups: Sequence[dict[str, Any]], state: Mapping[Tensor, dict[str, Any]], options: Options) -> list[Work]:
    """First phase.

    Raises:
        ValueError: names a parameter with a gradient or a learning rate that cannot be used.
    """
    work, num_before = [], 0
    for index, group in enumerate(groups):
        entries = list(_entries(group, index, num_before, state))
        num_before += len(group["params"])
        stacks: list[Stack] = []
        for entry in entries:
            if entry.momentum is not None:
                stacks += stacks_of(entry.index, entry.param, entry.grad, entry.momentum, group, entry.key)
        work.append(Work(group, index, entries, muon.read(stacks, group, options)))
    return work


def _entries(
    group: dict[str, Any], group_index: int, num_before: int, state: Mapping[Tensor, dict[str, Any]]
) -> Iterator[Entry]:
    """The parameters of a group that have a gradient now."""
    lr, is_muon, is_rounded = group["lr"], group["algorithm"] == "muon", "rounding_seed" in group
    lr_device = lr.device if isinstance(lr, Tensor) and lr.device.type != "cpu" else None
    form = [group[key] for key in FORMAT_KEYS] if is_muon else []
    for index, param in enumerate(group["params"]):
        grad = param.grad
        if grad is None:
            continue
        if grad.is_sparse:
            name = describe(group, group_index, index)
            raise ValueError(f"{name} has a sparse gradient: use sparse=False in its embedding")
        if lr_device not in (None, param.device):
            name = describe(group, group_index, index)
            raise ValueError(f"lr is a tensor on {lr_device}, {name} is on {param.device}: keep lr on the CPU")
        momentum = key = None
        stored = state.get(param)
        if is_rounded:
            key = rounding.key_of(param, describe(group, group_index, index), num_before + index, group)
        if is_muon:
            format = Format.of(param.shape, *form)
            momentum = Momentum.from_state(stored, format) if stored else None
            momentum = momentum or Momentum.zeros(param.shape, format, param.device)
        if stored and (shape := (momentum.codes if momentum else stored["exp_avg"]).shape) != param.shape:
            name = describe(group, group_index, index)
            raise ValueError(
                f"{name} is {tuple(param.shape)} now, with a momentum of shape {tuple(shape)}: delete its entry in the "
                "optimizer's state, and its momentum starts at zero"
            )
        yield Entry(index, param, grad, momentum, key)


def write(work: Sequence[Work], state: State, options: Options, verdict: Verdict | None) -> None:
    """Second phase; with a verdict that is not yet known, its `skip` keeps the kernels from writing."""
    for members in work:
        for entry in members.entries:
            if not state.get(entry.param):
                new = adamw.init_state(entry.param) if entry.momentum is None else entry.momentum.to_state()
                state[entry.param] = new
        for batch in members.batches:
            muon.step_(batch, members.group, _on(batch.sumsq.device, options, verdict))
        if members.group["algorithm"] == "adamw" and members.entries:
            params, grads = [e.param for e in members.entries], [e.grad for e in members.entries]
            states, keys = [state[param] for param in params], [e.key for e in members.entries]
            adamw.step_(params, grads, states, members.group, keys, _on(params[0].device, options, verdict))


def _on(device: torch.device, options: Options, verdict: Verdict | None) -> Options:
    return options if verdict is None else replace(options, skip=verdict.skip(device))

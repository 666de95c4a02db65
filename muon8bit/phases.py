"""The two phases of a step over all groups: `read` changes nothing, `write` writes state and parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import adamw, muon, rounding
from .config import Options
from .groups import FORMAT_KEYS, describe
from .nonfinite import Verdict
from .stacks import Bucket, Stack, stacks_of
from .state import Format, Momentum

State = MutableMapping[Tensor, dict[str, Any]]


@dataclass(frozen=True)
class Entry:
    """A parameter of this step: its gradient, its momentum (None in an AdamW group), and `key`, None where rounding is
    to nearest."""

    name: str
    param: Tensor
    grad: Tensor
    momentum: Momentum | None
    key: int | None


@dataclass(frozen=True)
class Work:
    """What one group does at this step; an AdamW group has no buckets."""

    group: dict[str, Any]
    entries: list[Entry]
    buckets: list[Bucket]

    def found(self) -> Iterator[tuple[list[str], Tensor]]:
        """Names, and whether the gradients are finite and do not overflow in their norms: bool [n]."""
        for bucket in self.buckets:
            yield [stack.name for stack in bucket.stacks for _ in range(len(stack))], bucket.sumsq.isfinite()
        by_device: dict[torch.device, list[Entry]] = {}
        for entry in self.entries:
            if entry.momentum is None:
                by_device.setdefault(entry.grad.device, []).append(entry)
        for members in by_device.values():
            norms = torch._foreach_norm([entry.grad for entry in members], 2, dtype=torch.float32)
            yield [entry.name for entry in members], torch.stack(norms).square().isfinite()


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
                stacks += stacks_of(entry.name, entry.param, entry.grad, entry.momentum, group, entry.key)
        work.append(Work(group, entries, muon.read(stacks, group, options)))
    return work


def _entries(
    group: dict[str, Any], group_index: int, num_before: int, state: Mapping[Tensor, dict[str, Any]]
) -> Iterator[Entry]:
    """The parameters of a group that have a gradient now."""
    lr = group["lr"]
    for index, param in enumerate(group["params"]):
        if param.grad is None:
            continue
        name = describe(group, group_index, index)
        if param.grad.is_sparse:
            raise ValueError(f"{name} has a sparse gradient: use sparse=False in its embedding")
        if isinstance(lr, Tensor) and lr.device.type != "cpu" and lr.device != param.device:
            raise ValueError(f"lr is a tensor on {lr.device}, {name} is on {param.device}: keep lr on the CPU")
        momentum = None
        if group["algorithm"] == "muon":
            form = Format.of(param.shape, *(group[key] for key in FORMAT_KEYS))
            stored = state.get(param)
            momentum = Momentum.from_state(stored, form) if stored else Momentum.zeros(param.shape, form, param.device)
        yield Entry(name, param, param.grad, momentum, rounding.key_of(param, name, num_before + index, group))


def write(work: Sequence[Work], state: State, options: Options, verdict: Verdict | None) -> None:
    """Second phase; with a verdict that is not yet known, its `skip` keeps the kernels from writing."""
    for members in work:
        for entry in members.entries:
            if entry.momentum is not None:
                state[entry.param].update(entry.momentum.to_state())
            elif not state.get(entry.param):
                state[entry.param] = adamw.init_state(entry.param)
        for bucket in members.buckets:
            muon.step_(bucket, members.group, _on(bucket.sumsq.device, options, verdict))
        if members.group["algorithm"] == "adamw" and members.entries:
            params, grads = [e.param for e in members.entries], [e.grad for e in members.entries]
            states, keys = [state[param] for param in params], [e.key for e in members.entries]
            adamw.step_(params, grads, states, members.group, keys, _on(params[0].device, options, verdict))


def _on(device: torch.device, options: Options, verdict: Verdict | None) -> Options:
    return options if verdict is None else replace(options, skip=verdict.skip(device))

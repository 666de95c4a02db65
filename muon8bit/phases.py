"""The two phases of a step over all groups: `read` changes nothing, `write` writes state and parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import adamw, muon, rounding
from .config import Options
from .groups import FORMAT_KEYS, describe
from .nonfinite import Verdict
from .stacks import Batch, Stack, stacks_of
from .state import Format, Momentum

if TYPE_CHECKING:
    from .distributed import Bundle, Layout, Team

State = MutableMapping[Tensor, dict[str, Any]]


@dataclass(frozen=True)
class Entry:
    """A parameter that has a gradient, by its place in its group; its momentum, None in an AdamW group; and `key`,
    None where rounding is to nearest.

    `param` is what the state is kept for; `local`, `grad` and `momentum` are this rank's tensors; `first` is the index
    in the whole parameter of the first element here. `layout`: where all of it lies, None where that is here.
    """

    index: int
    param: Tensor
    local: Tensor
    grad: Tensor
    momentum: Momentum | None
    key: int | None
    first: int
    layout: Layout | None

    @property
    def is_shared(self) -> bool:
        """Whether its matrices need other ranks."""
        if self.layout is None or self.momentum is None:
            return False
        return not self.layout.is_local(self.momentum.format.flatten)


@dataclass(frozen=True)
class Work:
    """What one group does at this step; an AdamW group has no batches. `bundles`: of matrices that need other ranks."""

    group: dict[str, Any]
    group_index: int
    entries: list[Entry]
    batches: list[Batch]
    bundles: list[Bundle]

    def found(self) -> Iterator[tuple[Callable[[], list[str]], Tensor]]:
        """How to name parameters, and whether their gradients are finite and do not overflow in their norms: bool."""
        for indices, sumsq in self._sums():
            yield self.namer(indices), sumsq.isfinite()

    def _sums(self) -> Iterator[tuple[list[int], Tensor]]:
        """Parameters of this rank alone, and what is finite where their gradients are: fp32."""
        for batch in self.batches:
            yield [stack.param_index for stack in batch.stacks for _ in range(stack.num_matrices)], batch.sumsq
        by_device: dict[torch.device, list[Entry]] = {}
        for entry in self.entries:
            if entry.momentum is None:
                by_device.setdefault(entry.grad.device, []).append(entry)
        for device, members in by_device.items():
            yield [entry.index for entry in members], _sums_of_squares([entry.grad for entry in members], device)

    def flags(self) -> tuple[list[int], list[Tensor]]:
        """The parameters that are no matter of `bundles`, on which ranks agree, and of each whether this rank's
        gradient is finite: 0-d fp32, 0 or NaN."""
        by_index: dict[int, list[Tensor]] = {e.index: [] for e in self.entries if not e.is_shared}
        for indices, sumsq in self._sums():
            for index, value in zip(indices, (sumsq * 0).unbind(), strict=True):
                by_index[index].append(value)
        values = [sum(flags[1:], flags[0]) if flags else self._no_flag() for flags in by_index.values()]
        return list(by_index), values

    def _no_flag(self) -> Tensor:
        """Of a parameter without elements on this rank."""
        return torch.zeros((), dtype=torch.float32, device=self.entries[0].grad.device)

    def namer(self, indices: Sequence[int]) -> Callable[[], list[str]]:
        """How to name these parameters of the group."""
        group, group_index = self.group, self.group_index  # not self, which would keep the gradients alive
        return lambda: [describe(group, group_index, index) for index in indices]


def _sums_of_squares(grads: list[Tensor], device: torch.device) -> Tensor:
    """fp32 [n], not finite where a gradient is not or its squares overflow. On the CPU that of both ends, which both
    propagate NaN: norms there make copies."""
    if device.type == "cuda":
        return torch.stack(torch._foreach_norm(grads, 2, dtype=torch.float32)).square()
    ends = [torch.stack(grad.aminmax()) if grad.numel() else grad.new_zeros(2) for grad in grads]
    return torch.stack([pair.float().square().sum() for pair in ends])


def found(
    work: Sequence[Work], team: Team | None, options: Options
) -> Iterator[tuple[Callable[[], list[str]], Tensor]]:
    """What `Verdict` takes, of all groups; with a team it is that of all ranks, and the bundles have their norms."""
    if team is None:
        for members in work:
            yield from members.found()
        return
    namers, values = [], []
    for members in work:
        indices, flags = members.flags()
        namers.append(members.namer(indices))
        values += flags
    bundles = [bundle for members in work for bundle in members.bundles]
    none = torch.zeros(0, dtype=torch.float32, device=team.device)
    everywhere = team.gather(bundles, torch.stack(values) if values else none, options)
    yield lambda: [name for namer in namers for name in namer()], everywhere == 0
    for members in work:
        for bundle in members.bundles:
            yield members.namer([member.param_index for member in bundle.members]), bundle.sumsq.isfinite()


def read(
    groups: Sequence[dict[str, Any]],
    state: Mapping[Tensor, dict[str, Any]],
    options: Options,
    team: Team | None,
    num_before: int = 0,
) -> list[Work]:
    """First phase. `num_before`: how many parameters of the optimizer are in front of these groups.

    Raises:
        ValueError: names a parameter with a gradient or a learning rate that cannot be used.
    """
    work = []
    for index, group in enumerate(groups):
        entries = list(_entries(group, index, num_before, state, team))
        num_before += len(group["params"])
        stacks: list[Stack] = []
        for entry in entries:
            if entry.momentum is not None and not entry.is_shared:
                of = entry.index, entry.local, entry.grad, entry.momentum, group, entry.key, entry.first
                stacks += stacks_of(*of)
        shared = [entry for entry in entries if entry.is_shared]
        bundles = team.bundled(shared, group, index, options) if team and shared else []
        work.append(Work(group, index, entries, muon.read(stacks, group, options), bundles))
    return work


def _entries(
    group: dict[str, Any],
    group_index: int,
    num_before: int,
    state: Mapping[Tensor, dict[str, Any]],
    team: Team | None,
) -> Iterator[Entry]:
    """The parameters of a group that have a gradient now."""
    lr, is_muon, is_rounded = group["lr"], group["algorithm"] == "muon", "rounding_seed" in group
    lr_device = lr.device if isinstance(lr, Tensor) and lr.device.type != "cpu" else None
    form = [group[key] for key in FORMAT_KEYS] if is_muon else []
    for index, param in enumerate(group["params"]):
        grad, local, layout, first = param.grad, param, None, 0
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
        if team is not None:
            name = describe(group, group_index, index)
            layout = team.layout_of(param, group, name)
        if layout is not None:
            local, grad, first = layout.local(param, grad, name, is_rounded=key is not None and not is_muon)
            stored = layout.unwrapped(stored) if stored else stored
        if is_muon:
            format = Format.of(param.shape, *form)
            momentum = Momentum.from_state(stored, format) if stored else None
            if momentum is None:
                shapes = {name: shape for name, (shape, _) in format.layout(param.shape).items()}
                momentum = Momentum.zeros(layout.parts(shapes) if layout else shapes, format, local.device)
        expected = layout.parts({"": param.shape})[""] if layout else param.shape
        if stored and (shape := (momentum.codes if momentum else adamw.codes_of(stored)).shape) != expected:
            name = describe(group, group_index, index)
            raise ValueError(
                f"{name} is {tuple(expected)} now, with a momentum of shape {tuple(shape)}: delete its entry in the "
                "optimizer's state, and its momentum starts at zero"
            )
        yield Entry(index, param, local, grad, momentum, key, first, layout)


def write(work: Sequence[Work], state: State, options: Options, verdict: Verdict | None, team: Team | None) -> None:
    """Second phase; with a verdict that is not yet known, its `skip` keeps the kernels from writing."""
    for members in work:
        for entry in members.entries:
            if not state.get(entry.param):
                state[entry.param] = _new_state(entry, members.group)
        for batch in members.batches:
            muon.step_(batch, members.group, _on(batch.sumsq.device, options, verdict))
        if members.group["algorithm"] == "adamw" and members.entries:
            entries = members.entries
            params, grads = [e.local for e in entries], [e.grad for e in entries]
            states = [e.layout.unwrapped(state[e.param]) if e.layout else state[e.param] for e in entries]
            keys, places = [e.key for e in entries], [(e.first, e.param.numel()) for e in entries]
            adamw.step_(params, grads, states, members.group, keys, places, _on(params[0].device, options, verdict))
            if verdict is not None:
                verdict.advanced += [s["step"] for s in states if adamw.is_8bit(s)]
    if team is not None:
        bundles = [bundle for members in work for bundle in members.bundles]
        team.write(bundles, _on(team.device, options, verdict))


def _new_state(entry: Entry, group: dict[str, Any]) -> dict[str, Tensor]:
    """What the optimizer keeps for a parameter."""
    if entry.momentum is None:
        bits = group["adamw_bits"]
        new, layout = adamw.init_state(entry.local, entry.param, bits), adamw.layout(entry.param.shape, bits)
    else:
        new, layout = entry.momentum.to_state(), entry.momentum.format.layout(entry.param.shape)
    if entry.layout is None:
        return new
    return entry.layout.wrapped(new, {key: shape for key, (shape, _) in layout.items()})


def _on(device: torch.device, options: Options, verdict: Verdict | None) -> Options:
    return options if verdict is None else replace(options, skip=verdict.skip(device))

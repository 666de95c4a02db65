"""The two phases of a step over all groups: `read` changes nothing, `write` writes state and parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..config import STEP_KEY, Options
from . import adamw, adamw_chunks, clipping, muon
from .adamw_chunks import AdamWChunk
from .commit import Commit
from .dense import fake_mode_of, is_fake
from .local_params import LocalParam, entries_of, new_state, own_state
from .matrix_batches import MatrixBatch, ParamMatrices, stacks_of
from .nonfinite import GradientCheck
from .offload import OffloadTask, StateOffload
from .options import describe

if TYPE_CHECKING:
    from ..distributed import Gathering, RankGroup, ShardedBatch

State = MutableMapping[Tensor, dict[str, Any]]


@dataclass(frozen=True)
class GroupStep:
    """What one group does at this step; an AdamW group has no batches. `bundles`: of matrices that need other ranks."""

    group: dict[str, Any]
    group_index: int
    entries: list[LocalParam]
    batches: list[MatrixBatch]
    bundles: list[ShardedBatch]
    clips: list[clipping.Clip]

    def found(self) -> Iterator[tuple[Callable[[], list[str]], Tensor]]:
        """How to name parameters, and whether their gradients are finite and do not overflow in their norms: bool."""
        for indices, sumsq in self._sums():
            yield self.namer(indices), sumsq.isfinite()

    def _sums(self) -> Iterator[tuple[list[int], Tensor]]:
        """Parameters of this rank alone, and what is finite where their gradients are: fp32."""
        for batch in self.batches:
            yield [stack.param_index for stack in batch.stacks for _ in range(stack.num_matrices)], batch.sumsq
        by_device: dict[torch.device, list[LocalParam]] = {}
        for entry in self.entries:
            if entry.momentum is None:
                by_device.setdefault(entry.grad.device, []).append(entry)
        for device, members in by_device.items():
            yield [entry.index for entry in members], _sums_of_squares([entry.grad for entry in members], device)

    def indices(self) -> list[int]:
        """The parameters that are no matter of `bundles`, on which ranks agree."""
        return [entry.index for entry in self.entries if not entry.is_shared]

    def flags(self) -> list[Tensor]:
        """Of each of `indices` whether this rank's gradient is finite: 0-d fp32, 0 or NaN."""
        by_index: dict[int, list[Tensor]] = {e.index: [] for e in self.entries if not e.is_shared}
        for indices, sumsq in self._sums():
            for index, value in zip(indices, (sumsq * 0).unbind(), strict=True):
                by_index[index].append(value)
        return [sum(flags[1:], flags[0]) if flags else self._no_flag() for flags in by_index.values()]

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


def gathering(work: Sequence[GroupStep], team: RankGroup, options: Options, found_inf: Tensor | None) -> Gathering:
    """What this rank gives to the step's all-gather: computed and allocated, without communication."""
    values = [] if found_inf is None else [torch.where(found_inf.reshape(()) != 0, torch.nan, 0.0).to(team.device)]
    values += [value for members in work for value in members.flags()]
    bundles = [bundle for members in work for bundle in members.bundles]
    none = torch.zeros(0, dtype=torch.float32, device=team.device)
    return team.gathering(bundles, torch.stack(values) if values else none, _on(team.device, options, None))


def found(
    work: Sequence[GroupStep],
    team: RankGroup | None = None,
    gathering: Gathering | None = None,
    found_inf: Tensor | None = None,
) -> Iterator[tuple[Callable[[], list[str]], Tensor]]:
    """What `GradientCheck` takes, of all groups; with a team that of all ranks, and the bundles have their norms."""

    def of_scaler() -> list[str]:
        return ["what the GradScaler has looked at"]

    if team is None or gathering is None:
        if found_inf is not None:
            yield of_scaler, (found_inf == 0).view(1)
        for members in work:
            yield from members.found()
        return
    namers = [] if found_inf is None else [of_scaler]
    namers += [members.namer(members.indices()) for members in work]
    everywhere = gathering.run(team.transport)
    yield lambda: [name for namer in namers for name in namer()], everywhere == 0
    for members in work:
        for bundle in members.bundles:
            yield members.namer([member.param_index for member in bundle.members]), bundle.sumsq.isfinite()


def check_not_captured() -> None:
    """Raise RuntimeError while a CUDA graph is captured.

    What a step reads on the host would be the same in every replay: the learning rate, the keys of stochastic rounding,
    and the addresses in tables that are freed when the step returns.
    """
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a step of Muon8bit cannot be captured in a CUDA graph: every replay would take the learning rate and the "
            "addresses of this one. Capture forward and backward alone, and call optimizer.step() after the replay"
        )


def read(
    groups: Sequence[dict[str, Any]],
    state: Mapping[Tensor, dict[str, Any]],
    options: Options,
    team: RankGroup | None,
    staging: StateOffload,
    num_before: int = 0,
) -> list[GroupStep]:
    """First phase.

    Args:
        staging: where the state is.
        num_before: how many parameters of the optimizer are in front of these groups.

    Raises:
        ValueError: names a parameter with a gradient or a learning rate that cannot be used.
    """
    work = []
    for index, group in enumerate(groups):
        clipping.check_not_sharded(group, index)
        entries = list(entries_of(group, index, num_before, state, team, staging))
        num_before += len(group["params"])
        stacks: list[ParamMatrices] = []
        for entry in entries:
            if entry.grad.is_meta:
                name = describe(group, index, entry.index)
                raise ValueError(f"{name} has a gradient without values, on the device meta, others have values")
            if entry.momentum is not None and not entry.is_shared:
                of = entry.index, entry.local, entry.grad, entry.momentum, group, entry.key, entry.first
                stacks += stacks_of(*of)
        clips: list[clipping.Clip] = []
        for place, stack in enumerate(stacks):
            stacks[place], clip = clipping.with_factor(stack, group, _on(stack.grad.device, options, None))
            clips += [] if clip is None else [clip]
        shared = [entry for entry in entries if entry.is_shared]
        bundles = team.bundled(shared, group, _on(team.device, options, None)) if team and shared else []
        work.append(GroupStep(group, index, entries, muon.read(stacks, group, options, staging), bundles, clips))
    return work


def is_dry(groups: Sequence[dict[str, Any]]) -> bool:
    """Whether the gradients have no values, being on the meta device or of a FakeTensorMode: the first one tells."""
    grad = next((param.grad for group in groups for param in group["params"] if param.grad is not None), None)
    return grad is not None and is_fake(grad)


def dry_run(
    groups: Sequence[dict[str, Any]], state: State, team: RankGroup | None, staging: StateOffload, num_before: int = 0
) -> None:
    """Make the state that a step would make, and count that step, of parameters without values. Arguments: of `read`.

    Raises:
        ValueError: names a parameter whose gradient has values, or cannot be used.
    """
    grads = [param.grad for group in groups for param in group["params"] if param.grad is not None]
    with fake_mode_of(grads):
        entries = []
        for index, group in enumerate(groups):
            for entry in entries_of(group, index, num_before, state, team, staging):
                if not is_fake(entry.grad):
                    name = describe(group, index, entry.index)
                    raise ValueError(f"{name} has a gradient with values, others have none, being on meta or fake")
                entries.append((entry, group))
            num_before += len(group["params"])
        for entry, group in entries:
            if not own_state(state.get(entry.param)):
                state.setdefault(entry.param, {}).update(new_state(entry, group, staging))
            if entry.momentum is None:
                state[entry.param][STEP_KEY].add_(1)


def write(
    work: Sequence[GroupStep],
    state: State,
    options: Options,
    verdict: GradientCheck | None,
    team: RankGroup | None,
    staging: StateOffload,
    commit: Commit,
) -> None:
    """Second phase; with a verdict that is not yet known, its `skip` keeps the kernels from writing.

    State is made, memory is tried, and the first matrices are orthogonalized before `commit`: what raises until then
    has changed nothing. Ranks confirm twice that all go on: when each has what it needs, and when the first matrices
    are orthogonalized, which is `commit`'s.
    """
    bundles = [bundle for members in work for bundle in members.bundles]
    shared = team.rounds(bundles, _on(team.device, options, verdict)) if team is not None else None
    jobs = _prepared(work, state, options, verdict, staging, commit)
    if shared is not None:
        shared.prepare_inputs()
    if team is not None:
        team.confirm()
    if shared is not None and team is not None:
        team.is_sending = True
        shared.send_inputs()
        team.is_sending = False
        shared.orthogonalize()
    staging.run(jobs)
    commit()
    if shared is not None:
        shared.write()
    if team is not None:
        team.finish()


def _prepared(
    work: Sequence[GroupStep],
    state: State,
    options: Options,
    verdict: GradientCheck | None,
    staging: StateOffload,
    commit: Commit,
) -> list[OffloadTask]:
    """The jobs of what is this rank's own, with the state that they need, and memory tried."""
    new = {
        entry.param: new_state(entry, members.group, staging)
        for members in work
        for entry in members.entries
        if not own_state(state.get(entry.param))
    }

    def keep_new() -> None:
        for param, tensors in new.items():
            state.setdefault(param, {}).update(tensors)

    commit.then(keep_new)
    for members in work:
        for clips in (members.clips, *(bundle.clips for bundle in members.bundles)):
            for clip in clips:
                commit.then(clip.apply_)
    jobs: list[OffloadTask] = []
    for members in work:
        for batch in members.batches:
            how = _on(batch.sumsq.device, options, verdict)
            jobs += muon.jobs(batch, members.group, how, commit, is_first=not jobs)
    states = {**state, **new}
    for members in work:  # after all matrices: AdamW cannot be computed before it is written
        for device, of_device in _pieces(members, states).items():
            how = _on(device, options, verdict)
            jobs += adamw_chunks.jobs(of_device, members.group, how, commit, is_staged=staging.moves(device))
            if verdict is not None:
                verdict.advanced += [piece.state["step"] for piece in of_device if adamw.is_8bit(piece.state)]
    for device in {job.device for job in jobs}:  # the allocator keeps it for the jobs
        size = max(job.workspace_bytes for job in jobs if job.device == device)
        torch.empty(size, dtype=torch.uint8, device=device)
    return jobs


def _pieces(work: GroupStep, state: Mapping[Tensor, dict[str, Any]]) -> dict[torch.device, list[AdamWChunk]]:
    """The parameters of an AdamW group, by their devices."""
    by_device: dict[torch.device, list[AdamWChunk]] = {}
    for e in work.entries:
        if e.momentum is None:
            own = own_state(state[e.param])
            own = e.layout.unwrapped(own) if e.layout else own
            piece = AdamWChunk(e.local, e.grad, own, e.key, e.first, e.param.numel())
            by_device.setdefault(e.local.device, []).append(piece)
    return by_device


def _on(device: torch.device, options: Options, verdict: GradientCheck | None) -> Options:
    """The options of one step on a device: whether it is skipped, and what its gradients are divided by."""
    scale = options.grad_scale
    if scale is not None and scale.device != device:
        options = replace(options, grad_scale=scale.to(device, non_blocking=True))
    return options if verdict is None else replace(options, skip=verdict.skip(device))

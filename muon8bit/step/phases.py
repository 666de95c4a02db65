"""Both phases of a step over all groups: `read` changes nothing, `write` writes state and parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..config import STEP_KEY
from . import adamw, clipping, muon
from .adamw_chunks import AdamWChunk
from .commit import Commit
from .dense import fake_mode_of, is_fake
from .group_options import AdamWOptions, GroupOptions, MuonOptions, Options
from .local_params import LocalParam, local_params, new_state
from .matrix_batches import MatrixBatch, ParamMatrices, group_into_batches, matrices_of
from .nonfinite import GradientCheck
from .offload import OffloadTask, StateOffload
from .options import describe

if TYPE_CHECKING:
    from ..distributed import Gathering, RankGroup, ShardedBatch

State = MutableMapping[Tensor, dict[str, Any]]
Names = Callable[[], list[str]]


@dataclass(frozen=True)
class GroupStep:
    """Work of one group at this step.

    Attributes:
        group: the group's dict.
        options: its options.
        group_index: its place.
        params: the parameters with a gradient.
        batches: this rank's own matrices; none in an AdamW group.
        sharded: the matrices that need other ranks.
        clips: the gradients that are clipped in place when the step begins to write.
    """

    group: dict[str, Any]
    options: GroupOptions
    group_index: int
    params: list[LocalParam]
    batches: list[MatrixBatch]
    sharded: list[ShardedBatch]
    clips: list[clipping.Clip]

    def sums(self) -> Iterator[tuple[list[int], Tensor]]:
        """Give indices of parameters of this rank alone, and fp32 numbers that are finite where their gradients are."""
        for batch in self.batches:
            yield [member.param_index for member in batch.members for _ in range(member.num_matrices)], batch.sumsq
        if isinstance(self.options, AdamWOptions):
            by_device: dict[torch.device, list[LocalParam]] = {}
            for param in self.params:
                by_device.setdefault(param.grad.device, []).append(param)
            for device, params in by_device.items():
                sums = _sums_of_squares([param.grad for param in params], device)
                yield [param.index for param in params], sums

    def indices(self) -> list[int]:
        """Return the indices of the parameters that this rank steps by itself; all ranks list the same ones."""
        return [param.index for param in self.params if not param.is_shared]

    def flags(self) -> list[Tensor]:
        """Return for each of `indices` a 0-d fp32 number: 0 if this rank's gradient is finite, else NaN."""
        by_index: dict[int, list[Tensor]] = {index: [] for index in self.indices()}
        for indices, sums in self.sums():
            for index, value in zip(indices, (sums * 0).unbind(), strict=True):
                by_index[index].append(value)
        # None of a parameter without elements on this rank.
        none = torch.zeros((), dtype=torch.float32, device=self.params[0].grad.device) if self.params else None
        return [sum(flags[1:], flags[0]) if flags else none for flags in by_index.values()]  # type: ignore[misc]


def _sums_of_squares(grads: list[Tensor], device: torch.device) -> Tensor:
    """Return fp32 [n], not finite where a gradient is not or its squares overflow.

    On the CPU it is the sum of squares of the least and the largest element, which propagate NaN: norms there make
    copies.
    """
    if device.type == "cuda":
        return torch.stack(torch._foreach_norm(grads, 2, dtype=torch.float32)).square()
    ends = [torch.stack(grad.aminmax()) if grad.numel() else grad.new_zeros(2) for grad in grads]
    return torch.stack([pair.float().square().sum() for pair in ends])


def _names_of(group: dict[str, Any], group_index: int, indices: Sequence[int]) -> list[str]:
    """Return what these parameters of a group are called."""
    return [describe(group, group_index, index) for index in indices]


def gathering(work: Sequence[GroupStep], rank_group: RankGroup, found_inf: Tensor | None) -> Gathering:
    """Return this rank's part of the step's all-gather, computed and allocated, without communication."""
    device = rank_group.device
    values = [] if found_inf is None else [torch.where(found_inf.reshape(()) != 0, torch.nan, 0.0).to(device)]
    values += [value for step in work for value in step.flags()]
    sharded = [batch for step in work for batch in step.sharded]
    none = torch.zeros(0, dtype=torch.float32, device=device)
    return rank_group.gathering(sharded, torch.stack(values) if values else none)


def finite_flags(
    work: Sequence[GroupStep], rank_group: RankGroup | None, gathering: Gathering | None, found_inf: Tensor | None
) -> Iterator[tuple[Names, Tensor]]:
    """Give pairs for `GradientCheck` from all groups: a function that names parameters, and their flags.

    A flag says whether a gradient is finite and does not overflow in its norm. With a rank group it says so for the
    gradients of all ranks; then sharded batches have their norms.
    """

    def of_scaler() -> list[str]:
        return ["what the GradScaler has looked at"]

    if rank_group is None or gathering is None:
        if found_inf is not None:
            yield of_scaler, (found_inf == 0).view(1)
        for step in work:
            for indices, sums in step.sums():
                yield partial(_names_of, step.group, step.group_index, indices), sums.isfinite()
        return
    names = [] if found_inf is None else [of_scaler]
    names += [partial(_names_of, step.group, step.group_index, step.indices()) for step in work]
    everywhere = gathering.run(rank_group.transport)
    yield lambda: [name for namer in names for name in namer()], everywhere == 0
    for step in work:
        for batch in step.sharded:
            indices = [member.param_index for member in batch.members]
            yield partial(_names_of, step.group, step.group_index, indices), batch.sumsq.isfinite()


def check_not_captured() -> None:
    """Raise RuntimeError while a CUDA graph is captured.

    All that a step reads on the host would be the same in every replay: the learning rate, the keys of stochastic
    rounding, and the addresses in tables that are freed when the step returns.
    """
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a step of Muon8bit cannot be captured in a CUDA graph: every replay would take the learning rate and the "
            "addresses of this one. Capture forward and backward alone, and call optimizer.step() after the replay"
        )


def read(
    groups: Sequence[dict[str, Any]],
    all_options: Sequence[GroupOptions],
    state: Mapping[Tensor, dict[str, Any]],
    rank_group: RankGroup | None,
    offload: StateOffload,
    num_before: int = 0,
) -> list[GroupStep]:
    """Do the first phase.

    Args:
        groups: the parameter groups.
        all_options: from `resolve_options`, one a group.
        state: the optimizer's, by parameter.
        rank_group: the ranks that share matrices, or None.
        offload: where the state is.
        num_before: the number of parameters of the optimizer in front of these groups.

    Raises:
        ValueError: for a gradient or a learning rate that cannot be used; the message names the parameter.
    """
    work = []
    for index, (group, options) in enumerate(zip(groups, all_options, strict=True)):
        params = local_params(group, options, index, num_before, state, rank_group, offload)
        num_before += len(group["params"])
        matrices: list[ParamMatrices] = []
        batches: list[MatrixBatch] = []
        clips: list[clipping.Clip] = []
        sharded: list[ShardedBatch] = []
        valueless = next((p for p in params if p.grad.is_meta), None)
        if valueless is not None:
            name = describe(group, index, valueless.index)
            raise ValueError(f"{name} has a gradient without values, on the device meta, others have values")
        if isinstance(options, MuonOptions):
            for p in params:
                if p.momentum is not None and not p.is_shared:
                    matrices += matrices_of(p.index, p.local, p.grad, p.momentum, options, p.key, p.first, p.second)
            if options.clip_matrix_norm is not None or options.grad_scale is not None or options.maximize:
                clipping.check_not_sharded(group, index)
                pairs = [clipping.with_factor(of, options.on(of.grad.device)) for of in matrices]
                matrices, clips = [of for of, _ in pairs], [clip for _, clip in pairs if clip is not None]
            shared = [param for param in params if param.is_shared]
            if rank_group is not None and shared:
                sharded = rank_group.sharded_batches(shared, options.on(rank_group.device))
            batches = group_into_batches(matrices, options)
            _read_stats(batches, offload)
        work.append(GroupStep(group, options, index, params, batches, sharded, clips))
    return work


def _read_stats(batches: Sequence[MatrixBatch], offload: StateOffload) -> None:
    """Fill the squared norms of the batches, as many matrices at once as the workspace allows."""
    is_staged = offload.state_device is not None
    parts = [part for batch in batches for part in muon.stats_parts(batch, is_staged=is_staged)]
    if is_staged:
        offload.run([_staged(part, muon.stats, is_written=False) for part in parts])
        return
    for part in parts:
        muon.stats(part)


def _staged(batch: MatrixBatch, run: Callable[[MatrixBatch], None], *, is_written: bool) -> OffloadTask:
    """Return a task that runs on a batch when its momenta have been brought to its device."""

    def run_on(tensors: Sequence[Tensor] | None) -> None:
        run(batch if tensors is None else batch.with_tensors(tensors, is_staged=True))

    if is_written:
        return OffloadTask(batch.device, run_on, batch.state_tensors, ())
    return OffloadTask(batch.device, run_on, (), batch.momentum_tensors)


def is_dry(groups: Sequence[dict[str, Any]]) -> bool:
    """Return whether the gradients have no values, being on the meta device or of a FakeTensorMode: the first tells."""
    grad = next((param.grad for group in groups for param in group["params"] if param.grad is not None), None)
    return grad is not None and (grad.is_meta or type(grad) is not Tensor) and is_fake(grad)


def dry_run(
    groups: Sequence[dict[str, Any]],
    all_options: Sequence[GroupOptions],
    state: State,
    rank_group: RankGroup | None,
    offload: StateOffload,
    num_before: int = 0,
) -> None:
    """Make the state that a step would make for parameters without values, and count that step.

    Args:
        groups, all_options, state, rank_group, offload, num_before: as in `read`.

    Raises:
        ValueError: for a gradient that has values, or cannot be used; the message names the parameter.
    """
    grads = [param.grad for group in groups for param in group["params"] if param.grad is not None]
    with fake_mode_of(grads):
        found = []
        for index, (group, options) in enumerate(zip(groups, all_options, strict=True)):
            for param in local_params(group, options, index, num_before, state, rank_group, offload):
                if not is_fake(param.grad):
                    name = describe(group, index, param.index)
                    raise ValueError(f"{name} has a gradient with values, others have none, being on meta or fake")
                found.append((param, group))
            num_before += len(group["params"])
        for param, group in found:
            if not param.state:
                state.setdefault(param.param, {}).update(new_state(param, group, offload))
            if param.momentum is None:
                state[param.param][STEP_KEY].add_(1)


def write(
    work: Sequence[GroupStep],
    state: State,
    running: Options,
    check: GradientCheck | None,
    rank_group: RankGroup | None,
    offload: StateOffload,
    commit: Commit,
) -> None:
    """Do the second phase; with a check that is not yet known, its `skip` keeps the kernels from writing.

    State is made, memory is tried, and the first matrices are orthogonalized before `commit`: an error until then has
    changed nothing. Ranks confirm twice that all go on: when each has what it needs, and when the first matrices are
    orthogonalized, which is `commit`'s.
    """
    rounds = None
    if rank_group is not None:
        skip = None if check is None else check.skip(rank_group.device)
        rounds = rank_group.first_round(
            [batch for step in work for batch in step.sharded], running.on(rank_group.device, skip)
        )
    new = _new_state(work, state, offload, commit)
    parts, chunks = _parts(work, check), _chunks(work, new, check)
    _try_memory(parts, chunks)
    if rounds is not None:
        rounds.prepare_inputs()
    if rank_group is not None:
        rank_group.confirm()
    if rounds is not None and rank_group is not None:
        rank_group.is_sending = True
        rounds.send_inputs()
        rank_group.is_sending = False
        rounds.orthogonalize()
    if offload.state_device is None:
        for part in parts:
            muon.apply(part, commit)
        commit()
        for group_chunks, adamw_options in chunks:
            adamw.apply(group_chunks, adamw_options)
    else:
        tasks = [_staged(part, partial(muon.apply, commit=commit), is_written=True) for part in parts]
        for group_chunks, adamw_options in chunks:
            is_moved = offload.moves(group_chunks[0].param.device)
            tasks += adamw.offload_tasks(group_chunks, adamw_options, commit, is_moved=is_moved)
        offload.run(tasks)
        commit()
    if rounds is not None:
        rounds.write()
    if rank_group is not None:
        rank_group.finish()


def _new_state(
    work: Sequence[GroupStep], state: State, offload: StateOffload, commit: Commit
) -> dict[Tensor, dict[str, Tensor]]:
    """Make the state of parameters that have none, kept from `commit` on, when gradients are clipped too."""
    new = {
        param.param: new_state(param, step.group, offload) for step in work for param in step.params if not param.state
    }

    def keep() -> None:
        for param, tensors in new.items():
            state.setdefault(param, {}).update(tensors)

    commit.actions.append(keep)
    for step in work:
        for clips in (step.clips, *(batch.clips for batch in step.sharded)):
            commit.actions += [clip.apply_ for clip in clips]
    return new


def _parts(work: Sequence[GroupStep], check: GradientCheck | None) -> list[MatrixBatch]:
    """Return the batches of all groups, cut to fit the workspace."""
    parts: list[MatrixBatch] = []
    for batch in (batch for step in work for batch in step.batches):
        batch.options = _on(batch.options, batch.device, check)
        parts += muon.apply_parts(batch, is_first=not parts)
    return parts


def _chunks(
    work: Sequence[GroupStep], new: Mapping[Tensor, dict[str, Tensor]], check: GradientCheck | None
) -> list[tuple[list[AdamWChunk], AdamWOptions]]:
    """Return the parameters of AdamW groups, by group and device."""
    found: list[tuple[list[AdamWChunk], AdamWOptions]] = []
    for step in work:
        if not isinstance(step.options, AdamWOptions):
            continue
        by_device: dict[torch.device, list[AdamWChunk]] = {}
        for p in step.params:
            tensors = dict(p.state)
            if not tensors:
                tensors = new[p.param] if p.layout is None else p.layout.to_local(new[p.param])
            chunk = AdamWChunk(p.local, p.grad, tensors, p.key, p.first, p.param.numel())
            by_device.setdefault(p.local.device, []).append(chunk)
        for device, chunks in by_device.items():
            if check is not None:
                check.advanced += [chunk.state["step"] for chunk in chunks if adamw.is_8bit(chunk.state)]
            found.append((chunks, _on(step.options, device, check)))
    return found


def _try_memory(parts: Sequence[MatrixBatch], chunks: Sequence[tuple[list[AdamWChunk], AdamWOptions]]) -> None:
    """Allocate and free the most that a part of the step needs; the allocator keeps it for them."""
    most: dict[torch.device, int] = {}
    for part in parts:
        assert part.partition is not None
        most[part.device] = max(most.get(part.device, 0), part.num_matrices * part.partition.bytes_per_matrix)
    for group_chunks, options in chunks:
        for chunk in group_chunks:
            device = chunk.param.device
            most[device] = max(most.get(device, 0), adamw.copied_bytes(chunk, options))
    for device, num_bytes in most.items():
        torch.empty(num_bytes, dtype=torch.uint8, device=device)


def _on(options: Any, device: torch.device, check: GradientCheck | None) -> Any:
    """Return the options on a device: whether the step is skipped there, and what its gradients are divided by."""
    if check is None and options.grad_scale is None:
        return options
    return options.on(device, None if check is None else check.skip(device))

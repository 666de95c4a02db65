"""Memory of a step whose matrices several GPUs share, by the plan that the optimizer would make, from shapes alone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import ceil

import torch

from ..config import DEFAULT_NS_STEPS, DEFAULT_WORKSPACE_BYTES, SMALL_WORKSPACE_BYTES, SecondMomentKind
from ..distributed.assignment import Assignment, plan
from ..distributed.exchange import NUM_SHARES
from ..distributed.matrix_slots import matrix_slots
from ..distributed.param_sharding import ParamSharding, Spans
from ..distributed.planned_transfers import Matrix, MatrixStage
from ..orthogonalize import choose_method, resolve_coefficients
from ..step.group_options import matrix_counts
from ..step.second_moment import SecondMomentFormat
from .exchange_bytes import exchange_bytes
from .optimizers import OURS, Param, ns_coefficients, second_moment, step_bytes
from .setup import Setup

SHARING = OURS


def is_shared(optimizer: str, setup: Setup) -> bool:
    """Check whether the GPUs divide the orthogonalization, as the scripts do with Muon8bit: under DDP no adapter's."""
    is_divided = setup.shard in ("fsdp2", "hsdp") or (setup.shard == "ddp" and setup.rank is None)
    return optimizer in SHARING and is_divided and setup.state_device == "device"


def shared_step_bytes(
    optimizer: str,
    whole: Sequence[Param],
    trained: Sequence[Param],
    setup: Setup,
    kind: str,
    *,
    budget: int = DEFAULT_WORKSPACE_BYTES,
) -> int:
    """Return the most bytes that a step allocates at once, with what a GPU sends and receives.

    Args:
        optimizer: of `SHARING`.
        whole: the trained parameters.
        trained: the parts of them on the GPU with the largest.
        setup: as `is_shared` takes it.
        kind: device kind of `orthogonalize.device_kind`.
        budget: `workspace_bytes`.
    """
    num_ranks, num_shards = setup.num_gpus, setup.num_shards
    shared = [p for p in whole if _is_exchanged(p, num_ranks, num_shards)]
    names = {param.name for param in shared}
    own = [part for part in trained if part.name not in names]
    alone = step_bytes(optimizer, own, kind, budget=budget, is_cautious=setup.cautious)
    if not shared:
        return alone
    moment, is_sign = second_moment(optimizer, shared[0]), optimizer.startswith("adamuon8bit")
    coefficients = ns_coefficients(optimizer, shared[0])
    args = tuple(shared), num_ranks, num_shards, kind, budget
    planned = planned_exchange(*args, moment=moment, is_sign=is_sign, coefficients=coefficients)
    # The first rank has the largest parts, the most loaded one the most matrices.
    busiest = planned.load.index(max(planned.load))
    most = max(exchange_bytes(planned, rank, budget, kind, bits=shared[0].bits, between=alone) for rank in {0, busiest})
    return most + _sums_bytes(planned, shared[0].block_size)


@lru_cache(maxsize=16)
def planned_exchange(
    params: tuple[Param, ...],
    num_ranks: int,
    num_shards: int,
    kind: str,
    budget: int = DEFAULT_WORKSPACE_BYTES,
    *,
    moment: SecondMomentKind | None = None,
    is_sign: bool = False,
    coefficients: str = "jordan",
) -> Assignment:
    """Return who orthogonalizes what, as the optimizer plans it for these parameters in the groups of `param_groups`.

    Args:
        params: matrices, in the model's order.
        num_ranks: GPUs.
        num_shards: GPUs of a replica, each with some rows; 1: every GPU has all.
        kind: device kind of `orthogonalize.device_kind`.
        budget: `workspace_bytes`.
        moment, is_sign, coefficients: the groups' `second_moment`, `sign_momentum` and `ns_coefficients`.
    """
    iteration = resolve_coefficients(coefficients, DEFAULT_NS_STEPS)
    shardings: dict[tuple[int, ...], ParamSharding] = {}
    groups: dict[tuple[object, bool], list[Param]] = {}
    for param in sorted(params, key=lambda p: p.split is not None or p.flatten):
        groups.setdefault((param.split, param.flatten), []).append(param)
    matrices: list[Matrix] = []
    for (_, flatten), members in groups.items():
        splits = _row_splits(members[0])
        counts = matrix_counts(tuple(p.shape for p in members), flatten, splits)
        batches: dict[tuple[int, int, int, SecondMomentFormat | None], list[Matrix]] = {}
        for param in members:
            if param.shape not in shardings:
                shardings[param.shape] = _sharding(param.shape, num_ranks, num_shards)
            second = None
            if moment is not None:
                format = torch.Size(param.shape), param.bits, "", param.block_size, flatten, splits, None
                second = SecondMomentFormat.of(*format, moment)
            for slot in matrix_slots(shardings[param.shape], flatten, splits, second):
                rows, cols = slot.rows[1] - slot.rows[0], slot.cols
                key = rows, cols, id(slot.sharding), second
                if key not in batches:
                    count, room = counts[rows, cols], budget - SMALL_WORKSPACE_BYTES
                    method = choose_method(rows, cols, iteration, kind, tiny=False, count=count, budget_bytes=room)
                    batches[key] = [
                        Matrix(rows, cols, slot.sharding, method, MatrixStage.of(cols, second, is_sign=is_sign))
                    ]
                else:
                    batches[key].append(batches[key][0])
        matrices += [matrix for batch in batches.values() for matrix in batch]
    return plan(matrices, num_ranks, budget // NUM_SHARES)


def _is_exchanged(param: Param, num_ranks: int, num_shards: int) -> bool:
    """Return whether the matrices of a parameter are sent; experts that lie whole on one GPU are not."""
    if not param.is_muon or (param.split is not None and param.split[1] == -1):
        return False
    return num_shards == 1 or not _sharding(param.shape, num_ranks, num_shards).is_local(param.flatten)


def _row_splits(param: Param) -> tuple[int, ...] | None:
    return None if param.split is None else param.split[0]


def _sharding(shape: tuple[int, ...], num_ranks: int, num_shards: int) -> ParamSharding:
    """Return where a parameter lies whose first dimension is divided among the GPUs of each replica."""
    size = ceil(shape[0] / num_shards)
    rest: Spans = tuple((0, length) for length in shape[1:])
    bounds = [(min(shard * size, shape[0]), min((shard + 1) * size, shape[0])) for shard in range(num_shards)]
    parts = tuple((bound, *rest) for bound in bounds) * (num_ranks // num_shards)
    return ParamSharding(shape, parts, parts, 0, ranks=tuple(range(num_ranks)) if num_shards > 1 else ())


def _sums_bytes(planned: Assignment, block_size: int) -> int:
    """Return the bytes of the gathered sums of squares, padded to the longest, and of those that a GPU gives."""
    num_ranks = len(planned.load)
    given = [0] * num_ranks
    for matrix in (transfer.matrix for transfer in planned.transfers):
        blocks = ceil(matrix.cols / block_size)
        for region, ranks in matrix.sharding.holders.items():
            given[ranks[0]] += region.shape[0] * blocks
            for rank in ranks[1:]:
                given[rank] += 1
    return 4 * (num_ranks + 1) * max(given)

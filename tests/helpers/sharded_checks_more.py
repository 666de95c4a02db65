"""More checks of `sharded_checks`: shapes, bytes, non-finite gradients, disagreements, refusals."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from benchmarks.scaling.transfers import bytes_received, bytes_sent, counted_bytes, gathered_bytes, num_gathered
from helpers.allocator import peak_bytes
from helpers.oracle import JORDAN, newton_schulz
from helpers.sharded_checks import FORMATS, arm, check, last_dim
from helpers.sharded_runs import EXPERTS, MATRICES, Run, assert_same, on_mesh, raises, values
from muon8bit import Muon8bit, NonFiniteGradientError, param_groups
from muon8bit.step import nonfinite

RANK = 2  # whose gradient is bad, or missing


def both(shapes, placed, group=None, more=None, dtype=torch.float32):
    """A run of one process and one of several, after four steps."""
    common = {"group": group, "codebook": "dynamic"}
    single = Run(shapes, dtype, torch.clone, **common).train(range(1, 5))
    return single, Run(shapes, dtype, placed, **common, **(more or {})).train(range(1, 5))


SHAPES = {
    "flattened convolutions": ({"conv": (7, 3, 2, 2)}, {"flatten": True}, [Shard(0)]),
    "pieces of rows": ({"qkv": (13, 20)}, {"split_sizes": (8, 3, 2)}, [Shard(0)]),
    "heads of latent attention": ({"kv_b": (40, 20)}, {"split_sizes": (4, 6) * 4}, [Shard(0)]),
    "experts by rows": ({"experts": (1, 7, 16)}, {}, [Shard(1)]),
    "experts by columns": ({"experts": (1, 7, 16)}, {}, [Shard(2)]),
    "flattened convolution of pieces": ({"conv": (7, 2, 5)}, {"flatten": True, "split_sizes": (4, 3)}, [Shard(0)]),
}
for _name, (_shapes, _group, _placements) in SHAPES.items():

    @check(f"{_name} on 3 equal one process", ranks=3)
    def _(world, shapes=_shapes, group=_group, placements=_placements):
        placed = on_mesh(world.lines[3], lambda t: placements if tuple(t.shape) in shapes.values() else [Shard(0)])
        single, shared = both(shapes, placed, group)
        assert_same(shared.state_whole(), single.state_whole())
        for name in shapes:
            torch.testing.assert_close(shared.params_whole()[name], single.params_whole()[name], rtol=1e-5, atol=1e-6)


@check("experts sharded by expert are local", ranks=3)
def _(world):
    """A batch of one on the CPU: bitwise, whoever has the expert."""
    shapes = {"experts": (4, 128, 136)}
    with counted_bytes() as counted:
        single, shared = both(shapes, on_mesh(world.lines[3], [Shard(0)]))
    assert_same(shared.state_whole(), single.state_whole())
    assert_same(shared.params_whole(), single.params_whole())
    assert counted.gathered > 0
    assert (counted.sent, counted.received) == (0, 0)


@check("replicas of experts are divided")
def _(world):
    """Each of 2 replicas orthogonalizes one half of the experts and sends it to the other."""
    with counted_bytes() as counted:
        single, shared = both(EXPERTS, on_mesh(world.square, [Replicate(), Shard(0)]))
    assert_same(shared.state_whole(), single.state_whole())
    torch.testing.assert_close(shared.params_whole(), single.params_whole(), rtol=1e-5, atol=1e-6)
    owned = torch.tensor(counted.sent)
    dist.all_reduce(owned)
    assert owned == 4 * 5 * 6 * 16 * 4  # steps, experts, elements, fp32


def equal_bytes(world, mode, ranks, **options):
    placed, more = arm(world, mode, ranks)
    more = {**more, **options}
    run = Run({**MATRICES, **EXPERTS, "tall": (48, 3)}, torch.bfloat16, placed, **more, ns_dtype=torch.bfloat16)
    batches = []
    rank_group = run.train([1]).optimizer._rank_group
    gathering = rank_group.gathering
    rank_group.gathering = lambda given, *rest: batches.extend(given) or gathering(given, *rest)
    with counted_bytes() as counted:
        run.train([2])
    rank, (plan,) = rank_group.transport.rank, rank_group._assignments.values()
    num_flags = len(run.names) - len({*run.names} & shared_names(batches, run))
    sums = gathered_bytes(num_gathered(batches, num_flags))
    assert vars(counted) == {"gathered": sums, "sent": bytes_sent(plan)[rank], "received": bytes_received(plan)[rank]}
    assert ranks == 1 or sum(bytes_sent(plan)) > 0


def shared_names(batches, run):
    names = run.optimizer.param_groups[0]["param_names"]
    return {names[member.param_index] for batch in batches for member in batch.members}


OF_THE_FAMILY = {
    "": {},
    ", second moments of rows": {"second_moment": "row"},
    ", by shape and of signs": {"second_moment": "shape", "sign_momentum": True},
    ", of elements and of signs": {"second_moment": "element", "sign_momentum": True},
    ", of elements in 32 bits": {"second_moment": "element", "bits": 32},
    ", signs": {"sign_momentum": True},
}
for _mode, _ranks in {"fsdp": 3, "hsdp": 4, "ddp": 3, "sharded state": 2, "columns": 3, "rows and columns": 4}.items():
    for _name, _options in OF_THE_FAMILY.items():
        check(f"{_mode} on {_ranks}: bytes counted are those predicted{_name}", ranks=_ranks)(
            partial(equal_bytes, mode=_mode, ranks=_ranks, **_options)
        )


def is_as_accurate(placed, shapes):
    """One step from zero with lr 1: the parameter's change is O. Its distance to float64, over all matrices."""
    options = {"vectors": {}, "lr": 1.0, "group": {"weight_decay": 0.0}, "bits": 32}
    distances = []
    for place in (torch.clone, placed):
        run = Run(shapes, torch.float32, place, **options)
        with torch.no_grad():
            for param in run.params.values():
                param.zero_()
        run.train([3])
        distances.append(0.0)
        for name, grad in values(shapes, torch.float32, 3).items():
            rows, cols = grad.shape
            expected = -(max(1, rows / cols) ** 0.5) * newton_schulz(grad.double().numpy(), [JORDAN] * 5)
            distances[-1] += np.square(run.params_whole()[name].double().numpy() - expected).sum()
    assert distances[1] <= 1.05**2 * distances[0], distances
    return run


@check("matrices whose Gram matrices travel are as accurate", ranks=3)
def _(world):
    shapes = {f"tall {i}": (700 + i, 96) for i in range(8)}
    run = is_as_accurate(on_mesh(world.lines[3], [Shard(0)]), shapes)
    (plan,) = run.optimizer._rank_group._assignments.values()
    assert {transfer.strategy for transfer in plan.transfers} == {"reduce_gram"}


@check("matrices with cut columns are as accurate", ranks=3)
def _(world):
    is_as_accurate(on_mesh(world.lines[3], last_dim), {f"wide {i}": (40, 91 + i) for i in range(12)})


@check("other batches are as accurate")
def _(world):
    is_as_accurate(on_mesh(world.square, [Replicate(), Shard(0)]), {f"same {i}": (40, 70) for i in range(12)})


def bad_gradients(world, mode, name, policy, is_asynchronous):
    """A NaN on one rank: all skip, nothing changes, all raise with its name, and the run goes on as if it had not
    been."""
    placed, more = arm(world, mode, 3)
    more = {**more, "on_nonfinite": policy, "param_rounding": "stochastic"}
    shapes = {**MATRICES, **EXPERTS}
    run, twin = (Run(shapes, torch.bfloat16, placed, **more).train([1]) for _ in range(2))
    run.set_grads(2)
    grad = run.params[name].grad
    local = grad.to_local() if isinstance(grad, DTensor) else grad
    if dist.get_rank() == (0 if name == "bias" else 2):
        local.view(-1)[-1] = torch.nan
    original = nonfinite.GradientCheck.is_asynchronous
    nonfinite.GradientCheck.is_asynchronous = is_asynchronous
    try:
        if policy == "skip":
            run.optimizer.step()
            assert run.optimizer.num_skipped_steps == 1
        elif is_asynchronous:
            run.optimizer.step()
            found = raises(NonFiniteGradientError, [name, "call 2"], run.optimizer.step)
        else:
            found = raises(NonFiniteGradientError, [name, "call 2"], run.optimizer.step)
        if policy != "skip":
            assert found.names == (name,)
        for either in (run, twin):
            either.train([3])
    finally:
        nonfinite.GradientCheck.is_asynchronous = original
    assert_same(run.state_whole(), twin.state_whole())
    assert_same(run.params_whole(), twin.params_whole())


for _mode in ("fsdp", "ddp", "sharded state"):
    for _name in ("several blocks", "experts", "bias"):
        for _policy, _asynchronous in (("raise", False), ("skip", True), ("raise", True)):
            check(f"{_mode} on 3: NaN in {_name}, {_policy}, asynchronous={_asynchronous}", ranks=3)(
                partial(bad_gradients, mode=_mode, name=_name, policy=_policy, is_asynchronous=_asynchronous)
            )


@check("ranks that disagree about gradients all raise", ranks=3)
def _(world):
    run = Run(MATRICES, torch.float32, on_mesh(world.lines[3], [Shard(0)])).train([1])
    before = {**run.state_whole(), **run.params_whole()}
    run.set_grads(2)
    if dist.get_rank() == RANK:
        run.params["wide"].grad = None
    raises(RuntimeError, ["gradient", "wide on rank 0, not on rank 2"], run.optimizer.step)
    assert_same({**run.state_whole(), **run.params_whole()}, before)
    run.train([3])


@check("ranks that disagree about the groups all raise", ranks=3)
def _(world):
    momentum = 0.9 if dist.get_rank() == 1 else 0.95
    run = Run(MATRICES, torch.float32, on_mesh(world.lines[3], [Shard(0)]), group={"momentum": momentum})
    raises(
        RuntimeError, ["parameter groups", "'momentum': 0.95", "rank 1 has", "'momentum': 0.9,"], lambda: run.train([1])
    )
    shapes = MATRICES if dist.get_rank() else {name: MATRICES[name] for name in list(MATRICES)[:-1]}
    run = Run(shapes, torch.float32, on_mesh(world.lines[3], [Shard(0)]))
    raises(RuntimeError, ["parameter groups", "several blocks"], lambda: run.train([1]))
    workspace = 2**26 if dist.get_rank() else 2**25
    run = Run(MATRICES, torch.float32, on_mesh(world.lines[3], [Shard(0)]), workspace_bytes=workspace)
    raises(RuntimeError, ["options", "workspace_bytes"], lambda: run.train([1]))


@check("a step of zeros with lr 0 changes no parameter and makes all state", ranks=3)
def _(world):
    run = Run(MATRICES, torch.bfloat16, on_mesh(world.lines[3], [Shard(0)]))
    before = run.params_whole()
    for group in run.optimizer.param_groups:
        group["lr"] = 0.0
    for param in run.params.values():
        param.grad = torch.zeros_like(param)
    run.optimizer.step()
    assert_same(run.params_whole(), before)
    assert len(run.optimizer.state) == len(run.params)
    local = {len(p.to_local()) for p in run.params.values()}
    assert dist.get_rank() < 2 or 0 in local  # a rank without rows has an entry too


def one(param, **group):
    return Muon8bit([{"params": [("weight", torch.nn.Parameter(param))], **group}])


def step_of(optimizer):
    for param in optimizer.param_groups[0]["params"]:
        param.grad = torch.zeros_like(param)
    optimizer.step()


@check("what cannot be sharded is refused by name")
def _(world):
    mesh, square = world.lines[4], world.square
    whole_matrix = torch.ones(8, 8)
    partial_sum = DTensor.from_local(whole_matrix, mesh, [Partial()])
    raises(NotImplementedError, ["weight", "Partial"], lambda: one(partial_sum))
    raises(ValueError, ["weight", "1 dimension"], lambda: one(distribute_tensor(torch.ones(8), mesh, [Shard(0)])))
    columns = one(distribute_tensor(whole_matrix, mesh, [Shard(0)]), split_sizes=(4, 4), split_dim=-1)
    raises(NotImplementedError, ["weight", "split_dim=-1"], lambda: step_of(columns))
    conv = one(distribute_tensor(torch.ones(4, 4, 2, 2), mesh, [Shard(1)]), flatten=True)
    raises(NotImplementedError, ["weight", "flatten=True"], lambda: step_of(conv))
    pair = square["shard"]
    two = Muon8bit(
        [
            ("first", torch.nn.Parameter(distribute_tensor(whole_matrix, square, [Shard(0), Shard(1)]))),
            ("second", torch.nn.Parameter(distribute_tensor(whole_matrix, pair, [Shard(0)]))),
        ]
    )
    raises(NotImplementedError, ["second", "ranks [0, 1, 2, 3]"], lambda: step_of(two))
    on_two = distribute_tensor(whole_matrix, world.cube["shard", "one"], [Shard(0), Replicate()], src_data_rank=None)
    raises(NotImplementedError, ["process_group"], lambda: step_of(one(on_two)))


@check("a matrix on two of four ranks takes the group that is given")
def _(world):
    """A mesh of two dimensions that is not the world."""
    groups = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    placed = on_mesh(world.cube["shard", "one"], [Shard(0), Replicate()])
    single, shared = both(MATRICES, placed, more={"process_group": groups[dist.get_rank() // 2]})
    assert_same(shared.params_whole(), single.params_whole())


def keeps_to_workspace(world, mode, ranks, options):
    """64 matrices of 1 MiB in fp32, twice what a step may have at once."""
    placed, more = arm(world, mode, ranks)
    shapes = {f"{i}": (64, 4096) for i in range(64)}
    more = {**more, "workspace_bytes": 32 * 2**20, "block_size": 2048, **options}
    run = Run(shapes, torch.bfloat16, placed, vectors={}, **more).train([1])
    run.set_grads(2)
    # gloo's thread lets go of a buffer late now and then: what a step needs is the least that one took.
    peak = min(peak_bytes(run.optimizer.step)[0] for _ in range(3))
    assert 2**22 < peak <= 32 * 2**20, peak


for _mode, _options in [("fsdp", {}), ("ddp", {}), ("columns", {}), ("fsdp", {"sign_momentum": True})]:
    check(f"{_mode} on 2 {[*_options]}: a step keeps to its workspace", ranks=2)(
        partial(keeps_to_workspace, mode=_mode, ranks=2, options=_options)
    )


def comes_in_parts(world, mode, format):
    """Second moments come with the first part of a round's updates, and are used in all."""
    dtype, options = FORMATS[format]
    placed, more = arm(world, mode, 3)
    single, shared = Run(MATRICES, dtype, torch.clone, **options), Run(MATRICES, dtype, placed, **options, **more)
    for run in (single, shared):
        run.optimizer.workspace_bytes = 12 * 512  # the constructor refuses so little
        run.train([1, 2, 3])
    assert_same(shared.state_whole(), single.state_whole())
    assert_same(shared.params_whole(), single.params_whole())
    (assignment,) = shared.optimizer._rank_group._assignments.values()
    assert max(planned.num_parts for planned in assignment.rounds) > 1


for _mode in ("fsdp", "ddp", "sharded state"):
    for _format in ("normuon", "normuon by shape", "adamuon", "adamuon, bits=32"):
        check(f"{_mode} on 3: {_format} in several parts", ranks=3)(partial(comes_in_parts, mode=_mode, format=_format))


def scaled(world, mode):
    """What a GradScaler finds on one rank is all ranks': none writes. Else the step is that of unscaled gradients."""
    placed, more = arm(world, mode, 3)
    shapes = {**MATRICES, **EXPERTS}
    run, twin = (Run(shapes, torch.float32, placed, **more).train([1]) for _ in range(2))
    optimizer = run.optimizer
    optimizer.grad_scale = torch.tensor(8.0)
    for seed, found in ((2, float(dist.get_rank() == 1)), (3, 0.0)):
        optimizer.found_inf = torch.tensor(found)
        run.set_grads(seed)
        for param in run.params.values():
            param.grad = param.grad * 8.0
        optimizer.step()
    assert optimizer.num_skipped_steps == 1
    twin.train([3])
    assert_same(run.state_whole(), twin.state_whole())
    assert_same(run.params_whole(), twin.params_whole())


def maximized(world, mode):
    """The step of the negated gradient, to the bit."""
    placed, more = arm(world, mode, 3)
    shapes = {**MATRICES, **EXPERTS}
    run = Run(shapes, torch.float32, placed, maximize=True, **more).train([1, 2])
    twin = Run(shapes, torch.float32, placed, **more)
    for seed in (1, 2):
        twin.set_grads(seed)
        for param in twin.params.values():
            param.grad = -param.grad
        twin.optimizer.step()
    assert_same(run.state_whole(), twin.state_whole())
    assert_same(run.params_whole(), twin.params_whole())


for _mode in ("fsdp", "ddp", "sharded state"):
    check(f"{_mode} on 3: a GradScaler", ranks=3)(partial(scaled, mode=_mode))
    check(f"{_mode} on 3: maximize", ranks=3)(partial(maximized, mode=_mode))


def numbers(shape, seed):
    return values({"only": shape}, torch.float32, seed)["only"]


class Latent(torch.nn.Module):
    """The projections of a latent attention of 5 heads: two ranks share the middle one."""

    num_heads, qk_nope_head_dim, qk_rope_head_dim, v_head_dim = 5, 4, 2, 6

    def __init__(self):
        super().__init__()
        self.q_b_proj, self.kv_b_proj = (torch.nn.Linear(20, rows, bias=False) for rows in (30, 50))
        for param in self.parameters():
            param.data.copy_(numbers(param.shape, 0))


@check("latent attention by head under FSDP2 on 2 equals one process", ranks=2)
def _(world):
    """Rows 15 and 25, where the ranks' parts end, lie inside queries and values of the third head."""
    runs = []
    for mesh in (None, world.lines[2]):
        model = torch.nn.Sequential(Latent())
        if mesh is not None:
            fully_shard(model, mesh=mesh)
        optimizer = Muon8bit(param_groups(model, lr=0.02, split_heads="head_kv"), block_size=64, ns_dtype=torch.float32)
        assert [group["split_sizes"] for group in optimizer.param_groups] == [(6,) * 5, (4, 6) * 5]
        params = dict(model.named_parameters())
        for step in range(1, 5):
            for param in params.values():
                grad = numbers(param.shape, step)
                param.grad = grad if mesh is None else distribute_tensor(grad, mesh, [Shard(0)], src_data_rank=None)
            optimizer.step()
        runs.append({name: {"param": param, **optimizer.state[param]} for name, param in params.items()})
    single, sharded = runs
    for name, tensors in single.items():
        own = {key: t.full_tensor() for key, t in sharded[name].items()}
        torch.testing.assert_close(own.pop("param"), tensors.pop("param"), rtol=1e-5, atol=1e-6)
        assert sharded[name]["param"].to_local().shape[0] == tensors["momentum_linear8"].shape[0] // 2
        assert_same(own, tensors)

"""Checks of `sharded_checks`: experts without tokens, which are idle on all ranks or on none."""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from helpers.sharded_checks import arm, check
from helpers.sharded_runs import Run, assert_same, on_mesh, values, whole
from muon8bit import Muon8bit, StackActivity

SHAPES = {"experts": (5, 12, 24), "nested": (2, 2, 12, 16), "dense": (12, 24)}
STACKS = ("experts", "nested")
# By step: the experts that have a gradient, and those that have it in one corner alone, so on one rank alone.
ACTIVE = [((0, 1), ()), ((0, 3), (2,)), ((), ()), ((), (4, 1)), ((0, 1, 2, 3, 4), ())]


class ExpertRun(Run):
    """Run in which most experts have no gradient at most steps."""

    def set_grads(self, seed):
        active, cornered = ACTIVE[seed]
        for name, grad in values(self.names, self.dtype, seed).items():
            for number, matrix in enumerate(grad.flatten(0, -3) if name in STACKS else []):
                if number in cornered:
                    matrix[:-1], matrix[..., :-1] = 0, 0
                elif number not in active:
                    matrix.zero_()
            self.params[name].grad = self.placed(grad)

    def snapshot(self):
        """Return copies of all tensors of each matrix of the stacks, whole."""
        found = []
        for param in (self.params[name] for name in STACKS):
            tensors = [whole(t.detach()).flatten(0, -3) for t in (param, *self.optimizer.state[param].values())]
            found += zip(*tensors, strict=True)
        return found


def stays(run, step):
    """Take a step, and check that idle experts keep every bit, and that the others move."""
    before = run.snapshot()
    run.train([step])
    same = [all(map(torch.equal, *pair)) for pair in zip(before, run.snapshot(), strict=True)]
    moved = {*ACTIVE[step][0], *ACTIVE[step][1]}
    assert same == [number not in moved for number in [*range(5), *range(4)]], (step, same)


def idle_as_in_one_process(placed, more, pieces, **family):
    """The corner lies in the last piece: the whole expert is active, also where its other pieces lie elsewhere."""
    ways = (torch.clone, {}), (placed, more)
    group = {"split_sizes": pieces, **family}
    runs = [ExpertRun(SHAPES, torch.float32, place, group=group, **how) for place, how in ways]
    single, shared = (run.train([4]) for run in runs)
    activities = [StackActivity(run.optimizer) for run in runs]
    for step in range(4):
        single.train([step])
        stays(shared, step)
        if step == 1:  # as it would be resumed, on however many ranks
            activities[1] = StackActivity(shared.optimizer)
            activities[1].load_state_dict(activities[0].state_dict())
    steps, expected = (activity.last_steps() for activity in activities)
    assert {name: of.tolist() for name, of in steps.items()} == {name: of.tolist() for name, of in expected.items()}
    assert expected["experts"].tolist() == [3, 5, 3, 3, 5]
    states = shared.state_whole(), single.state_whole()  # second moments are of directions, as parameters are
    assert_same(*({key: of[key] for key in of if "momentum" in key[1]} for of in states))
    if family:
        return
    # Norms are added up otherwise where a block is cut, and products of another number of matrices rounded otherwise.
    assert_close(shared.params_whole(), single.params_whole(), rtol=1e-5, atol=1e-6)


def by_dim(dim):
    """Shard stacks by a dimension from the end, everything else by the first."""
    return lambda tensor: [Shard(tensor.ndim - dim if tensor.ndim > 2 else 0)]


WAYS = {
    "by expert": (3, lambda world: (on_mesh(world.lines[3], [Shard(0)]), {})),
    "by rows": (3, lambda world: (on_mesh(world.lines[3], by_dim(2)), {})),
    "by columns": (2, lambda world: (on_mesh(world.lines[2], by_dim(1)), {})),
    "replicas by rows": (4, lambda world: (on_mesh(world.square, lambda t: [Replicate(), *by_dim(2)(t)]), {})),
    "ddp": (3, lambda world: arm(world, "ddp", 3)),
    "sharded state": (3, lambda world: arm(world, "sharded state", 3)),
}
for _name, (_ranks, _arm) in WAYS.items():
    for _pieces in (None, (4, 5, 3)):

        @check(f"idle experts {_name}, pieces {_pieces}, are those of one process", ranks=_ranks)
        def _(world, arm=_arm, pieces=_pieces):
            idle_as_in_one_process(*arm(world), pieces)


for _name, _kind in (
    *(("by expert", "element"), ("by rows", "element"), ("by rows", "row")),
    *(("by columns", "element"), ("by columns", "row"), ("sharded state", "shape")),
):
    _ranks, _arm = WAYS[_name]

    @check(f"idle experts {_name} keep their second moment, {_kind}", ranks=_ranks)
    def _(world, arm=_arm, kind=_kind):
        idle_as_in_one_process(*arm(world), None, second_moment=kind, rescale="rms", sign_momentum=kind == "element")


def tokens_of_one_rank(world, way):
    """Expert 0 has tokens on all ranks, 1 on the last alone, 2 on none; gradients are reduced before the step."""
    torch.manual_seed(0)
    model = torch.nn.Module()
    model.experts = torch.nn.Parameter(torch.randn(3, 8, 16))
    model.forward = lambda x: sum((x[n] @ model.experts[n]).square().sum() * x[n].abs().sum().sign() for n in range(3))
    group = world.lines[4].get_group()
    start = model.experts.detach().clone()
    more = {}
    if way == "ddp":
        wrapped, more = DistributedDataParallel(model, process_group=group), {"process_group": group}
    else:
        dim = 0 if way == "fsdp by expert" else 1
        wrapped = fully_shard(model, mesh=world.lines[4], shard_placement_fn=lambda _: Shard(dim))
    optimizer = Muon8bit([("experts", model.experts)], lr=0.1, **more)
    x = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(dist.get_rank()))
    x[1] *= dist.get_rank() == 3
    for number in (None, 2):
        inputs = x.clone()
        if number is not None:
            inputs[number] = 0
        wrapped(inputs).backward()
        before = whole(model.experts.detach())
        optimizer.step()
        optimizer.zero_grad()
        same = [torch.equal(*pair) for pair in zip(before, whole(model.experts.detach()), strict=True)]
        assert same == [False, False, number == 2]
    found = [torch.empty_like(start) for _ in range(4)]
    dist.all_gather(found, whole(model.experts.detach()))
    assert all(torch.equal(found[0], other) for other in found)


for _way in ("ddp", "fsdp by expert", "fsdp by rows"):
    check(f"{_way}: tokens on one rank alone make an expert active on all")(partial(tokens_of_one_rank, way=_way))

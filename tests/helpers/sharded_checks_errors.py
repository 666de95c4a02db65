"""More checks of `sharded_checks`: errors that only one rank sees, and what a step must not take for something else."""

from __future__ import annotations

import copy
import pickle
import time
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from helpers.sharded_checks import arm, check
from helpers.sharded_runs import MATRICES, VECTORS, Run, assert_same, on_mesh, raises
from muon8bit import Muon8bit
from muon8bit.distributed import consistency, sharded_batch
from muon8bit.orthogonalize import RATES, device_kind, rates_of

RANK = 2  # that sees the error


def refused_by_all(run, words):
    """The step that only RANK cannot take: there `words` alone, elsewhere with that rank; nothing changed anywhere."""
    before = {**run.state_whole(), **run.params_whole()}
    here = dist.get_rank() == RANK
    raises(ValueError if here else RuntimeError, words if here else [f"rank {RANK}", *words], run.optimizer.step)
    assert_same({**run.state_whole(), **run.params_whole()}, before)


def state_of_another_shape(world, mode):
    placed, more = arm(world, mode, 3)
    run = Run(MATRICES, torch.float32, placed, **more).train([1])
    state, wide = run.optimizer.state, run.params["wide"]
    run.set_grads(2)
    if dist.get_rank() == RANK:
        state[wide], kept = state[run.params["several blocks"]], state[wide]
    here = ["wide", "asks for a state of"]
    raises(
        *((ValueError, here) if dist.get_rank() == RANK else (RuntimeError, [f"rank {RANK}", *here])),
        run.optimizer.step,
    )
    if dist.get_rank() == RANK:
        state[wide] = kept
    run.train([2])
    assert_same(run.state_whole(), Run(MATRICES, torch.float32, torch.clone).train([1, 2]).state_whole())


for _mode in ("fsdp", "ddp"):
    check(f"{_mode} on 3: a state that does not fit on one rank is told on all", ranks=3)(
        partial(state_of_another_shape, mode=_mode)
    )


@check("a sparse gradient on one rank is told on all", ranks=3)
def _(world):
    placed, more = arm(world, "ddp", 3)
    run = Run(MATRICES, torch.float32, placed, **more).train([1])
    run.set_grads(2)
    if dist.get_rank() == RANK:
        run.params["embedding"].grad = run.params["embedding"].grad.to_sparse()
    refused_by_all(run, ["embedding", "sparse"])


@check("ranks that disagree about state all raise", ranks=3)
def _(world):
    run = Run(MATRICES, torch.float32, on_mesh(world.lines[3], [Shard(0)])).train([1])
    saved = run.optimizer.state_dict()
    fresh = Run(MATRICES, torch.float32, on_mesh(world.lines[3], [Shard(0)]))
    if dist.get_rank() == 0:
        fresh.optimizer.load_state_dict(saved)
    raises(RuntimeError, ["state", "bias, ", "on rank 0, not on rank 1", "Load"], lambda: fresh.train([2]))


def on_another_device(world, rates):
    """A step where one rank has a device of another model, with these rates."""
    run = Run(MATRICES, torch.float32, on_mesh(world.lines[3], [Shard(0)]))
    originals = consistency.device_kind, sharded_batch.device_kind
    if dist.get_rank() == 1:
        RATES["cpu_of_tomorrow"] = rates
        consistency.device_kind = sharded_batch.device_kind = lambda _: "cpu_of_tomorrow"
    try:
        return run.train([1])
    finally:
        consistency.device_kind, sharded_batch.device_kind = originals
        RATES.pop("cpu_of_tomorrow", None)


@check("ranks with devices that take other paths all raise", ranks=3)
def _(world):
    raises(
        RuntimeError, ["rank 1", "gram=0.125"], lambda: on_another_device(world, replace(rates_of_cpu(), gram=0.125))
    )


@check("devices of another name that take the same paths go together", ranks=3)
def _(world):
    run = on_another_device(world, rates_of_cpu())
    assert_same(run.state_whole(), Run(MATRICES, torch.float32, torch.clone).train([1]).state_whole())


def rates_of_cpu():
    return rates_of(device_kind(torch.device("cpu")))


@check("a rank may come to a step later than step_timeout", ranks=3)
def _(world):
    run = Run(MATRICES, torch.float32, on_mesh(world.lines[3], [Shard(0)])).train([1])
    its = run.optimizer._rank_group
    its.watchdog.timeout_s = 0.2
    if dist.get_rank() == RANK:
        time.sleep(1)  # it evaluates, say
    its.wait_for_ranks(None)
    run.train([2])
    assert_same(run.state_whole(), Run(MATRICES, torch.float32, torch.clone).train([1, 2]).state_whole())


@check("a step that failed while it wrote on one rank is refused by all", ranks=3)
def _(world):
    run = Run(MATRICES, torch.float32, on_mesh(world.lines[3], [Shard(0)])).train([1])
    saved = run.optimizer.state_dict()
    run.set_grads(2)
    if dist.get_rank() == RANK:  # as where others do not wait for the end of a step
        run.optimizer._failure = "planted"
    words = [] if dist.get_rank() == RANK else [f"rank {RANK}"]
    for use in (run.optimizer.step, run.optimizer.state_dict):
        raises(RuntimeError, [*words, "begun to write", "planted", "load_state_dict"], use)
    run.optimizer.load_state_dict(saved)
    run.optimizer.step()


@check("keys of a group that are not the optimizer's may differ", ranks=3)
def _(world):
    run = Run(MATRICES, torch.float32, on_mesh(world.lines[3], [Shard(0)]), group={"owner": object()}).train([1])
    assert_same(run.state_whole(), Run(MATRICES, torch.float32, torch.clone).train([1]).state_whole())


@check("gradients that lie otherwise than their parameters are refused by name")
def _(world):
    mesh, ones = world.lines[4], torch.ones(8, 8)

    def step(param, grad, **options):
        param = torch.nn.Parameter(param)
        param.grad = grad
        Muon8bit([("weight", param)], **options).step()

    rows, other = (
        [distribute_tensor(ones, m, p, src_data_rank=None) for m, p in pairs]
        for pairs in ([(mesh, [Shard(0)]), (mesh, [Shard(1)])], [(world.square, [Shard(0), Replicate()])])
    )
    words = ["weight", "gradient"]
    for grad in (ones, rows[1], *other):
        raises(NotImplementedError, words, partial(step, rows[0], grad))
    for shard_state in (False, True):
        options = {"process_group": dist.group.WORLD, "shard_state": shard_state}
        raises(NotImplementedError, words, partial(step, ones.clone(), rows[0], **options))


@check("a process group is checked when the optimizer is made")
def _(world):
    param = [torch.nn.Parameter(torch.ones(8, 8))]
    pair = dist.new_group([0, 1])
    if dist.get_rank() > 1:
        raises(ValueError, ["process_group", "this rank"], lambda: Muon8bit(param, process_group=pair))
    raises(ValueError, ["process_group", "DeviceMesh"], lambda: Muon8bit(param, process_group=world.lines[4]))


@check("an optimizer with a process group is not copied, and says so")
def _(_):
    optimizer = Muon8bit([torch.nn.Parameter(torch.ones(8, 8))], process_group=dist.group.WORLD)
    for of in (copy.deepcopy, pickle.dumps):
        raises(TypeError, ["process_group", "state_dict"], partial(of, optimizer))


@check("groups without parameters or gradients")
def _(_):
    optimizer = Muon8bit([{"params": []}], process_group=dist.group.WORLD)
    optimizer.step()
    param = torch.nn.Parameter(torch.ones(8, 8))
    optimizer.add_param_group({"params": [param]})
    optimizer.step()
    assert torch.equal(param, torch.ones(8, 8))


def edges(run):
    """Steps of a run, with a group that comes later, a parameter that is frozen later, lr 0 and a closure."""
    run.train([1])
    late = torch.nn.Parameter(run.placed(torch.linspace(-1, 1, 90).view(6, 15).to(run.dtype)))
    run.names, run.params["late"] = {**run.names, "late": (6, 15)}, late
    run.optimizer.add_param_group({"params": [("late", late)]})
    run.train([2])
    run.set_grads(3)
    for name in ("wide", "bias", "pair"):
        run.params[name].grad = None
    run.optimizer.step(lambda: 0.0)
    for group in run.optimizer.param_groups:
        group["lr"] = 0.0
    return run.train([4])


def has_edges(world, mode, dtype):
    """`pair` leaves ranks without elements; gradients and, of replicas, parameters are transposed in memory."""

    def turned(tensor):
        return tensor.t().contiguous().t() if tensor.ndim == 2 else tensor

    placed, more = arm(world, mode, 4)

    def place(tensor):
        found = placed(tensor)
        if not isinstance(found, DTensor):
            return turned(found)
        local, where = turned(found.to_local()), (found.device_mesh, found.placements)
        return DTensor.from_local(local, *where, shape=found.shape, stride=found.stride())

    options = {"vectors": {**VECTORS, "pair": (2,)}}
    options |= {"param_rounding": "stochastic"} if dtype == torch.bfloat16 else {}
    single = edges(Run(MATRICES, dtype, turned, **options))
    shared = edges(Run(MATRICES, dtype, place, **options, **more))
    assert_same(shared.state_whole(), single.state_whole())
    assert_same(shared.params_whole(), single.params_whole())


for _mode in ("fsdp", "ddp", "sharded state"):
    for _dtype in (torch.float32, torch.bfloat16):
        check(f"{_mode} on 4, {_dtype}: groups, gradients and memory that change equal one process")(
            partial(has_edges, mode=_mode, dtype=_dtype)
        )


@check("a gradient scaler skips the step on all ranks")
def _(world):
    run = Run(MATRICES, torch.float32, on_mesh(world.lines[4], [Shard(0)])).train([1])
    before = {**run.state_whole(), **run.params_whole()}
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    run.set_grads(2)
    if dist.get_rank() == 0:
        run.params["wide"].grad.to_local()[0, 0] = torch.inf
    scaler.step(run.optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0
    assert_same({**run.state_whole(), **run.params_whole()}, before)


@check("gradients that are partial sums are reduced", ranks=3)
def _(world):
    """As those of norms are in sequence parallelism."""
    single = Run(MATRICES, torch.float32, torch.clone).train([1])
    run = Run(MATRICES, torch.float32, on_mesh(world.lines[3], [Replicate()]))
    run.set_grads(1)
    for name in ("wide", "bias"):
        local = run.params[name].grad.to_local() * (dist.get_rank() == RANK)
        run.params[name].grad = DTensor.from_local(local, world.lines[3], [Partial()])
    run.optimizer.step()
    assert_same(run.state_whole(), single.state_whole())
    assert_same(run.params_whole(), single.params_whole())

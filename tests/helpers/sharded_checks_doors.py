"""More checks of `sharded_checks`: how state gets out of an optimizer on several ranks, and in again, bitwise."""

from __future__ import annotations

import copy
import os
from functools import partial

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from helpers.sharded_checks import arm, check
from helpers.sharded_runs import EXPERTS, MATRICES, Run, assert_same, on_mesh, raises
from muon8bit import Muon8bit
from muon8bit.integrations.accelerate import register


class Net(torch.nn.Module):
    """Two matrices and what AdamW takes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = torch.nn.Linear(24, 10), torch.nn.Linear(10, 9)

    def forward(self, x):
        return self.down(self.up(x))


def optimizer_of(model, **options):
    named = list(model.named_parameters())
    groups = [
        {"params": [(n, p) for n, p in named if p.ndim == 2]},
        {"params": [(n, p) for n, p in named if p.ndim == 1], "algorithm": "adamw", "lr": 0.01},
    ]
    return Muon8bit(groups, lr=0.02, block_size=64, ns_dtype=torch.float32, **options)


def train(model, optimizer, seeds):
    """Injected gradients, the same whatever the sharding."""
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for param in model.parameters():
            grad = torch.randn(param.shape, generator=generator).to(param.dtype)
            if isinstance(param, DTensor):
                grad = distribute_tensor(grad, param.device_mesh, param.placements, src_data_rank=None)
            param.grad = grad
        optimizer.step()


def everything(model, optimizer):
    found = {name: param.detach() for name, param in model.named_parameters()}
    for name, param in model.named_parameters():
        found |= {(name, key): value for key, value in optimizer.state[param].items()}
    return {key: (v.full_tensor() if isinstance(v, DTensor) else v).clone() for key, v in found.items()}


def sharded_net(world, kind):
    model = Net()
    if kind == "fsdp":
        fully_shard(model, mesh=world.lines[4])
    elif kind == "hsdp":
        fully_shard(model, mesh=world.square)
    elif kind == "fsdp over tensor parallelism":
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        parallelize_module(model, world.square["shard"], plan)
        fully_shard(model, mesh=world.square["replicate"])
    return model


KINDS = ("fsdp", "hsdp", "fsdp over tensor parallelism")


def is_one_process(world, kind):
    """Modules of `fully_shard`, with tensor parallelism under it: strided shards."""
    single, model = Net(), sharded_net(world, kind)
    arms = [(single, optimizer_of(single)), (model, optimizer_of(model))]
    for of, optimizer in arms:
        train(of, optimizer, range(4))
    expected, found = (everything(*pair) for pair in arms)
    if kind == KINDS[2]:
        assert any("Strided" in str(p.placements) for p in model.parameters())
    cut = ["down.weight"] if kind == KINDS[2] else []  # by columns
    for name in cut:
        torch.testing.assert_close(found.pop(name), expected.pop(name), rtol=1e-5, atol=1e-6)
    assert_same(found, expected)


def through_checkpoint(world, kind, codebook):
    """dcp.save and dcp.load of DTensors into a fresh optimizer, then on: bitwise."""
    model = sharded_net(world, kind)
    optimizer = optimizer_of(model, codebook=codebook)
    train(model, optimizer, range(3))
    folder = world.new_folder()
    state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(state, checkpoint_id=folder)
    other = sharded_net(world, kind)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    fresh = optimizer_of(other, codebook=codebook)
    state = {"optimizer": get_optimizer_state_dict(other, fresh)}
    dcp.load(state, checkpoint_id=folder)
    set_optimizer_state_dict(other, fresh, state["optimizer"])
    for of, its in ((model, optimizer), (other, fresh)):
        train(of, its, range(3, 5))
    assert_same(everything(other, fresh), everything(model, optimizer))


def through_full_state_dict(world, kind):
    """Whole tensors on rank 0, as `torch.save` takes them, given back to every rank by broadcast."""
    model = sharded_net(world, kind)
    optimizer = optimizer_of(model)
    train(model, optimizer, range(3))
    full = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    other = sharded_net(world, kind)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    fresh = optimizer_of(other)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_optimizer_state_dict(other, fresh, full if dist.get_rank() == 0 else {}, options=options)
    for of, its in ((model, optimizer), (other, fresh)):
        train(of, its, range(3, 5))
    assert_same(everything(other, fresh), everything(model, optimizer))


for _kind in KINDS:
    check(f"{_kind}: a module equals one process")(partial(is_one_process, kind=_kind))
    check(f"{_kind}: through distributed checkpointing")(
        partial(through_checkpoint, kind=_kind, codebook="linear" if _kind == "fsdp" else "dynamic")
    )
for _kind in KINDS[:2]:
    check(f"{_kind}: through a full state dict")(partial(through_full_state_dict, kind=_kind))


def loads_one_process(world, mode, ranks):
    """A plain state dict of one process, out of which every rank takes its part, and then on."""
    shapes = {**MATRICES, "experts": (4, 128, 136)}
    single = Run(shapes, torch.bfloat16, torch.clone).train([1, 2])
    placed, more = arm(world, mode, ranks)
    shared = Run(shapes, torch.bfloat16, placed, **more)
    shared.continue_from(single, [3, 4])


for _mode, _ranks in {"fsdp": 3, "hsdp": 4, "sharded state": 3, "rows and columns": 4}.items():
    check(f"{_mode} on {_ranks} loads the state of one process", ranks=_ranks)(
        partial(loads_one_process, mode=_mode, ranks=_ranks)
    )


@check("a state that lies otherwise is refused by name")
def _(world):
    run = Run(MATRICES, torch.float32, on_mesh(world.lines[4], [Shard(0)])).train([1])
    other = Run(MATRICES, torch.float32, on_mesh(world.square, [Replicate(), Shard(0)]))
    load = partial(other.optimizer.load_state_dict, run.optimizer.state_dict())
    raises(ValueError, ["state of wide: momentum_linear8", "torch.distributed.checkpoint"], load)
    plain = Run(MATRICES, torch.float32, torch.clone)
    raises(ValueError, ["wide", "full_tensor"], partial(plain.optimizer.load_state_dict, run.optimizer.state_dict()))


@check("sharded state is told only when it was consolidated", ranks=3)
def _(world):
    placed, more = arm(world, "sharded state", 3)
    single = Run(MATRICES, torch.float32, torch.clone).train([1, 2])
    run = Run(MATRICES, torch.float32, placed, **more)
    run.optimizer.load_state_dict(run.optimizer.state_dict())  # as Accelerate's prepare: there is none yet
    optimizer = run.train([1, 2]).optimizer
    raises(RuntimeError, ["consolidate_state_dict", "sharded_state_dict"], optimizer.state_dict)
    optimizer.consolidate_state_dict(to=1)
    if dist.get_rank() != 1:
        raises(RuntimeError, ["consolidate_state_dict"], optimizer.state_dict)
    else:
        same_dicts(optimizer.state_dict(), single.optimizer.state_dict())
    optimizer.consolidate_state_dict()
    saved = copy.deepcopy(optimizer.state_dict())
    same_dicts(saved, single.optimizer.state_dict())
    run.train([3])
    raises(RuntimeError, ["consolidate_state_dict"], optimizer.state_dict)
    twin = Run(MATRICES, torch.float32, placed, **more)
    with torch.no_grad():
        for name, param in twin.params.items():
            param.copy_(single.params[name])
    twin.optimizer.load_state_dict(saved)
    assert_same(twin.train([3]).state_whole(), run.state_whole())
    assert_same(twin.params_whole(), run.params_whole())


def same_dicts(found, expected):
    assert found["param_groups"] == expected["param_groups"]
    assert found["state"].keys() == expected["state"].keys()
    for index, tensors in expected["state"].items():
        assert_same(found["state"][index], tensors)


@check("sharded state of replicas through distributed checkpointing")
def _(world):
    options = {"process_group": dist.group.WORLD, "shard_state": True}
    models = [DistributedDataParallel(Net()) for _ in range(2)]
    optimizers = [optimizer_of(model, **options) for model in models]
    train(models[0], optimizers[0], range(3))
    folder = world.new_folder()
    with optimizers[0].sharded_state_dict():
        dcp.save({"optimizer": get_optimizer_state_dict(models[0], optimizers[0])}, checkpoint_id=folder)
    models[1].load_state_dict(copy.deepcopy(models[0].state_dict()))
    with optimizers[1].sharded_state_dict():
        state = {"optimizer": get_optimizer_state_dict(models[1], optimizers[1])}
        dcp.load(state, checkpoint_id=folder)
        set_optimizer_state_dict(models[1], optimizers[1], state["optimizer"])
    for pair in zip(models, optimizers, strict=True):
        train(*pair, range(3, 5))
    first, second = (everything(*pair) for pair in zip(models, optimizers, strict=True))
    assert_same(second, first)
    held = sum(v.to_local().nbytes for s in optimizers[0].state.values() for v in s.values() if isinstance(v, DTensor))
    assert held < 10 * 24 * 1.3 / 2 + 9 * 10 * 1.5 / 2


@check("replicas of experts through a plain state dict")
def _(world):
    run = Run(EXPERTS, torch.float32, on_mesh(world.square, [Replicate(), Shard(0)])).train([1])
    saved = run.optimizer.state_dict()
    twin = Run(EXPERTS, torch.float32, on_mesh(world.square, [Replicate(), Shard(0)])).train([5])
    twin.optimizer.load_state_dict(saved)
    assert_same(twin.state_whole(), run.state_whole())


def in_accelerate(world, register_it):
    """save_state and load_state of prepared replicas with sharded state."""
    ranks = {"RANK": dist.get_rank(), "LOCAL_RANK": dist.get_rank(), "WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 4}
    os.environ.update({key: str(value) for key, value in ranks.items()}, MASTER_ADDR="localhost", MASTER_PORT="1")
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 4
    model = Net()
    optimizer = optimizer_of(model, process_group=dist.group.WORLD, shard_state=True)
    model, prepared = accelerator.prepare(model, optimizer)
    train(model, optimizer, range(2))
    folder = world.new_folder()
    if not register_it:
        raises(RuntimeError, ["consolidate_state_dict"], lambda: accelerator.save_state(folder))
        return
    handle = register(accelerator, prepared)
    accelerator.save_state(folder)
    train(model, optimizer, range(2, 4))
    expected = everything(model, optimizer)
    accelerator.load_state(folder)
    train(model, optimizer, range(2, 4))
    assert_same(everything(model, optimizer), expected)
    handle.remove()
    raises(TypeError, ["SGD"], lambda: register(accelerator, torch.optim.SGD(model.parameters())))


check("sharded state through Accelerate's save_state")(partial(in_accelerate, register_it=True))
check("sharded state without the hook is refused")(partial(in_accelerate, register_it=False))

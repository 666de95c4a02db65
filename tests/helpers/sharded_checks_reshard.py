"""More checks of `sharded_checks`: checkpoints on other numbers of ranks, and a load on all ranks or on none."""

from __future__ import annotations

import copy
import os
import pickle
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from helpers.sharded_checks import NUM_RANKS, check
from helpers.sharded_checks_doors import Net, everything, optimizer_of, train
from helpers.sharded_runs import assert_same, raises
from muon8bit.integrations.distributed_checkpoint import load_checkpoint

FORMATS = {
    "fp32 linear": (torch.float32, {"codebook": "linear"}),
    "fp32 dynamic": (torch.float32, {"codebook": "dynamic"}),
    "bf16 linear": (torch.bfloat16, {"codebook": "linear", "param_rounding": "stochastic", "rounding_seed": 7}),
    "bf16 dynamic": (torch.bfloat16, {"codebook": "dynamic"}),
    "normuon": (torch.float32, {"second_moment": "shape", "rescale": "keep"}),
    "adamuon": (torch.bfloat16, {"second_moment": "element", "rescale": "rms", "sign_momentum": True}),
}


def arm(format, mesh=None, **more):
    """A model, sharded over a mesh if there is one, and its optimizer."""
    dtype, options = FORMATS[format]
    model = Net().to(dtype)
    if mesh is not None:
        fully_shard(model, mesh=mesh)
    return model, optimizer_of(model, **options, **more)


def told(model, optimizer, **options):
    options = StateDictOptions(**options)
    with optimizer.sharded_state_dict():
        state = get_optimizer_state_dict(model, optimizer, options=options)
    return {"model": get_model_state_dict(model, options=options), "optimizer": state}


def load_by_torch(model, optimizer, path, *, process_group=None, **options):
    """As torch's documentation has it."""
    state = told(model, optimizer, **options)
    dcp.load(state, checkpoint_id=path, process_group=process_group)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])


LOADERS = {
    "dcp.load": load_by_torch,
    "dcp.load with cpu_offload": partial(load_by_torch, cpu_offload=True),
    "load_checkpoint": load_checkpoint,
}


def resharded(world, format, loader):
    """1 -> 2 -> 4 -> 3 -> 1 ranks, two steps on each, equal ten steps of one process."""
    folder = None
    for place, ranks in enumerate((1, 2, 4, 3, 1)):
        saved, folder = folder, world.new_folder()
        if dist.get_rank() < ranks:
            mesh = world.lines[ranks]
            group = mesh.get_group()
            model, optimizer = arm(format, mesh)
            if saved is not None:
                LOADERS[loader](model, optimizer, saved, process_group=group)
            train(model, optimizer, range(2 * place, 2 * place + 2))
            dcp.save(told(model, optimizer, cpu_offload="offload" in loader), checkpoint_id=folder, process_group=group)
        dist.barrier()
    if dist.get_rank() == 0:
        single = arm(format)
        train(*single, range(10))
        assert_same(everything(model, optimizer), everything(*single))


for _format in FORMATS:
    for _loader in LOADERS if _format == "bf16 dynamic" else ("dcp.load", "load_checkpoint"):
        check(f"{_format}: through 1, 2, 4, 3 and 1 ranks by {_loader}")(
            partial(resharded, format=_format, loader=_loader)
        )


def through_full(world, format, broadcast):
    """Whole tensors on the host, of which every rank takes its part: those of rank 0, or its own."""
    model, optimizer = arm(format, world.lines[4])
    train(model, optimizer, range(3))
    whole = told(model, optimizer, full_state_dict=True, cpu_offload=True)
    if not broadcast:
        objects = [whole]
        dist.broadcast_object_list(objects)
        whole = objects[0]
    if not broadcast or dist.get_rank() == 0:
        assert whole["optimizer"]["state"].keys() == {"up.weight", "up.bias", "down.weight", "down.bias"}
    other, fresh = arm(format, world.lines[4])
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=broadcast)
    mine = whole if not broadcast or dist.get_rank() == 0 else {"model": {}, "optimizer": {}}
    set_model_state_dict(other, mine["model"], options=options)
    set_optimizer_state_dict(other, fresh, mine["optimizer"], options=options)
    single = arm(format)
    train(*single, range(5))
    for pair in ((model, optimizer), (other, fresh)):
        train(*pair, range(3, 5))
        assert_same(everything(*pair), everything(*single))


for _format in ("bf16 linear", "bf16 dynamic"):
    for _broadcast in (False, True):
        check(f"{_format}: through a full state dict, broadcast {_broadcast}")(
            partial(through_full, format=_format, broadcast=_broadcast)
        )


@check("bf16 dynamic: replicas through Accelerate's save_state")
def _(world):
    ranks = {"RANK": dist.get_rank(), "LOCAL_RANK": dist.get_rank(), "WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 4}
    os.environ.update({key: str(value) for key, value in ranks.items()}, MASTER_ADDR="localhost", MASTER_PORT="1")
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == NUM_RANKS
    model, optimizer = arm("bf16 dynamic", process_group=dist.group.WORLD)
    model, _ = accelerator.prepare(model, optimizer)
    train(model, optimizer, range(2))
    folder = world.new_folder()
    accelerator.save_state(folder)
    train(model, optimizer, range(7, 9))
    accelerator.load_state(folder)
    train(model, optimizer, range(2, 4))
    single = arm("bf16 dynamic")
    train(*single, range(4))
    assert_same(everything(model.module, optimizer), everything(*single))


def cut(folder):
    path = max(folder.glob("*.distcp"), key=lambda p: p.stat().st_size)
    os.truncate(path, path.stat().st_size // 2)
    return [str(path), "cut to"]


def lose(folder):
    path = min(folder.glob("*.distcp"))
    path.unlink()
    return [str(path), "missing"]


def spoil(folder):
    """Overwritten in the middle of one rank's file, with its length kept."""
    path = max(folder.glob("*.distcp"))
    data = bytearray(path.read_bytes())
    data[:] = b"\0" * len(data)
    path.write_bytes(data)
    return [str(folder), "reading failed"]


def cut_metadata(folder):
    os.truncate(folder / ".metadata", 100)
    return [str(folder / ".metadata")]


def drop_key(folder):
    path, key = folder / ".metadata", "optimizer.state.down.weight.momentum_scales"
    saved = pickle.loads(path.read_bytes())
    del saved.state_dict_metadata[key], saved.planner_data[key]
    path.write_bytes(pickle.dumps(saved))
    return [key, "missing there"]


DAMAGES = {
    "a cut file": cut,
    "a lost file": lose,
    "a spoiled file": spoil,
    "cut metadata": cut_metadata,
    "a missing key": drop_key,
}


def changed(state, *path, to):
    state = dict(state)
    if len(path) > 1:
        state[path[0]] = changed(state[path[0]], *path[1:], to=to)
    else:
        state[path[0]] = to(state[path[0]])
    return state


SCALES = ("optimizer", "state", "up.weight", "momentum_scales")
MISFITS = {  # other contents -> words of the error
    "another dtype": (("model", "up.weight"), lambda t: t.bfloat16(), ["model.up.weight", "bfloat16", "float32"]),
    "codes as another integer": (
        ("optimizer", "state", "up.weight", "momentum_linear8"),
        lambda t: t.to(torch.uint8),
        ["optimizer.state.up.weight.momentum_linear8", "uint8", "int8"],
    ),
    "scales that are not finite": (SCALES, lambda t: t / 0, ["state of up.weight: momentum_scales holds NaN or Inf"]),
    "a foreign key": (("model",), lambda m: {**m, "extra": torch.zeros(2)}, ["model.extra", "unknown here"]),
}


def untouched(world, make, words):
    """A load that is refused changes nothing on any rank, whether there was state or not."""
    for seeds in ([5], []):
        model, optimizer = make()
        train(model, optimizer, seeds)
        before, options = everything(model, optimizer), copy.deepcopy(optimizer.state_dict()["param_groups"])
        found = raises(ValueError, words, partial(load_checkpoint, model, optimizer, world.last))
        assert "nothing changed" in str(found)
        assert_same(everything(model, optimizer), before)
        assert optimizer.state_dict()["param_groups"] == options
        assert all(param.grad is None for param in model.parameters()) or seeds


@check("a damaged or foreign checkpoint changes nothing on any rank")
def _(world):
    mesh, format = world.lines[4], "fp32 linear"
    model, optimizer = arm(format, mesh)
    train(model, optimizer, range(3))
    state = told(model, optimizer)
    for damage in DAMAGES.values():
        world.last = world.new_folder()
        dcp.save(state, checkpoint_id=world.last)
        words = [None]
        if dist.get_rank() == 0:
            words = [damage(Path(world.last))]
        dist.broadcast_object_list(words)
        untouched(world, partial(arm, format, mesh), words[0])
    for path, to, words in MISFITS.values():
        world.last = world.new_folder()
        dcp.save(changed(state, *path, to=to), checkpoint_id=world.last)
        untouched(world, partial(arm, format, mesh), words)
    world.last = world.new_folder()
    raises(ValueError, [world.last, ".metadata"], partial(load_checkpoint, model, optimizer, world.last))
    dcp.save(state, checkpoint_id=world.last)
    untouched(world, partial(arm, "fp32 dynamic", mesh), ["momentum_linear8"])
    untouched(world, partial(arm, "bf16 linear", mesh), ["model.up.weight", "bfloat16"])


@check("what one rank alone finds is told by all, and a good load goes on bitwise")
def _(world):
    pairs = [arm("bf16 linear", world.lines[4]) for _ in range(2)]
    train(*pairs[0], range(3))
    world.last = world.new_folder()
    dcp.save({**told(*pairs[0]), "steps": 3}, checkpoint_id=world.last)
    model, optimizer = pairs[1]
    train(model, optimizer, [9])
    refuse = optimizer.register_load_state_dict_pre_hook(fails_on_rank_2)
    before = everything(model, optimizer)
    raises(ValueError, ["no room", "rank 2"], partial(load_checkpoint, model, optimizer, world.last))
    assert_same(everything(model, optimizer), before)
    refuse.remove()
    load_checkpoint(model, optimizer, world.last)  # with gradients and state of its own
    for pair in pairs:
        train(*pair, range(3, 5))
    assert_same(everything(*pairs[1]), everything(*pairs[0]))


def fails_on_rank_2(_optimizer, _state_dict):
    if dist.get_rank() == 2:
        raise MemoryError("no room")


@check("sharded state of replicas through load_checkpoint")
def _(world):
    options = {"process_group": dist.group.WORLD, "shard_state": True}
    pairs = []
    for _ in range(2):
        model, optimizer = arm("bf16 dynamic", **options)
        pairs.append((DistributedDataParallel(model), optimizer))
    train(*pairs[0], range(3))
    folder = world.new_folder()
    dcp.save(told(*pairs[0]), checkpoint_id=folder)
    train(*pairs[1], [9])  # gradients and state of its own
    load_checkpoint(*pairs[1], folder)
    for pair in pairs:
        train(*pair, range(3, 5))
    assert_same(everything(*pairs[1]), everything(*pairs[0]))

"""More checks of `sharded_checks`: bad values on one rank of two raise on both, and nothing changes on either."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer

from helpers.bad_values import (
    BY_HAND,
    GROUP_VALUES,
    MISFITS,
    MISSING_KEYS,
    SAVED,
    assert_unchanged,
    everything,
    make,
    refused,
    without,
    written,
)
from helpers.sharded_checks import check as on_ranks
from helpers.sharded_checks_doors import Net, optimizer_of, train
from helpers.sharded_runs import raises
from muon8bit import Muon8bit


@on_ranks("bad values on one rank are refused on both, and the step is taken once they are gone", ranks=2)
def _(world):
    params, optimizer = make(process_group=world.lines[2].get_group())
    rank = dist.get_rank()

    def check(damage, words, elsewhere):
        undo = damage() if rank else None
        before = everything(params, optimizer)
        refused(optimizer.step, words if rank else ["rank 1", *elsewhere], ValueError if rank else RuntimeError)
        assert_unchanged(params, optimizer, before)
        if undo:
            undo()

    for write, table in ((written, GROUP_VALUES), (without, MISSING_KEYS)):
        for of in table:
            words = [f"group {of[0]}", of[1]]
            check(lambda write=write, of=of: write(optimizer, *of)[1], words, words)
    for *of, words in MISFITS:
        check(lambda of=of: written(optimizer, *of)[1], words, [f"group {of[0]}", of[1]])
    for damage, words in BY_HAND.values():
        check(lambda damage=damage: damage(params, optimizer), words, words)
    saved = copy.deepcopy(optimizer.state_dict())
    before = everything(params, optimizer)
    for change, words in SAVED.values():
        damaged = copy.deepcopy(saved)
        change(damaged)
        refused(lambda damaged=damaged: optimizer.load_state_dict(damaged), words)
        assert_unchanged(params, optimizer, before)
    optimizer.load_state_dict(saved)
    optimizer.step()
    assert all(param.isfinite().all() for param in params.values())


def _mixed(make=Muon8bit, **options):
    """Shapes that no batch shares, so that every split among ranks computes the same bits."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(8, 16), (6, 24), (10, 12), (9, 5), (7,), (3,)]
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    groups = [
        {"params": params[:3], "weight_decay": 0.2, "codebook": "dynamic"},
        {"params": params[3:], "algorithm": "adamw", "lr": 0.01, "eps": 1e-6},
    ]
    return params, make(groups, lr=0.05, **options)


def _train(params, optimizer, seeds):
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()


@on_ranks("ZeroRedundancyOptimizer takes groups of both algorithms, and its state dict loads into Muon8bit", ranks=2)
def _(world):
    sharing = {"optimizer_class": Muon8bit, "process_group": world.lines[2].get_group()}
    params, optimizer = _mixed(ZeroRedundancyOptimizer, **sharing)
    plain_params, plain = _mixed()
    _train(params, optimizer, [1, 2])
    _train(plain_params, plain, [1, 2])
    optimizer.consolidate_state_dict(to=0)
    saved = [optimizer.state_dict() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(saved, src=0, group=sharing["process_group"])
    loaded_params, loaded = _mixed()
    loaded.load_state_dict(copy.deepcopy(saved[0]))
    for ours, theirs in zip(loaded_params, plain_params, strict=True):
        for key, value in plain.state[theirs].items():
            assert torch.equal(loaded.state[ours][key], value), key
    others, resumed = _mixed(ZeroRedundancyOptimizer, **sharing)
    with torch.no_grad():
        for ours, theirs in zip(others, params, strict=True):
            ours.copy_(theirs)
    resumed.load_state_dict(saved[0])
    _train(others, resumed, [3])
    _train(plain_params, plain, [3])
    for ours, theirs in zip(others, plain_params, strict=True):
        assert torch.equal(ours, theirs)


@on_ranks("what ZeroRedundancyOptimizer puts into groups that cannot have it is refused by its name", ranks=2)
def _(world):
    sharing = {"optimizer_class": Muon8bit, "process_group": world.lines[2].get_group()}
    words = ["has no meaning", "ZeroRedundancyOptimizer", "shard_state=True"]
    for key, value in (("momentum", 0.9), ("param_rounding", "stochastic"), ("on_nonfinite", "skip")):
        options = {**sharing, key: value}
        raises(ValueError, [key, *words], lambda options=options: _mixed(ZeroRedundancyOptimizer, **options))


@on_ranks("a sharded meta model gives distributed checkpointing the state of a real one", ranks=2)
def _(world):
    found = []
    for device in ("meta", "cpu"):
        with torch.device(device):
            model = Net()
        fully_shard(model, mesh=world.lines[2])
        state = get_optimizer_state_dict(model, optimizer_of(model))["state"]
        kinds = {(n, k): (type(v), v.shape, v.dtype) for n, of in state.items() for k, v in of.items()}
        found.append((kinds, {v.device.type for of in state.values() for k, v in of.items() if k != "step"}))
    assert found[0][0] == found[1][0]
    assert [devices for _, devices in found] == [{"meta"}, {"cpu"}]


def _wrapped(world, kind):
    """A model whose parameters have a wrapper's state before the optimizer's own."""
    model, options = Net(), {}
    if kind == "fsdp":
        fully_shard(model, mesh=world.lines[2])
    else:
        options = {"process_group": world.lines[2].get_group(), "shard_state": True}
    optimizer = optimizer_of(model, **options)
    for param in model.parameters():
        optimizer.state[param] |= {"slow": param.detach().clone(), "told": "by a wrapper"}
    return model, optimizer


@on_ranks("what a wrapper keeps in sharded state survives", ranks=2)
def _(world):
    for kind in ("fsdp", "sharded state"):
        model, optimizer = _wrapped(world, kind)
        train(model, optimizer, [1])
        optimizer.consolidate_state_dict()
        saved = copy.deepcopy(optimizer.state_dict())
        other, loaded = _wrapped(world, kind)
        for param in other.parameters():
            loaded.state[param]["slow"].zero_()
        loaded.load_state_dict(saved)
        for theirs, ours in zip(model.parameters(), other.parameters(), strict=True):
            slow, expected = loaded.state[ours]["slow"], optimizer.state[theirs]["slow"]
            assert type(slow) is type(expected)
            assert torch.equal(getattr(slow, "_local_tensor", slow), getattr(expected, "_local_tensor", expected))
            assert loaded.state[ours]["told"] == "by a wrapper"
            assert loaded.state[ours].keys() == optimizer.state[theirs].keys()
        train(other, loaded, [2])

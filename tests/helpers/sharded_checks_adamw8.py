"""More checks of `sharded_checks`: AdamW's moments in 8 bits, sharded like their parameters; nothing without
bitsandbytes."""

from __future__ import annotations

import copy
from functools import partial
from importlib.util import find_spec

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

from helpers.sharded_checks import arm, check
from helpers.sharded_checks_doors import everything, train
from helpers.sharded_checks_reshard import LOADERS, told
from helpers.sharded_runs import Run, assert_same, on_mesh, raises
from muon8bit import Muon8bit
from muon8bit.distributed.param_sharding import local_tensor
from muon8bit.step import nonfinite

# Uneven parts, blocks in rows; flat blocks, of which even parts have whole numbers; and what stays fp32.
ROWS = {"rows": (10, 512), "stack": (5, 4, 256), "small": (10, 16), "bias": (21,)}
FLAT = {"flat": (64, 192), "vector": (8192,)}
MATRICES = {"matrix": (10, 24)}
EIGHT_BITS = {"adamw": {"adamw_bits": 8}}
FORMATS = {
    "fp32": (torch.float32, {"cautious_weight_decay": True}),
    "bf16": (torch.bfloat16, {"param_rounding": "stochastic", "rounding_seed": 7, "maximize": True}),
}


def runs(world, mode, ranks, format, vectors, **more):
    """One process, and the ranks of a mode."""
    dtype, options = FORMATS[format]
    placed, of_mode = arm(world, mode, ranks)
    common = {"vectors": vectors, **EIGHT_BITS, **options}
    return Run(MATRICES, dtype, torch.clone, **common), Run(MATRICES, dtype, placed, **common, **of_mode, **more)


def is_one_process(world, mode, ranks, format, vectors):
    single, shared = runs(world, mode, ranks, format, vectors)
    for run in (single, shared):
        run.train(range(1, 5))
    assert_same(shared.state_whole(), single.state_whole())
    assert_same(shared.params_whole(), single.params_whole())
    state = shared.optimizer.state[shared.params[next(iter(vectors))]]
    is_sharded = mode in ("fsdp", "hsdp")
    assert isinstance(state["exp_avg_sq_scales"], DTensor) == is_sharded
    if is_sharded:
        assert tuple(state["exp_avg_sq_scales"].placements) == tuple(state["exp_avg_sq_dynamic8"].placements)


def columns_are_one_process(world):
    placed = on_mesh(world.lines[2], lambda t: [Shard(1)] if t.shape == ROWS["rows"] else [Replicate()])
    common = {"vectors": {"rows": ROWS["rows"]}, **EIGHT_BITS}
    single = Run(MATRICES, torch.float32, torch.clone, **common).train(range(3))
    shared = Run(MATRICES, torch.float32, placed, **common).train(range(3))
    assert_same({**shared.state_whole(), **shared.params_whole()}, {**single.state_whole(), **single.params_whole()})


CUT = {  # shape, placement: a block on two ranks, or scales that torch would cut elsewhere
    "flat": ((50, 192), Shard(0)),
    "vector": ((8192,), Shard(0)),
    "columns": ((10, 512), Shard(1)),
    "columns of flat blocks": ((64, 192), Shard(1)),
    "uneven": ((13, 384), Shard(0)),
}


def is_refused(world, name):
    shape, placement = CUT[name]
    ranks = 4 if name == "uneven" else 3
    if dist.get_rank() >= ranks:
        return
    placed = on_mesh(world.lines[ranks], lambda _: [placement])
    run = Run(MATRICES, torch.float32, placed, vectors={name: shape}, **EIGHT_BITS)
    words = [name, str(shape), "256", "adamw_bits=32"]
    raises(NotImplementedError, words, partial(run.train, [1]))
    assert not run.optimizer.state
    Run(MATRICES, torch.float32, placed, vectors={name: shape}).train([1])  # as the error says


def bad_step(world, mode):
    """A step that is not waited for, with a NaN on one rank: no trace of it on any, nor in what is gathered then."""
    original, nonfinite.GradientCheck.is_asynchronous = nonfinite.GradientCheck.is_asynchronous, True
    try:
        single, shared = runs(world, mode, 3, "bf16", ROWS, on_nonfinite="skip")
        single.train([1])
        shared.train([1])
        shared.set_grads(2)
        if dist.get_rank() == 1:
            local_tensor(shared.params["rows"].grad).fill_(torch.nan)
        shared.optimizer.step()
        shared.optimizer.consolidate_state_dict()
        if mode == "sharded state":
            for index, tensors in shared.optimizer.state_dict()["state"].items():
                assert_same(tensors, single.optimizer.state_dict()["state"][index])
        shared.train([2])
    finally:
        nonfinite.GradientCheck.is_asynchronous = original
    assert shared.optimizer.num_skipped_steps == 1
    single.train([2])
    assert_same(shared.state_whole(), single.state_whole())
    assert_same(shared.params_whole(), single.params_whole())


def loads_one_process(world, mode, ranks):
    single, shared = runs(world, mode, ranks, "bf16", ROWS)
    single.train([1, 2])
    shared.continue_from(single, [3])
    if mode == "sharded state":
        shared.optimizer.consolidate_state_dict()
        for index, tensors in copy.deepcopy(shared.optimizer.state_dict())["state"].items():
            assert_same(tensors, single.optimizer.state_dict()["state"][index])


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.up = torch.nn.Embedding(10, 512), torch.nn.Linear(24, 10)


def net(dtype, mesh=None):
    model = Net().to(dtype)
    if mesh is not None:
        fully_shard(model, mesh=mesh)
    named = list(model.named_parameters())
    groups = [
        {"params": [(n, p) for n, p in named if n == "up.weight"]},
        {"params": [(n, p) for n, p in named if n != "up.weight"], "algorithm": "adamw", "lr": 0.01, "adamw_bits": 8},
    ]
    return model, Muon8bit(groups, lr=0.02, block_size=64, ns_dtype=torch.float32)


def resharded(world, loader):
    """1 -> 2 -> 4 -> 3 -> 1 ranks, two steps on each, equal ten steps of one process."""
    folder = None
    for place, ranks in enumerate((1, 2, 4, 3, 1)):
        saved, folder = folder, world.new_folder()
        if dist.get_rank() < ranks:
            group = world.lines[ranks].get_group()
            model, optimizer = net(torch.bfloat16, world.lines[ranks])
            if saved is not None:
                LOADERS[loader](model, optimizer, saved, process_group=group)
            train(model, optimizer, range(2 * place, 2 * place + 2))
            dcp.save(told(model, optimizer), checkpoint_id=folder, process_group=group)
        dist.barrier()
    if dist.get_rank() == 0:
        single = net(torch.bfloat16)
        train(*single, range(10))
        assert "table.weight" in dict(single[0].named_parameters())
        assert_same(everything(model, optimizer), everything(*single))


if find_spec("bitsandbytes") is not None:
    for _mode, _ranks, _format, _vectors in (
        ("fsdp", 2, "fp32", ROWS | FLAT),
        ("fsdp", 3, "bf16", ROWS),
        ("fsdp", 4, "bf16", ROWS | FLAT),
        ("hsdp", 4, "fp32", ROWS | FLAT),
        ("sharded state", 3, "bf16", ROWS | FLAT),
    ):
        check(f"AdamW in 8 bits: {_mode} on {_ranks}, {_format}, equals one process", ranks=_ranks)(
            partial(is_one_process, mode=_mode, ranks=_ranks, format=_format, vectors=_vectors)
        )
    check("AdamW in 8 bits: columns on 2 equal one process", ranks=2)(columns_are_one_process)
    for _name in CUT:
        check(f"AdamW in 8 bits: cut blocks are refused by name, {_name}")(partial(is_refused, name=_name))
    for _mode in ("fsdp", "sharded state"):
        check(f"AdamW in 8 bits: {_mode} on 3: a bad step that is not waited for", ranks=3)(
            partial(bad_step, mode=_mode)
        )
    for _mode, _ranks in {"fsdp": 3, "sharded state": 3}.items():
        check(f"AdamW in 8 bits: {_mode} on {_ranks} loads the state of one process", ranks=_ranks)(
            partial(loads_one_process, mode=_mode, ranks=_ranks)
        )
    for _loader in ("dcp.load", "load_checkpoint"):
        check(f"AdamW in 8 bits: through 1, 2, 4, 3 and 1 ranks by {_loader}")(partial(resharded, loader=_loader))

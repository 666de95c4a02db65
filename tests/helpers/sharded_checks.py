"""What `tests/distributed` checks on several ranks: functions, each called on all ranks of one group of 4 processes.

A check of fewer ranks leaves the others idle. `CHECKS` has them by name.
"""

from __future__ import annotations

import traceback
from functools import cache, partial
from importlib import import_module

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.testing import assert_close

from helpers.sharded_runs import MATRICES, VECTORS, Run, assert_same, on_mesh

NUM_RANKS = 4
CHECKS = {}


class World:
    """Meshes of the first 1 to 4 ranks, and of all of them as 2 x 2."""

    def __init__(self, folder):
        self._folder, self._num_folders = folder, 0
        assert dist.get_world_size() == NUM_RANKS
        self.lines = {n: DeviceMesh("cpu", list(range(n))) for n in range(1, NUM_RANKS)}
        self.lines[NUM_RANKS] = init_device_mesh("cpu", (NUM_RANKS,))
        self.square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        self.cube = init_device_mesh("cpu", (2, 2, 1), mesh_dim_names=("replicate", "shard", "one"))

    def new_folder(self):
        """The same on all ranks, if all call it alike."""
        self._num_folders += 1
        return f"{self._folder}/{self._num_folders}"


def check(name, *, ranks=NUM_RANKS):
    """Register a function of a `World`, to be called on the first `ranks`."""

    def register(function):
        CHECKS[name] = function, ranks
        return function

    return register


def run_all(folder):
    """All checks; this rank's errors, by name, into a file of the folder."""
    for module in (
        "helpers.sharded_checks_more",
        "helpers.sharded_checks_doors",
        "helpers.sharded_checks_errors",
        "helpers.sharded_checks_experts",
        "helpers.sharded_checks_reshard",
        "helpers.sharded_checks_adamw8",
        "helpers.sharded_checks_values",
    ):  # they register their checks
        import_module(module)
    world, errors = World(folder), {}
    for name, (function, ranks) in CHECKS.items():
        try:
            if dist.get_rank() < ranks:
                function(world)
        except Exception:
            errors[name] = traceback.format_exc()
        dist.barrier()
    torch.save(errors, f"{folder}/errors{dist.get_rank()}.pt")


def last_dim(tensor):
    """Columns of matrices; vectors stay whole."""
    return [Replicate() if tuple(tensor.shape) in VECTORS.values() else Shard(tensor.ndim - 1)]


def arm(world, mode, ranks):
    """How the parameters of a run lie: placement, and arguments of the optimizer."""
    if mode == "fsdp":
        return on_mesh(world.lines[ranks], [Shard(0)]), {}
    if mode == "hsdp":
        return on_mesh(world.square, [Replicate(), Shard(0)]), {}
    if mode == "columns":
        return on_mesh(world.lines[ranks], last_dim), {}
    if mode == "rows and columns":
        return on_mesh(world.square, lambda tensor: [Shard(0), *last_dim(tensor)]), {}
    group = world.lines[ranks].get_group()
    return torch.clone, {"process_group": group, "shard_state": mode == "sharded state"}


FORMATS = {
    "fp32 linear": (torch.float32, {}),
    "fp32 dynamic": (torch.float32, {"codebook": "dynamic", "cautious_weight_decay": True, "decay_lr_power": 2}),
    "bf16 linear": (
        torch.bfloat16,
        {"param_rounding": "stochastic", "rounding_seed": 7, "cautious_weight_decay": True},
    ),
    "bf16 dynamic": (torch.bfloat16, {"codebook": "dynamic"}),
    "bits=32": (torch.float32, {"bits": 32}),
    "normuon": (torch.float32, {"second_moment": "row", "rescale": "rms"}),
    "normuon by shape": (
        torch.bfloat16,
        {"second_moment": "shape", "rescale": "keep", "second_moment_eps_form": "clamp", "nesterov": False},
    ),
    "adamuon": (
        torch.bfloat16,
        {"second_moment": "element", "rescale": "rms", "sign_momentum": True, "codebook": "dynamic"},
    ),
    "adamuon, bits=32": (
        torch.float32,
        {"second_moment": "element", "rescale": "rms", "sign_momentum": True, "bits": 32},
    ),
}


@cache
def one_process(format):
    """What the modes are compared with, trained once; nobody trains it further."""
    dtype, options = FORMATS[format]
    return Run(MATRICES, dtype, torch.clone, **options).train(range(1, 5))


def equals_one_process(world, mode, ranks, format):
    dtype, options = FORMATS[format]
    single = one_process(format)
    placed, more = arm(world, mode, ranks)
    shared = Run(MATRICES, dtype, placed, **options, **more).train(range(1, 5))
    params, expected = shared.params_whole(), single.params_whole()
    state, expected_state = shared.state_whole(), single.state_whole()
    if "columns" in mode:
        for name_key in [name_key for name_key in state if name_key[1].startswith("second_moment")]:
            ours, wanted = state.pop(name_key), expected_state.pop(name_key)
            atol = 1 if ours.dtype == torch.uint8 else 0  # of codes
            assert_close(ours.float(), wanted.float(), rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=atol)
    assert_same(state, expected_state)
    if "columns" in mode:  # a norm is added up otherwise where a block is cut: see `is_as_accurate`
        for name in MATRICES:
            assert_close(
                params.pop(name), expected.pop(name), rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-6
            )
    assert_same(params, expected)
    assert shared.optimizer._rank_group.transport.num_ranks == ranks


CASES = {
    "fsdp": (1, 2, 3, 4),
    "hsdp": (4,),
    "ddp": (2, 3),
    "sharded state": (1, 2, 3),
    "columns": (2, 3),
    "rows and columns": (4,),
}
for _mode, _sizes in CASES.items():
    for _ranks in _sizes:
        for _format in FORMATS if _ranks == 3 or _ranks == 4 else list(FORMATS)[1:3]:
            _check = partial(equals_one_process, mode=_mode, ranks=_ranks, format=_format)
            check(f"{_mode} on {_ranks}, {_format}, equals one process", ranks=_ranks)(_check)

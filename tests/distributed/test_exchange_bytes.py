"""Bytes that a step allocates on one of several ranks, against those that are counted from its plan.

The group is one whose messages do nothing: on gloo a thread lets go of what was sent when it pleases.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from helpers.allocator import peak_bytes
from helpers.memory_models import TINY, config_of
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM

from muon8bit import AdaMuon8bit, Muon8bit, NorMuon8bit, param_groups
from muon8bit.distributed.collectives import PendingExchange, PendingGather, Transport
from muon8bit.estimate import Estimator, Setup
from muon8bit.estimate.exchange import _is_exchanged, planned_exchange
from muon8bit.estimate.exchange_bytes import exchange_bytes
from muon8bit.estimate.optimizers import Param, second_moment
from muon8bit.estimate.sizes import measure
from muon8bit.orthogonalize import device_kind

CPU = torch.device("cpu")
SHAPES = [(256, 1024)] * 16 + [(1024, 256)] * 8 + [(512, 512)] * 8
TOLERANCE = 0.06  # 22 cases: counted 0.925 to 1.000 of what was measured with the sums, 18 within 3.0%


@pytest.fixture
def group(monkeypatch):
    """Start groups whose gathers give every rank's numbers as this rank's."""

    def gather_into(self, gathered, values, **_):
        gathered.view(self.num_ranks, -1).copy_(values)

    monkeypatch.setattr(Transport, "gather_into", gather_into)
    for kind in (PendingExchange, PendingGather):
        monkeypatch.setattr(kind, "_begin", lambda pending: pending._transport.group.barrier())
    yield lambda size: dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    dist.destroy_process_group()


def maker(mode, num_ranks):
    """Return a function that makes a bf16 tensor of ones of a shape, as rank 0 has it."""
    if mode not in ("fsdp", "hsdp"):
        return lambda shape: torch.ones(shape, dtype=torch.bfloat16)
    mesh = init_device_mesh("cpu", (num_ranks,) if mode == "fsdp" else (2, num_ranks // 2))
    placements = [*[Replicate()] * (mesh.ndim - 1), Shard(0)]

    def make(shape):
        values = torch.ones(shape[0] // mesh.shape[-1], shape[1], dtype=torch.bfloat16)
        whole = {"shape": torch.Size(shape), "stride": (shape[1], 1)}
        return DTensor.from_local(values, mesh, placements, run_check=False, **whole)

    return make


NORMUON, ADAMUON = {"second_moment": "row"}, {"second_moment": "element", "rescale": "rms", "sign_momentum": True}
LAYOUTS = [("fsdp", 2), ("fsdp", 8), ("hsdp", 4), ("ddp", 2), ("ddp", 8), ("sharded state", 4)]
CASES = [(*layout, {}) for layout in LAYOUTS]
CASES += [(mode, 2, family) for mode in ("fsdp", "ddp") for family in (NORMUON, ADAMUON)]
CASES += [("hsdp", 4, {**ADAMUON, "bits": 32}), ("fsdp", 2, {"bits": 32})]


@pytest.mark.parametrize("workspace_bytes", [2**25, 2**29], ids=["rounds", "one round"])
@pytest.mark.parametrize(("mode", "num_ranks", "family"), CASES)
def test_a_step_allocates_what_is_counted_from_its_plan(group, mode, num_ranks, family, workspace_bytes):
    group(num_ranks)
    make, options = maker(mode, num_ranks), {"workspace_bytes": workspace_bytes, "ns_dtype": torch.float32, **family}
    if mode in ("ddp", "sharded state"):
        options |= {"process_group": dist.group.WORLD, "shard_state": mode == "sharded state"}
    params = [(f"{index}", torch.nn.Parameter(make(shape))) for index, shape in enumerate(SHAPES)]
    optimizer = Muon8bit([{"params": params}], lr=0.02, **options)
    for is_measured in (False, True):
        for _, param in params:
            param.grad = make(tuple(param.shape))
        if not is_measured:
            optimizer.step()  # which makes the state
    peak, _ = peak_bytes(optimizer.step)
    (assignment,) = optimizer._rank_group._assignments.values()
    assert len(assignment.rounds) > 1 or workspace_bytes == 2**29
    counted = exchange_bytes(assignment, 0, workspace_bytes, device_kind(CPU), bits=family.get("bits", 8))
    # Sums of squares by row, of which norms are made, come on top.
    sums = 4 * (num_ranks + 1) * sum(rows for rows, _ in SHAPES)
    assert -TOLERANCE * peak <= peak - counted <= TOLERANCE * peak + sums, (peak, counted, counted / peak)


@pytest.mark.parametrize(
    "family",
    [{}, NORMUON, {"second_moment": "shape", "ns_coefficients": "polar_express"}, ADAMUON, {**ADAMUON, "bits": 32}],
    ids=lambda f: "-".join(map(str, f.values())),
)
@pytest.mark.parametrize("shard", ["ddp", "fsdp2"])
def test_the_estimate_has_the_plan_of_the_optimizer(group, shard, family):
    """Matrices with second moments and signs: who orthogonalizes what, and what is sent."""
    group(2)
    make = maker("fsdp" if shard == "fsdp2" else shard, 2)
    shapes = [(256, 1024), (1024, 256), (512, 6)] * 4
    params = [(f"{index}", torch.nn.Parameter(make(shape))) for index, shape in enumerate(shapes)]
    options = {"process_group": dist.group.WORLD} if shard == "ddp" else {}
    optimizer = Muon8bit([{"params": params}], **options, **family)
    for _, param in params:
        param.grad = make(tuple(param.shape))
    optimizer.step()
    (found,) = optimizer._rank_group._assignments.values()
    asked = tuple(
        Param(name, tuple(param.shape), param.dtype, is_muon=True, bits=family.get("bits", 8)) for name, param in params
    )
    kind, is_sign = family.get("second_moment"), family.get("sign_momentum", False)
    of_family = {"moment": kind, "is_sign": is_sign, "coefficients": family.get("ns_coefficients", "jordan")}
    num_shards, device = 2 if shard == "fsdp2" else 1, device_kind(CPU)
    assert found == planned_exchange(asked, 2, num_shards, device, **of_family)


@pytest.mark.parametrize(
    ("shard", "kind", "of"),
    [
        ("ddp", "llama", Muon8bit),
        ("fsdp2", "llama", Muon8bit),
        ("fsdp2", "mixtral", Muon8bit),
        ("fsdp2", "llama", NorMuon8bit),
        ("fsdp2", "llama", AdaMuon8bit),
    ],
)
def test_the_estimate_counts_by_the_plan_of_the_optimizer(group, shard, kind, of):
    """The bytes of a small model's step on two ranks, against the optimizer's own plan and the allocator."""
    group(2)
    config = config_of({**TINY[kind], "hidden_size": 256, "intermediate_size": 512})
    estimator, setup = Estimator(config), Setup(1, 16, "fp32", num_gpus=2, shard=shard, device="cpu")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(estimator.config, dtype=torch.float32)
    if shard == "fsdp2":
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    options = {"process_group": dist.group.WORLD} if shard == "ddp" else {}
    groups, name = param_groups(model, lr=1e-3), of.__name__.lower()
    for each in groups if of is not Muon8bit else ():
        each.pop("adjust_lr_fn", None)  # the preset's
    optimizer = of(groups, **options)
    for is_measured in (False, True):
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        if not is_measured:
            optimizer.step()
    (found,) = optimizer._rank_group._assignments.values()
    device = device_kind(CPU)
    sizes = measure(estimator._sizes(setup)[0], setup)
    shared = tuple(param for param in sizes.whole if _is_exchanged(param, 2, setup.num_shards))
    of_family = {"moment": second_moment(name, shared[0]), "is_sign": of is AdaMuon8bit}
    assert planned_exchange(shared, 2, setup.num_shards, device, **of_family) == found
    counted = estimator.estimate(setup, name).optimizers[name].workspace_bytes
    most = max(exchange_bytes(found, rank, optimizer.workspace_bytes, device) for rank in range(2))
    gathered = optimizer._rank_group._gathering
    sums = gathered._gathered.nbytes + gathered._sent.nbytes
    if kind == "llama":  # else experts that lie on one rank are stepped in between
        peak, _ = peak_bytes(optimizer.step)
        assert most <= counted <= most + sums
        assert abs(counted - peak) <= TOLERANCE * peak, counted / peak

"""Parameters that a wrapper has cut or moved, refused by name and with the way out; without any process group."""

from types import SimpleNamespace

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard

from muon8bit import Muon8bit
from muon8bit.distributed import check_placements


def optimizer_of(param):
    return Muon8bit([("weight", param)])


@pytest.mark.parametrize("attribute", ["ds_id", "ds_tensor"])
def test_zero_partitions_of_deepspeed_are_refused(attribute):
    param = torch.nn.Parameter(torch.zeros(0))
    setattr(param, attribute, 1)
    with pytest.raises(NotImplementedError, match=r"weight is partitioned by DeepSpeed ZeRO.*fully_shard"):
        optimizer_of(param)


def test_flattened_parameters_of_fsdp1_are_refused():
    param = torch.nn.Parameter(torch.zeros(64))
    param._is_flat_param = True
    with pytest.raises(NotImplementedError, match=r"weight is flattened by FSDP1.*FSDP2"):
        optimizer_of(param)


def test_sharded_state_needs_a_group():
    with pytest.raises(ValueError, match=r"shard_state=True .*process_group="):
        Muon8bit([torch.nn.Parameter(torch.zeros(2, 2))], shard_state=True)


def strided(factor, dim=0):
    return SimpleNamespace(split_factor=factor, dim=dim, is_partial=lambda: False)


def on_mesh(placements, shape, *, mesh_type="cpu", device="cpu"):
    """What `check_placements` looks at of a DTensor."""
    mesh = SimpleNamespace(device_type=mesh_type, shape=shape)
    local = SimpleNamespace(device=torch.device(device))
    return SimpleNamespace(device_mesh=mesh, placements=placements, to_local=lambda: local)


def test_parameters_offloaded_to_the_host_are_refused():
    with pytest.raises(NotImplementedError, match=r"weight is on the cpu, its mesh on cuda.*CPUOffloadPolicy"):
        check_placements(on_mesh([Shard(0)], (2,), mesh_type="cuda"), "weight")


@pytest.mark.parametrize(
    ("placements", "shape", "is_fine"),
    [
        ([strided(2), Shard(0)], (3, 2), True),  # fully_shard over tensor parallelism of 2
        ([Replicate(), strided(2), Shard(0)], (2, 3, 2), True),
        ([strided(2), Shard(1)], (3, 2), False),
        ([strided(3), Shard(0)], (3, 2), False),
        ([Shard(0), strided(2)], (2, 3), False),
        ([strided(4), strided(2), Shard(0)], (2, 2, 2), False),
    ],
)
def test_strided_shards_are_taken_where_they_are_one_piece(placements, shape, is_fine):
    param = on_mesh(placements, shape)
    if is_fine:
        check_placements(param, "weight")
        return
    with pytest.raises(NotImplementedError, match=r"weight has the placements .*strided shard"):
        check_placements(param, "weight")

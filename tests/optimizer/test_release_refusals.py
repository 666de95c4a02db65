"""What gradient release cannot do is refused with the reason and the way out."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from muon8bit import Muon8bit, param_groups, release_gradients


def make(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 4))
    groups = param_groups(model, lr=0.02)
    return model, Muon8bit(groups, **{"on_nonfinite": "skip", **options})


def backward(model, seed=0):
    model(torch.randn(6, 12, generator=torch.Generator().manual_seed(seed))).square().sum().backward()


@pytest.fixture
def group_of_one(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_accumulation_is_refused_and_the_second_gradient_dropped():
    model, optimizer = make()
    twin, its = make()
    release_gradients(model, optimizer)
    backward(model)
    with pytest.raises(RuntimeError, match=r"2.bias has got a second gradient .*Call step\(\) after every backward"):
        backward(model, 1)
    optimizer.step()
    backward(twin)
    its.step()
    for param, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(param, other)


def test_zero_grad_in_place_of_step_is_accumulation():
    model, optimizer = make()
    release_gradients(model, optimizer)
    backward(model)
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="second gradient"):
        backward(model)


def test_reentrant_checkpointing_of_a_shared_parameter_is_refused():
    """Each checkpoint has a backward of its own, which completes a gradient of its part."""
    model, optimizer = make()
    release_gradients(model, optimizer)
    x = torch.randn(6, 12, requires_grad=True)
    parts = [torch.utils.checkpoint.checkpoint(model[0], x, use_reentrant=True) for _ in range(2)]
    with pytest.raises(RuntimeError, match=r"0\.\w+ has got a second gradient"):
        (parts[0] * parts[1]).sum().backward()


def test_a_grad_scaler_is_refused_before_it_counts_a_step():
    model, optimizer = make()
    release_gradients(model, optimizer)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(torch.randn(2, 12)).sum()).backward()
    with pytest.raises(RuntimeError, match="a GradScaler scales the loss"):
        scaler.step(optimizer)


@pytest.mark.parametrize("mode", ["raise", "raise_at_once"])
def test_a_promise_that_a_bad_step_changes_nothing_is_refused(mode):
    with pytest.raises(ValueError, match=f"on_nonfinite='{mode}' promises .*on_nonfinite='skip'"):
        release_gradients(*make(on_nonfinite=mode))


def test_another_optimizer_is_refused():
    model, optimizer = make()
    wrapped = type("AcceleratedOptimizer", (), {"optimizer": optimizer})()
    with pytest.raises(TypeError, match=r"not a AcceleratedOptimizer: .*`\.optimizer`"):
        release_gradients(model, wrapped)


def test_another_model_is_refused_by_the_parameter_s_name():
    with pytest.raises(ValueError, match=r"0.weight of the optimizer is not in the model"):
        release_gradients(make()[0], make()[1])


def test_a_second_release_is_refused():
    model, optimizer = make()
    release_gradients(model, optimizer)
    with pytest.raises(ValueError, match="releases its gradients already"):
        release_gradients(model, optimizer)


def test_state_of_an_open_step_is_refused():
    model, optimizer = make()
    release_gradients(model, optimizer)
    backward(model)
    with pytest.raises(RuntimeError, match=r"call optimizer.step\(\) first"):
        optimizer.state_dict()
    optimizer.step()
    assert optimizer.state_dict()["state"]


def test_a_parameter_thawed_later_is_refused_by_name():
    model, optimizer = make()
    model[0].weight.requires_grad_(False)
    release_gradients(model, optimizer)
    model[0].weight.requires_grad_(True)
    backward(model)
    with pytest.raises(RuntimeError, match=r"0.weight has a gradient that was not released: it was frozen"):
        optimizer.step()


def test_ddp_and_process_groups_are_refused(group_of_one):
    model, optimizer = make()
    with pytest.raises(NotImplementedError, match=r"DistributedDataParallel: .*gradient of its own rank"):
        release_gradients(DistributedDataParallel(model), optimizer)
    with pytest.raises(NotImplementedError, match=r"process_group: .*gradient of its own rank"):
        release_gradients(*make(process_group=group_of_one))


@pytest.mark.usefixtures("group_of_one")
def test_sharded_parameters_are_refused_by_name():
    model, _ = make()
    mesh = init_device_mesh("cpu", (1,))
    model[2].weight = nn.Parameter(distribute_tensor(model[2].weight.detach(), mesh, [Shard(0)]))
    optimizer = Muon8bit([("2.weight", model[2].weight)], on_nonfinite="skip")
    with pytest.raises(NotImplementedError, match=r"2.weight is sharded"):
        release_gradients(model, optimizer)


def test_one_of_several_ranks_is_refused_also_where_they_meet_later():
    model, optimizer = make()
    release_gradients(model, optimizer)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        with pytest.raises(NotImplementedError, match=r"one of 2 ranks: .*gradient of its own rank"):
            backward(model)
        with pytest.raises(NotImplementedError, match=r"one of 2 ranks"):
            release_gradients(*make())
    finally:
        dist.destroy_process_group()

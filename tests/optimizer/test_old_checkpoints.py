"""What the first release saved, loads and trains on: every option of the state's format."""

import copy
from functools import cache

import pytest
import torch
from helpers.bitwise import assert_bitwise
from helpers.old_checkpoints import CASES, DCP_FOLDER, FILE, FOLDER, Net, build, optimizer_of, train

from muon8bit.integrations.distributed_checkpoint import load_checkpoint


@cache
def saved_by_the_first_release():
    return torch.load(FOLDER / FILE, weights_only=True)


def test_every_case_was_saved():
    assert saved_by_the_first_release().keys() == CASES.keys()


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_of_the_first_release_loads_bitwise_and_takes_a_step(name):
    saved = copy.deepcopy(saved_by_the_first_release()[name])
    params, optimizer = build(name)
    optimizer.load_state_dict(saved)
    loaded = optimizer.state_dict()
    assert loaded["state"].keys() == saved["state"].keys()
    for key, tensors in saved["state"].items():
        assert loaded["state"][key].keys() == tensors.keys()
        for kind, tensor in tensors.items():
            assert_bitwise(loaded["state"][key][kind], tensor)
    for new, old in zip(loaded["param_groups"], saved["param_groups"], strict=True):
        assert {key: new[key] for key in old} == old
        assert new["cautious_weight_decay"] is False
        is_muon = new["algorithm"] == "muon"
        assert (new["decay_lr_power"], new["zero_slices"]) == ((1, "step") if is_muon else (None, None))
    before = {n: param.detach().clone() for n, param in params.items()}
    train(name, params, optimizer, [3])
    for n, param in params.items():
        assert param.isfinite().all(), n
        has_changed = not torch.equal(param, before[n])
        assert has_changed != (name == "a parameter without gradients" and n == "stack"), n
    counts = [tensors["step"].item() for tensors in optimizer.state_dict()["state"].values() if "step" in tensors]
    assert counts == [1 if name == "no step" else 3] * 2


def test_a_folder_of_the_first_release_loads_and_takes_a_step():
    model = Net()
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()
    optimizer = optimizer_of(model)
    load_checkpoint(model, optimizer, FOLDER / DCP_FOLDER)
    dtypes = {n: {k: v.dtype for k, v in optimizer.state[p].items()} for n, p in model.named_parameters()}
    of_matrix = {"momentum_linear8": torch.int8, "momentum_scales": torch.float32}
    of_vector = dict.fromkeys(("step", "exp_avg", "exp_avg_sq"), torch.float32)
    assert dtypes == {"up.weight": of_matrix, "up.bias": of_vector, "down.weight": of_matrix, "down.bias": of_vector}
    assert all(param.abs().max() > 0 for param in model.parameters())
    assert all(tensor.any() for state in optimizer.state.values() for tensor in state.values())
    train("", dict(model.named_parameters()), optimizer, [3])
    assert all(param.isfinite().all() for param in model.parameters())

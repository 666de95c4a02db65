"""What loads though the running optimizer would not have saved it so: numbers, names, what wrappers keep."""

import copy
import warnings

import numpy as np
import pytest
import torch
from helpers.bad_values import SHAPES, everything, make
from helpers.bitwise import assert_bitwise

from muon8bit import Muon8bit, convert_state_dict


def train(params, optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    for param in params.values():
        param.grad = torch.randn(param.shape, generator=generator)
    optimizer.step()


def assert_same_tensors(params, optimizer, others, other):
    found, expected = everything(others, other)[0], everything(params, optimizer)[0]
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert_bitwise(found[key], value)


@pytest.mark.parametrize("number", [2, 2.0, np.float32(2), np.float64(2), np.int64(2), np.array(2)])
def test_a_step_may_be_a_number(number):
    _, optimizer = make()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][3]["step"] = number
    optimizer.load_state_dict(saved)
    step = list(optimizer.state.values())[3]["step"]
    assert_bitwise(step, torch.tensor(2.0))


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.array])
def test_options_may_be_numbers_of_numpy(kind):
    params, optimizer = make()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0] |= {"lr": kind(0.5), "weight_decay": kind(0.25), "bits": np.int64(8)}
    saved["param_groups"][1] |= {"betas": (kind(0.5), kind(0.75))}
    optimizer.load_state_dict(saved)
    muon, adamw = optimizer.param_groups
    found = [muon["lr"], muon["weight_decay"], muon["bits"], *adamw["betas"]]
    assert found == [0.5, 0.25, 8, 0.5, 0.75]
    assert all(type(value) in (int, float) for value in found)
    train(params, optimizer, 1)


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_a_scheduler_may_write_numbers_of_numpy(kind):
    runs = []
    for number in (float, kind):
        params, optimizer = make()
        optimizer.param_groups[0] |= {"lr": number(0.5), "weight_decay": number(0.25), "momentum": number(0.5)}
        optimizer.param_groups[1] |= {"lr": number(0.25), "weight_decay": number(0.5)}
        optimizer.param_groups[1]["betas"] = (number(0.5), number(0.75))
        train(params, optimizer, 1)
        runs.append((params, optimizer))
    assert_same_tensors(*runs[0], *runs[1])


def test_names_come_with_the_checkpoint_where_the_optimizer_has_none():
    params, optimizer = make()
    unnamed = Muon8bit(
        [
            {"params": list(params.values())[:3], "weight_decay": 0.2},
            {"params": list(params.values())[3:], "algorithm": "adamw", "lr": 0.01},
        ],
        lr=0.02,
    )
    unnamed.load_state_dict(optimizer.state_dict())
    assert [group["param_names"] for group in unnamed.param_groups] == [list(SHAPES)[:3], list(SHAPES)[3:]]
    assert unnamed.state_dict()["param_groups"][0]["param_names"] == list(SHAPES)[:3]
    torchs = torch.optim.SGD(params.values(), lr=0.1)
    torchs.load_state_dict(torch.optim.SGD(params.items(), lr=0.1).state_dict())
    assert torchs.param_groups[0]["param_names"] == list(SHAPES)  # as torch does it


@pytest.mark.parametrize("gone", [{0, 1, 2}, {3, 4}, {0}, {1, 4}])
def test_parameters_without_saved_state_are_told_also_where_a_whole_group_is(gone):
    _, optimizer = make()
    saved = copy.deepcopy(optimizer.state_dict())
    for index in gone:
        del saved["state"][index]
    names = ", ".join(name for i, name in enumerate(SHAPES) if i in gone)
    with pytest.warns(UserWarning, match=f"no saved state for {names}: "):
        make()[1].load_state_dict(saved)


def test_a_checkpoint_before_the_first_step_loads_in_silence():
    _, optimizer = make()
    saved = {**optimizer.state_dict(), "state": {}}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.load_state_dict(saved)
    assert not optimizer.state


class Lookahead:
    """Slow weights in the optimizer's own state, as the wrappers that go round keep them: k steps, then half the way
    back. `state[p]` may hold nothing else where a parameter has had no gradient yet."""

    def __init__(self, optimizer, every=2):
        self.optimizer, self.every, self.count = optimizer, every, 0
        for group in optimizer.param_groups:
            for param in group["params"]:
                optimizer.state[param]["slow_buffer"] = param.detach().clone()
                optimizer.state[param]["wrapped_by"] = "Lookahead"

    @torch.no_grad()
    def step(self):
        self.optimizer.step()
        self.count += 1
        if self.count % self.every == 0:
            for group in self.optimizer.param_groups:
                for param in group["params"]:
                    slow = self.optimizer.state[param]["slow_buffer"]
                    param.copy_(slow.lerp_(param, 0.5))


@pytest.mark.parametrize("options", [{}, {"state_device": "cpu"}, {"bits": 32}])
def test_what_a_wrapper_keeps_in_the_state_survives(options):
    def fresh():
        generator = torch.Generator().manual_seed(0)
        params = {n: torch.nn.Parameter(torch.randn(s, generator=generator)) for n, s in SHAPES.items()}
        named = list(params.items())
        groups = [{"params": named[:3]}, {"params": named[3:], "algorithm": "adamw", "lr": 0.01}]
        optimizer = Muon8bit(groups, lr=0.02, **options)
        return params, optimizer, Lookahead(optimizer)

    def run(params, wrapper, seeds):
        for seed in seeds:
            train(params, wrapper, seed)

    params, optimizer, wrapper = fresh()
    run(params, wrapper, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    others, other, resumed = fresh()
    with torch.no_grad():
        for name, param in others.items():
            param.copy_(params[name])
    other.load_state_dict(saved)
    resumed.count = wrapper.count
    assert all(other.state[param]["wrapped_by"] == "Lookahead" for param in others.values())
    slow, theirs = other.state[others["a"]]["slow_buffer"], saved["state"][0]["slow_buffer"]
    assert slow.data_ptr() != theirs.data_ptr()
    run(params, wrapper, range(3, 6))
    run(others, resumed, range(3, 6))
    assert_same_tensors(params, optimizer, others, other)
    twin = copy.deepcopy(other)
    assert [list(state) for state in twin.state.values()] == [list(state) for state in other.state.values()]


def test_a_damaged_state_is_not_converted_either():
    _, optimizer = make()
    for index, key, value, words in (
        (0, "momentum_linear8", -128, "-128"),
        (0, "momentum_scales", -1.0, "-1"),
        (3, "exp_avg_sq", -1.0, "-1"),
        (3, "step", -1.0, "step holds the negative number -1"),
    ):
        saved = copy.deepcopy(optimizer.state_dict())
        saved["state"][index][key].fill_(value)
        with pytest.raises(ValueError, match=words):
            convert_state_dict(saved, bits=32)


def test_8bit_second_moments_of_code_0_are_damage_once_a_step_was_taken():
    pytest.importorskip("bitsandbytes")
    param = torch.nn.Parameter(torch.ones(64, 64))
    optimizer = Muon8bit([{"params": [("embed", param)], "algorithm": "adamw", "lr": 0.01, "adamw_bits": 8}])
    param.grad = torch.ones(64, 64)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["exp_avg_sq_dynamic8"][0, 0] = 0
    with pytest.raises(ValueError, match="embed: exp_avg_sq_dynamic8 holds the code 0"):
        optimizer.load_state_dict(saved)
    saved["state"][0]["step"].zero_()  # as it is made
    optimizer.load_state_dict(saved)

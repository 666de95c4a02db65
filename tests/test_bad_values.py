"""Values that a group, a gradient or a state may not have: refused by name, and nothing changes anywhere."""

import copy
from contextlib import nullcontext

import pytest
import torch
from bad_values import (
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


def check_step(params, optimizer, words):
    before = everything(params, optimizer)
    refused(optimizer.step, words)
    assert_unchanged(params, optimizer, before)


@pytest.mark.parametrize(("index", "key", "value"), GROUP_VALUES)
def test_a_value_written_into_a_group_is_refused_by_group_and_key(index, key, value):
    params, optimizer = make()
    words, undo = written(optimizer, index, key, value)
    check_step(params, optimizer, words)
    undo()
    optimizer.step()


@pytest.mark.parametrize(("index", "key", "value", "words"), MISFITS)
def test_a_value_that_does_not_fit_the_state_is_refused_by_parameter(index, key, value, words):
    params, optimizer = make()
    written(optimizer, index, key, value)
    check_step(params, optimizer, words)


@pytest.mark.parametrize("scheduler", ["OneCycleLR", "CyclicLR"])
@pytest.mark.parametrize("cycles", [True, False])
def test_a_scheduler_that_cycles_the_momentum_of_adamw_is_told_that_betas_stay(scheduler, cycles):
    _, optimizer = make()
    arguments = {"total_steps": 9} if scheduler == "OneCycleLR" else {"base_lr": 1e-4}
    make_scheduler = getattr(torch.optim.lr_scheduler, scheduler)
    schedule = make_scheduler(optimizer, max_lr=[0.1, 0.01], cycle_momentum=cycles, **arguments)
    told = pytest.warns(UserWarning, match="parameter group 1: .*its betas stay.*cycle_momentum=False")
    with told if cycles else nullcontext():
        optimizer.step()
    schedule.step()
    assert optimizer.param_groups[1]["betas"] == (0.9, 0.95)
    assert (optimizer.param_groups[0]["momentum"] != 0.95) == cycles


@pytest.mark.parametrize(("index", "key"), MISSING_KEYS)
def test_a_key_taken_out_of_a_group_is_missed(index, key):
    params, optimizer = make()
    words, _ = without(optimizer, index, key)
    check_step(params, optimizer, words)


@pytest.mark.parametrize("name", BY_HAND)
def test_what_a_hand_did_to_a_parameter_is_refused_by_its_name(name):
    params, optimizer = make()
    damage, words = BY_HAND[name]
    damage(params, optimizer)
    check_step(params, optimizer, words)


@pytest.mark.parametrize("name", SAVED)
def test_a_damaged_state_is_refused_by_parameter_and_key(name):
    params, optimizer = make()
    saved = copy.deepcopy(optimizer.state_dict())
    change, words = SAVED[name]
    change(saved)
    before = everything(params, optimizer)
    refused(lambda: optimizer.load_state_dict(saved), words)
    assert_unchanged(params, optimizer, before)

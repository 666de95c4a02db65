"""Values that a group, a gradient or a state may not have: refused by name, and nothing changes anywhere."""

import copy

import pytest
from helpers.bad_values import (
    BY_HAND,
    GROUP_VALUES,
    LISTS,
    MISFITS,
    MISSING_KEYS,
    NAMES,
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


@pytest.mark.parametrize(("index", "key", "value"), LISTS)
def test_what_is_no_list_of_parameters_is_refused_by_group(index, key, value):
    params, optimizer = make()
    before = everything(params, optimizer)
    words, undo = written(optimizer, index, key, value)
    refused(optimizer.step, words)
    undo()
    assert_unchanged(params, optimizer, before)
    optimizer.step()


@pytest.mark.parametrize(("index", "key", "value"), GROUP_VALUES + NAMES)
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

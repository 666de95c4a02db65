"""Values that a group, a gradient or a state may not have: refused by name, and nothing changes anywhere."""

import copy

import pytest
import torch
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

from muon8bit import Muon8bit


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


def matrix(*name):
    return (*name, torch.nn.Parameter(torch.ones(8, 8))) if name else torch.nn.Parameter(torch.ones(8, 8))


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        (lambda: torch.nn.Linear(8, 8), TypeError, r"not a model: Muon8bit\(muon8bit\.param_groups\(model, "),
        (lambda: torch.nn.Sequential(torch.nn.Linear(8, 8)), TypeError, "takes parameters, not a model"),
        (lambda: torch.nn.Linear(8, 8).state_dict(), TypeError, r"not a OrderedDict.*model\.named_parameters\(\)"),
        (lambda: {"params": [matrix()]}, TypeError, "not a dict: give a group in a list"),
        (lambda: [matrix("a"), matrix()], ValueError, r"parameter group 0: 1 of its 2 params are \(name, tensor\)"),
        (
            lambda: [{"params": [matrix("a")]}, {"params": [matrix()]}],
            ValueError,
            r"parameter group 1 is without names, unlike .* before it: give \(name, tensor\) pairs as its params",
        ),
        (
            lambda: [{"params": [matrix()]}, {"params": [matrix("a")]}],
            ValueError,
            "parameter group 1 is with names, unlike the groups before it: give tensors as its params",
        ),
    ],
)
def test_what_is_no_list_of_named_or_nameless_parameters_is_refused_with_what_to_give(params, error, message):
    with pytest.raises(error, match=message):
        Muon8bit(params())


def test_a_number_in_a_string_is_called_so():
    with pytest.raises(ValueError, match=r"^lr must be >= 0 .*not '1e-3', a string: give the number \(YAML takes 1e-3"):
        Muon8bit([matrix()], lr="1e-3")
    with pytest.raises(ValueError, match=r"^parameter group 0: bits must be one of \(8, 32\).* not '8', a string"):
        Muon8bit([{"params": [matrix()], "bits": "8"}])

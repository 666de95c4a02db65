"""Checkpoints: bitwise on continue, loud on anything that does not fit."""

import copy
import pickle

import pytest
import torch
from helpers.state_dicts import SHAPES, edit, make, snapshot, through_file, train


def assert_bitwise(left, right):
    assert left.keys() == right.keys()
    for key in left:
        assert left[key].dtype == right[key].dtype, key
        assert torch.equal(left[key], right[key]), key


def resumed_from(params, saved, dtype=torch.float32, **options):
    """Another optimizer with these parameters' values and a loaded state dict."""
    others, optimizer = make(dtype, seed=5, **options)
    with torch.no_grad():
        for name, param in others.items():
            param.copy_(params[name])
    optimizer.load_state_dict(saved)
    return others, optimizer


@pytest.mark.parametrize("options", [{}, {"codebook": "dynamic", "block_size": 64}, {"bits": 32}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("copier", [through_file, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s)), lambda s: s])
def test_continues_bitwise(dtype, options, copier):
    params, optimizer = make(dtype, **options)
    train(params, optimizer, 3, seed=1)
    saved = copier(optimizer.state_dict())
    resumed_params, resumed = resumed_from(params, saved, dtype, **options)
    train(params, optimizer, 3, seed=2)
    train(resumed_params, resumed, 3, seed=2)
    assert_bitwise(snapshot(params, optimizer), snapshot(resumed_params, resumed))


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_of_the_optimizer_continue_bitwise(copier):
    params, optimizer = make(on_nonfinite="skip")
    train(params, optimizer, 2, seed=1)
    next(iter(params.values())).grad.fill_(torch.nan)
    optimizer.step()
    twin = copier(optimizer)
    twin_params = dict(zip(SHAPES, [p for g in twin.param_groups for p in g["params"]], strict=True))
    train(params, optimizer, 2, seed=2)
    train(twin_params, twin, 2, seed=2)
    assert_bitwise(snapshot(params, optimizer), snapshot(twin_params, twin))
    assert (twin.num_skipped_steps, twin.on_nonfinite) == (1, "skip")


def test_keys_and_dtypes_are_the_public_format():
    for options, expected in (
        ({}, {"momentum_linear8": torch.int8, "momentum_scales": torch.float32}),
        ({"codebook": "dynamic"}, {"momentum_dynamic8": torch.uint8, "momentum_scales": torch.float32}),
        ({"bits": 32}, {"momentum_buffer": torch.float32}),
    ):
        params, optimizer = make(torch.bfloat16, **options)
        assert not optimizer.state
        train(params, optimizer, 1, seed=1)
        saved = optimizer.state_dict()
        assert set(saved) == {"state", "param_groups"}
        assert {k: v.dtype for k, v in saved["state"][0].items()} == expected
        assert {k: v.dtype for k, v in saved["state"][2].items()} == {"momentum_buffer": torch.float32}
        assert saved["param_groups"][0]["param_names"] == ["a", "b", "narrow"]


def test_hyperparameters_come_from_the_checkpoint_and_the_format_from_the_constructor():
    params, optimizer = make(on_nonfinite="raise")
    train(params, optimizer, 1, seed=1)
    saved = through_file(optimizer.state_dict())
    _, other = make(on_nonfinite="skip", backend="reference")
    other.param_groups[0]["lr"] = 123.0
    other.load_state_dict(saved)
    assert other.param_groups[0]["lr"] == 0.02
    assert other.param_groups[1]["betas"] == (0.9, 0.95)
    assert (other.on_nonfinite, other.backend) == ("skip", "reference")


def test_loading_copies_and_an_empty_state_loads():
    params, optimizer = make()
    optimizer.load_state_dict(optimizer.state_dict())  # what Accelerate does at prepare
    train(params, optimizer, 1, seed=1)
    saved = optimizer.state_dict()
    _, other = make()
    other.load_state_dict(state_dict=saved)  # distributed checkpointing passes it by name
    theirs = next(iter(other.state.values()))["momentum_linear8"]
    assert theirs.data_ptr() != saved["state"][0]["momentum_linear8"].data_ptr()
    for key in ("lr", "momentum"):
        assert other.param_groups[0][key] == optimizer.param_groups[0][key]


def test_state_of_another_optimizer_is_told_apart_whatever_its_groups():
    params, optimizer = make()
    theirs = torch.optim.Muon([params["a"]])
    with pytest.raises(ValueError, match="not saved by Muon8bit"):
        optimizer.load_state_dict(theirs.state_dict())


def test_a_parameter_without_saved_state_is_named():
    params, optimizer = make()
    train(params, optimizer, 1, seed=1)
    saved = optimizer.state_dict()
    del saved["state"][1]
    _, other = make()
    with pytest.warns(UserWarning, match="no saved state for b"):
        other.load_state_dict(saved)


def test_keys_that_schedulers_add_do_not_hinder_loading():
    """OneCycleLR writes `momentum` and its own keys into every group, AdamW's too."""
    params, optimizer = make()
    train(params, optimizer, 1, seed=1)
    plain = copy.deepcopy(optimizer.state_dict())
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=[0.1, 0.01], total_steps=10)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.load_state_dict(plain)
    assert optimizer.param_groups[0]["max_lr"] == 0.1
    assert optimizer.param_groups[0]["lr"] == 0.02


def test_moments_of_other_strides_are_laid_out_anew():
    params, optimizer = make()
    train(params, optimizer, 1, seed=1)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][3]["exp_avg"] = saved["state"][3]["exp_avg"].T.contiguous().T
    twin_params, twin = resumed_from(params, saved)
    train(params, optimizer, 1, seed=2)
    train(twin_params, twin, 1, seed=2)
    assert_bitwise(snapshot(params, optimizer), snapshot(twin_params, twin))


def test_hooks_run_and_may_replace_the_dict():
    params, optimizer = make()
    train(params, optimizer, 1, seed=1)
    _, other = make()
    seen = []

    def rename(_, state_dict):
        seen.append("pre")
        groups = [{**g, "lr": 0.5} for g in state_dict["param_groups"]]
        return {**state_dict, "param_groups": groups}

    other.register_load_state_dict_pre_hook(rename)
    other.register_load_state_dict_post_hook(lambda _: seen.append("post"))
    other.load_state_dict(optimizer.state_dict())
    assert seen == ["pre", "post"]
    assert other.param_groups[0]["lr"] == 0.5


CODES = ("state", 0, "momentum_linear8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edit(("param_groups",), None), "needs .* `param_groups`"),
        (edit(("param_groups", 1), None), "1 parameter groups"),
        (edit(("param_groups", 0, "params"), [0, 1]), "2 parameters saved, 3 here"),
        (edit(("param_groups", 0, "param_names"), ["b", "a", "narrow"]), "state of b would go to a"),
        (edit(("param_groups", 0, "codebook"), "dynamic"), "codebook='dynamic'.*construct"),
        (edit(("param_groups", 0, "bits"), 32), "bits=32"),
        (edit(("param_groups", 0, "block_size"), 64), "block_size=64"),
        (edit(("param_groups", 1, "algorithm"), "muon"), "embed .*saved: muon; here: adamw"),
        (edit(("param_groups", 0, "momentum"), None), "lacks momentum"),
        (edit(("param_groups", 0, "momentum"), 1.5), "group 0 of the state dict: momentum"),
        (edit(CODES, None), "a: missing .'momentum_linear8'"),
        (edit(("state", 0, "exp_avg"), torch.zeros(16, 40)), "a: .*foreign .'exp_avg'.*adamw_bits=32"),
        (edit(CODES, lambda t: t.to(torch.uint8)), "a: momentum_linear8 is torch.uint8"),
        (edit(CODES, lambda t: t[:, :-1]), r"a: .*\(16, 39\)"),
        (edit(("state", 0, "momentum_scales"), lambda t: t / 0), "momentum_scales holds NaN or Inf"),
        (edit(("state", 0, "momentum_scales"), lambda t: t.to_sparse()), "dense"),
        (edit(("state", 0), torch.zeros(1)), "a is a Tensor"),
        (edit(("param_groups", 0, "algorithm"), None), "not saved by Muon8bit"),
        (edit(("param_groups", 0, "params"), None), "no 'params'"),
        (edit(("param_groups", 1, "betas"), 0.9), "betas"),
        (edit(("param_groups", 0, "lr"), "high"), "lr"),
        (edit(("param_groups",), 7), "param_groups"),
        (edit(("state",), []), "state"),
        (edit(CODES, 3.0), "a: momentum_linear8 is a float"),
        (edit(("state", 0, "momentum_scales"), lambda t: t.bfloat16()), "momentum_scales is torch.bfloat16"),
        (edit(("state", 3, "step"), None), "embed: .*step"),
        (edit(("state", 99), {"x": torch.zeros(1)}), "99"),
        (edit(("state", 0), {"momentum_dynamic8": torch.zeros(16, 40, dtype=torch.uint8)}), "codebook='dynamic'"),
        (edit(("state", 0), {"momentum_buffer": torch.zeros(16, 40)}), "bits=32"),
    ],
)
def test_what_does_not_fit_is_refused_by_name_and_changes_nothing(change, message):
    params, optimizer = make()
    train(params, optimizer, 1, seed=1)
    saved = copy.deepcopy(optimizer.state_dict())
    change(saved)
    other_params, other = make()
    train(other_params, other, 1, seed=3)
    before, groups = snapshot(other_params, other), copy.deepcopy(other.state_dict()["param_groups"])
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(saved)
    assert_bitwise(before, snapshot(other_params, other))
    assert groups == other.state_dict()["param_groups"]

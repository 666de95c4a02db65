"""Checkpoints of AdamW's moments in 8 bits: bitwise on continue, loud on another format, converted both ways."""

import copy
import pickle
import sys
import warnings

import numpy as np
import pytest
import torch
from helpers.bitwise import assert_bitwise
from helpers.state_dicts import edit, snapshot, through_file, train

from muon8bit import Muon8bit, convert_state_dict, param_groups
from muon8bit.cli import main
from muon8bit.step import adamw8bit

bitsandbytes = pytest.importorskip("bitsandbytes.functional")

SHAPES = {"matrix": (16, 40), "rows": (20, 512), "odd": (70, 60), "bias": (6,)}
EIGHT_BITS = {
    "rows": {"step": (), "exp_avg_dynamic8": (20, 512), "exp_avg_sq_dynamic8": (20, 512)}
    | dict.fromkeys(("exp_avg_scales", "exp_avg_sq_scales"), (20, 2)),
    "odd": {"step": (), "exp_avg_dynamic8": (70, 60), "exp_avg_sq_dynamic8": (70, 60)}
    | dict.fromkeys(("exp_avg_scales", "exp_avg_sq_scales"), (17,)),
    "bias": {"step": (), "exp_avg": (6,), "exp_avg_sq": (6,)},
}


def make(adamw_bits=8, dtype=torch.float32, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    params = {n: torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for n, s in SHAPES.items()}
    rest = [(n, p) for n, p in params.items() if n != "matrix"]
    groups = [
        {"params": [("matrix", params["matrix"])]},
        {"params": rest, "algorithm": "adamw", "lr": 1e-2, "adamw_bits": adamw_bits},
    ]
    return params, Muon8bit(groups, lr=0.02, **options)


def with_values_of(params, **options):
    others, optimizer = make(seed=5, **options)
    with torch.no_grad():
        for name, param in others.items():
            param.copy_(params[name])
    return others, optimizer


def assert_same(left, right):
    assert left.keys() == right.keys()
    for key, value in left.items():
        assert_bitwise(value, right[key])


def test_keys_shapes_and_dtypes_are_the_public_format():
    params, optimizer = make()
    train(params, optimizer, 1, seed=1)
    for index, name in enumerate(EIGHT_BITS, 1):
        state = optimizer.state_dict()["state"][index]
        assert {key: tuple(value.shape) for key, value in state.items()} == EIGHT_BITS[name]
        for key, value in state.items():
            assert value.dtype == (torch.uint8 if key.endswith("dynamic8") else torch.float32)


ROUNDING = {"param_rounding": "stochastic", "rounding_seed": 3}


@pytest.mark.parametrize("options", [{}, {"dtype": torch.bfloat16, **ROUNDING}], ids=["fp32", "bf16"])
@pytest.mark.parametrize("copier", [through_file, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s)), lambda s: s])
def test_continues_bitwise(copier, options):
    params, optimizer = make(**options)
    train(params, optimizer, 3, seed=1)
    saved = copier(optimizer.state_dict())
    others, resumed = with_values_of(params, **options)
    resumed.load_state_dict(saved)
    for some, its in ((params, optimizer), (others, resumed)):
        train(some, its, 3, seed=2)
    assert_same(snapshot(params, optimizer), snapshot(others, resumed))


def test_a_copy_of_the_optimizer_continues_bitwise():
    params, optimizer = make()
    train(params, optimizer, 2, seed=1)
    for copier in (copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))):
        twin = copier(optimizer)
        twin_params = dict(zip(SHAPES, [p for g in twin.param_groups for p in g["params"]], strict=True))
        one, its = copy.deepcopy((params, optimizer))
        for some, stepped in ((one, its), (twin_params, twin)):
            train(some, stepped, 2, seed=2)
        assert_same(snapshot(one, its), snapshot(twin_params, twin))


def test_an_unpickled_optimizer_without_bitsandbytes_says_so_and_changes_nothing(monkeypatch):
    params, optimizer = make()
    train(params, optimizer, 1, seed=1)
    before = snapshot(params, optimizer)
    adamw8bit.check_available.cache_clear()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "bitsandbytes", None)
        with pytest.raises(ImportError, match="adamw_bits=8 needs bitsandbytes"):
            train(params, optimizer, 1, seed=2)
    assert_same(before, snapshot(params, optimizer))


def test_a_checkpoint_that_does_not_say_adamw_bits_has_32():
    """As those of earlier versions."""
    params, optimizer = make(32)
    train(params, optimizer, 1, seed=1)
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["param_groups"][1]["adamw_bits"]
    others, resumed = with_values_of(params, adamw_bits=32)
    resumed.load_state_dict(saved)
    assert_same(snapshot(params, optimizer), snapshot(others, resumed))
    with pytest.raises(ValueError, match="saved with adamw_bits=32, the optimizer has 8"):
        make(8)[1].load_state_dict(saved)
    assert convert_state_dict(saved)["param_groups"][1]["adamw_bits"] == 32


@pytest.mark.parametrize("bits", [8, 32])
def test_the_other_format_is_refused_with_the_way_out(bits):
    params, optimizer = make(bits)
    train(params, optimizer, 1, seed=1)
    message = f"group 1: saved with adamw_bits={bits}, the optimizer has {40 - bits}: .*adamw_bits={bits}.*convert"
    with pytest.raises(ValueError, match=message):
        make(40 - bits)[1].load_state_dict(optimizer.state_dict())


CODES, SCALES = (("state", 1, f"exp_avg_sq_{what}") for what in ("dynamic8", "scales"))
MOMENTS = {"step": torch.ones(()), "exp_avg": torch.zeros(20, 512), "exp_avg_sq": torch.zeros(20, 512)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edit(CODES, lambda t: t.to(torch.int8)), "rows: exp_avg_sq_dynamic8 is torch.int8"),
        (edit(CODES, lambda t: t[:-1]), r"rows: .*\(19, 512\)"),
        (edit(SCALES, lambda t: t.flatten()), r"rows: exp_avg_sq_scales .*\(40,\), expected .*\(20, 2\)"),
        (edit(SCALES, lambda t: t / 0), "rows: exp_avg_sq_scales holds NaN or Inf"),
        (edit(SCALES, None), "rows: missing .'exp_avg_sq_scales'"),
        (edit(("state", 1), MOMENTS), "rows: missing .*saved with adamw_bits=32: construct"),
    ],
)
def test_what_does_not_fit_is_refused_by_name_and_changes_nothing(change, message):
    params, optimizer = make()
    train(params, optimizer, 1, seed=1)
    saved = copy.deepcopy(optimizer.state_dict())
    change(saved)
    before = snapshot(params, optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert_same(before, snapshot(params, optimizer))


def decoded(codes, scales, signed):
    """float64, by hand, rounded once."""
    values = bitsandbytes.create_dynamic_map(signed=signed).double().numpy()[codes.numpy().ravel()]
    exact = values * np.repeat(scales.double().numpy().ravel(), 256)[: codes.numel()]
    return exact.astype(np.float32).reshape(codes.shape)


def test_8_to_32_bits_is_the_decoding_in_float64():
    params, optimizer = make()
    train(params, optimizer, 3, seed=1)
    saved, other = optimizer.state_dict(), make(32)[1]
    with pytest.warns(UserWarning, match="AdamW's moments were converted from adamw_bits=8 to adamw_bits=32"):
        other.load_state_dict(convert_state_dict(saved, like=other))
    for index in (1, 2):
        state = list(other.state.values())[index]
        assert state.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert state["step"] == 3
        for key in ("exp_avg", "exp_avg_sq"):
            codes, scales = (saved["state"][index][f"{key}_{what}"] for what in ("dynamic8", "scales"))
            assert np.array_equal(state[key].numpy(), decoded(codes, scales, key == "exp_avg"))
    with pytest.warns(UserWarning, match="from adamw_bits=8 to adamw_bits=32"):
        exported = convert_state_dict(saved, target="torch")["adamw"]["state"]
    assert_same(exported[0], list(other.state.values())[1])


def test_32_to_8_bits_goes_on_near_the_32_bit_run():
    """To 8 bits and on: the next step differs by what half a code step of each moment, 5% and less, makes of it."""
    params, optimizer = make(32)
    train(params, optimizer, 20, seed=1)
    others, other = with_values_of(params, adamw_bits=8)
    with pytest.warns(UserWarning, match="AdamW's moments were converted from adamw_bits=32 to adamw_bits=8"):
        other.load_state_dict(convert_state_dict(optimizer.state_dict(), like=other))
    assert {tuple(s) for s in other.state.values()} >= {tuple(EIGHT_BITS["bias"])}
    before = params["rows"].detach().clone()
    for some, its in ((params, optimizer), (others, other)):
        train(some, its, 1, seed=2)
    steps = [some["rows"].detach() - before for some in (params, others)]
    assert (steps[0] - steps[1]).norm() < 0.05 * steps[0].norm()
    assert_bitwise(params["bias"].detach(), others["bias"].detach())


def test_the_same_format_shares_every_tensor_and_warns_of_nothing():
    params, optimizer = make()
    train(params, optimizer, 1, seed=1)
    saved = optimizer.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        converted = convert_state_dict(saved, adamw_bits=8)
    assert converted["param_groups"] == saved["param_groups"]
    for key, state in saved["state"].items():
        for name, tensor in state.items():
            assert converted["state"][key][name].data_ptr() == tensor.data_ptr()


def test_damaged_8_bit_moments_are_not_converted():
    params, optimizer = make()
    train(params, optimizer, 1, seed=1)
    for key, value, message in (
        ("exp_avg_scales", torch.full((20, 2), torch.nan), "rows: exp_avg_scales holds NaN"),
        ("exp_avg_scales", torch.ones(40), "rows has .*in 8 bits"),
        ("exp_avg", torch.ones(20, 512), "rows has .*in 8 bits"),
    ):
        saved = copy.deepcopy(optimizer.state_dict())
        saved["state"][1][key] = value
        with pytest.raises(ValueError, match=message):
            convert_state_dict(saved, adamw_bits=32)


def test_the_command_converts_the_moments(tmp_path, capsys):
    params, optimizer = make()
    train(params, optimizer, 1, seed=1)
    torch.save(optimizer.state_dict(), tmp_path / "in.bin")
    assert main(["convert", str(tmp_path / "in.bin"), str(tmp_path / "out.bin"), "--adamw-bits", "32"]) == 0
    assert "AdamW's moments were converted from adamw_bits=8 to adamw_bits=32" in capsys.readouterr().out
    make(32)[1].load_state_dict(torch.load(tmp_path / "out.bin"))


def test_param_groups_asks_for_it_and_predicts_its_bytes():
    model = torch.nn.Sequential(torch.nn.Embedding(64, 96), torch.nn.Linear(96, 96), torch.nn.LayerNorm(96))
    groups = param_groups(model, lr=1e-3, adamw_bits=8)
    assert [group.get("adamw_bits") for group in groups] == [None, 8, 8]
    assert "adamw_bits=8" in str(groups)
    predicted = {route.name: route.state_bytes for route in groups.routes}
    assert predicted["0.weight"] == 2 * (64 * 96 + 4 * 24)
    assert predicted["2.weight"] == 8 * 96
    with pytest.raises(ValueError, match=r"adamw_bits must be one of \(8, 32\), not 4"):
        param_groups(model, lr=1e-3, adamw_bits=4)

"""Conversion of state dicts: against float64 decoding by hand, and against the optimizers that go on from it."""

import copy
import warnings

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
from helpers.bitwise import assert_bitwise
from helpers.oracle import Muon64
from helpers.other_optimizers import MATRICES, OTHERS, both, ours_for, quietly, torch_pair, torch_params, torch_train
from helpers.state_dicts import SHAPES, make, train
from muon8bit_kernels import dynamic_map

from muon8bit import AdaMuon8bit, Muon8bit, NorMuon8bit, convert_state_dict
from muon8bit.cli import main


def saved_by_ours(steps=3, **options):
    params, optimizer = make(**options)
    train(params, optimizer, steps, seed=1)
    return params, optimizer


def decoded(state, block_size):
    """fp32 [rows, cols], each operation of the format in float64 and rounded once."""
    if "momentum_buffer" in state:
        return state["momentum_buffer"].numpy()
    scales = state["momentum_scales"].numpy().astype(np.float64)
    if "momentum_linear8" in state:
        codes = state["momentum_linear8"].numpy().astype(np.float64)
        scales = np.repeat(scales, block_size, axis=1)[:, : codes.shape[1]]
        return ((codes * scales).astype(np.float32).astype(np.float64) / 127).astype(np.float32)
    codes = state["momentum_dynamic8"].numpy()
    scales = np.repeat(scales, block_size, axis=1)[:, : codes.shape[1]]
    return (dynamic_map().numpy().astype(np.float64)[codes] * scales).astype(np.float32)


@pytest.mark.parametrize("codebook", ["linear", "dynamic"])
def test_8_to_32_bits_is_the_decoding_in_float64_rounded_as_the_format_says(codebook):
    _, optimizer = saved_by_ours(codebook=codebook, block_size=64)
    saved = optimizer.state_dict()
    with pytest.warns(UserWarning, match=f"from bits=8, codebook='{codebook}', block_size=64 to bits=32"):
        converted = convert_state_dict(saved, bits=32)
    for key in (0, 1):
        assert converted["state"][key].keys() == {"momentum_buffer"}
        assert np.array_equal(converted["state"][key]["momentum_buffer"].numpy(), decoded(saved["state"][key], 64))
    assert [group.get("bits") for group in converted["param_groups"]] == [32, None]
    assert saved["param_groups"][0]["bits"] == 8


@pytest.mark.parametrize("codebook", ["linear", "dynamic"])
def test_the_step_after_8_to_32_bits_is_the_8_bit_step_to_the_bit(codebook):
    params, optimizer = saved_by_ours(codebook=codebook)
    others, other = make(bits=32)
    with torch.no_grad():
        for name, param in others.items():
            param.copy_(params[name])
    with pytest.warns(UserWarning, match="to bits=32"):
        other.load_state_dict(convert_state_dict(optimizer.state_dict(), like=other))
    train(params, optimizer, 1, seed=2)
    train(others, other, 1, seed=2)
    for name in SHAPES:
        assert_bitwise(params[name].detach(), others[name].detach())


@pytest.mark.parametrize("codebook", ["linear", "dynamic"])
@pytest.mark.parametrize("block_size", [64, 128])
def test_32_to_8_bits_is_within_half_a_step_of_the_codebook_of_float64(codebook, block_size):
    generator = torch.Generator().manual_seed(0)
    buffer = torch.randn(6, 200, generator=generator) * torch.logspace(-20, 20, 6)[:, None]
    optimizer = Muon8bit([torch.nn.Parameter(torch.zeros_like(buffer))], bits=32)
    saved = optimizer.state_dict()
    saved["state"][0] = {"momentum_buffer": buffer}
    state = quietly(saved, bits=8, codebook=codebook, block_size=block_size)["state"][0]
    blocks = [buffer.numpy()[:, i : i + block_size].astype(np.float64) for i in range(0, 200, block_size)]
    largest = np.stack([np.abs(block).max(1) for block in blocks], axis=1)
    assert np.array_equal(state["momentum_scales"].numpy(), largest.astype(np.float32))
    values = np.arange(-127, 128) / 127 if codebook == "linear" else dynamic_map().numpy().astype(np.float64)
    scales = np.repeat(largest, block_size, axis=1)[:, :200]
    distance = np.abs(values[None, None] - (buffer.numpy() / scales)[..., None]).min(-1)  # to the nearest entry
    error = np.abs(decoded(state, block_size).astype(np.float64) / scales - buffer.numpy() / scales)
    assert (error <= distance + 2**-22).all()


def test_linear_to_32_bits_and_back_keeps_codes_and_scales_to_a_unit():
    """Of all 2^23 mantissas some move by a unit in the last place; so |fl(fl(c s) / 127) / s' * 127 - c| is at most
    127 * 5 * 2^-24 < 1/2 for every code c, here with each sort of mantissa and from the least to the largest scale."""
    codes = torch.arange(-127, 128, dtype=torch.int8)
    block = torch.cat([codes, codes[:1]])  # 256 elements, every code
    mantissas = torch.arange(2**23, dtype=torch.int32)
    largest = torch.arange(2**23, dtype=torch.int32) + (127 << 23)
    back = (largest.view(torch.float32) * 127) / 127  # the scale that the decoded block has
    moved = (back.view(torch.int32) - largest).abs()
    assert moved.max() == 1
    chosen = torch.cat([mantissas[moved == 1][::40], mantissas[::8191], mantissas[-3:]])
    exponents = torch.tensor([1, 2, 100, 127, 200, 246])  # the largest where 127 s is finite
    scales = (exponents[:, None].int() * 2**23 + chosen).view(torch.float32).reshape(-1, 1)
    optimizer = Muon8bit([torch.nn.Parameter(torch.empty(len(scales), 256))], block_size=256)
    saved = optimizer.state_dict()
    saved["state"][0] = {"momentum_linear8": block.expand(len(scales), -1).contiguous(), "momentum_scales": scales}
    back = quietly(quietly(saved, bits=32), bits=8)
    assert back["param_groups"] == saved["param_groups"]
    assert_bitwise(back["state"][0]["momentum_linear8"], saved["state"][0]["momentum_linear8"])
    units = back["state"][0]["momentum_scales"].view(torch.int32) - scales.view(torch.int32)
    assert units.abs().max() <= 1


@pytest.mark.parametrize("options", [{}, {"codebook": "dynamic", "block_size": 64}, {"bits": 32}])
def test_the_same_format_shares_every_tensor_and_warns_of_nothing(options):
    _, optimizer = saved_by_ours(**options)
    saved = optimizer.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        converted = convert_state_dict(saved)
    assert converted["param_groups"] == saved["param_groups"]
    for key, state in saved["state"].items():
        assert converted["state"][key].keys() == state.keys()
        for name, tensor in state.items():
            assert converted["state"][key][name].data_ptr() == tensor.data_ptr()


def test_stacks_and_flattened_tensors_keep_their_rows():
    generator = torch.Generator().manual_seed(0)
    stack, conv = (torch.nn.Parameter(torch.randn(s, generator=generator)) for s in ((3, 5, 70), (4, 3, 5, 5)))
    groups = [{"params": [("s", stack)]}, {"params": [("c", conv)], "flatten": True}]
    optimizer = Muon8bit(groups, block_size=64)
    for param in (stack, conv):
        param.grad = torch.randn(param.shape, generator=generator)
    optimizer.step()
    saved = optimizer.state_dict()
    flat = {k: {n: t.flatten(0, -2) for n, t in saved["state"][k].items()} for k in (0,)}
    flat[1] = {"momentum_linear8": saved["state"][1]["momentum_linear8"].flatten(1)}
    flat[1]["momentum_scales"] = saved["state"][1]["momentum_scales"]
    converted = quietly(saved, bits=32)["state"]
    for key, param in enumerate((stack, conv)):
        expected = decoded(flat[key], 64).reshape(param.shape)
        assert np.array_equal(converted[key]["momentum_buffer"].numpy(), expected)


# --- torch.optim.Muon and an AdamW --------------------------------------------------------------------------------


def test_torchs_state_dicts_are_matched_by_name_into_any_groups():
    params = torch_params()
    pair = torch_pair(params)
    torch_train(params, pair, 3, seed=1)
    ours = ours_for(params)
    with pytest.warns(UserWarning, match="from torch.optim.Muon's to bits=32"):
        ours.load_state_dict(convert_state_dict(both(pair), source="torch", like=ours))
    for optimizer in pair:
        for param, state in optimizer.state.items():
            assert ours.state[param].keys() == state.keys()
            for key, value in state.items():
                assert_bitwise(ours.state[param][key], value)
    assert [group["lr"] for group in ours.param_groups] == [1e-2, 0.02, 1e-2]
    assert [group["weight_decay"] for group in ours.param_groups] == [0.1, 0.2, 0.1]


def test_torch_to_ours_and_back_continues_torchs_own_trajectory_to_the_bit():
    params = torch_params()
    pair = torch_pair(params)
    torch_train(params, pair, 3, seed=1)
    copies = {n: torch.nn.Parameter(p.detach().clone()) for n, p in params.items()}
    ours = ours_for(copies)
    ours.load_state_dict(quietly(both(pair), source="torch", like=ours))
    resumed = torch_pair(copies, order=("b", "a"))
    back = quietly(ours.state_dict(), target="torch", like=dict(zip(("muon", "adamw"), resumed, strict=True)))
    for part, optimizer in zip(("muon", "adamw"), resumed, strict=True):
        optimizer.load_state_dict(back[part])
    torch_train(params, pair, 3, seed=2)
    torch_train(copies, resumed, 3, seed=2)
    for name, param in params.items():
        assert_bitwise(copies[name].detach(), param.detach())


def test_export_without_like_keeps_the_order_and_the_names_and_loads_into_torch():
    params = torch_params()
    ours = ours_for(params, bits=8)
    torch_train(params, [ours], 2, seed=1)
    with pytest.warns(UserWarning, match="from bits=8, codebook='linear', block_size=2048 to torch.optim.Muon's"):
        exported = convert_state_dict(ours.state_dict(), target="torch")
    assert exported["muon"]["param_groups"][0]["param_names"] == ["b", "a"]
    assert [group["param_names"] for group in exported["adamw"]["param_groups"]] == [["bias"], ["embed"]]
    muon = torch.optim.Muon([("b", params["b"]), ("a", params["a"])])
    muon.load_state_dict(exported["muon"])
    for name in MATRICES:
        assert np.array_equal(muon.state[params[name]]["momentum_buffer"], decoded(ours.state[params[name]], 2048))
    assert muon.param_groups[0]["lr"] == 3.0
    adamw = torch.optim.AdamW([{"params": [params["bias"]]}, {"params": [params["embed"]]}])
    adamw.load_state_dict(exported["adamw"])
    adamw.step()


def heavy_ball(params, scale):
    """Moonlight's optimizer as its code keeps it: one group, `use_muon` in the state, heavy-ball momenta."""
    state = {}
    for key, name in enumerate((*MATRICES, *OTHERS)):
        state[key] = {"use_muon": name in MATRICES} | scale[name]
    group = {"lr": 0.02, "wd": 0.2, "momentum": 0.95, "nesterov": True, "ns_steps": 5}
    group |= {"adamw_betas": (0.9, 0.95), "adamw_eps": 1e-9, "params": list(range(len(params)))}
    return {"state": state, "param_groups": [group]}


def heavy_balls(steps, seed):
    """b <- .95 b + g of Muon's matrices under the gradients of `torch_train`."""
    generator, buffers = torch.Generator().manual_seed(seed), {n: torch.zeros(SHAPES[n]) for n in MATRICES}
    for _ in range(steps):
        for name in (*MATRICES, *OTHERS):
            grad = torch.randn(SHAPES[name], generator=generator)
            if name in buffers:
                buffers[name].mul_(0.95).add_(grad)
    return buffers


@pytest.mark.parametrize("source", ["torch", "heavy-ball"])
def test_an_import_goes_on_as_close_to_float64_as_torch(source):
    """Three steps of torch's Muon, its momentum taken over from it or from heavy ball under the same gradients; then
    three more by each. Distance to the float64 continuation at most 1.05 times torch's."""
    params = torch_params()
    pair = torch_pair(params)
    torch_train(params, pair, 3, seed=1)
    saved = copy.deepcopy(both(pair))
    if source == "heavy-ball":
        for key, buffer in enumerate(heavy_balls(3, seed=1).values()):
            saved["muon"]["state"][key]["momentum_buffer"] = buffer
    copies = {n: torch.nn.Parameter(p.detach().clone()) for n, p in params.items()}
    ours = ours_for(copies, ns_dtype=None, adjust_lr_fn="original")
    with pytest.warns(UserWarning, match=f"from {'heavy-ball' if source != 'torch' else 'torch.optim.'}.* to bits=32"):
        ours.load_state_dict(convert_state_dict(saved, source=source, like=ours))
    exact = {n: Muon64(params[n].detach().numpy(), lr=0.02, decay=0.2) for n in MATRICES}
    for name, simulation in exact.items():
        simulation.momentum = pair[0].state[params[name]]["momentum_buffer"].double().numpy()
    generator = torch.Generator().manual_seed(2)
    for _ in range(3):
        for name, param in params.items():
            param.grad = torch.randn(param.shape, generator=generator)
            copies[name].grad = param.grad.clone()
            if name in exact:
                exact[name].step(param.grad.numpy())
        for optimizer in (*pair, ours):
            optimizer.step()
    for name, simulation in exact.items():
        errors = [np.linalg.norm(p[name].detach().double().numpy() - simulation.weight) for p in (copies, params)]
        assert errors[0] <= 1.05 * errors[1]
    for name in OTHERS:
        assert torch.allclose(copies[name], params[name], rtol=1e-6, atol=1e-7)  # one fused, one not
        assert ours.state[copies[name]]["step"] == 6


def test_heavy_ball_values_are_divided_by_1_over_1_minus_beta_of_the_group_or_the_option():
    generator = torch.Generator().manual_seed(0)
    buffer = torch.randn(5, 30, generator=generator)
    state = {0: {"momentum_buffer": buffer}}
    group = {"params": [0], "lr": 0.1, "weight_decay": 0.0, "momentum": 0.9}
    expected = buffer.double() * (1 - 0.9)
    for removed in ((), ("momentum",)):
        saved = {"state": state, "param_groups": [{k: v for k, v in group.items() if k not in removed}]}
        options = {"source": "heavy-ball", "names": ["w"], "bits": 32, "momentum": 0.9 if removed else None}
        with pytest.warns(UserWarning, match="does not say|was converted") as caught:
            converted = convert_state_dict(saved, **options)
        messages = [str(warning.message) for warning in caught]
        assert messages[0].startswith("group 0 does not say nesterov, ns_coefficients, eps, ns_steps, adjust_lr_fn")
        assert messages[1] == "the momentum was converted from heavy-ball Muon's to bits=32"
        values = converted["state"][0]["momentum_buffer"].double()
        assert ((values - expected).abs() <= 2.0**-23 * expected.abs()).all()
        assert converted["param_groups"][0]["momentum"] == 0.9


def test_moonlights_one_group_becomes_one_of_muon_and_one_of_adamw():
    params = torch_params()
    states = {n: {"momentum_buffer": torch.ones(SHAPES[n])} for n in MATRICES}
    states |= {n: {"step": 7, "moment1": torch.ones(SHAPES[n]), "moment2": torch.ones(SHAPES[n])} for n in OTHERS}
    converted = quietly(heavy_ball(params, states), source="heavy-ball", names=[*MATRICES, *OTHERS])
    muon, adamw = converted["param_groups"]
    assert (muon["algorithm"], muon["param_names"], muon["params"]) == ("muon", [*MATRICES], [0, 1])
    assert (adamw["algorithm"], adamw["param_names"], adamw["params"]) == ("adamw", [*OTHERS], [2, 3])
    assert (muon["weight_decay"], muon["adjust_lr_fn"], muon["bits"]) == (0.2, "match_rms_adamw", 8)
    assert (adamw["weight_decay"], adamw["betas"], adamw["eps"]) == (0.2, (0.9, 0.95), 1e-9)
    assert converted["state"][2]["step"] == 7
    groups = [{"params": [(n, params[n]) for n in MATRICES]}]
    groups += [{"params": [(n, params[n]) for n in OTHERS], "algorithm": "adamw", "lr": 1.0}]
    Muon8bit(groups).load_state_dict(converted)


def test_loading_another_format_raises_and_names_the_conversion():
    params = torch_params()
    pair, ours, other = torch_pair(params), ours_for(params, bits=8), ours_for(params, bits=32)
    torch_train(params, [*pair, ours], 1, seed=1)
    for saved in (ours.state_dict(), pair[0].state_dict()):
        with pytest.raises(ValueError, match=r"convert_state_dict.*like=optimizer.*`muon8bit convert"):
            other.load_state_dict(saved)
    other.load_state_dict(quietly(ours.state_dict(), like=other))


# --- what does not fit ---------------------------------------------------------------------------------------------


def changed(path, value):
    """A change of a state dict: `path` gets `value`, a function of the old one; None deletes."""

    def change(saved):
        *front, last = path
        for key in front:
            saved = saved[key]
        if value is None:
            del saved[last]
        else:
            saved[last] = value(saved[last]) if callable(value) else value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed(("param_groups",), None), "no optimizer's state dict.*it has state"),
        (changed(("state",), []), "needs `state` and `param_groups`"),
        (changed(("param_groups", 0), 3), "group 0 is no parameter group"),
        (changed(("param_groups", 0, "params"), None), "no list 'params'"),
        (changed(("param_groups", 0, "params", 0), [0]), "group 0 is no parameter group"),
        (changed(("param_groups", 0, "param_names"), torch.zeros(3)), "group 0 has 'param_names' that are no names"),
        (changed(("param_groups", 0, "param_names", 1), 7), "group 0 has 'param_names' that are no names"),
        (changed(("param_groups", 0, "algorithm"), []), r"\[\] is not one of muon, adamw"),
        (changed(("param_groups", 0, "codebook"), 3), "group 0: codebook must be"),
        (changed(("param_groups", 0, "bits"), torch.zeros(3)), "group 0: bits must be"),
        (changed(("param_groups", 0, "block_size"), None), "group 0 lacks block_size"),
        (changed(("param_groups", 0, "block_size"), []), "group 0: block_size must be"),
        (changed(("state", 2, "momentum_buffer"), lambda t: t.to("meta")), "narrow: .*expected a dense tensor"),
        (changed(("param_groups", 0, "algorithm"), None), "group 0 was not saved by Muon8bit: .*--from. torch"),
        (changed(("param_groups", 0, "algorithm"), "sgd"), "'sgd' is not one of muon, adamw"),
        (changed(("param_groups", 0, "momentum"), None), "group 0 lacks momentum"),
        (changed(("param_groups", 0, "momentum"), 2.0), "group 0: momentum must be"),
        (changed(("param_groups", 0, "block_size"), 100), "group 0: block_size must be"),
        (changed(("param_groups", 0, "codebook"), "dynamic"), "a has momentum_linear8, momentum_scales; by its group"),
        (changed(("param_groups", 0, "param_names"), ["a"]), "1 'param_names' for 3 parameters"),
        (changed(("state",), lambda state: {**state, 99: {}}), "state for 99, which no group lists"),
        (changed(("state", 0, "momentum_scales"), None), "a has momentum_linear8; by its group"),
        (changed(("state", 0, "momentum_scales"), lambda t: t / 0), "a: momentum_scales holds NaN or Inf"),
        (changed(("state", 0, "momentum_scales"), lambda t: t[:-1]), r"a: momentum_scales is .*\(15, 1\), expected"),
        (changed(("state", 0, "momentum_linear8"), lambda t: t.to(torch.uint8)), "a: momentum_linear8 is torch.uint8"),
        (changed(("state", 0, "momentum_linear8"), lambda t: t.to_sparse()), "a: .*dense"),
        (changed(("state", 0), lambda state: {**state, "extra": torch.zeros(1)}), "a has .*extra"),
        (changed(("state", 1), 7), "state of b is a int"),
        (changed(("state", 2, "momentum_buffer"), lambda t: t / 0), "narrow: momentum_buffer holds NaN"),
        (changed(("state", 3, "exp_avg"), None), "embed has step, exp_avg_sq; AdamW's has"),
        (changed(("state", 3, "exp_avg"), lambda t: t[:-1]), "embed: exp_avg and exp_avg_sq differ in shape"),
        (changed(("state", 3, "exp_avg_sq"), lambda t: t / 0), "embed: exp_avg_sq holds NaN"),
        (changed(("state", 3, "step"), "seven"), "embed: step is 'seven'"),
    ],
)
def test_what_is_damaged_is_refused_by_name_and_nothing_given_is_changed(change, message):
    _, optimizer = saved_by_ours(steps=1)
    saved = copy.deepcopy(optimizer.state_dict())
    change(saved)
    given = copy.deepcopy(saved)
    with pytest.raises(ValueError, match=message):
        convert_state_dict(saved, bits=32)
    assert repr(given) == repr(saved)


@pytest.mark.parametrize(
    ("saved", "options", "message"),
    [
        ("pair", {}, "no optimizer's state dict"),
        ("muon", {}, "group 0 was not saved by Muon8bit"),
        ("ours", {"source": "torch"}, "group 0 was saved by Muon8bit"),
        ("list", {}, "not an optimizer's state dict but a list"),
        ("pair", {"source": "keras"}, "source must be one of"),
        ("ours", {"target": "keras"}, "target must be one of"),
        ("pair", {"source": "torch", "names": ["a"]}, "fewer names.* group 0 of muon"),
        ("pair", {"source": "torch", "names": list("abcde")}, "more names"),
        ("pair", {"source": "torch", "momentum": 0.9}, "momentum is only needed .*leave it out"),
        ("pair", {"source": "heavy-ball", "momentum": 0.9}, "momentum=0.95: leave"),
        ("ours", {"like": "ours", "bits": 8}, "bits: the format is that of"),
        ("ours", {"like": "muon"}, "not of a Muon8bit"),
        ("ours", {"like": "list"}, "like: an optimizer or the state dict"),
        ("ours", {"like": "ours", "target": "torch"}, "'muon' and 'adamw'"),
        ("ours", {"bits": 16}, "group 1: bits must be one of"),
        ("ours", {"drop_moved": True}, "drop_moved is about the groups of `like`"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_name(saved, options, message):
    params = torch_params()
    pair, ours = torch_pair(params), ours_for(params)
    torch_train(params, [*pair, ours], 1, seed=1)
    given = {"pair": both(pair), "muon": pair[0].state_dict(), "ours": ours.state_dict(), "list": [1]}
    if "like" in options:
        options = {**options, "like": given[options["like"]]}
    with pytest.raises(ValueError, match=message):
        convert_state_dict(given[saved], **options)


def test_imports_without_names_are_refused_and_taken_with_names():
    params = torch_params()
    pair = torch_pair(params)
    torch_train(params, pair, 1, seed=1)
    saved = both(pair)
    for part in saved.values():
        del part["param_groups"][0]["param_names"]
    with pytest.raises(ValueError, match=r"group 0 of muon has no 'param_names'.*give names"):
        convert_state_dict(saved, source="torch")
    converted = quietly(saved, source="torch", names=[*MATRICES, *OTHERS])
    assert [group["param_names"] for group in converted["param_groups"]] == [[*MATRICES], [*OTHERS]]


def test_parameters_that_like_lacks_or_routes_otherwise_are_named():
    params = torch_params()
    pair = torch_pair(params)
    torch_train(params, pair, 1, seed=1)
    for groups, message in (
        ([{"params": [("a", params["a"]), ("b", params["b"])]}], "bias is saved, but `like` does not have it"),
        (
            [{"params": [(n, params[n]) for n in MATRICES]}, {"params": [(n, params[n]) for n in OTHERS[:1]]}],
            "bias is saved",
        ),
        (
            [
                {"params": [(n, params[n]) for n in (*MATRICES, "embed")]},
                {"params": [("bias", params["bias"])], "algorithm": "adamw", "lr": 1.0},
            ],
            "embed was stepped by adamw, `like` has it in a group of muon",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            convert_state_dict(both(pair), source="torch", like=Muon8bit(groups))
    new = torch.nn.Parameter(torch.zeros(9, 9))
    ours = ours_for(params)
    ours.add_param_group({"params": [("new", new)]})
    with pytest.raises(ValueError, match="new is not saved"):
        convert_state_dict(both(pair), source="torch", like=ours)
    adamw = torch.optim.AdamW(
        [{"params": [("embed", params["embed"])]}, {"params": [("bias", params["bias"])], "lr": 7}]
    )
    saved = {"muon": pair[0].state_dict(), "adamw": adamw.state_dict()}
    groups = [{"params": [(n, params[n]) for n in MATRICES]}]
    groups += [{"params": [(n, params[n]) for n in OTHERS], "algorithm": "adamw", "lr": 1.0}]
    with pytest.warns(UserWarning, match=r"group 1 has lr=1.0 of `like`, .* embed lr=0.001, bias lr=7$"):
        convert_state_dict(saved, source="torch", like=Muon8bit(groups))


def test_groups_flagged_by_use_muon_are_taken_as_they_are():
    """K. Jordan's MuonWithAuxAdam: an EMA momentum, Muon's groups anywhere, steps as ints."""
    groups = [
        {"params": [0], "lr": 0.3, "betas": (0.8, 0.95), "eps": 1e-10, "weight_decay": 0, "use_muon": False},
        {"params": [1], "lr": 0.05, "momentum": 0.95, "weight_decay": 0, "use_muon": True},
    ]
    state = {
        0: {"exp_avg": torch.ones(6), "exp_avg_sq": torch.ones(6), "step": 4},
        1: {"momentum_buffer": torch.ones(16, 40, dtype=torch.bfloat16)},
    }
    saved = {"state": state, "param_groups": groups}
    converted = quietly(saved, source="torch", names=["bias", "a"], bits=32)
    assert [group["algorithm"] for group in converted["param_groups"]] == ["adamw", "muon"]
    assert_bitwise(converted["state"][0]["step"], torch.tensor(4.0))
    assert_bitwise(converted["state"][1]["momentum_buffer"], torch.ones(16, 40))
    del state[0], state[1]  # before the first step
    assert not quietly(saved, source="torch", names=["bias", "a"])["state"]


def test_optimizers_with_another_momentum_are_refused():
    params = torch_params()
    sgd = torch.optim.SGD([("a", params["a"])], momentum=0.9)
    with pytest.raises(ValueError, match=r"group 0 was saved by torch.optim.SGD, which is no Muon"):
        convert_state_dict(sgd.state_dict(), source="torch")
    moonlight = heavy_ball(params, {n: {} for n in (*MATRICES, *OTHERS)})
    with pytest.raises(ValueError, match=r"heavy-ball momentum: give source \(--from\) heavy-ball"):
        convert_state_dict(moonlight, source="torch", names=[*MATRICES, *OTHERS])


def test_without_names_equal_groups_are_matched_by_position_and_others_refused():
    params = [torch.nn.Parameter(torch.ones(16, 40)) for _ in range(2)]
    for param in params:
        param.grad = torch.ones_like(param)
    one, two = Muon8bit(params), Muon8bit(params, bits=32)
    one.step()
    two.load_state_dict(quietly(one.state_dict(), like=two))
    for param in params:
        expected = decoded(one.state[param], 2048)
        assert np.array_equal(two.state[param]["momentum_buffer"].numpy(), expected)
    apart = Muon8bit([{"params": [param]} for param in params])
    with pytest.raises(ValueError, match="without parameter names on both sides"):
        convert_state_dict(one.state_dict(), like=apart)


def test_a_sharded_tensor_is_refused_by_name():
    _, optimizer = saved_by_ours(steps=1)
    saved = optimizer.state_dict()
    saved["state"][0]["momentum_linear8"].placements = ()  # what a DTensor has
    with pytest.raises(ValueError, match="a: momentum_linear8 is a DTensor: convert a full state dict"):
        convert_state_dict(saved, bits=32)


@pytest.mark.parametrize("option", ["amsgrad", "maximize"])
def test_another_adamw_is_refused(option):
    params = torch_params()
    adamw = torch.optim.AdamW([("bias", params["bias"])], **{option: True})
    with pytest.raises(ValueError, match=f"stepped with {option}, which Muon8bit does not do"):
        convert_state_dict({"adamw": adamw.state_dict()}, source="torch")


def test_what_torchs_muon_cannot_do_is_refused_by_name():
    stack, fused = (torch.nn.Parameter(torch.ones(s)) for s in ((2, 8, 8), (16, 8)))
    for group, message in (
        ({"params": [("s", stack)]}, "s has 3 dimensions: torch.optim.Muon takes matrices only"),
        ({"params": [("f", fused)], "split_sizes": (8, 8)}, r"f is cut by split_sizes=\(8, 8\)"),
        ({"params": [("f", fused)], "ns_coefficients": "polar_express"}, "'polar_express' differ by step"),
        ({"params": [("f", fused)], "clip_matrix_norm": 1.0}, "has no clip_matrix_norm: set it to None"),
        ({"params": [("f", fused)], "cautious_weight_decay": True}, "no cautious_weight_decay: set it to False"),
        (
            {"params": [("f", fused)], "algorithm": "adamw", "lr": 0.1, "cautious_weight_decay": True},
            "no cautious_weight_decay: set it to False",
        ),
        ({"params": [("f", fused)], "decay_lr_power": 2}, "set decay_lr_power to 1"),
    ):
        optimizer = Muon8bit([group])
        stack.grad, fused.grad = torch.ones_like(stack), torch.ones_like(fused)
        optimizer.step()
        with pytest.raises(ValueError, match=message):
            convert_state_dict(optimizer.state_dict(), target="torch")


def jordans(group):
    """A file of K. Jordan's Muon in one group, as its first releases kept it: `use_muon` in the state."""
    torch.manual_seed(0)
    buffer, moments = torch.randn(16, 40), (torch.randn(40), torch.rand(40))
    state = {
        0: {"use_muon": True, "momentum_buffer": buffer},
        1: {"use_muon": False, "moment1": moments[0], "moment2": moments[1], "step": 3},
    }
    inner = {"adamw_lr_ratio": 0.015, "adamw_betas": (0.9, 0.95), "adamw_eps": 1e-12, "adamw_wd": 0.25}
    group = {"params": [0, 1], "lr": 0.02, "momentum": 0.95, "nesterov": True, "ns_steps": 6, **inner, **group}
    return {"state": state, "param_groups": [group]}, buffer


@pytest.mark.parametrize(
    ("source", "more", "factor"), [("jordan", {"weight_decay": 0.1}, 1.0), ("heavy-ball", {}, 1 - 0.95)]
)
def test_jordans_one_group_gives_adamw_its_own_rate_and_decay(source, more, factor):
    """Its momentum is an average since the release whose groups have `weight_decay`."""
    saved, buffer = jordans(more)
    converted = quietly(saved, source=source, names=["a", "bias"], bits=32)
    muon, adamw = converted["param_groups"]
    assert (muon["lr"], muon["weight_decay"], muon["ns_steps"]) == (0.02, more.get("weight_decay", 0.0), 6)
    assert muon["adjust_lr_fn"] in (None, "original")
    assert adamw["lr"] == pytest.approx(0.0003)
    assert (adamw["weight_decay"], adamw["betas"], adamw["eps"]) == (0.25, (0.9, 0.95), 1e-12)
    assert_bitwise(converted["state"][0]["momentum_buffer"], buffer * factor)
    assert converted["state"][1]["step"] == 3
    params = {"a": torch.nn.Parameter(torch.randn(16, 40)), "bias": torch.nn.Parameter(torch.randn(40))}
    groups = [{"params": [("a", params["a"])], "bits": 32}]
    groups += [{"params": [("bias", params["bias"])], "algorithm": "adamw", "lr": 1.0}]
    optimizer = Muon8bit(groups)
    optimizer.load_state_dict(converted)
    for param in params.values():
        param.grad = torch.randn_like(param)
    optimizer.step()


def with_aux_adam():
    groups = [
        {"params": [0], "lr": 0.02, "momentum": 0.9, "weight_decay": 0.125, "use_muon": True},
        {"params": [1], "lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-10, "weight_decay": 0, "use_muon": False},
    ]
    state = {0: {"momentum_buffer": torch.ones(16, 40)}, 1: {"exp_avg": torch.ones(40), "exp_avg_sq": torch.ones(40)}}
    return {"state": state, "param_groups": groups}


def test_jordans_groups_with_their_own_adam_keep_the_average():
    saved = with_aux_adam()
    saved["state"][1]["step"] = 3
    converted = quietly(saved, source="jordan", names=["a", "bias"], bits=32)
    muon, adamw = converted["param_groups"]
    assert (muon["momentum"], muon["nesterov"], muon["ns_steps"], muon["eps"]) == (0.9, True, 5, 1e-7)
    assert (muon["weight_decay"], adamw["weight_decay"], adamw["eps"]) == (0.125, 0, 1e-10)
    assert_bitwise(converted["state"][0]["momentum_buffer"], torch.ones(16, 40))


@pytest.mark.parametrize("source", ["torch", "jordan"])
def test_a_step_counted_in_the_group_is_taken(source):
    saved = with_aux_adam()
    for group in saved["param_groups"]:
        group["step"] = 7
    assert quietly(saved, source=source, names=["a", "bias"])["state"][1]["step"] == 7


@pytest.mark.parametrize(
    ("saved", "source", "message"),
    [
        (lambda: with_aux_adam(), "heavy-ball", r"K\. Jordan's Muon.*average since February 2025.*\(--from\) jordan"),
        (lambda: jordans({"weight_decay": 0.1})[0], "heavy-ball", r"average since February 2025.*\(--from\) jordan"),
        (lambda: jordans({"weight_decay": 0.1})[0], "torch", r"K\. Jordan's Muon: give source \(--from\) jordan"),
        (lambda: jordans({})[0], "jordan", r"heavy-ball momentum: give source \(--from\) heavy-ball"),
        (
            lambda: jordans({"weight_decay": 0.1, "sharpness": 2})[0],
            "jordan",
            "group 0 has sharpness, which no release",
        ),
        (
            lambda: jordans({"mu": 0.95, "rank_fraction": 0.5})[0],
            "torch",
            "group 0 has mu, rank_fraction, as Dion's .*not read",
        ),
        (
            lambda: jordans({"mu": 0.95, "rank_fraction": 0.5})[0],
            "muon8bit",
            "group 0 has mu, rank_fraction, as Dion's .*not read",
        ),
    ],
)
def test_who_saved_a_muon_is_told_by_its_group(saved, source, message):
    with pytest.raises(ValueError, match=message):
        convert_state_dict(saved(), source=source, names=["a", "bias"])


# --- AdamW, from which a run starts -------------------------------------------------------------------------------


def whole_models_adamw(params, kind, steps=3):
    """An optimizer over all parameters in one group, `frozen` included, which has no gradient."""
    named = [*params.items(), ("frozen", torch.nn.Parameter(torch.ones(3, 3)))]
    if kind.startswith("bnb"):
        make = bnb.optim.AdamW8bit if kind == "bnb8" else bnb.optim.AdamW
        optimizer = make([param for _, param in named], lr=1e-2, betas=(0.9, 0.99))
    elif kind == "Adam":
        optimizer = torch.optim.Adam(named, lr=1e-2)
    else:
        optimizer = torch.optim.AdamW(named, lr=1e-2, betas=(0.9, 0.99), fused=kind == "fused")
    torch_train(params, [optimizer], steps, seed=1)
    return optimizer, [name for name, _ in named]


def averages(param, state):
    """exp_avg and exp_avg_sq in fp32; of bitsandbytes' codes by its own maps."""
    state = {**state, **state.get("__bnb_optimizer_quant_state__", {})}
    if "exp_avg" in state:
        return state["exp_avg"], state["exp_avg_sq"]
    if state["state1"].dtype == torch.float32:
        return state["state1"], state["state2"]
    codes = state["state1"].flatten().long(), state["state2"].flatten().long().clamp(min=1)
    scales = (state[f"absmax{i}"].repeat_interleave(256)[: param.numel()] for i in (1, 2))
    return [(state[f"qmap{i}"][c] * s).view(param.shape) for i, c, s in zip((1, 2), codes, scales, strict=True)]


@pytest.mark.parametrize("kind", ["AdamW", "fused", "Adam", "bnb32", "bnb8"])
@pytest.mark.parametrize("bits", [32, 8])
def test_exp_avg_is_the_first_momentum_and_adamws_parameters_keep_all(kind, bits):
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (70, 64), "stack": (3, 20, 80), "conv": (8, 4, 3, 3), "embed": (80, 64), "bias": (6,)}
    params = {n: torch.nn.Parameter(torch.randn(s, generator=generator)) for n, s in shapes.items()}
    adamw, names = whole_models_adamw(params, kind)
    ours = Muon8bit(
        [
            {"params": [("embed", params["embed"])], "algorithm": "adamw", "lr": 3.0, "weight_decay": 0.3},
            {"params": [(n, params[n]) for n in ("stack", "a")], "weight_decay": 0.2},
            {"params": [("conv", params["conv"])], "flatten": True},
            {"params": [("bias", params["bias"])], "algorithm": "adamw", "lr": 2.0, "betas": (0.8, 0.9)},
        ],
        lr=0.5,
        bits=bits,
    )
    groups = copy.deepcopy(ours.state_dict()["param_groups"])
    saved = adamw.state_dict()
    if kind == "bnb8":
        saved["state"][3]["__bnb_optimizer_quant_state__"]["state2"][0, 0] = 0  # a small moment that its step lost
    given = names if kind.startswith("bnb") else None
    with pytest.warns(UserWarning, match="AdamW") as told:
        started = convert_state_dict(saved, source="adamw", like=ours, names=given)
    words = [str(warning.message) for warning in told]
    assert any("AdamW's run is not continued: 3 parameters start with its exp_avg" in word for word in words)
    assert any("the momentum was converted from AdamW's exp_avg to bits=" in word for word in words)
    ours.load_state_dict(started)
    assert ours.state_dict()["param_groups"] == groups
    for key, name in enumerate(shapes):
        first, second = averages(params[name], saved["state"][key])
        state = ours.state[params[name]]
        if name in ("embed", "bias"):
            assert_bitwise(state["exp_avg"], first)
            assert_bitwise(state["exp_avg_sq"], second)
            assert state["step"] == 3
            continue
        matrix = first.flatten(1) if name == "conv" else first.flatten(0, -2)
        flat = {k: v.reshape(-1, v.shape[-1]) if name != "conv" else v.flatten(1) for k, v in state.items()}
        error = np.abs(decoded(flat, 2048) - matrix.numpy())
        half_a_step = 0 if bits == 32 else np.abs(matrix.numpy()).max(1, keepdims=True) / 127 * 0.501
        assert (error <= half_a_step).all()
    for param in params.values():
        param.grad = torch.ones_like(param)
    ours.step()


def test_a_step_after_the_start_is_that_of_float64_from_exp_avg():
    params = {n: p for n, p in torch_params().items() if n == "a"}
    adamw, _ = whole_models_adamw(params, "AdamW")
    exact = Muon64(params["a"].detach().numpy(), lr=0.02, decay=0.2)
    exact.momentum = adamw.state[params["a"]]["exp_avg"].double().numpy()
    ours = Muon8bit([("a", params["a"])], lr=0.02, weight_decay=0.2, bits=32, ns_dtype=torch.float32)
    ours.load_state_dict(quietly(adamw.state_dict(), source="adamw", like=ours))
    torch_train(params, [ours], 1, seed=2)
    grad = torch.randn(SHAPES["a"], generator=torch.Generator().manual_seed(2))
    exact.step(grad.double().numpy())
    assert np.abs(params["a"].detach().double().numpy() - exact.weight).max() < 1e-5


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ("", {"like": None}, r"source='adamw' needs like \(--like\), a new optimizer"),
        ("group.pop('param_names')", {}, r"group 0 has no 'param_names'.*give names \(--names\)"),
        ("group.pop('betas')", {}, "group 0 has no 'betas': it was not saved by an AdamW"),
        ("group.update(algorithm='muon')", {}, r"saved by Muon8bit: give source \(--from\) muon8bit"),
        ("group.update(amsgrad=True)", {}, "stepped with amsgrad: start with a fresh optimizer"),
        ("group.update(decoupled_weight_decay=False)", {}, "stepped with L2 weight decay"),
        ("state[0].pop('exp_avg_sq')", {}, "state of a has .*AdamW's has step, exp_avg, exp_avg_sq"),
        ("state[0]['exp_avg'].fill_(torch.nan)", {}, "state of a: exp_avg holds NaN"),
        ("group['param_names'][0] = 'x'", {}, "x is saved, but `like` does not have it"),
        ("", {"source": "torch"}, r"b was stepped by adamw.*starts by source \(--from\) adamw"),
        ("", {"source": "muon8bit"}, r"by an AdamW.*not continue: start fresh.*--from\) adamw"),
    ],
)
def test_an_adamw_that_no_run_can_start_from_is_refused_by_name(change, options, message):
    params = torch_params()
    adamw, _ = whole_models_adamw(params, "AdamW", steps=1)
    saved = copy.deepcopy(adamw.state_dict())
    if options.get("source") == "torch":
        saved["param_groups"][0]["params"].pop()  # the frozen one
        saved["param_groups"][0]["param_names"].pop()
    exec(change, {"group": saved["param_groups"][0], "state": saved["state"], "torch": torch})
    with pytest.raises(ValueError, match=message):
        convert_state_dict(saved, **{"source": "adamw", "like": ours_for(params), **options})


def test_codes_of_another_map_are_refused():
    params = {"a": torch.nn.Parameter(torch.ones(70, 64))}
    adamw, names = whole_models_adamw(params, "bnb8", steps=1)
    saved = adamw.state_dict()
    saved["state"][0]["__bnb_optimizer_quant_state__"]["qmap1"] = torch.linspace(-1, 1, 256)
    with pytest.raises(ValueError, match="state of a: qmap1 is not the dynamic map"):
        convert_state_dict(saved, source="adamw", like=Muon8bit([*params.items()]), names=names)


def test_loading_an_adamws_state_dict_says_start_fresh_or_how_to_start_from_it():
    params = torch_params()
    adamw, _ = whole_models_adamw(params, "AdamW", steps=1)
    with pytest.raises(ValueError, match=r"saved by an AdamW.*start fresh, or take AdamW's exp_avg.*source='adamw'"):
        ours_for(params).load_state_dict(adamw.state_dict())


SIZES = {"wide": (12, 90), "tall": (90, 12), "stack": (2, 9, 70), "narrow": (20, 4)}


def family(kind=AdaMuon8bit, seed=0, **options):
    """Matrices, one of them cut by columns, and an optimizer; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    params = {name: torch.nn.Parameter(torch.randn(size, generator=generator)) for name, size in SIZES.items()}
    cut = torch.nn.Parameter(torch.randn(8, 100, generator=generator))
    groups = [{"params": list(params.items())}, {"params": [("cut", cut)], "split_sizes": (70, 30), "split_dim": -1}]
    return [*params.values(), cut], kind(groups, lr=1e-2, block_size=64, **options)


def run(params, optimizer, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()


def second_moments_by_hand(state):
    """In float64 with each operation rounded: codes times (scale / 255), squared; blocks of 64 begin at piece ends."""
    if "second_moment" in state:
        return state["second_moment"].numpy()
    codes, scales = state["second_moment_sqrt8"].numpy(), state["second_moment_scales"].numpy()
    steps = (scales.astype(np.float64) / 255).astype(np.float32)
    columns = [0] * 64 + [1] * 6 + [2] * 30 if codes.shape[-1] == 100 else [i // 64 for i in range(codes.shape[-1])]
    roots = (codes.astype(np.float64) * steps[..., columns]).astype(np.float32)
    return (roots.astype(np.float64) ** 2).astype(np.float32)


@pytest.mark.parametrize("codebook", ["linear", "dynamic"])
def test_second_moments_of_elements_go_to_32_bits_and_back(codebook):
    """Decoded by hand; the next step is the 8-bit one to the bit; back again no code has changed."""
    params, optimizer = family(codebook=codebook)
    run(params, optimizer, 4, seed=1)
    saved = copy.deepcopy(optimizer.state_dict())
    others, other = family(bits=32, codebook=codebook)
    with torch.no_grad():
        for theirs, ours in zip(others, params, strict=True):
            theirs.copy_(ours)
    with pytest.warns(UserWarning, match="second_moment='element' in 8 bits, block_size=64 to second_moment='element'"):
        converted = convert_state_dict(saved, bits=32)
    for key, state in saved["state"].items():
        assert converted["state"][key].keys() == {"momentum_buffer", "second_moment"}
        assert np.array_equal(converted["state"][key]["second_moment"].numpy(), second_moments_by_hand(state)), key
    other.load_state_dict(converted)
    for pair in ((params, optimizer), (others, other)):
        run(*pair, 1, seed=2)
    for ours, theirs in zip(params, others, strict=True):
        assert torch.equal(ours, theirs)
    back = quietly(converted, bits=8, codebook=codebook)
    for key, state in saved["state"].items():
        assert back["state"][key].keys() == state.keys()
        for name in ("second_moment_sqrt8", "second_moment"):
            assert name not in state or torch.equal(back["state"][key][name], state[name])


def test_second_moments_of_rows_stay_as_the_momentum_changes():
    params, optimizer = family(NorMuon8bit)
    run(params, optimizer, 2, seed=1)
    saved = optimizer.state_dict()
    converted = quietly(saved, codebook="dynamic", block_size=128)
    _, other = family(NorMuon8bit, codebook="dynamic")
    for key, state in saved["state"].items():
        assert torch.equal(converted["state"][key]["second_moment"], state["second_moment"])
    assert {tuple(s["second_moment"].shape) for s in saved["state"].values()} >= {(12, 1), (2, 9, 1), (8, 2)}
    again = quietly(converted, like=family(NorMuon8bit, codebook="dynamic")[1])
    other.load_state_dict(again)


@pytest.mark.parametrize("kind", [NorMuon8bit, AdaMuon8bit])
def test_a_muon8bit_goes_on_as_another_member_by_an_explicit_choice(kind):
    """Without it an error says how; then the options are the new optimizer's, and the momentum the saved one."""
    params, optimizer = family(Muon8bit, adjust_lr_fn="match_rms_adamw")
    run(params, optimizer, 3, seed=1)
    saved = optimizer.state_dict()
    _, other = family(kind, codebook="linear")
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"second_moment=None.*convert_state_dict"):
        other.load_state_dict(saved)
    with pytest.raises(ValueError, match=r"state of wide .*new_second_moment=True \(--new-second-moment\)"):
        quietly(saved, like=other)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        converted = convert_state_dict(saved, like=other, new_second_moment=True)
    said = " ".join(str(warning.message) for warning in caught)
    assert "starting at zero" in said
    assert "all options of `like`, lr too" in said
    other.load_state_dict(converted)
    for now, then in zip(other.state_dict()["param_groups"], before["param_groups"], strict=True):
        assert now == then
    for key, state in other.state_dict()["state"].items():
        for name, value in saved["state"][key].items():
            assert torch.equal(state[name], value)
        assert all(not value.any() for name, value in state.items() if name.startswith("second_moment"))
    with pytest.warns(UserWarning, match="to nothing, as Muon8bit has none"):
        back = convert_state_dict(converted, like=optimizer)
    assert all(state.keys() == saved["state"][key].keys() for key, state in back["state"].items())


def test_torch_has_no_second_moments_and_damaged_ones_are_named():
    params, optimizer = family(NorMuon8bit)
    run(params, optimizer, 1, seed=1)
    saved = optimizer.state_dict()
    with pytest.raises(ValueError, match=r"no second_moment, .*plain Muon8bit first"):
        quietly(saved, target="torch")
    with pytest.raises(ValueError, match="new_second_moment is about the groups of `like`"):
        convert_state_dict(saved, bits=32, new_second_moment=True)
    damaged = copy.deepcopy(saved)
    damaged["state"][0]["second_moment"][3] = -1
    with pytest.raises(ValueError, match=r"state of wide: second_moment holds the negative number -1: .*damaged"):
        quietly(damaged, bits=32)
    del damaged["state"][0]["second_moment"]
    with pytest.raises(ValueError, match=r"state of wide has .*its group asks for second_moment"):
        quietly(damaged, bits=32)


def test_the_command_takes_the_explicit_choice(tmp_path, capsys):
    params, optimizer = family(Muon8bit)
    run(params, optimizer, 1, seed=1)
    for name, state_dict in (("saved", optimizer.state_dict()), ("fresh", family(NorMuon8bit)[1].state_dict())):
        torch.save(state_dict, tmp_path / f"{name}.pt")
    words = ["convert", str(tmp_path / "saved.pt"), str(tmp_path / "out.pt"), "--like", str(tmp_path / "fresh.pt")]
    assert main(words) == 2
    assert "--new-second-moment" in capsys.readouterr().err
    assert not (tmp_path / "out.pt").exists()
    assert main([*words, "--new-second-moment"]) == 0
    _, other = family(NorMuon8bit)
    other.load_state_dict(torch.load(tmp_path / "out.pt"))

"""State dicts of NorMuon's and AdaMuon's authors and of Dion's library: a run goes on as the rule of its version."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.bitwise import assert_bitwise
from helpers.family_rules import RULES
from helpers.other_optimizers import quietly

from muon8bit import AdaMuon8bit, Muon8bit, NorMuon8bit, convert_state_dict
from muon8bit.cli import main
from muon8bit.convert import family
from muon8bit.family import ADAMUON_PRESETS, NORMUON_PRESETS

LR, DECAY, SHAPES = 0.02, 0.1, {"wide": (24, 40), "tall": (40, 24)}
ADAMW = {"betas": (0.9, 0.95), "eps": 1e-10, "lr": 3e-4, "weight_decay": 0.0}
KINDS = {"normuon": (NorMuon8bit, "official"), "dion": (NorMuon8bit, "dion"), "adamuon": (AdaMuon8bit, "official")}


def after(version, steps, runs=None, weights=None, seed=0):
    """Return weights, states and all after some steps of the rule in float64."""
    rng = np.random.default_rng(seed)
    weights = weights or {name: rng.normal(size=shape) for name, shape in SHAPES.items()}
    runs = runs or {name: SimpleNamespace() for name in SHAPES}
    grads = [{name: rng.normal(size=shape) for name, shape in SHAPES.items()} for _ in range(steps)]
    for of_step in grads:
        for name, grad in of_step.items():
            weights[name] = RULES[version](runs[name], weights[name], grad, LR, DECAY)
    return weights, runs, grads


def saved_as(source, runs, dtype=torch.float32):
    """Return what the optimizer of a version saves, with an AdamW's in the same dict, or beside it."""
    moments = [torch.linspace(-1, 1, 7), torch.linspace(0.5, 1, 7)]
    m, v = ([torch.from_numpy(getattr(run, key)).to(dtype) for run in runs.values()] for key in "mv")
    if source == "dion":
        shared = {"mu": 0.95, "muon_beta2": 0.95, "beta1": 0.9, "beta2": 0.95, "step": 4, "epsilon": 1e-8}
        shared |= {"nesterov": False, "flatten": False, "adjust_lr": "spectral_norm", "cautious_wd": False}
        own = {"lr": LR, "weight_decay": DECAY, "algorithm": "normuon", **shared}
        other = {"lr": 3e-4, "weight_decay": 0.0, "algorithm": "adamw", **shared, "epsilon": 1e-10}
        state = {i: {"momentum": pair[0], "variance_neuron": pair[1]} for i, pair in enumerate(zip(m, v, strict=True))}
        state[2] = {"momentum": moments[0], "variance": moments[1]}
    elif source == "normuon":
        own = {"lr": LR, "weight_decay": DECAY, "momentum": 0.95, "beta2": 0.95, "use_muon": True}
        other = {**ADAMW, "use_muon": False}
        keys = "momentum_buffer", "second_momentum_buffer"
        state = {i: dict(zip(keys, pair, strict=True)) for i, pair in enumerate(zip(m, v, strict=True))}
        state[2] = {"exp_avg": moments[0], "exp_avg_sq": moments[1], "step": 4}
    else:
        own = {"lr": LR, "weight_decay": DECAY, "momentum": 0.95, "nesterov": True, "ns_steps": 5, "eps": 1e-8}
        own["update_buffer"] = torch.zeros(1, 960)
        own["update_buffer_views"] = [own["update_buffer"][0]]
        state = {
            i: {"momentum_buffer": pair[0], "v_buffer": pair[1].flatten()}
            for i, pair in enumerate(zip(m, v, strict=True))
        }
        adamw = {"state": {0: dict(zip(("exp_avg", "exp_avg_sq", "step"), (*moments, 4), strict=True))}}
        adamw["param_groups"] = [{**ADAMW, "params": [0]}]
        return {"muon": {"state": state, "param_groups": [{**own, "params": [0, 1]}]}, "adamw": adamw}
    return {"state": state, "param_groups": [{**own, "params": [0, 1]}, {**other, "params": [2]}]}


def ours(source, weights, **options):
    """Return an optimizer of the version's preset, its groups in another order, and its parameters."""
    params = {name: torch.nn.Parameter(torch.from_numpy(weights[name]).float()) for name in reversed(SHAPES)}
    params["bias"] = torch.nn.Parameter(torch.zeros(7))
    kind, preset = KINDS[source]
    groups = [{"params": [("bias", params["bias"])], "algorithm": "adamw", "lr": 1.0}]
    groups.append({"params": [(name, params[name]) for name in reversed(SHAPES)], "lr": 1.0})
    return params, kind(groups, preset=preset, ns_dtype=torch.float32, **options)


NAMES = [*SHAPES, "bias"]


@pytest.mark.parametrize("source", KINDS)
def test_a_run_goes_on_as_the_rule_of_its_version(source):
    """In float64; with the AdamW that lies beside. Of a heavy ball the average is 1 - beta times what is saved."""
    version = f"{'adamuon' if source == 'adamuon' else 'normuon'} {KINDS[source][1]}"
    weights, runs, _ = after(version, 4)
    params, optimizer = ours(source, weights, bits=32)
    saved = saved_as(source, runs)
    before = copy.deepcopy(saved)
    optimizer.load_state_dict(quietly(saved, like=optimizer, source=source, names=NAMES))
    assert str(before) == str(saved)
    for name in SHAPES:
        state = optimizer.state[params[name]]
        m = torch.from_numpy(runs[name].m).float()
        assert_bitwise(state["momentum_buffer"], m * (1 - 0.95) if source == "dion" else m)
        assert_bitwise(state["second_moment"], torch.from_numpy(runs[name].v).float())
    state, group = optimizer.state[params["bias"]], optimizer.param_groups[0]
    assert (int(state["step"]), group["betas"], group["lr"], group["eps"]) == (4, (0.9, 0.95), 3e-4, 1e-10)
    assert_bitwise(state["exp_avg_sq"], torch.linspace(0.5, 1, 7))
    weights, runs, grads = after(version, 3, runs, weights, seed=1)
    for of_step in grads:
        for name, grad in of_step.items():
            params[name].grad = torch.from_numpy(grad).float()
        optimizer.step()
    for name, weight in weights.items():
        distance = np.linalg.norm(params[name].detach().double().numpy() - weight)
        assert distance < 2e-6 * np.linalg.norm(weight), (name, distance)


@pytest.mark.parametrize("source", KINDS)
def test_moments_in_bf16_come_into_8_bits_without_like(source):
    """V of elements by the nearest code of its root; of rows exactly."""
    version = f"{'adamuon' if source == 'adamuon' else 'normuon'} {KINDS[source][1]}"
    weights, runs, _ = after(version, 3)
    converted = quietly(saved_as(source, runs, torch.bfloat16), source=source, names=NAMES, block_size=64)
    params, optimizer = ours(source, weights, block_size=64, codebook="linear")
    optimizer.load_state_dict(quietly(converted, like=optimizer))
    for name in SHAPES:
        state, v = optimizer.state[params[name]], torch.from_numpy(runs[name].v).bfloat16()
        if source == "adamuon":
            root, scales = v.double().sqrt(), state["second_moment_scales"].double()
            assert ((state["second_moment_sqrt8"] * scales / 255 - root).abs() <= scales / 510 * 1.0001).all()
        else:
            assert_bitwise(state["second_moment"], v.float())
        m = torch.from_numpy(runs[name].m).bfloat16().double() * (0.05 if source == "dion" else 1)
        codes, scales = state["momentum_linear8"].double(), state["momentum_scales"].double()
        assert ((codes * scales / 127 - m).abs() <= scales / 254 * 1.0001).all()


def test_the_rules_are_those_of_the_presets():
    for rule, preset in (
        (family._NORMUON, NORMUON_PRESETS["official"]),
        (family._ADAMUON, ADAMUON_PRESETS["official"]),
        (family._DION_NORMUON, NORMUON_PRESETS["dion"]),
    ):
        said = rule.keys() & preset.keys()
        assert {key: rule[key] for key in said} == {key: preset[key] for key in said}
        assert preset.keys() - said <= {"momentum", "beta2", "cautious_weight_decay"} | (
            {"nesterov", "ns_coefficients", "ns_steps", "adjust_lr_fn"} if rule is family._DION_NORMUON else set()
        )


def changed(source, change):
    saved = saved_as(source, after(f"{'adamuon' if source == 'adamuon' else 'normuon'} official", 1)[1])
    change(saved)
    return saved


@pytest.mark.parametrize(
    ("said", "source", "change", "message"),
    [
        ("normuon", "jordan", dict, r"group 0 has beta2, as NorMuon has: give source \(--from\) normuon"),
        ("normuon", "muon8bit", dict, "was not saved by Muon8bit: give source .*normuon or adamuon"),
        ("dion", "torch", dict, r"saved by Dion's NorMuon or Muon: give source \(--from\) dion"),
        ("dion", "muon8bit", dict, r"saved by Dion's NorMuon or Muon: give source \(--from\) dion"),
        ("normuon", "dion", dict, "group 0 is none of Dion's NorMuon or Muon"),
        ("dion", "normuon", dict, "group 0 was saved by Dion's: give it as source"),
        ("normuon", "normuon", lambda s: s["param_groups"][0].pop("beta2"), "group 0 has no beta2"),
        ("dion", "dion", lambda s: s["param_groups"][0].update(algorithm="dion2"), r"algorithm 'dion2'\): start"),
        (
            "dion",
            "dion",
            lambda s: s["param_groups"][0].update(adjust_lr=None),
            "group 0 has adjust_lr=None, lr without",
        ),
        (
            "dion",
            "dion",
            lambda s: s["param_groups"][0].update(num_heads=4),
            r"num_heads=4 of matrices with \[24, 40\] rows",
        ),
        (
            "adamuon",
            "adamuon",
            lambda s: s["muon"]["param_groups"][0].update(beta2=0.999),
            "group 0 of muon has beta2=0.999, as the first version of AdaMuon, which took no signs",
        ),
        (
            "adamuon",
            "adamuon",
            lambda s: s["muon"]["state"][0].update(v_buffer=torch.ones(9)),
            r"state of wide: second_moment is torch.float32 \(9,\), expected",
        ),
        (
            "normuon",
            "normuon",
            lambda s: s["state"][0]["second_momentum_buffer"].fill_(-1),
            "state of wide: second_moment holds the negative number -1: the checkpoint is damaged",
        ),
        # As AdaMuon's Megatron code, which forgets V in a single process.
        ("adamuon", "adamuon", lambda s: s["muon"]["state"][1].pop("v_buffer"), "state of tall has no second moment"),
    ],
)
def test_what_another_saved_or_cannot_be_represented_is_refused(said, source, change, message):
    with pytest.raises(ValueError, match=message):
        quietly(changed(said, change), source=source, names=NAMES)


def test_a_lost_second_moment_starts_at_zero_by_an_explicit_choice():
    weights, runs, _ = after("adamuon official", 2)
    saved = saved_as("adamuon", runs)
    for state in saved["muon"]["state"].values():
        del state["v_buffer"]
    params, optimizer = ours("adamuon", weights)
    how = {"like": optimizer, "source": "adamuon", "names": NAMES}
    with pytest.raises(ValueError, match=r"let it start at zero by new_second_moment=True"):
        quietly(saved, **how)
    optimizer.load_state_dict(quietly(saved, **how, new_second_moment=True))
    assert not optimizer.state[params["wide"]]["second_moment_sqrt8"].any()
    assert optimizer.state[params["wide"]]["momentum_dynamic8"].any()


def test_dions_muon_heads_and_stacks_are_taken():
    """Heads of equal rows are pieces of rows; stacks are stacks; a plain Muon has no second moment."""
    _, runs, _ = after("normuon dion", 2)
    saved = saved_as("dion", runs)
    saved["param_groups"][0]["params"] = [0]
    saved["param_groups"].insert(1, {**saved["param_groups"][0], "params": [1], "algorithm": "muon"})
    saved["param_groups"][0] |= {"num_heads": 4, "cautious_wd": True, "adjust_lr": "rms_norm"}
    del saved["state"][1]["variance_neuron"]
    saved["state"][1]["momentum"] = torch.ones(3, 8, 24)
    with pytest.warns(UserWarning, match="group 0 does not say its Newton-Schulz: taken as Dion's default"):
        converted = convert_state_dict(saved, source="dion", names=NAMES)
    first, second, _ = converted["param_groups"]
    assert (first["split_sizes"], first["split_dim"], first["second_moment"]) == ((6,) * 4, -2, "row")
    assert (first["cautious_weight_decay"], first["adjust_lr_fn"]) == (True, "match_rms_adamw")
    assert (second["split_sizes"], second["second_moment"], second["adjust_lr_fn"]) == (None, None, "spectral")
    assert converted["state"][0]["second_moment"].shape == (24, 1)
    params = [torch.nn.Parameter(torch.ones(shape)) for shape in ((24, 40), (3, 8, 24), (7,))]
    groups = [{"params": [("wide", params[0])], "split_sizes": (6,) * 4, "second_moment": "row"}]
    groups += [{"params": [("tall", params[1])]}, {"params": [("bias", params[2])], "algorithm": "adamw", "lr": 1.0}]
    optimizer = Muon8bit(groups)
    optimizer.load_state_dict(converted)
    assert optimizer.state[params[1]]["momentum_scales"].shape == (3, 8, 1)
    saved["state"][1]["momentum"] = torch.ones(3, 2, 4, 24)
    with pytest.raises(ValueError, match="has 4 dimensions: only matrices come from Dion's heavy-ball"):
        quietly(saved, source="dion", names=NAMES)


def test_the_command_reads_them(tmp_path, capsys):
    _, runs, _ = after("adamuon official", 2)
    saved = saved_as("adamuon", runs)
    for part in ("muon", "adamw"):
        torch.save(saved[part], tmp_path / f"{part}.pt")
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    words = [
        "convert",
        tmp_path / "muon.pt",
        tmp_path / "out.pt",
        "--from",
        "adamuon",
        "--names",
        tmp_path / "names.txt",
    ]
    assert main([*map(str, words), "--adamw", str(tmp_path / "adamw.pt"), "--codebook", "dynamic"]) == 0
    assert "the momentum was converted from AdaMuon's to bits=8" in capsys.readouterr().out
    params, optimizer = ours("adamuon", after("adamuon official", 2)[0])
    optimizer.load_state_dict(quietly(torch.load(tmp_path / "out.pt", weights_only=True), like=optimizer))
    assert optimizer.state[params["wide"]]["second_moment_sqrt8"].any()

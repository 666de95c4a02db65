"""The baselines train a model with stacked experts too, and options reach the optimizer."""

import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import routing_models
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from finetune.config.errors import InputError
from finetune.config.options import PRESETS
from finetune.config.recipe import Recipe, recipe_from
from finetune.models.build import build_model, model_config
from finetune.models.optimizers import build_optimizers
from muon8bit import AdaMuon8bit, NorMuon8bit, choices
from muon8bit.config import DEFAULT_STEP_TIMEOUT, MAX_STEP_TIMEOUT
from muon8bit.estimate import Setup
from muon8bit.family import ADAMUON_PRESETS, NORMUON_PRESETS
from muon8bit.step import adamw8bit

SIZES = {"vocab_size": 97, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_local_experts": 2}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 2, "model_type": "mixtral"}


def mixtral(**more) -> nn.Module:
    config = AutoConfig.for_model(**SIZES | more)
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("kind", ["muon8bit", "muon", "adamw"])
def test_every_parameter_of_a_mixture_of_experts_is_trained_once(kind):
    model = mixtral()
    optimizers = build_optimizers(model, Recipe(name="moe", model=SIZES, optimizer=kind))
    held = [param for optimizer in optimizers for group in optimizer.param_groups for param in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == set(model.parameters())
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    before = [param.detach().clone() for param in held]
    for optimizer in optimizers:
        optimizer.step()
    assert not any(torch.equal(old, new) for old, new in zip(before, held, strict=True))
    is_muon = [type(optimizer).__name__ == "Muon" for optimizer in optimizers]
    stacked = {i for i, o in enumerate(optimizers) for g in o.param_groups for p in g["params"] if p.ndim == 3}
    assert not any(is_muon[i] for i in stacked)


LLAMA = {"model_type": "llama", "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
LLAMA |= {"num_attention_heads": 2, "num_key_value_heads": 2}
# Of a matrix, the head, the embedding and a norm at four times the width: lr and decay, of 1 and .5; without a rule.
UNSCALED = ((1, 0.5), (1, 0.5), (1, 0.5), (1, 0))
SCALED = {
    "muon8bit": ((1 / 2, 1 / 4), (1 / 4, 1 / 2), (1, 1 / 8), (1, 0)),
    "muon": ((1 / 2, 1 / 4), (1 / 4, 1 / 2), (1, 1 / 8), (1, 0)),
    "adamw": ((1 / 4, 1 / 2), (1 / 4, 1 / 2), (1, 1 / 8), (1, 0)),
    "adamw8bit": ((1 / 4, 1 / 2), (1 / 4, 1 / 2), (1, 1 / 8), (1, 0)),
    "normuon8bit": ((1 / 2, 1 / 4), (1 / 4, 1 / 2), (1, 1 / 8), (1, 0)),
    "normuon8bit dion": ((1, 1 / 8), (1 / 4, 1 / 2), (1, 1 / 8), (1, 0)),
    "adamuon8bit": ((1 / 4, 1 / 2), (1 / 4, 1 / 2), (1, 1 / 8), (1, 0)),
}


@pytest.mark.parametrize("kind", SCALED)
@pytest.mark.parametrize("width", [32, 128])
def test_every_optimizer_gets_the_rates_of_the_width(kind, width):
    name, _, preset = kind.partition(" ")
    values = {"name": "wide", "model": LLAMA, "optimizer": name, "preset": preset or None, "lr": 1.0}
    values |= {"weight_decay": 0.5, "width": width, "adamw_lr": 1.0}
    made = {}
    for scaling in ("none", "spectral"):
        recipe = recipe_from({**values, "scaling": scaling}, "a test")
        torch.manual_seed(0)
        model = build_model(recipe, model_config(recipe), SimpleNamespace(eos_token_id=0, pad_token_id=0), "cpu")
        rates = {
            p: (g["lr"], g["weight_decay"])
            for o in build_optimizers(model, recipe)
            for g in o.param_groups
            for p in g["params"]
        }
        layer, sds = model.model.layers[0], [p.std().item() for p in (model.lm_head.weight, model.model.norm.weight)]
        parts = (layer.mlp.up_proj, model.lm_head, model.model.embed_tokens, layer.input_layernorm)
        made[scaling] = tuple(rates[part.weight] for part in parts), sds
    assert made["none"][0] == UNSCALED
    if width == 32:
        assert made["spectral"] == made["none"]
    else:
        for found, expected in zip(made["spectral"][0], SCALED[kind], strict=True):
            assert found == pytest.approx(expected, rel=1e-9)
        assert made["spectral"][1][0] == pytest.approx(made["none"][1][0] / 4, rel=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"optimizer": "muon", "model": SIZES | {"intermediate_size": 32}},
            "muon trains stacked experts as model.layers",
        ),
        ({"optimizer": "normuon8bit", "preset": "modded", "adamw_lr": 1e-3}, "preset modded of normuon8bit decays"),
        ({"init_from": "gpt2"}, "fresh weights, and --init-from brings some"),
    ],
)
def test_a_rule_of_width_is_refused_by_name_where_there_is_none(change, words):
    def use():
        recipe = recipe_from({"name": "x", "model": LLAMA, "scaling": "spectral", **change}, "a test")
        build_optimizers(AutoModelForCausalLM.from_config(model_config(recipe)), recipe)

    with pytest.raises(InputError, match=f"--scaling: .*{words}"):
        use()


@pytest.mark.parametrize(("rounding", "moved"), [(None, True), ("stochastic", True), ("nearest", False)])
def test_updates_too_small_for_bf16_move_its_weights_unless_rounded_to_nearest(rounding, moved):
    torch.manual_seed(0)
    model = mixtral().bfloat16()
    recipe = Recipe(name="moe", model=SIZES, lr=1e-6, weight_decay=0.0, param_rounding=rounding)
    (optimizer,) = build_optimizers(model, recipe)
    large = [param for param in model.parameters() if param.ndim == 1 or param.ndim == 3]
    for param in large:  # half a unit in the last place of 1 is 2e-3
        torch.nn.init.ones_(param)
        param.grad = torch.randn_like(param)
    before = [param.detach().clone() for param in large]
    for _ in range(20):
        optimizer.step()
    assert any(not torch.equal(old, new) for old, new in zip(before, large, strict=True)) == moved


@pytest.mark.parametrize(("bits", "expected"), [(8, 2 * 4800 + 2 * 4 * 19), (32, 8 * 4800)])
def test_moments_in_8_bits_and_state_on_the_host_reach_the_optimizer(bits, expected):
    """By hand: two codes an element and two fp32 scales for 256 elements, or two fp32 moments."""
    model = mixtral(vocab_size=300)  # 4800 elements in the embedding
    (optimizer,) = build_optimizers(model, Recipe(name="moe", model=SIZES, adamw_bits=bits, state_device="cpu"))
    assert optimizer.state_device == "cpu"
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    state = optimizer.state[model.get_input_embeddings().weight]
    assert sum(value.nbytes for key, value in state.items() if key != "step") == expected


@pytest.mark.parametrize("asked", [True, False])
def test_cautious_weight_decay_reaches_every_group(asked):
    recipe = recipe_from({"name": "moe", "model": SIZES, "cautious_weight_decay": asked}, "the test")
    (optimizer,) = build_optimizers(mixtral(), recipe)
    assert {group["algorithm"] for group in optimizer.param_groups} == {"muon", "adamw"}
    assert all(group["cautious_weight_decay"] is asked for group in optimizer.param_groups)


@pytest.mark.parametrize(
    ("optimizer", "preset", "keys"),
    [
        ("normuon8bit", None, ("row", "rms", None, 1e-8, False)),
        ("normuon8bit", "official", ("row", "keep", "original", 1e-10, False)),
        ("normuon8bit", "dion", ("row", "keep", "spectral", 1e-8, False)),
        ("normuon8bit", "modded", ("shape", "keep", "original", 1e-10, True)),
        ("adamuon8bit", None, ("element", "rms", None, 1e-8, False)),
        ("adamuon8bit", "official", ("element", "rms", None, 1e-8, False)),
    ],
)
@pytest.mark.parametrize("bits", [8, 32])
def test_a_preset_and_bits_reach_every_group_of_matrices(optimizer, preset, keys, bits):
    values = {"name": "moe", "model": SIZES, "optimizer": optimizer, "preset": preset, "bits": bits, "adamw_lr": 1e-3}
    (made,) = build_optimizers(mixtral(), recipe_from(values, "the test"))
    assert type(made) is {"normuon8bit": NorMuon8bit, "adamuon8bit": AdaMuon8bit}[optimizer]
    assert made.preset == (preset or "paper")
    names = ("second_moment", "rescale", "adjust_lr_fn", "second_moment_eps", "cautious_weight_decay")
    groups = [group for group in made.param_groups if group["algorithm"] == "muon"]
    assert len(groups) > 1
    codebook = "dynamic" if optimizer == "adamuon8bit" else "linear"
    for group in groups:
        assert tuple(group[name] for name in names) == keys
        assert (group["bits"], group["codebook"]) == (bits, codebook)
    (linear,) = build_optimizers(mixtral(), recipe_from({**values, "codebook": "linear"}, "the test"))
    assert {group["codebook"] for group in linear.param_groups if group["algorithm"] == "muon"} == {"linear"}


def test_muon8bit_has_bits_too_and_the_scripts_know_all_presets():
    (made,) = build_optimizers(mixtral(), recipe_from({"name": "moe", "model": SIZES, "bits": 32}, "the test"))
    assert {group["bits"] for group in made.param_groups if group["algorithm"] == "muon"} == {32}
    assert {"normuon8bit": tuple(NORMUON_PRESETS), "adamuon8bit": tuple(ADAMUON_PRESETS)} == PRESETS == choices.PRESETS
    for name, keys in NORMUON_PRESETS.items():
        assert Setup(preset=name).normuon_moment == keys["second_moment"]
    for presets in (NORMUON_PRESETS, ADAMUON_PRESETS):  # by which --cautious-weight-decay is refused
        assert [name for name, keys in presets.items() if keys["cautious_weight_decay"]] in (["modded"], [])


def test_how_long_a_rank_waits_reaches_the_optimizer_and_is_bounded_as_there():
    for seconds in (MAX_STEP_TIMEOUT - 1.0, 0.5):
        recipe = recipe_from({"name": "moe", "model": SIZES, "step_timeout": seconds}, "the test")
        (optimizer,) = build_optimizers(mixtral(), recipe)
        assert optimizer.step_timeout == seconds
    (optimizer,) = build_optimizers(mixtral(), Recipe(name="moe", model=SIZES))
    assert optimizer.step_timeout == DEFAULT_STEP_TIMEOUT
    with pytest.raises(InputError, match="--step-timeout"):
        recipe_from({"name": "moe", "model": SIZES, "step_timeout": MAX_STEP_TIMEOUT}, "the test")


def test_bitsandbytes_that_is_missing_is_an_error_of_the_option(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    adamw8bit.check_available.cache_clear()
    with pytest.raises(InputError, match=r"--adamw-bits: .*bitsandbytes"):
        build_optimizers(mixtral(), Recipe(name="moe", model=SIZES, adamw_bits=8))
    adamw8bit.check_available.cache_clear()


def test_heads_and_routers_reach_muon_and_are_refused_elsewhere():
    """torch.optim.Muon cuts no matrix, but takes routers; AdamW alone has neither."""
    values = {"name": "mla", "model": SIZES, "routers": "muon"}
    model = routing_models.latent()
    gate = model.model.layers[1].mlp.gate.weight
    (optimizer,) = build_optimizers(model, recipe_from(values | {"split_heads": "head_kv"}, "the test"))
    by_name = {n: g for g in optimizer.param_groups for n in g["param_names"]}
    assert by_name["model.layers.0.self_attn.kv_b_proj.weight"]["split_sizes"] == (4, 8) * 4
    assert by_name["model.layers.0.self_attn.q_b_proj.weight"]["split_sizes"] == (8,) * 4
    assert by_name["model.layers.1.mlp.gate.weight"]["algorithm"] == "muon"
    (plain,) = build_optimizers(model, recipe_from({"name": "mla", "model": SIZES}, "the test"))
    sizes = {g["split_sizes"] for g in plain.param_groups if g["algorithm"] == "muon"}
    assert sizes == {None, (8, 8)}  # gate and up projections of the experts
    muon, _ = build_optimizers(model, recipe_from(values | {"optimizer": "muon"}, "the test"))
    assert any(param is gate for group in muon.param_groups for param in group["params"])
    for changes, option in (
        ({"optimizer": "muon", "split_heads": "head"}, "--split-heads"),
        ({"optimizer": "adamw"}, "--routers"),
        ({"split_heads": "heads"}, "--split-heads"),
        ({"routers": "none"}, "--routers"),
    ):
        with pytest.raises(InputError, match=option):
            recipe_from(values | changes, "the test")
    for changes, option in (({"split_heads": "head"}, "--split-heads: .*no MLA"), ({"routers": "muon"}, "--routers: ")):
        recipe = recipe_from({"name": "llama", "model": SIZES} | changes, "the test")
        with pytest.raises(InputError, match=option):
            build_optimizers(routing_models.llama(), recipe)

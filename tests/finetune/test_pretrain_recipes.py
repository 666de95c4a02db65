"""Every shipped recipe is valid, and builds a model as large as its name says."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from finetune.config.errors import InputError
from finetune.config.reading import RECIPES
from finetune.config.recipe import DEFAULT_RECIPE, read_recipe, recipe_from
from finetune.config.width import model_of_width
from finetune.models.build import model_config
from finetune.models.transfer import transferred

NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))
ARCHITECTURES = ("gqa", "mla", "qwen3_moe", "mla_moe")
SIZES = ("4m", "30m", "100m", "200m")


def active_parameters(name):
    """Count by hand what a token passes through: of the routed experts top_k, everything else whole."""
    config = model_config(read_recipe(name))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    active = 0
    for key, param in model.named_parameters():
        routed = ".experts." in key
        assert not routed or param.shape[0] == config.num_local_experts
        active += param.numel() * config.num_experts_per_tok // param.shape[0] if routed else param.numel()
    return active


@pytest.mark.parametrize("name", NAMES)
def test_recipe_is_valid_and_builds_a_model_of_its_size(name):
    recipe = read_recipe(name)
    assert recipe.name == name
    size = name.split("_")[-1]
    named = float(size[:-1]) * (1000 if size.endswith("b") else 1)
    assert active_parameters(name) / 1e6 == pytest.approx(named, rel=0.16)


# Sizes beside the width of a small model of each kind, and those that it has at three times the width.
AT_THREE_TIMES = {
    "llama": (
        {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 88},
        {"hidden_size": 96, "num_attention_heads": 12, "num_key_value_heads": 6, "intermediate_size": 264},
    ),
    "qwen3": (
        {"hidden_size": 32, "num_attention_heads": 1, "num_key_value_heads": 1, "intermediate_size": 7, "head_dim": 64},
        {"hidden_size": 96, "num_attention_heads": 3, "num_key_value_heads": 3, "intermediate_size": 21},
    ),
    "mixtral": (
        {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 40},
        {"hidden_size": 96, "num_attention_heads": 12, "num_key_value_heads": 12, "intermediate_size": 120},
    ),
    "deepseek_v3": (
        {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 48}
        | {"moe_intermediate_size": 16, "q_lora_rank": 24, "kv_lora_rank": 8, "n_routed_experts": 4},
        {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 6, "intermediate_size": 144}
        | {"moe_intermediate_size": 48},
    ),
    "gpt2": ({"n_embd": 32, "n_head": 4}, {"n_embd": 96, "n_head": 12}),
}


@pytest.mark.parametrize("kind", AT_THREE_TIMES)
def test_a_width_scales_heads_and_intermediate_sizes_and_nothing_else(kind):
    given, wider = AT_THREE_TIMES[kind]
    values = {"name": "x", "model": {"model_type": kind, "vocab_size": 99, **given}}
    (own, same, wide) = (
        model_config(recipe_from({**values, "width": width}, "a test")).to_dict() for width in (None, 32, 96)
    )
    assert same == own
    assert {key: value for key, value in wide.items() if value != own[key]} == wider
    assert wide["hidden_size" if kind != "gpt2" else "n_embd"] == 96


@pytest.mark.parametrize(
    ("change", "width", "words"),
    [
        ({}, 100, "16 heads and 4 KV heads at width 256, .* at 100; the nearest that work: 64 and 128"),
        ({}, 32, "the nearest that work: 64$"),  # two heads, and neither half a KV head nor four of them
        ({"num_key_value_heads": 1}, 24, "the nearest that work: 16 and 32"),
        ({"hidden_size": None}, 64, "states no hidden_size"),
        ({"intermediate_size": 0}, 64, "states no intermediate_size"),
        ({"num_key_value_heads": 0}, 64, "states no num_key_value_heads"),  # 8 by default, and 4 heads
    ],
)
def test_a_width_that_the_model_cannot_have_is_refused(change, width, words):
    sizes = {"hidden_size": 256, "num_attention_heads": 16, "num_key_value_heads": 4, "intermediate_size": 512}
    model = {key: value for key, value in (sizes | change).items() if value != 0}
    with pytest.raises(InputError, match=f"--width: .*{words}"):
        model_config(recipe_from({"name": "x", "model": {"model_type": "mixtral", **model}, "width": width}, "a test"))


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("_4m")])
def test_every_small_recipe_has_other_widths_with_a_rule(name):
    width = read_recipe(name).model["hidden_size"]
    rows = transferred(name, {"width": 2 * width, "scaling": "spectral"})["parameters"]
    hidden = [row for row in rows if row["role"] == "hidden"]
    assert hidden
    for row in hidden:  # what is lr on the raw O follows sqrt(outputs / inputs), with 0.2 sqrt(max) divided out
        (rows_, cols), (base_rows, base_cols) = row["shape"][-2:], row["base_shape"][-2:]
        asked = ((rows_ / base_rows) / (cols / base_cols)) ** 0.5 / (
            max(rows_, cols) / max(base_rows, base_cols)
        ) ** 0.5
        assert row["lr"] / row["base_lr"] == pytest.approx(asked, rel=1e-9), row["parameter"]


def test_kv_heads_stay_where_they_cannot_scale_but_divide_the_heads():
    model = {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 8, "num_key_value_heads": 2}
    wide = model_of_width({**model, "intermediate_size": 64}, 80)
    assert (wide["num_attention_heads"], wide["num_key_value_heads"]) == (20, 5)
    narrow = model_of_width({**model, "num_key_value_heads": 1, "intermediate_size": 64}, 48)
    assert (narrow["num_attention_heads"], narrow["num_key_value_heads"], narrow["intermediate_size"]) == (12, 1, 96)


def test_sizes_reach_from_the_default_to_over_a_billion():
    assert DEFAULT_RECIPE in NAMES
    assert any(name.endswith("b") for name in NAMES)
    assert read_recipe(DEFAULT_RECIPE).dataset == "stdlib"  # no download


@pytest.mark.parametrize("size", SIZES)
def test_architectures_of_one_size_have_equal_active_parameters_and_training(size):
    names = [f"{kind}_{size}" for kind in (*ARCHITECTURES, *(("mixtral",) if size == "4m" else ()))]
    counts = {name: active_parameters(name) for name in names}
    assert max(counts.values()) < 1.02 * min(counts.values()), counts
    if size == "4m":
        assert counts["gqa_4m"] == pytest.approx(active_parameters(DEFAULT_RECIPE), rel=0.02)
        names.append(DEFAULT_RECIPE)
    own = ("name", "model", "router_aux_loss", "router_bias_rate")
    options = [{k: v for k, v in vars(read_recipe(name)).items() if k not in own} for name in names]
    assert all(one == options[0] for one in options)

"""The architectures of the recipes: estimated, routed, and in tiny pretrained, resumed, tuned and generating."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from helpers.architectures import TINY
from helpers.bitwise import assert_nested_equal
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from finetune import merge
from finetune.config.reading import RECIPES
from finetune.config.recipe import read_recipe
from finetune.models.build import model_config
from muon8bit import param_groups
from muon8bit.estimate import load_config
from muon8bit.estimate.token_costs import TokenCosts, active_parameters, token_costs

NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))


def meta_model(name):
    config = model_config(read_recipe(name))
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config), config


def active_by_hand(c):
    """Ends, then for each layer attention with its norms and the feed-forward part: of routed experts top_k."""
    d, heads = c.hidden_size, c.num_attention_heads
    if c.model_type == "deepseek_v3":
        nope, rope, v, rank = c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim, c.kv_lora_rank
        attention = d * heads * (nope + rope) + d * (rank + rope) + rank + rank * heads * (nope + v) + heads * v * d
    else:
        head = getattr(c, "head_dim", None) or d // heads
        attention = 2 * d * heads * head + 2 * d * c.num_key_value_heads * head
        attention += 2 * head if c.model_type == "qwen3_moe" else 0
    dense, routed = 3 * d * c.intermediate_size, 0
    num_dense = getattr(c, "first_k_dense_replace", c.num_hidden_layers if c.model_type == "llama" else 0)
    if num_dense < c.num_hidden_layers:
        width = c.intermediate_size if c.model_type == "mixtral" else c.moe_intermediate_size
        shared = getattr(c, "n_shared_experts", 0)
        routed = d * c.num_local_experts + 3 * d * width * (c.num_experts_per_tok + shared)
    num_moe = c.num_hidden_layers - num_dense
    return (c.vocab_size + 1) * d + c.num_hidden_layers * (attention + 2 * d) + num_dense * dense + num_moe * routed


@pytest.mark.parametrize("name", NAMES)
def test_estimate_counts_what_a_token_takes_as_by_hand(name):
    """Keys and values of every KV head, or the latent and the rotated key that all heads share; in fp32."""
    model, config = meta_model(name)
    given = load_config(read_recipe(name).model)  # of `muon8bit estimate --recipe`
    assert {**given.to_dict(), "dtype": None} == {**config.to_dict(), "dtype": None}
    kept = 2 * config.num_key_value_heads * (getattr(config, "head_dim", None) or 0)
    if config.model_type == "deepseek_v3":
        kept = config.kv_lora_rank + config.qk_rope_head_dim
        assert kept == 0.625 * 2 * 2 * config.v_head_dim  # of the GQA control, which has 2 KV heads
    assert active_parameters(model, config) == active_by_hand(config)
    if name.endswith(("_4m", "_30m")):  # a pass of the larger ones takes longer, and is one of more layers
        assert token_costs(model, config) == TokenCosts(active_by_hand(config), config.num_hidden_layers * kept * 4)


MUON = {*("q_proj", "k_proj", "v_proj", "o_proj", "kv_a_proj_with_mqa", "kv_b_proj"), "gate_up_proj"}
MUON |= {"gate_proj", "up_proj", "down_proj"}
ADAMW = {"embed_tokens", "norm", "input_layernorm", "post_attention_layernorm", "q_norm", "k_norm", "kv_a_layernorm"}
ADAMW |= {"gate"}


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("_4m")])
def test_every_weight_of_a_recipe_goes_where_the_hand_written_list_says(name):
    model, _ = meta_model(name)
    seen = set()
    for route in param_groups(model, lr=1e-3).routes:
        kind = route.name.removesuffix(".weight").rpartition(".")[2]
        seen.add(kind)
        assert route.algorithm == ("muon" if kind in MUON else "adamw" if kind in ADAMW else "nothing"), route.name
        rows = route.shape[-2] // 2 if kind == "gate_up_proj" else None
        assert route.split == (None if rows is None else ((rows, rows), -2)), route.name
    assert "gate_up_proj" in seen or "experts" not in str(model)


# How the model that each was pretrained to is tuned; every one was once, in every way.
TUNED = {"mla": "qlora", "qwen3_moe": "full", "mla_moe": "lora", "mixtral": "qlora"}
# In a class with stacked experts peft takes the names of dense matrices for those of experts.
LEFT_OUT = {"mla": "6 linear layers have no adapter", "mla_moe": "6 linear layers have no adapter"}


@pytest.mark.parametrize("name", TINY)
def test_a_tiny_architecture_pretrains_resumes_and_is_tuned_merged_and_generates(
    name, recipe_file, pretrain, sft, command, tmp_path
):
    """To the bit where it is resumed; a bias of the router, which no gradient reaches, stays in what is saved."""
    (tmp_path / "tiny.yaml").write_text(
        yaml.safe_dump({**yaml.safe_load(recipe_file.read_text()), "model": TINY[name]})
    )

    def twice(script, folder, *options):
        done = script(*options, "--output-dir", folder)
        assert done.code == 0, done.err
        hashes = json.loads((tmp_path / folder / "result.json").read_text())["parameter_hashes"]
        (tmp_path / folder / "checkpoints" / "step-0000006").rename(tmp_path / folder / "lost")
        resumed = script("--resume", folder)
        assert resumed.code == 0, resumed.err
        assert "at step 3" in resumed.out
        assert json.loads((tmp_path / folder / "result.json").read_text())["parameter_hashes"] == hashes
        return done.out

    twice(pretrain, "run", "--recipe", "tiny.yaml")
    file = tmp_path / "run" / "model" / "model.safetensors"
    weights = load_file(file)
    biases = [key for key in weights if "e_score_correction_bias" in key]
    assert len(biases) == (name == "mla_moe")
    weights |= {key: torch.tensor([0.2501, -0.5003, 0.7501, 0.0]) for key in biases}  # of more digits than bf16 has
    save_file(weights, file, {"format": "pt"})
    merging = [] if TUNED[name] == "full" else ["--merge"]
    told = twice(sft, "tuned", "--model", "run/model", "--mode", TUNED[name], "--chat-template", "tulu", *merging)
    assert LEFT_OUT.get(name, "") in told
    assert ("no adapter" in told) == (name in LEFT_OUT)
    after = load_file(tmp_path / "tuned" / "model" / "model.safetensors")
    assert after.keys() == weights.keys()
    assert_nested_equal([after[key] for key in biases], [weights[key] for key in biases])
    if biases:
        assert command(merge.main, "tuned", "--output", "half", "--dtype", "bf16").code == 0
        half = load_file(tmp_path / "half" / "model.safetensors")
        assert half["model.norm.weight"].dtype == torch.bfloat16
        assert_nested_equal([half[key] for key in biases], [weights[key] for key in biases])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned" / "model", dtype=torch.float32)
    ids, how = torch.tensor([[5, 80, 33, 120]]), {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(ids, use_cache=True, **how), model.generate(ids, use_cache=False, **how))

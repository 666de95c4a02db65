"""param_groups on real transformers models built tiny from configs, and on plain modules."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from muon8bit import Muon8bit
from muon8bit.config import DEFAULT_ADAMW_BETAS, DEFAULT_ADAMW_EPS
from muon8bit.routing.groups import ParamGroups, Route, param_groups

VOCABULARY = 97
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 48,  # three times the hidden size: must not look like a fused QKV
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts_per_tok": 1, "moe_intermediate_size": 8}
DEEPSEEK = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 8}
DEEPSEEK |= {"kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}


def causal_lm(model_type: str, **changes: Any) -> nn.Module:
    with torch.device("meta"):  # routing reads names, modules and shapes: values are not needed
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SIZES | changes))


def by_name(groups: ParamGroups) -> dict[str, Route]:
    return {route.name: route for route in groups.routes}


def names_for(groups: ParamGroups, algorithm: str | None) -> set[str]:
    return {route.name for route in groups.routes if route.algorithm == algorithm}


def leaf_names(names: set[str]) -> set[str]:
    """The last component that is not `weight`, layers merged: `q_proj` for `model.layers.0.self_attn.q_proj.weight`."""
    return {name.removesuffix(".weight").rpartition(".")[2] for name in names}


ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
MLP = {"gate_proj", "up_proj", "down_proj"}
EXPERT_WEIGHTS = {"gate_up_proj", "down_proj"}
MODELS = {
    "llama": ({}, ATTENTION | MLP, set()),
    "qwen3": ({"head_dim": 8}, ATTENTION | MLP, set()),
    "mixtral": ({"num_local_experts": 2}, ATTENTION | EXPERT_WEIGHTS, set()),
    "qwen2_moe": (
        EXPERTS | {"num_experts": 2, "shared_expert_intermediate_size": 8},
        ATTENTION | MLP | EXPERT_WEIGHTS,
        set(),
    ),
    "qwen3_moe": (EXPERTS | {"num_experts": 2, "head_dim": 8}, ATTENTION | EXPERT_WEIGHTS, set()),
    "deepseek_v3": (
        EXPERTS | DEEPSEEK,
        {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"} | MLP | EXPERT_WEIGHTS,
        {"kv_a_proj_with_mqa"},
    ),
    "gpt_neox": (
        {},
        {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
        {"query_key_value"},
    ),
    "phi3": ({}, {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}, set()),
    "gpt2": ({"n_inner": 48}, {"c_attn", "c_proj", "c_fc"}, set()),
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", MODELS)
def test_muon_set_matches_hand_written_list(model_type: str, tied: bool) -> None:
    changes, muon, fused = MODELS[model_type]
    groups = param_groups(causal_lm(model_type, tie_word_embeddings=tied, **changes), lr=1e-3)
    assert leaf_names(names_for(groups, "muon")) == muon
    flagged = {route.name for route in groups.routes if "fused" in route.flag}
    assert leaf_names(flagged) == fused
    head = [route for route in groups.routes if "lm_head.weight" in (route.name, *route.aliases)]
    assert [route.algorithm for route in head] == ["adamw"]
    assert ("shared with lm_head.weight" in head[0].reason) == tied


@pytest.mark.parametrize("model_type", MODELS)
def test_groups_hold_every_trainable_parameter_once(model_type: str) -> None:
    model = causal_lm(model_type, tie_word_embeddings=True, **MODELS[model_type][0])
    groups = param_groups(model, lr=1e-3, weight_decay=0.05)
    grouped = [param for group in groups for _, param in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == set(model.parameters())
    own = dict(model.named_parameters(remove_duplicate=False))
    assert all(own[name] is param for group in groups for name, param in group["params"])
    for group in groups:
        is_muon = group["algorithm"] == "muon"
        decay = {0.05 if is_muon or (p.ndim > 1 and "wpe" not in name) else 0.0 for name, p in group["params"]}
        assert decay == {group["weight_decay"]}


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3"])
def test_moe_routers_go_to_adamw_and_stacked_experts_to_muon(model_type: str) -> None:
    routes = by_name(param_groups(causal_lm(model_type, **MODELS[model_type][0]), lr=1e-3))
    routers = {name for name, route in routes.items() if route.reason == "MoE router"}
    wanted = {"gate", "shared_expert_gate"} if model_type == "qwen2_moe" else {"gate"}
    assert leaf_names(routers) == wanted
    stacked = [route for route in routes.values() if len(route.shape) == 3]
    assert leaf_names({route.name for route in stacked}) == EXPERT_WEIGHTS
    assert all(route.algorithm == "muon" and route.reason.startswith("stacked experts") for route in stacked)
    assert not any(route.flag for route in stacked)


# Which parameters lie in which split, by the modeling source in transformers 5.23.
SPLITS: dict[str, tuple[dict[str, Any], dict[str, tuple[tuple[int, ...], int]]]] = {
    "mixtral": ({}, {"experts.gate_up_proj": ((48, 48), -2)}),
    "qwen2_moe": ({}, {"experts.gate_up_proj": ((8, 8), -2)}),
    "qwen3_moe": ({}, {"experts.gate_up_proj": ((8, 8), -2)}),
    "deepseek_v3": ({}, {"experts.gate_up_proj": ((8, 8), -2)}),
    "llama4_text": (
        {"num_local_experts": 2, "interleave_moe_layer_step": 1, "head_dim": 8},
        {"experts.gate_up_proj": ((48, 48), -1)},
    ),
    "phi3": (
        {"num_attention_heads": 4, "num_key_value_heads": 2},
        {"qkv_proj.weight": ((16, 8, 8), -2), "gate_up_proj.weight": ((48, 48), -2)},
    ),
    "glm": ({"head_dim": 8}, {"gate_up_proj.weight": ((48, 48), -2)}),
    "gpt2": ({}, {"c_attn.weight": ((16, 16, 16), -1)}),
    "gpt_oss": ({"num_local_experts": 2, "head_dim": 8}, {}),
    "gpt_neox": ({}, {}),
    "codegen": ({"n_embd": 32, "n_head": 4, "rotary_dim": 4}, {}),
    "llama": ({}, {}),
}


@pytest.mark.parametrize("model_type", SPLITS)
def test_known_fused_weights_get_their_own_groups_and_splits(model_type: str) -> None:
    changes, wanted = SPLITS[model_type]
    groups = param_groups(causal_lm(model_type, **MODELS.get(model_type, ({},))[0] | changes), lr=1e-3)
    found: dict[str, tuple[tuple[int, ...], int]] = {}
    for group in groups:
        for name, param in group["params"]:
            if "split_sizes" not in group:
                continue
            (suffix,) = (suffix for suffix in wanted if name.endswith(suffix))
            found[suffix] = group["split_sizes"], group["split_dim"]
            assert sum(group["split_sizes"]) == param.shape[group["split_dim"]]
    assert found == wanted
    kinds = [group["algorithm"] for group in groups]
    assert kinds == sorted(kinds, reverse=True)  # muon first, then adamw
    assert "split_sizes" not in groups[0]
    for route in groups.routes:
        assert ("split" in route.reason) == any(route.name.endswith(suffix) for suffix in wanted)


def test_alternating_gate_and_up_are_flagged_not_split() -> None:
    """gpt-oss keeps gate and up in alternate columns: no contiguous pieces."""
    routes = by_name(param_groups(causal_lm("gpt_oss", **SPLITS["gpt_oss"][0]), lr=1e-3))
    fused = {route.name for route in routes.values() if "fused" in route.flag}
    assert leaf_names(fused) == {"gate_up_proj"}
    assert all(routes[name].algorithm == "muon" for name in fused)


@pytest.mark.parametrize("model_type", ["mixtral", "phi3", "gpt2", "llama4_text"])
def test_pieces_of_known_fused_weights_are_those_of_the_forward_pass(model_type: str) -> None:
    """With the gate zero, silu(0) = 0 leaves the up projection and nothing else without a gradient; with the values
    zero, queries and keys: any other border would mix them."""
    changes = MODELS.get(model_type, ({},))[0] | SPLITS[model_type][0]
    config = AutoConfig.for_model(model_type, **SIZES | changes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    groups = param_groups(model, lr=1e-3)
    fused = [(n, p, g) for g in groups if "split_sizes" in g for n, p in g["params"]]
    assert fused
    for name, param, group in fused:
        zeroed, without_grad = (2, [0, 1]) if len(group["split_sizes"]) == 3 else (0, [1])
        original = param.detach().clone()
        with torch.no_grad():
            param.split(group["split_sizes"], group["split_dim"])[zeroed].zero_()
        model.zero_grad()
        tokens = torch.arange(3, 15)[None]
        model(tokens, labels=tokens).loss.backward()
        pieces = param.grad.split(group["split_sizes"], group["split_dim"])
        assert [i for i, piece in enumerate(pieces) if not piece.any()] == without_grad, name
        with torch.no_grad():
            param.copy_(original)


class Vision(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 8, 3), nn.Linear(8, 8)
        self.table = nn.Parameter(torch.zeros(4, 8, 16))


def test_convolutions_go_to_adamw_and_flattened_to_muon_where_a_pattern_says_so() -> None:
    routes = by_name(param_groups(Vision(), lr=1e-3))
    assert (routes["conv.weight"].algorithm, routes["conv.weight"].reason.split(":")[0]) == ("adamw", "convolution")
    assert (routes["table"].algorithm, "a pattern" in routes["table"].flag) == ("adamw", True)
    groups = param_groups(Vision(), lr=1e-3, patterns=[("conv.weight", "muon"), ("table", "muon")])
    named = [([name for name, _ in group["params"]], group.get("flatten", False)) for group in groups]
    assert named == [
        (["table", "linear.weight"], False),
        (["conv.weight"], True),
        (["conv.bias", "linear.bias"], False),
    ]
    routes = by_name(groups)
    assert routes["conv.weight"].state_bytes == 8 * (27 + 4)
    assert routes["table"].state_bytes == 4 * 8 * (16 + 4)


def test_gate_of_gated_mlp_is_not_a_router() -> None:
    class GatedMLP(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up, self.down = nn.Linear(8, 24), nn.Linear(8, 24), nn.Linear(24, 8)

    assert names_for(param_groups(GatedMLP(), lr=1e-3), "muon") == {"gate.weight", "up.weight", "down.weight"}


def test_classification_head_goes_to_adamw_and_pooler_to_muon() -> None:
    config = AutoConfig.for_model("bert", **SIZES)
    with torch.device("meta"):
        routes = by_name(param_groups(AutoModelForSequenceClassification.from_config(config), lr=1e-3))
    assert routes["classifier.weight"].algorithm == "adamw"
    assert routes["bert.pooler.dense.weight"].algorithm == "muon"
    position = routes["bert.embeddings.position_embeddings.weight"]
    assert (position.reason, position.decays) == ("position table", False)


def test_plain_sequential_takes_first_embedding_and_last_linear_as_ends() -> None:
    model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 50), nn.LayerNorm(50), nn.Linear(50, 50))
    groups = param_groups(model, lr=1e-3)
    assert names_for(groups, "muon") == {"1.weight"}
    assert by_name(groups)["3.weight"].reason.startswith("output head")


def test_tie_registered_head_first_is_found_from_the_embedding() -> None:
    class HeadFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(8, 50, bias=False)
            self.hidden = nn.Linear(8, 8, bias=False)
            self.table = nn.Embedding(50, 8)
            self.out.weight = self.table.weight

    routes = param_groups(HeadFirst(), lr=1e-3).routes
    assert [(route.name, route.algorithm, route.aliases) for route in routes] == [
        ("out.weight", "adamw", ("table.weight",)),
        ("hidden.weight", "muon", ()),
    ]


def test_last_linear_without_embedding_is_flagged_not_rerouted() -> None:
    routes = by_name(param_groups(nn.Sequential(nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, 10)), lr=1e-3))
    assert (routes["0.weight"].flag, routes["2.weight"].algorithm) == ("", "muon")
    assert "head" in routes["2.weight"].flag


def test_lora_factors_go_to_muon_but_not_those_of_ends() -> None:
    class LoRA(nn.Module):
        def __init__(self, rows: int, columns: int) -> None:
            super().__init__()
            self.base_layer = nn.Linear(columns, rows).requires_grad_(False)
            self.lora_A = nn.ModuleDict({"default": nn.Linear(columns, 8, bias=False)})
            self.lora_B = nn.ModuleDict({"default": nn.Linear(8, rows, bias=False)})

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.qkv_proj, self.lm_head = LoRA(16, 16), LoRA(48, 16), LoRA(50, 16)
            self.embed_tokens = nn.Embedding(50, 16).requires_grad_(False)
            self.lora_embedding_A = nn.ParameterDict({"default": torch.zeros(8, 50)})

        def get_output_embeddings(self) -> nn.Module:
            return self.lm_head

    groups = param_groups(Model(), lr=1e-3)
    assert names_for(groups, "muon") == {
        f"{module}.lora_{factor}.default.weight" for module in ("q_proj", "qkv_proj") for factor in "AB"
    }
    assert names_for(groups, "adamw") == {
        "lm_head.lora_A.default.weight",
        "lm_head.lora_B.default.weight",
        "lora_embedding_A.default",
    }
    assert {route.name for route in groups.routes if route.flag} == {"qkv_proj.lora_B.default.weight"}


def test_two_dimensional_biases_marked_and_embedding_like_parameters_go_to_adamw() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden = nn.Linear(8, 8, bias=False)
            self.experts_bias = nn.Parameter(torch.zeros(4, 8))
            self.A_log = nn.Parameter(torch.zeros(4, 8))
            self.marked = nn.Parameter(torch.zeros(4, 8))
            self.marked._no_weight_decay = True  # type: ignore[attr-defined]
            self.pos_embed = nn.Parameter(torch.zeros(4, 8))
            self.mixing = nn.Parameter(torch.zeros(8, 8))
            self.narrow = nn.Linear(7, 8, bias=False)

    groups = param_groups(Odd(), lr=1e-3)
    routes = by_name(groups)
    assert names_for(groups, "muon") == {"hidden.weight", "narrow.weight"}
    not_decayed = {name for name, route in routes.items() if not route.decays}
    assert not_decayed == {"experts_bias", "A_log", "marked", "pos_embed"}
    assert (routes["mixing"].reason, "pattern" in routes["mixing"].flag) == ("bare parameter", True)
    assert "fp32" in routes["narrow.weight"].flag
    assert routes["narrow.weight"].state_bytes == 4 * 7 * 8


def test_frozen_parameters_are_listed_and_in_no_group() -> None:
    model = causal_lm("llama")
    frozen = "model.layers.1.mlp.up_proj.weight"
    model.get_parameter(frozen).requires_grad_(False)
    groups = param_groups(model, lr=1e-3)
    assert frozen not in {name for group in groups for name, _ in group["params"]}
    assert names_for(groups, None) == {frozen}
    assert "frozen: 1 tensor, 768 parameters" in str(groups)


def test_group_values_follow_the_arguments() -> None:
    muon, decay, no_decay = param_groups(
        causal_lm("llama"),
        lr=0.02,
        weight_decay=0.3,
        adamw_lr=1e-4,
        adjust_lr_fn="original",
        adamw_eps=1e-6,
        adamw_bits=8,
    )
    for group in (muon, decay, no_decay):
        del group["params"]
    adamw = {"algorithm": "adamw", "lr": 1e-4, "betas": DEFAULT_ADAMW_BETAS, "eps": 1e-6, "adamw_bits": 8}
    assert muon == {"algorithm": "muon", "lr": 0.02, "weight_decay": 0.3, "adjust_lr_fn": "original"}
    assert (decay, no_decay) == (adamw | {"weight_decay": 0.3}, adamw | {"weight_decay": 0.0})


def test_adamw_lr_defaults_to_lr_only_where_it_carries_over() -> None:
    groups = param_groups(causal_lm("llama"), lr=3e-4)
    assert [(group["lr"], group.get("adjust_lr_fn")) for group in groups] == [
        (3e-4, "match_rms_adamw"),
        (3e-4, None),
        (3e-4, None),
    ]
    assert groups[1]["eps"] == DEFAULT_ADAMW_EPS
    for mode in ("original", None):
        with pytest.raises(ValueError, match=r"spectral norm.*give adamw_lr"):
            param_groups(causal_lm("llama"), lr=0.02, adjust_lr_fn=mode)


def test_first_matching_pattern_wins_and_aliases_match() -> None:
    patterns = [("*.1.mlp.up_proj.weight", "muon"), ("*.mlp.up_proj.*", "adamw"), ("lm_head.*", "muon")]
    groups = param_groups(causal_lm("llama", tie_word_embeddings=True), lr=1e-3, patterns=patterns)
    routes = by_name(groups)
    assert [routes[f"model.layers.{i}.mlp.up_proj.weight"].algorithm for i in range(3)] == ["adamw", "muon", "adamw"]
    assert routes["model.embed_tokens.weight"].algorithm == "muon"
    assert "pattern 'lm_head.*'" in routes["model.embed_tokens.weight"].reason
    assert "model.layers.0.mlp.up_proj.weight" in {name for name, _ in groups[1]["params"]}


@pytest.mark.parametrize(
    ("pattern", "algorithm", "message"),
    [
        ("model.layers.*.mlp.upproj.weight", "adamw", r"matches no parameter.*near names:.*up_proj\.weight"),
        ("Lm_head.*", "adamw", r"matches no parameter.*near names:.*lm_head\.weight"),
        ("model.norm.*", "muon", r"sends model\.norm\.weight of shape \(16,\) to Muon"),
        ("model.norm.*", "sgd", r"asks for 'sgd'"),
    ],
)
def test_wrong_pattern_raises_and_names_what_is_wrong(pattern: str, algorithm: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        param_groups(causal_lm("llama"), lr=1e-3, patterns=[(pattern, algorithm)])


def test_a_dict_makes_a_group_of_its_own_and_is_shown() -> None:
    patterns = [
        ("*.0.self_attn.q_proj.*", {"split_sizes": [8, 8], "split_dim": -1, "bits": 32}),
        ("*.self_attn.q_proj.*", {"lr": 5e-4}),
        ("*.mlp.*", {"codebook": "dynamic", "block_size": 64}),
        ("*embed_tokens*", {"adamw_bits": 8, "lr": 2e-3}),
        ("lm_head.*", {"algorithm": "adamw", "lr": 1e-4}),
    ]
    groups = param_groups(causal_lm("llama"), lr=1e-3, patterns=patterns)
    keys = ("lr", "split_sizes", "split_dim", "bits", "codebook", "block_size", "adamw_bits")
    found = [({key: group[key] for key in keys if key in group}, len(group["params"])) for group in groups]
    assert found == [
        ({"lr": 1e-3}, 9),  # k, v and o of three layers
        ({"lr": 1e-3, "codebook": "dynamic", "block_size": 64}, 9),
        ({"lr": 5e-4}, 2),
        ({"lr": 1e-3, "split_sizes": (8, 8), "split_dim": -1, "bits": 32}, 1),
        ({"lr": 1e-3, "adamw_bits": 32}, 7),
        ({"lr": 2e-3, "adamw_bits": 8}, 1),
        ({"lr": 1e-4, "adamw_bits": 32}, 1),
    ]
    routes = by_name(groups)
    assert routes["lm_head.weight"].reason == "pattern 'lm_head.*'"
    assert routes["model.embed_tokens.weight"].reason == "embedding, pattern '*embed_tokens*', adamw_bits=8"
    assert routes["model.layers.0.self_attn.q_proj.weight"].state_bytes == 4 * 16 * 16
    assert routes["model.layers.0.mlp.up_proj.weight"].state_bytes == 48 * (16 + 4)
    text = str(groups)
    assert "hidden matrix, pattern '*.0.self_attn.q_proj.*', split 8 + 8 along -1, bits=32" in text
    assert "block_size=2048, where no pattern says otherwise" in text


def test_a_dict_of_another_split_replaces_the_known_one_and_none_takes_it_whole() -> None:
    def split(sizes: Any) -> list[Any]:
        groups = param_groups(causal_lm("phi3"), lr=1e-3, patterns=[("*.qkv_proj.weight", {"split_sizes": sizes})])
        assert not any(route.flag for route in groups.routes)
        return [group.get("split_sizes") for group in groups if any("qkv_proj" in n for n, _ in group["params"])]

    assert split((16, 32)) == [(16, 32)]
    assert split(None) == [None]
    groups = param_groups(Vision(), lr=1e-3, patterns=[("conv.weight", {"algorithm": "muon", "flatten": False})])
    assert [group["flatten"] for group in groups if "flatten" in group] == []
    neox = [("*.query_key_value.weight", {"split_sizes": (16, 16, 16)})]
    assert not any(r.flag for r in param_groups(causal_lm("gpt_neox"), lr=1e-3, patterns=neox).routes)


def test_a_step_takes_the_groups_of_dicts_and_their_checkpoint_loads() -> None:
    def make() -> tuple[nn.Module, Muon8bit]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(20, 16), nn.Linear(16, 48), nn.Linear(48, 16), nn.Linear(16, 20))
        patterns = [("1.weight", {"split_sizes": (32, 8, 8), "bits": 32}), ("2.*t", {"codebook": "dynamic", "lr": 0.1})]
        return model, Muon8bit(param_groups(model, lr=1e-3, patterns=patterns))

    (model, optimizer), (other, resumed) = make(), make()
    model(torch.arange(4)).square().sum().backward()
    optimizer.step()
    assert optimizer.state[model[1].weight].keys() == {"momentum_buffer"}
    assert "momentum_dynamic8" in optimizer.state[model[2].weight]
    resumed.load_state_dict(optimizer.state_dict())
    assert torch.equal(
        resumed.state[other[1].weight]["momentum_buffer"], optimizer.state[model[1].weight]["momentum_buffer"]
    )


def test_a_pattern_that_those_before_it_shadow_is_warned_of() -> None:
    model, late = causal_lm("llama"), ("*layers.0*.q_proj.weight", {"bits": 32})
    with pytest.warns(UserWarning, match=r"pattern '\*layers\.0\*.*' changes nothing.*put it first") as caught:
        param_groups(model, lr=1e-3, patterns=[("*q_proj*", {"lr": 5e-4}), late])
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        param_groups(model, lr=1e-3, patterns=[late, ("*q_proj*", {"lr": 5e-4})])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"split_size": (8, 8)}, r"pattern '\*q_proj\*': unknown key 'split_size', did you mean 'split_sizes'\?"),
        ({"momentum": 0.9}, r"unknown key 'momentum', there are algorithm, split_sizes, .*, adamw_bits"),
        ({}, r"pattern '\*q_proj\*': its dict is empty: give one of algorithm"),
        ({"algorithm": "sgd"}, r"asks for 'sgd'; it must be one of"),
        (
            {"split_sizes": (8, 9)},
            r"'\*q_proj\*': split_sizes \(8, 9\) sum to 17.*-2 of model\..*q_proj.*\(16, 16\).*16",
        ),
        ({"split_sizes": (8, 0)}, r"split_sizes must be None or positive ints, not \(8, 0\)"),
        ({"split_sizes": (8, 8), "split_dim": 1}, r"split_dim must be one of \(-2, -1\), .* not 1"),
        ({"split_dim": -1}, "split_dim says nothing without split_sizes: give both"),
        ({"split_sizes": (8, 8), "split_dim": -1, "flatten": True}, "split_dim must be -2 beside flatten=True"),
        ({"flatten": 1}, "flatten must be True or False, not 1"),
        ({"algorithm": "adamw", "split_sizes": (8, 8)}, r"split_sizes has no meaning with algorithm='adamw': leave it"),
        ({"algorithm": "muon", "adamw_bits": 8}, r"adamw_bits has no meaning with algorithm='muon'"),
        ({"adamw_bits": 8}, r"gives adamw_bits to model\..*q_proj.*goes to 'muon'.*narrow.*'algorithm': 'adamw'"),
        ({"bits": 16}, r"bits must be one of \(8, 32\), not 16"),
        ({"bits": "8"}, r"bits must be one of \(8, 32\), not '8', a string: give the number"),
        ({"codebook": "nf4"}, r"codebook must be one of \('linear', 'dynamic'\), not 'nf4'"),
        ({"block_size": 100}, r"block_size must be one of"),
        ({"lr": "1e-3"}, r"pattern '\*q_proj\*': lr must be >= 0.*not '1e-3', a string: give the number"),
    ],
)
def test_keys_that_do_not_fit_are_refused_by_pattern_and_parameter(keys: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        param_groups(causal_lm("llama"), lr=1e-3, patterns=[("*q_proj*", keys)])


def test_columns_of_what_a_pattern_flattens_are_not_cut() -> None:
    cut = {"algorithm": "muon", "split_sizes": (4, 4)}
    groups = param_groups(Vision(), lr=1e-3, patterns=[("conv.weight", cut)])
    assert [(group["flatten"], group["split_dim"]) for group in groups if "flatten" in group] == [(True, -2)]
    with pytest.raises(ValueError, match=r"conv\.weight is flattened.*split_dim=-2, or add 'flatten': False"):
        param_groups(Vision(), lr=1e-3, patterns=[("conv.weight", {**cut, "split_dim": -1})])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"lr": "1e-3"}, r"^lr must be >= 0 .*not '1e-3', a string: give the number \(YAML takes 1e-3 for a string"),
        ({"lr": -1.0}, "^lr must be >= 0"),
        ({"lr": None}, "^lr must be >= 0.*not None"),
        ({"weight_decay": "0.1"}, "^weight_decay must be.*'0.1', a string"),
        ({"adamw_lr": "x"}, "^adamw_lr must be None, or >= 0.*not 'x'$"),
        ({"adamw_betas": 0.9}, "^adamw_betas must be two numbers"),
        ({"adamw_eps": 0.0}, "^adamw_eps must be at least"),
        ({"adamw_bits": 16}, r"^adamw_bits must be one of \(8, 32\), not 16"),
        ({"patterns": {"lm_head.weight": "muon"}}, r"^patterns must be a list of .* not \{'lm_head"),
        ({"patterns": [(1, "muon")]}, r"^patterns must be a list of .* not \[\(1, 'muon'\)\]"),
        ({"patterns": "lm_head"}, r"^patterns must be a list of .* not 'lm_head'"),
        ({"patterns": [("lm_head.weight", ["muon"])]}, r"asks for \['muon'\]; it must be one of"),
    ],
)
def test_values_that_no_group_can_have_are_refused_where_they_are_given(keys: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        param_groups(causal_lm("llama"), **{"lr": 1e-3, **keys})


def test_what_is_no_model_is_refused_with_the_call_to_make() -> None:
    model = causal_lm("llama")
    for what, kind in (
        (model.parameters(), "generator"),
        (dict(model.named_parameters()), "dict"),
        (type(model), "type"),
    ):
        with pytest.raises(TypeError, match=rf"param_groups\(model, lr=\.\.\.\), not a {kind}"):
            param_groups(what, lr=1e-3)  # type: ignore[arg-type]


def test_bfloat16_weights_are_told_about_rounding() -> None:
    model = causal_lm("llama")
    assert "bfloat16" not in str(param_groups(model, lr=1e-3))
    text = str(param_groups(model.bfloat16(), lr=1e-3))
    assert f"bfloat16 weights: {len(list(model.parameters()))} tensors; rounded to nearest" in text
    assert "Muon8bit(groups, param_rounding='stochastic')" in text


class Flattened(nn.Module):
    """A parameter as FSDP1 leaves it, beside a matrix that it ignored."""

    def __init__(self) -> None:
        super().__init__()
        self.ignored = nn.Linear(8, 8)
        self._flat_param = nn.Parameter(torch.zeros(100))


def zero3_linear() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = nn.Parameter(torch.zeros(0))
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Flattened(), r"_flat_param of shape \(100,\) is a flattened matrix.*DDP"),
        (zero3_linear(), r"1\.weight of shape \(0,\) is a flattened matrix.*DeepSpeed"),
        (nn.Sequential(nn.LazyLinear(8)), r"0\.weight is not initialized yet"),
        (nn.Linear(8, 8).requires_grad_(False), r"all 2 parameters are frozen"),
        (nn.LayerNorm(8), r"all 2 trainable parameters are 1-D.*FSDP1 or DeepSpeed"),
        (nn.Embedding(8, 8), r"1 embedding.*patterns"),
    ],
)
def test_model_without_matrices_raises_and_explains(model: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        param_groups(model, lr=1e-3)


def test_table_collapses_layers_and_its_bytes_sum_to_the_formula() -> None:
    model = causal_lm("mixtral", num_local_experts=2, num_hidden_layers=12, hidden_size=4096, num_attention_heads=32)
    groups = param_groups(model, lr=1e-3)
    text = str(groups)
    assert text.isascii()
    assert len(text.splitlines()) < 24
    row = next(line for line in text.splitlines() if ".q_proj." in line).split()
    assert row[:5] == ["model.layers.{0..11}.self_attn.q_proj.weight", "x12", "4096", "x", "4096"]
    assert row[8] == f"{12 * 4096 * (4096 + 4 * 2):,}"
    assert "split 48 + 48 along -2" in next(line for line in text.splitlines() if "experts.gate_up_proj" in line)
    pairs = {kind: [p for g in groups if g["algorithm"] == kind for _, p in g["params"]] for kind in ("muon", "adamw")}
    muon = sum(p.numel() + 4 * math.prod(p.shape[:-1]) * math.ceil(p.shape[-1] / 2048) for p in pairs["muon"])
    adamw = sum(8 * p.numel() for p in pairs["adamw"])
    assert f"state in all: {muon + adamw:,} B" in text


def test_table_of_layers_that_differ_keeps_them_apart() -> None:
    model = causal_lm("llama", num_hidden_layers=6)
    groups = param_groups(model, lr=1e-3, patterns=[("*.layers.2.*.q_proj.*", "adamw")])
    text = str(groups)
    assert "model.layers.{0,1,3..5}.self_attn.q_proj.weight x5" in text
    assert "model.layers.2.self_attn.q_proj.weight " in text


def test_groups_drive_torch_optimizer_with_names() -> None:
    groups = param_groups(causal_lm("llama"), lr=1e-3)
    muon = torch.optim.Muon(groups[:1], lr=1.0)
    assert muon.param_groups[0]["lr"] == 1e-3
    assert set(muon.param_groups[0]["param_names"]) == names_for(groups, "muon")

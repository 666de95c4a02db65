"""Latent attention cut by head, and MoE routers on Muon, where `param_groups` is asked to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import routing_models
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from muon8bit import ParamGroups, param_groups

# Sizes that differ, so that no border can be taken for another one.
MLA = {"kv_lora_rank": 16, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 6, "q_lora_rank": 8}
MLA |= {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
MLA |= {"num_key_value_heads": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MOE = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "n_group": 1, "topk_group": 1}
MOE |= {"n_shared_experts": 1, "first_k_dense_replace": 1}
LATENT: dict[str, tuple[str, dict[str, Any]]] = {
    "DeepSeek-V3": ("deepseek_v3", MOE),
    "DeepSeek-V3, dense": ("deepseek_v3", MOE | {"first_k_dense_replace": 2}),
    "DeepSeek-V3, whole q_proj": ("deepseek_v3", MOE | {"q_lora_rank": None}),
    "DeepSeek-V2": ("deepseek_v2", MOE),
    "DeepSeek-V2, whole q_proj": ("deepseek_v2", MOE | {"q_lora_rank": None}),
    "DeepSeek-V3.2": ("deepseek_v32", MOE),
    "GLM4-MoE-Lite": ("glm4_moe_lite", MOE),
    "GLM-MoE-DSA": ("glm_moe_dsa", MOE),
    "MiniCPM3": ("minicpm3", {}),
    "Kimi-Linear": ("kimi_linear", MOE | {"layer_types": ["linear_attention", "full_attention"], "q_lora_rank": None}),
    "LongCat": ("longcat_flash", {"num_layers": 1, "expert_ffn_hidden_size": 8, "ffn_hidden_size": 48} | MOE),
}


def latent(case: str, device: str = "meta", **changes: Any) -> nn.Module:
    model_type, own = LATENT[case]
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **MLA | own | changes))


def pieces(model: nn.Module, **options: Any) -> dict[str, tuple[int, ...]]:
    """Sizes of the pieces by the module's name, of the groups that are cut by rows, experts left out."""
    groups = param_groups(model, lr=1e-3, **options)
    cut = [(name, group) for group in groups if "split_sizes" in group for name, _ in group["params"]]
    return {name.split(".")[-2]: group["split_sizes"] for name, group in cut if "experts" not in name}


@pytest.mark.parametrize("case", LATENT)
def test_projections_of_latent_attention_are_cut_by_head_where_asked(case: str) -> None:
    model = latent(case)
    query = "q_proj" if (MLA | LATENT[case][1])["q_lora_rank"] is None else "q_b_proj"
    assert pieces(model) == {}
    assert pieces(model, split_heads="head") == {query: (6,) * 4, "kv_b_proj": (10,) * 4}
    assert pieces(model, split_heads="head_kv") == {query: (6,) * 4, "kv_b_proj": (4, 6) * 4}
    names = {
        f"{path}.{child}.weight"
        for path, module in model.named_modules()
        for child in (query, "kv_b_proj")
        if hasattr(module, "kv_b_proj")
    }
    told = "could be split by head: split_heads='head'"
    whole, cut = (param_groups(model, lr=1e-3, split_heads=mode).routes for mode in (None, "head_kv"))
    assert {route.name for route in whole if told in route.flag} == names
    assert {route.name for route in cut if ", by head, split 4 x " in route.reason} == names
    assert not [route for route in cut if told in route.flag or ("kv_b_proj" in route.name and route.flag)]
    others = [(a, b) for a, b in zip(whole, cut, strict=True) if a.name not in names]
    assert all(a == b for a, b in others)


def test_pieces_of_latent_attention_are_those_of_the_forward_pass() -> None:
    """Where the output takes nothing of a head, no row of it has a gradient; where queries are 0, no key has one."""
    model = latent("DeepSeek-V3", "cpu")
    tokens = torch.arange(3, 15)[None]
    attention = model.model.layers[0].self_attn  # type: ignore[union-attr, index]
    sizes = pieces(model, split_heads="head") | {"keys": pieces(model, split_heads="head_kv")["kv_b_proj"]}
    output = attention.o_proj.weight.detach().clone()
    for head in range(4):
        with torch.no_grad():
            attention.o_proj.weight[:, 6 * head : 6 * head + 6] = 0
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        for name in ("q_b_proj", "kv_b_proj"):
            parts = getattr(attention, name).weight.grad.split(sizes[name])
            assert [i for i, part in enumerate(parts) if not part.any()] == [head], name
        with torch.no_grad():
            attention.o_proj.weight.copy_(output)
    with torch.no_grad():
        attention.q_b_proj.weight.zero_()
    model.zero_grad()
    model(tokens, labels=tokens).loss.backward()
    parts = attention.kv_b_proj.weight.grad.split(sizes["keys"])
    assert [i for i, part in enumerate(parts) if not part.any()] == [0, 2, 4, 6]


def test_heads_of_adapters_are_cut_as_what_they_adapt_and_a_pattern_comes_first() -> None:
    model = latent("DeepSeek-V3", "cpu")
    targets = ["q_b_proj", "kv_b_proj", "o_proj"]
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=targets))
    groups = param_groups(adapted, lr=1e-3, split_heads="head")
    cut = {
        " ".join(n.split(".")[-4:-2]): g["split_sizes"] for g in groups if "split_sizes" in g for n, _ in g["params"]
    }
    assert cut == {"q_b_proj lora_B": (6,) * 4, "kv_b_proj lora_B": (10,) * 4}
    only = get_peft_model(latent("DeepSeek-V3", "cpu"), LoraConfig(r=4, target_modules=["o_proj"]))
    with pytest.raises(ValueError, match=r"split_heads='head'.*no MLA projections found.*leave split_heads out"):
        param_groups(only, lr=1e-3, split_heads="head")
    own = [("*kv_b_proj.weight", {"split_sizes": None}), ("*layers.0.*q_b_proj.weight", "adamw")]
    routes = {
        r.name[13:]: r for r in param_groups(latent("DeepSeek-V3"), lr=1e-3, split_heads="head", patterns=own).routes
    }
    assert routes["0.self_attn.q_b_proj.weight"].algorithm == "adamw"
    assert routes["1.self_attn.q_b_proj.weight"].split == ((6,) * 4, -2)
    assert routes["0.self_attn.kv_b_proj.weight"].split is None


class OwnLatent(nn.Module):
    """Latent attention of one's own; what it does not name is in no config either."""

    def __init__(self, query: str = "q_proj", **sizes: int) -> None:
        super().__init__()
        self.kv_b_proj, self.o_proj = nn.Linear(16, 40), nn.Linear(24, 32)
        self.add_module(query, nn.Linear(32, 24))
        for name, size in sizes.items():
            setattr(self, name, size)


OWN_SIZES = {"num_heads": 4, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 6}


def test_sizes_that_are_not_told_or_do_not_fill_the_rows_are_refused_by_name() -> None:
    def groups(attention: nn.Module, **options: Any) -> ParamGroups:
        return param_groups(nn.ModuleDict({"attention": attention}), lr=1e-3, **options)

    found = {r.name: r.split for r in groups(OwnLatent(**OWN_SIZES), split_heads="head_kv").routes if r.split}
    assert found == {"attention.kv_b_proj.weight": ((4, 6) * 4, -2), "attention.q_proj.weight": ((6,) * 4, -2)}
    without_v = OwnLatent(**{k: v for k, v in OWN_SIZES.items() if k != "v_head_dim"})
    with pytest.raises(
        ValueError, match=r"split_heads='head' cannot cut attention\.kv_b_proj\.weight.*name v_head_dim"
    ):
        groups(without_v, split_heads="head")
    wrong = OwnLatent(**OWN_SIZES | {"num_heads": 5})
    with pytest.raises(
        ValueError, match=r"attention\.kv_b_proj\.weight of shape \(40, 16\).*5 heads of 4 \+ 6 .*50 in all"
    ):
        groups(wrong, split_heads="head")
    assert not any("split_heads" in r.flag for a in (without_v, wrong) for r in groups(a).routes if "kv_b" in r.name)
    own = [("*.kv_b_proj.weight", {"split_sizes": (20, 20)}), ("*.q_proj.weight", {"split_sizes": None})]
    with pytest.raises(ValueError, match="no MLA projections"):
        groups(wrong, split_heads="head", patterns=own)
    fused = groups(OwnLatent("q_gate_proj", **OWN_SIZES), split_heads="head").routes
    told = [r.flag for r in fused if r.is_by_head]
    assert told == ["queries of this attention stay whole: no q_b_proj or q_proj"]
    llama = routing_models.llama()
    for mode in ("head", "head_kv"):
        with pytest.raises(ValueError, match=f"split_heads='{mode}', but no MLA projections found"):
            param_groups(llama, lr=1e-3, split_heads=mode)
    for options in ({"split_heads": "heads"}, {"split_heads": True}, {"routers": None}, {"routers": "Muon"}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} must be .*'(head|adamw)'"):
            param_groups(llama, lr=1e-3, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("case", ["DeepSeek-V3", "DeepSeek-V2", "Kimi-Linear", "LongCat", "qwen2_moe", "mixtral"])
def test_routers_go_to_muon_where_asked_and_nothing_else_does(case: str) -> None:
    if case in LATENT:
        model = latent(case)
    else:
        own = {"num_experts": 4, "num_local_experts": 4, "shared_expert_intermediate_size": 8} | MOE
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(case, **MLA | own))
    plain, asked = (param_groups(model, lr=1e-3, routers=kind) for kind in ("adamw", "muon"))  # type: ignore[arg-type]
    default = param_groups(model, lr=1e-3)
    assert plain.routes == default.routes
    assert [[n for n, _ in g["params"]] for g in plain] == [[n for n, _ in g["params"]] for g in default]
    moved = [(a, b) for a, b in zip(plain.routes, asked.routes, strict=True) if a != b]
    leaf = "router.classifier.weight" if case == "LongCat" else "gate.weight"
    assert {a.name.split("mlp.")[1] for a, _ in moved} == {leaf}
    assert {(a.algorithm, b.algorithm, a.reason, b.reason) for a, b in moved} == {
        ("adamw", "muon", "MoE router", "MoE router")
    }
    assert all(len(b.shape) == 2 and b.shape[1] == 32 for _, b in moved)
    assert sum("split_sizes" not in g and g["algorithm"] == "muon" for g in asked) == 1  # beside the other matrices


def test_routers_that_are_none_or_of_one_row_stay_where_they_are() -> None:
    with pytest.raises(ValueError, match=r"routers='muon', but no trainable MoE router .*leave routers out"):
        param_groups(routing_models.llama(), lr=1e-3, routers="muon")

    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
            self.gate, self.shared_expert_gate = nn.Linear(16, 4), nn.Linear(16, 1)

    model = nn.ModuleDict({"mlp": Mixture()})
    routes = {r.name: r for r in param_groups(model, lr=1e-3, routers="muon").routes}
    assert routes["mlp.gate.weight"].algorithm == "muon"
    assert routes["mlp.gate.bias"].algorithm == routes["mlp.shared_expert_gate.weight"].algorithm == "adamw"
    adapted = get_peft_model(model, LoraConfig(r=8, target_modules=["gate", "shared_expert_gate", "0"]))
    kinds = {
        r.name.partition("mlp.")[2]: r.algorithm
        for r in param_groups(adapted, lr=1e-3, routers="muon").routes
        if "lora" in r.name
    }
    assert {name: kind for name, kind in kinds.items() if "gate" in name} == {
        "gate.lora_A.default.weight": "muon",
        "gate.lora_B.default.weight": "muon",
        "shared_expert_gate.lora_A.default.weight": "adamw",
        "shared_expert_gate.lora_B.default.weight": "adamw",
    }
    with pytest.raises(ValueError, match="no trainable MoE router"):
        param_groups(adapted, lr=1e-3, routers="muon", patterns=[("*.mlp.gate.*", "adamw")])

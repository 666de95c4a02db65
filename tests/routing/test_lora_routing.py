"""param_groups on models that peft wrapped: which part of an adapter goes where, at which lr, cut into what."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from peft.optimizers import create_loraplus_optimizer
from peft.tuners.lora.config import BdLoraConfig
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
)

from muon8bit import Muon8bit, ParamGroups, param_groups

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}


def base(model_type: str = "llama", auto: Any = AutoModelForCausalLM, **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    return auto.from_config(AutoConfig.for_model(model_type, **SIZES | changes))


def lora(model: nn.Module, **options: Any) -> nn.Module:
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=8, **options))


def kinds(groups: ParamGroups) -> set[tuple[str, str, bool]]:
    """(last components of the name without layer, algorithm, whether weight decay applies) of what is trained."""
    found = set()
    for group in groups:
        for name, _ in group["params"]:
            leaf = name.removeprefix("base_model.model.").removesuffix(".weight").removesuffix(".default")
            found.add((".".join(leaf.split(".")[-2:]), group["algorithm"], group["weight_decay"] > 0))
    return found


def of(layers: set[str], *parts: tuple[str, str, bool]) -> set[tuple[str, str, bool]]:
    return {(f"{layer}.{part}", *rest) for layer in layers for part, *rest in parts}


A, B = ("lora_A", "muon", True), ("lora_B", "muon", True)
MAGNITUDE = ("lora_magnitude_vector", "adamw", False)
ATTENTION, MLP = {"q_proj", "k_proj", "v_proj", "o_proj"}, {"gate_proj", "up_proj", "down_proj"}
HEAD = [("lora_A", "adamw", True), ("lora_B", "adamw", True)]
EMBEDDING = [("lora_embedding_A", "adamw", True), ("lora_embedding_B", "adamw", True)]
COPY = ("modules_to_save", "adamw", True)
DELTA = ("token_adapter.trainable_tokens_delta", "adamw", True)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], set[tuple[str, str, bool]]]] = {
    "all linear": ({}, {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}, of(ATTENTION | MLP, A, B)),
    "rslora": ({}, {"target_modules": ["q_proj"], "use_rslora": True}, of({"q_proj"}, A, B)),
    "dora": ({}, {"target_modules": ["q_proj"], "use_dora": True}, of({"q_proj"}, A, B, MAGNITUDE)),
    "dora of the ends": (
        {},
        {"target_modules": ["q_proj", "lm_head", "embed_tokens"], "use_dora": True},
        of({"q_proj"}, A, B, MAGNITUDE)
        | of({"lm_head"}, *HEAD, MAGNITUDE)
        | of({"embed_tokens"}, *EMBEDDING, MAGNITUDE),
    ),
    "copies of the ends": (
        {},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        of({"q_proj"}, A, B) | of({"embed_tokens", "lm_head"}, COPY),
    ),
    "tied copies": (
        {"tie_word_embeddings": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        of({"q_proj"}, A, B) | of({"embed_tokens"}, COPY),
    ),
    "tokens": (
        {},
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [1, 2], "lm_head": [1, 2]}},
        of({"q_proj"}, A, B) | {DELTA},
    ),
    "tied tokens": (
        {"tie_word_embeddings": True},
        {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]},
        of({"q_proj"}, A, B) | {DELTA},
    ),
    "biases": (
        {"model_type": "gpt_neox"},
        {"target_modules": ["dense"], "bias": "lora_only", "lora_bias": True},
        of({"dense"}, A, B) | {("base_layer.bias", "adamw", False), ("default.bias", "adamw", False)},
    ),
    "routers": (
        {"model_type": "qwen2_moe", "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
        | {"shared_expert_intermediate_size": 8},
        {"target_modules": ["q_proj", "shared_expert_gate", "gate_proj"]},
        of({"q_proj", "gate_proj"}, A, B) | of({"shared_expert_gate"}, *HEAD),
    ),
    "experts": (
        {"model_type": "mixtral", "num_local_experts": 4},
        EXPERTS,
        of({"q_proj"}, A, B) | of({"experts", "base_layer"}, A, ("lora_B", "adamw", True)),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_parts_of_adapters_go_where_the_hand_written_list_says(case: str) -> None:
    model, options, wanted = CASES[case]
    groups = param_groups(lora(base(**model), **options), lr=1e-3)
    assert kinds(groups) == wanted
    grouped = [param for group in groups for _, param in group["params"]]
    assert len(grouped) == len(set(grouped))


def test_reasons_in_the_table_name_the_part() -> None:
    options = {"target_modules": ["q_proj", "lm_head", "embed_tokens"], "use_dora": True}
    text = str(param_groups(lora(base(), **options), lr=1e-3, loraplus_ratio=16))
    reasons = {line.split("  ")[-1] for line in text.splitlines() if ".default" in line}
    assert reasons == {
        "LoRA A",
        "LoRA B, lr x 16 (LoRA+)",
        "DoRA magnitude",
        "LoRA of the output head",
        "LoRA of the output head, lr x 16 (LoRA+)",
        "LoRA of an embedding",
    }


def test_adapter_of_a_classification_head_goes_to_adamw_as_a_whole() -> None:
    model = lora(base(auto=AutoModelForSequenceClassification), target_modules=["q_proj", "score"])
    assert kinds(param_groups(model, lr=1e-3)) == of({"q_proj"}, A, B) | of({"score"}, *HEAD)


def test_every_adapter_is_its_own_matrix_and_inactive_ones_are_frozen() -> None:
    model = lora(base(), target_modules=["q_proj"])
    model.add_adapter("second", LoraConfig(r=4, target_modules=["q_proj"]))
    assert {name.split(".")[-2] for group in param_groups(model, lr=1e-3) for name, _ in group["params"]} == {"default"}
    model.base_model.set_adapter(["default", "second"])
    (group,) = param_groups(model, lr=1e-3)
    assert sorted(tuple(p.shape) for _, p in group["params"]) == sorted([(8, 32), (32, 8), (4, 32), (32, 4)] * 2)


def test_loraplus_ratio_scales_the_lr_of_b_alone() -> None:
    options = {"target_modules": ["q_proj", "lm_head", "embed_tokens"], "use_dora": True, "bias": "none"}
    groups = param_groups(lora(base(), **options), lr=1e-3, adamw_lr=1e-4, loraplus_ratio=16)
    rates = {}
    for group in groups:
        for name, _ in group["params"]:
            part = next(part for part in name.split(".") if part.startswith("lora_"))
            rates.setdefault((part, group["algorithm"]), set()).add(group["lr"])
    assert rates == {
        ("lora_A", "muon"): {1e-3},
        ("lora_B", "muon"): {16e-3},
        ("lora_A", "adamw"): {1e-4},
        ("lora_B", "adamw"): {16e-4},
        ("lora_embedding_A", "adamw"): {1e-4},
        ("lora_embedding_B", "adamw"): {1e-4},
        ("lora_magnitude_vector", "adamw"): {1e-4},
    }


@pytest.mark.parametrize("ratio", [0, -1.0, float("nan"), float("inf"), True, "16"])
def test_loraplus_ratio_that_is_no_positive_number_raises(ratio: Any) -> None:
    with pytest.raises(ValueError, match="loraplus_ratio must be"):
        param_groups(lora(base(), target_modules=["q_proj"]), lr=1e-3, loraplus_ratio=ratio)


def test_loraplus_ratio_leaves_a_tensor_and_a_patterns_own_lr_as_they_are() -> None:
    model, rate = lora(base(), target_modules=["q_proj", "v_proj"]), torch.tensor(1e-3)
    groups = param_groups(model, lr=rate, loraplus_ratio=16, patterns=[("*v_proj.lora_B*", {"lr": 2e-3})])
    assert [float(group["lr"]) for group in groups] == pytest.approx([1e-3, 2e-3, 16e-3])
    assert rate == torch.tensor(1e-3)


def test_loraplus_ratio_without_adapter_raises() -> None:
    with pytest.raises(ValueError, match=r"no trainable LoRA factor B.*get_peft_model"):
        param_groups(base(), lr=1e-3, loraplus_ratio=16)


def grads(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for param in model.parameters():
        if param.requires_grad:
            param.grad = torch.randn(param.shape, generator=generator)


def test_peft_loraplus_optimizer_equals_our_groups_bitwise() -> None:
    ours = lora(base(), target_modules="all-linear", task_type="CAUSAL_LM")
    theirs = copy.deepcopy(ours)
    start = copy.deepcopy(ours.state_dict())
    optimizers = (
        Muon8bit(param_groups(ours, lr=1e-2, weight_decay=0.1, loraplus_ratio=16)),
        create_loraplus_optimizer(
            theirs,
            Muon8bit,
            lr=1e-2,
            loraplus_lr_ratio=16,
            loraplus_weight_decay=0.1,
            adjust_lr_fn="match_rms_adamw",
        ),
    )
    for step in range(4):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            grads(model, step)
            optimizer.step()
    other = theirs.state_dict()
    assert all(torch.equal(value, other[name]) for name, value in ours.state_dict().items())
    moved = {name for name, value in other.items() if not torch.equal(value, start[name])}
    assert moved == {name for name in other if "lora_" in name}
    for optimizer in optimizers:
        assert {key for state in optimizer.state.values() for key in state} == {"momentum_linear8", "momentum_scales"}


def test_peft_loraplus_with_vectors_points_to_param_groups() -> None:
    model = lora(base(), target_modules=["q_proj"], use_dora=True)
    with pytest.raises(ValueError, match=r"1 dimension.*muon8bit\.param_groups.*loraplus_ratio"):
        create_loraplus_optimizer(model, Muon8bit, lr=1e-2, loraplus_lr_ratio=16)
    assert len(param_groups(model, lr=1e-2, loraplus_ratio=16)) == 3


@pytest.mark.parametrize(
    ("model_type", "targets", "fused"),
    [("phi3", "all-linear", {"qkv_proj", "gate_up_proj"}), ("gpt2", ["c_attn", "c_proj"], {"c_attn"})],
)
def test_b_over_a_fused_base_is_cut_as_its_outputs_are(model_type: str, targets: Any, fused: set[str]) -> None:
    """Row i of B feeds output i: the pieces of the base weight along its outputs are those of B's rows."""

    def splits(model: nn.Module) -> dict[str, tuple[int, ...]]:
        groups = [group for group in param_groups(model, lr=1e-3) if "split_sizes" in group]
        return {name.split(".lora_")[0]: group["split_sizes"] for group in groups for name, _ in group["params"]}

    whole = {name.removesuffix(".weight"): sizes for name, sizes in splits(base(model_type)).items()}
    model = lora(base(model_type), target_modules=targets, task_type="CAUSAL_LM")
    factors = {name.removeprefix("base_model.model."): sizes for name, sizes in splits(model).items()}
    assert factors == whole
    assert {name.rpartition(".")[2] for name in whole} == fused
    for group in param_groups(model, lr=1e-3):
        if "split_sizes" in group:
            assert group["split_dim"] == -2
            assert all("lora_B" in name and len(p) == sum(group["split_sizes"]) for name, p in group["params"])


def test_b_over_a_fused_base_of_unknown_layout_is_flagged() -> None:
    groups = param_groups(lora(base("gpt_neox"), target_modules=["query_key_value", "dense"]), lr=1e-3)
    flagged = {route.name for route in groups.routes if "fused" in route.flag}
    assert flagged
    assert all(".query_key_value.lora_B." in name for name in flagged)


def test_trained_copy_of_a_fused_weight_is_split_like_the_weight() -> None:
    groups = param_groups(lora(base("phi3"), target_modules=["o_proj"], modules_to_save=["qkv_proj"]), lr=1e-3)
    split = {group["split_sizes"]: [name for name, _ in group["params"]] for group in groups if "split_sizes" in group}
    assert list(split) == [(32, 16, 16)]
    assert all("qkv_proj.modules_to_save.default.weight" in name for name in split[(32, 16, 16)])


def test_pieces_of_a_over_stacked_experts_are_one_experts_each() -> None:
    """A change of one piece of A changes the delta of that expert alone; no cut of B's columns into equal contiguous
    pieces does, which is why B goes to AdamW."""
    model = lora(base("mixtral", num_local_experts=4), **EXPERTS)
    groups = param_groups(model, lr=1e-3)
    wrapper = model.get_submodule("base_model.model.model.layers.0.mlp.experts")
    weight_a, weight_b = wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight
    (group,) = [group for group in groups if any(param is weight_a for _, param in group["params"])]
    assert group["split_sizes"] == (8,) * 4
    assert group["split_dim"] == -2
    flags = {route.name: route.flag for route in groups.routes if route.algorithm == "adamw"}
    assert len(flags) == 4
    assert all("experts' columns alternate" in flag for flag in flags.values())

    def experts_touched(piece: torch.Tensor) -> list[int]:
        before = wrapper.get_delta_weight("default").clone()
        piece.mul_(2)
        changed = (wrapper.get_delta_weight("default") != before).flatten(1).any(1)
        piece.div_(2)
        return changed.nonzero().flatten().tolist()

    with torch.no_grad():
        weight_b.normal_()
        assert [experts_touched(piece) for piece in weight_a.split(group["split_sizes"])] == [[0], [1], [2], [3]]
        assert [experts_touched(piece) for piece in weight_b.split(8, 1)] == [[0, 1, 2, 3]] * 4


def test_blocks_of_a_block_diagonal_factor_are_its_pieces() -> None:
    blocks = BdLoraConfig(target_modules_bd_a=["o_proj"], target_modules_bd_b=["q_proj"], nblocks=2)
    model = lora(base(), target_modules=["q_proj", "o_proj"], use_bdlora=blocks)
    groups = param_groups(model, lr=1e-3)
    found = {}
    for group in groups:
        for name, param in group["params"]:
            if "split_sizes" in group:
                module = model.get_submodule(name.removesuffix(".weight"))
                pieces = param.detach().split(group["split_sizes"], group["split_dim"])
                assert torch.equal(torch.block_diag(*pieces), module.weight_as_blockdiagonal_matrix())
                found[".".join(name.split(".")[-4:-2])] = len(pieces)
    assert found == {"o_proj.lora_A": 2, "q_proj.lora_B": 2}


def test_parameters_that_share_memory_are_flagged() -> None:
    """As peft 0.21 ties the adapters of embedding and head (`ensure_weight_tying`): by transposed views."""
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    model[1].weight = nn.Parameter(model[0].weight.detach().t())
    flags = [route.flag for route in param_groups(model, lr=1e-3, patterns=[("2.*", "adamw")]).routes]
    assert flags == ["", "shares its memory with 0.weight: both are updated", ""]


def test_singular_values_of_adalora_and_vectors_of_ia3_are_no_matrices() -> None:
    model = get_peft_model(base(), AdaLoraConfig(target_modules=["q_proj"], total_step=10))
    assert kinds(param_groups(model, lr=1e-3, loraplus_ratio=2)) == of({"q_proj"}, A, B, ("lora_E", "adamw", False))
    model = get_peft_model(base(), IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    with pytest.raises(ValueError, match=r"no matrix for Muon.*2 one row or column"):
        param_groups(model, lr=1e-3)


def test_no_decay_patterns_hold_for_muon_and_must_match() -> None:
    model = lora(base(), target_modules=["q_proj"])
    groups = param_groups(model, lr=1e-3, weight_decay=0.1, no_decay=["*.lora_B.*"])
    assert {(name.split(".")[-3], group["weight_decay"]) for group in groups for name, _ in group["params"]} == {
        ("lora_A", 0.1),
        ("lora_B", 0.0),
    }
    with pytest.raises(ValueError, match=r"'\*\.lora_C\.\*' matches no parameter"):
        param_groups(model, lr=1e-3, no_decay=["*.lora_C.*"])
    with pytest.raises(ValueError, match="not a string"):
        param_groups(model, lr=1e-3, no_decay="*.lora_B.*")


def test_nf4_base_is_frozen_and_its_adapters_are_routed_and_split(tmp_path: Any) -> None:
    base("phi3").save_pretrained(tmp_path)
    quantized = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        device_map="cpu",
    )
    model = lora(prepare_model_for_kbit_training(quantized), target_modules="all-linear", task_type="CAUSAL_LM")
    weight = model.get_parameter("base_model.model.model.layers.0.self_attn.qkv_proj.base_layer.weight")
    assert weight.dtype == torch.uint8
    groups = param_groups(model, lr=1e-3)
    assert {name.split(".")[-3] for group in groups for name, _ in group["params"]} == {"lora_A", "lora_B"}
    assert {group.get("split_sizes") for group in groups} == {None, (32, 16, 16), (96, 96)}
    assert {group["algorithm"] for group in groups} == {"muon"}
    assert next(route for route in groups.routes if route.name.endswith("qkv_proj.base_layer.weight")).algorithm is None

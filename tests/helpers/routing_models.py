"""Tiny models whose routing changed after 0.1, and groups in words; run with 0.1 it writes `data/routing_0_1.json`.

PYTHONPATH=<checkout of 0.1>:<its kernels> python tests/helpers/routing_models.py > tests/data/routing_0_1.json
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from peft import LoHaConfig, LoraConfig, OFTConfig, get_peft_model
from torch import nn

from muon8bit import param_groups

TINY = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
TEXT = TINY | {"vocab_size": 99}


def llama(**changes: Any) -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT | {"num_key_value_heads": 2} | changes))


def latent(**changes: Any) -> nn.Module:
    """Return a DeepSeek-V3 of one dense layer and one of experts, its queries behind a low rank."""
    sizes = {"kv_lora_rank": 16, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 8, "q_lora_rank": 16}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "n_group": 1}
    experts |= {"topk_group": 1, "first_k_dense_replace": 1}
    layers = {"num_hidden_layers": 2, "num_key_value_heads": 4}
    return hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(**TEXT | layers | sizes | experts | changes))


class Own(nn.Module):
    """A model of one's own: an embedding, hidden layers, parameters that are no Linear's, and `fc` as the head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.positions = nn.Parameter(torch.zeros(8, 16))
        self.mixing = nn.Parameter(torch.zeros(16, 16))
        self.lstm = nn.LSTM(16, 24)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(24, 4, 48) for _ in range(2))
        self.fc = nn.Linear(24, 5)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": llama,
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=99, n_embd=32, n_layer=1, n_head=4)),
    "bert": lambda: hf.BertForPreTraining(hf.BertConfig(**TEXT)),
    "ibert": lambda: hf.IBertForSequenceClassification(hf.IBertConfig(**TEXT)),
    "t5": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    ),
    "vit": lambda: hf.ViTForImageClassification(hf.ViTConfig(image_size=32, num_labels=3, **TINY)),
    "swin": lambda: hf.SwinForImageClassification(hf.SwinConfig(embed_dim=32, depths=[1], num_heads=[2])),
    "jetmoe": lambda: hf.JetMoeForCausalLM(
        hf.JetMoeConfig(
            vocab_size=99,
            hidden_size=32,
            num_hidden_layers=1,
            num_key_value_heads=2,
            kv_channels=8,
            intermediate_size=48,
            num_local_experts=4,
        )
    ),
    "mixtral": lambda: hf.MixtralForCausalLM(
        hf.MixtralConfig(**TEXT | {"num_key_value_heads": 2, "num_local_experts": 2})
    ),
    "lora": lambda: get_peft_model(llama(), LoraConfig(r=8, target_modules=["q_proj", "lm_head"])),
    "loha": lambda: get_peft_model(llama(), LoHaConfig(r=8, target_modules=["q_proj"])),
    "oft": lambda: get_peft_model(llama(), OFTConfig(oft_block_size=8, r=0, target_modules=["q_proj"])),
    "own": Own,
}


def in_words(groups: list[dict[str, Any]]) -> list[list[Any]]:
    """Return each group's algorithm, whether it decays, its further keys, and its names, joined."""
    keys = ("split_sizes", "split_dim", "flatten")
    return [
        [
            group["algorithm"],
            group["weight_decay"] > 0,
            {key: group[key] for key in keys if key in group},
            " ".join(name for name, _ in group["params"]),
        ]
        for group in groups
    ]


if __name__ == "__main__":
    found = {}
    for case, make in MODELS.items():
        with torch.device("meta"):
            found[case] = in_words(param_groups(make(), lr=1e-3))
    print(json.dumps(found, indent=0))

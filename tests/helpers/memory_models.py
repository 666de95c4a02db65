"""Configurations of small models for the tests of memory, and the paper's ladder."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig

_SIZES = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
_SIZES |= {"num_attention_heads": 4, "max_position_embeddings": 128}
_MOE = {"num_experts_per_tok": 2, "num_key_value_heads": 2}
TINY: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **_SIZES, "num_key_value_heads": 2},
    "qwen3": {"model_type": "qwen3", **_SIZES, "num_key_value_heads": 2, "head_dim": 16},
    "gpt_neox": {"model_type": "gpt_neox", **_SIZES},
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": 512,
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 128,
        "attn_pdrop": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
    "mixtral": {"model_type": "mixtral", **_SIZES, **_MOE, "num_local_experts": 4},
    "deepseek_v3": {
        "model_type": "deepseek_v3",
        **_SIZES,
        **_MOE,
        "num_key_value_heads": 4,
        "q_lora_rank": 48,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 24,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "moe_intermediate_size": 48,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
    },
}
# Of the 8-bit Muon team: layers, width, width of the MLP.
LADDER = {
    "162M": (12, 768, 3072),
    "405M": (24, 1024, 4096),
    "834M": (24, 1536, 6144),
    "1.4B": (24, 2048, 8192),
    "2.7B": (32, 2560, 10240),
}


def ladder_config(size: str) -> dict[str, Any]:
    """Return the config.json of a GPT-NeoX of the ladder."""
    layers, width, mlp_width = LADDER[size]
    return {
        "model_type": "gpt_neox",
        "vocab_size": 50257,
        "hidden_size": width,
        "intermediate_size": mlp_width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "hidden_act": "gelu",
    }


def config_of(values: dict[str, Any]) -> Any:
    return AutoConfig.for_model(**values)

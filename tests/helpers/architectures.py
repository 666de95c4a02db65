"""The architectures of the pretraining recipes in tiny."""

from __future__ import annotations

from typing import Any

_SIZES: dict[str, Any] = {"vocab_size": 288, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_SIZES |= {"max_position_embeddings": 64, "tie_word_embeddings": True}
_GQA = {"num_key_value_heads": 2, "head_dim": 8}
_MLA = {"num_key_value_heads": 4, "q_lora_rank": None, "kv_lora_rank": 16, "qk_nope_head_dim": 8}
_MLA |= {"qk_rope_head_dim": 4, "v_head_dim": 8, "num_nextn_predict_layers": 0}
_EXPERTS = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
# As the recipes, but that the third has a dense layer and one of experts.
TINY: dict[str, dict[str, Any]] = {
    "mla": {"model_type": "deepseek_v3", **_SIZES, **_MLA, "intermediate_size": 64, "first_k_dense_replace": 2},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        **_SIZES,
        **_GQA,
        "moe_intermediate_size": 24,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
    },
    "mla_moe": {
        "model_type": "deepseek_v3",
        **_SIZES,
        **_MLA,
        **_EXPERTS,
        "intermediate_size": 64,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 1,
    },
    "mixtral": {
        "model_type": "mixtral",
        **_SIZES,
        **_GQA,
        "intermediate_size": 24,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
}

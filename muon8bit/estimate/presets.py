"""Sizes of well-known models, as the keys of their `config.json`. Source: the config.json of each on its hub page."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

# Keys that most of them have; a row below may override any.
_BASES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "max_position_embeddings": 2048},
    "llama3": {"model_type": "llama", "vocab_size": 128256, "max_position_embeddings": 131072},
    "qwen2": {"model_type": "qwen2", "vocab_size": 151936, "max_position_embeddings": 32768},
    "qwen3": {"model_type": "qwen3", "vocab_size": 151936, "max_position_embeddings": 40960, "head_dim": 128},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "head_dim": 128,
        "intermediate_size": 6144,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "smollm2": {"model_type": "llama", "vocab_size": 49152, "max_position_embeddings": 8192},
    "mistral": {"model_type": "mistral", "vocab_size": 32000, "max_position_embeddings": 32768},
    "mixtral": {
        "model_type": "mixtral",
        "vocab_size": 32000,
        "max_position_embeddings": 32768,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "deepseek_v3": {
        "model_type": "deepseek_v3",
        "vocab_size": 129280,
        "max_position_embeddings": 163840,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "moe_intermediate_size": 2048,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 3,
        "n_group": 8,
        "topk_group": 4,
    },
}
# name: base, hidden_size, intermediate_size, layers, attention heads, key-value heads, whether embeddings are tied
_SIZES: dict[str, tuple[str, int, int, int, int, int, bool]] = {
    "Llama-3.2-1B": ("llama3", 2048, 8192, 16, 32, 8, True),
    "Llama-3.2-3B": ("llama3", 3072, 8192, 28, 24, 8, True),
    "Llama-3.1-8B": ("llama3", 4096, 14336, 32, 32, 8, False),
    "Llama-3.1-70B": ("llama3", 8192, 28672, 80, 64, 8, False),
    "Llama-3.1-405B": ("llama3", 16384, 53248, 126, 128, 8, False),
    "Llama-2-7B": ("llama", 4096, 11008, 32, 32, 32, False),
    "Llama-2-13B": ("llama", 5120, 13824, 40, 40, 40, False),
    "Qwen2.5-0.5B": ("qwen2", 896, 4864, 24, 14, 2, True),
    "Qwen2.5-1.5B": ("qwen2", 1536, 8960, 28, 12, 2, True),
    "Qwen2.5-3B": ("qwen2", 2048, 11008, 36, 16, 2, True),
    "Qwen2.5-7B": ("qwen2", 3584, 18944, 28, 28, 4, False),
    "Qwen2.5-14B": ("qwen2", 5120, 13824, 48, 40, 8, False),
    "Qwen2.5-32B": ("qwen2", 5120, 27648, 64, 40, 8, False),
    "Qwen2.5-72B": ("qwen2", 8192, 29568, 80, 64, 8, False),
    "Qwen3-0.6B": ("qwen3", 1024, 3072, 28, 16, 8, True),
    "Qwen3-1.7B": ("qwen3", 2048, 6144, 28, 16, 8, True),
    "Qwen3-4B": ("qwen3", 2560, 9728, 36, 32, 8, True),
    "Qwen3-8B": ("qwen3", 4096, 12288, 36, 32, 8, False),
    "Qwen3-14B": ("qwen3", 5120, 17408, 40, 40, 8, False),
    "Qwen3-32B": ("qwen3", 5120, 25600, 64, 64, 8, False),
    "Qwen3-30B-A3B": ("qwen3_moe", 2048, 6144, 48, 32, 4, False),
    "Qwen3-235B-A22B": ("qwen3_moe", 4096, 12288, 94, 64, 4, False),
    "Mistral-7B": ("mistral", 4096, 14336, 32, 32, 8, False),
    "Mixtral-8x7B": ("mixtral", 4096, 14336, 32, 32, 8, False),
    "SmolLM2-135M": ("smollm2", 576, 1536, 30, 9, 3, True),
    "SmolLM2-360M": ("smollm2", 960, 2560, 32, 15, 5, True),
    "SmolLM2-1.7B": ("smollm2", 2048, 8192, 24, 32, 32, True),
    "TinyLlama-1.1B": ("llama", 2048, 5632, 22, 32, 4, False),
    "DeepSeek-V3": ("deepseek_v3", 7168, 18432, 61, 128, 128, False),
}
_MORE: dict[str, dict[str, Any]] = {
    "Llama-2-7B": {"vocab_size": 32000, "max_position_embeddings": 4096},
    "Llama-2-13B": {"vocab_size": 32000, "max_position_embeddings": 4096},
    "TinyLlama-1.1B": {"vocab_size": 32000},
    "Qwen2.5-7B": {"vocab_size": 152064},
    "Qwen2.5-14B": {"vocab_size": 152064},
    "Qwen2.5-32B": {"vocab_size": 152064},
    "Qwen2.5-72B": {"vocab_size": 152064},
    "Qwen3-30B-A3B": {"moe_intermediate_size": 768},
    "Qwen3-235B-A22B": {"moe_intermediate_size": 1536},
}
# Who publishes them, by the key of their base, and names that are not organization/preset.
_ORGANIZATIONS = {
    "llama3": "meta-llama",
    "qwen2": "Qwen",
    "qwen3": "Qwen",
    "qwen3_moe": "Qwen",
    "smollm2": "HuggingFaceTB",
    "deepseek_v3": "deepseek-ai",
}
_HUB_NAMES = {
    "Llama-2-7B": "meta-llama/Llama-2-7b-hf",
    "Llama-2-13B": "meta-llama/Llama-2-13b-hf",
    "Mistral-7B": "mistralai/Mistral-7B-v0.1",
    "Mixtral-8x7B": "mistralai/Mixtral-8x7B-v0.1",
    "TinyLlama-1.1B": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
}
NAMES = tuple(_SIZES)


def _known(name: str) -> str | None:
    """Return the preset with this name, or with this name on the hub, in any case; None for an unknown name."""
    return {word.lower(): known for known in NAMES for word in (known, _hub_name(known))}.get(name.lower())


def _hub_name(known: str) -> str:
    return _HUB_NAMES.get(known) or f"{_ORGANIZATIONS[_SIZES[known][0]]}/{known}"


def preset(name: str) -> dict[str, Any] | None:
    """Return the config.json of a preset, by its own name or that on the hub, in any case; None for an unknown name."""
    found = _known(name)
    if found is None:
        return None
    base, hidden, intermediate, layers, heads, kv_heads, is_tied = _SIZES[found]
    return {
        **_BASES[base],
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "tie_word_embeddings": is_tied,
        **_MORE.get(found, {}),
    }


def nearest(name: str) -> list[str]:
    """Return up to three presets with the names nearest to `name`."""
    lowered = {known.lower(): known for known in NAMES}
    return [lowered[close] for close in get_close_matches(name.lower(), lowered, n=3, cutoff=0.4)]


def hub_name(name: str) -> str | None:
    """Return the name on the hub of a preset's model, whatever the case of its letters; None for an unknown name."""
    found = _known(name)
    return None if found is None else _hub_name(found)

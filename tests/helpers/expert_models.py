"""Tiny mixtures of experts of transformers, and their balancing losses as the papers write them, in float64."""

from __future__ import annotations

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from finetune.data.tokenize_chat import Encoded

SIZES = {
    "vocab_size": 288,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
NUM_EXPERTS, TOP_K = 6, 2
EXPERTS = {
    "mixtral": {"num_local_experts": NUM_EXPERTS},
    "qwen3_moe": {"num_experts": NUM_EXPERTS, "moe_intermediate_size": 16, "head_dim": 16},
    "deepseek_v3": {**LATENT, "n_routed_experts": NUM_EXPERTS, "n_group": 1, "topk_group": 1}
    | {"moe_intermediate_size": 16, "first_k_dense_replace": 1},
}


def expert_config(kind: str, **more: object) -> dict[str, object]:
    """Return the keys of a config.json with six experts, of which two are taken."""
    return {"model_type": kind, **SIZES, "num_experts_per_tok": TOP_K, **EXPERTS[kind], **more}


def expert_model(kind: str, **more: object):
    """Return a model with logits of routers that are far enough from 0 to tell experts apart."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(**expert_config(kind, initializer_range=0.2, pad_token_id=0, **more))
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()


def conversations(lengths: list[list[int]]) -> list[list[Encoded]]:
    """Return rows of conversations; the first tokens of each are a prompt."""
    rng = np.random.default_rng(2)
    return [
        [Encoded(rng.integers(1, 288, n).astype(np.int32), np.arange(n) >= 2, "here") for n in row] for row in lengths
    ]


def losses_of(kind: str, logits: torch.Tensor, lengths: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return balance loss and z-loss of one router, summed over tokens.

    Args:
        kind: of the model.
        logits: [rows, seq_len, experts], float64.
        lengths: tokens of the conversations of each row.
    """
    balance = z = torch.zeros((), dtype=torch.float64)
    for row, in_row in enumerate(lengths):
        start = 0
        for num in in_row:
            own = logits[row, start : start + num].double()
            start += num
            scores = own.sigmoid() if kind == "deepseek_v3" else own.softmax(-1)
            shares = scores / scores.sum(-1, keepdim=True)
            best = [set(token.tolist()) for token in scores.argsort(-1, descending=True)[:, :TOP_K]]
            for expert in range(NUM_EXPERTS):
                f = NUM_EXPERTS / (TOP_K * num) * sum(expert in token for token in best)
                balance = balance + num * f * shares[:, expert].mean()
            z = z + own.exp().sum(-1).log().square().sum()
    return balance, z

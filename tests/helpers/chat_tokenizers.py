"""Tiny tokenizers with the chat templates of well-known models."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEMPLATES = Path(__file__).parents[1] / "chat_templates"
CHATML = {"eos_token": "<|im_end|>", "bos_token": "<|im_start|>", "extra": []}
LLAMA3 = {
    "eos_token": "<|eot_id|>",
    "bos_token": "<|begin_of_text|>",
    "extra": ["<|start_header_id|>", "<|end_header_id|>"],
}
MISTRAL = {"eos_token": "</s>", "bos_token": "<s>", "extra": ["[INST]", "[/INST]"]}
FAMILIES = {
    "chatml": CHATML,
    "smollm2": CHATML,
    "qwen3": {**CHATML, "bos_token": None, "extra": ["<|im_start|>", "<think>", "</think>"]},
    "llama3": LLAMA3,
    "llama32": LLAMA3,
    "mistral": MISTRAL,
}
TEXT = ["the capital of France is Paris, a city\n\nYou are terse. What is 2 + 2? 4. user assistant system today"] * 3


def template_text(name: str) -> str:
    """Return a model's own template."""
    return (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


@cache
def make_tokenizer(family: str, metaspace: bool = False, pad_is_eos: bool = True) -> Any:
    """Make a tokenizer of bytes and few merges with the tokens and the template of a family.

    `metaspace` splits as sentencepiece does, into words that begin with their space; else byte level, with the
    trimmed offsets of GPT-2, Llama 3 and Qwen.
    """
    about = FAMILIES[family]
    special = [token for token in (about["bos_token"], about["eos_token"], *about["extra"]) if token]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=metaspace))
    alphabet = [chr(i) for i in range(32, 127)] + ["\n", "\u2581"] if metaspace else pre_tokenizers.ByteLevel.alphabet()
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
        tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, show_progress=False, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in ["<unk>", "<|pad|>", *special]])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=about["eos_token"],
        bos_token=about["bos_token"],
        pad_token=about["eos_token"] if pad_is_eos else "<|pad|>",
    )
    wrapped.chat_template = template_text(family)
    return wrapped

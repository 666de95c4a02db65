"""A tiny pretrained chat model with its tokenizer, and tiny chat data: all random, offline, in seconds."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WORDS = ["".join(random.Random(i).choices("abcdefghij", k=4)) for i in range(40)]


def conversations(num: int, seed: int = 0) -> list[list[dict[str, str]]]:
    """Return questions that name two words, and answers that repeat the second as often as the first is long."""
    rng = random.Random(seed)
    rows = []
    for _ in range(num):
        first, second = rng.sample(WORDS, 2)
        answer = " ".join([second] * rng.randint(1, 6))
        rows.append([{"role": "user", "content": f"{first} {second}?"}, {"role": "assistant", "content": answer}])
    return rows


def write_chats(file: Path, num: int = 60, seed: int = 0) -> Path:
    """Write a .jsonl file with `messages`; return its path."""
    file.write_text("".join(json.dumps({"messages": row}) + "\n" for row in conversations(num, seed)))
    return file


def make_tokenizer() -> Any:
    """Return a byte-level BPE of 300 tokens with ChatML's; pad is end of turn, as in many chat models."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [message["content"] for row in conversations(200, seed=9) for message in row]
    tokenizer.train_from_iterator(texts, trainer)
    fast: Any = PreTrainedTokenizerFast
    wrapped = fast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>")
    wrapped.chat_template = CHATML
    return wrapped


def make_base(folder: Path, seed: int = 0, **sizes: int) -> Path:
    """Save a random Llama of about 60 thousand parameters with the tokenizer, its head tied by default."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "tie_word_embeddings": True} | sizes
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        **shape,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder

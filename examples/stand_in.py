"""A tiny random Llama, rows of tokens and a tokenizer, so that the examples run anywhere: put your own here."""

from __future__ import annotations

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

NUM_TOKENS, NUM_MASKED, VOCABULARY = 24, 8, 64


def llama() -> LlamaForCausalLM:
    """Return a random Llama of 40 thousand fp32 parameters, the same at each call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def rows(num_rows: int = 40) -> Dataset:
    """Return arithmetic sequences of one length; `labels` mask the first tokens with -100, as those of a prompt."""
    starts = torch.arange(num_rows)[:, None]
    tokens = 3 + (starts * 7 + (1 + starts % 5) * torch.arange(NUM_TOKENS)) % (VOCABULARY - 3)
    labels = tokens.masked_fill(torch.arange(NUM_TOKENS) < NUM_MASKED, -100)
    return Dataset.from_dict({"input_ids": tokens.tolist(), "labels": labels.tolist()})


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of one token per word: `<pad>`, `<s>`, `</s>` and the numbers from 3 on."""
    words = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", *map(str, range(3, VOCABULARY))])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<pad>"
    )

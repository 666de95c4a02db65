"""A few generated answers before and after training, for a person to read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator


@torch.no_grad()
def generate_answers(
    accelerator: Accelerator, model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> list[str]:
    """Generate greedy answers, one prompt at a time; call it on one process, it is not collective.

    Args:
        accelerator: of the run, for its mixed precision.
        model: unwrapped causal language model; its mode is left as it is.
        tokenizer: its tokenizer.
        prompts: token ids, generation prompt included.
        max_new_tokens: at most, for each.

    Returns:
        Text of the answers without special tokens.
    """
    was_training = model.training
    model.eval()
    answers = []
    for prompt in prompts:
        with accelerator.autocast():
            answers.append(generate_answer(model, tokenizer, prompt, max_new_tokens))
    model.train(was_training)
    return answers


@torch.no_grad()
def generate_answer(
    model: Any,
    tokenizer: Any,
    prompt: Sequence[int],
    max_new_tokens: int,
    temperature: float = 0.0,
    streamer: Any = None,
) -> str:
    """Return the text that a model answers, without special tokens.

    Args:
        model: causal language model.
        tokenizer: its tokenizer.
        prompt: token ids, generation prompt included.
        max_new_tokens: at most.
        temperature: of what is drawn; 0 takes the likeliest token.
        streamer: of transformers, which prints tokens as they come, or None.
    """
    ids = torch.tensor([list(prompt)], device=next(model.parameters()).device)
    if temperature:
        how: dict[str, Any] = {"do_sample": True, "temperature": temperature}
    else:
        how = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    grown = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        eos_token_id=stop_ids(model, tokenizer),
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        streamer=streamer,
        **how,
    )
    return str(tokenizer.decode(grown[0, len(prompt) :], skip_special_tokens=True)).strip()


# Ends of turns in common templates; where a tokenizer has none of them, its end of text stands alone.
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "</s>")


def stop_ids(model: Any, tokenizer: Any) -> list[int]:
    """Return the token ids that end an answer: the generation config's, and the tokenizer's ends of turn."""
    known = model.generation_config.eos_token_id
    ids = set(known if isinstance(known, list) else [known]) | {tokenizer.eos_token_id}
    vocabulary = tokenizer.get_added_vocab()
    return sorted({i for i in ids if i is not None} | {vocabulary[t] for t in TURN_ENDS if t in vocabulary})

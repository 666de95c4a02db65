"""Embeddings for tokens that were added to a tokenizer, and that its model has none for."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from finetune.models.build import config_hash
from finetune.models.pretrained import fingerprint, load_base_weights
from finetune.models.tokens import cache_root
from finetune.models.weights import text_config
from finetune.storage.run_dir import folder_beside

FORMAT = 1  # bump when a base would become another folder


def lacks_embeddings(config: Any, tokenizer: Any) -> bool:
    """Whether a tokenizer has more tokens than the model of this configuration has embeddings."""
    return len(tokenizer) > int(text_config(config).vocab_size)


def resized_base(base: str, tokenizer: Any) -> str:
    """Return the folder, in the cache, of a base with an embedding for every token, made only if there is none.

    The new rows of embeddings and head are the mean of the others, so that no token is likelier than it was on average,
    and the same base gives the same bits. Dtypes are those of the checkpoint.

    Args:
        base: of `find_base`; its vocabulary is smaller than the tokenizer's.
        tokenizer: of the base, saved with it.

    Raises:
        InputError: the weights cannot be loaded.
    """
    model = load_base_weights(base, dtype="auto")
    digest = hashlib.sha256(f"{config_hash(model.config)}{fingerprint(model)}".encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    folder: Path = cache_root() / "models" / f"resized{FORMAT}-{digest.hexdigest()[:24]}"
    if folder.is_dir():
        return str(folder)
    num_before, num_tokens = int(text_config(model.config).vocab_size), len(tokenizer)
    print(f"{base}: {num_tokens - num_before} embeddings are added to {num_before}, into {folder}", flush=True)
    model.resize_token_embeddings(num_tokens, mean_resizing=False)
    with torch.no_grad():
        for end in filter(None, (model.get_input_embeddings(), model.get_output_embeddings())):
            for tensor in end.parameters(recurse=False):  # weight and bias; tied weights get the same mean twice
                tensor[num_before:] = tensor[:num_before].double().mean(0).to(tensor.dtype)
    with folder_beside(folder) as beside:
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
    return str(folder)

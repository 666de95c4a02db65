"""Tokens on disk: the tokenizer, and a memory-mapped cache keyed by tokenizer and corpus."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from finetune.config.errors import InputError
from finetune.data.corpus import Corpus, CorpusPiece, Part
from finetune.data.readers import reach_hub
from finetune.storage.run_dir import folder_beside

END_OF_TEXT = "<|endoftext|>"
# Text that a tokenizer is trained on; more changes little, and the trainer's counts stay bounded.
BPE_BYTES = 2**28
STREAM_BPE_BYTES = 2**25
# Characters encoded at once.
BATCH_CHARS = 2**18
# Bump when the cached bytes would differ for the same corpus and tokenizer.
FORMAT = 1

Tokens = npt.NDArray[np.unsignedinteger[Any]]


def cache_root() -> Path:
    """Return the folder of tokenizers and tokens: $MUON8BIT_CACHE, or ~/.cache/muon8bit."""
    return Path(os.environ.get("MUON8BIT_CACHE") or "~/.cache/muon8bit").expanduser()


def train_tokenizer(corpus: Corpus, vocab_size: int) -> Path:
    """Return the folder of a byte-level BPE of the training part, which is trained only if the cache has none.

    Args:
        corpus: text; its validation part is not looked at.
        vocab_size: entries, 256 bytes and the end-of-text token included.

    Raises:
        InputError: too few entries, or no training text.
    """
    if vocab_size < 257:
        raise InputError("--model-config", f"vocab_size {vocab_size} is below the 257 of bytes and end of text")
    folder = cache_root() / "tokenizers" / f"bpe{FORMAT}-{vocab_size}-{corpus.hash[:24]}"
    if folder.is_dir():
        return folder
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_training_text(corpus), trainer)
    fast: Any = PreTrainedTokenizerFast
    wrapped = fast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT, pad_token=END_OF_TEXT)
    with folder_beside(folder) as beside:
        wrapped.save_pretrained(beside)
    return folder


def _training_text(corpus: Corpus) -> Iterator[str]:
    left = STREAM_BPE_BYTES if corpus.endless else BPE_BYTES
    for piece in corpus.pieces():
        if left <= 0:
            return
        if piece.part == "train":
            left -= len(piece.text)
            yield piece.text


def load_tokenizer(name_or_path: str, option: str = "--tokenizer") -> Any:
    """Load a fast tokenizer; `option` is what gave it.

    Raises:
        InputError: transformers cannot load it, or it is not a fast one.
    """
    reach_hub(name_or_path, option, "tokenizer_config.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(option, f"cannot load {name_or_path!r}: {reason}") from None
    if not tokenizer.is_fast:
        raise InputError(option, f"{name_or_path!r} has no tokenizer.json; convert it to a fast tokenizer")
    return tokenizer


@dataclass(frozen=True)
class TokenCache:
    """Tokens of both parts, memory-mapped and read-only.

    Args:
        train: token ids of the training part [tokens], uint16 or uint32.
        validation: token ids of the validation part [tokens].
        meta: corpus hash, tokenizer hash, Python version; tokens, bytes (of UTF-8) and documents per part.
    """

    train: Tokens
    validation: Tokens
    meta: dict[str, Any]

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes per token of the validation part."""
        return float(self.meta["validation"]["bytes"] / self.meta["validation"]["tokens"])


def token_cache(corpus: Corpus, tokenizer: Any, budget: int | None = None) -> TokenCache:
    """Open the cache of this corpus and tokenizer, written first if there is none.

    Written beside and renamed when complete; memory stays bounded by `BATCH_CHARS`, whatever the corpus.

    Args:
        corpus: text.
        tokenizer: a fast tokenizer; its end-of-text token, if any, is put behind every document.
        budget: training tokens after which a stream is left, or None to read everything.

    Raises:
        InputError: the corpus is unreadable, or leaves no token; the cache is damaged.
    """
    tokenizer_hash = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
    key = hashlib.sha256(f"{FORMAT}\0{tokenizer_hash}\0{corpus.hash}\0{budget}".encode()).hexdigest()
    folder = cache_root() / "tokens" / key[:32]
    if not folder.is_dir():
        with folder_beside(folder) as beside:
            counts = _write_tokens(corpus, tokenizer, beside, budget)
            meta = {
                "corpus": corpus.hash,
                "tokenizer": tokenizer_hash,
                "python": platform.python_version(),
                "dtype": np.dtype(_dtype(tokenizer)).name,
                **counts,
            }
            (beside / "meta.json").write_text(json.dumps(meta, indent=1))
    return _open_cache(folder)


def _open_cache(folder: Path) -> TokenCache:
    """Map the files of a cache, whose lengths must be those that its meta.json tells."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        parts: dict[str, Tokens] = {}
        for part in ("train", "validation"):
            path, dtype, num_tokens = folder / f"{part}.bin", np.dtype(meta["dtype"]), meta[part]["tokens"]
            expected = num_tokens * dtype.itemsize
            if path.stat().st_size != expected:
                raise ValueError(f"{path.name} has {path.stat().st_size:,} bytes instead of {expected:,}")
            # An empty file cannot be mapped.
            parts[part] = np.memmap(path, dtype=dtype, mode="r") if num_tokens else np.zeros(0, dtype)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"the cached tokens in {folder} are damaged: {' '.join(str(error).split())}"
        raise InputError("--dataset", f"{reason}; delete that folder, and they are made again") from None
    return TokenCache(parts["train"], parts["validation"], meta)


def _dtype(tokenizer: Any) -> type[np.unsignedinteger[Any]]:
    return np.uint16 if len(tokenizer) <= 2**16 else np.uint32


def _write_tokens(corpus: Corpus, tokenizer: Any, folder: Path, budget: int | None) -> dict[str, Any]:
    counts = {part: {"tokens": 0, "bytes": 0, "documents": 0} for part in ("train", "validation")}
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    with (folder / "train.bin").open("wb") as train, (folder / "validation.bin").open("wb") as validation:
        files = {"train": train, "validation": validation}
        for batch in _batches(corpus.pieces()):
            encoded = backend.encode_batch_fast([p.text for p in batch], add_special_tokens=False)
            for piece, encoding in zip(batch, encoded, strict=True):
                ids = np.asarray(encoding.ids + eos if piece.ends else encoding.ids, dtype=_dtype(tokenizer))
                files[piece.part].write(ids.tobytes())
                count = counts[piece.part]
                count["tokens"] += len(ids)
                count["bytes"] += len(piece.text.encode())
                count["documents"] += piece.ends
            if budget is not None and counts["train"]["tokens"] >= budget:
                break
    return counts


def _batches(pieces: Iterator[CorpusPiece]) -> Iterator[list[CorpusPiece]]:
    batch: list[CorpusPiece] = []
    chars = 0
    for piece in pieces:
        batch.append(piece)
        chars += len(piece.text)
        if chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def check_size(cache: TokenCache, seq_len: int) -> None:
    """Check that every part holds one block: `seq_len` inputs and the target after the last one.

    Raises:
        InputError: one does not.
    """
    parts: tuple[Part, ...] = ("train", "validation")
    for part in parts:
        have = cache.meta[part]["tokens"]
        if have < seq_len + 1:
            raise InputError(
                "--dataset",
                f"its {part} part has {have} tokens, one block of --seq-len {seq_len} needs {seq_len + 1}; "
                "give more text, a smaller --seq-len or another --validation-fraction",
            )

"""Pretrained weights: loaded whole or not at all, and, of a model that also sees or hears, its text part."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from logging import ERROR
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.utils import logging

from finetune.config.errors import InputError

# What llama.cpp calls the parts of a file that its gguf-split has cut.
SPLIT_GGUF = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$", re.IGNORECASE)


def text_config(config: Any) -> Any:
    """Return the part of a transformers configuration that has the language model's sizes: itself, or a nested one."""
    return config.get_text_config()


def longest_of(config: Any) -> int | None:
    """Return the most tokens that the language model takes; None where its configuration sets no limit."""
    longest = getattr(text_config(config), "max_position_embeddings", None)
    return longest if isinstance(longest, int) and longest > 0 else None


def model_class(config: Any) -> Any | None:
    """Return the class of transformers that builds a language model of this configuration.

    Args:
        config: transformers configuration.

    Returns:
        `AutoModelForCausalLM`; `AutoModelForImageTextToText` for a model that also takes images, if only that one knows
        it; None where neither builds a causal language model.
    """
    text = text_config(config)
    if config.is_encoder_decoder or text.is_encoder_decoder:
        return None
    if config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return AutoModelForCausalLM
    if text is not config and config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return AutoModelForImageTextToText
    return None


def load_whole(kind: Any, source: str | Path, option: str, device: torch.device | None = None, **more: Any) -> Any:
    """Load pretrained weights, each of which must be there.

    Args:
        kind: of `model_class`.
        source: what `from_pretrained` takes.
        option: that gave it.
        device: where the weights go without a copy in host memory; None for the CPU.
        more: for `from_pretrained`.

    Returns:
        The model.

    Raises:
        InputError: transformers cannot load it, or the checkpoint lacks weights, has others, or has some of another
            shape; tied weights, which are saved once, are not missing.
    """
    if device is not None and device.type != "cpu":
        more["device_map"] = {"": device}
    shown = Path(source) / more["gguf_file"] if "gguf_file" in more else source
    try:
        with _quiet():  # the report is an error here
            model, info = kind.from_pretrained(source, output_loading_info=True, ignore_mismatched_sizes=True, **more)
    except Exception as error:
        raise InputError(option, f"transformers cannot read {shown}: {first_line(error)}") from None
    own = {name for name, _ in model.named_buffers()}
    problems = [
        f"{word} {_some(names)}"
        for word, names in (
            ("missing", set(info["missing_keys"])),
            ("unexpected", set(info["unexpected_keys"]) - own),  # buffers that earlier versions saved
            ("of another shape", {key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]}),
        )
        if names
    ]
    if problems:
        what = f"{shown} does not hold the weights of {type(model).__name__}: {'; '.join(problems)}"
        raise InputError(option, f"{what}; give a whole checkpoint, saved from the model itself")
    return model


def _some(names: Collection[str]) -> str:
    first, *rest = sorted(names)
    return f"{first} and {len(rest)} more" if rest else first


@contextmanager
def _quiet() -> Iterator[None]:
    before = logging.get_verbosity()
    logging.set_verbosity(ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def refuse_part(file: Path, option: str) -> None:
    """Refuse a GGUF file that is one of several.

    Raises:
        InputError: its name says so.
    """
    found = SPLIT_GGUF.search(file.name)
    if found and int(found[2]) > 1:
        raise InputError(
            option,
            f"{file} is part {int(found[1])} of {int(found[2])} of a split GGUF, and transformers reads single files; "
            "merge the parts by llama.cpp's `llama-gguf-split --merge`, and give the result",
        )


def beside_text(model: Any) -> list[str]:
    """Name the largest modules that hold nothing of the language model, such as a vision tower; [] if it is all.

    Args:
        model: of transformers, not wrapped.
    """
    if text_config(model.config) is model.config:
        return []
    text = _text_parameters(model)
    found: list[str] = []
    for name, module in model.named_modules():
        params = {id(param) for param in module.parameters()}
        if params and not params & text and not name.startswith(tuple(f"{other}." for other in found)):
            found.append(name)
    return found


def freeze_beside_text(model: Any) -> None:
    """Let only the language model of a model require gradients, embeddings and head included."""
    if text_config(model.config) is not model.config:
        text = _text_parameters(model)
        for param in model.parameters():
            if id(param) not in text:
                param.requires_grad_(False)


def _text_parameters(model: Any) -> set[int]:
    parts: list[nn.Module | None] = [
        model.get_decoder(),
        model.get_input_embeddings(),
        model.get_output_embeddings(),
    ]
    return {id(param) for part in parts if part is not None for param in part.parameters()}


def first_line(error: Exception) -> str:
    """Return the start of an error's text, on one line."""
    return " ".join((str(error) or type(error).__name__).split())[:300]

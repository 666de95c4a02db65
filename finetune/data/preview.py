"""A conversation for people: the text that the model reads, what is learned of it marked."""

from __future__ import annotations

import os
import sys

import numpy as np

from finetune.data.messages import Example
from finetune.data.tokenize_chat import ChatEncoding

COLOURS = ("\x1b[1;32m", "\x1b[0m")
LINE_END = "\n"
BRACKETS = ("[[", "]]")


def show_example(example: Example, encoding: ChatEncoding, max_length: int) -> str:
    """Render a conversation, with what is learned in colour on a terminal and else between brackets.

    Args:
        example: the conversation.
        encoding: tokenizer and template.
        max_length: tokens kept of it.

    Raises:
        RowError: as of `encode_examples`.
    """
    rendered = encoding.template.answers(example, encoding.turns == "last")
    ((ids, offsets),) = encoding.tokenize([rendered.text])
    learned = encoding.targets(rendered, ids, offsets, example.where)[:max_length]
    marks = COLOURS if sys.stdout.isatty() and "NO_COLOR" not in os.environ else BRACKETS
    head = f"{example.where}: {len(learned):,} tokens, {int(learned.sum()):,} learned"
    if len(ids) > max_length:
        head += f", {len(ids) - max_length:,} more cut off by --seq-len"
    text, place = "", 0
    for first, last in _runs(learned):
        start, end = offsets[first][0], offsets[last][1]
        text += f"{_shown(rendered.text[place:start])}{marks[0]}{_shown(rendered.text[start:end])}{marks[1]}"
        place = end
    end = offsets[max_length - 1][1] if len(ids) > max_length else len(rendered.text)
    text += _shown(rendered.text[place:end])
    return f"{head}\n{text.removesuffix(LINE_END)}\n"


def _runs(learned: np.ndarray) -> list[tuple[int, int]]:
    """Return the first and the last index of every run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], learned, [False])).astype(np.int8)))
    return [(int(first), int(last) - 1) for first, last in edges.reshape(-1, 2)]


def _shown(text: str) -> str:
    """Replace characters that would control a terminal by their escapes."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)

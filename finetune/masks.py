"""Messages -> token ids and a mask of those that carry loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from finetune.chat import Example, Turns


@dataclass(frozen=True)
class Encoded:
    """One tokenized conversation.

    Args:
        input_ids: token ids [length], int32.
        targets: [length] bool, True where the token itself is to be predicted; never at index 0.
        where: origin, as `Example.where`.
    """

    input_ids: npt.NDArray[np.int32]
    targets: npt.NDArray[np.bool_]
    where: str

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class EncodedExamples:
    """Conversations that fit, and what became of the others.

    Args:
        rows: encoded conversations, each at most `max_length` long, each with a target.
        num_truncated: conversations whose end was cut off, dropped ones included.
        num_dropped: conversations left out because no target was left (only with `drop_truncated`).
        num_tokens_cut: tokens cut off.
        sources: how often each kind of mask was used: "markers", "shipped", "trl", "prefix".
    """

    rows: list[Encoded]
    num_truncated: int
    num_dropped: int
    num_tokens_cut: int
    sources: dict[str, int]

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows."""
        return sum(len(row) for row in self.rows)

    @property
    def num_targets(self) -> int:
        """Tokens of all rows that carry loss."""
        return sum(int(row.targets.sum()) for row in self.rows)

    def __str__(self) -> str:
        raise NotImplementedError


class ChatEncoding:
    """A tokenizer with its chat template and a fixed date.

    Args:
        tokenizer: a fast transformers tokenizer; not changed.
        date: the day that a template sees as today, `YYYY-MM-DD`.
        chat_template: Jinja text that replaces the tokenizer's own; None keeps it.
        turns: "all" assistant turns carry loss, or the "last" of each conversation.

    Raises:
        InputError: no template, a template that does not compile, a bad date, no fast tokenizer.
    """

    def __init__(self, tokenizer: Any, *, date: str, chat_template: str | None = None, turns: Turns = "all") -> None:
        raise NotImplementedError

    def prompt(self, messages: Sequence[Any]) -> list[int]:
        """Token ids of messages followed by the generation prompt, for sample answers."""
        raise NotImplementedError


def encode_examples(
    examples: Sequence[Example], encoding: ChatEncoding, *, max_length: int, drop_truncated: bool = False
) -> EncodedExamples:
    """Tokenize conversations and mark the tokens that carry loss: assistant turns with their end-of-turn token.

    Args:
        examples: conversations.
        encoding: tokenizer and template.
        max_length: tokens kept of each conversation, from its start.
        drop_truncated: leave out a conversation whose answers were all cut off, and count it, instead of raising.

    Raises:
        InputError: a template that refuses a row, that drops its system turn, whose answers cannot be told from the
            rest, or that ends no turn; a row that loses its whole answer to `max_length`. The sentence names the row.
    """
    raise NotImplementedError

"""Rows of chat data -> examples of messages. With `masks` and `packing`, the data half of fine-tuning.

    parts = load_parts("data.jsonl", validation_fraction=0.05)      # or "stdlib", a .parquet, a `datasets` name
    encoding = ChatEncoding(tokenizer, date="2024-07-26")           # finetune.masks; checks the chat template
    train = encode_examples(parts.train, encoding, max_length=2048) # .rows, .report (one line by `str`)
    rows = Rows(train.rows, max_length=2048, packing=True, seed=0)  # finetune.packing; as `loop.Blocks`:
    batch = rows.batch([rows.shuffled(0)], device)                  # input_ids, targets[, position_ids]
    check_isolation(model, num_rows=batch_size)                     # before the first packed step

Option names that the errors here use: --dataset, --split, --max-length, --drop-truncated, --chat-template, --model,
--packing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypedDict

Role: TypeAlias = Literal["system", "user", "assistant"]
# Which assistant turns carry loss: all of them, or the last of each conversation.
Turns: TypeAlias = Literal["all", "last"]


class Message(TypedDict):
    """One turn."""

    role: Role
    content: str


@dataclass(frozen=True)
class Example:
    """One conversation.

    Args:
        messages: turns in order; at least one is an assistant's, none of which is empty.
        where: its origin for messages to people, such as `row 3 of data.jsonl` (1-based).
        first_answer: index of the first message that may carry loss (those of a `prompt` column do not).
    """

    messages: tuple[Message, ...]
    where: str
    first_answer: int = 0


@dataclass(frozen=True)
class Parts:
    """Examples to train on and held out, no prompt on both sides.

    Args:
        train: at least one example.
        validation: at least one, unless the fraction was 0.
        label: what was asked for, for the log.
        hash: hex SHA-256 of all examples and their split.
    """

    train: Sequence[Example]
    validation: Sequence[Example]
    label: str
    hash: str


def load_examples(
    dataset: str, *, config: str | None = None, split: str = "train", limit: int | None = None, seed: int = 0
) -> list[Example]:
    """Read conversations from a .jsonl or .parquet file, a folder of them, a saved dataset, or by `datasets` name.

    Each row has `messages` (a list of {role, content}), or `prompt` and `completion`, or `instruction`, `output` and
    perhaps `input`; prompt and completion are text, or lists of messages.

    Args:
        dataset: path or name.
        config: configuration of a `datasets` name.
        split: split of a `datasets` name or of a saved dataset.
        limit: take so many rows, drawn without replacement; None takes all.
        seed: of that draw.

    Returns:
        Examples in the order of the rows.

    Raises:
        InputError: nothing there, unreadable, empty, a missing column, an unknown role, a row without an answer; the
            sentence names file and row.
    """
    raise NotImplementedError


def load_parts(
    dataset: str,
    *,
    validation_fraction: float,
    config: str | None = None,
    split: str = "train",
    limit: int | None = None,
    seed: int = 0,
) -> Parts:
    """Examples of a dataset, or of the standard library for `stdlib`, split into two parts by the hash of the prompt
    (`stdlib`: by module).

    Raises:
        InputError: as `load_examples`, or too few different prompts to hold one out.
    """
    raise NotImplementedError

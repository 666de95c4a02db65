"""One conversation: its turns, and which of them carry loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypedDict

Role: TypeAlias = Literal["system", "developer", "user", "assistant", "tool"]


class _Turn(TypedDict):
    role: Role
    content: str


class Message(_Turn, total=False):
    """One turn; what is not in every turn is handed to the chat template."""

    tool_calls: list[Mapping[str, Any]]
    name: str
    tool_call_id: str


@dataclass(frozen=True)
class Example:
    """One conversation.

    Args:
        messages: turns in order; one at least is an assistant's that carries loss, and none of those is empty.
        where: its origin, to be shown to people, such as `row 3 of data.jsonl` (counted from 1).
        first_answer: index of the first message that may carry loss (those of a `prompt` column do not).
        masked: indices of assistant turns that carry no loss, since their `weight` is 0.
        tools: JSON schemas of the tools that the chat template shows to the model.
    """

    messages: tuple[Message, ...]
    where: str
    first_answer: int = 0
    masked: frozenset[int] = frozenset()
    tools: tuple[Any, ...] = ()

    @property
    def answers(self) -> list[int]:
        """Indices of the assistant turns that may carry loss."""
        return [
            i
            for i, message in enumerate(self.messages)
            if i >= self.first_answer and message["role"] == "assistant" and i not in self.masked
        ]

    @property
    def content(self) -> list[Any]:
        """What tells one conversation from another, as JSON takes it; what release 0.1 did not have stands last."""
        more = [sorted(self.masked), list(self.tools)] if self.masked or self.tools else []
        return [self.messages, self.first_answer, *more]

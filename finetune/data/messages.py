"""One conversation, and the forms of rows that it can come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypedDict, cast, get_args

from finetune.config.errors import InputError
from finetune.data.texts import check_characters

Role: TypeAlias = Literal["system", "user", "assistant"]
# Keys of a message that change what the assistant says, and that nothing here renders.
UNSUPPORTED = ("tool_calls", "function_call", "reasoning_content", "thinking")
COLUMNS = ("messages", "prompt", "completion", "instruction", "input", "output")
FORMS = "`messages`, or `prompt` and `completion`, or `instruction` and `output`"


class Message(TypedDict):
    """One turn."""

    role: Role
    content: str


@dataclass(frozen=True)
class Example:
    """One conversation.

    Args:
        messages: turns in order; one at least is an assistant's, and no assistant's is empty.
        where: its origin, to be shown to people, such as `row 3 of data.jsonl` (counted from 1).
        first_answer: index of the first message that may carry loss (those of a `prompt` column do not).
    """

    messages: tuple[Message, ...]
    where: str
    first_answer: int = 0

    @property
    def answers(self) -> list[int]:
        """Indices of the assistant turns that may carry loss."""
        turns = enumerate(self.messages)
        return [i for i, message in turns if i >= self.first_answer and message["role"] == "assistant"]


def example_from_row(row: Any, where: str) -> Example:
    """A row of a dataset -> a conversation. Columns that hold nothing count as missing.

    Args:
        row: has `messages` (a list of {role, content}), or `prompt` and `completion` (text, or lists of messages), or
            `instruction`, `output` and perhaps `input`; the first of these forms that is there is taken.
        where: its origin, to be shown to people.

    Raises:
        InputError: a missing column, something that is no text, half a character, an unknown role, no answer, or an
            empty one.
    """
    if not isinstance(row, Mapping):
        raise InputError("--dataset", f"{where} is no object with columns; it needs {FORMS}")
    present = {key: value for key, value in row.items() if value is not None}
    if "messages" in present:
        return _checked(_messages(present["messages"], "messages", where), where, 0)
    if "prompt" in present and "completion" in present:
        prompt = _side(present["prompt"], "prompt", "user", where)
        completion = _side(present["completion"], "completion", "assistant", where)
        return _checked([*prompt, *completion], where, len(prompt))
    if "instruction" in present and "output" in present:
        parts = [_text(present[key], key, where) for key in ("instruction", "input") if key in present]
        ask = Message(role="user", content="\n\n".join(part for part in parts if part.strip()))
        answer = Message(role="assistant", content=_text(present["output"], "output", where))
        return _checked([ask, answer], where, 0)
    names = ", ".join(f"`{name}`" for name in present) or "nothing"
    raise InputError("--dataset", f"{where} has {names}; it needs {FORMS}")


def _side(value: Any, column: str, role: Role, where: str) -> Sequence[Message]:
    if isinstance(value, str):
        return [Message(role=role, content=_text(value, column, where))]
    return _messages(value, column, where)


def _text(value: Any, column: str, where: str) -> str:
    if not isinstance(value, str):
        raise InputError("--dataset", f"`{column}` of {where} holds {type(value).__name__}, not text")
    check_characters(value, f"`{column}` of {where}")
    return value


def _messages(value: Any, column: str, where: str) -> list[Message]:
    if not isinstance(value, list):
        raise InputError("--dataset", f"`{column}` of {where} holds {type(value).__name__}, not a list of messages")
    messages = []
    for number, turn in enumerate(value, 1):
        place = f"message {number} of {where}"
        if not isinstance(turn, Mapping) or turn.get("role") is None:
            raise InputError("--dataset", f"{place} has no `role`; a message is {{role, content}}")
        if turn["role"] not in get_args(Role):
            raise InputError(
                "--dataset", f"{place} has the unknown role {turn['role']!r}; give one of {', '.join(get_args(Role))}"
            )
        for key in UNSUPPORTED:
            if turn.get(key):
                raise InputError("--dataset", f"{place} has `{key}`, which is not supported; leave such rows out")
        messages.append(Message(role=cast(Role, turn["role"]), content=_text(turn.get("content"), "content", place)))
    return messages


def _checked(messages: Sequence[Message], where: str, first_answer: int) -> Example:
    example = Example(tuple(messages), where, first_answer)
    if not example.answers:
        raise InputError("--dataset", f"{where} has no assistant turn; there is nothing to learn from it")
    for i in example.answers:
        if not messages[i]["content"].strip():
            raise InputError("--dataset", f"{where} has an empty assistant turn (message {i + 1}); leave it out")
    return example

"""The turns of one conversation as datasets have them: keys, roles, text parts, weights, tool calls."""

from __future__ import annotations

import json
from collections.abc import Mapping, Set
from typing import Any, NamedTuple

from finetune.data.columns import ROLES, Columns
from finetune.data.messages import Message, Role
from finetune.data.report import RowError
from finetune.data.texts import check_characters, kind_of

# Pairs of keys that hold the role and the text of a turn: those of chat APIs, and ShareGPT's.
KEYS = (("role", "content"), ("from", "value"))
ROLE_NAMES: dict[str, Role] = {
    **{role: role for role in ROLES},
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
}
# Keys of a message that change what the assistant says, and that nothing here renders.
UNSUPPORTED = ("function_call", "reasoning_content", "thinking")
# Keys of a tool's turn that a chat template may read.
TOOL_KEYS = ("name", "tool_call_id")


class Turns(NamedTuple):
    """Turns of a row.

    Args:
        messages: in order.
        masked: indices of those with weight 0.
        keys: all keys that hold something, and what stands for the roles.
        unused: those of them that nothing reads, behind the name of their column.
    """

    messages: list[Message]
    masked: Set[int] = frozenset()
    keys: Set[str] = frozenset()
    unused: Set[str] = frozenset()


def read_turns(value: Any, column: str, where: str, columns: Columns) -> Turns:
    """Read a list of turns, or a text that is one in JSON.

    Args:
        value: of the column.
        column: its name.
        where: the row, to be shown to people.
        columns: other names of keys and roles.

    Returns:
        Turns with the roles of `Message`; system turns without content are left out.

    Raises:
        RowError: not a list of turns, or a turn without a role or text, or with a key that is not supported.
    """
    if isinstance(value, str):
        value = parsed_list(value)
    if not isinstance(value, list):
        raise _not_of_type(value, f"`{column}` of {where}", "a list of messages")
    messages: list[Message] = []
    masked, keys, unused = set(), set(), set()
    for number, turn in enumerate(value, 1):
        place = f"message {number} of {where}"
        role_key, content_key = _keys(turn, place, columns)
        role, content = _role(turn[role_key], place, columns), turn.get(content_key)
        for key in UNSUPPORTED:
            if turn.get(key):
                problem = f"{place} has `{key}`, which is not supported; leave such rows out"
                raise RowError("--dataset", problem, f"`{key}` in a message")
        weight_key = columns.get("weight", "weight")
        used = {role_key, content_key, weight_key, *UNSUPPORTED, "tool_calls", *(TOOL_KEYS if role == "tool" else ())}
        held = {key for key, value in turn.items() if value is not None}
        keys |= {*held, str(turn[role_key])}
        unused |= {f"{column}.{key}" for key in held if key not in used}
        if content is None and role in ("system", "developer"):
            continue
        if not _weight(turn.get(weight_key), place):
            masked.add(len(messages))
        calls = _tool_calls(turn.get("tool_calls"), role, place)
        if content is None and calls:
            content = ""
        message = Message(role=role, content=read_text(content, f"`{content_key}` of {place}"))
        if calls:
            message["tool_calls"] = calls
        if role == "tool":
            _add_tool_keys(message, turn, place)
        messages.append(message)
    return Turns(messages, masked, keys, unused)


def read_text(value: Any, what: str) -> str:
    """Return a text, or the text of a list of text parts, one behind the other.

    Args:
        value: that was read.
        what: the column or key, and the row, to be shown to people.

    Raises:
        RowError: neither, or half a character.
    """
    if isinstance(value, list):
        value = "".join(_part(part, what) for part in value)
    if not isinstance(value, str):
        raise _not_of_type(value, what, "text")
    check_characters(value, what)
    return value


def parsed_list(text: str) -> Any:
    """Return the list that a text is in JSON, or the text itself."""
    return _parsed(text) if text.lstrip()[:1] == "[" else text


def _parsed(text: str) -> Any:
    """Return what a text is in JSON, or the text itself."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _tool_calls(value: Any, role: Role, place: str) -> list[Mapping[str, Any]]:
    """Return calls as chat templates take them: arguments given as JSON text become objects."""
    if not value:
        return []
    calls: list[Mapping[str, Any]] = []
    given_calls: list[Any] = value if isinstance(value, list) and role == "assistant" else [None]
    for call in given_calls:
        function: Any = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            problem = f"{place} has `tool_calls` that are no calls {{function: {{name, arguments}}}} of an assistant"
            raise RowError("--dataset", f"{problem}; correct them", "`tool_calls` that are no calls")
        given = function.get("arguments")
        parsed = {**function, "arguments": _parsed(given) if isinstance(given, str) else given or {}}
        calls.append({**call, "function": parsed} if function is not call else parsed)
    check_characters(json.dumps(calls, ensure_ascii=False, default=str), f"`tool_calls` of {place}")
    return calls


def _add_tool_keys(message: Message, turn: Mapping[str, Any], place: str) -> None:
    if turn.get("name") is not None:
        message["name"] = read_text(turn["name"], f"`name` of {place}")
    if turn.get("tool_call_id") is not None:
        message["tool_call_id"] = read_text(turn["tool_call_id"], f"`tool_call_id` of {place}")


def _part(part: Any, what: str) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind != "text" or not isinstance(part.get("text"), str):
        shown = f"a part of type {kind!r}" if kind else f"a part that is {kind_of(part)}"
        problem = f"{what} has {shown}; only parts like {{type: text, text: ...}} are trained on; leave such rows out"
        raise RowError("--dataset", problem, "a part that is no text")
    return str(part["text"])


def _keys(turn: Any, place: str, columns: Columns) -> tuple[str, str]:
    """Return the keys of a turn's role and text."""
    given = columns.get("role"), columns.get("content")
    pairs = [(given[0] or role, given[1] or content) for role, content in KEYS]
    for role, content in pairs:
        if isinstance(turn, Mapping) and turn.get(role) is not None:
            return role, content
    names = " or ".join(dict.fromkeys(f"{{{role}, {content}}}" for role, content in pairs))
    raise RowError(
        "--dataset", f"{place} has no `{pairs[0][0]}`; a message is {names}", f"a message without `{pairs[0][0]}`"
    )


def _role(value: Any, place: str, columns: Columns) -> Role:
    for role in ROLES:
        if columns.get(role) == value:
            return role
    if isinstance(value, str) and value in ROLE_NAMES:
        return ROLE_NAMES[value]
    raise RowError(
        "--dataset",
        f"{place} has the unknown role {value!r}; give one of {', '.join(ROLE_NAMES)}, or say which it is: "
        f"--columns assistant={value} to learn its turns, --columns user={value} not to; or leave such rows out",
        f"the unknown role {value!r}",
    )


def _weight(value: Any, place: str) -> bool:
    if value is None:
        return True
    if isinstance(value, (int, float)) and value in (0, 1):
        return bool(value)
    problem = f"{place} has the weight {value!r}; give 1 to learn the turn, or 0 not to"
    raise RowError("--dataset", problem, "a weight that is not 0 or 1")


def _not_of_type(value: Any, what: str, wanted: str) -> RowError:
    return RowError("--dataset", f"{what} holds {kind_of(value)}, not {wanted}", f"a value that is not {wanted}")

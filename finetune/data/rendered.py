"""The text of a conversation, and that nothing of the conversation is missing in it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from finetune.data.messages import Example, Message
from finetune.data.report import RowError


class Rendered(NamedTuple):
    """One conversation as text.

    Args:
        text: what the model reads.
        spans: [start, end) in characters of the answers that carry loss.
        source: where the spans come from: "markers" of the model's own template, a "shipped" training template, one of
            "trl", or differences of a "prefix" rendered with and without the answer.
    """

    text: str
    spans: list[tuple[int, int]]
    source: str


def lost(text: str, example: Example) -> Message | None:
    """Return the first turn, of those that are asked and not answered, whose content is not in the text."""
    asked = (message for message in example.messages if message["role"] != "assistant")
    return next((message for message in asked if not _is_in(message["content"], text)), None)


def refuse_lost(text: str, example: Example) -> None:
    """Refuse a text that lacks a turn which is asked and not answered.

    Raises:
        RowError: names the turn's role.
    """
    turn = lost(text, example)
    if turn is not None:
        raise RowError(
            "--chat-template",
            f"the chat template leaves out the {turn['role']} turn of {example.where}; give a template that has it",
            f"a {turn['role']} turn that the chat template leaves out",
        )


def refuse_lost_tools(text: str, example: Example) -> None:
    """Refuse a text that lacks the name of a tool.

    Raises:
        RowError: names the tool.
    """
    for tool in example.tools:
        name = tool.get("function", tool).get("name")
        if not isinstance(name, str) or name not in text:
            raise RowError(
                "--chat-template",
                f"the chat template leaves out the tool {name!r} of {example.where}; give a template that shows tools, "
                "or leave the column `tools` out",
                "tools that the chat template leaves out",
            )


def refuse_altered(rendered: Rendered, wanted: Sequence[int], example: Example) -> None:
    """Refuse answers that carry loss and that the template does not write as they are, but for space.

    Args:
        rendered: the text, with the spans of the wanted answers.
        wanted: indices of the messages that carry loss.
        example: the conversation.

    Raises:
        RowError: names the message.
    """
    spans = rendered.spans
    if len(spans) != len(wanted):  # a template of its author's own, with several marks in a turn
        spans = [(spans[0][0], spans[-1][1])] * len(wanted) if spans else []
    for i, (first, last) in zip(wanted, spans, strict=False):
        message = example.messages[i]
        # What opens an answer, such as <think>, may stand before the span, in the prompt.
        written = rendered.text[max(0, first - len(message["content"])) : last]
        for part in (message["content"], *_texts(message.get("tool_calls", []))):
            if not _is_in(part, written) and _squeezed(part) not in _squeezed(written):
                way_out = ", or learn the last answer alone by --turns last" if i < example.answers[-1] else ""
                raise RowError(
                    "--chat-template",
                    f"the chat template changes an answer of {example.where}: of message {i + 1}, {part[:60]!r}, it "
                    f"leaves something out; give a template that writes all of it{way_out}",
                    "answers that the chat template changes",
                )


def _is_in(part: str, text: str) -> bool:
    """Check whether a text, without the space around it, is part of another one, as it is or as JSON writes it."""
    part = part.strip()
    return part in text or json.dumps(part, ensure_ascii=False)[1:-1] in text


def _texts(calls: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names of functions that are called, and all texts of their arguments."""
    functions = [call.get("function", call) for call in calls]
    return [function["name"] for function in functions] + _leaves([function["arguments"] for function in functions])


def _leaves(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return [leaf for part in parts for leaf in _leaves(part)]


def _squeezed(text: str) -> str:
    return "".join(text.split())

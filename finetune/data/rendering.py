"""Messages -> text, with the stretches of it that assistants wrote."""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable, Sequence
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError
from transformers.utils.chat_template_utils import render_jinja_template

from finetune.config.errors import InputError
from finetune.data.messages import Example, Message
from finetune.data.rendered import Rendered, lost, refuse_altered, refuse_lost, refuse_lost_tools
from finetune.data.report import RowError
from finetune.data.templates import TRAINING_TEMPLATES
from finetune.models.weights import first_line

MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
# What a template may ask of a date; the time of day is that of its first second.
DIRECTIVES = ("%-d", "%-m", *(f"%{letter}" for letter in "aAbBcdeFHIjmMpSUwWxXyY"))


class ChatTemplate:
    """A chat template on a fixed day.

    Args:
        text: Jinja source.
        variables: names that it may use, such as `bos_token`.
        date: the day it sees as today.
        load_more: gives TRL's training template for it, or None; asked once, where no shipped one fits.

    Raises:
        InputError: not valid Jinja.
    """

    def __init__(
        self, text: str, variables: dict[str, Any], date: datetime.date, load_more: Callable[[], str | None]
    ) -> None:
        self.has_markers = bool(MARKER.search(text))
        self.variables = {**variables, "date_string": date.strftime("%d %b %Y")}
        self.date = date
        self.text = text
        self.candidates = [("shipped", template) for template in TRAINING_TEMPLATES.values()]
        self.load_more: Callable[[], str | None] | None = load_more
        try:
            self._render(text, [Message(role="user", content="Hello")])
        except TemplateSyntaxError as error:
            raise InputError("--chat-template", f"no valid template: {error.message}, line {error.lineno}") from None
        except Exception:
            pass  # it is valid, and says what it asks of a conversation when one is rendered

    def render(
        self, messages: Sequence[Message], where: str, tools: Sequence[Any] = (), *, generation_prompt: bool = False
    ) -> str:
        """Render a conversation by the model's own template.

        Args:
            messages: turns.
            where: origin, to be shown to people.
            tools: JSON schemas of tools.
            generation_prompt: end with the opening of an assistant turn.

        Raises:
            RowError: the template refuses it.
        """
        try:
            text = self._render(self.text, messages, tools, generation_prompt=generation_prompt)[0]
            text.encode()
        except UnicodeEncodeError:
            reason = "it writes half of a character (a lone surrogate), which no tokenizer takes; correct it"
            raise _failure(where, reason) from None
        except TemplateError as error:
            problem = f"the chat template refuses {where}: {first_line(error)}"
            raise RowError("--dataset", problem, "refused by the chat template") from None
        except Exception as error:  # of what the template does with a value, such as a sum of text and a number
            raise _failure(where, f"{type(error).__name__}: {first_line(error)}") from None
        return text

    def answers(self, example: Example, last_only: bool) -> Rendered:
        """Render a conversation and find its answers that carry loss.

        Args:
            example: the conversation.
            last_only: only its last answer carries loss.

        Raises:
            RowError: the template refuses it, leaves a turn out, changes an answer, or its answers cannot be told from
                the rest.
        """
        text = self.render(example.messages, example.where, example.tools)
        refuse_lost_tools(text, example)
        wanted = example.answers[-1:] if last_only else example.answers
        found = self._marked(text, example)
        if found is not None:
            found = found._replace(spans=_chosen(found.spans, wanted, example))
        else:
            refuse_lost(text, example)
            found = Rendered(text, [self._difference(text, i, example) for i in wanted], "prefix")
        refuse_altered(found, wanted, example)
        return found

    def _marked(self, text: str, example: Example) -> Rendered | None:
        """Render a conversation by a template that marks answers, with the spans of all; None where none does."""
        if self.has_markers:
            refuse_lost(text, example)
            return Rendered(text, self._render(self.text, example.messages, example.tools)[1], "markers")
        for place, (source, candidate) in enumerate(self.candidates):
            found = self._matching(candidate, text, example)
            if found is not None:
                self.candidates.insert(0, self.candidates.pop(place))  # the next conversation will match it as well
                return Rendered(*found, source)
        load, self.load_more = self.load_more, None
        more = load() if load else None
        if more is None:
            return None
        self.candidates.append(("trl", more))
        return self._marked(text, example)

    def _render(
        self, template: str, messages: Sequence[Message], tools: Sequence[Any] = (), *, generation_prompt: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        marked = bool(MARKER.search(template))
        rendered: Any = render_jinja_template(
            [[dict(message) for message in messages]],
            tools=list(tools) or None,
            chat_template=self._dated(template),
            return_assistant_tokens_mask=marked,
            add_generation_prompt=generation_prompt,
            **self.variables,
        )
        texts, spans = rendered
        return texts[0], spans[0] if marked else []

    def _dated(self, template: str) -> str:
        """Return the template with a `strftime_now` for the fixed day alone: transformers passes no functions on."""
        if "strftime_now" not in template:
            return template
        filters = "".join(f"|replace('{d}', '{self.date.strftime(d)}')" for d in DIRECTIVES)
        return f"{{%- macro strftime_now(format) %}}{{{{ format{filters} }}}}{{%- endmacro %}}\n{template}"

    def _matching(self, candidate: str, text: str, example: Example) -> tuple[str, list[tuple[int, int]]] | None:
        """Return text and spans of all answers by a training template, or None if its text is not the own template's.

        Where the own template loses the system turn, both are compared without that turn, and the training template
        must have it.
        """
        try:
            rendered, spans = self._render(candidate, example.messages, example.tools)
            if rendered == text:
                return (rendered, spans) if lost(text, example) is None else None
            if lost(text, example) is None or lost(rendered, example) is not None:
                return None
            rest = [message for message in example.messages if message["role"] != "system"]
            texts = [self._render(template, rest, example.tools)[0] for template in (candidate, self.text)]
            return (rendered, spans) if texts[0] == texts[1] else None
        except Exception:  # another family's template, tried on a conversation that is not of its form
            return None

    def _difference(self, text: str, answer: int, example: Example) -> tuple[int, int]:
        before = self.render(example.messages[:answer], example.where, example.tools, generation_prompt=True)
        through = self.render(example.messages[: answer + 1], example.where, example.tools)
        if not (through.startswith(before) and text.startswith(through)):
            raise RowError(
                "--chat-template",
                f"the answers of {example.where} cannot be told from the rest: the template writes what precedes an "
                "answer differently once it is there; give a template with {% generation %} markers",
                "answers that cannot be told from the rest",
            )
        return len(before), len(through)


def _failure(where: str, reason: str) -> RowError:
    return RowError("--chat-template", f"the chat template fails at {where}: {reason}", "failures of the chat template")


def _chosen(spans: list[tuple[int, int]], wanted: Sequence[int], example: Example) -> list[tuple[int, int]]:
    """Select the spans of the wanted answers from the spans of all answers."""
    everyone = [i for i, message in enumerate(example.messages) if message["role"] == "assistant"]
    if list(wanted) == everyone:
        return spans
    if len(spans) != len(everyone):
        raise RowError(
            "--chat-template",
            f"it marks {len(spans)} stretches for the {len(everyone)} assistant turns of {example.where}, so the "
            "turns that carry loss cannot be told; mark each assistant turn once",
            "assistant turns that are not marked once",
        )
    return [span for i, span in zip(everyone, spans, strict=True) if i in wanted]

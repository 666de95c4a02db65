"""Messages -> token ids, and the tokens among them that carry loss."""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from finetune.config.errors import InputError
from finetune.data.messages import Example, Message
from finetune.data.rendered import Rendered
from finetune.data.rendering import ChatTemplate
from finetune.data.report import DataReport, RowError
from finetune.data.templates import trl_template

# Which assistant turns carry loss: all of them, or the last of each conversation.
Turns: TypeAlias = Literal["all", "last"]
BATCH = 256  # conversations tokenized at once


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


@dataclass
class EncodedExamples:
    """Conversations that fit, and what became of the others.

    Args:
        max_length: tokens kept of each conversation.
        rows: encoded conversations, each with a target; 5 bytes per token.
        num_truncated: conversations whose end was cut off, dropped ones included.
        num_dropped: conversations left out because no target was left (only with `drop_truncated`).
        num_tokens_cut: tokens cut off.
        sources: conversations by where their mask comes from; see `finetune.data.rendered.Rendered`.
    """

    max_length: int
    rows: list[Encoded] = field(default_factory=list)
    num_truncated: int = 0
    num_dropped: int = 0
    num_tokens_cut: int = 0
    sources: Counter[str] = field(default_factory=Counter)

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows."""
        return sum(len(row) for row in self.rows)

    @property
    def num_targets(self) -> int:
        """Tokens of all rows that carry loss."""
        return sum(int(row.targets.sum()) for row in self.rows)

    def __str__(self) -> str:
        masks = ", ".join(f"{source} {count}" for source, count in self.sources.most_common())
        text = f"{len(self.rows):,} conversations, {self.num_tokens:,} tokens, {self.num_targets:,} of them targets"
        text += f" (masks: {masks}); {self.num_truncated:,} truncated to {self.max_length}"
        if self.num_truncated:
            text += f", {self.num_tokens_cut:,} tokens cut off, {self.num_dropped:,} left out"
        return text


class ChatEncoding:
    """A tokenizer with its chat template and a fixed date.

    Args:
        tokenizer: a fast transformers tokenizer; not changed.
        date: the day that a template sees as today, `YYYY-MM-DD`.
        chat_template: Jinja text that replaces the tokenizer's own, or the name of one of several that it has; None
            keeps its own, of several the one named `default`.
        turns: "all" assistant turns carry loss, or the "last" of each conversation.

    Raises:
        InputError: no template, one that does not compile, a bad date, or no fast tokenizer.
    """

    def __init__(self, tokenizer: Any, *, date: str, chat_template: str | None = None, turns: Turns = "all") -> None:
        if not tokenizer.is_fast:
            raise InputError("--model", "its tokenizer is not a fast one; convert it, so that it has a tokenizer.json")
        try:
            today = datetime.date.fromisoformat(date)
        except ValueError:
            raise InputError("--date", f"{date!r} is no day; write it as 2024-07-26") from None
        if chat_template is None and not tokenizer.chat_template:
            raise InputError(
                "--model", "its tokenizer has no chat template; give tulu, chatml or a Jinja file as --chat-template"
            )
        if chat_template is None and isinstance(tokenizer.chat_template, dict):
            names = ", ".join(sorted(tokenizer.chat_template))
            if "default" not in tokenizer.chat_template:
                raise InputError("--chat-template", f"the tokenizer has several, and no default; give one of {names}")
        text = tokenizer.get_chat_template(chat_template)
        self.tokenizer, self.turns = tokenizer, turns
        own = chat_template is None
        self.template = ChatTemplate(
            text, tokenizer.special_tokens_map, today, lambda: trl_template(tokenizer) if own else None
        )
        # An answer ends with one of these: end of text, or a token added for the template, such as <|im_end|>.
        self.ends = {*tokenizer.added_tokens_decoder, tokenizer.eos_token_id}

    def prompt(self, messages: Sequence[Message], tools: Sequence[Any] = ()) -> list[int]:
        """Return the token ids of messages and of the opening of an answer, to generate from."""
        text = self.template.render(messages, "the prompt", tools, generation_prompt=True)
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def encode(self, examples: Sequence[Example], report: DataReport) -> Iterator[tuple[Encoded, str]]:
        """Yield tokenized conversations at full length, each with the source of its mask.

        Args:
            examples: conversations.
            report: gets those that cannot be used.

        Raises:
            InputError: as `encode_examples`.
        """
        for start in range(0, len(examples), BATCH):
            usable = []
            for example in examples[start : start + BATCH]:
                try:
                    usable.append((example, self.template.answers(example, self.turns == "last")))
                except RowError as error:
                    report.add_bad_row(error)
            for (example, rendered), (ids, offsets) in zip(
                usable, self.tokenize([rendered.text for _, rendered in usable]), strict=True
            ):
                try:
                    targets = self.targets(rendered, ids, offsets, example.where)
                except RowError as error:
                    report.add_bad_row(error)
                    continue
                yield Encoded(np.asarray(ids, np.int32), targets, example.where), rendered.source

    def tokenize(self, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Return for each text its token ids, and the [start, end) of each token in characters."""
        if not texts:
            return []
        tokens = self.tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return list(zip(tokens["input_ids"], tokens["offset_mapping"], strict=True))

    def targets(
        self, rendered: Rendered, ids: Sequence[int], offsets: Sequence[tuple[int, int]], where: str
    ) -> npt.NDArray[np.bool_]:
        """Return which tokens hold any character of an answer, through its end-of-turn token: bool [tokens].

        Raises:
            RowError: an answer ends without such a token, or no token is marked.
        """
        targets = np.zeros(len(ids), np.bool_)
        starts, ends = np.asarray(offsets, np.int64).reshape(-1, 2).T
        for first, last in rendered.spans:
            # A token of spaces may have no width and stand at its end: byte-level tokenizers trim offsets.
            inside = np.where(starts < ends, (starts < last) & (ends > first), (first < ends) & (ends <= last))
            places = np.flatnonzero(inside).tolist()
            closing = [place for place in places if ids[place] in self.ends][-1:]
            if closing and not rendered.text[ends[closing[0]] : last].strip():
                if rendered.source != "markers":  # the line end behind the token is nobody's answer
                    places = [place for place in places if place <= closing[0]]
            elif places and ids[places[-1] + 1 : places[-1] + 2] == [self.tokenizer.eos_token_id]:
                places.append(places[-1] + 1)
            else:
                raise RowError(
                    "--chat-template",
                    f"an assistant turn of {where} ends without an end-of-turn token, so the model would never learn "
                    "to stop; give a template that ends turns with a token, inside its {% generation %} markers if any",
                    "answers without an end-of-turn token",
                )
            targets[places] = True
        targets[:1] = False
        if not targets.any():
            problem = f"it marks no token of {where} as an answer; mark the answers"
            raise RowError("--chat-template", problem, "conversations without a marked answer")
        return targets


def encode_examples(
    examples: Sequence[Example],
    encoding: ChatEncoding,
    *,
    max_length: int,
    drop_truncated: bool = False,
    report: DataReport | None = None,
) -> EncodedExamples:
    """Encode conversations, and mark the tokens that carry loss: assistant turns with their end-of-turn token.

    Args:
        examples: conversations.
        encoding: tokenizer and template.
        max_length: tokens kept of each conversation, from its start.
        drop_truncated: leave out, and count, a conversation whose answers were all cut off, instead of raising.
        report: gets conversations that cannot be used, and is treated as it says; by default the first one raises.

    Returns:
        The conversations in order, and what was cut.

    Raises:
        InputError: a template that refuses a row, leaves a turn out, marks no answer, whose answers cannot be told from
            the rest or end without a token; a row that loses its whole answer to `max_length`. Each names the row.
    """
    report = DataReport() if report is None else report
    result = EncodedExamples(max_length)
    for encoded, source in encoding.encode(examples, report):
        kept = Encoded(encoded.input_ids[:max_length].copy(), encoded.targets[:max_length].copy(), encoded.where)
        result.sources[source] += 1
        result.num_truncated += len(kept) < len(encoded)
        result.num_tokens_cut += len(encoded) - len(kept)
        if kept.targets.any():
            result.rows.append(kept)
        elif drop_truncated:
            result.num_dropped += 1
        else:
            problem = (
                f"{encoded.where} has {len(encoded)} tokens, and its first {max_length} hold no token of an answer; "
                "raise --seq-len, or leave such rows out by --drop-truncated"
            )
            report.add_bad_row(RowError("--seq-len", problem, "answers that --seq-len cuts off"))
    if examples and not result.rows and not report.errors:
        raise InputError("--seq-len", f"no conversation keeps a token of an answer within {max_length}; raise it")
    return result

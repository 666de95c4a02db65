"""The formats of rows, and the way from a row to a conversation. A row is taken by the columns that it has."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any, NamedTuple

from finetune.data.columns import ROW_COLUMNS, Columns
from finetune.data.messages import Example, Message, Role
from finetune.data.report import RowError
from finetune.data.texts import check_characters
from finetune.data.turns import Turns, parsed_list, read_text, read_turns

SEPARATOR = "\n\n"  # between instruction and input


class NamedRow(NamedTuple):
    """Columns that hold something, by their names here; the origin of the row; and what `--columns` says."""

    values: Mapping[str, Any]
    where: str
    columns: Columns

    def name(self, column: str) -> str:
        """Return the dataset's name of a column."""
        return self.columns.get(column, column)


class ReadRow(NamedTuple):
    """A conversation, the names of all columns and keys of its row that hold something, and those that are not read."""

    example: Example
    names: Set[str]
    unused: Set[str]


class RowFormat(NamedTuple):
    """A format of rows.

    Args:
        needs: columns by which it is told.
        takes: columns that it reads where they are there.
        read: makes turns of a row, and gives the index of the first one that may carry loss.
    """

    needs: tuple[str, ...]
    takes: tuple[str, ...]
    read: Callable[[NamedRow], tuple[Turns, int]]

    @property
    def title(self) -> str:
        """Names of the needed columns, to be shown to people."""
        return " and ".join(f"`{name}`" for name in self.needs)


def _read_dialog(row: NamedRow) -> tuple[Turns, int]:
    """Read `messages` or `conversations`."""
    column = "messages" if "messages" in row.values else "conversations"
    return read_turns(row.values[column], row.name(column), row.where, row.columns), 0


def _read_prompt(row: NamedRow) -> tuple[Turns, int]:
    """Read a prompt and its answer, each a text or a list of messages; nothing in the prompt carries loss."""
    ask = next(name for name in ("prompt", "question") if name in row.values)
    reply = next(name for name in ("completion", "response", "answer") if name in row.values)
    prompt, answer = _side(row, ask, "user"), _side(row, reply, "assistant")
    history = _history(row)
    before = len(history) + len(prompt.messages)
    masked = {i + len(history) for i in prompt.masked} | {i + before for i in answer.masked}
    keys, unused = prompt.keys | answer.keys, prompt.unused | answer.unused
    return Turns([*history, *prompt.messages, *answer.messages], masked, keys, unused), before


def _read_instruction(row: NamedRow) -> tuple[Turns, int]:
    """Read Alpaca's rows: an instruction with its input, the answer, and perhaps earlier turns."""
    parts = [_text(row, name) for name in ("instruction", "input") if name in row.values]
    ask = Message(role="user", content=SEPARATOR.join(part for part in parts if part.strip()))
    answer = Message(role="assistant", content=_text(row, "output"))
    return Turns([*_history(row), ask, answer]), 0


DIALOG, PAIR = ("system", "tools"), ("system", "history", "tools")
# In the order in which they are tried. The first three are those of release 0.1, which took the first that fits, and
# go before the others; of the others a row may fit one only.
FORMATS = (
    RowFormat(("messages",), DIALOG, _read_dialog),
    RowFormat(("prompt", "completion"), PAIR, _read_prompt),
    RowFormat(("instruction", "output"), ("input", *PAIR), _read_instruction),
    RowFormat(("conversations",), DIALOG, _read_dialog),
    RowFormat(("prompt", "response"), PAIR, _read_prompt),
    RowFormat(("question", "answer"), PAIR, _read_prompt),
)
NUM_FIRST = 3
FORMS = ", or ".join(form.title for form in FORMATS)


def example_from_row(row: Any, where: str, columns: Columns | None = None) -> Example:
    """Convert a row of a dataset to a conversation; see `read_row`."""
    return read_row(row, where, columns or {}).example


def read_row(row: Any, where: str, columns: Columns) -> ReadRow:
    """Convert a row of a dataset to a conversation. Columns that hold nothing count as missing.

    Args:
        row: has the columns of one of `FORMATS`.
        where: its origin, to be shown to people.
        columns: other names of columns, keys of messages and roles.

    Raises:
        RowError: no format fits or several do, something that is no text, half a character, an unknown role, no answer,
            or an empty one.
    """
    if not isinstance(row, Mapping):
        hint = "; a file that is one array is to be called .json" if isinstance(row, list) else ""
        problem = f"{where} is no object with columns; it needs {FORMS}{hint}"
        raise RowError("--dataset", problem, "no object with columns")
    named = _named(row, where, columns)
    chosen = _choose(named, row)
    turns, first_answer = chosen.read(named)
    used = {named.name(name) for name in (*chosen.needs, *chosen.takes) if name in named.values}
    held = {str(name) for name, value in row.items() if value not in (None, "", [])}
    messages, masked = turns.messages, turns.masked
    system = _system(named, messages)
    if system:
        messages = [system, *messages]
        masked, first_answer = {i + 1 for i in masked}, first_answer and first_answer + 1
    example = Example(tuple(messages), where, first_answer, frozenset(masked), _tools(named))
    _check_answers(example)
    return ReadRow(example, held | turns.keys, (held - used) | turns.unused)


def fits_a_format(row: Any, columns: Columns) -> bool:
    """Check whether a value has all columns of some format."""
    return isinstance(row, Mapping) and bool(_fitting(_named(row, "", columns)))


def _named(row: Mapping[Any, Any], where: str, columns: Columns) -> NamedRow:
    values = {name: row.get(columns.get(name, name)) for name in ROW_COLUMNS}
    return NamedRow({name: value for name, value in values.items() if value is not None}, where, columns)


def _fitting(row: NamedRow) -> list[RowFormat]:
    """Return the formats that fit; if `--columns` names columns of some of them, those alone."""
    fitting = [form for form in FORMATS if all(name in row.values for name in form.needs)]
    return [form for form in fitting if set(form.needs) & row.columns.keys()] or fitting


def _choose(row: NamedRow, given: Mapping[Any, Any]) -> RowFormat:
    fitting = _fitting(row)
    if fitting and (len(fitting) == 1 or fitting[0] in FORMATS[:NUM_FIRST]):
        return fitting[0]
    if fitting:
        both = ", and ".join(form.title for form in fitting)
        names = ",".join(f"{name}={row.name(name)}" for name in fitting[0].needs)
        problem = f"{row.where} fits several formats: {both}; say which to take, such as --columns {names}"
        raise RowError("--dataset", problem, "several formats fit")
    names = ", ".join(f"`{name}`" for name, value in given.items() if value is not None) or "nothing"
    problem = f"{row.where} has {names}; it needs {FORMS}"
    missing = [f"`{yours}`" for name, yours in row.columns.items() if name in ROW_COLUMNS and given.get(yours) is None]
    if missing:
        problem += f" ({', '.join(missing)} of --columns not being there)"
    raise RowError("--dataset", f"{problem}; {_hint(given)}", "no format fits")


def _hint(given: Mapping[Any, Any]) -> str:
    """Say what to do with a row of no known format; some are of other kinds of training."""
    if given.get("chosen") is not None:
        name = "messages" if isinstance(given["chosen"], list) else "completion"
        return f"preference pairs are for other methods; to learn the chosen answers, give --columns {name}=chosen"
    if given.get("text") is not None:
        return "plain text is what finetune.pretrain trains on"
    return "name your columns by --columns"


def _text(row: NamedRow, column: str) -> str:
    return read_text(row.values[column], f"`{row.name(column)}` of {row.where}")


def _side(row: NamedRow, column: str, role: Role) -> Turns:
    value = row.values[column]
    if isinstance(value, str):
        return Turns([Message(role=role, content=_text(row, column))])
    return read_turns(value, row.name(column), row.where, row.columns)


def _history(row: NamedRow) -> list[Message]:
    """Read earlier turns: pairs of a question and its answer."""
    value = row.values.get("history") or []
    pairs = parsed_list(value.strip() or "[]") if isinstance(value, str) else value
    what = f"`{row.name('history')}` of {row.where}"
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        problem = f"{what} holds something else than pairs [question, answer]; correct it"
        raise RowError("--dataset", problem, "a history that is no list of pairs")
    roles: tuple[Role, Role] = ("user", "assistant")
    return [
        Message(role=role, content=read_text(text, what))
        for pair in pairs
        for role, text in zip(roles, pair, strict=True)
    ]


def _system(row: NamedRow, messages: Sequence[Message]) -> Message | None:
    """Return the turn of a `system` column, unless the conversation has it already."""
    if "system" not in row.values or not _text(row, "system").strip():
        return None
    text = _text(row, "system")
    present = [message["content"] for message in messages if message["role"] in ("system", "developer")]
    if not present:
        return Message(role="system", content=text)
    if present[0] != text:
        problem = f"{row.where} has a system turn, and another text in `{row.name('system')}`; leave one of them out"
        raise RowError("--dataset", problem, "two system turns")
    return None


def _tools(row: NamedRow) -> tuple[Any, ...]:
    value = row.values.get("tools") or []
    tools = parsed_list(value.strip() or "[]") if isinstance(value, str) else value
    what = f"`{row.name('tools')}` of {row.where}"
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise RowError("--dataset", f"{what} is no list of JSON schemas; correct it", "tools that are no list")
    check_characters(json.dumps(tools, ensure_ascii=False, default=str), what)
    return tuple(tools)


def _check_answers(example: Example) -> None:
    where = example.where
    if not example.answers:
        if any(message["role"] == "assistant" for message in example.messages[example.first_answer :]):
            problem = f"{where} has no assistant turn whose weight is above 0; there is nothing to learn from it"
            raise RowError("--dataset", problem, "no assistant turn with a weight")
        problem = f"{where} has no assistant turn; there is nothing to learn from it"
        raise RowError("--dataset", problem, "no assistant turn")
    for i in example.answers:
        message = example.messages[i]
        if not message["content"].strip() and "tool_calls" not in message:
            problem = f"{where} has an empty assistant turn (message {i + 1}); leave it out"
            raise RowError("--dataset", problem, "an empty assistant turn")

"""The option `--columns`: what a dataset calls the columns, the keys of messages, and the roles."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias, get_args

from finetune.config.errors import InputError
from finetune.data.messages import Role

# Name here -> name in the dataset.
Columns: TypeAlias = Mapping[str, str]
ROW_COLUMNS = (
    *("messages", "conversations", "prompt", "completion", "response", "question", "answer"),
    *("instruction", "input", "output", "system", "history", "tools"),
)
TURN_KEYS = ("role", "content", "weight")
ROLES: tuple[Role, ...] = get_args(Role)


def parse_columns(text: str | None) -> Columns:
    """Read `name=yours,...`.

    Args:
        text: of the option; None for none.

    Returns:
        The name of each column, key of a message or role here -> its name in the dataset.

    Raises:
        InputError: not of that form, an unknown name, or one that stands twice.
    """
    found: dict[str, str] = {}
    for pair in (text or "").split(",") if text is not None else ():
        name, separator, yours = (part.strip() for part in pair.partition("="))
        if not separator or not name or not yours:
            raise InputError("--columns", f"{pair!r} is not NAME=YOURS; give pairs such as role=from,content=value")
        if name not in (*ROW_COLUMNS, *TURN_KEYS, *ROLES):
            known = f"columns {', '.join(ROW_COLUMNS)}; keys {', '.join(TURN_KEYS)}; roles {', '.join(ROLES)}"
            raise InputError("--columns", f"{name!r} is no name that is known here; give one of the {known}")
        if name in found:
            raise InputError("--columns", f"{name!r} stands twice; give each name once")
        found[name] = yours
    return found


def column_names(columns: Columns) -> set[str]:
    """Return the names of all columns of a dataset that may be read."""
    return {columns.get(name, name) for name in ROW_COLUMNS}


def check_seen(columns: Columns, seen: set[str], dataset: str) -> None:
    """Check that each column, key and role that was named is somewhere in the dataset.

    Raises:
        InputError: one is not.
    """
    for name, yours in columns.items():
        if yours not in seen:
            raise InputError("--columns", f"no row of {dataset} has `{yours}`; correct {name}={yours}, or leave it out")

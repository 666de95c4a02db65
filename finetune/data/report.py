"""Rows that cannot be used, and what is said about the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from finetune.config.errors import InputError

# What becomes of a bad row: it ends the run, is left out and counted, or is listed, and unreadable files as well; or it
# is counted, of a run that would end.
OnBadRow: TypeAlias = Literal["stop", "skip", "list", "count"]
SHOWN = 8  # names of files or columns in one line


# What ends the error of a bad row that ends a run.
WAYS_OUT = "--check-data lists all bad rows, --skip-bad-rows trains on the others"


class RowError(InputError):
    """One row of a dataset that cannot be used.

    Args:
        option: as of `InputError`.
        problem: names the row, what is wrong with it, and what to do instead; no final full stop.
        reason: a few words on the fault, equal for all rows that have it.
    """

    def __init__(self, option: str, problem: str, reason: str) -> None:
        super().__init__(option, problem)
        self.args = (option, problem, reason)  # all three, so that it survives being sent between ranks

    @property
    def reason(self) -> str:
        """A few words on the fault, equal for all rows that have it."""
        return str(self.args[2])


@dataclass
class DataReport:
    """Findings in a dataset while it is read and tokenized.

    Args:
        on_bad_row: what becomes of a bad row.
        errors: of rows that were left out, and, with "list", of files that could not be read; in their order.
        num_rows: rows read, bad ones included.
        unused: columns, and keys of messages, that nothing reads: their names, and the rows that have them.
        unread: files of a folder that were not read, and why.
        seen: names of columns, keys of messages and roles; kept only where `--columns` was given.
        num_assistant_first: conversations that begin with an answer.
        num_unanswered: conversations that end with a turn that no answer follows.
    """

    on_bad_row: OnBadRow = "stop"
    errors: list[InputError] = field(default_factory=list)
    num_rows: int = 0
    unused: Counter[str] = field(default_factory=Counter)
    unread: list[str] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)
    num_assistant_first: int = 0
    num_unanswered: int = 0

    def add_bad_row(self, error: RowError) -> None:
        """Take note of a bad row.

        Raises:
            RowError: this one, where a bad row ends the run.
        """
        if self.on_bad_row == "stop":
            raise error
        self.errors.append(error)

    def add_bad_line(self, error: RowError) -> None:
        """Count a row that could not even be read, and take note of it.

        Raises:
            RowError: as `add_bad_row`.
        """
        self.num_rows += 1
        self.add_bad_row(error)

    def add_bad_file(self, error: InputError) -> None:
        """Take note of a file that cannot be read to its end.

        Raises:
            InputError: this one, unless all errors are to be listed: a damaged file is no bad row.
        """
        if self.on_bad_row != "list":
            raise error
        self.errors.append(error)

    def reasons(self) -> Counter[str]:
        """Count the errors by their reasons."""
        return Counter(map(_reason, self.errors))

    def notes(self) -> list[str]:
        """Return the lines for the log: what is not used, left out, or unusual."""
        lines = []
        if self.unread:
            lines.append(f"note: files that were not read: {some(self.unread)}")
        if self.unused:
            by_count = sorted(self.unused.items(), key=lambda item: (-item[1], item[0]))
            names = [f"`{name}` ({count:,} rows)" for name, count in by_count]
            lines.append(f"note: columns and keys that were not used: {some(names)}")
        if self.num_assistant_first:
            lines.append(f"note: {self.num_assistant_first:,} conversations begin with an assistant turn")
        if self.num_unanswered:
            lines.append(
                f"note: {self.num_unanswered:,} conversations end with a turn that no answer follows: nothing is "
                "learned from it"
            )
        bad = f"note: {len(self.errors):,} of {self.num_rows:,} rows are bad"
        counts = ", ".join(f"{count:,} {reason}" for reason, count in self.reasons().most_common())
        if self.errors and self.on_bad_row == "skip":
            lines.append(f"{bad} and left out: {counts}")
        elif self.errors and self.on_bad_row == "count":
            lines.append(f"{bad}, and would end a run: {counts}; {WAYS_OUT}")
        return lines

    def listing(self) -> list[str]:
        """Return a line for every error, those of one reason together behind their number, the most frequent first."""
        lines = []
        for reason, count in self.reasons().most_common():
            lines.append(f"{count:,} {reason}:")
            lines += [f"  {error}" for error in self.errors if _reason(error) == reason]
        return lines


def _reason(error: InputError) -> str:
    return error.reason if isinstance(error, RowError) else "unreadable file"


def some(names: Sequence[str]) -> str:
    """Return the first `SHOWN` names in one line, and how many more there are."""
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
